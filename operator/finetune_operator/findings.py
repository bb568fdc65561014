"""How facts read as conditions, and the status that they make. Pure.

Called by ``decide.py``, which says what is done; what is told of it stands here.
"""

from datetime import timedelta

from finetune_api.conditions import Condition, Reason, State
from finetune_api.run import HTTP_PORT
from finetune_api.status import FineTuneJobStatus
from finetune_operator.facts import Facts
from finetune_operator.failures import WAITING_FOR_EVER
from finetune_operator.observe import GangJob, Leaving, Pod, format_time, parse_time
from finetune_operator.placement import fruitless
from finetune_operator.plan import changed_fields
from finetune_operator.status import Finding, at_rest, gpu_status, line, merge_conditions, seen

STALLED_AFTER = 6
"""Attempts in a row without a finished step after which a person is called: five minutes of waiting in between."""
SILENT_AFTER = timedelta(minutes=3)
"""How long a trainer may run without an answer to the operator; its imports take up to one."""
AT_WORK = ("training", "generating", "judging", "evaluating")
"""Phases in which steps are made."""
AFTER_WORK = ("saving", "exporting", "done")
"""Phases in which what was made is kept."""


def pods_finding(facts: Facts, job: GangJob | None, pods: tuple[Pod, ...]) -> Finding:
    """PodsReady of the attempt that runs, with the first thing that holds up one of its pods."""
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
        f"Pod {pods[0].name} has been running since {format_time(started)}, and the operator has never reached its "
        f"port {HTTP_PORT} (GET /progress). Most often a NetworkPolicy of its namespace or of the operator's keeps "
        "them apart, or a service mesh wants mutual TLS on that port. Where the operator cannot reach pods at all, set "
        "settings.progressThrough: apiserver in the Helm values. The training goes on meanwhile."
    )


def progress_finding(facts: Facts, status: FineTuneJobStatus, ready: bool, pods: tuple[Pod, ...]) -> Finding:
    """Progressing of the attempt that runs; ``ready``: all of its workers run."""
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


def why_stuck(stuck: Leaving) -> str:
    """Why an object that was told to go is still there, and what a person can do."""
    what = f"{stuck.kind} {stuck.name}"
    where = f" on node {stuck.node}" if stuck.node else ""
    since = f"{what}{where} was told to go at {format_time(stuck.told)} and is still there: "
    if stuck.finalizers:
        return (
            since
            + f"it is held by the finalizer {', '.join(stuck.finalizers)}. Find out why its owner does not remove it."
        )
    if stuck.kind != "Pod":
        return since + "Kubernetes' garbage collector has not taken it away yet."
    return since + (
        "its node does not confirm its end. See whether the node is well; if it is gone for good, and only then: "
        f"kubectl delete pod {stuck.name} -n {stuck.namespace} --grace-period=0 --force"
    )


def not_finished() -> tuple[Finding, ...]:
    """Complete and Failed of a job that goes on."""
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


def with_findings(facts: Facts, status: FineTuneJobStatus, state: State, *findings: Finding) -> FineTuneJobStatus:
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
