"""Where the chart is, and what Helm makes of it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import binaries

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "finetune-operator"
VALUES = {path.stem: path for path in sorted((Path(__file__).parent / "values").glob("*.yaml"))}
NAMESPACE = "finetune-system"

Object = dict[str, Any]


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Helm, which is built at its first use. Failing is an answer too."""
    program = binaries.require(["helm"]) / "helm"
    return subprocess.run([program, *arguments], text=True, capture_output=True, check=False)


def template(*options: str | Path) -> list[Object]:
    """The objects the chart makes with these options (--set, --values …)."""
    done = helm("template", "finetune-operator", CHART, "--namespace", NAMESPACE, *options)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def template_set(name: str) -> list[Object]:
    """The objects the chart makes with one of the value sets of values/."""
    return template("--values", VALUES[name])


def only(objects: list[Object], kind: str, name: str = "") -> Object:
    """The one object of that kind (and name)."""
    found = [one for one in objects if one["kind"] == kind and name in ("", one["metadata"]["name"])]
    assert len(found) == 1, [f"{one['kind']} {one['metadata']['name']}" for one in objects]
    return found[0]


def kinds(objects: list[Object]) -> set[str]:
    """All kinds among the objects."""
    return {one["kind"] for one in objects}
