"""One pass over one job: gather facts, decide, do. The only place where the pure half meets a cluster.

Called by ``handlers.py`` (Kubernetes) and ``cli/run.py`` (this machine) with whatever key woke them; it never learns
what woke it. Keeps nothing between two passes.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.base import seconds
from finetune_api.conditions import Condition, State
from finetune_api.mistakes import Mistake, read
from finetune_api.run import Progress
from finetune_api.spec import FineTuneJobSpec, ModelSource
from finetune_api.status import FineTuneJobStatus
from finetune_operator import manifests
from finetune_operator.cluster import Cluster, ClusterError, Object, RefusedError
from finetune_operator.decide import decide, refused
from finetune_operator.facts import Decision, Facts, Inputs
from finetune_operator.observe import News, Observed, news, observe, unexplained
from finetune_operator.plan import ADAPTER, DATA, Owner, Plan, make_plan, not_a_base, waited_for, with_adapter
from finetune_operator.settings import Profile, Settings
from finetune_operator.status import condition, events, failed_pass, is_true

log = logging.getLogger(__name__)

LOG_LINES = 20


@dataclass(frozen=True)
class Result:
    """What a pass came to."""

    job: Object | None
    """The FineTuneJob with its new status; None where there is none any more."""
    requeue: float | None
    """Seconds until the next look; None: when something happens."""


def reconcile(
    cluster: Cluster,
    settings: Settings,
    namespace: str,
    name: str,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Result:
    """One pass. A :class:`ClusterError` becomes the condition Reconciled=False, and is raised on."""
    raw = cluster.finetunejob(namespace, name)
    if raw is None or "deletionTimestamp" in raw["metadata"]:
        return Result(None, None)  # owner references take the children away
    recorded = status = FineTuneJobStatus.model_validate(_known(raw.get("status") or {}))
    try:
        facts = gather(cluster, settings, raw, status, now())
        decision = decide(facts)
        try:
            _make(cluster, facts, decision)
        except RefusedError as error:
            decision = refused(facts, decision, error.reason, error.message)
        if not _record(cluster, raw, decision.status):
            return Result(None, None)
        recorded = decision.status
        for event in events(status, recorded):
            cluster.event(raw, event.kind, event.reason, event.message)
        _take_away(cluster, raw, decision)
    except ClusterError as error:
        _report(cluster, raw, recorded, error, now())
        raise
    if decision.delete_job:
        return Result(None, None)
    return Result({**raw, "status": _dump(decision.status)}, decision.requeue)


def _known(status: Object) -> Object:
    """Only fields this version knows: a newer operator may have written more."""
    fields = {f.alias or n for n, f in FineTuneJobStatus.model_fields.items()}
    return {key: value for key, value in status.items() if key in fields}


def _dump(status: FineTuneJobStatus) -> Object:
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


# --- gather ---------------------------------------------------------------------------------------------------


def gather(cluster: Cluster, settings: Settings, raw: Object, status: FineTuneJobStatus, now: datetime) -> Facts:
    """All facts of one pass."""
    metadata = raw["metadata"]
    namespace, name = metadata["namespace"], metadata["name"]
    found = read(raw)
    mistakes: tuple[Mistake, ...] = () if isinstance(found, FineTuneJobSpec) else tuple(found)
    spec = found if isinstance(found, FineTuneJobSpec) else None
    observed = observe(name, cluster.children(namespace, name), metadata["uid"])
    if not observed.jobs and not status.attempts:
        # Nothing has run: a configuration that a refused pass has left may still be corrected.
        observed = replace(observed, frozen_config=None, frozen_spec=None)
    profile, profile_problem = _profile(settings, spec)
    inputs = Inputs()
    if spec is not None and observed.frozen_config is None:
        inputs = _inputs(cluster, namespace, spec)
    plan: Plan | None = None
    if spec is not None and profile is not None and not inputs.waiting:
        given = (metadata.get("labels") or {}, metadata.get("annotations") or {})
        owner = Owner(namespace, name, metadata["uid"], *given)
        plan = make_plan(owner, spec, profile, inputs.resolved, observed.frozen_config, inputs.model)
    over = is_true(status, Condition.COMPLETE) or is_true(status, Condition.FAILED)
    return Facts(
        now=now,
        generation=metadata.get("generation"),
        spec=spec,
        mistakes=mistakes,
        profile_problem=profile_problem,
        plan=plan,
        inputs=inputs,
        status=status,
        observed=observed,
        progress=None if over else _progress(cluster, observed),
        dead_nodes=frozenset() if over else _dead_nodes(cluster, observed),
        logs={} if over else _logs(cluster, namespace, status, observed),
        news={} if over else _news(cluster, observed, now),
        poll=seconds(settings.progress_interval),
    )


def _profile(settings: Settings, spec: FineTuneJobSpec | None) -> tuple[Profile | None, str]:
    if spec is None:
        return None, ""
    profile = settings.profiles.get(spec.profile)
    if profile is not None:
        return profile, ""
    return None, Mistake(
        field="spec.profile",
        value=spec.profile,
        accepted=f"one of {', '.join(sorted(settings.profiles))}",
        remedy="choose one of them, or add it to profiles in the Helm values of the operator",
    ).text()


def _inputs(cluster: Cluster, namespace: str, spec: FineTuneJobSpec) -> Inputs:
    """Outputs of the jobs this one starts from."""
    resolved: dict[str, str] = {}
    model: ModelSource | None = None
    for uri, kinds in waited_for(spec).items():
        found = _output(cluster, namespace, uri, kinds, stacks=uri == spec.model.uri)
        if found.waiting:
            return found
        resolved |= found.resolved
        model = model or found.model
    return Inputs(resolved=resolved, model=model)


def _output(cluster: Cluster, namespace: str, uri: str, kinds: tuple[str, ...], *, stacks: bool) -> Inputs:
    """What another job wrote, of one of these kinds: a whole model, an adapter, or data. ``stacks``: an adapter with
    its base is a model, too."""
    name = uri.removeprefix("job://")
    other = cluster.finetunejob(namespace, name)
    if other is None:
        return Inputs(waiting=f"Waiting for FineTuneJob {name}, which does not exist yet.")
    status = FineTuneJobStatus.model_validate(_known(other.get("status") or {}))
    if is_true(status, Condition.FAILED):
        return Inputs(waiting=f"FineTuneJob {name} has failed; this job waits for its output.", failed=True)
    if not is_true(status, Condition.COMPLETE):
        reading = condition(status, Condition.PROGRESSING) if status.state == State.FINISHING else None
        told = f" {reading.message}" if reading else ""
        return Inputs(waiting=f"Waiting for FineTuneJob {name} ({status.state or 'Pending'}).{told}")
    written = {o.kind: o.uri for o in status.outputs}
    output = next((written[kind] for kind in kinds if kind in written), None)
    if output is not None:
        return Inputs(resolved={uri: output})
    told = f"FineTuneJob {name} "
    if not written:
        complete = condition(status, Condition.COMPLETE)
        told += f"has finished, and names no output: {complete.message if complete else ''}"
    elif kinds == DATA:
        told += (
            "wrote no rows; accepted in spec.data: an output of kind data, of a job that makes some (spec.stage: "
            "rlaif). Name its model in spec.model.uri."
        )
    elif "data" in written:
        told += "wrote rows and no model; accepted: an output of kind model, merged or adapter. Name it in spec.data."
    elif kinds == ADAPTER:
        told += (
            "wrote a whole model and no adapter; accepted in spec.model.adapters: an output of kind adapter. Name it "
            "in spec.model.uri."
        )
    elif not stacks:
        told += (
            "wrote an adapter only, not a whole model; accepted: an output of kind model or merged. Run it again with "
            "output.merge: true."
        )
    else:
        frozen = observe(name, cluster.children(namespace, name), other["metadata"]["uid"]).frozen_config
        problem = not_a_base(frozen) if frozen is not None else ""
        if "adapter" in written and frozen is not None and not problem:
            return Inputs(resolved={uri: written["adapter"]}, model=with_adapter(frozen.model, written["adapter"]))
        why = problem if frozen is not None and "adapter" in written else "its configuration is not there any more"
        told += (
            f"wrote an adapter only, and no job can start from that alone: {why}. Accepted: an output of kind model or "
            "merged; where its method can be merged, run it again with output.merge: true."
        )
    return Inputs(waiting=told, failed=True)


def _progress(cluster: Cluster, observed: Observed) -> Progress | None:
    newest = max((job.attempt for job in observed.jobs), default=0)
    rank0 = next((p for p in observed.pods_of(newest) if p.index == 0), None)
    if rank0 is None or not rank0.running:
        return None
    document = cluster.progress(rank0.raw)
    if document is None:
        return None
    try:
        progress = Progress.model_validate(document)
    except ValidationError:
        log.warning("pod %s answers something else than progress", rank0.name)
        return None
    # Pod addresses are used again: what an earlier pod still says is not about this attempt.
    return progress if progress.attempt == newest else None


def _dead_nodes(cluster: Cluster, observed: Observed) -> frozenset[str]:
    """Nodes that are gone or not ready, among those of pods that are in trouble."""
    asked = {p.node for p in observed.pods if p.node and (p.deleting or p.disruption or p.reason)}
    dead = set()
    for name in asked:
        try:
            node = cluster.node(name)
        except ClusterError:
            # Installed for some namespaces only, the operator may not read nodes: the pods tell of them.
            dead |= {pod.node for pod in observed.pods if pod.node == name and pod.node_lost}
            continue
        conditions = ((node or {}).get("status") or {}).get("conditions") or []
        if node is None or not any(c["type"] == "Ready" and c["status"] == "True" for c in conditions):
            dead.add(name)
    return frozenset(dead)


def _logs(cluster: Cluster, namespace: str, status: FineTuneJobStatus, observed: Observed) -> dict[str, list[str]]:
    """Last lines of failed pods of an attempt whose end is not recorded yet."""
    ended = {a.number for a in status.attempts if a.end_time}
    logs = {}
    for pod in observed.pods:
        if pod.failed and pod.attempt not in ended:
            logs[pod.name] = cluster.logs(namespace, pod.name, pod.failed_container, LOG_LINES)
    return logs


def _news(cluster: Cluster, observed: Observed, now: datetime) -> dict[str, News]:
    """What is told of pods that do not start."""
    newest = max((job.attempt for job in observed.jobs), default=0)
    asked = unexplained(observed.pods_of(newest), now)
    return {pod.name: told for pod in asked if (told := news(cluster.events_of(pod.raw)))}


# --- do -------------------------------------------------------------------------------------------------------


def _make(cluster: Cluster, facts: Facts, decision: Decision) -> None:
    """First of all what is to be made; then it is recorded, and at last taken away (decide.py says why so)."""
    if decision.create_attempt is not None and facts.plan is not None:
        for manifest in attempt_manifests(facts.plan, decision, facts.observed):
            cluster.apply(manifest)
    if decision.read_attempt is not None and facts.plan is not None:
        cluster.apply(manifests.reader(facts.plan, decision.read_attempt))


def _record(cluster: Cluster, raw: Object, status: FineTuneJobStatus) -> bool:
    """False: the job was deleted meanwhile, and what was decided is about nothing any more."""
    new = _dump(status)
    return new == (raw.get("status") or {}) or cluster.patch_status(raw, new)


def _take_away(cluster: Cluster, raw: Object, decision: Decision) -> None:
    namespace = raw["metadata"]["namespace"]
    for gone in decision.delete:
        cluster.delete(gone.kind, namespace, gone.name, gone.uid, force=gone.force)
    if decision.delete_job:
        cluster.delete_job(raw)
    if (change := decision.relabel) is not None:
        try:
            cluster.relabel("Job", namespace, change.name, change.uid, change.labels)
        except ClusterError as error:  # the queue's own webhook decides what may still be changed
            log.info("Job %s/%s keeps its queue and priority: %s", namespace, change.name, error.message)


def attempt_manifests(plan: Plan, decision: Decision, observed: Observed) -> list[dict[str, Any]]:
    """Everything an attempt needs, in the order of making: the Job last."""
    assert decision.create_attempt is not None
    made = [] if observed.frozen_config else [manifests.config_map(plan)]
    made.append(manifests.service(plan))
    if plan.profile.network_policy:
        made.append(manifests.network_policy(plan))
    made += manifests.pod_groups(plan)
    job = manifests.job(plan, decision.create_attempt, decision.excluded_nodes)
    made.append(manifests.telling_of(job, decision.status.attempts))
    return made


def _report(cluster: Cluster, raw: Object, status: FineTuneJobStatus, error: ClusterError, now: datetime) -> None:
    """A pass that failed is seen in the status, never only in the operator's log."""
    new = failed_pass(status, error.message, raw["metadata"].get("generation"), now)
    if new == status:
        return
    try:
        written = cluster.patch_status(raw, _dump(new))
    except ClusterError:
        log.warning("the status of %s could not be written: %s", raw["metadata"]["name"], error.message)
        return
    for event in events(status, new) if written else ():
        cluster.event(raw, event.kind, event.reason, event.message)
