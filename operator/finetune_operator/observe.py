"""What is there: raw Kubernetes objects → small facts. Pure.

Called by ``reconcile.py`` on every pass; ``failures.py`` and ``decide.py`` read the facts, never raw objects.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.run import FETCH_CONTAINER, TRAINER_CONTAINER, Termination, TrainerConfig
from finetune_operator.manifests import ANNOTATION_GPUS, INDEX_LABEL, KIND, LABEL_ATTEMPT, QUEUE_LABELS, config_name

Object = Mapping[str, Any]


def parse_time(text: str | None) -> datetime | None:
    """RFC 3339 → an aware datetime; None for nothing."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with whole seconds, as Kubernetes writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Exit:
    """How a container ended."""

    container: str
    code: int
    reason: str
    """OOMKilled, Error, ContainerCannotRun …"""
    finished: datetime | None
    termination: Termination | None
    """The trainer's own last word, where it left one."""
    text: str = ""
    """The raw termination message, where it was something else (the end of the log)."""


@dataclass(frozen=True)
class Pod:
    """One worker."""

    name: str
    attempt: int
    index: int
    phase: str
    reason: str
    message: str
    node: str
    deleting: bool
    deletion_time: datetime | None
    """When its time to end is over; None where it is not being deleted."""
    told_to_go: datetime | None
    """When its deletion was asked for."""
    running_since: datetime | None
    """When the training container started; None before."""
    waiting: str
    """Why a container waits, e.g. ImagePullBackOff."""
    waiting_message: str
    unschedulable: str
    """The scheduler's message, where it finds no node."""
    placement_time: datetime | None
    """Since when it has a node, or the scheduler finds none."""
    disruption: str
    """Reason of the DisruptionTarget condition: PreemptionByScheduler, EvictionByEvictionAPI …"""
    exits: tuple[Exit, ...]
    gpus: int | None
    """Those it asks for; None where an operator made it that did not say."""
    raw: dict[str, Any] = field(repr=False, compare=False)

    @property
    def holds_its_place(self) -> bool:
        """What it asks for is taken on its node, also while it is being deleted."""
        return bool(self.node) and self.phase not in ("Succeeded", "Failed")

    @property
    def running(self) -> bool:
        """The training container runs."""
        return self.phase == "Running" and self.running_since is not None and not self.exits_of(TRAINER_CONTAINER)

    @property
    def trained(self) -> bool:
        """The training container ended well; its pod's phase follows."""
        return self.phase == "Succeeded" or any(e.code == 0 for e in self.exits_of(TRAINER_CONTAINER))

    @property
    def failed(self) -> bool:
        """It ended, and not well."""
        return self.phase == "Failed" or any(e.code != 0 for e in self.exits)

    def exits_of(self, container: str) -> tuple[Exit, ...]:
        """Ended containers of that name (at most one: nothing restarts in place)."""
        return tuple(e for e in self.exits if e.container == container)


@dataclass(frozen=True)
class GangJob:
    """The batch Job of one attempt."""

    name: str
    attempt: int
    created: datetime | None
    suspended: bool
    """By a queue (Kueue), not by us."""
    queue: str
    """The name of that queue; empty where the job names none."""
    succeeded: bool
    failed: bool
    failure_reason: str
    failure_message: str
    deleting: bool
    workers: int
    """How many pods it asks for."""
    gpus_per_worker: int | None
    """As of its pods."""
    active: int
    refusal: str = ""
    """Why its controller cannot make a pod it lacks: a quota, Pod Security, a webhook."""


@dataclass(frozen=True)
class Observed:
    """Everything made for one FineTuneJob, as it is now."""

    jobs: tuple[GangJob, ...]
    pods: tuple[Pod, ...]
    frozen_config: TrainerConfig | None
    frozen_spec: Mapping[str, Any] | None
    earlier: bool = False
    """Something is left of a FineTuneJob of the same name, or of a Job, that was deleted; it is none of the above."""

    def job(self, attempt: int) -> GangJob | None:
        """The Job of one attempt."""
        return next((j for j in self.jobs if j.attempt == attempt), None)

    def pods_of(self, attempt: int) -> tuple[Pod, ...]:
        """The pods of one attempt, by index."""
        return tuple(sorted((p for p in self.pods if p.attempt == attempt), key=lambda p: (p.index, p.name)))


def observe(name: str, children: Iterable[dict[str, Any]], uid: str = "") -> Observed:
    """Facts of the children of the FineTuneJob ``name``; with ``uid``, of the one that has it."""
    everything = list(children)
    earlier = {c["metadata"]["uid"] for c in everything if uid and _owners(c, KIND) - {uid}}
    # Also pods whose Job is gone already: it was deleted, and they are slow to end.
    jobs = {c["metadata"].get("uid") for c in everything if c["kind"] == "Job"} - earlier
    earlier |= {c["metadata"]["uid"] for c in everything if (owners := _owners(c, "Job")) and not owners & jobs}
    children = [c for c in everything if c["metadata"].get("uid") not in earlier]
    gangs, pods = [], []
    config, spec = None, None
    for child in children:
        kind = child["kind"]
        if kind == "Job":
            gangs.append(_job(child, [c for c in children if c["kind"] == "Event"]))
        elif kind == "Pod":
            pods.append(_pod(child))
        elif kind == "ConfigMap" and child["metadata"]["name"] == config_name(name):
            data = child.get("data") or {}
            config = TrainerConfig.model_validate_json(data["config.json"])
            spec = json.loads(data["spec.json"])
    return Observed(tuple(gangs), tuple(pods), config, spec, bool(earlier))


def _owners(child: Object, kind: str) -> set[str]:
    return {owner["uid"] for owner in child["metadata"].get("ownerReferences") or [] if owner["kind"] == kind}


def _attempt(child: Object) -> int:
    return int((child["metadata"].get("labels") or {}).get(LABEL_ATTEMPT, "0"))


def _gpus(pod: Object) -> int | None:
    """Of a pod, or of the template of some."""
    said = ((pod.get("metadata") or {}).get("annotations") or {}).get(ANNOTATION_GPUS, "")
    return int(said) if said.isdecimal() else None


def _true_condition(child: Object, kind: str) -> Mapping[str, Any]:
    conditions = child.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), {})


def _refusal(job: Object, events: list[dict[str, Any]]) -> str:
    own = [e for e in events if e["involvedObject"]["uid"] == job["metadata"].get("uid")]
    newest = max(own, key=lambda e: e.get("lastTimestamp") or "", default={"message": ""})
    # Without the name of the pod, which is another one at every try.
    return re.sub(r'^Error creating: (pods "[^"]*" is forbidden: )?', "", newest["message"])


def _job(child: Object, events: list[dict[str, Any]]) -> GangJob:
    failed = _true_condition(child, "Failed") or _true_condition(child, "FailureTarget")
    succeeded = _true_condition(child, "Complete") or _true_condition(child, "SuccessCriteriaMet")
    return GangJob(
        name=child["metadata"]["name"],
        attempt=_attempt(child),
        created=parse_time(child["metadata"].get("creationTimestamp")),
        suspended=bool(child.get("spec", {}).get("suspend")),
        queue=(child["metadata"].get("labels") or {}).get(QUEUE_LABELS[0], ""),
        succeeded=bool(succeeded),
        failed=bool(failed),
        failure_reason=failed.get("reason", ""),
        failure_message=failed.get("message", ""),
        deleting="deletionTimestamp" in child["metadata"],
        workers=child.get("spec", {}).get("parallelism", 1),
        gpus_per_worker=_gpus(child.get("spec", {}).get("template") or {}),
        active=child.get("status", {}).get("active") or 0,
        refusal=_refusal(child, events),
    )


def _pod(child: dict[str, Any]) -> Pod:
    metadata, status = child["metadata"], child.get("status") or {}
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    waiting: Mapping[str, Any] = next(
        (
            c["state"]["waiting"]
            for c in containers
            if (c.get("state") or {}).get("waiting", {}).get("reason")
            not in (None, "PodInitializing", "ContainerCreating")
        ),
        {},
    )
    running: Object = next((c for c in containers if c["name"] == TRAINER_CONTAINER), {})
    started = (running.get("state") or {}).get("running") or (running.get("state") or {}).get("terminated") or {}
    scheduled: Object = next((c for c in status.get("conditions") or [] if c["type"] == "PodScheduled"), {})
    deletion_time = parse_time(metadata.get("deletionTimestamp"))
    grace = timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0)
    unschedulable = scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else ""
    return Pod(
        name=metadata["name"],
        attempt=_attempt(child),
        index=int((metadata.get("labels") or {}).get(INDEX_LABEL, "0")),
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        node=(child.get("spec") or {}).get("nodeName") or "",
        deleting=deletion_time is not None,
        deletion_time=deletion_time,
        told_to_go=deletion_time - grace if deletion_time else None,
        running_since=parse_time(started.get("startedAt")),
        waiting=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        unschedulable=unschedulable,
        placement_time=parse_time(scheduled.get("lastTransitionTime")),
        disruption=_true_condition(child, "DisruptionTarget").get("reason", ""),
        exits=tuple(_exits(containers)),
        gpus=_gpus(child),
        raw=child,
    )


def _exits(containers: Iterable[Mapping[str, Any]]) -> Iterable[Exit]:
    for container in containers:
        ended = (container.get("state") or {}).get("terminated")
        if not ended or container["name"] not in (TRAINER_CONTAINER, FETCH_CONTAINER):
            continue
        message = ended.get("message") or ""
        termination = Termination.from_message(message)
        yield Exit(
            container=container["name"],
            code=ended.get("exitCode", 0),
            reason=ended.get("reason", ""),
            finished=parse_time(ended.get("finishedAt")),
            termination=termination,
            text="" if termination else message,
        )
