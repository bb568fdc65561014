"""All facts of one pass → the new status and what is to be done. Pure, and the heart of the operator.

Called by ``reconcile.py`` only. Every branch reads what is there now (spec, recorded attempts, observed children),
never which event woke the loop; so an operator that is killed anywhere and started again decides the same.

The order of doing matters and is the same everywhere: children are made before the status tells of them (a Job's
name is fixed by its attempt's number, so making it twice is making it once), and they are taken away only after the
status has recorded why.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Any

from finetune_api.base import seconds
from finetune_api.causes import Cause, Retry
from finetune_api.conditions import Condition, Reason, State
from finetune_api.mistakes import Mistake
from finetune_api.run import HTTP_PORT, TRAINER_CONTAINER, Progress, Termination
from finetune_api.spec import FineTuneJobSpec, ModelSource
from finetune_api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.failures import ECHO_PATIENCE, WAITING_FOR_EVER, Failure, explain_exit, judge, taken_back
from finetune_operator.manifests import KUEUE_PRIORITY, job_name, queue_labels
from finetune_operator.observe import GangJob, Leaving, News, Observed, Pod, Reader, format_time, parse_time
from finetune_operator.plan import Plan, changed_fields
from finetune_operator.status import (
    ATTEMPTS_KEPT,
    Finding,
    at_rest,
    attempt_ended,
    checkpoint_status,
    duration,
    gpu_status,
    healthy,
    is_true,
    line,
    merge_conditions,
    output_status,
    percent,
    progress_status,
    seen,
)

SUSPECT_PERIOD = timedelta(minutes=15)
"""How long a node that failed is kept out of new attempts."""
NO_OTHER_NODE_AFTER = timedelta(minutes=2)
"""How long pods may wait for a node because others are kept out; then those are allowed again."""
BACKOFF_FIRST, BACKOFF_MOST = 10.0, 300.0
"""Seconds before a restart after attempts that finished no step; doubled each time."""
GIVE_WAY_FIRST = 20.0
"""Seconds that a gang stays away after it gave its nodes back and its pods had their time to end: more than the 10 s
after which the scheduler tries the pods of others again. Doubled each time, up to the same most."""
PENDING_POLL = 15.0
"""Seconds between looks at what should wake us by itself, in case an event was lost."""
SIDECAR_PATIENCE = timedelta(seconds=30)
"""So long the sidecars of a finished run have to end by themselves; then its Job is taken away, which ends them."""
STALLED_AFTER = 6
"""Attempts in a row without a finished step after which a person is called: five minutes of waiting in between."""
STUCK_AFTER = timedelta(minutes=1)
"""How long something may be overdue to go before it is named."""
STUCK_FOR_GOOD = timedelta(minutes=5)
"""How long before a person is needed."""
SILENT_AFTER = timedelta(minutes=3)
"""How long a trainer may run without an answer to the operator; its imports take up to one."""
READ_AGAIN = 300.0
"""Seconds from one try to read what a run wrote to the next."""
REFUSAL_POLL = 2.0
"""Seconds between looks at a Job without its pods: that they cannot be made wakes nobody."""


@dataclass(frozen=True)
class Inputs:
    """The ``job://`` inputs of a job."""

    resolved: Mapping[str, str] = field(default_factory=dict)
    """URI as written → URI of the output."""
    model: ModelSource | None = None
    """Where the output named by ``model.uri`` is an adapter: the model it belongs to, with it on top."""
    waiting: str = ""
    """What is waited for, for people; empty when all is there."""
    failed: bool = False
    """The awaited job has failed."""


@dataclass(frozen=True)
class Facts:
    """Everything one pass knows."""

    now: datetime
    generation: int | None
    spec: FineTuneJobSpec | None
    mistakes: tuple[Mistake, ...]
    profile_problem: str
    """Why the profile cannot be used; empty when it can."""
    plan: Plan | None
    """None where it cannot be made (mistakes, or inputs that are not there yet)."""
    inputs: Inputs
    status: FineTuneJobStatus
    observed: Observed
    progress: Progress | None
    dead_nodes: frozenset[str]
    logs: Mapping[str, list[str]]
    """Last log lines by pod, of pods that failed."""
    news: Mapping[str, News]
    """The last thing told of a pod in its events, by pod, of some that have not started for a while."""
    poll: float
    """Seconds between two looks at a running job."""


AT_WORK = ("training", "generating", "judging", "evaluating")
"""Phases in which steps are made."""
AFTER_WORK = ("saving", "exporting", "done")
"""Phases in which what was made is kept."""


@dataclass(frozen=True)
class Delete:
    """An object to take away."""

    kind: str
    name: str
    uid: str
    force: bool = False


@dataclass(frozen=True)
class Relabel:
    """Labels to put on the Job of the current attempt."""

    name: str
    uid: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Decision:
    """What one pass leads to."""

    status: FineTuneJobStatus
    create_attempt: int | None = None
    """Make the Job of this attempt (and what it needs), before the status is written."""
    without_attempt: FineTuneJobStatus | None = None
    """The status where that is refused."""
    excluded_nodes: tuple[str, ...] = ()
    read_attempt: int | None = None
    """Make the Job that reads what this attempt wrote, before the status is written."""
    delete: tuple[Delete, ...] = ()
    """After the status is written."""
    delete_job: bool = False
    """The FineTuneJob itself is to go (TTL)."""
    relabel: Relabel | None = None
    """Last of all, so that whoever refuses it holds up nothing else."""
    requeue: float | None = None
    """Look again after this many seconds; None: when something happens."""


def decide(facts: Facts) -> Decision:
    """One pass over one job."""
    status = _with_progress(_with_adopted(facts.status, facts.observed), facts)
    if is_true(status, Condition.COMPLETE) or is_true(status, Condition.FAILED):
        return _finished(facts, status)
    current = status.attempts[-1] if status.attempts and not status.attempts[-1].end_time else None
    if current is None:
        return _between_attempts(facts, _with_parting_word(facts, status))
    job, pods = facts.observed.job(current.number), facts.observed.pods_of(current.number)
    if _succeeded(job, pods):
        return _result(facts, status, current, pods)
    failure = judge(job, pods, facts.dead_nodes, facts.now)
    # Its pods may be gone already: that they all ran in this attempt is known from the condition.
    if failure is None and job is not None and job.suspended and is_true(status, Condition.PODS_READY):
        failure = taken_back(job)
    if failure is None and facts.spec is not None and facts.spec.suspend:
        failure = Failure(Cause.SUSPENDED, "Suspended on request; a checkpoint is saved before the pods go.")
    failure = failure or _stalled(facts, status, pods) or _no_other_node(facts, current, pods)
    failure = failure or _partly_placed(facts, current, job, pods)
    if failure is not None:
        return _end_attempt(facts, status, current, failure)
    return _running(facts, status, current, job, pods)


# --- what is carried over -------------------------------------------------------------------------------------


def _with_adopted(status: FineTuneJobStatus, observed: Observed) -> FineTuneJobStatus:
    """Jobs that exist and are not recorded yet: made just before an operator died."""
    known = {a.number for a in status.attempts}
    found = [
        AttemptStatus(
            number=job.attempt, job_name=job.name, start_time=format_time(job.created) if job.created else None
        )
        for job in observed.jobs
        if job.attempt not in known
    ]
    if not found:
        return status
    attempts = sorted([*status.attempts, *found], key=lambda a: a.number)
    return status.model_copy(
        update={
            "attempts": attempts[-ATTEMPTS_KEPT:],
            "start_time": status.start_time or attempts[0].start_time,
        }
    )


def _with_progress(status: FineTuneJobStatus, facts: Facts) -> FineTuneJobStatus:
    """What the trainer says of itself, taken over."""
    progress = facts.progress
    if progress is None or not status.attempts or status.attempts[-1].number != progress.attempt:
        return status
    attempt = status.attempts[-1].model_copy(
        update={"last_step": progress.step, "resumed_from_step": progress.resumed_from_step}
    )
    checkpoints = [checkpoint_status(c) for c in progress.checkpoints] or status.checkpoints
    shown = progress_status(progress, facts.now)
    # While a new attempt loads, the last known figures stay.
    if progress.max_steps == 0 and status.progress is not None:
        shown = status.progress.model_copy(
            update={"phase": shown.phase, "message": shown.message, "updated_time": shown.updated_time, "eta": ""}
        )
    return status.model_copy(
        update={
            "attempts": [*status.attempts[:-1], attempt],
            "progress": shown,
            "checkpoints": checkpoints,
            "last_checkpoint_time": checkpoints[-1].time if checkpoints else None,
            "evaluation": {k: f"{v:.4f}" for k, v in progress.evaluation.items()} or status.evaluation,
            "trainable_parameters": progress.trainable_parameters or status.trainable_parameters,
            "total_parameters": progress.total_parameters or status.total_parameters,
        }
    )


# --- how an attempt ends --------------------------------------------------------------------------------------


def _succeeded(job: GangJob | None, pods: tuple[Pod, ...]) -> bool:
    """Every trainer has ended with 0, whatever stands beside it does; or the Job's controller says so, which keeps it
    in mind when pods are gone."""
    if job is None:
        return False
    return job.succeeded or len({pod.index for pod in pods if pod.trained}) >= job.workers


def _stalled(facts: Facts, status: FineTuneJobStatus, pods: tuple[Pod, ...]) -> Failure | None:
    """Running, but going nowhere."""
    plan, progress = facts.plan, status.progress
    if plan is None or not any(p.running for p in pods) or not all(p.running or p.trained for p in pods):
        return None
    rank0 = pods[0]
    since = max(p.running_since for p in pods if p.running_since)
    idle: float | None = None
    if facts.progress is not None:
        heartbeats = facts.progress.heartbeats
        if not facts.progress.last_step_time:
            waited = (facts.now - since).total_seconds()
            if waited > plan.start_timeout:
                return Failure(
                    Cause.START_TIMEOUT,
                    f"No step was finished in the first {waited:.0f} s (phase: {facts.progress.phase}); accepted: "
                    f"recovery.startTimeout = {plan.start_timeout:.0f} s. Raise it where loading takes longer.",
                    pod=rank0.name,
                    node=rank0.node,
                )
        last = parse_time(facts.progress.last_step_time or None)
        if heartbeats:
            idle = max(heartbeats.values())
        elif last:
            idle = (facts.now - last).total_seconds()
    elif progress is not None and (heard := parse_time(progress.updated_time)) and heard > since:
        # It spoke in this attempt and fell silent: a process stuck in a native call holds Python's lock.
        idle = (facts.now - heard).total_seconds()
    if idle is not None and idle > plan.hang_timeout:
        slowest = ""
        if facts.progress is not None and facts.progress.heartbeats:
            beats = facts.progress.heartbeats
            slowest = f" Rank {max(beats, key=lambda rank: beats[rank])} has been silent the longest."
        return Failure(
            Cause.STALLED,
            f"The workers made no progress for {idle:.0f} s (recovery.hangTimeout is {plan.hang_timeout:.0f} s)."
            + slowest,
            pod=rank0.name,
            node=rank0.node,
        )
    return None


def _no_other_node(facts: Facts, current: AttemptStatus, pods: tuple[Pod, ...]) -> Failure | None:
    started = parse_time(current.start_time)
    stuck = next((p for p in pods if p.unschedulable), None)
    if stuck is None or started is None or facts.now - started < NO_OTHER_NODE_AFTER:
        return None
    earlier = [a for a in facts.status.attempts if a.number < current.number]
    if not suspects(earlier, started):
        return None
    return Failure(
        Cause.NO_OTHER_NODE,
        f"No node but the suspected ones ({', '.join(suspects(earlier, started))}) can take the pods: "
        f"they are allowed again. The scheduler said: {stuck.unschedulable}",
    )


def _partly_placed(facts: Facts, current: AttemptStatus, job: GangJob | None, pods: tuple[Pod, ...]) -> Failure | None:
    """It holds nodes that others may wait for, as it waits for theirs."""
    due = _gives_back_at(facts, current, job, pods)
    if job is None or due is None or facts.now < due:
        return None
    since = _last_placement(facts, current, pods)
    placed = sum(1 for p in pods if p.node)
    why = f" {job.refusal}" if job.refusal else ""
    why = next((f" The scheduler said: {p.unschedulable}" for p in pods if p.unschedulable), why)
    return Failure(
        Cause.PARTLY_PLACED,
        f"Only {placed} of {job.workers} workers had a node for {duration((facts.now - since).total_seconds())}: what "
        f"they held is given back, so that others can use it, and asked for again later.{why}",
    )


def _gives_back_at(facts: Facts, current: AttemptStatus, job: GangJob | None, pods: tuple[Pod, ...]) -> datetime | None:
    """When a gang of which only some have a node gives those back; None where all have one, or nobody has. Of two gangs
    that wait for each other one is to be first, after any restart of the operator the same: so the share of the
    time that lies above ``pendingTimeout`` comes from job and attempt."""
    if facts.plan is None or job is None or job.suspended or not any(p.node for p in pods):
        return None
    if all(p.node for p in pods) and not job.refusal:
        return None
    patience = facts.plan.pending_timeout * (1 + _share_of(facts.plan, f"held/{current.number}") / 2)
    return _last_placement(facts, current, pods) + timedelta(seconds=patience)


def _last_placement(facts: Facts, current: AttemptStatus, pods: tuple[Pod, ...]) -> datetime:
    """When the placing of its pods last changed: a gang that still gets nodes is not stuck."""
    begun = parse_time(current.start_time) or facts.now
    return max((p.placement_time for p in pods if p.placement_time), default=begun)


def _share_of(plan: Plan, what: str) -> float:
    """From 0 up to 1, another one for each job and each thing, and always the same for the same ones."""
    digest = hashlib.sha256(f"{plan.owner.uid}/{what}".encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32


def suspects(attempts: list[AttemptStatus], now: datetime) -> tuple[str, ...]:
    """Nodes that failed lately and are to be kept out, unless nothing else was found since."""
    nodes: list[str] = []
    for attempt in attempts:
        ended = parse_time(attempt.end_time)
        if attempt.cause == Cause.NO_OTHER_NODE:
            nodes = []
        elif attempt.node_suspect and attempt.node and ended and now - ended < SUSPECT_PERIOD:
            nodes.append(attempt.node)
    return tuple(sorted(set(nodes)))


def _end_attempt(facts: Facts, status: FineTuneJobStatus, current: AttemptStatus, failure: Failure) -> Decision:
    counted = failure.retry is Retry.COUNTED
    log = facts.logs.get(failure.pod, [])
    if failure.cause is Cause.CONTAINER_ERROR and log:  # its log is where a container of the user's own speaks
        failure = replace(failure, message=f"{failure.message} Its log ends with: {log[-1]}")
    before = _so_before(status.attempts, failure)
    ended = attempt_ended(
        current,
        facts.now,
        cause=str(failure.cause),
        exit_code=failure.exit_code,
        message=failure.message,
        counted=counted,
        pod=failure.pod,
        node=failure.node,
        node_suspect=failure.node_suspect,
        log=log,
    )
    # In failed pods may lie a word about the last step that polling missed.
    last = _last_word(facts.observed.pods_of(current.number))
    update: dict[str, Any] = {"attempts": [*status.attempts[:-1], ended]}
    if last is not None and last.last_checkpoint is not None:
        update |= _with_checkpoint(status, last)
    status = status.model_copy(update=update)
    if before is not None:
        where = f", on node {before.node}" if before.node else ""
        message = f"{failure.cause}: {failure.message} So did attempt {before.number} end{where}."
        return _fail(facts, status, Reason.NOT_RETRYABLE, message)
    limit = facts.plan.max_restarts if facts.plan else 0
    if failure.retry is Retry.NEVER or (counted and status.counted_restarts >= limit):
        exhausted = failure.retry is not Retry.NEVER
        reason = Reason.RESTARTS_EXHAUSTED if exhausted else Reason.NOT_RETRYABLE
        message = f"{failure.cause}: {failure.message}"
        if exhausted:
            message = f"recovery.maxRestarts = {limit} is used up. Last: {message}"
        return _fail(facts, status, reason, message)
    if failure.cause not in (Cause.SUSPENDED, Cause.PARTLY_PLACED):  # nothing of these went wrong, or had begun
        status = status.model_copy(
            update={
                "restarts": status.restarts + 1,
                "counted_restarts": status.counted_restarts + (1 if counted else 0),
            }
        )
    return _between_attempts(facts, status)


def _so_before(attempts: list[AttemptStatus], failure: Failure) -> AttemptStatus | None:
    """The earlier attempt which shows that a failure comes again wherever it is tried: an error of the trainer in the
    same words, before a step was finished; a container that another node could not start either; GPUs that are missing
    again after a try elsewhere."""
    if failure.cause is Cause.TRAINER_ERROR:
        last = [a for a in attempts if a.end_time][-1:]
        return next((a for a in fruitless(attempts) if [a] == last and a.message == failure.message), None)
    if failure.cause not in (Cause.START_ERROR, Cause.NO_ACCELERATOR) or failure.may_pass:
        return None
    alike = [a for a in fruitless(attempts) if a.cause == failure.cause and a.node]
    again = failure.cause is Cause.NO_ACCELERATOR
    return next((a for a in alike if again or a.node != failure.node), None)


def fruitless(attempts: list[AttemptStatus]) -> list[AttemptStatus]:
    """The attempts that ended without a finished step since the last one that finished some, newest first. A
    suspension and a search for room say nothing."""
    found = []
    for attempt in reversed(attempts):
        if attempt.last_step > (attempt.resumed_from_step or 0):
            break
        if attempt.cause not in ("", Cause.SUSPENDED, Cause.NO_OTHER_NODE, Cause.PARTLY_PLACED):
            found.append(attempt)
    return found


def _with_parting_word(facts: Facts, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """What a worker that was told to stop has saved since: its pod is still there to tell."""
    if not status.attempts:
        return status
    ended = status.attempts[-1]
    last = _last_word(facts.observed.pods_of(ended.number))
    if last is None or last.last_checkpoint is None:
        return status
    if last.last_checkpoint.step <= max((c.step for c in status.checkpoints), default=0):
        return status
    update = _with_checkpoint(status, last)
    ended = ended.model_copy(update={"last_step": max(ended.last_step, last.step)})
    if status.progress is not None and status.progress.step < last.step:
        update["progress"] = status.progress.model_copy(
            update={"step": last.step, "percent": percent(last.step, last.max_steps or status.progress.max_steps)}
        )
    return status.model_copy(update={**update, "attempts": [*status.attempts[:-1], ended]})


def _with_checkpoint(status: FineTuneJobStatus, last: Termination) -> dict[str, Any]:
    assert last.last_checkpoint is not None
    newest = checkpoint_status(last.last_checkpoint)
    # What was deleted after the last look at its progress, its word tells by telling what is there.
    kept = [c for c in status.checkpoints if c.step < newest.step and (c.step in last.kept or not last.kept)]
    return {"checkpoints": [*kept, newest], "last_checkpoint_time": newest.time}


def _last_word(pods: tuple[Pod, ...]) -> Termination | None:
    words = [e.termination for pod in pods for e in pod.exits_of(TRAINER_CONTAINER) if e.termination]
    return next((w for w in words if w.rank == 0 and w.last_checkpoint), words[0] if words else None)


def _fail(facts: Facts, status: FineTuneJobStatus, reason: Reason, message: str) -> Decision:
    # The Job stays for its logs, unless some of its pods still run: those are stopped with it.
    return Decision(
        _written(
            facts,
            status.model_copy(update={"completion_time": format_time(facts.now)}),
            State.FAILED,
            Finding(Condition.FAILED, True, reason, message),
            Finding(Condition.COMPLETE, False, Reason.NOT_FINISHED),
            Finding(Condition.PROGRESSING, False, Reason.NOT_RUNNING),
            Finding(Condition.PODS_READY, False, Reason.NO_PODS),
            Finding(Condition.READY, False, reason, message),
            Finding(Condition.STALLED, True, reason, message),
        ),
        delete=_jobs_with_pods(facts),
        requeue=_ttl(facts, facts.now),
    )


def _jobs_with_pods(facts: Facts) -> tuple[Delete, ...]:
    """The Jobs some of whose pods have not ended, and hold their GPUs."""
    return tuple(
        Delete("Job", job.name, job.uid)
        for job in facts.observed.jobs
        if not job.deleting and not all(p.over for p in facts.observed.pods_of(job.attempt))
    )


def _result(facts: Facts, status: FineTuneJobStatus, current: AttemptStatus, pods: tuple[Pod, ...]) -> Decision:
    """The workers are done: what they wrote is told by their pods or, where these are gone, by one that reads it."""
    last = _last_word(pods)
    if not _lost(pods):
        return _succeed(facts, status, current, last)
    reader = facts.observed.reader(current.number)
    word = reader.word if reader else None
    if word is not None and word.outputs:
        return _succeed(facts, status, current, word)
    if word is not None and word.cause is Cause.DATA_NOT_FOUND:
        return _succeed(facts, status, current, last, unknown=word.message)
    return _read(facts, status, current, reader)


def _lost(pods: tuple[Pod, ...]) -> bool:
    """The word of the worker that tells what was written is gone with its pod, or the kubelet cut that part off."""
    first = next((p for p in pods if p.index == 0), None)
    if first is None:
        return True
    return any(
        not e.termination.outputs and e.termination.cut if e.termination else e.text.startswith("{")
        for e in first.exits_of(TRAINER_CONTAINER)
    )


def _read(facts: Facts, status: FineTuneJobStatus, current: AttemptStatus, reader: Reader | None) -> Decision:
    """Have it read, and again after a while where that fails: the run is not over before it is known what it wrote."""
    delete: tuple[Delete, ...] = ()
    make, wait, trouble = None, PENDING_POLL, _trouble(reader) if reader else ""
    age = (facts.now - (reader.job.created or facts.now)).total_seconds() if reader else 0.0
    if reader is None:
        make = current.number if facts.plan else None
        trouble = "" if facts.plan else "The spec is not accepted, see the condition Accepted."
    elif reader.job.deleting:
        wait = REFUSAL_POLL
    elif reader.job.succeeded or (reader.job.failed and age >= READ_AGAIN):
        delete, wait = (Delete("Job", reader.job.name, reader.job.uid),), REFUSAL_POLL
    message = "The workers have finished, and no pod can tell what they wrote: it is read from the storage."
    told = f"{message} {trouble}".strip()
    findings = [
        Finding(Condition.PODS_READY, False, Reason.NO_PODS),
        Finding(Condition.PROGRESSING, True, Reason.READING_RESULT, told),
    ]
    if trouble and (reader is None or reader.job.failed or age >= READ_AGAIN):
        remedy = " It is tried again until it succeeds; the outputs themselves are complete."
        findings.append(Finding(Condition.STALLED, True, Reason.RESULT_NOT_READ, told + remedy))
    written = _written(facts, status, State.FINISHING, *findings, *_not_finished())
    return Decision(written, read_attempt=make, delete=delete, requeue=wait)


def _trouble(reader: Reader) -> str:
    """What keeps the result from being read; empty where nothing does."""
    pod = reader.pods[-1] if reader.pods else None
    if reader.word is not None:
        return f"{reader.word.cause}: {reader.word.message}"
    if reader.job.suspended:
        return f"The queue holds Job {reader.job.name} back."
    if reader.job.refusal:
        return f"No pod can be made for it: {reader.job.refusal}"
    if pod is not None and pod.unschedulable:
        return f"No node for {pod.name}: {pod.unschedulable}"
    if pod is not None and pod.waiting:
        return f"{pod.name} waits: {pod.waiting} {pod.waiting_message}".strip()
    ended = next((e for e in pod.exits if e.code), None) if pod is not None else None
    return explain_exit(ended)[1] if ended else ""


def _readers_left(observed: Observed) -> tuple[Delete, ...]:
    return tuple(
        Delete("Job", reader.job.name, reader.job.uid) for reader in observed.readers if not reader.job.deleting
    )


def _succeed(
    facts: Facts, status: FineTuneJobStatus, current: AttemptStatus, last: Termination | None, unknown: str = ""
) -> Decision:
    """``unknown``: why it is not known what was written."""
    update: dict[str, Any] = {"completion_time": format_time(facts.now)}
    message = "The run has finished."
    step = current.last_step
    if last is not None:
        step = last.step or step
        update["outputs"] = [output_status(o) for o in last.outputs]
        if last.evaluation:
            update["evaluation"] = {k: f"{v:.4f}" for k, v in last.evaluation.items()}
        if last.last_checkpoint:
            update |= _with_checkpoint(status, last)
        shown = status.progress or progress_status(Progress(), facts.now)
        update["progress"] = shown.model_copy(
            update={
                "phase": "done",
                "step": step,
                "max_steps": last.max_steps or step,
                "percent": "100 %",
                "loss": f"{last.loss:.4f}" if last.loss is not None else shown.loss,
                "eta": "",
                "message": "",
            }
        )
        message = f"The run has finished after {step} steps; its output is in " + (
            ", ".join(o.uri for o in last.outputs) or "spec.output.uri"
        )
    if unknown:
        where = facts.plan.config.output_uri if facts.plan else "spec.output.uri"
        message = (
            f"The run has finished, but what it wrote is not known: {unknown} Look into {where}; another job starts "
            "from it by that URI, not by job://."
        )
    ended = attempt_ended(current, facts.now, cause=str(Cause.SUCCEEDED), exit_code=0, last_step=step)
    update["attempts"] = [*status.attempts[:-1], ended]
    return Decision(
        _written(
            facts,
            status.model_copy(update=update),
            State.SUCCEEDED,
            Finding(Condition.COMPLETE, True, Reason.FINISHED, message),
            Finding(Condition.FAILED, False, Reason.NOT_FAILED),
            Finding(Condition.PROGRESSING, False, Reason.FINISHED),
            Finding(Condition.PODS_READY, False, Reason.NO_PODS),
            Finding(Condition.READY, True, Reason.FINISHED, message),
            Finding(Condition.STALLED, False, Reason.FINISHED),
            *healthy(last.unhealthy if last else None),
        ),
        delete=_readers_left(facts.observed),
        requeue=_sooner(SIDECAR_PATIENCE.total_seconds() if _jobs_with_pods(facts) else None, _ttl(facts, facts.now)),
    )


def _finished(facts: Facts, status: FineTuneJobStatus) -> Decision:
    ended = parse_time(status.completion_time) or facts.now
    left = _ttl(facts, ended)
    if left is not None and left <= 0:
        return Decision(status, delete_job=True)
    running = _jobs_with_pods(facts)
    patience = 0.0 if is_true(status, Condition.FAILED) else SIDECAR_PATIENCE.total_seconds()
    patience -= (facts.now - ended).total_seconds()
    readers = _readers_left(facts.observed)
    if running and patience > 0:
        written = _written(facts, status, State(status.state))
        return Decision(written, delete=readers, requeue=_sooner(patience, left))
    return Decision(_written(facts, status, State(status.state)), delete=running + readers, requeue=left)


def _sooner(*waits: float | None) -> float | None:
    return min((wait for wait in waits if wait is not None), default=None)


def _ttl(facts: Facts, ended: datetime) -> float | None:
    ttl = facts.spec.ttl_seconds_after_finished if facts.spec else None
    return None if ttl is None else max(0.0, (ended - facts.now).total_seconds() + ttl)


# --- while an attempt runs ------------------------------------------------------------------------------------


def _running(
    facts: Facts, status: FineTuneJobStatus, current: AttemptStatus, job: GangJob | None, pods: tuple[Pod, ...]
) -> Decision:
    pods_ready = _pods_ready(facts, job, pods)
    progressing = _progressing(facts, status, bool(pods_ready.holds), pods)
    state = State.RUNNING if progressing.holds else State.STARTING
    if status.restarts and state is State.STARTING:
        state = State.RESTARTING
    if pods_ready.reason is Reason.QUEUED:
        state = State.QUEUED
    poll = facts.poll if pods_ready.holds else PENDING_POLL
    if job is not None and not (job.suspended or job.refusal) and len(pods) < job.workers:
        poll = REFUSAL_POLL
    if any(pod.phase == "Failed" for pod in pods):  # it lost its peers, and their story is awaited
        poll = ECHO_PATIENCE.total_seconds()
    if due := _gives_back_at(facts, current, job, pods):
        poll = min(poll, (due - facts.now).total_seconds())
    judged = healthy(facts.progress.unhealthy if facts.progress else None)
    written = _written(facts, status, state, pods_ready, progressing, *judged, *_not_finished())
    return Decision(written, relabel=_relabelled(facts, job), requeue=poll)


def _relabelled(facts: Facts, job: GangJob | None) -> Relabel | None:
    """What was changed for Kueue since. It takes another queue until it starts a Job, and another priority always."""
    if facts.plan is None or job is None or job.deleting:
        return None
    changed = {k: v for k, v in queue_labels(facts.plan).items() if job.queue_labels.get(k) != v}
    if not job.suspended:
        changed = {k: v for k, v in changed.items() if k == KUEUE_PRIORITY}
    return Relabel(job.name, job.uid, changed) if changed else None


def _pods_ready(facts: Facts, job: GangJob | None, pods: tuple[Pod, ...]) -> Finding:
    wanted = job.workers if job else len(pods)
    ready = sum(1 for p in pods if p.running or p.trained)
    if pods and ready >= wanted:
        message = " ".join((f"All {wanted} workers run.", *map(_sidecars_down, pods))).rstrip()
        return Finding(Condition.PODS_READY, True, Reason.PODS_RUNNING, message)
    count = f"{ready} of {wanted} workers run."
    if job is not None and job.suspended:
        return Finding(Condition.PODS_READY, False, Reason.QUEUED, f"{count} The queue holds Job {job.name} back.")
    for pod in pods:
        if pod.gates:
            message = f"{count} {', '.join(pod.gates)} holds {pod.name} back."
            return Finding(Condition.PODS_READY, False, Reason.QUEUED, message)
    if job is not None and job.refusal:
        reason = Reason.QUOTA_EXCEEDED if "exceeded quota" in job.refusal else Reason.PODS_PENDING
        return Finding(Condition.PODS_READY, False, reason, f"{count} No further pod can be made: {job.refusal}")
    for pod in pods:
        if pod.unschedulable:
            message = f"{count} No node for {pod.name}: {pod.unschedulable}"
            if (news := facts.news.get(pod.name)) and news.trouble:  # of its resource claims
                message += f" {news.reason}: {news.message}"
            return Finding(Condition.PODS_READY, False, Reason.UNSCHEDULABLE, message)
    for pod in pods:
        if pod.waiting in WAITING_FOR_EVER and not pod.running_since:
            reason, what = WAITING_FOR_EVER[pod.waiting]
            message = f"{count} {pod.name}, container {pod.waiting_container}: {what} {pod.waiting_message}".strip()
            return Finding(Condition.PODS_READY, False, reason, message)
    for name, news in facts.news.items():
        if news.trouble:
            reason = _REASONS.get(news.reason, Reason.POD_NOT_STARTED)
            return Finding(Condition.PODS_READY, False, reason, f"{count} {name}: {news.reason}: {news.message}")
    if not pods:
        return Finding(Condition.PODS_READY, False, Reason.NO_PODS, "The pods are not made yet.")
    doing = [f"{pod.name} is in its init container {pod.preparing}." for pod in pods if pod.preparing]
    doing += [f"{name}: {news.message}" for name, news in facts.news.items()]
    return Finding(Condition.PODS_READY, False, Reason.PODS_PENDING, " ".join([count, *doing[:1]]))


_REASONS = dict.fromkeys(("FailedMount", "FailedAttachVolume", "FailedMapVolume"), Reason.VOLUME_NOT_MOUNTED)
"""Reasons of a pod's events → reason of PodsReady; any other: POD_NOT_STARTED."""


def _sidecars_down(pod: Pod) -> str:
    failed = [e for e in pod.sidecars if e.code != 0]
    return " ".join(f"The sidecar {e.container} of {pod.name} ended with exit code {e.code}." for e in failed)


def _silent(facts: Facts, pods: tuple[Pod, ...]) -> tuple[Reason, str]:
    """What may keep the operator from a trainer that runs longer than it loads, and has never spoken."""
    started = pods[0].running_since if pods else None
    heard = parse_time(facts.status.progress.updated_time) if facts.status.progress else None
    spoke = heard is not None and started is not None and heard > started
    if started is None or spoke or facts.now - started < SILENT_AFTER:
        return Reason.PROGRESS_UNKNOWN, "The trainer does not answer yet."
    return Reason.PROGRESS_UNREACHABLE, (
        f"Pod {pods[0].name} runs since {format_time(started)}, and the operator has never reached its port "
        f"{HTTP_PORT} (GET /progress). Most often a NetworkPolicy of its namespace or of the operator's keeps them "
        "apart, or a service mesh wants mutual TLS on that port. Where the operator cannot reach pods at all, set "
        "settings.progressThrough: apiserver in the Helm values. The training goes on meanwhile."
    )


def _progressing(facts: Facts, status: FineTuneJobStatus, ready: bool, pods: tuple[Pod, ...]) -> Finding:
    if not ready:
        return Finding(Condition.PROGRESSING, False, Reason.LOADING, "Waiting for the pods.")
    progress = facts.progress
    if progress is None:
        # In an attempt that has told of no step yet, the phase is one of an earlier attempt.
        last = status.progress if status.attempts[-1].last_step else None
        known = last is not None and last.phase in (*AT_WORK, *AFTER_WORK)
        return Finding(Condition.PROGRESSING, True if known else None, *_silent(facts, pods))
    if progress.phase in AT_WORK:
        return Finding(Condition.PROGRESSING, True, Reason.TRAINING, progress.message)
    if progress.phase in AFTER_WORK:
        return Finding(Condition.PROGRESSING, True, Reason.SAVING, progress.message)
    return Finding(Condition.PROGRESSING, False, Reason.LOADING, progress.message)


# --- between two attempts -------------------------------------------------------------------------------------


def _between_attempts(facts: Facts, status: FineTuneJobStatus) -> Decision:
    """No attempt runs: clear what is left, then wait for what is missing, then make the next one."""
    leftovers = _leftovers(facts)
    clearing = bool(facts.observed.jobs or facts.observed.pods or facts.observed.earlier)
    suspended = facts.spec is not None and facts.spec.suspend
    if clearing:
        state = State.SUSPENDING if suspended else (State.RESTARTING if status.attempts else State.PENDING)
        last = status.attempts[-1] if status.attempts else None
        message = "Clearing what is left of an earlier job of this name."
        if last is not None:
            message = f"Clearing attempt {last.number} ({last.cause})."
        stuck = _stuck(facts)
        message += f" {_why_stuck(stuck)}" if stuck else ""
        findings = [
            Finding(Condition.PROGRESSING, False, Reason.RESTARTING, message),
            Finding(Condition.PODS_READY, False, Reason.PODS_TERMINATING if stuck else Reason.NO_PODS, message),
        ]
        if stuck and facts.now - stuck.due > STUCK_FOR_GOOD:
            findings.append(Finding(Condition.STALLED, True, Reason.PODS_TERMINATING, message))
        if suspended:
            findings.append(Finding(Condition.SUSPENDED, False, Reason.SUSPENDING, message))
        return Decision(_written(facts, status, state, *findings, *_not_finished()), delete=leftovers, requeue=2.0)
    idle = (
        Finding(Condition.PODS_READY, False, Reason.NO_PODS),
        Finding(Condition.PROGRESSING, False, Reason.NOT_RUNNING),
    )
    if facts.mistakes or facts.profile_problem or facts.spec is None:
        return Decision(_written(facts, status, State.INVALID, *idle, *_not_finished()))
    if suspended:
        message = "Suspended; set spec.suspend: false to continue" + (
            f" from step {status.checkpoints[-1].step}." if status.checkpoints else "."
        )
        found = Finding(Condition.SUSPENDED, True, Reason.SUSPEND_REQUESTED, message)
        return Decision(_written(facts, status, State.SUSPENDED, found, *idle, *_not_finished()))
    if facts.inputs.waiting or facts.plan is None:
        return Decision(_written(facts, status, State.WAITING, *idle, *_not_finished()), requeue=PENDING_POLL)
    gives_way = _gives_way(facts.plan, status.attempts, facts.now)
    wait = max(gives_way, _backoff(status.attempts, facts.now))
    if wait > 0:
        why = "Nodes were given back to others" if gives_way else "The last attempts finished no step"
        message = f"{why}; the next attempt starts in {wait:.0f} s."
        backing = Finding(Condition.PROGRESSING, False, Reason.BACKING_OFF, message)
        return Decision(_written(facts, status, State.RESTARTING, idle[0], backing, *_not_finished()), requeue=wait)
    if facts.observed.strangers:
        message = (
            f"Pod {', '.join(facts.observed.strangers)}: labelled as a worker of this job, and not made for it. It "
            "would be taken for one. Delete it, or take its label finetune.dev/job away."
        )
        return refused(facts, status, Reason.NAME_TAKEN, message)
    return _start(facts, status)


TRY_AGAIN: Mapping[Reason, float | None] = {
    Reason.NO_PODS: 2.0,  # something of an earlier job that is just going
    Reason.NAME_TAKEN: PENDING_POLL,
    Reason.QUOTA_EXCEEDED: PENDING_POLL,
    Reason.REFUSED: 60.0,
    Reason.INVALID_SPEC: None,  # until the spec changes; the resync looks whether the API server has come to know more
}
"""Seconds until what was refused for a reason is tried again: nothing wakes the job when it would be accepted."""


def refused(facts: Facts, status: FineTuneJobStatus, reason: Reason, message: str) -> Decision:
    """The cluster does not accept what the next attempt needs."""
    state = State.RESTARTING if status.attempts else State.PENDING
    findings = [
        Finding(Condition.PODS_READY, False, reason, message),
        Finding(Condition.PROGRESSING, False, Reason.NOT_RUNNING),
        *_not_finished(),
    ]
    if reason is Reason.INVALID_SPEC:
        state = State.INVALID
        message = f"spec.workers.template, or the template of profile {_profile(facts)}: {message}"
        findings.append(Finding(Condition.ACCEPTED, False, reason, message))
        findings[0] = Finding(Condition.PODS_READY, False, Reason.NO_PODS)
    if reason in (Reason.NAME_TAKEN, Reason.REFUSED, Reason.INVALID_SPEC):
        findings.append(Finding(Condition.STALLED, True, reason, message))
    return Decision(_written(facts, status, state, *findings), requeue=TRY_AGAIN[reason])


def _profile(facts: Facts) -> str:
    return facts.spec.profile if facts.spec else ""


def _leftovers(facts: Facts) -> tuple[Delete, ...]:
    """Jobs that are not being deleted yet, which takes their pods along; pods whose node never confirms their end."""
    gone = [Delete("Job", job.name, job.uid) for job in facts.observed.jobs if not job.deleting]
    for pod in facts.observed.pods:
        overdue = pod.deletion_time is not None and facts.now > pod.deletion_time
        if overdue and pod.node in facts.dead_nodes:
            gone.append(Delete("Pod", pod.name, pod.uid, force=True))
    return tuple(gone)


def _stuck(facts: Facts) -> Leaving | None:
    """What should have gone by now, the longest overdue."""
    overdue = [one for one in facts.observed.leaving if facts.now - one.due > STUCK_AFTER]
    return min(overdue, key=lambda one: (one.kind != "Pod", one.due, one.name), default=None)


def _why_stuck(stuck: Leaving) -> str:
    what = f"{stuck.kind} {stuck.name}"
    where = f" on node {stuck.node}" if stuck.node else ""
    since = f"{what}{where} was told to go at {format_time(stuck.told)} and is still there: "
    if stuck.finalizers:
        return (
            since + f"it is held by the finalizer {', '.join(stuck.finalizers)}. Find out why who set it lets it stay."
        )
    if stuck.kind != "Pod":
        return since + "Kubernetes' garbage collector has not taken it away yet."
    return since + (
        "its node does not confirm its end. See whether the node is well; if it is gone for good, and only then: "
        f"kubectl delete pod {stuck.name} -n {stuck.namespace} --grace-period=0 --force"
    )


def _backoff(attempts: list[AttemptStatus], now: datetime) -> float:
    """Seconds to wait: none after an attempt that finished a step, else 10, 20, 40 … 300 from its end."""
    idle = len(fruitless(attempts))
    ended = parse_time(attempts[-1].end_time) if attempts else None
    # The first failure without a step may be bad luck: at once again.
    if idle < 2 or ended is None or attempts[-1].cause == Cause.SUSPENDED:
        return 0.0
    wait = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** (idle - 2))
    return max(0.0, wait - (now - ended).total_seconds())


def _gives_way(plan: Plan, attempts: list[AttemptStatus], now: datetime) -> float:
    """Seconds to wait after nodes were given back, so that others come first: longer each time, and not equally long
    for two jobs."""
    times = len(list(takewhile(lambda a: a.cause == Cause.PARTLY_PLACED, reversed(attempts))))
    ended = parse_time(attempts[-1].end_time) if times else None
    if ended is None:
        return 0.0
    wait = min(BACKOFF_MOST, GIVE_WAY_FIRST * 2 ** (times - 1))
    wait *= 1 + _share_of(plan, f"away/{attempts[-1].number}")  # apart from the other share: no two ties in a row
    wait += seconds(plan.profile.termination_grace_period)
    return max(0.0, wait - (now - ended).total_seconds())


def _start(facts: Facts, status: FineTuneJobStatus) -> Decision:
    assert facts.plan is not None
    number = status.attempts[-1].number + 1 if status.attempts else 1
    attempt = AttemptStatus(
        number=number,
        job_name=job_name(facts.plan.owner.name, number),
        start_time=format_time(facts.now),
    )
    started = status.model_copy(
        update={
            "attempts": [*status.attempts, attempt][-ATTEMPTS_KEPT:],
            "start_time": status.start_time or format_time(facts.now),
            "plan_digest": status.plan_digest or facts.plan.digest,
        }
    )
    return Decision(
        _written(
            facts,
            started,
            State.RESTARTING if status.restarts else State.STARTING,
            Finding(Condition.PODS_READY, False, Reason.PODS_PENDING, "The pods are being made."),
            Finding(Condition.PROGRESSING, False, Reason.LOADING, "Waiting for the pods."),
            *_not_finished(),
        ),
        create_attempt=number,
        without_attempt=status,
        excluded_nodes=suspects(status.attempts, facts.now),
        requeue=PENDING_POLL,
    )


# --- writing it down ------------------------------------------------------------------------------------------


def _not_finished() -> tuple[Finding, ...]:
    return (
        Finding(Condition.COMPLETE, False, Reason.NOT_FINISHED),
        Finding(Condition.FAILED, False, Reason.NOT_FAILED),
    )


def _accepted(facts: Facts) -> Finding:
    if facts.mistakes:
        message = "\n".join(m.text() for m in facts.mistakes)
        return Finding(Condition.ACCEPTED, False, Reason.INVALID_SPEC, message)
    if facts.profile_problem:
        return Finding(Condition.ACCEPTED, False, Reason.UNKNOWN_PROFILE, facts.profile_problem)
    if facts.plan is not None and facts.observed.frozen_spec is not None:
        changes = changed_fields(facts.observed.frozen_spec, facts.plan.spec_part)
        if changes:
            message = (
                f"{'; '.join(changes)}: not accepted after the job has started; the run goes on with the old "
                "values. Put them back, or make a new FineTuneJob."
            )
            return Finding(Condition.ACCEPTED, False, Reason.IMMUTABLE_FIELD_CHANGED, message)
    if pending := _pending_changes(facts):
        message = (
            f"{'; '.join(pending)}: taken over by the next attempt; the one that runs goes on as it was made. To have "
            "it now, suspend the job (spec.suspend: true) and let it go on."
        )
        return Finding(Condition.ACCEPTED, True, Reason.CHANGE_PENDING, message)
    return Finding(Condition.ACCEPTED, True, Reason.VALID)


def _pending_changes(facts: Facts) -> list[str]:
    """What of the spec has changed since the Job that runs was made of it."""
    attempt = facts.status.attempts[-1] if facts.status.attempts else None
    job = facts.observed.job(attempt.number) if attempt is not None and not attempt.end_time else None
    if job is None or job.deleting or job.made_from is None or facts.plan is None:
        return []
    return [
        change.partition(":")[0] if change.startswith("spec.workers.template") else change
        for change in changed_fields(job.made_from, facts.plan.steering)
    ]


def _stalled_condition(facts: Facts, status: FineTuneJobStatus, state: State, accepted: Finding) -> Finding:
    """Whether a job that has not ended waits for a person."""
    if state is State.INVALID:
        return Finding(Condition.STALLED, True, accepted.reason, accepted.message)
    if state is State.WAITING and facts.inputs.failed:
        return Finding(Condition.STALLED, True, Reason.INPUT_JOB_FAILED, facts.inputs.waiting)
    idle = fruitless(status.attempts)
    if len(idle) >= STALLED_AFTER and state not in (State.SUSPENDING, State.SUSPENDED):
        message = (
            f"The last {len(idle)} attempts ended before they had finished a step; it is tried again all the same. "
            f"The newest: {idle[0].cause}: {idle[0].message}"
        )
        return Finding(Condition.STALLED, True, Reason.NO_PROGRESS, message)
    return Finding(Condition.STALLED, False, Reason.NOT_FAILED)


def _written(facts: Facts, status: FineTuneJobStatus, state: State, *findings: Finding) -> FineTuneJobStatus:
    """The status with state and conditions; what every pass finds comes first, so that ``findings`` win."""
    finished = state in (State.SUCCEEDED, State.FAILED)
    common: list[Finding] = [_accepted(facts), Finding(Condition.RECONCILED, True, Reason.RECONCILED)]
    if facts.inputs.waiting:
        reason = Reason.INPUT_JOB_FAILED if facts.inputs.failed else Reason.WAITING_FOR_JOB
        common.append(Finding(Condition.INPUTS_READY, False, reason, facts.inputs.waiting))
    else:
        reason = Reason.INPUTS_FOUND if facts.inputs.resolved else Reason.NO_INPUTS
        common.append(Finding(Condition.INPUTS_READY, True, reason))
    if not finished:
        common.append(Finding(Condition.SUSPENDED, False, Reason.NOT_SUSPENDED))
        common.append(Finding(Condition.READY, False, Reason.NOT_FINISHED, f"State: {state}."))
        common.append(_stalled_condition(facts, status, state, common[0]))
    conditions = merge_conditions(status.conditions, [*common, *findings], facts.generation, facts.now)
    planned = (facts.plan.workers, facts.plan.gpus_per_worker) if facts.plan else (0, 0)
    progress = status.progress
    loading = facts.progress is not None and bool(status.attempts) and not status.attempts[-1].end_time
    if progress is not None and not loading and state not in (State.RUNNING, State.SUCCEEDED):
        progress = at_rest(progress)
    return status.model_copy(
        update={
            "observed_generation": facts.generation,
            "state": str(state),
            "message": line(state, conditions),
            "progress": progress,
            "gpus": gpu_status(facts.observed, state, planned),
            "conditions": seen(conditions, facts.generation),
        }
    )
