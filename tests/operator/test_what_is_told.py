"""What a status and the metrics tell in every state: true of now, never of an earlier moment, and never nothing."""

from collections.abc import Callable

import pytest

from finetune_api.causes import Cause
from finetune_api.conditions import Condition, State
from finetune_api.run import Termination
from finetune_api.status import ConditionStatus
from finetune_operator.cluster import ClusterError
from finetune_operator.metrics import figures
from finetune_operator.status import line
from tests.operator.simulation import Simulation


def running(sim: Simulation) -> None:
    sim.run("tune", until="Running")


def suspended(sim: Simulation) -> None:
    running(sim)
    sim.edit("tune", suspend=True)
    sim.run("tune", until="Suspended")


def suspending(sim: Simulation) -> None:
    running(sim)
    sim.edit("tune", suspend=True)
    sim.reconcile("tune")


def starting(sim: Simulation) -> None:
    sim.run("tune", until="Starting")


def resumed(sim: Simulation) -> None:
    suspended(sim)
    sim.edit("tune", suspend=False)
    sim.reconcile("tune")


def queued(sim: Simulation) -> None:
    sim.queued = True
    sim.run("tune", until="Queued")


def queued_again(sim: Simulation) -> None:
    suspended(sim)
    sim.queued = True
    sim.edit("tune", suspend=False)
    sim.run("tune", until="Queued")


def behind_a_gate(sim: Simulation) -> None:
    sim.nodes = {}
    starting(sim)
    sim.tick()
    for worker in sim.workers.values():
        worker.raw["spec"]["schedulingGates"] = [{"name": "kueue.x-k8s.io/topology"}]
    sim.reconcile("tune")


def without_nodes(sim: Simulation) -> None:
    sim.nodes = {}
    for _ in range(5):
        sim.reconcile("tune")
        sim.tick()


def failed(sim: Simulation) -> None:
    running(sim)
    sim.exit("tune-a1-0-abcde", 64, Termination(cause=Cause.ACCESS_DENIED, message="no\nat all", exit_code=64))
    sim.run("tune")
    sim.tick()
    sim.tick()
    sim.tick()
    sim.reconcile("tune")


def restarting(sim: Simulation) -> None:
    running(sim)
    sim.exit("tune-a1-0-abcde", 137)
    sim.run("tune", until="Restarting")


def waiting(sim: Simulation) -> None:
    sim.edit("tune", model={"uri": "job://other"})
    sim.reconcile("tune")


def invalid(sim: Simulation) -> None:
    sim.edit("tune", method={"type": "lora", "target_modules": "q_proj,v_proj"})
    sim.reconcile("tune")


def refused(sim: Simulation) -> None:
    sim.fail_calls.add("apply")
    with pytest.raises(ClusterError):
        sim.reconcile("tune")


def finishing(sim: Simulation) -> None:
    running(sim)
    while not sim.children_of["Job", "tune-a1"]["status"].get("conditions"):
        sim.tick()
    sim.workers.clear()
    sim.reconcile("tune")


def succeeded(sim: Simulation) -> None:
    sim.run("tune")


STORIES: list[tuple[Callable[[Simulation], None], str, str, tuple[int, int]]] = [
    # story, state, how its message begins, GPUs wanted and held
    (starting, "Starting", "The pods are being made.", (16, 0)),
    (without_nodes, "Starting", "0 of 2 workers run. No node for tune-a1-0-abcde: 0/4 nodes fit", (16, 0)),
    (queued, "Queued", "0 of 2 workers run. The queue holds Job tune-a1 back.", (16, 0)),
    (queued_again, "Queued", "0 of 2 workers run. The queue holds Job tune-a2 back.", (16, 0)),
    (behind_a_gate, "Queued", "0 of 2 workers run. kueue.x-k8s.io/topology holds tune-a1-0-abcde back.", (16, 0)),
    (running, "Running", "All 2 workers run.", (16, 16)),
    (restarting, "Restarting", "Clearing attempt 1 (Killed).", (16, 8)),
    (suspending, "Suspending", "Clearing attempt 1 (Suspended).", (0, 16)),
    (suspended, "Suspended", "Suspended; set spec.suspend: false to continue from step ", (0, 0)),
    (resumed, "Starting", "The pods are being made.", (16, 0)),
    (waiting, "Waiting", "Waiting for FineTuneJob other, which does not exist yet.", (0, 0)),
    (invalid, "Invalid", "spec.method.target_modules: ", (0, 0)),
    (failed, "Failed", "AccessDenied: no …", (0, 0)),
    (finishing, "Finishing", "The workers have finished, and no pod can tell", (0, 0)),
    (succeeded, "Succeeded", "The run has finished after 10 steps; its output is in s3://team/tune", (0, 0)),
]


def told(story: Callable[[Simulation], None]) -> Simulation:
    sim = Simulation()
    sim.submit("tune")
    story(sim)
    return sim


@pytest.mark.parametrize(("story", "state", "message", "gpus"), STORIES)
def test_a_job_says_in_a_line_what_it_does_and_which_gpus_it_has(
    story: Callable[[Simulation], None], state: str, message: str, gpus: tuple[int, int]
) -> None:
    sim = told(story)
    status, found = sim.status("tune"), figures(sim.jobs["tune"], sim.settings)
    assert status["state"] == state
    assert status["message"].startswith(message)
    assert (status["gpus"]["wanted"], status["gpus"]["held"]) == gpus
    assert (found["gpus_wanted"], found["gpus"], found["cost_per_hour"]) == (*gpus, gpus[1] * 2.0)


@pytest.mark.parametrize(
    ("kind", "state"), [(Condition.COMPLETE, State.SUCCEEDED), (Condition.PROGRESSING, State.RUNNING)]
)
def test_a_doubtful_result_is_what_matters_most_of_a_run_that_goes_or_went_well(kind: Condition, state: State) -> None:
    def condition(kind: Condition, status: str, message: str) -> ConditionStatus:
        at = "2026-01-01T00:00:00Z"
        return ConditionStatus(type=kind, status=status, reason="Any", message=message, last_transition_time=at)

    well = condition(kind, "True", "All is well.")
    assert line(state, [well, condition(Condition.HEALTHY, "True", "")]) == "All is well."
    assert line(state, [well, condition(Condition.HEALTHY, "False", "The loss has risen.")]) == "The loss has risen."


def test_every_state_has_a_story() -> None:
    # A job is Pending before the first pass, and while an earlier one of its name is cleared away.
    assert {state for _, state, _, _ in STORIES} == set(State) - {State.PENDING}


def test_a_pass_that_is_refused_is_the_message() -> None:
    assert told(refused).status("tune")["message"] == "Could not apply: 500 the API server is ill"


@pytest.mark.parametrize("story", [restarting, suspending, suspended, failed, resumed, queued_again, finishing])
def test_what_was_true_of_the_moment_is_not_told_of_a_run_that_rests(story: Callable[[Simulation], None]) -> None:
    sim = told(story)
    progress, found = sim.status("tune")["progress"], figures(sim.jobs["tune"], sim.settings)
    assert [progress[key] for key in ("phase", "eta", "tokensPerSecond", "message")] == ["", "", "", ""]
    assert progress["step"] and progress["percent"] and progress["loss"]
    assert found["eta_seconds"] is None
    assert found["running_timestamp_seconds"] is None


def test_since_when_an_attempt_runs_is_told_anew_of_each() -> None:
    sim = told(running)
    first = figures(sim.jobs["tune"], sim.settings)["running_timestamp_seconds"]
    assert first == pytest.approx(sim.now.timestamp(), abs=2)
    sim.edit("tune", suspend=True)
    sim.run("tune", until="Suspended")
    for _ in range(3600):
        sim.tick()
    sim.edit("tune", suspend=False)
    sim.run("tune", until="Running")
    found = figures(sim.jobs["tune"], sim.settings)
    assert found["running_timestamp_seconds"] == pytest.approx(sim.now.timestamp(), abs=2)
    assert found["start_timestamp_seconds"] < first  # type: ignore[operator]  # that of the job stays


def test_gpus_are_those_of_the_pods_and_not_of_the_spec_of_today() -> None:
    sim = told(running)
    sim.edit("tune", workers={"replicas": 1, "gpusPerWorker": 2})
    sim.reconcile("tune")
    assert sim.status("tune")["gpus"] == {"wanted": 16, "held": 16}


def test_that_nodes_are_lacking_or_a_queue_holds_it_is_an_event_and_only_once() -> None:
    assert [e for e in told(queued).events if e[0] == "Queued"] == [
        ("Queued", "0 of 2 workers run. The queue holds Job tune-a1 back.")
    ]
    assert [e for e in told(without_nodes).events if e[0] == "Unschedulable"] == [
        ("Unschedulable", "0 of 2 workers run. No node for tune-a1-0-abcde: 0/4 nodes fit")
    ]
