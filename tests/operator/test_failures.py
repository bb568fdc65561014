"""What is said of every way a worker can end."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_api.causes import RETRY, Cause, Retry
from finetune_api.run import TERMINATION_LIMIT, CheckpointInfo, OutputInfo, Progress, Termination
from finetune_operator.failures import judge
from finetune_operator.observe import observe

NO_NODES: frozenset[str] = frozenset()


def pod(index: int = 0, *, node: str = "node-1", **status: Any) -> dict[str, Any]:
    """A worker pod, as the API server would show it."""
    deleting, told = status.pop("deleting", False), status.pop("told", 30)
    return {
        "kind": "Pod",
        "metadata": {
            "name": f"tune-a1-{index}-x",
            "labels": {"finetune.dev/attempt": "1", "batch.kubernetes.io/job-completion-index": str(index)},
            **(
                {"deletionTimestamp": "2026-01-01T00:01:00Z", "deletionGracePeriodSeconds": 60 - told}
                if deleting
                else {}
            ),
        },
        "spec": {"nodeName": node},
        "status": {"phase": "Running", **status},
    }


def ended(
    code: int, at: int = 0, container: str = "trainer", reason: str = "Error", message: str = ""
) -> dict[str, Any]:
    """Status of a pod whose container ended."""
    state = {"exitCode": code, "reason": reason, "message": message, "finishedAt": f"2026-01-01T00:00:{at:02}Z"}
    kind = "initContainerStatuses" if container == "fetch" else "containerStatuses"
    return {"phase": "Failed", kind: [{"name": container, "state": {"terminated": state}}]}


def word(cause: Cause, message: str = "said", **fields: Any) -> str:
    """A termination message of the trainer's."""
    return Termination(cause=cause, message=message, **fields).to_message()


JOB = {
    "kind": "Job",
    "metadata": {"name": "tune-a1", "labels": {"finetune.dev/attempt": "1"}},
    "status": {"active": 2},
}


def judged(
    *pods: dict[str, Any], dead: frozenset[str] = NO_NODES, job: dict[str, Any] | None = JOB, at: int = 59
) -> Any:
    now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=at)
    seen = observe("tune", [*([job] if job else []), *pods])
    return judge(seen.job(1), seen.pods_of(1), dead, now)


@pytest.mark.parametrize(
    ("status", "cause", "says"),
    [
        (ended(137, reason="OOMKilled"), Cause.OUT_OF_MEMORY, "resources.limits.memory"),
        (ended(1, message=word(Cause.NON_FINITE_LOSS, "step 7")), Cause.NON_FINITE_LOSS, "step 7"),
        (ended(64, container="fetch", message=word(Cause.MODEL_NOT_FOUND)), Cause.MODEL_NOT_FOUND, "said"),
        (ended(137), Cause.KILLED, "SIGKILL"),
        (ended(137, message="a hint: No module named 'kernels'. Please install it"), Cause.KILLED, "SIGKILL"),
        (ended(1, message="a hint: No module named 'kernels'.\nKeyError: 7"), Cause.TRAINER_ERROR, "KeyError: 7"),
        (ended(1, message="Traceback\nModuleNotFoundError: No module named 'x'"), Cause.INVALID_CONFIGURATION, "'x'"),
        (ended(139), Cause.KILLED, "SIGSEGV"),
        (ended(143), Cause.TERMINATED, "told to stop"),
        (ended(75), Cause.TERMINATED, "told to stop"),
        (ended(1, message="torch.OutOfMemoryError: CUDA out of memory. Tried"), Cause.OUT_OF_GPU_MEMORY, "gradient_ch"),
        (ended(1, message="x\nRuntimeError: CUDA error: uncorrectable ECC error"), Cause.GPU_ERROR, "ECC"),
        (ended(1, message="ImportError: libcuda.so.1: cannot open shared object"), Cause.GPU_ERROR, "libcuda.so.1"),
        (ended(1, message="ncclRemoteError: a peer has gone"), Cause.COMMUNICATION_ERROR, "lost each other"),
        (ended(1, message="/usr/bin/python: No module named finetune_trainer"), Cause.INVALID_CONFIGURATION, "image"),
        (ended(1, message="Traceback\nValueError: boom"), Cause.TRAINER_ERROR, "ValueError: boom"),
        ({"phase": "Failed", "reason": "Evicted", "message": "low on disk"}, Cause.EVICTED, "low on disk"),
        ({"phase": "Failed", "reason": "NodeShutdown"}, Cause.EVICTED, "NodeShutdown"),
        (ended(1, message="NCCL WARN creating /dev/shm/nccl-x: No space left on device"), Cause.OUT_OF_DISK, "shmSize"),
        (ended(1, message="OSError: [Errno 28] No space left on device"), Cause.OUT_OF_DISK, "No space left"),
        ({"phase": "Failed"}, Cause.UNKNOWN, "no reason given"),
        ({"deleting": True}, Cause.TERMINATED, "was deleted"),
    ],
)
def test_one_pod(status: dict[str, Any], cause: Cause, says: str) -> None:
    found = judged(pod(**status), pod(1))
    assert found.cause is cause
    assert says in found.message


RUNC = "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: "


@pytest.mark.parametrize(
    ("said", "cause", "suspect"),
    [
        (RUNC + 'exec: "python": executable file not found in $PATH: unknown', Cause.INVALID_CONFIGURATION, False),
        (RUNC + 'exec: "python": stat python: no such file or directory: unknown', Cause.INVALID_CONFIGURATION, False),
        ("crun: executable file `python` not found in $PATH: No such file", Cause.INVALID_CONFIGURATION, False),
        (RUNC + 'exec: "python": permission denied: unknown', Cause.START_ERROR, True),
        (RUNC + 'exec: "runc": executable file not found in $PATH: unknown', Cause.START_ERROR, True),
        ("failed to create shim task: open /dev/fuse: no such file or directory: unknown", Cause.START_ERROR, True),
        ("failed to create shim task: open /dev/nvidia3: no such file or directory: unknown", Cause.GPU_ERROR, True),
        (RUNC + "error running prestart hook #0: stderr: nvidia-container-cli: initialization error: nvml error: "
         "driver/library version mismatch", Cause.GPU_ERROR, True),
        ("CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=0", Cause.GPU_ERROR, True),
        (RUNC + "container init was OOM-killed (memory limit too low?): unknown", Cause.OUT_OF_MEMORY, False),
        ("", Cause.START_ERROR, True),
    ],
)  # fmt: skip
def test_only_a_missing_command_is_the_images_fault(said: str, cause: Cause, suspect: bool) -> None:
    failed = pod(**ended(128, reason="StartError", message=said))
    failed["spec"]["containers"] = [{"name": "trainer", "command": ["python", "-m", "finetune_trainer.launch"]}]
    found = judged(failed)
    assert (found.cause, found.node_suspect) == (cause, suspect)
    # A device that cannot be injected is told while the kubelet tries again and again.
    waiting = {"reason": "CreateContainerError", "message": said}
    status = {"phase": "Pending", "startTime": "2026-01-01T00:00:00Z"}
    stuck = {**failed, "status": {**status, "containerStatuses": [{"name": "trainer", "state": {"waiting": waiting}}]}}
    assert judged(stuck, at=59) is None
    assert judged(stuck, at=120).cause is cause


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("OutOfnvidia.com/gpu", "Node didn't have enough resource: nvidia.com/gpu, requested: 8, used: 8, capacity: 8"),
        ("OutOfcpu", "Node didn't have enough resource: cpu"),
        ("OutOfpods", "Node didn't have enough resource: pods"),
        ("TopologyAffinityError", "Resources cannot be allocated with Topology locality"),
        ("UnexpectedAdmissionError", "Allocate failed due to requested number of devices unavailable"),
        ("NodeAffinity", "Predicate NodeAffinity failed"),
        ("VolumeAttachmentLimitExceeded", "Node has reached its volume attachment limit"),
        ("SomethingNew", ""),
    ],
)
def test_a_pod_that_its_node_refuses_is_the_infrastructures(reason: str, message: str) -> None:
    found = judged(pod(phase="Failed", reason=reason, message=f"Pod was rejected: {message}"))
    assert (found.cause, found.retry, found.node_suspect) == (Cause.POD_REJECTED, Retry.FREE, True)
    assert reason in found.message and message in found.message


def test_room_for_a_critical_pod_is_a_preemption() -> None:
    by = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}
    message = "Preempted in order to admit critical pod"
    found = judged(pod(reason="Preempting", message=message, conditions=[by], **ended(137)))
    assert (found.cause, found.retry, found.node_suspect) == (Cause.PREEMPTED, Retry.FREE, True)


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ('Usage of EmptyDir volume "cache" exceeds the limit "200Gi". ', "cache.sizeLimit of the job's profile"),
        ('Usage of EmptyDir volume "shm" exceeds the limit "64Gi". ', "shmSize"),
        ('Usage of EmptyDir volume "mine" exceeds the limit "1Gi". ', "emptyDir.sizeLimit of the volume mine"),
        ("Pod ephemeral local storage usage exceeds the total limit of containers 50Gi. ", "limits.ephemeral-storage"),
        ('Container shipper exceeded its local ephemeral storage limit "50Gi". ', "Container shipper"),
    ],
)
def test_an_eviction_over_its_own_limit_is_the_jobs(message: str, remedy: str) -> None:
    found = judged(pod(reason="Evicted", message=message, **ended(137)))
    assert (found.cause, found.retry, found.node_suspect) == (Cause.OUT_OF_DISK, Retry.COUNTED, False)
    assert remedy in found.message
    assert any(limit in found.message for limit in ("200Gi", "64Gi", "1Gi", "50Gi"))


def test_an_eviction_from_a_node_in_need_is_the_nodes() -> None:
    by = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}
    need = (
        "The node was low on resource: ephemeral-storage. Threshold quantity: 10Gi, available: 5Gi. Container fetch "
        "was using 90Gi, request is 0, has larger consumption of ephemeral-storage. "
    )
    for conditions in ([by], []):
        found = judged(pod(reason="Evicted", message=need, conditions=conditions, **ended(137)))
        assert (found.cause, found.retry, found.node_suspect) == (Cause.EVICTED, Retry.FREE, True)
        assert "low on resource: ephemeral-storage" in found.message


SHIPPER = {"containers": [{"name": "trainer"}, {"name": "shipper"}], "initContainers": [{"name": "fetch"}]}


def with_sidecar(trainer: int | None, shipper: int | None, index: int = 0, **status: Any) -> dict[str, Any]:
    """A pod with a log shipper beside the trainer; None: it still runs. The shipper ends a second before it."""
    running = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    states = [
        {"name": name, "state": ended(code, at)["containerStatuses"][0]["state"] if code is not None else running}
        for name, code, at in (("trainer", trainer, 5), ("shipper", shipper, 4))
    ]
    made = pod(index, **{"phase": "Running", "containerStatuses": states, **status})
    return {**made, "spec": {**made["spec"], **SHIPPER}}


def test_a_sidecar_is_no_reason_for_anything_while_its_trainer_runs_or_has_done_its_work() -> None:
    for trainer in (None, 0):
        for shipper in (None, 0, 1, 137):
            assert judged(with_sidecar(trainer, shipper), pod(1)) is None


def test_what_a_sidecar_did_before_is_told_beside_the_trainers_own_story() -> None:
    found = judged(with_sidecar(1, 137, phase="Failed"))
    assert found.cause is Cause.TRAINER_ERROR
    assert found.message.endswith(" Before that, its sidecar shipper ended with exit code 137.")


def test_a_sidecar_that_fails_the_job_under_workers_that_have_not_ended_is_the_cause() -> None:
    stopped = pod(1, deleting=True, told=5, **ended(75, at=7))
    failed = with_sidecar(0, 1, phase="Failed")
    assert judged(failed, with_sidecar(None, None, 1, deleting=True)) is None  # it may still end well
    found = judged(failed, stopped)
    assert (found.cause, found.retry, found.exit_code) == (Cause.CONTAINER_ERROR, Retry.COUNTED, 1)
    assert "The sidecar shipper of pod tune-a1-0-x ended with exit code 1" in found.message


def test_an_init_container_of_the_users_own_is_named() -> None:
    failed = pod(**ended(3, container="license", message="no licence server"))
    failed["status"]["initContainerStatuses"] = failed["status"].pop("containerStatuses")
    failed["spec"]["initContainers"] = [{"name": "license"}]
    found = judged(failed)
    assert (found.cause, found.retry) == (Cause.CONTAINER_ERROR, Retry.COUNTED)
    assert found.message == "Your init container license ended with exit code 3. It said: no licence server"


@pytest.mark.parametrize(
    ("reason", "cause", "retry"),
    [
        ("PreemptionByScheduler", Cause.PREEMPTED, Retry.FREE),
        ("EvictionByEvictionAPI", Cause.EVICTED, Retry.FREE),
        ("TerminationByKubelet", Cause.EVICTED, Retry.FREE),
        ("DeletionByTaintManager", Cause.NODE_LOST, Retry.FREE),
        ("DeletionByPodGC", Cause.NODE_LOST, Retry.FREE),
        ("SomethingNew", Cause.EVICTED, Retry.FREE),
    ],
)
def test_a_disruption_explains_the_exit_code_and_costs_no_restart(reason: str, cause: Cause, retry: Retry) -> None:
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason}
    found = judged(pod(conditions=[condition], **ended(143)), pod(1))
    assert (found.cause, found.retry, found.exit_code) == (cause, retry, 143)
    # Where it was moved on purpose, its node is well.
    assert found.node_suspect is (reason in ("TerminationByKubelet", "DeletionByTaintManager", "DeletionByPodGC"))


def test_a_pod_on_a_dead_node_is_the_nodes_fault() -> None:
    found = judged(pod(deleting=True), pod(1, node="node-2"), dead=frozenset({"node-1"}))
    assert found.cause is Cause.NODE_LOST
    assert found.node_suspect


def test_what_happened_first_is_the_cause() -> None:
    first = pod(1, **ended(1, at=5, message=word(Cause.TRAINER_ERROR, "the culprit")))
    second = pod(0, **ended(1, at=9, message=word(Cause.TRAINER_ERROR, "a victim")))
    assert judged(second, first).message == "the culprit"


def test_who_only_lost_his_peers_is_not_the_cause_even_when_first() -> None:
    victim = pod(0, **ended(1, at=3, message=word(Cause.COMMUNICATION_ERROR)))
    culprit = pod(1, **ended(1, at=4, message=word(Cause.OUT_OF_GPU_MEMORY)))
    assert judged(victim, culprit).cause is Cause.OUT_OF_GPU_MEMORY


def test_who_was_killed_is_the_cause_and_not_his_peers_that_lost_him_at_the_same_second() -> None:
    victim = pod(0, **ended(1, at=3, message=word(Cause.COMMUNICATION_ERROR)))
    assert judged(victim, pod(1, **ended(137, at=3))).cause is Cause.KILLED


def test_who_lost_his_peers_waits_a_moment_for_their_story() -> None:
    victim = pod(0, **ended(1, at=3, message=word(Cause.COMMUNICATION_ERROR)))
    started = {"containerStatuses": [{"name": "trainer", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}]}
    silent = pod(1, **started)
    assert judged(victim, silent, at=7) is None
    assert judged(victim, silent, at=8).cause is Cause.COMMUNICATION_ERROR
    assert judged(victim, pod(1, **ended(137, at=6)), at=7).cause is Cause.KILLED


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        (3, Cause.COMMUNICATION_ERROR),  # by the Job's controller, at once
        (4, Cause.COMMUNICATION_ERROR),
        (2, Cause.TERMINATED),  # by a person, and its peers lost it
    ],
)
@pytest.mark.parametrize("end", [{}, ended(143, at=4)])
def test_who_was_told_to_go_is_the_cause_where_nothing_had_failed_before(
    told: int, cause: Cause, end: dict[str, Any]
) -> None:
    victim = pod(1, **ended(1, at=3, message="NCCL error: remote process exited"))
    assert judged(pod(0, deleting=True, told=told, **end), victim).cause is cause


OWNERS = {"FineTuneJob": {"kind": "FineTuneJob", "name": "tune"}, "Job": {"kind": "Job", "name": "tune-a1"}}


def test_pods_of_a_job_that_is_gone_are_nobodys() -> None:
    def owned(kind: str, by: str, child: dict[str, Any], uid: str) -> dict[str, Any]:
        metadata = child["metadata"] | {
            "uid": uid,
            "ownerReferences": [{**OWNERS[kind], "uid": by, "controller": True}],
        }
        return child | {"metadata": metadata}

    ours, gone = owned("FineTuneJob", "new", JOB, "job"), pod(deleting=True)
    seen = observe("tune", [ours, owned("Job", "job", pod(1), "b"), owned("Job", "lost", gone, "a")], "new")
    assert [p.index for p in seen.pods] == [1]
    assert (seen.earlier, seen.strangers) == (True, ())
    theirs = owned("Job", "lost", pod(0), "a")
    theirs["metadata"]["ownerReferences"][0]["name"] = "their-own-job"  # which only has our label in its template
    seen = observe("tune", [ours, owned("Job", "job", pod(1), "b"), theirs], "new")
    assert (seen.earlier, seen.strangers) == (False, ("tune-a1-0-x",))
    assert judge(seen.job(1), seen.pods_of(1), NO_NODES, datetime.now(UTC)) is None


def test_the_workers_own_exit_code_is_told_not_the_launchers() -> None:
    said = word(Cause.KILLED, exit_code=-9)
    assert judged(pod(**ended(1, message=said))).exit_code == -9


def test_the_words_of_a_newer_trainer_are_understood() -> None:
    output = {"uri": "s3://team/tune", "kind": "model", "parts": 3}
    message = json.dumps({"cause": "OutOfGPUMemory", "outputs": [output], "peak_memory": 81})
    [ended_so] = observe("tune", [pod(**ended(1, message=message))]).pods[0].exits
    assert ended_so.termination is not None
    assert (ended_so.termination.cause, ended_so.termination.outputs[0].uri) == ("OutOfGPUMemory", "s3://team/tune")
    assert Progress.model_validate({"step": 3, "checkpoints": [{"step": 2, "uri": "s3://c", "shards": 4}]}).step == 3


def test_a_job_that_failed_and_has_no_pods_lost_them_to_someone() -> None:
    """As an operator finds it that was away: a deleted pod failed the Job, whose controller took the others."""
    condition = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "has reached it"}
    found = judged(job={**JOB, "status": {"conditions": [condition]}})
    assert (found.cause, found.retry) == (Cause.TERMINATED, Retry.FREE)
    condition["reason"] = "DeadlineExceeded"
    assert judged(job={**JOB, "status": {"conditions": [condition]}}).cause is Cause.UNKNOWN


def test_a_job_that_is_gone_was_deleted_by_someone() -> None:
    assert judged(job=None).cause is Cause.JOB_DELETED


SUSPENDED = {
    **JOB,
    "metadata": {"name": "tune-a1", "labels": {"finetune.dev/attempt": "1", "kueue.x-k8s.io/queue-name": "team"}},
    "spec": {"suspend": True},
}


@pytest.mark.parametrize(
    "status", [{"deleting": True}, ended(75), ended(137), ended(1, message=word(Cause.COMMUNICATION_ERROR))]
)
def test_pods_of_a_job_that_its_queue_suspends_were_preempted(status: dict[str, Any]) -> None:
    found = judged(pod(**status), pod(1), job=SUSPENDED, at=0)
    assert (found.cause, found.retry, found.node_suspect) == (Cause.PREEMPTED, Retry.FREE, False)
    assert found.message == "Queue team took its room back: Job tune-a1 was suspended, and its pods were told to stop."
    unnamed = {**SUSPENDED, "metadata": JOB["metadata"]}
    assert judged(pod(**status), job=unnamed).message.startswith("A queue took its room back")


def test_what_failed_by_itself_was_not_preempted_by_the_queue() -> None:
    failed = pod(**ended(1, message=word(Cause.OUT_OF_GPU_MEMORY)))
    assert judged(failed, pod(1, deleting=True), job=SUSPENDED).cause is Cause.OUT_OF_GPU_MEMORY
    assert judged(pod(), job=SUSPENDED) is None


def test_nothing_is_wrong_with_a_running_gang() -> None:
    assert judged(pod(), pod(1)) is None


FULL_WORD = Termination(
    cause=Cause.INVALID_DATA,
    exit_code=64,
    rank=3,
    step=1500,
    max_steps=2000,
    outputs=[OutputInfo(uri="s3://team/out", kind="adapter", digest="sha256:1", size=2048)],
    last_checkpoint=CheckpointInfo(step=1500, uri="s3://team/c/step-1500", digest="sha256:2", size=1024),
    loss=0.25,
    message='rows.jsonl:7: "instruction", with a \\ and ünï\u2028code, is missing; accepted: {"a": [1, 2]}',
    kept=[1000, 1500],
    evaluation={"loss": 1.5, "loss/rows": 12.25},
)


@given(cause=st.sampled_from(list(Cause)), message=st.text(max_size=60))
@example(cause=Cause.INVALID_DATA, message=FULL_WORD.message)
def test_a_word_cut_anywhere_tells_nothing_that_was_not_said(cause, message):
    said = FULL_WORD.model_copy(update={"cause": cause, "message": message})
    text = said.to_message()
    cause_ends = text.index(",") + 1
    for length in range(len(text)):
        read = Termination.from_message(text[:length])
        if length < cause_ends:
            assert read is None
            continue
        assert read is not None
        assert (read.cause, read.cut) == (cause, True)
        assert message.startswith(read.message)
        for name in Termination.model_fields.keys() - {"message", "cut"}:
            assert getattr(read, name) in (getattr(said, name), Termination.model_fields[name].default), name
    assert Termination.from_message(text) == said


FAULTS = [cause for cause in Cause if RETRY[cause] is not Retry.FREE and cause is not Cause.SUCCEEDED]


@pytest.mark.parametrize("cause", FAULTS)
def test_a_word_cut_anywhere_is_judged_as_the_whole_one(cause):
    code = 64 if RETRY[cause] is Retry.NEVER else 1
    text = FULL_WORD.model_copy(update={"cause": cause, "exit_code": code}).to_message()
    for length in range(len(text) + 1):
        assert judged(pod(**ended(code, message=text[:length]))).retry is RETRY[cause], text[:length]


def test_a_word_of_many_sources_and_wide_letters_fits():
    long = {"message": "字" * 2000, "evaluation": {f"loss/{number}": 1.0 for number in range(500)}}
    text = FULL_WORD.model_copy(update=long).to_message()
    assert len(text.encode()) <= TERMINATION_LIMIT
    read = Termination.from_message(text)
    assert read is not None
    assert (read.outputs, read.kept, read.evaluation) == (FULL_WORD.outputs, FULL_WORD.kept, {})
    assert len(read.message) > 900
    assert text.index('"message"') < 1200, "what decides is left by a kubelet with ten containers"


def test_a_word_of_an_older_trainer_that_was_cut_keeps_its_cause():
    text = '{"cause":"InvalidData","message":"rows.jsonl:7: the field \\"instruct'
    assert judged(pod(**ended(64, message=text))).cause is Cause.INVALID_DATA
    assert judged(pod(**ended(64, message=text))).message == 'rows.jsonl:7: the field "instruct'


def test_a_wrong_clock_is_told_with_its_node_which_is_kept_out() -> None:
    said = judged(pod(node="node-7", **ended(1, message=word(Cause.CLOCK_SKEW, "16 minutes behind."))))
    assert (said.retry, said.node_suspect) == (Retry.COUNTED, True)
    assert said.message == "16 minutes behind. It is the clock of node node-7."
