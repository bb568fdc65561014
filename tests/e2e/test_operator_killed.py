"""kill -9 of the operator at twenty random moments of a job's life."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.product import JOBS, ROOT, Product, overlay_profile
from tests.e2e.test_whole_path import tiny_job

pytestmark = pytest.mark.e2e

KILLS = 20
WAITING = """
import sys
from finetune_operator import handlers
from finetune_operator.cli.main import main
print("ready", flush=True)
sys.stdin.readline()
main(["operator", "--config", sys.argv[1]])
"""


@pytest.fixture
def without_installed_operator(product: Product) -> object:
    """The operator of the chart steps aside: this test runs its own, to kill it."""
    scale = ["scale", "-n", "finetune-system", "deploy/finetune-operator"]
    product.cluster.kubectl(*scale, "--replicas=0")
    product.cluster.wait_gone("pods", namespace="finetune-system", timeout=90)
    yield
    product.cluster.kubectl(*scale, "--replicas=2")


@pytest.mark.usefixtures("without_installed_operator")
def test_the_job_succeeds_and_no_gang_runs_twice(product: Product, team: str, tiny_model: str, tmp_path: Path) -> None:
    cluster, draw = product.cluster, random.Random(20)
    settings = tmp_path / "settings.yaml"
    profile = overlay_profile(cluster.s3.inside)
    values = {
        "namespaces": [team],
        "profiles": {"default": profile},
        "httpPort": 0,
        "progressInterval": "500ms",
        "progressThrough": "apiserver",
        "leaderElection": {"namespace": team},
    }
    settings.write_text(yaml.safe_dump(values))
    # One identity, as a container has that is restarted in its pod.
    environment = {
        **cluster.environment,
        "POD_NAME": "operator",
        "PYTHONPATH": ":".join(str(ROOT / d) for d in ("crds", "operator")),
    }
    log = (tmp_path / "operator.log").open("w")

    def operator() -> subprocess.Popen[bytes]:
        """One that has nothing left to load, and waits to be begun."""
        command = [sys.executable, "-c", WAITING, str(settings)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=log)

    def loaded(waiting: subprocess.Popen[bytes]) -> None:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == b"ready\n", Path(log.name).read_text()[-3000:]

    def begin(waiting: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        assert waiting.stdin is not None
        waiting.stdin.write(b"\n")
        waiting.stdin.flush()
        return waiting

    seen = tmp_path / "pods"
    with seen.open("w") as out:
        watch = ["kubectl", "get", "pods", "-n", team, "-w", "-o", "name"]
        watching = subprocess.Popen(watch, env=cluster.environment, stdout=out)
    cluster.apply(json.dumps(tiny_job(tiny_model, product, "steady", replicas=2, steps=1200)), namespace=team)
    running, following, killed = begin(operator()), operator(), 0
    try:
        # The next one is ready to go on at once: the kills fall into all of an operator's doings, from its first
        # request and the taking of the Lease to the last status.
        while killed < KILLS:
            loaded(following)
            try:
                running.wait(timeout=draw.uniform(0.0, 2.0))
            except subprocess.TimeoutExpired:
                state = cluster.get(JOBS, "steady", namespace=team).get("status", {}).get("state")
                if state == "Succeeded":
                    break
                running.send_signal(signal.SIGKILL)
                killed += 1
            running.wait()
            running, following = begin(following), operator()
        done = product.wait_state("steady", team, "Succeeded", 900)["status"]
    finally:
        for process in (running, following):
            process.kill()
            process.wait()
        log.close()
        watching.terminate()
        watching.wait()
    assert killed == KILLS, f"the job was over after {killed} kills: make it longer"
    assert [a["cause"] for a in done["attempts"]] == ["Succeeded"], Path(log.name).read_text()[-3000:]
    pods = cluster.objects("pods", namespace=team)
    assert set(seen.read_text().split()) == {f"pod/{pod['metadata']['name']}" for pod in pods}
    indexes = sorted(p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] for p in pods)
    assert indexes == ["0", "1"]
    assert len(cluster.objects("batch/v1/jobs", namespace=team)) == 1
