"""kill -9 of the operator at twenty random moments of a job's life."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.product import ROOT, Product
from tests.e2e.test_whole_path import tiny_job

pytestmark = pytest.mark.e2e

KILLS = {"as it begins": 7, "while it trains": 6, "as it ends": 7}
STEPS, HELD_AT = 24, 6
WAITING = """
import sys
from finetune_operator import handlers
from finetune_operator.cli.main import main
print("ready", flush=True)
sys.stdin.readline()
main(["operator", "--config", sys.argv[1]])
"""


class Operators:
    """One operator at a time, each killed at a random moment.

    The next one has nothing left to load when its turn comes: so the kills fall into all of an operator's doings, from
    its first request and the taking of the Lease to the last status.
    """

    def __init__(self, settings: Path, environment: dict[str, str], log: Path) -> None:
        self._command = [sys.executable, "-c", WAITING, str(settings)]
        self._environment = environment
        self.log = log
        self._draw = random.Random(20)
        self._running, self._following = self._begin(self._load()), self._load()

    def _load(self) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        with self.log.open("ab") as log:
            return subprocess.Popen(self._command, env=self._environment, stdin=pipe, stdout=pipe, stderr=log)

    def _begin(self, waiting: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        assert waiting.stdin is not None
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == b"ready\n", self.tail()
        waiting.stdin.write(b"\n")
        waiting.stdin.flush()
        return waiting

    def kill(self, times: int) -> None:
        """So many operators begin their work, and are killed in it."""
        for _ in range(times):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running.wait(timeout=self._draw.uniform(0.0, 2.0))
                raise AssertionError(f"an operator ended by itself:\n{self.tail()}")
            self._running.kill()
            self._running.wait()
            self._running, self._following = self._begin(self._following), self._load()

    def tail(self) -> str:
        """The last they said."""
        return self.log.read_text()[-3000:]

    def close(self) -> None:
        for process in (self._running, self._following):
            process.kill()
            process.wait()


@pytest.fixture
def without_installed_operator(product: Product) -> object:
    """The operator of the chart steps aside: this test runs its own, to kill it."""
    scale = ["scale", "-n", "finetune-system", "deploy/finetune-operator"]
    product.cluster.kubectl(*scale, "--replicas=0")
    product.cluster.wait_gone("pods", namespace="finetune-system")
    yield
    product.cluster.kubectl(*scale, "--replicas=2")


@pytest.fixture
def operators(product: Product, team: str, tmp_path: Path, without_installed_operator: object) -> Iterator[Operators]:
    settings = tmp_path / "settings.yaml"
    values = {
        "namespaces": [team],
        "profiles": {"default": product.profile()},
        "httpPort": 0,
        "progressInterval": "500ms",
        "progressThrough": "apiserver",
        "leaderElection": {"namespace": team},
    }
    settings.write_text(yaml.safe_dump(values))
    # One identity, as a container has that is restarted in its pod.
    environment = {
        **product.cluster.environment,
        "POD_NAME": "operator",
        "PYTHONPATH": ":".join(str(ROOT / d) for d in ("crds", "operator")),
    }
    started = Operators(settings, environment, tmp_path / "operator.log")
    yield started
    started.close()


@pytest.fixture
def seen(product: Product, team: str, tmp_path: Path) -> Iterator[Path]:
    """A file with the name of every pod there has been."""
    path = tmp_path / "pods"
    with path.open("w") as out:
        watch = ["kubectl", "get", "pods", "-n", team, "-w", "-o", "name"]
        watching = subprocess.Popen(watch, env=product.cluster.environment, stdout=out)
    yield path
    watching.terminate()
    watching.wait()


def test_the_job_succeeds_and_no_gang_runs_twice(
    product: Product, team: str, tiny_model: str, seen: Path, operators: Operators
) -> None:
    cluster, gate = product.cluster, product.gate("steady", team)
    gate.hold(HELD_AT)
    cluster.apply(json.dumps(tiny_job(tiny_model, product, "steady", replicas=2, steps=STEPS)), namespace=team)
    operators.kill(KILLS["as it begins"])
    product.wait("steady", team, lambda s: (s.get("progress") or {}).get("step") == HELD_AT)
    operators.kill(KILLS["while it trains"])
    gate.open()
    operators.kill(KILLS["as it ends"])
    done = product.wait_state("steady", team, "Succeeded")["status"]
    assert [a["cause"] for a in done["attempts"]] == ["Succeeded"], operators.tail()
    pods = cluster.objects("pods", namespace=team)
    assert set(seen.read_text().split()) == {f"pod/{pod['metadata']['name']}" for pod in pods}
    indexes = sorted(p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] for p in pods)
    assert indexes == ["0", "1"]
    assert len(cluster.objects("batch/v1/jobs", namespace=team)) == 1
