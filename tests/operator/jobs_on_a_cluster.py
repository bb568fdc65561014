"""What the tests on a cluster do with FineTuneJobs and ask of them."""

from __future__ import annotations

import json
from typing import Any

from finetune_api.causes import Cause
from finetune_api.run import OutputInfo, Termination
from tests.cluster.access import Object
from tests.cluster.cluster import Cluster

JOBS = "finetune.dev/v1alpha1/finetunejobs"
BATCH_JOBS = "batch/v1/jobs"
CHILDREN = "jobs,pods,services,networkpolicies,configmaps"
EXIT = "simulate.finetune.dev/exit-code"
MESSAGE = "simulate.finetune.dev/message"


def fine_tune_job(name: str, **spec: Any) -> Object:
    """A FineTuneJob of two workers with eight GPUs each."""
    least = {
        "model": {"uri": "hf://org/model"},
        "data": {"train": [{"uri": "s3://team/train.jsonl"}]},
        "output": {"uri": f"s3://team/{name}"},
        "workers": {"replicas": 2, "gpusPerWorker": 8},
    }
    api = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob"}
    return {**api, "metadata": {"name": name}, "spec": {**least, **spec}}


def workers(cluster: Cluster, namespace: str, name: str, attempt: int = 1, count: int = 2) -> list[Object]:
    """The workers of an attempt, by index, once they run."""
    selector = f"finetune.dev/job={name},finetune.dev/attempt={attempt}"
    return cluster.wait_for_pods(selector, count, namespace=namespace)


def condition(job: Object, kind: str) -> Object:
    """The condition of that type, an empty one where there is none yet."""
    found: list[Object] = job.get("status", {}).get("conditions", [])
    return next((c for c in found if c["type"] == kind), {"status": "", "reason": "", "message": ""})


def wait_for_reason(cluster: Cluster, namespace: str, name: str, kind: str, reason: str) -> Object:
    """The condition of that type, once it gives that reason."""

    def so(jobs: list[Object]) -> Object | None:
        found = condition(jobs[0], kind) if jobs else {"reason": ""}
        return found if found["reason"] == reason else None

    found = cluster.wait_for(JOBS, so, name=name, namespace=namespace)
    assert found
    return found


def wait_for_state(cluster: Cluster, namespace: str, name: str, state: str) -> Object:
    """The status, once it tells that state."""

    def so(jobs: list[Object]) -> Object | None:
        status: Object = jobs[0].get("status", {}) if jobs else {}
        return status if status.get("state") == state else None

    found = cluster.wait_for(JOBS, so, name=name, namespace=namespace)
    assert found
    return found


def end(cluster: Cluster, pod: Object, code: int, reason: str = "", word: Termination | str = "") -> None:
    """The pod's containers end with this code, and its trainer leaves this word."""
    message = word.to_message() if isinstance(word, Termination) else word
    said = {EXIT: code, "simulate.finetune.dev/reason": reason, MESSAGE: message}
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    cluster.kubectl("annotate", "pod", name, "-n", namespace, *(f"{key}={value}" for key, value in said.items()))


def end_trainer(
    cluster: Cluster, pod: Object, word: Termination, others: Object | None = None, phase: str = "Running"
) -> None:
    """The pod's trainer ends with 0 and this word; the other containers are in this state, by default they run on."""
    name, namespace, now = pod["metadata"]["name"], pod["metadata"]["namespace"], pod["status"]["startTime"]
    ended = {"exitCode": 0, "reason": "Completed", "message": word.to_message(), "startedAt": now, "finishedAt": now}
    statuses = [
        {**c, "state": {"terminated": ended}} if c["name"] == "trainer" else {**c, "state": others or c["state"]}
        for c in pod["status"]["containerStatuses"]
    ]
    patch = json.dumps({"status": {"phase": phase, "containerStatuses": statuses}})
    cluster.kubectl("patch", "pod", name, "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)


def change(cluster: Cluster, namespace: str, name: str, **spec: Any) -> None:
    """kubectl edit."""
    patch = json.dumps({"spec": spec})
    cluster.kubectl("patch", "ftj", name, "-n", namespace, "--type=merge", "-p", patch)


def told(cluster: Cluster, namespace: str, name: str, last: str) -> set[tuple[str, str, str]]:
    """Type, reason and message of the events on a FineTuneJob, once there is one of the reason ``last``."""

    def so(found: list[Object]) -> set[tuple[str, str, str]] | None:
        own = [e for e in found if (e["involvedObject"]["kind"], e["involvedObject"]["name"]) == ("FineTuneJob", name)]
        return {(e["type"], e["reason"], e["message"]) for e in own} if last in {e["reason"] for e in own} else None

    events = cluster.wait_for("events", so, namespace=namespace)
    assert events
    return events


def shown(cluster: Cluster, namespace: str, name: str) -> dict[str, str]:
    """What ``kubectl get ftj -o wide`` prints, by column."""
    head, row = cluster.kubectl("get", "ftj", name, "-n", namespace, "-o", "wide").splitlines()
    starts = [head.index(column) for column in head.split()]
    ends = [*starts[1:], None]
    return {column: row[a:b].strip() for column, a, b in zip(head.split(), starts, ends, strict=True)}


def result(name: str, step: int = 10) -> Termination:
    """The last word of rank 0 of a run that went well."""
    output = OutputInfo(uri=f"s3://team/{name}", kind="model", digest="sha256:1", size=2048)
    return Termination(cause=Cause.SUCCEEDED, step=step, max_steps=step, loss=0.5, outputs=[output])


def uids(objects: list[Object]) -> set[str]:
    """What tells objects of one name apart."""
    return {o["metadata"]["uid"] for o in objects}
