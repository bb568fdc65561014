"""What a fleet of running jobs costs the operator and the API server: ``python -m benchmarks.fleet --jobs 200``.

A real API server with simulated nodes and pods, the operator as a process with the chart's rights and intervals, and
trainers that answer with their progress. No GPU, no network. The API server proxies every look at a trainer's progress,
which in a cluster goes from pod to pod.
"""

import argparse
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.sandbox import commands
from tests.operator.jobs_on_a_cluster import JOBS, fine_tune_job
from tests.operator.operator_process import OperatorProcess, Trainers, account, prepared, profile

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """What a process has used, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def ages(cluster: Cluster, namespace: str) -> list[float]:
    """Seconds since each job's progress was last taken over, sorted."""
    now = datetime.now(UTC)
    told = [job["status"]["progress"]["updatedTime"] for job in cluster.objects(JOBS, namespace=namespace)]
    return sorted((now - datetime.fromisoformat(time)).total_seconds() for time in told)


def measure(operator: OperatorProcess, api_server: int, seconds: float) -> dict[str, float]:
    """Figures of so many seconds."""

    def figures() -> dict[str, float]:
        return {
            "at": time.monotonic(),
            "passes": operator.metric("finetune_operator_reconcile_seconds_count", result="ok") or 0,
            "in passes": operator.metric("finetune_operator_reconcile_seconds_sum", result="ok") or 0,
            "operator": cpu_seconds(operator.process.pid),
            "API server": cpu_seconds(api_server),
        }

    before = figures()
    time.sleep(seconds)
    after = figures()
    grown = {name: after[name] - before[name] for name in before}
    return {
        "passes per second": grown["passes"] / grown["at"],
        "seconds per pass": grown["in passes"] / max(grown["passes"], 1),
        "operator, cores": grown["operator"] / grown["at"],
        "API server, cores": grown["API server"] / grown["at"],
        "errors": operator.metric("finetune_operator_reconcile_errors_total") or 0,
    }


def main() -> None:
    """One fleet, one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200, help="of one worker with one GPU each")
    parser.add_argument("--seconds", type=float, default=60)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        Cluster("simulated") as cluster,
        prepared(cluster, nodes=-(-asked.jobs // 8)) as own,
        account(cluster, own, Path(temporary)) as kubeconfig,
        cluster.namespace("fleet") as namespace,
    ):
        settings = {
            "profiles": {"default": profile(own)},
            "progressThrough": "apiserver",
            "leaderElection": {"namespace": own},
        }
        operator = OperatorProcess(cluster, kubeconfig, Path(temporary), "operator", settings)
        trainers = Trainers(cluster)
        began = time.monotonic()
        one = {"replicas": 1, "gpusPerWorker": 1}
        jobs = [json.dumps(fine_tune_job(f"job-{number}", workers=one)) for number in range(asked.jobs)]
        cluster.kubectl("create", "-n", namespace, "-f", "-", input="\n---\n".join(jobs))
        for pod in cluster.wait_for_pods("finetune.dev/job", asked.jobs, namespace=namespace, timeout=600):
            trainers.say(pod, phase="training", step=1, max_steps=100, loss=1.0)
        running = {"namespace": namespace, "state": "Running"}
        operator.wait_until("all run", lambda: operator.metric("finetune_jobs", **running) == asked.jobs, timeout=600)
        print(f"{asked.jobs} jobs, all running {time.monotonic() - began:.0f} s after kubectl create", flush=True)
        mark = cluster.sandbox.state.name.encode()
        [api_server] = [
            pid for pid, line in commands() if line.split(b"\0")[0].endswith(b"/kube-apiserver") and mark in line
        ]
        for name, value in measure(operator, api_server, asked.seconds).items():
            print(f"{name}: {value:.3f}", flush=True)
        old = ages(cluster, namespace)
        print(f"progress is {old[len(old) // 2]:.1f} s old (median), {old[-1]:.1f} s (oldest)", flush=True)
        trainers.stop()
        operator.stop()


if __name__ == "__main__":
    main()
