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
from finetune_operator.manifests import (
    ANNOTATION_GPUS,
    INDEX_LABEL,
    KIND,
    KUEUE,
    KUEUE_QUEUE,
    LABEL_ATTEMPT,
    LABEL_READS,
    MADE_FROM,
    config_name,
    names_a_job_of,
    of_domain,
)

Object = Mapping[str, Any]


def parse_time(text: str | None) -> datetime | None:
    """RFC 3339 → an aware datetime; None for nothing."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with whole seconds, as Kubernetes writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


OVER = ("Succeeded", "Failed")
"""Phases of a pod all of whose containers have ended."""


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
    command: str = ""
    """The program it was to run; empty where the image names it."""

    @property
    def ours(self) -> bool:
        """It is the trainer's or the fetch container, whose last word is understood."""
        return self.container in (TRAINER_CONTAINER, FETCH_CONTAINER)


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
    waiting_container: str
    waiting_command: str
    """The program it is to run; empty where the image names it."""
    waiting_since: datetime | None
    """It has not waited for longer: since then the pod has its node, and the containers before it have ended."""
    unschedulable: str
    """The scheduler's message, where it finds no node."""
    placement_time: datetime | None
    """Since when it has a node, or the scheduler finds none."""
    disruption: str
    """Reason of the DisruptionTarget condition: PreemptionByScheduler, EvictionByEvictionAPI …"""
    exits: tuple[Exit, ...]
    """Of the containers a run consists of: the init containers and the trainer."""
    sidecars: tuple[Exit, ...]
    """Of those that stand beside it: a mesh's proxy, a log shipper. Only those that do not run now."""
    created: datetime | None
    started: bool
    """One of its containers has been started."""
    preparing: str
    """The init container that runs now; empty where none does."""
    gates: tuple[str, ...]
    """What the scheduler waits for before it looks at it, e.g. kueue.x-k8s.io/topology."""
    gpus: int | None
    """Those it asks for; None where an operator made it that did not say."""
    uid: str
    node_lost: bool
    """The control plane says by this pod that its node is not heard of."""
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
        """The training container ended well, whatever its sidecars do; the pod's phase follows them."""
        return self.phase == "Succeeded" or any(e.code == 0 for e in self.exits_of(TRAINER_CONTAINER))

    @property
    def failed(self) -> bool:
        """It ended, and not well."""
        return self.phase == "Failed" or any(e.code != 0 for e in self.exits)

    @property
    def over(self) -> bool:
        """All its containers have ended: it holds no GPU any more."""
        return self.phase in OVER

    @property
    def failed_container(self) -> str:
        """The container to ask why the pod failed."""
        return next((e.container for e in (*self.exits, *self.sidecars) if e.code != 0), TRAINER_CONTAINER)

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
    queue_labels: Mapping[str, str]
    """All labels of Kueue's."""
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
    uid: str
    made_from: Mapping[str, Any] | None
    """What of the spec it was made from; None in a Job of an operator that did not note it."""
    refusal: str = ""
    """Why its controller cannot make a pod it lacks: a quota, Pod Security, a webhook."""


JOB_TRACKING = "batch.kubernetes.io/job-tracking"
"""The finalizer of the Job controller, which always goes by itself."""


@dataclass(frozen=True)
class Leaving:
    """An object that was told to go and is still there."""

    kind: str
    namespace: str
    name: str
    node: str
    told: datetime
    """When its deletion was asked for."""
    due: datetime
    """When its time to end was over."""
    finalizers: tuple[str, ...]
    """Who holds it, but for Kubernetes' own controllers."""


@dataclass(frozen=True)
class News:
    """The last thing that was told of a pod in its events."""

    reason: str
    message: str
    trouble: bool
    """It is a warning: FailedMount, FailedCreatePodSandBox … Else it tells what is being done, such as Pulling."""


@dataclass(frozen=True)
class Reader:
    """What reads from the storage what an attempt wrote."""

    job: GangJob
    pods: tuple[Pod, ...]

    @property
    def word(self) -> Termination | None:
        """The word of the attempt, or else the reader's own, why it has none."""
        words = [e.termination for pod in self.pods for e in pod.exits if e.termination]
        return next((word for word in words if word.outputs), words[-1] if words else None)


@dataclass(frozen=True)
class Observed:
    """Everything made for one FineTuneJob, as it is now."""

    jobs: tuple[GangJob, ...]
    pods: tuple[Pod, ...]
    frozen_config: TrainerConfig | None
    frozen_spec: Mapping[str, Any] | None
    earlier: bool = False
    """Something is left of a FineTuneJob of the same name, or of a Job, that was deleted; it is none of the above."""
    leaving: tuple[Leaving, ...] = ()
    """What of all that is on its way out, and of the above."""
    strangers: tuple[str, ...] = ()
    """Pods with the label of this FineTuneJob that are not its own and have not ended."""
    readers: tuple[Reader, ...] = ()

    def job(self, attempt: int) -> GangJob | None:
        """The Job of one attempt."""
        return next((j for j in self.jobs if j.attempt == attempt), None)

    def reader(self, attempt: int) -> Reader | None:
        """What reads the result of one attempt."""
        return next((r for r in self.readers if r.job.attempt == attempt), None)

    def pods_of(self, attempt: int) -> tuple[Pod, ...]:
        """The pods of one attempt, by index."""
        return tuple(sorted((p for p in self.pods if p.attempt == attempt), key=lambda p: (p.index, p.name)))


SILENCE = timedelta(seconds=30)
"""So long a pod may take to start before its events are asked."""
ASKED_AT_MOST = 3
"""Pods of one gang whose events are read in one pass."""


def unexplained(pods: Iterable[Pod], now: datetime) -> list[Pod]:
    """The pods that should have started by now and do not say themselves why they have not. What holds up volumes,
    sandboxes and devices stands only in a pod's events."""
    found = [
        pod
        for pod in pods
        if not (pod.over or pod.deleting or pod.running_since or pod.waiting or pod.preparing)
        and (pod.node or (pod.raw.get("spec") or {}).get("resourceClaims"))
        and pod.created is not None
        and now - pod.created >= SILENCE
    ]
    return found[:ASKED_AT_MOST]


_TOLD_ELSEWHERE = ("Scheduled", "FailedScheduling")


def news(events: Iterable[Object]) -> News | None:
    """The newest of a pod's events; the scheduler's word stands in the pod itself."""
    told = [e for e in events if e.get("reason") not in _TOLD_ELSEWHERE]
    newest = max(told, key=lambda e: (_last_told(e), e.get("type") == "Warning"), default=None)
    if newest is None:
        return None
    message = " ".join((newest.get("message") or "").split())
    return News(newest.get("reason") or "", message, newest.get("type") == "Warning")


def _last_told(event: Object) -> str:
    """RFC 3339 in UTC, to the second: what is older is smaller."""
    series = event.get("series") or {}
    time = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or ""
    return time[: len("2026-01-01T00:00:00")]


def observe(name: str, children: Iterable[dict[str, Any]], uid: str = "") -> Observed:
    """Facts of the children of the FineTuneJob ``name``; with ``uid``, of the one that has it: names and labels are
    anybody's, and an object is its controller's."""
    everything = list(children)
    whose = Whose(everything, name, uid)
    gangs, pods = [], []
    config, spec = None, None
    own = list(filter(whose.ours, everything))
    told = [c for c in everything if c["kind"] == "Event"]
    reading = [c for c in own if _reads(c)]
    for child in own:
        kind = child["kind"]
        if _reads(child):
            continue
        if kind == "Job":
            gangs.append(_job(child, told))
        elif kind == "Pod":
            pods.append(_pod(child))
        elif kind == "ConfigMap" and child["metadata"]["name"] == config_name(name):
            data = child.get("data") or {}
            config = TrainerConfig.model_validate_json(data["config.json"])
            spec = json.loads(data["spec.json"])
    ours_or_earlier = [c for c in everything if whose.ours(c) or whose.earlier(c)]
    leaving = [c for c in ours_or_earlier if "deletionTimestamp" in c["metadata"]]
    # Of a stranger only what everybody's pods have is read: its labels may say anything.
    strangers = [c for c in everything if c["kind"] == "Pod" and not (whose.ours(c) or whose.earlier(c))]
    return Observed(
        jobs=tuple(gangs),
        pods=tuple(pods),
        frozen_config=config,
        frozen_spec=spec,
        earlier=len(ours_or_earlier) > len(own),
        leaving=tuple(_leaving(c) for c in leaving),
        strangers=tuple(c["metadata"]["name"] for c in strangers if not _is_over(c)),
        readers=tuple(_readers(reading, told)),
    )


def _is_over(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") in OVER


def _reads(child: Object) -> bool:
    return LABEL_READS in (child["metadata"].get("labels") or {})


def _readers(reading: list[dict[str, Any]], events: list[dict[str, Any]]) -> Iterable[Reader]:
    pods = [_pod(child) for child in reading if child["kind"] == "Pod"]
    for job in (_job(child, events) for child in reading if child["kind"] == "Job"):
        yield Reader(job, tuple(pod for pod in pods if pod.attempt == job.attempt))


def controller_of(child: Object) -> Object:
    """The owner reference that says whose an object is; empty where it is nobody's."""
    owners = child["metadata"].get("ownerReferences") or []
    return next((owner for owner in owners if owner.get("controller")), {})


class Whose:
    """Whose an object is, by the uid of its controller. (Without a uid, all are ours.)"""

    def __init__(self, children: Iterable[Object], name: str, uid: str) -> None:
        jobs = [c for c in children if c["kind"] == "Job"]
        self._name, self._uid = name, uid
        self._jobs = {c["metadata"].get("uid") for c in jobs if controller_of(c).get("uid") == uid}
        self._nobodys = {c["metadata"].get("uid") for c in jobs if not controller_of(c)}

    def ours(self, child: Object) -> bool:
        """The FineTuneJob's, or one of its Jobs'."""
        return not self._uid or controller_of(child).get("uid") in {self._uid, *self._jobs}

    def earlier(self, child: Object) -> bool:
        """Of a FineTuneJob of the same name, or of a Job, that was deleted: the garbage collector takes it away. (What
        has lost its owner is nobody's, and stays.)"""
        owner = controller_of(child)
        if not owner or self.ours(child):
            return False
        if owner["kind"] == KIND:
            return bool(owner["name"] == self._name)
        own = owner["kind"] == "Job" and names_a_job_of(self._name, owner["name"])
        return own and owner["uid"] not in self._nobodys


def _leaving(child: Object) -> Leaving:
    metadata = child["metadata"]
    due = parse_time(metadata["deletionTimestamp"])
    assert due is not None
    own = (JOB_TRACKING, "foregroundDeletion")
    return Leaving(
        kind=child["kind"],
        namespace=metadata.get("namespace", ""),
        name=metadata["name"],
        node=(child.get("spec") or {}).get("nodeName") or "",
        told=due - timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0),
        due=due,
        finalizers=tuple(f for f in metadata.get("finalizers") or [] if f not in own),
    )


def _attempt(child: Object) -> int:
    labels = child["metadata"].get("labels") or {}
    number = labels.get(LABEL_ATTEMPT) or labels.get(LABEL_READS) or ""
    return int(number) if number.isdecimal() else 0  # anybody can label a pod


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
        queue=(child["metadata"].get("labels") or {}).get(KUEUE_QUEUE, ""),
        queue_labels=of_domain(child["metadata"].get("labels") or {}, KUEUE),
        succeeded=bool(succeeded),
        failed=bool(failed),
        failure_reason=failed.get("reason", ""),
        failure_message=failed.get("message", ""),
        deleting="deletionTimestamp" in child["metadata"],
        workers=child.get("spec", {}).get("parallelism", 1),
        gpus_per_worker=_gpus(child.get("spec", {}).get("template") or {}),
        active=child.get("status", {}).get("active") or 0,
        uid=child["metadata"].get("uid", ""),
        made_from=json.loads((child["metadata"].get("annotations") or {}).get(MADE_FROM, "null")),
        refusal=_refusal(child, events),
    )


def _pod(child: dict[str, Any]) -> Pod:
    metadata, spec, status = child["metadata"], child.get("spec") or {}, child.get("status") or {}
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    commands, beside = _commands(spec), _sidecars(spec)
    init = {c["name"] for c in status.get("initContainerStatuses") or []} - beside
    held_up: Object = next((c for c in containers if _waits_for(c)), {})
    waiting: Object = _state(held_up).get("waiting") or {}
    trainer: Object = next((c for c in containers if c["name"] == TRAINER_CONTAINER), {})
    started = _state(trainer).get("running") or _state(trainer).get("terminated") or {}
    scheduled: Object = next((c for c in status.get("conditions") or [] if c["type"] == "PodScheduled"), {})
    deletion_time = parse_time(metadata.get("deletionTimestamp"))
    grace = timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0)
    unschedulable = scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else ""
    ends = [_exit(c, ended, commands) for c in containers if (ended := _ended(c, beside))]
    exits = tuple(e for e in ends if e.container not in beside)
    steps = [parse_time(status.get("startTime")), *(e.finished for e in exits)]
    return Pod(
        name=metadata["name"],
        attempt=_attempt(child),
        index=int((metadata.get("labels") or {}).get(INDEX_LABEL, "0")),
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        node=spec.get("nodeName") or "",
        deleting=deletion_time is not None,
        deletion_time=deletion_time,
        told_to_go=deletion_time - grace if deletion_time else None,
        running_since=parse_time(started.get("startedAt")),
        waiting=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        waiting_container=held_up.get("name", ""),
        waiting_command=commands.get(held_up.get("name", ""), ""),
        waiting_since=max((moment for moment in steps if moment), default=None),
        unschedulable=unschedulable,
        placement_time=parse_time(scheduled.get("lastTransitionTime")),
        disruption=_true_condition(child, "DisruptionTarget").get("reason", ""),
        gates=tuple(gate["name"] for gate in (child.get("spec") or {}).get("schedulingGates") or []),
        gpus=_gpus(child),
        exits=exits,
        sidecars=tuple(e for e in ends if e.container in beside),
        created=parse_time(metadata.get("creationTimestamp")),
        started=any(_state(c).keys() & {"running", "terminated"} for c in containers),
        preparing=next((c["name"] for c in containers if "running" in _state(c) and c["name"] in init), ""),
        uid=metadata.get("uid", ""),
        node_lost=_node_lost(child),
        raw=child,
    )


def _sidecars(spec: Object) -> frozenset[str]:
    """Names of the containers that run beside the trainer: ordinary ones, and init containers that are restarted."""
    ordinary = {c["name"] for c in spec.get("containers") or []} - {TRAINER_CONTAINER}
    init = spec.get("initContainers") or []
    return frozenset(ordinary | {c["name"] for c in init if c.get("restartPolicy", "Never") != "Never"})


def _commands(spec: Object) -> dict[str, str]:
    containers = [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]
    return {c["name"]: next(iter(c.get("command") or []), "") for c in containers}


def _state(container: Object) -> Object:
    state: Object = container.get("state") or {}
    return state


def _waits_for(container: Object) -> bool:
    """It waits for something else than its turn."""
    waiting = _state(container).get("waiting") or {}
    return waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating")


def _ended(container: Object, sidecars: frozenset[str]) -> Object:
    """How a container ended; of a sidecar that is started again and again, the last time."""
    ended: Object = _state(container).get("terminated") or {}
    if not ended and container["name"] in sidecars and _state(container).get("waiting"):
        ended = (container.get("lastState") or {}).get("terminated") or {}
    return ended


def _exit(container: Object, ended: Object, commands: Mapping[str, str]) -> Exit:
    name, message = container["name"], ended.get("message") or ""
    termination = Termination.from_message(message) if name in (TRAINER_CONTAINER, FETCH_CONTAINER) else None
    return Exit(
        container=name,
        code=ended.get("exitCode", 0),
        reason=ended.get("reason", ""),
        finished=parse_time(ended.get("finishedAt")),
        termination=termination,
        text="" if termination else message,
        command=commands.get(name, ""),
    )


def _node_lost(pod: Object) -> bool:
    """As the node controller tells it: it takes the pod's readiness away without a reason, and its taint the pod."""
    if _true_condition(pod, "DisruptionTarget").get("reason") in ("DeletionByTaintManager", "DeletionByPodGC"):
        return True
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "False" and not c.get("reason") for c in conditions)
