"""`pip install .` without extras: what needs none works, and what needs one says which."""

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.unit.local_runs import Bench, job

ROOT = Path(__file__).parents[2]

_BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {blocked!r} else found(name, package)
from finetune_operator.cli.main import main
main()
"""


def _installed(requirements: list[str], seen: set[str]) -> Iterator[str]:
    """The distributions that pip installs for these."""
    for text in requirements:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        if name not in seen and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            seen.add(name)
            yield name
            yield from _installed(metadata.requires(name) or [], seen)


@pytest.fixture(scope="module")
def blocked() -> set[str]:
    """The modules that are not there without an extra."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    there = set(_installed(project["dependencies"], set()))
    modules = metadata.packages_distributions()
    return {m for m, owners in modules.items() if not {o.lower().replace("_", "-") for o in owners} & there}


def plainly(blocked: set[str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """One command of a plain install."""
    code = _BLOCKED.format(blocked=blocked)
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_what_needs_no_extra_works(bench: Bench, blocked: set[str]) -> None:
    assert {"torch", "kopf", "kubernetes", "prometheus_client"} <= blocked and not {"click", "rich"} & blocked
    file = str(bench.write(job(bench.home)))
    for command in (["--help"], ["validate", file], ["plan", file], ["methods"], ["get"], ["run", "--help"]):
        done = plainly(blocked, *command)
        assert done.returncode == 0, done.stderr


def test_what_needs_an_extra_says_which(bench: Bench, blocked: set[str]) -> None:
    file = str(bench.write(job(bench.home)))
    merge = ["merge", "--base", "hf://a/b", "--adapter", "s3://a/b", "--output", "s3://a/c"]
    for command in (["run", file], ["data", "preview", file], ["chat", "hf://a/b"], merge):
        done = plainly(blocked, *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("This needs the extra trainer of finetune-operator (torch, ")
        assert done.stderr.endswith("pip install -e '.[trainer]' -c constraints.txt\n")
    done = plainly(blocked, "operator")
    assert done.returncode == 2
    assert done.stderr.startswith("This needs the extra operator of finetune-operator (kopf, kubernetes, prometheus_")
