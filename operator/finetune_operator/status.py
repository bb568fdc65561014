"""Facts → the pieces of a status, written for people and for programs. Pure.

Called by ``decide.py``, which puts the pieces together, and by ``reconcile.py`` for the events a change is worth.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from finetune_api.conditions import Condition, Reason, State
from finetune_api.health import gravest, sentences
from finetune_api.run import CheckpointInfo, OutputInfo, Progress
from finetune_api.status import (
    AttemptStatus,
    CheckpointStatus,
    ConditionStatus,
    FineTuneJobStatus,
    GPUStatus,
    OutputStatus,
    ProgressStatus,
)
from finetune_operator.observe import Observed, format_time, parse_time

ATTEMPTS_KEPT = 20
MESSAGE_LIMIT = 32768
"""Characters of a condition's message, by the CRD and Kubernetes' own conditions."""


@dataclass(frozen=True)
class Finding:
    """What holds of one condition now: True, False or None for unknown."""

    type: Condition
    holds: bool | None
    reason: Reason
    message: str = ""


def healthy(unhealthy: Mapping[str, str] | None) -> list[Finding]:
    """What the trainer finds doubtful, as a condition; none where it has not judged yet."""
    if unhealthy is None:
        return []
    return [Finding(Condition.HEALTHY, not unhealthy, gravest(unhealthy), " ".join(sentences(unhealthy)))]


def merge_conditions(
    old: Iterable[ConditionStatus], findings: Iterable[Finding], generation: int | None, now: datetime
) -> list[ConditionStatus]:
    """The old conditions with the findings laid over them; the transition time changes with the status only."""
    merged = {c.type: c for c in old}
    for finding in findings:
        message = finding.message
        if len(message) > MESSAGE_LIMIT:
            message = message[: MESSAGE_LIMIT - 1] + "…"
        status = {True: "True", False: "False", None: "Unknown"}[finding.holds]
        before = merged.get(finding.type)
        since = before.last_transition_time if before and before.status == status else format_time(now)
        merged[finding.type] = ConditionStatus(
            type=finding.type,
            status=status,
            reason=finding.reason,
            message=message,
            last_transition_time=since,
            observed_generation=generation,
        )
    order = [str(c) for c in Condition]
    return sorted(merged.values(), key=lambda c: order.index(c.type) if c.type in order else len(order))


def seen(conditions: Iterable[ConditionStatus], generation: int | None) -> list[ConditionStatus]:
    """The conditions of a pass that went through. It stands for all of them, those it had nothing to say of too: for
    ``kubectl wait`` a condition of an older generation does not hold."""
    return [c.model_copy(update={"observed_generation": generation}) for c in conditions]


def condition(status: FineTuneJobStatus, kind: Condition) -> ConditionStatus | None:
    """One condition of a status."""
    return next((c for c in status.conditions if c.type == kind), None)


def is_true(status: FineTuneJobStatus, kind: Condition) -> bool:
    """Whether a condition holds."""
    found = condition(status, kind)
    return found is not None and found.status == "True"


def duration(value: float) -> str:
    """Seconds as people write them: ``45s``, ``12m30s``, ``1h12m``, ``2d3h``."""
    whole = max(0, round(value))
    days, hours, minutes, secs = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    if minutes:
        return f"{minutes}m{secs:02}s"
    return f"{secs}s"


def size(count: int) -> str:
    """Bytes as Kubernetes writes quantities: ``512``, ``18.4Mi``, ``1.2Gi``."""
    value = float(count)
    for unit in ("", "Ki", "Mi", "Gi", "Ti"):
        if value < 1024 or unit == "Ti":
            return f"{value:.1f}{unit}" if unit else str(count)
        value /= 1024
    raise AssertionError


def failed_pass(status: FineTuneJobStatus, message: str, generation: int | None, now: datetime) -> FineTuneJobStatus:
    """The status after a pass that an error ended. What is known stays; a job of which nothing is known yet is pending,
    or tools would take it for one that is done."""
    findings = [Finding(Condition.RECONCILED, False, Reason.RECONCILE_ERROR, message)]
    update: dict[str, object] = {"message": one_line(message)}
    if not status.state:
        update["state"] = str(State.PENDING)
        findings.append(Finding(Condition.READY, False, Reason.NOT_FINISHED, message))
    conditions = merge_conditions(status.conditions, findings, generation, now)
    return status.model_copy(update={**update, "conditions": conditions})


def _number(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)


def percent(step: int, max_steps: int) -> str:
    """The share of the steps, for people."""
    return f"{100 * step // max_steps} %" if max_steps else ""


def progress_status(progress: Progress, now: datetime) -> ProgressStatus:
    """The trainer's document as status. Numbers are text: a CRD's floats do not survive every client."""
    return ProgressStatus(
        phase=progress.phase,
        step=progress.step,
        max_steps=progress.max_steps,
        percent=percent(progress.step, progress.max_steps),
        epoch=_number(progress.epoch, ".2f"),
        loss=_number(progress.loss, ".4f"),
        learning_rate=_number(progress.learning_rate, ".3g"),
        grad_norm=_number(progress.grad_norm, ".4g"),
        tokens_per_second=_number(progress.tokens_per_second, ".0f"),
        mfu=_number(progress.mfu, ".3f"),
        eta=duration(progress.eta_seconds) if progress.eta_seconds is not None else "",
        last_step_time=_whole_seconds(progress.last_step_time),
        updated_time=format_time(now),
        message=progress.message,
    )


def _whole_seconds(text: str) -> str | None:
    moment = parse_time(text or None)
    return format_time(moment) if moment else None


def at_rest(progress: ProgressStatus) -> ProgressStatus:
    """Of a run that nobody works on now: what it has come to, and nothing that was true of the moment only."""
    moment = dict.fromkeys(("phase", "message", "eta", "tokens_per_second", "mfu"), "")
    return progress.model_copy(update=moment)


_WANTS_GPUS = (State.PENDING, State.QUEUED, State.STARTING, State.RUNNING, State.RESTARTING)


def gpu_status(observed: Observed, state: State, planned: tuple[int, int]) -> GPUStatus:
    """GPUs wanted and held. ``planned`` are the workers and the GPUs of each by the spec as it is now, which counts for
    what is not made yet only."""
    workers, each = planned
    job = max((j for j in observed.jobs if not j.deleting), key=lambda j: j.attempt, default=None)
    if job is not None:
        workers, each = job.workers, each if job.gpus_per_worker is None else job.gpus_per_worker
    held = sum(each if p.gpus is None else p.gpus for p in observed.pods if p.holds_its_place)
    return GPUStatus(wanted=workers * each if state in _WANTS_GPUS else 0, held=held)


LINE = 300
"""Characters of ``status.message``."""


def line(state: State, conditions: Iterable[ConditionStatus]) -> str:
    """``status.message``: what matters most of the conditions, in one line, never empty."""
    found = {c.type: c for c in conditions}

    def words(kind: Condition, *when: str) -> str:
        there = found.get(kind)
        return there.message if there is not None and there.status in when else ""

    doubt, done = words(Condition.HEALTHY, "False"), words(Condition.COMPLETE, "True")
    told = (
        (done and (doubt or done))
        or words(Condition.FAILED, "True")
        or words(Condition.STALLED, "True")
        or words(Condition.ACCEPTED, "False")
        or words(Condition.SUSPENDED, "True")
        or words(Condition.INPUTS_READY, "False")
        or words(Condition.PODS_READY, "False")
        or doubt
        or words(Condition.PROGRESSING, "True", "False", "Unknown")
        or words(Condition.PODS_READY, "True")
        or f"{state}."
    )
    return one_line(told)


def one_line(text: str) -> str:
    """The first line of a text, cut where it is long."""
    first, *more = text.splitlines()
    return f"{first[:LINE]} …" if more or len(first) > LINE else first


def checkpoint_status(info: CheckpointInfo) -> CheckpointStatus:
    """One checkpoint as status."""
    return CheckpointStatus(
        step=info.step, uri=info.uri, digest=info.digest, size=size(info.size), time=_whole_seconds(info.time)
    )


def output_status(info: OutputInfo) -> OutputStatus:
    """One output as status."""
    return OutputStatus(uri=info.uri, kind=info.kind, digest=info.digest, size=size(info.size))


@dataclass(frozen=True)
class Event:
    """A Kubernetes event: kind Normal or Warning."""

    kind: str
    reason: str
    message: str


def events(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    """What is worth telling of the change from one status to the next."""
    told = []
    before = {a.number: a for a in old.attempts}
    for attempt in new.attempts:
        was = before.get(attempt.number)
        if was is None:
            told.append(Event("Normal", "AttemptStarted", f"Attempt {attempt.number}: Job {attempt.job_name} made."))
        if attempt.end_time and (was is None or not was.end_time):
            told.append(_attempt_ended(attempt))
    if new.state != old.state:
        told += _state_events(old, new)
    told += _trouble_events(old, new)
    doubt, known = (condition(status, Condition.HEALTHY) for status in (new, old))
    if doubt and doubt.status == "False" and not (known and known.reason == doubt.reason):
        told.append(Event("Warning", doubt.reason, doubt.message))
    newest = max((c.step for c in new.checkpoints), default=0)
    if newest > max((c.step for c in old.checkpoints), default=0):
        told.append(Event("Normal", "CheckpointSaved", f"Checkpoint of step {newest} is complete."))
    return told


def _attempt_ended(attempt: AttemptStatus) -> Event:
    code = f" (exit code {attempt.exit_code})" if attempt.exit_code else ""
    kind = "Normal" if attempt.cause in ("Succeeded", "Suspended") else "Warning"
    return Event(kind, attempt.cause, f"Attempt {attempt.number} ended{code}: {attempt.message or attempt.cause}")


def _state_events(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    texts = {
        State.INVALID: (Condition.ACCEPTED, "Warning"),
        State.WAITING: (Condition.INPUTS_READY, "Normal"),
        State.QUEUED: (Condition.PODS_READY, "Normal"),
        State.SUSPENDED: (Condition.SUSPENDED, "Normal"),
        State.FINISHING: (Condition.PROGRESSING, "Normal"),
        State.SUCCEEDED: (Condition.COMPLETE, "Normal"),
        State.FAILED: (Condition.FAILED, "Warning"),
    }
    if new.state not in texts:
        return []
    kind, level = texts[State(new.state)]
    found = condition(new, kind)
    return [Event(level, str(new.state), found.message if found else "")]


_TROUBLES = {
    Condition.PODS_READY: {
        Reason.UNSCHEDULABLE, Reason.IMAGE_NOT_PULLED, Reason.CONTAINER_CONFIG_INVALID, Reason.VOLUME_NOT_MOUNTED,
        Reason.POD_NOT_STARTED, Reason.QUOTA_EXCEEDED, Reason.NAME_TAKEN, Reason.REFUSED, Reason.PODS_TERMINATING,
    },
    Condition.STALLED: {Reason.NO_PROGRESS},
    Condition.PROGRESSING: {Reason.PROGRESS_UNREACHABLE},
    Condition.RECONCILED: {Reason.RECONCILE_ERROR},
    Condition.ACCEPTED: {Reason.IMMUTABLE_FIELD_CHANGED, Reason.CHANGE_PENDING},
}  # fmt: skip
"""Reasons that are worth an event when a condition comes to have them."""


def _trouble_events(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    told = []
    for kind, reasons in _TROUBLES.items():
        found, before = condition(new, kind), condition(old, kind)
        if found is not None and found.reason in reasons and (before is None or before.reason != found.reason):
            kind_of_event = "Normal" if found.reason == Reason.CHANGE_PENDING else "Warning"
            told.append(Event(kind_of_event, found.reason, found.message))
    return told


def attempt_ended(attempt: AttemptStatus, now: datetime, **update: object) -> AttemptStatus:
    """The attempt with its end filled in."""
    return attempt.model_copy(update={"end_time": format_time(now), **update})
