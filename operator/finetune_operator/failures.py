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
from finetune_api.run import EXIT_STOPPED, EXIT_USER, FETCH_CONTAINER, TRAINER_CONTAINER
from finetune_operator.observe import Exit, GangJob, Pod

SIGKILL, SIGTERM, SIGSEGV, SIGABRT, SIGBUS = 9, 15, 11, 6, 7
_SIGNALS = {SIGKILL: "SIGKILL", SIGTERM: "SIGTERM", SIGSEGV: "SIGSEGV", SIGABRT: "SIGABRT", SIGBUS: "SIGBUS"}

# Causes that blame the machine, whoever tells of them: the next attempt goes elsewhere.
_NODE_TO_BLAME = {
    Cause.NODE_LOST,
    Cause.GPU_ERROR,
    Cause.NO_ACCELERATOR,
    Cause.START_ERROR,
    Cause.POD_REJECTED,
    Cause.CLOCK_SKEW,
}
# What the rest of a gang dies of: if another pod has a better story (a lower number), that one is the cause.
_SECONDARY = {Cause.KILLED: 1, Cause.UNKNOWN: 1, Cause.COMMUNICATION_ERROR: 2, Cause.TERMINATED: 2}
ECHO_PATIENCE = timedelta(seconds=5)
"""So long a worker that lost its peers waits for their own story, which another kubelet tells a moment later. It
decides what is done: an eviction costs no restart, a full GPU is no reason to try again."""
START_PATIENCE = timedelta(minutes=2)
"""So long a node may try to make a container, again and again, before it counts as one that cannot."""


_OVERLOADED = re.compile(
    r"deadline exceeded|timed out|timeout|temporarily unavailable|connection refused|is reserved|too many open files|"
    r"no space left|cannot allocate memory",
    re.IGNORECASE,
)
"""Words of a container runtime that is short of something: also from two nodes they say nothing of the pod."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended."""

    cause: Cause
    message: str
    exit_code: int | None = None
    pod: str = ""
    node: str = ""
    blames_node: bool = False
    """What the cause alone does not say: its node ended the pod."""

    @property
    def retry(self) -> Retry:
        """What the table of causes says."""
        return RETRY[self.cause]

    @property
    def may_pass(self) -> bool:
        """What could not be started may be started later, on any node."""
        return bool(_OVERLOADED.search(self.message))

    @property
    def says_why(self) -> bool:
        """The message tells more than that a process ended."""
        return not self.message.endswith(("left no message.", f"ended with exit code {self.exit_code}."))

    @property
    def node_suspect(self) -> bool:
        """The next attempt keeps off this node."""
        return bool(self.node) and (self.blames_node or self.cause in _NODE_TO_BLAME)


def judge(job: GangJob | None, pods: tuple[Pod, ...], dead_nodes: frozenset[str], now: datetime) -> Failure | None:
    """The failure of an attempt, or None where it goes on (or went well), or where the cause is still to come.

    ``dead_nodes`` are nodes of these pods that are gone or not ready.
    """
    stories = [(_when(pod, failure), failure) for pod in pods if (failure := _judge_pod(pod, dead_nodes, now))]
    if stories:
        when, failure = min(stories, key=_how_far_from_the_cause)
        if job is not None and job.suspended and failure.cause in _SECONDARY:
            return replace(taken_back(job), exit_code=failure.exit_code, pod=failure.pod, node=failure.node)
        running = any(pod.running for pod in pods)
        if running and failure.cause is Cause.COMMUNICATION_ERROR and now - when < ECHO_PATIENCE:
            return None
        # Stopped because of a sidecar elsewhere, when all was done there: they may still end well.
        if running and failure.cause in (Cause.CONTAINER_ERROR, Cause.TERMINATED) and _a_sidecar_failed(pods):
            return None
        return failure
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
    ends = [e.finished for e in (pod.sidecars if pod.trained else pod.exits) if e.code != 0 and e.finished]
    return min(ends) if ends else datetime.max.replace(tzinfo=UTC)


def _judge_pod(pod: Pod, dead_nodes: frozenset[str], now: datetime) -> Failure | None:
    if pod.trained:
        return _failed_all_the_same(pod) if pod.phase == "Failed" else None
    if pod.node and pod.node in dead_nodes and not _spoke(pod):
        return _of(pod, Cause.NODE_LOST, f"Node {pod.node} is not ready or gone.")
    if taken := _taken(pod):
        return taken
    for ended in pod.exits:
        if ended.code != 0:
            cause, message = explain_exit(ended)
            # A worker that stopped on SIGTERM while its pod is being deleted was told to go.
            code = ended.termination.exit_code if ended.termination and ended.termination.exit_code else ended.code
            whose = f" It is the clock of node {pod.node}." if cause is Cause.CLOCK_SKEW else ""
            return _of(pod, cause, message + whose + _sidecars_before(pod, ended), code)
    if pod.deleting:
        return _of(pod, Cause.TERMINATED, f"Pod {pod.name} was deleted.")
    if pod.phase == "Failed":
        detail = f"{pod.reason} {pod.message}".strip() or "no reason given"
        return _of(pod, Cause.UNKNOWN, f"Pod {pod.name} failed: {detail}.")
    return _cannot_start(pod, now)


def _of(pod: Pod, cause: Cause, message: str, code: int | None = None, *, blames_node: bool = False) -> Failure:
    return Failure(cause, message.strip(), code, pod.name, pod.node, blames_node)


def _spoke(pod: Pod) -> bool:
    return any(e.termination for e in pod.exits)


def _a_sidecar_failed(pods: tuple[Pod, ...]) -> bool:
    return any(pod.trained and pod.phase == "Failed" for pod in pods)


def _failed_all_the_same(pod: Pod) -> Failure | None:
    """The trainer of this pod has done its work, and still the pod failed, and by that the Job: Kubernetes stops the
    workers that have not ended yet."""
    if taken := _taken(pod):
        return taken
    if pod.deleting:
        return _of(pod, Cause.TERMINATED, f"Pod {pod.name} was deleted.")
    ended = next((e for e in pod.sidecars if e.code != 0), None)
    if ended is None:
        return None
    message = (
        f"The sidecar {ended.container} of pod {pod.name} {_how(ended)} when the trainer beside it had finished. By "
        "that Kubernetes fails the whole Job, and other workers had not finished yet. Have the sidecar end with 0, or "
        "make it an init container with restartPolicy: Always in spec.workers.template."
    )
    return _of(pod, Cause.CONTAINER_ERROR, message, ended.code)


def _sidecars_before(pod: Pod, ended: Exit) -> str:
    """What may explain the failure of a container: a sidecar that failed before it, such as a mesh's proxy."""
    if ended.finished is None:
        return ""
    failed = [e for e in pod.sidecars if e.code != 0 and e.finished and e.finished <= ended.finished]
    return "".join(f" Before that, its sidecar {e.container} {_how(e)}." for e in failed)


def _how(ended: Exit) -> str:
    reason = f", {ended.reason}" if ended.reason not in ("", "Error", "Completed") else ""
    return f"ended with exit code {ended.code}{reason}"


# --- what the infrastructure did to a pod ---------------------------------------------------------------------

_DISRUPTIONS: Mapping[str, tuple[Cause, str, bool]] = {
    "PreemptionByScheduler": (Cause.PREEMPTED, "preempted for a pod of higher priority", False),
    # Its node is well: a drain or an autoscaler cordons it.
    "EvictionByEvictionAPI": (Cause.EVICTED, "evicted (a drain, or an autoscaler that removes its node)", False),
    "TerminationByKubelet": (Cause.EVICTED, "ended by its node (shutdown, or a lack of memory or disk there)", True),
    "DeletionByTaintManager": (Cause.NODE_LOST, "removed because its node is not ready or unreachable", True),
    "DeletionByPodGC": (Cause.NODE_LOST, "removed because its node is gone", True),
}
"""Reason of the condition DisruptionTarget → cause, words, whether the node is to blame."""

_ENDED_BY_NODE = ("Evicted", "NodeShutdown", "Shutdown", "Terminated")


def _taken(pod: Pod) -> Failure | None:
    code = next((e.code for e in pod.exits if e.code != 0), None)
    if pod.reason == "Evicted" and (over := _over_its_own_limit(pod)):
        return _of(pod, Cause.OUT_OF_DISK, over, code)
    if pod.reason == "Preempting":
        message = f"Pod {pod.name} made room on node {pod.node} for a critical pod. {pod.message}"
        return _of(pod, Cause.PREEMPTED, message, code, blames_node=True)
    if pod.disruption:
        other = (Cause.EVICTED, f"disrupted ({pod.disruption})", False)
        cause, what, blames = _DISRUPTIONS.get(pod.disruption, other)
        return _of(pod, cause, f"Pod {pod.name} was {what}. {pod.message}", code, blames_node=blames)
    if pod.reason in _ENDED_BY_NODE:
        message = f"Pod {pod.name} was ended by its node {pod.node}: {pod.reason}. {pod.message}"
        return _of(pod, Cause.EVICTED, message, code, blames_node=True)
    if pod.reason == "NodeLost":
        return _of(pod, Cause.NODE_LOST, f"Pod {pod.name}: its node {pod.node} is lost. {pod.message}", code)
    # The kubelet's own check of a pod has a reason for each resource and plugin: what never started, it refused.
    if pod.phase == "Failed" and pod.reason and pod.node and not pod.started:
        message = f"Node {pod.node} refused pod {pod.name}: {pod.reason}. {pod.message}"
        return _of(pod, Cause.POD_REJECTED, message)
    return None


# What the kubelet says of a pod over a limit of its own; of one that only was on a node in need it says more or else.
_VOLUME = re.compile(r'Usage of EmptyDir volume "(?P<volume>[^"]+)" exceeds the limit "(?P<limit>[^"]+)"')
_STORAGE = re.compile(
    r"Pod ephemeral local storage usage exceeds the total limit of containers (?P<pod>[^\s]+?)\.?(\s|$)|"
    r'Container (?P<container>\S+) exceeded its local ephemeral storage limit "(?P<limit>[^"]+)"'
)
_SIZES = {
    "cache": "Raise cache.sizeLimit of the job's profile, or give the profile a claim (cache.claimName).",
    "shm": "Raise shmSize of the job's profile.",
}
"""What sets the size of the operator's own volumes."""


def _over_its_own_limit(pod: Pod) -> str:
    """What the pod used too much of, and the remedy; empty where it was not its own limit."""
    if found := _VOLUME.search(pod.message):
        name, limit = found["volume"], found["limit"]
        remedy = _SIZES.get(name, f"Raise emptyDir.sizeLimit of the volume {name} in spec.workers.template.")
        return f"Pod {pod.name} wrote more than {limit} into its volume {name}, which is the volume's limit. {remedy}"
    if found := _STORAGE.search(pod.message):
        who = f"Container {found['container']} of pod {pod.name}" if found["container"] else f"Pod {pod.name}"
        return (
            f"{who} used more local disk than its limit of {found['limit'] or found['pod']}; logs count, and for a pod "
            "its emptyDir volumes. Raise resources.limits.ephemeral-storage in spec.workers.template."
        )
    return ""


# --- containers that could not be started ---------------------------------------------------------------------

_NOT_STARTED = ("ContainerCannotRun", "StartError", "CreateContainerError", "RunContainerError")
_GPU_RUNTIME = re.compile(
    r"nvidia-container|libnvidia|nvidia-ctk|nvidia-cdi|nvidia\.com/|/dev/nvidia|nvml|libcuda|CDI device|"
    r"driver/library version mismatch|/dev/kfd|amd\.com/gpu|habana",
    re.IGNORECASE,
)


def explain_start(container: str, command: str, text: str) -> tuple[Cause, str]:
    """Cause and message of a container that its node could not start. ``command`` is the program it was to run, empty
    where the image names it; ``text`` the container runtime's words."""
    if command and _lacks(command, text):
        ours = container in (TRAINER_CONTAINER, FETCH_CONTAINER)
        check = "the profile's image" if ours else f"image and command of {container} in spec.workers.template"
        what = "the image has no trainer in it" if ours else "its image does not hold its command"
        return Cause.INVALID_CONFIGURATION, (
            f"Container {container} cannot start: {what}. Check {check}. It said: {text[:400]}"
        )
    if "OOM-killed" in text:
        return Cause.OUT_OF_MEMORY, (
            f"Container {container} was killed while it started: its memory limit is too low. Raise "
            f"resources.limits.memory in spec.workers.template. It said: {text[:400]}"
        )
    if _GPU_RUNTIME.search(text):
        return Cause.GPU_ERROR, f"The node could not give container {container} its GPUs. It said: {text[:600]}"
    return Cause.START_ERROR, f"The node could not start container {container}. It said: {text[:600]}"


def _lacks(command: str, text: str) -> bool:
    """The program itself is missing, as runc, crun and runsc say it: not one that the runtime wanted to run on its
    own, nor a device or a file to mount."""
    name = re.escape(command)
    return bool(
        re.search(rf'exec: "{name}": (executable file not found|stat [^:]*: no such file or directory)', text)
        or re.search(rf'executable file `{name}` not found|error finding executable "{name}" in PATH', text)
    )


def _cannot_start(pod: Pod, now: datetime) -> Failure | None:
    """A container that its node tries in vain to make, again and again: it would wait for ever."""
    since = pod.waiting_since
    if pod.waiting not in _NOT_STARTED or pod.running_since or since is None or now - since < START_PATIENCE:
        return None
    return _of(pod, *explain_start(pod.waiting_container, pod.waiting_command, pod.waiting_message or pod.waiting))


# --- how containers ended -------------------------------------------------------------------------------------


def explain_exit(ended: Exit) -> tuple[Cause, str]:
    """Cause and message of a container that ended with a code other than 0.

    What the trainer said itself comes first, but not over the kernel's OOM killer, which kills one process of
    several and leaves the others to report lost peers.
    """
    if ended.reason == "OOMKilled":
        return Cause.OUT_OF_MEMORY, (
            f"Container {ended.container} was killed: it used more memory than its limit. Raise "
            "resources.limits.memory in spec.workers.template"
            + (", or lower data.max_length or the batch size." if ended.ours else ".")
        )
    if ended.termination:
        lost = f"Its message was cut off by the kubelet; the log of container {ended.container} has it."
        return ended.termination.cause, ended.termination.message or (lost if ended.termination.cut else "")
    if ended.reason in _NOT_STARTED:
        return explain_start(ended.container, ended.command, ended.text or ended.reason)
    signal = ended.code - 128 if ended.code > 128 else 0
    # Who is killed has said nothing about it: the log's last lines are about something else.
    if ended.ours and signal not in (SIGKILL, SIGTERM) and (known := _known_text(ended.text)):
        return known
    if signal == SIGTERM or (ended.ours and ended.code == EXIT_STOPPED):
        return Cause.TERMINATED, f"Container {ended.container} was told to stop (exit code {ended.code})."
    if signal:
        name = _SIGNALS.get(signal, f"signal {signal}")
        return Cause.KILLED, f"Container {ended.container} was killed by {name} (exit code {ended.code})."
    if ended.ours and ended.code == EXIT_USER:
        return Cause.INVALID_CONFIGURATION, (
            f"Container {ended.container} ended with exit code {ended.code}: a mistake that a restart would repeat. "
            "What it said of it is lost here; the container's log has it."
        )
    tail = f" It said: {ended.text.strip()[-600:]}" if ended.text.strip() else ""
    if not ended.ours:
        return Cause.CONTAINER_ERROR, f"Your init container {ended.container} {_how(ended)}.{tail}"
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
        r"(?i)(/dev/shm|shared memory)\b[^\n]*no space left on device|insufficient shared memory",
        Cause.OUT_OF_DISK,
        "The shared memory is full. Raise shmSize of the job's profile.",
    ),
    (
        r"uncorrectable ECC|Xid|CUDA error: (device-side|unspecified|an illegal|misaligned|no kernel)|"
        r"CUDA driver initialization failed|driver/library version mismatch|lib(cuda|nvidia-ml)\.so",
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
        r"(?i)no space left on device|disk quota exceeded",
        Cause.OUT_OF_DISK,
        "A disk is full. Give the job's profile a larger cache (cache.sizeLimit, cache.claimName), or a node or claim "
        "with more room.",
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
    "CrashLoopBackOff": (Reason.POD_NOT_STARTED, "The container fails again and again."),
}
"""Why a container may wait without end, by the kubelet's word for it; reason of PodsReady, and words."""

__all__ = ["ECHO_PATIENCE", "FETCH_CONTAINER", "WAITING_FOR_EVER", "Failure", "explain_exit", "judge", "taken_back"]
