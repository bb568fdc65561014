"""Where a gang may run, and when it tries again: nodes to keep out, nodes to give back, time to wait. Pure.

Called by ``decide.py``.
"""

import hashlib
from datetime import datetime, timedelta
from itertools import takewhile

from finetune_api.base import seconds
from finetune_api.causes import Cause
from finetune_api.status import AttemptStatus
from finetune_operator.facts import Facts
from finetune_operator.failures import Failure
from finetune_operator.observe import GangJob, Pod, parse_time
from finetune_operator.plan import Plan
from finetune_operator.status import duration

SUSPECT_PERIOD = timedelta(minutes=15)
"""How long a node that failed is kept out of new attempts."""
NO_OTHER_NODE_AFTER = timedelta(minutes=2)
"""How long pods may wait for a node because others are kept out; then those are allowed again."""
BACKOFF_FIRST, BACKOFF_MOST = 10.0, 300.0
"""Seconds before a restart after attempts that finished no step; doubled each time."""
GIVE_WAY_FIRST = 20.0
"""Seconds that a gang stays away after it gave its nodes back and its pods had their time to end: more than the 10 s
after which the scheduler tries the pods of others again. Doubled each time, up to the same most."""


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


def no_other_node(facts: Facts, current: AttemptStatus, pods: tuple[Pod, ...]) -> Failure | None:
    """Its pods find no node because suspected ones are kept out."""
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


def partly_placed(facts: Facts, current: AttemptStatus, job: GangJob | None, pods: tuple[Pod, ...]) -> Failure | None:
    """It holds nodes that others may wait for, as it waits for theirs."""
    due = gives_back_at(facts, current, job, pods)
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


def gives_back_at(facts: Facts, current: AttemptStatus, job: GangJob | None, pods: tuple[Pod, ...]) -> datetime | None:
    """When a gang of which only some have a node gives those back; None where all have one, or nobody has. Of two gangs
    that wait for each other one is to be first, after any restart of the operator the same: so the share of the
    time that lies above ``pendingTimeout`` comes from job and attempt."""
    if facts.plan is None or job is None or job.suspended or not any(p.node for p in pods):
        return None
    if any(p.trained for p in pods):  # all of them had a node, and some are done
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


def backoff(attempts: list[AttemptStatus], now: datetime) -> float:
    """Seconds to wait: none after an attempt that finished a step, else 10, 20, 40 … 300 from its end."""
    idle = len(fruitless(attempts))
    ended = parse_time(attempts[-1].end_time) if attempts else None
    # The first failure without a step may be bad luck: at once again.
    if idle < 2 or ended is None or attempts[-1].cause == Cause.SUSPENDED:
        return 0.0
    wait = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** (idle - 2))
    return max(0.0, wait - (now - ended).total_seconds())


def waits_for_others(plan: Plan, attempts: list[AttemptStatus], now: datetime) -> float:
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
