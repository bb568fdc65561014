"""Facts → why an attempt ended, for people and for the decision to try again. Pure.

Called by ``decide.py``. The rule: what happened first is the cause, the rest of the gang died of it; and what the
infrastructure says of a pod (evicted, preempted, node lost) explains its exit code, not the other way round.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from finetune_api.causes import RETRY, Cause, Retry
from finetune_api.conditions import Reason
from finetune_api.run import EXIT_USER, FETCH_CONTAINER, TRAINER_CONTAINER
from finetune_operator.observe import Exit, GangJob, Pod

SIGKILL, SIGTERM, SIGSEGV, SIGABRT, SIGBUS = 9, 15, 11, 6, 7
_SIGNALS = {SIGKILL: "SIGKILL", SIGTERM: "SIGTERM", SIGSEGV: "SIGSEGV", SIGABRT: "SIGABRT", SIGBUS: "SIGBUS"}

# Causes that blame the machine: its next attempt goes elsewhere.
_NODE_TO_BLAME = {Cause.NODE_LOST, Cause.GPU_ERROR, Cause.EVICTED}
# What the rest of a gang dies of: if another pod has a better story (a lower number), that one is the cause.
_SECONDARY = {Cause.KILLED: 1, Cause.UNKNOWN: 1, Cause.COMMUNICATION_ERROR: 2, Cause.TERMINATED: 2}
ECHO_PATIENCE = timedelta(seconds=5)
"""So long a worker that lost its peers waits for their own story, which another kubelet tells a moment later. It
decides what is done: an eviction costs no restart, a full GPU is no reason to try again."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended."""

    cause: Cause
    message: str
    exit_code: int | None = None
    pod: str = ""
    node: str = ""
    container: str = TRAINER_CONTAINER

    @property
    def retry(self) -> Retry:
        """What the table of causes says."""
        return RETRY[self.cause]

    @property
    def node_suspect(self) -> bool:
        """The next attempt keeps off this node."""
        return bool(self.node) and self.cause in _NODE_TO_BLAME


def judge(job: GangJob | None, pods: tuple[Pod, ...], dead_nodes: frozenset[str], now: datetime) -> Failure | None:
    """The failure of an attempt, or None where it goes on (or went well), or where the cause is still to come.

    ``dead_nodes`` are nodes of these pods that are gone or not ready.
    """
    stories = [(_when(pod, failure), failure) for pod in pods if (failure := _judge_pod(pod, dead_nodes))]
    if stories:
        when, failure = min(stories, key=_how_far_from_the_cause)
        if job is not None and job.suspended and failure.cause in _SECONDARY:
            return replace(taken_back(job), exit_code=failure.exit_code, pod=failure.pod, node=failure.node)
        echo = failure.cause is Cause.COMMUNICATION_ERROR and any(pod.running for pod in pods)
        return None if echo and now - when < ECHO_PATIENCE else failure
    if job is None:
        return Failure(Cause.JOB_DELETED, "The batch Job of this attempt was deleted by someone else.")
    if job.failed and not pods and job.failure_reason == "BackoffLimitExceeded":
        # Of a container that failed by itself, the pod would be there.
        return Failure(Cause.TERMINATED, f"The pods of batch Job {job.name} were deleted.")
    if job.failed:
        detail = f"{job.failure_reason}: {job.failure_message}".strip(": ")
        return Failure(Cause.UNKNOWN, f"The batch Job {job.name} failed without a failed pod ({detail}).")
    if job.deleting:
        return Failure(Cause.JOB_DELETED, f"The batch Job {job.name} is being deleted by someone else.")
    return None


def taken_back(job: GangJob) -> Failure:
    """What ends an attempt whose Job a queue suspends while it runs."""
    who = f"Queue {job.queue}" if job.queue else "A queue"
    message = f"{who} took its room back: Job {job.name} was suspended, and its pods were told to stop."
    return Failure(Cause.PREEMPTED, message)


def _how_far_from_the_cause(story: tuple[datetime, Failure]) -> tuple[int, datetime, bool]:
    when, failure = story
    # Kubernetes tells seconds, and the Job's controller deletes the other pods within milliseconds of a failure: who
    # was told to go in the second of another's failure was told because of it.
    return _SECONDARY.get(failure.cause, 0), when, failure.cause is Cause.TERMINATED


def _when(pod: Pod, failure: Failure) -> datetime:
    if failure.cause is Cause.TERMINATED and pod.told_to_go:
        return pod.told_to_go
    ends = [e.finished for e in pod.exits if e.code != 0 and e.finished]
    return min(ends) if ends else datetime.max.replace(tzinfo=UTC)


def _judge_pod(pod: Pod, dead_nodes: frozenset[str]) -> Failure | None:
    if pod.node and pod.node in dead_nodes and not _spoke(pod):
        return Failure(Cause.NODE_LOST, f"Node {pod.node} is not ready or gone.", pod=pod.name, node=pod.node)
    if disruption := _disrupted(pod):
        cause, message = disruption
        return Failure(cause, message, exit_code=_code(pod), pod=pod.name, node=pod.node)
    for ended in pod.exits:
        if ended.code != 0:
            cause, message = explain_exit(ended)
            # A worker that stopped on SIGTERM while its pod is being deleted was told to go.
            code = ended.termination.exit_code if ended.termination and ended.termination.exit_code else ended.code
            return Failure(cause, message, code, pod.name, pod.node, ended.container)
    if pod.deleting:
        return Failure(Cause.TERMINATED, f"Pod {pod.name} was deleted.", pod=pod.name, node=pod.node)
    if pod.phase == "Failed":
        detail = f"{pod.reason} {pod.message}".strip() or "no reason given"
        return Failure(Cause.UNKNOWN, f"Pod {pod.name} failed: {detail}.", pod=pod.name, node=pod.node)
    return None


def _spoke(pod: Pod) -> bool:
    return any(e.termination for e in pod.exits)


def _code(pod: Pod) -> int | None:
    return next((e.code for e in pod.exits if e.code != 0), None)


_DISRUPTIONS: Mapping[str, tuple[Cause, str]] = {
    "PreemptionByScheduler": (Cause.PREEMPTED, "preempted for a pod of higher priority"),
    "EvictionByEvictionAPI": (Cause.EVICTED, "evicted (a drain, or an autoscaler that removes its node)"),
    "TerminationByKubelet": (Cause.EVICTED, "ended by its node (shutdown, or a lack of memory or disk there)"),
    "DeletionByTaintManager": (Cause.NODE_LOST, "removed because its node is tainted as not ready or unreachable"),
    "DeletionByPodGC": (Cause.NODE_LOST, "removed because its node is gone"),
}


def _disrupted(pod: Pod) -> tuple[Cause, str] | None:
    if pod.disruption:
        cause, what = _DISRUPTIONS.get(pod.disruption, (Cause.EVICTED, f"disrupted ({pod.disruption})"))
        return cause, f"Pod {pod.name} was {what}."
    if pod.reason in ("Evicted", "NodeShutdown", "Shutdown", "Terminated", "NodeAffinity"):
        return Cause.EVICTED, f"Pod {pod.name} was ended by its node {pod.node}: {pod.reason}. {pod.message}".strip()
    if pod.reason in ("NodeLost", "UnexpectedAdmissionError"):
        return Cause.NODE_LOST, f"Pod {pod.name}: {pod.reason} on node {pod.node}. {pod.message}".strip()
    return None


def explain_exit(ended: Exit) -> tuple[Cause, str]:
    """Cause and message of a container that ended with a code other than 0.

    What the trainer said itself comes first, but not over the kernel's OOM killer, which kills one process of
    several and leaves the others to report lost peers.
    """
    if ended.reason == "OOMKilled":
        return Cause.OUT_OF_MEMORY, (
            f"Container {ended.container} was killed: it used more memory than its limit. Raise "
            "resources.limits.memory in spec.workers.template, or lower data.max_length or the batch size."
        )
    if ended.termination:
        lost = f"Its message was cut off by the kubelet; the log of container {ended.container} has it."
        return ended.termination.cause, ended.termination.message or (lost if ended.termination.cut else "")
    signal = ended.code - 128 if ended.code > 128 else 0
    # Who is killed has said nothing about it: the log's last lines are about something else.
    if signal not in (SIGKILL, SIGTERM) and (known := _known_text(ended.text)):
        return known
    if ended.reason in ("ContainerCannotRun", "StartError", "CreateContainerError"):
        return Cause.INVALID_CONFIGURATION, f"Container {ended.container} cannot start: {ended.text or ended.reason}"
    if signal == SIGTERM or ended.code == 75:
        return Cause.TERMINATED, f"Container {ended.container} was told to stop (exit code {ended.code})."
    if signal:
        name = _SIGNALS.get(signal, f"signal {signal}")
        return Cause.KILLED, f"Container {ended.container} was killed by {name} (exit code {ended.code})."
    if ended.code == EXIT_USER:
        return Cause.INVALID_CONFIGURATION, (
            f"Container {ended.container} ended with exit code {ended.code}: a mistake that a restart would repeat. "
            "What it said of it is lost here; the container's log has it."
        )
    tail = f" It said: {ended.text.strip()[-600:]}" if ended.text.strip() else ""
    return Cause.TRAINER_ERROR, f"Container {ended.container} ended with exit code {ended.code}.{tail}"


# Last lines of a log (terminationMessagePolicy FallbackToLogsOnError), where the trainer could not speak.
_TEXTS: tuple[tuple[str, Cause, str], ...] = (
    (
        r"CUDA out of memory|torch\.OutOfMemoryError",
        Cause.OUT_OF_GPU_MEMORY,
        "The GPU's memory is full. Lower training.per_device_train_batch_size or data.max_length, set "
        "training.gradient_checkpointing: true, or raise deepspeed.zero_optimization.stage.",
    ),
    (
        r"uncorrectable ECC|Xid|CUDA error: (device-side|unspecified|an illegal|misaligned|no kernel)|"
        r"CUDA driver initialization failed",
        Cause.GPU_ERROR,
        "The GPU reported an error.",
    ),
    (
        r"NCCL (error|WARN)|ncclSystemError|ncclRemoteError|Connection (reset|closed) by peer|"
        r"DistNetworkError|DistStoreError",
        Cause.COMMUNICATION_ERROR,
        "The workers lost each other.",
    ),
    (
        r"(?m)^(ModuleNotFoundError|ImportError): |^\S*python\S*: (No module named|Error while finding module)",
        Cause.INVALID_CONFIGURATION,
        "The image does not hold what the trainer needs. Check the profile's image.",
    ),
    (
        r"executable file not found|no such file or directory: unknown",
        Cause.INVALID_CONFIGURATION,
        "The image has no trainer in it. Check the profile's image.",
    ),
)


def _known_text(text: str) -> tuple[Cause, str] | None:
    for pattern, cause, message in _TEXTS:
        if found := re.search(pattern, text):
            line = next((ln.strip() for ln in text.splitlines() if found.group(0).splitlines()[0] in ln), "")
            return cause, f"{message} It said: {line[:400]}"
    return None


WAITING_FOR_EVER: Mapping[str, tuple[Reason, str]] = {
    "InvalidImageName": (Reason.IMAGE_NOT_PULLED, "The image name is not valid."),
    "ImageInspectError": (Reason.IMAGE_NOT_PULLED, "The image cannot be read."),
    "ErrImageNeverPull": (Reason.IMAGE_NOT_PULLED, "The image is not on the node, and imagePullPolicy is Never."),
    "ErrImagePull": (Reason.IMAGE_NOT_PULLED, "The image cannot be pulled."),
    "ImagePullBackOff": (Reason.IMAGE_NOT_PULLED, "The image cannot be pulled."),
    "CreateContainerConfigError": (
        Reason.CONTAINER_CONFIG_INVALID,
        "A Secret, ConfigMap or user the container needs is missing or not accepted.",
    ),
    "CreateContainerError": (Reason.CONTAINER_CONFIG_INVALID, "The container cannot be made."),
    "RunContainerError": (Reason.CONTAINER_CONFIG_INVALID, "The container cannot be started."),
}
"""Why a container may wait without end, by the kubelet's word for it; reason of PodsReady, and words."""

__all__ = ["ECHO_PATIENCE", "FETCH_CONTAINER", "WAITING_FOR_EVER", "Failure", "explain_exit", "judge", "taken_back"]
