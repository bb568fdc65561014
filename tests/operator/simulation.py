"""A Kubernetes in memory, small enough to be crashed at every call: Jobs, pods, nodes, and a trainer that steps.

It plays what the Job controller, the kubelets and the trainer do, tick by tick, so that thousands of lives of a job
can be run in seconds. The real ones are in tests/cluster and tests/e2e.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.causes import Cause
from finetune_api.conditions import Reason
from finetune_api.run import CheckpointInfo, OutputInfo, Progress, Termination
from finetune_api.schema import UNSEEN
from finetune_operator import manifests
from finetune_operator.cluster import ClusterError, Object, RefusedError, is_same
from finetune_operator.observe import controller_of, format_time
from finetune_operator.reconcile import Result, reconcile
from finetune_operator.settings import Profile, Settings


class OperatorKilled(BaseException):
    """kill -9 of the operator, in the middle of a call."""


GOOD_SPEC: dict[str, Any] = {
    "model": {"uri": "hf://org/model"},
    "data": {"train": [{"uri": "s3://team/train.jsonl"}]},
    "output": {"uri": "s3://team/out"},
    "workers": {"replicas": 2, "gpusPerWorker": 8},
}


@dataclass
class Worker:
    """A pod, and the trainer in it."""

    raw: dict[str, Any]
    grace: int = 0
    exit_code: int | None = None
    termination: Termination | None = None


@dataclass
class Simulation:
    """The world. ``tick`` lets one second pass."""

    steps: int = 10
    save_every: int = 3
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    children_of: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    nodes: dict[str, bool] = field(default_factory=lambda: {f"node-{i}": True for i in range(4)})
    room: int = 1000
    """How many pods fit on a node."""
    step: dict[str, int] = field(default_factory=dict)
    checkpoints: dict[str, int] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    """Pods whose trainer hangs."""
    queued: bool = False
    """A queue (as Kueue is one) holds new Jobs back."""
    told_of: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Events, by pod."""
    unreachable: bool = False
    """The operator cannot reach any trainer."""
    output_kind: str = "model"
    kept: dict[str, Termination] = field(default_factory=dict)
    """Last words in the storage, by attempt's Job."""
    cannot_read: Termination | None = None
    """What a pod says that is to read a last word and cannot."""
    unhealthy: dict[str, str] | None = None
    """What the trainers find doubtful."""
    calls_until_killed: int | None = None
    fail_calls: set[str] = field(default_factory=set)
    refuse: dict[str, tuple[Reason, str]] = field(default_factory=dict)
    """Kinds whose objects are not accepted, and what is said of it."""
    events: list[tuple[str, str]] = field(default_factory=list)
    most_gangs: int = 0
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    settings: Settings = field(
        default_factory=lambda: Settings(profiles={"default": Profile(image="trainer:1", price_per_gpu_hour=2.0)})
    )

    # --- what a user does ---

    def submit(self, name: str, spec: Mapping[str, Any] | None = None, **metadata: Any) -> None:
        """kubectl apply."""
        self.jobs[name] = {
            "apiVersion": manifests.API_VERSION,
            "kind": manifests.KIND,
            "metadata": {"namespace": "team", "name": name, "uid": f"uid-{name}", "generation": 1, **metadata},
            "spec": copy.deepcopy(dict(spec or GOOD_SPEC)),
            "status": {"observedGeneration": UNSEEN},
        }

    def edit(self, name: str, **spec: Any) -> None:
        """kubectl edit."""
        job = self.jobs[name]
        job["spec"] = {**job["spec"], **spec}
        job["metadata"]["generation"] += 1

    def status(self, name: str) -> dict[str, Any]:
        """The status as written."""
        return self.jobs[name].get("status") or {}

    def reason(self, name: str, kind: str) -> tuple[str, str]:
        """Status and reason of one condition."""
        found = next(c for c in self.status(name)["conditions"] if c["type"] == kind)
        return found["status"], found["reason"]

    def message(self, name: str, kind: str) -> str:
        """Message of one condition."""
        return next(c for c in self.status(name)["conditions"] if c["type"] == kind).get("message", "")

    def run(self, name: str, ticks: int = 200, until: str = "") -> dict[str, Any]:
        """Passes and seconds, until the state is reached (or finished)."""
        for _ in range(ticks):
            self.reconcile(name)
            state = self.status(name).get("state")
            if name not in self.jobs or state == until or (not until and state in ("Succeeded", "Failed")):
                break
            self.tick()
        return self.status(name) if name in self.jobs else {}

    def reconcile(self, name: str) -> Result:
        """One pass of the operator."""
        return reconcile(self, self.settings, "team", name, lambda: self.now)

    # --- what happens by itself ---

    def tick(self) -> None:
        """One second: pods start, step, save, end; controllers follow."""
        self.now += timedelta(seconds=1)
        # As a scheduler that takes the pods of several gangs in turns.
        for worker in sorted(self.workers.values(), key=lambda worker: _index(worker.raw)):
            self._tick_pod(worker)
        self._train()
        self._job_controller()
        alive = {
            w.raw["metadata"]["labels"][manifests.LABEL_ATTEMPT]
            for w in self.workers.values()
            if w.raw["status"]["phase"] == "Running" and manifests.LABEL_READS not in w.raw["metadata"]["labels"]
        }
        self.most_gangs = max(self.most_gangs, len(alive))

    def _tick_pod(self, worker: Worker) -> None:
        raw, status = worker.raw, worker.raw["status"]
        node = raw["spec"].get("nodeName")
        if "deletionTimestamp" in raw["metadata"]:
            if node and not self.nodes.get(node, False):
                return  # nobody there to confirm
            worker.grace -= 1
            if worker.grace <= 0:
                del self.workers[raw["metadata"]["name"]]
            return
        if not node:
            banned = _banned(raw)
            there = [w.raw for w in self.workers.values() if w.raw["status"]["phase"] in ("Pending", "Running")]
            taken = [pod["spec"].get("nodeName") for pod in there]
            free = [n for n, ready in self.nodes.items() if ready and n not in banned and taken.count(n) < self.room]
            found = {"type": "PodScheduled", "status": "True" if free else "False"}
            if not free:
                found |= {"reason": "Unschedulable", "message": "0/4 nodes fit"}
            before = next(iter(status.get("conditions") or []), {})
            same = before.get("status") == found["status"]
            found["lastTransitionTime"] = before["lastTransitionTime"] if same else format_time(self.now)
            status["conditions"] = [found]
            if free:
                raw["spec"]["nodeName"] = free[_index(raw) % len(free)]
        elif status["phase"] == "Pending":
            status["phase"] = "Running"
            state = {"running": {"startedAt": format_time(self.now)}}
            status["containerStatuses"] = [{"name": "trainer", "state": state}]
        elif worker.exit_code is not None and status["phase"] == "Running":
            status["phase"] = "Succeeded" if worker.exit_code == 0 else "Failed"
            ended = {"exitCode": worker.exit_code, "reason": "Completed", "finishedAt": format_time(self.now)}
            ended["startedAt"] = status["containerStatuses"][0]["state"]["running"]["startedAt"]
            if worker.termination:
                ended["message"] = worker.termination.to_message()
            status["containerStatuses"] = [{"name": "trainer", "state": {"terminated": ended}}]

    def _train(self) -> None:
        for (kind, name), job in self.children_of.items():
            if kind != "Job":
                continue
            gang = [w for w in self.workers.values() if w.raw["metadata"]["labels"]["job-name"] == name]
            if reads := job["metadata"]["labels"].get(manifests.LABEL_READS):
                self._read(gang, manifests.job_name(job["metadata"]["labels"][manifests.LABEL_JOB], int(reads)))
                continue
            if len(gang) < job["spec"]["parallelism"] or any(
                w.raw["status"]["phase"] != "Running"
                or w.raw["metadata"]["name"] in self.frozen
                or w.exit_code is not None
                for w in gang
            ):
                continue
            owner = job["metadata"]["labels"][manifests.LABEL_JOB]
            step = self.step.get(name, self.checkpoints.get(owner, 0)) + 1
            self.step[name] = step
            if step % self.save_every == 0:
                self.checkpoints[owner] = step
            if step >= self.steps:
                for worker in gang:
                    self.exit(worker.raw["metadata"]["name"], 0)

    def _read(self, pods: list[Worker], attempt: str) -> None:
        word = self.cannot_read or self.kept.get(attempt) or Termination(cause=Cause.DATA_NOT_FOUND, message="Gone.")
        for pod in pods:
            if pod.raw["status"]["phase"] == "Running" and pod.exit_code is None:
                pod.exit_code, pod.termination = (0 if word.outputs else 64), word

    def _job_controller(self) -> None:
        for (kind, name), job in list(self.children_of.items()):
            if kind != "Job":
                continue
            pods = [w.raw for w in self.workers.values() if w.raw["metadata"]["labels"]["job-name"] == name]
            conditions = job["status"].setdefault("conditions", [])
            if "deletionTimestamp" in job["metadata"]:
                for pod in pods:
                    self._delete_pod(pod)
                if not pods:
                    del self.children_of[kind, name]
            elif not conditions and not job["spec"].get("suspend"):
                if not pods and not job["status"].get("made"):
                    job["status"]["made"] = True
                    for index in range(job["spec"]["completions"]):
                        self._make_pod(job, index)
                elif pods and all(p["status"]["phase"] == "Succeeded" for p in pods):
                    conditions.append({"type": "Complete", "status": "True"})
                elif not pods or any(p["status"]["phase"] == "Failed" for p in pods):
                    conditions.append({"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"})
                    for pod in pods:
                        if pod["status"]["phase"] in ("Pending", "Running"):
                            self._delete_pod(pod)
            job["status"]["active"] = sum(1 for p in pods if p["status"]["phase"] in ("Pending", "Running"))

    def _make_pod(self, job: dict[str, Any], index: int) -> None:
        name = f"{job['metadata']['name']}-{index}-abcde"
        template = copy.deepcopy(job["spec"]["template"])
        labels = {**template["metadata"]["labels"], "job-name": job["metadata"]["name"]}
        labels[manifests.INDEX_LABEL] = str(index)
        self.workers[name] = Worker(
            {
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "namespace": "team",
                    "labels": labels,
                    "creationTimestamp": format_time(self.now),
                    "uid": f"uid-{next(self._numbers)}",
                    "ownerReferences": [
                        {
                            "kind": "Job",
                            "name": job["metadata"]["name"],
                            "uid": job["metadata"]["uid"],
                            "controller": True,
                        }
                    ],
                },
                "spec": template["spec"],
                "status": {"phase": "Pending"},
            }
        )

    def _delete_pod(self, raw: dict[str, Any]) -> None:
        if "deletionTimestamp" not in raw["metadata"]:
            worker = self.workers[raw["metadata"]["name"]]
            worker.grace = 2
            raw["metadata"]["deletionTimestamp"] = format_time(self.now + timedelta(seconds=2))
            owner = raw["metadata"]["labels"][manifests.LABEL_JOB]
            step = self.step.get(raw["metadata"]["labels"]["job-name"])
            if step and raw["status"]["phase"] == "Running" and raw["metadata"]["name"] not in self.frozen:
                self.checkpoints[owner] = step  # saved on SIGTERM

    # --- faults ---

    def exit(self, pod: str, code: int, termination: Termination | None = None) -> None:
        """The trainer of a pod ends."""
        worker = self.workers[pod]
        worker.exit_code = code
        if code == 0 and termination is None:
            labels = worker.raw["metadata"]["labels"]
            owner = labels[manifests.LABEL_JOB]
            termination = Termination(
                cause="Succeeded",
                rank=_index(worker.raw),
                step=self.steps,
                max_steps=self.steps,
                loss=0.5,
                unhealthy=self.unhealthy,
                outputs=[OutputInfo(uri=f"s3://team/{owner}", kind=self.output_kind, digest="sha256:1", size=2048)],
                last_checkpoint=CheckpointInfo(step=self.steps, uri="s3://c", digest="sha256:2", size=1024),
            )
            if termination.rank == 0:
                self.kept[labels["job-name"]] = termination
        worker.termination = termination

    def pods(self) -> list[str]:
        """Names of all pods."""
        return sorted(self.workers)

    # --- the Cluster protocol ---

    def _call(self, what: str) -> None:
        if self.calls_until_killed is not None:
            self.calls_until_killed -= 1
            if self.calls_until_killed < 0:
                raise OperatorKilled
        if what in self.fail_calls:
            raise ClusterError(f"Could not {what}: 500 the API server is ill")

    def finetunejob(self, namespace: str, name: str) -> Object | None:
        self._call("read")
        return copy.deepcopy(self.jobs.get(name))

    def children(self, namespace: str, name: str) -> list[Object]:
        self._call("list")
        mine = [c for c in self.children_of.values() if c["metadata"]["labels"].get(manifests.LABEL_JOB) == name]
        pods = [w.raw for w in self.workers.values() if w.raw["metadata"]["labels"][manifests.LABEL_JOB] == name]
        return copy.deepcopy(mine + pods)

    def node(self, name: str) -> Object | None:
        self._call("node")
        ready = self.nodes.get(name)
        if ready is None:
            return None
        return {"status": {"conditions": [{"type": "Ready", "status": "True" if ready else "Unknown"}]}}

    def apply(self, manifest: Object) -> None:
        self._call("apply")
        if said := self.refuse.get(manifest["kind"]):
            raise RefusedError(*said)
        key = (manifest["kind"], manifest["metadata"]["name"])
        if key not in self.children_of:
            made = copy.deepcopy(manifest)
            made["metadata"] |= {"creationTimestamp": format_time(self.now), "uid": f"uid-{next(self._numbers)}"}
            if self.queued and manifest["kind"] == "Job":
                made["spec"]["suspend"] = True
            self.children_of[key] = {**made, "status": {}}
        elif controller_of(self.children_of[key]).get("uid") != controller_of(manifest)["uid"]:
            raise RefusedError(Reason.NAME_TAKEN, f"{key[0]} {key[1]} is there already.")
        elif key[0] == "ConfigMap":
            self.children_of[key]["data"] = copy.deepcopy(manifest["data"])
        self._call("apply-answer")  # killed after it was done, before the answer

    def relabel(self, kind: str, namespace: str, name: str, uid: str, labels: Mapping[str, str]) -> None:
        self._call("relabel")
        there = self.children_of.get((kind, name))
        if there is not None and there["metadata"]["uid"] == uid:
            there["metadata"]["labels"].update(labels)

    def delete(self, kind: str, namespace: str, name: str, uid: str, *, force: bool = False) -> None:
        self._call("delete")
        there = self.workers[name].raw if name in self.workers else self.children_of.get((kind, name))
        if there is None or there["metadata"]["uid"] != uid:
            return
        if kind == "Pod":
            if force:
                self.workers.pop(name, None)
            elif name in self.workers:
                self._delete_pod(self.workers[name].raw)
        elif child := self.children_of.get((kind, name)):
            child["metadata"].setdefault("deletionTimestamp", format_time(self.now))

    def delete_job(self, job: Object) -> None:
        self._call("delete")
        if not is_same(self.jobs.get(job["metadata"]["name"]), job):
            return
        name = job["metadata"]["name"]
        del self.jobs[name]
        for key in [k for k, c in self.children_of.items() if c["metadata"]["labels"][manifests.LABEL_JOB] == name]:
            del self.children_of[key]

    def patch_status(self, job: Object, status: Mapping[str, Any]) -> bool:
        self._call("patch")
        if not is_same(self.jobs.get(job["metadata"]["name"]), job):
            return False
        self.jobs[job["metadata"]["name"]]["status"] = {"observedGeneration": UNSEEN, **copy.deepcopy(dict(status))}
        return True

    def event(self, job: Object, kind: str, reason: str, message: str) -> None:
        self._call("event")
        self.events.append((reason, message))

    def events_of(self, pod: Object) -> list[Object]:
        self._call("events")
        return copy.deepcopy(self.told_of.get(pod["metadata"]["name"], []))

    def progress(self, pod: Object) -> Object | None:
        self._call("progress")
        if self.unreachable:
            return None
        labels = pod["metadata"]["labels"]
        job, owner = labels["job-name"], labels[manifests.LABEL_JOB]
        step = self.step.get(job, 0)
        hanging = any(
            self.workers[p].raw["metadata"]["labels"]["job-name"] == job for p in self.frozen & set(self.workers)
        )
        if not hanging:
            self._last_step_time = format_time(self.now)
        saved = self.checkpoints.get(owner)
        return Progress(
            attempt=int(labels[manifests.LABEL_ATTEMPT]),
            phase="training" if step else "loading",
            step=step,
            max_steps=self.steps if step else 0,
            loss=1.0 / (step + 1),
            tokens_per_second=1000.0 if step else None,
            eta_seconds=float(self.steps - step) if step else None,
            unhealthy=self.unhealthy if step else None,
            last_step_time=getattr(self, "_last_step_time", "") if step else "",
            checkpoints=[CheckpointInfo(step=saved, uri=f"s3://c/step-{saved}")] if saved else [],
            trainable_parameters=7,
            total_parameters=9,
        ).model_dump(mode="json")

    def logs(self, namespace: str, pod: str, container: str, lines: int) -> list[str]:
        self._call("logs")
        return [f"last words of {container} in {pod}"]


def _index(raw: Mapping[str, Any]) -> int:
    return int(raw["metadata"]["labels"][manifests.INDEX_LABEL])


def _banned(raw: Mapping[str, Any]) -> set[str]:
    affinity = raw["spec"].get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    return {v for t in terms for e in t["matchFields"] if e["operator"] == "NotIn" for v in e["values"]}
