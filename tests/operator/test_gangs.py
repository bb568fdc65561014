"""Gangs that share too few nodes: who waits, who gives way, and that all of them finish. Seconds, in memory."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any

import pytest

from finetune_operator import manifests
from finetune_operator.observe import parse_time
from tests.operator.simulation import GOOD_SPEC, Simulation

SPEC = {**GOOD_SPEC, "recovery": {"pendingTimeout": "1m"}}


def two_gangs(uids: tuple[str, str], nodes: int = 2) -> Simulation:
    """Two jobs of two workers each, on nodes that take one worker each; the first workers of both come first."""
    sim = Simulation(room=1, nodes={f"node-{i}": True for i in range(nodes)})
    for name, uid in zip(("a", "b"), uids, strict=True):
        sim.submit(name, SPEC, uid=uid)
    return sim


def live(sim: Simulation, ticks: int, *, until: str = "") -> dict[str, str]:
    """Passes over both jobs and seconds, until they are over or one of them has the state ``until``; their states."""
    for _ in range(ticks):
        states = {}
        for name in sim.jobs:
            sim.reconcile(name)
            states[name] = sim.status(name)["state"]
        if set(states.values()) <= {"Succeeded", "Failed"} or until in states.values():
            break
        sim.tick()
    return states


def causes(sim: Simulation, name: str) -> list[str]:
    return [attempt["cause"] for attempt in sim.status(name)["attempts"]]


@pytest.mark.parametrize("uids", [("a", "b"), ("3f0c", "77e1"), ("36", "68")])
def test_of_two_gangs_that_hold_half_of_the_nodes_each_one_gives_way(uids: tuple[str, str]) -> None:
    sim = two_gangs(uids)
    sim.reconcile("a"), sim.reconcile("b"), sim.tick(), sim.tick()
    assert {w.raw["spec"].get("nodeName") for w in sim.workers.values()} == {"node-0", "node-1", None}
    assert live(sim, 1500) == {"a": "Succeeded", "b": "Succeeded"}
    if uids == ("36", "68"):  # these lose patience at the same moment, and then stay away for unequal times
        assert [causes(sim, name)[0] for name in sim.jobs] == ["PartlyPlaced", "PartlyPlaced"]
    gave_way = {name: causes(sim, name).count("PartlyPlaced") for name in sim.jobs}
    assert 1 <= sum(gave_way.values()) <= 4
    status = sim.status(max(gave_way, key=lambda name: gave_way[name]))
    first = status["attempts"][0]
    assert first["message"].startswith("Only 1 of 2 workers had a node for 1m")
    assert first["message"].endswith("asked for again later. The scheduler said: 0/4 nodes fit")
    assert (first["counted"], status.get("restarts", 0), status.get("countedRestarts", 0)) == (False, 0, 0)
    assert ("PartlyPlaced", f"Attempt 1 ended: {first['message']}") in sim.events


def test_one_gives_way_while_the_other_is_let_through() -> None:
    sim = two_gangs(("a", "b"))
    states = live(sim, 200, until="Restarting")
    yielding, other = sorted(states, key=lambda name: states[name] != "Restarting")
    while sim.pods() and sim.status(other)["state"] != "Running":
        sim.reconcile(yielding), sim.reconcile(other), sim.tick()
    assert sim.reason(yielding, "Progressing") == ("False", "BackingOff")
    assert sim.message(yielding, "Progressing").startswith("Nodes were given back to others; the next attempt starts")
    assert "endTime" not in sim.status(other)["attempts"][0]


def test_a_gang_without_any_node_waits_and_is_left_alone() -> None:
    sim = two_gangs(("a", "b"))
    sim.steps = 10_000
    sim.run("a", until="Running")
    for _ in range(300):
        sim.reconcile("b")
        sim.tick()
    assert sim.reason("b", "PodsReady") == ("False", "Unschedulable")
    assert len(sim.status("b")["attempts"]) == 1


def test_a_gang_that_still_gets_nodes_is_not_stuck() -> None:
    sim = Simulation(room=1, nodes={"node-0": True})
    sim.submit("tune", {**SPEC, "workers": {"replicas": 4}})
    for number in range(1, 4):
        for _ in range(50):
            sim.reconcile("tune")
            sim.tick()
        sim.nodes[f"node-{number}"] = True
    assert sim.run("tune")["state"] == "Succeeded"
    assert causes(sim, "tune") == ["Succeeded"]


def test_waits_grow_where_there_is_never_room() -> None:
    sim = Simulation(room=1, nodes={"node-0": True})
    sim.submit("tune", SPEC)
    live(sim, 1500)
    attempts = sim.status("tune")["attempts"]
    starts = [parse_time(a["startTime"]) for a in attempts]
    ends = [parse_time(a["endTime"]) for a in attempts[:-1]]
    held = [(end - start).total_seconds() for start, end in zip(starts, ends, strict=False) if start and end]
    free = [(start - end).total_seconds() for start, end in zip(starts[1:], ends, strict=False) if start and end]
    assert set(causes(sim, "tune")[:-1]) == {"PartlyPlaced"}
    assert all(60 <= seconds <= 95 for seconds in held)
    assert len(set(held)) > 1
    assert all(before < after for before, after in itertools.pairwise(free))
    assert free[0] >= 60 + 20  # its pods' time to end, and the scheduler's for the pods of others


def test_half_a_gang_that_a_quota_lets_through_is_given_back() -> None:
    sim = Simulation()
    sim.submit("tune", SPEC)
    sim.reconcile("tune")
    job = sim.children_of["Job", "tune-a1"]
    job["metadata"]["uid"] = "job"
    refused = 'Error creating: pods "tune-a1-1-x" is forbidden: exceeded quota: gpus'
    event: dict[str, Any] = {"kind": "Event", "involvedObject": {"uid": "job"}, "message": refused}
    event["metadata"] = {"name": "e", "uid": "e", "labels": {manifests.LABEL_JOB: "tune"}}
    sim.children_of["Event", "e"] = event
    sim.tick()
    del sim.workers["tune-a1-1-abcde"]
    live(sim, 100, until="Restarting")
    assert causes(sim, "tune") == ["PartlyPlaced"]
    assert sim.status("tune")["attempts"][0]["message"].endswith("again later. exceeded quota: gpus")


def test_a_worker_that_is_gone_after_its_end_is_not_one_without_a_node() -> None:
    sim = Simulation(steps=10_000)
    sim.submit("tune", SPEC)
    sim.run("tune", until="Running")
    sim.exit("tune-a1-1-abcde", 0)
    sim.tick()
    del sim.workers["tune-a1-1-abcde"]
    sim.now += timedelta(minutes=5)
    sim.reconcile("tune")
    assert "endTime" not in sim.status("tune")["attempts"][0]


QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"


def test_what_is_said_to_a_queue_later_reaches_it_too() -> None:
    sim = Simulation()
    sim.submit("tune", SPEC, labels={QUEUE: "slow"})
    sim.reconcile("tune")
    job = sim.children_of["Job", "tune-a1"]
    job["spec"]["suspend"] = True
    job["metadata"]["labels"]["kueue.x-k8s.io/of-its-own"] = "kept"

    def told(**changes: str) -> dict[str, str]:
        sim.jobs["tune"]["metadata"]["labels"].update(changes)
        sim.reconcile("tune")
        labels: dict[str, str] = job["metadata"]["labels"]
        return {key: labels.get(key, "") for key in (QUEUE, PRIORITY, "kueue.x-k8s.io/of-its-own")}

    assert list(told(**{QUEUE: "fast", PRIORITY: "low"}).values()) == ["fast", "low", "kept"]
    job["spec"]["suspend"] = False
    sim.run("tune", until="Running")
    # Kueue refuses another queue for a Job that it has started.
    assert list(told(**{QUEUE: "slow", PRIORITY: "high"}).values()) == ["fast", "high", "kept"]
    assert sim.status("tune")["state"] == "Running"
