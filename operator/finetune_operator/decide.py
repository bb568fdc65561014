"""All facts of one pass → the new status and what is to be done. Pure, and the heart of the operator.

Called by ``reconcile.py`` only. Every branch reads what is there now (spec, recorded attempts, observed children),
never which event woke the loop; so an operator that is killed anywhere and started again decides the same.

The order of doing matters and is the same everywhere: children are made before the status tells of them (a Job's
name is fixed by its attempt's number, so making it twice is making it once), and they are taken away only after the
status has recorded why.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from finetune_api.causes import Cause, Retry
from finetune_api.conditions import Condition, Reason, State
from finetune_api.run import TRAINER_CONTAINER, Progress, Termination
from finetune_api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.facts import Decision, Delete, Facts, Relabel
from finetune_operator.failures import ECHO_PATIENCE, Failure, explain_exit, judge, taken_back
from finetune_operator.findings import not_finished, pods_finding, progress_finding, why_stuck, with_findings
from finetune_operator.manifests import KUEUE_PRIORITY, job_name, queue_labels
from finetune_operator.observe import GangJob, Leaving, Observed, Pod, Reader, format_time, parse_time
from finetune_operator.placement import (
    backoff,
    fruitless,
    gives_back_at,
    no_other_node,
    partly_placed,
    suspects,
    waits_for_others,
)
from finetune_operator.status import (
    ATTEMPTS_KEPT,
    Finding,
    attempt_ended,
    checkpoint_status,
    healthy,
    is_true,
    output_status,
    percent,
    progress_status,
)

PENDING_POLL = 15.0
"""Seconds between looks at what should wake us by itself, in case an event was lost."""
SIDECAR_PATIENCE = timedelta(seconds=30)
"""So long the sidecars of a finished run have to end by themselves; then its Job is taken away, which ends them."""
STUCK_AFTER = timedelta(minutes=1)
"""How long something may be overdue to go before it is named."""
STUCK_FOR_GOOD = timedelta(minutes=5)
"""How long before a person is needed."""
READ_AGAIN = 300.0
"""Seconds from one try to read what a run wrote to the next."""
REFUSAL_POLL = 2.0
"""Seconds between looks at a Job without its pods: that they cannot be made wakes nobody."""


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
    failure = failure or _stalled(facts, status, pods) or no_other_node(facts, current, pods)
    failure = failure or partly_placed(facts, current, job, pods)
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
        message = f"{failure.cause}: {failure.message} Attempt {before.number} ended the same way{where}."
        return _fail(facts, status, Reason.NOT_RETRYABLE, message)
    # With a spec that is not accepted, nothing starts anyway; and it says no limit.
    limit = facts.spec.recovery.max_restarts if facts.spec else None
    if failure.retry is Retry.NEVER or (counted and limit is not None and status.counted_restarts >= limit):
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
    """The earlier attempt which shows that a failure comes again: an error of the trainer in the same words before a
    step was finished, on another node or after a wait; a container that another node could not start either; GPUs that
    are missing again after a try elsewhere."""
    if failure.may_pass:
        return None
    idle = fruitless(attempts)
    if failure.cause is Cause.TRAINER_ERROR and failure.says_why:
        last = next((a for a in reversed(attempts) if a.end_time), None)
        waited = len(idle) > 1  # before its third try it is waited for
        same = last in idle and last is not None and last.message == failure.message
        return last if last is not None and same and (waited or last.node != failure.node) else None
    if failure.cause not in (Cause.START_ERROR, Cause.NO_ACCELERATOR):
        return None
    alike = [a for a in idle if a.cause == failure.cause and a.node]
    again = failure.cause is Cause.NO_ACCELERATOR
    return next((a for a in alike if again or a.node != failure.node), None)


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
        with_findings(
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
    grave = reader is None or reader.job.failed or age >= READ_AGAIN
    written = _finishing(facts, status, trouble, grave)
    return Decision(written, read_attempt=make, delete=delete, requeue=wait)


def _finishing(facts: Facts, status: FineTuneJobStatus, trouble: str, grave: bool) -> FineTuneJobStatus:
    """``trouble`` keeps the result from being read; ``grave``: for longer than a moment."""
    message = "The workers have finished, and no pod can tell what they wrote: it is read from the storage."
    told = f"{message} {trouble}".strip()
    findings = [
        Finding(Condition.PODS_READY, False, Reason.NO_PODS),
        Finding(Condition.PROGRESSING, True, Reason.READING_RESULT, told),
    ]
    if trouble and grave:
        remedy = " It is tried again until it succeeds; the outputs themselves are complete."
        findings.append(Finding(Condition.STALLED, True, Reason.RESULT_NOT_READ, told + remedy))
    return with_findings(facts, status, State.FINISHING, *findings, *not_finished())


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
        with_findings(
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
        written = with_findings(facts, status, State(status.state))
        return Decision(written, delete=readers, requeue=_sooner(patience, left))
    return Decision(with_findings(facts, status, State(status.state)), delete=running + readers, requeue=left)


def _sooner(*waits: float | None) -> float | None:
    return min((wait for wait in waits if wait is not None), default=None)


def _ttl(facts: Facts, ended: datetime) -> float | None:
    ttl = facts.spec.ttl_seconds_after_finished if facts.spec else None
    return None if ttl is None else max(0.0, (ended - facts.now).total_seconds() + ttl)


# --- while an attempt runs ------------------------------------------------------------------------------------


def _running(
    facts: Facts, status: FineTuneJobStatus, current: AttemptStatus, job: GangJob | None, pods: tuple[Pod, ...]
) -> Decision:
    pods_ready = pods_finding(facts, job, pods)
    progressing = progress_finding(facts, status, bool(pods_ready.holds), pods)
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
    if due := gives_back_at(facts, current, job, pods):
        poll = min(poll, (due - facts.now).total_seconds())
    judged = healthy(facts.progress.unhealthy if facts.progress else None)
    written = with_findings(facts, status, state, pods_ready, progressing, *judged, *not_finished())
    return Decision(written, relabel=_relabelled(facts, job), requeue=poll)


def _relabelled(facts: Facts, job: GangJob | None) -> Relabel | None:
    """What was changed for Kueue since. It takes another queue until it starts a Job, and another priority as far as
    its version allows."""
    if facts.plan is None or job is None or job.deleting:
        return None
    changed = {k: v for k, v in queue_labels(facts.plan).items() if job.queue_labels.get(k) != v}
    if not job.suspended:
        changed = {k: v for k, v in changed.items() if k == KUEUE_PRIORITY}
    return Relabel(job.name, job.uid, changed) if changed else None


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
        message += f" {why_stuck(stuck)}" if stuck else ""
        findings = [
            Finding(Condition.PROGRESSING, False, Reason.RESTARTING, message),
            Finding(Condition.PODS_READY, False, Reason.PODS_TERMINATING if stuck else Reason.NO_PODS, message),
        ]
        if stuck and facts.now - stuck.due > STUCK_FOR_GOOD:
            findings.append(Finding(Condition.STALLED, True, Reason.PODS_TERMINATING, message))
        if suspended:
            findings.append(Finding(Condition.SUSPENDED, False, Reason.SUSPENDING, message))
        return Decision(with_findings(facts, status, state, *findings, *not_finished()), delete=leftovers, requeue=2.0)
    idle = (
        Finding(Condition.PODS_READY, False, Reason.NO_PODS),
        Finding(Condition.PROGRESSING, False, Reason.NOT_RUNNING),
    )
    if facts.mistakes or facts.profile_problem or facts.spec is None:
        return Decision(with_findings(facts, status, State.INVALID, *idle, *not_finished()))
    if suspended:
        message = "Suspended; set spec.suspend: false to continue" + (
            f" from step {status.checkpoints[-1].step}." if status.checkpoints else "."
        )
        found = Finding(Condition.SUSPENDED, True, Reason.SUSPEND_REQUESTED, message)
        return Decision(with_findings(facts, status, State.SUSPENDED, found, *idle, *not_finished()))
    if facts.inputs.waiting or facts.plan is None:
        return Decision(with_findings(facts, status, State.WAITING, *idle, *not_finished()), requeue=PENDING_POLL)
    gives_way = waits_for_others(facts.plan, status.attempts, facts.now)
    wait = max(gives_way, backoff(status.attempts, facts.now))
    if wait > 0:
        why = "Nodes were given back to others" if gives_way else "The last attempts finished no step"
        message = f"{why}; the next attempt starts in {wait:.0f} s."
        backing = Finding(Condition.PROGRESSING, False, Reason.BACKING_OFF, message)
        return Decision(with_findings(facts, status, State.RESTARTING, idle[0], backing, *not_finished()), requeue=wait)
    if facts.observed.strangers:
        message = (
            f"Pod {', '.join(facts.observed.strangers)}: labelled as a worker of this job, and not made for it. It "
            "would be taken for one. Delete it, or take its label finetune.dev/job away."
        )
        return _not_started(facts, status, Reason.NAME_TAKEN, message)
    return _start(facts, status)


TRY_AGAIN: Mapping[Reason, float | None] = {
    Reason.NO_PODS: 2.0,  # something of an earlier job that is just going
    Reason.NAME_TAKEN: PENDING_POLL,
    Reason.QUOTA_EXCEEDED: PENDING_POLL,
    Reason.REFUSED: 60.0,
    Reason.INVALID_SPEC: None,  # until the spec changes; the resync looks whether the API server has come to know more
}
"""Seconds until what was refused for a reason is tried again: nothing wakes the job when it would be accepted."""


def refused(facts: Facts, decision: Decision, reason: Reason, message: str) -> Decision:
    """What a decision leads to where the cluster does not accept what it was to make."""
    if decision.read_attempt is not None:
        return Decision(_finishing(facts, decision.status, message, grave=True), requeue=READ_AGAIN)
    return _not_started(facts, decision.without_attempt or facts.status, reason, message)


def _not_started(facts: Facts, status: FineTuneJobStatus, reason: Reason, message: str) -> Decision:
    """The cluster does not accept what the next attempt needs."""
    state = State.RESTARTING if status.attempts else State.PENDING
    findings = [
        Finding(Condition.PODS_READY, False, reason, message),
        Finding(Condition.PROGRESSING, False, Reason.NOT_RUNNING),
        *not_finished(),
    ]
    if reason is Reason.INVALID_SPEC:
        state = State.INVALID
        message = f"spec.workers.template, or the template of profile {_profile(facts)}: {message}"
        findings.append(Finding(Condition.ACCEPTED, False, reason, message))
        findings[0] = Finding(Condition.PODS_READY, False, Reason.NO_PODS)
    if reason in (Reason.NAME_TAKEN, Reason.REFUSED, Reason.INVALID_SPEC):
        findings.append(Finding(Condition.STALLED, True, reason, message))
    return Decision(with_findings(facts, status, state, *findings), requeue=TRY_AGAIN[reason])


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
    """What should have gone by now, the longest overdue. A Job stays as long as its pods, which have their time to
    end."""
    leaving = facts.observed.leaving
    pods = [one for one in leaving if one.kind == "Pod"]
    overdue = [one for one in pods or leaving if facts.now - one.due > STUCK_AFTER]
    return min(overdue, key=lambda one: (one.due, one.name), default=None)


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
        with_findings(
            facts,
            started,
            State.RESTARTING if status.restarts else State.STARTING,
            Finding(Condition.PODS_READY, False, Reason.PODS_PENDING, "The pods are being made."),
            Finding(Condition.PROGRESSING, False, Reason.LOADING, "Waiting for the pods."),
            *not_finished(),
        ),
        create_attempt=number,
        without_attempt=status,
        excluded_nodes=suspects(status.attempts, facts.now),
        requeue=PENDING_POLL,
    )
