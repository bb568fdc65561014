"""Lives of a job, whole: what the operator makes of everything that can happen to a gang. Seconds, in memory."""

import copy
import itertools
import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.causes import Cause
from finetune_api.conditions import Reason
from finetune_api.run import OutputInfo, Termination
from finetune_operator.cluster import ClusterError
from finetune_operator.observe import format_time
from finetune_operator.reconcile import reconcile
from tests.operator.simulation import GOOD_SPEC, OperatorKilled, Simulation, _index


@pytest.fixture
def sim() -> Simulation:
    simulation = Simulation()
    simulation.submit("tune")
    return simulation


def test_a_job_runs_and_succeeds(sim: Simulation) -> None:
    status = sim.run("tune")
    assert status["state"] == "Succeeded"
    assert sim.reason("tune", "Complete") == ("True", "Finished")
    assert sim.reason("tune", "Ready") == ("True", "Finished")
    assert status["progress"]["percent"] == "100 %"
    assert status["outputs"] == [{"uri": "s3://team/tune", "kind": "model", "digest": "sha256:1", "size": "2.0Ki"}]
    assert [a["cause"] for a in status["attempts"]] == ["Succeeded"]
    assert status["restarts"] == 0
    assert [reason for reason, _ in sim.events if reason in ("AttemptStarted", "Succeeded")] == [
        "AttemptStarted",
        "Succeeded",
        "Succeeded",
    ]


def finished_unseen(sim: Simulation, gone: str = "") -> None:
    """The run ends while no operator is there, and pods are taken away before one is: all, or those of an index."""
    sim.run("tune", until="Running")
    while not sim.children_of["Job", "tune-a1"]["status"].get("conditions"):
        sim.tick()
    for name in [pod for pod in sim.pods() if pod.startswith(f"tune-a1-{gone}")]:
        del sim.workers[name]


@pytest.mark.parametrize("gone", ["", "0"])
def test_what_a_run_wrote_is_read_from_its_storage_where_its_pods_are_gone(sim: Simulation, gone: str) -> None:
    finished_unseen(sim, gone)
    sim.reconcile("tune")
    assert sim.status("tune")["state"] == "Finishing"
    assert sim.reason("tune", "Progressing") == ("True", "ReadingResult")
    assert sim.reason("tune", "Complete") == ("False", "NotFinished")
    status = sim.run("tune")
    assert status["state"] == "Succeeded"
    assert status["outputs"] == [{"uri": "s3://team/tune", "kind": "model", "digest": "sha256:1", "size": "2.0Ki"}]
    assert status["progress"]["percent"] == "100 %"
    assert [(a["cause"], a["lastStep"]) for a in status["attempts"]] == [("Succeeded", 10)]
    for _ in range(5):
        sim.tick()
        sim.reconcile("tune")
    assert not any("word" in name for _, name in sim.children_of), "what read it is taken away"


@pytest.mark.parametrize("killed_after", range(12))
def test_an_operator_killed_while_a_result_is_read_reads_it_in_its_next_life(
    sim: Simulation, killed_after: int
) -> None:
    finished_unseen(sim)
    sim.calls_until_killed = killed_after
    for _ in range(20):
        try:
            sim.reconcile("tune")
        except OperatorKilled:
            sim.calls_until_killed = None
        sim.tick()
    assert sim.status("tune")["outputs"][0]["digest"] == "sha256:1"
    assert not any("word" in name for _, name in sim.children_of)


@pytest.mark.parametrize("length", [1, 150, 260])
def test_a_success_whose_word_was_cut_loses_no_output(sim: Simulation, length: int) -> None:
    """As a kubelet cuts it in a pod of many containers."""
    sim.run("tune", until="Running")
    while not sim.children_of["Job", "tune-a1"]["status"].get("conditions"):
        sim.tick()
    for worker in sim.workers.values():
        ended = worker.raw["status"]["containerStatuses"][0]["state"]["terminated"]
        ended["message"] = ended["message"][:length]
    assert sim.run("tune")["outputs"][0]["digest"] == "sha256:1"


def test_a_result_that_cannot_be_read_is_said_and_tried_again(sim: Simulation) -> None:
    finished_unseen(sim)
    sim.cannot_read = Termination(cause=Cause.STORAGE_UNAVAILABLE, message="No answer. Check DNS.", exit_code=1)
    sim.run("tune", ticks=30)
    assert sim.status("tune")["state"] == "Finishing"
    assert sim.reason("tune", "Stalled") == ("True", "ResultNotRead")
    assert "StorageUnavailable: No answer. Check DNS. It is tried again" in sim.message("tune", "Stalled")
    sim.submit("next", {**GOOD_SPEC, "model": {"uri": "job://tune"}})
    sim.reconcile("next")
    assert "Waiting for FineTuneJob tune (Finishing). The workers have finished" in sim.message("next", "InputsReady")
    sim.cannot_read = None
    assert sim.run("tune", ticks=400)["outputs"][0]["digest"] == "sha256:1"
    sim.reconcile("next")
    assert sim.reason("next", "InputsReady") == ("True", "InputsFound")


def test_a_run_that_left_no_word_anywhere_says_so_and_so_does_who_waits_for_it(sim: Simulation) -> None:
    finished_unseen(sim)
    sim.kept.clear()
    status = sim.run("tune")
    assert (status["state"], status.get("outputs", [])) == ("Succeeded", [])
    told = "what it wrote is not known: Gone. Look into s3://team/out; another job starts from it by that URI"
    assert told in sim.message("tune", "Complete")
    sim.submit("next", {**GOOD_SPEC, "model": {"uri": "job://tune"}})
    sim.reconcile("next")
    assert sim.reason("next", "InputsReady") == ("False", "InputJobFailed")
    assert told in sim.message("next", "InputsReady")


def test_a_finished_job_is_left_alone(sim: Simulation) -> None:
    before = sim.run("tune")
    for _ in range(5):
        sim.tick()
        assert sim.reconcile("tune").requeue is None
    assert sim.status("tune") == before


def test_an_edit_of_a_finished_job_leaves_no_condition_behind(sim: Simulation) -> None:
    sim.run("tune")
    sim.edit("tune", ttlSecondsAfterFinished=3600)
    sim.reconcile("tune")
    assert {c["observedGeneration"] for c in sim.status("tune")["conditions"]} == {2}


def test_a_pass_that_failed_makes_no_condition_newer_but_its_own(sim: Simulation) -> None:
    sim.run("tune")
    sim.edit("tune", ttlSecondsAfterFinished=3600)
    sim.fail_calls.add("list")
    with pytest.raises(ClusterError):
        sim.reconcile("tune")
    seen = {c["type"]: c["observedGeneration"] for c in sim.status("tune")["conditions"]}
    assert seen.pop("Reconciled") == 2
    assert set(seen.values()) == {1} == {sim.status("tune")["observedGeneration"]}


def test_a_crashed_worker_restarts_the_gang_from_the_checkpoint(sim: Simulation) -> None:
    while sim.step.get("tune-a1", 0) < 5:
        sim.reconcile("tune")
        sim.tick()
    sim.exit(
        "tune-a1-1-abcde", 1, Termination(cause=Cause.TRAINER_ERROR, message="ValueError: boom", exit_code=1, rank=1)
    )
    status = sim.run("tune")
    assert status["state"] == "Succeeded"
    first, second = status["attempts"]
    assert (first["cause"], first["exitCode"], first["counted"]) == ("TrainerError", 1, True)
    assert first["message"] == "ValueError: boom"
    assert first["pod"] == "tune-a1-1-abcde"
    assert first["log"] == ["last words of trainer in tune-a1-1-abcde"]
    assert second["jobName"] == "tune-a2"
    assert status["restarts"] == 1
    assert sim.most_gangs == 1


def test_a_mistake_of_the_user_is_not_tried_again(sim: Simulation) -> None:
    sim.run("tune", until="Running")
    said = "data.train[0].uri: s3://team/train.jsonl does not exist"
    sim.exit("tune-a1-0-abcde", 64, Termination(cause=Cause.DATA_NOT_FOUND, message=said, exit_code=64))
    status = sim.run("tune")
    assert status["state"] == "Failed"
    assert sim.reason("tune", "Failed") == ("True", "NotRetryable")
    assert sim.reason("tune", "Stalled")[0] == "True"
    assert said in sim.message("tune", "Failed")
    assert len(status["attempts"]) == 1


def test_an_error_that_comes_again_word_for_word_before_the_first_step_ends_the_job(sim: Simulation) -> None:
    for attempt, said in enumerate(("KeyError: 7", "KeyError: 8", "KeyError: 8"), 1):
        pod = f"tune-a{attempt}-0-abcde"
        while pod not in sim.workers or sim.workers[pod].raw["status"]["phase"] != "Running":
            sim.reconcile("tune")
            sim.tick()
        sim.exit(pod, 1, Termination(cause=Cause.TRAINER_ERROR, message=said, exit_code=1))
        sim.step[f"tune-a{attempt}"] = 0
    status = sim.run("tune")
    assert (status["state"], len(status["attempts"])) == ("Failed", 3)
    assert sim.reason("tune", "Failed") == ("True", "NotRetryable")
    assert sim.message("tune", "Failed").startswith("TrainerError: KeyError: 8 Attempt 2 ended the same way")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_error_that_comes_again_at_once_is_believed_of_another_node_only(sim: Simulation, elsewhere: bool) -> None:
    sim.edit("tune", workers={"replicas": 1})
    for attempt in (1, 2):
        pod = f"tune-a{attempt}-0-abcde"
        while pod not in sim.workers or sim.workers[pod].raw["status"]["phase"] != "Running":
            sim.reconcile("tune")
            sim.tick()
        sim.workers[pod].raw["spec"]["nodeName"] = f"node-{attempt if elsewhere else 1}"
        word = Termination(cause=Cause.TRAINER_ERROR, message="OSError: refused", exit_code=1)
        sim.exit(pod, 1, word)
        sim.step[f"tune-a{attempt}"] = 0
    assert sim.run("tune")["state"] == ("Failed" if elsewhere else "Succeeded")


def test_what_may_pass_and_what_says_nothing_is_tried_again_however_often_it_comes(sim: Simulation) -> None:
    for said in ("OSError: Too many open files", "Process 0 exited with 1 and left no message."):
        for _ in range(3):
            attempt = len(sim.status("tune").get("attempts", [])) or 1
            pod = f"tune-a{attempt}-0-abcde"
            while pod not in sim.workers or sim.workers[pod].raw["status"]["phase"] != "Running":
                sim.reconcile("tune")
                attempt = len(sim.status("tune")["attempts"])
                pod = f"tune-a{attempt}-0-abcde"
                sim.tick()
            sim.exit(pod, 1, Termination(cause=Cause.TRAINER_ERROR, message=said, exit_code=1))
            sim.step[f"tune-a{attempt}"] = 0
            sim.reconcile("tune")
    assert sim.run("tune")["state"] == "Succeeded"


def test_a_delete_that_fails_takes_back_nothing_that_was_recorded(sim: Simulation) -> None:
    sim.run("tune", until="Running")
    word = Termination(cause=Cause.OUT_OF_GPU_MEMORY, message="full", exit_code=1)
    sim.exit("tune-a1-0-abcde", 1, word)
    sim.tick()
    sim.fail_calls.add("delete")
    with pytest.raises(ClusterError):
        sim.reconcile("tune")
    sim.fail_calls.clear()
    assert sim.status("tune")["attempts"][0]["cause"] == "OutOfGPUMemory"
    assert sim.reason("tune", "Reconciled") == ("False", "ReconcileError")
    del sim.children_of["Job", "tune-a1"]  # it took effect, and the answer was lost
    sim.workers.clear()
    status = sim.run("tune")
    assert (status["state"], len(status["attempts"])) == ("Failed", 1)


def test_pods_that_take_their_time_to_end_do_not_make_their_job_overdue(sim: Simulation) -> None:
    sim.run("tune", until="Running")
    sim.edit("tune", suspend=True)
    sim.reconcile("tune")
    job = sim.children_of["Job", "tune-a1"]
    job["metadata"]["deletionTimestamp"] = format_time(sim.now)
    for worker in sim.workers.values():  # a grace period of ten minutes
        worker.raw["metadata"]["deletionTimestamp"] = format_time(sim.now + timedelta(minutes=10))
        worker.raw["metadata"]["deletionGracePeriodSeconds"] = 600
    sim.now += timedelta(minutes=7)
    sim.reconcile("tune")
    assert sim.reason("tune", "PodsReady") == ("False", "NoPods")
    assert sim.reason("tune", "Stalled")[0] == "False"


def test_a_failure_while_the_profile_is_missing_is_counted_against_the_limit_of_the_spec(sim: Simulation) -> None:
    sim.run("tune", until="Running")
    profiles, sim.settings = sim.settings, sim.settings.model_copy(update={"profiles": {}})
    sim.exit("tune-a1-0-abcde", 137)
    sim.reconcile("tune")
    assert sim.status("tune")["state"] != "Failed"
    sim.settings = profiles
    assert sim.run("tune")["state"] == "Succeeded"


def test_a_pod_that_anybody_has_labelled_with_nonsense_stops_no_pass(sim: Simulation) -> None:
    sim.run("tune", until="Running")
    labels = {"finetune.dev/job": "tune", "finetune.dev/attempt": "x"}
    labels["batch.kubernetes.io/job-completion-index"] = "y"
    sim.children_of["Pod", "odd"] = {
        "kind": "Pod",
        "metadata": {"name": "odd", "namespace": "default", "uid": "u-odd", "labels": labels},
        "spec": {},
        "status": {"phase": "Running"},
    }
    assert sim.run("tune")["state"] == "Succeeded"


def test_an_error_that_comes_again_after_a_step_is_tried_again(sim: Simulation) -> None:
    for attempt, steps in ((1, 3), (2, 6)):
        while sim.step.get(f"tune-a{attempt}", 0) < steps:
            sim.reconcile("tune")
            sim.tick()
        sim.exit(f"tune-a{attempt}-0-abcde", 1, Termination(cause=Cause.TRAINER_ERROR, message="boom", exit_code=1))
    status = sim.run("tune")
    assert [a["cause"] for a in status["attempts"]] == ["TrainerError", "TrainerError", "Succeeded"]


def test_restarts_are_limited_and_then_the_last_cause_is_told() -> None:
    sim = Simulation()
    sim.submit("tune", {**GOOD_SPEC, "recovery": {"maxRestarts": 2}})
    for attempt in (1, 2, 3):
        sim.run("tune", until="Running")
        while sim.step.get(f"tune-a{attempt}", 0) < 1:
            sim.reconcile("tune")
            sim.tick()
        sim.exit(f"tune-a{attempt}-0-abcde", 137)
        sim.tick()
    status = sim.run("tune")
    assert status["state"] == "Failed"
    assert sim.reason("tune", "Failed") == ("True", "RestartsExhausted")
    assert "recovery.maxRestarts = 2" in sim.message("tune", "Failed")
    assert "SIGKILL" in sim.message("tune", "Failed")
    assert len(status["attempts"]) == 3


def test_a_lost_node_is_free_and_kept_out(sim: Simulation) -> None:
    while sim.step.get("tune-a1", 0) < 4:
        sim.reconcile("tune")
        sim.tick()
    lost = sim.workers["tune-a1-1-abcde"].raw["spec"]["nodeName"]
    sim.nodes[lost] = False
    sim._delete_pod(sim.workers["tune-a1-1-abcde"].raw)  # the taint manager
    status = sim.run("tune")
    assert status["state"] == "Succeeded"
    first = status["attempts"][0]
    assert (first["cause"], first["node"], first["nodeSuspect"], first["counted"]) == ("NodeLost", lost, True, False)
    assert status["countedRestarts"] == 0
    assert all(w.raw["spec"]["nodeName"] != lost for w in sim.workers.values())


def test_suspected_nodes_are_used_again_where_there_is_no_other() -> None:
    sim = Simulation(nodes={"only": True})
    sim.submit("tune", {**GOOD_SPEC, "workers": {"replicas": 1}})
    sim.run("tune", until="Running")
    sim.exit("tune-a1-0-abcde", 1, Termination(cause=Cause.GPU_ERROR, message="Xid 79", exit_code=1))
    status = sim.run("tune", ticks=400)
    assert status["state"] == "Succeeded"
    assert [a["cause"] for a in status["attempts"]] == ["GPUError", "NoOtherNode", "Succeeded"]


def test_suspend_saves_and_gives_the_pods_back_and_goes_on(sim: Simulation) -> None:
    while sim.step.get("tune-a1", 0) < 5:
        sim.reconcile("tune")
        sim.tick()
    sim.edit("tune", suspend=True)
    sim.run("tune", until="Suspended")
    assert sim.pods() == []
    assert sim.reason("tune", "Suspended")[0] == "True"
    assert sim.checkpoints["tune"] >= 5
    sim.edit("tune", suspend=False)
    status = sim.run("tune")
    assert status["state"] == "Succeeded"
    assert [a["cause"] for a in status["attempts"]] == ["Suspended", "Succeeded"]
    assert status["restarts"] == 0
    assert sim.reason("tune", "Suspended")[0] == "False"


# --- names, and what is refused ---


def test_a_name_that_is_taken_is_told_and_what_has_it_is_left_alone(sim: Simulation) -> None:
    own = {"kind": "ConfigMap", "metadata": {"name": "tune-config", "labels": {}}, "data": {"precious": "1"}}
    sim.children_of["ConfigMap", "tune-config"] = copy.deepcopy(own)
    requeue = sim.reconcile("tune").requeue
    status = sim.status("tune")
    assert (status["state"], status["attempts"], requeue) == ("Pending", [], 15)
    assert sim.reason("tune", "PodsReady") == ("False", "NameTaken")
    assert sim.reason("tune", "Stalled") == ("True", "NameTaken")
    assert sim.reason("tune", "Ready")[0] == "False"
    assert sim.reason("tune", "Reconciled")[0] == "True"
    assert [reason for reason, _ in sim.events] == ["NameTaken"]
    sim.tick()
    sim.reconcile("tune")
    assert [reason for reason, _ in sim.events] == ["NameTaken"]  # told once
    assert sim.children_of == {("ConfigMap", "tune-config"): own}
    del sim.children_of["ConfigMap", "tune-config"]
    assert sim.run("tune")["state"] == "Succeeded"
    assert sim.reason("tune", "Stalled")[0] == "False"


def test_pods_that_lost_their_job_are_nobodys_and_the_next_attempt_waits_for_a_person(sim: Simulation) -> None:
    """kubectl delete job --cascade=orphan: they train on, and would answer to their old names."""
    sim.run("tune", until="Running")
    del sim.children_of["Job", "tune-a1"]
    for worker in sim.workers.values():
        del worker.raw["metadata"]["ownerReferences"]
    status = sim.run("tune", ticks=20, until="Restarting")
    assert status["attempts"][0]["cause"] == "JobDeleted"
    sim.tick()
    sim.reconcile("tune")
    assert sim.reason("tune", "PodsReady") == ("False", "NameTaken")
    assert "Pod tune-a1-0-abcde, tune-a1-1-abcde: labelled" in sim.message("tune", "PodsReady")
    assert len(sim.pods()) == 2
    assert ("Job", "tune-a2") not in sim.children_of
    sim.workers.clear()
    assert sim.run("tune")["state"] == "Succeeded"


@pytest.mark.parametrize(
    ("reason", "state", "condition", "stalled", "again"),
    [
        (Reason.QUOTA_EXCEEDED, "Pending", "PodsReady", "False", 15),
        (Reason.REFUSED, "Pending", "PodsReady", "True", 60),
        (Reason.INVALID_SPEC, "Invalid", "Accepted", "True", None),
    ],
)
def test_a_refused_first_pass_is_told_and_not_tried_again_at_full_speed(
    sim: Simulation, reason: Reason, state: str, condition: str, stalled: str, again: float | None
) -> None:
    sim.refuse["Job"] = (reason, "Could not apply Job team/tune-a1: they said no")
    assert sim.reconcile("tune").requeue == again
    assert (sim.status("tune")["state"], sim.status("tune")["attempts"]) == (state, [])
    assert sim.reason("tune", condition) == ("False", reason)
    assert "they said no" in sim.message("tune", condition)
    assert sim.reason("tune", "Stalled")[0] == stalled
    assert sim.reason("tune", "Ready")[0] == "False"
    assert [("they said no" in message) for _, message in sim.events] == [True]
    # Nothing has run: what was made for it so far binds nobody.
    sim.refuse.clear()
    sim.edit("tune", training={"learning_rate": 0.5})
    assert sim.run("tune")["state"] == "Succeeded"
    made = json.loads(sim.children_of["ConfigMap", "tune-config"]["data"]["config.json"])
    assert made["training"]["learning_rate"] == 0.5
    assert sim.reason("tune", "Accepted") == ("True", "Valid")


def test_a_first_pass_that_breaks_leaves_a_state_and_an_event(sim: Simulation) -> None:
    sim.fail_calls.add("list")
    with pytest.raises(ClusterError):
        sim.reconcile("tune")
    assert sim.status("tune")["state"] == "Pending"
    assert sim.reason("tune", "Ready") == ("False", "NotFinished")
    assert sim.reason("tune", "Reconciled") == ("False", "ReconcileError")
    assert [reason for reason, _ in sim.events] == ["ReconcileError"]


def test_a_thousand_mistakes_are_cut_to_what_a_condition_holds(sim: Simulation) -> None:
    names = {f"no_such_thing_{n}": n for n in range(1000)}
    sim.edit("tune", training={"lr_scheduler_kwargs": names, "lr_scheduler_type": "cosine"})
    sim.reconcile("tune")
    assert sim.status("tune")["state"] == "Invalid"
    assert {len(sim.message("tune", kind)) for kind in ("Accepted", "Stalled")} == {32768}


# --- what runs, and what was asked for since ---


def test_a_change_of_what_steers_waits_for_the_next_attempt_and_is_told(sim: Simulation) -> None:
    sim.run("tune", until="Running")
    sim.edit("tune", workers={"replicas": 4, "gpusPerWorker": 8, "template": {"spec": {"priorityClassName": "low"}}})
    sim.reconcile("tune")
    assert sim.status("tune")["state"] == "Running"
    assert sim.message("tune", "PodsReady") == "All 2 workers run."
    assert sim.reason("tune", "Accepted") == ("True", "ChangePending")
    told = "spec.workers.replicas: 2 → 4; spec.workers.template: taken over by the next attempt"
    assert sim.message("tune", "Accepted").startswith(told)
    assert ("ChangePending", sim.message("tune", "Accepted")) in sim.events
    sim.exit("tune-a1-0-abcde", 137)
    while ("Job", "tune-a2") not in sim.children_of:
        sim.tick()
        sim.reconcile("tune")
    sim.reconcile("tune")
    assert sim.reason("tune", "Accepted") == ("True", "Valid")
    assert sim.children_of["Job", "tune-a2"]["spec"]["completions"] == 4


def test_a_trainer_that_was_never_reached_is_told_with_the_likely_causes(sim: Simulation) -> None:
    sim.steps = 1000
    sim.run("tune", until="Starting")
    sim.unreachable = True
    reasons: list[tuple[str, str]] = []
    while not reasons or reasons[-1][1] == "Loading":
        sim.tick()
        sim.reconcile("tune")
        reasons.append(sim.reason("tune", "Progressing"))
    for _ in range(3):
        sim.now += timedelta(minutes=1)
        sim.reconcile("tune")
        reasons.append(sim.reason("tune", "Progressing"))
    assert reasons[-4:-1] == [("Unknown", "ProgressUnknown")] * 3
    assert reasons[-1] == ("Unknown", "ProgressUnreachable")
    for cause in ("NetworkPolicy", "service mesh", "settings.progressThrough: apiserver"):
        assert cause in sim.message("tune", "Progressing")
    assert [reason for reason, _ in sim.events].count("ProgressUnreachable") == 1
    sim.unreachable = False
    assert sim.run("tune", until="Running")["state"] == "Running"


def test_pods_that_do_not_go_are_named_and_after_minutes_a_person_is_asked(sim: Simulation) -> None:
    sim.run("tune", until="Running")
    sim.edit("tune", suspend=True)
    sim.reconcile("tune")
    sim.tick()
    for worker in sim.workers.values():
        worker.grace = 10**6  # their node is well and does not end them
    sim.workers["tune-a1-1-abcde"].raw["metadata"]["finalizers"] = ["team.example/backup"]
    stalled = []
    for _ in range(10):
        sim.now += timedelta(minutes=1)
        sim.reconcile("tune")
        stalled.append(sim.reason("tune", "Stalled"))
    assert sim.reason("tune", "PodsReady") == ("False", "PodsTerminating")
    assert sim.message("tune", "PodsReady").startswith("Clearing attempt 1 (Suspended). Pod tune-a1-0-abcde on node ")
    assert "kubectl delete pod tune-a1-0-abcde -n team --grace-period=0 --force" in sim.message("tune", "PodsReady")
    assert stalled[0][0] == "False"
    assert stalled[-1] == ("True", "PodsTerminating")
    assert sim.message("tune", "Stalled") == sim.message("tune", "PodsReady")
    assert [reason for reason, _ in sim.events].count("PodsTerminating") == 1
    del sim.workers["tune-a1-0-abcde"]
    sim.reconcile("tune")
    assert "held by the finalizer team.example/backup" in sim.message("tune", "PodsReady")
    sim.workers.clear()
    assert sim.run("tune", until="Suspended")["state"] == "Suspended"
    assert sim.reason("tune", "Stalled")[0] == "False"


def test_an_operator_that_may_not_read_nodes_is_told_by_the_pods_that_theirs_is_dead(sim: Simulation) -> None:
    sim.fail_calls.add("node")
    sim.run("tune", until="Running")
    dead = sim.workers["tune-a1-1-abcde"]
    sim.nodes[dead.raw["spec"]["nodeName"]] = False
    dead.raw["status"]["conditions"] = [
        {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"},
        {"type": "Ready", "status": "False"},
    ]
    sim._delete_pod(dead.raw)
    assert sim.run("tune")["state"] == "Succeeded"
    assert sim.status("tune")["attempts"][0]["cause"] == "NodeLost"


def test_a_job_made_suspended_makes_nothing() -> None:
    sim = Simulation()
    sim.submit("tune", {**GOOD_SPEC, "suspend": True})
    sim.run("tune", until="Suspended")
    assert sim.children_of == {}


def test_a_hang_is_ended_and_tried_again(sim: Simulation) -> None:
    while sim.step.get("tune-a1", 0) < 4:
        sim.reconcile("tune")
        sim.tick()
    sim.frozen.add("tune-a1-0-abcde")
    status = sim.run("tune", ticks=1000)
    assert status["state"] == "Succeeded"
    assert status["attempts"][0]["cause"] == "Stalled"
    assert "recovery.hangTimeout is 600 s" in status["attempts"][0]["message"]


def test_attempts_that_never_step_back_off(sim: Simulation) -> None:
    starts = []
    for attempt in range(1, 6):
        sim.run("tune", until="Running" if attempt == 1 else "Restarting", ticks=500)
        while f"tune-a{attempt}-0-abcde" not in sim.workers:
            sim.reconcile("tune")
            sim.tick()
        starts.append(sim.now)
        sim.exit(f"tune-a{attempt}-0-abcde", 1)
        sim.exit(f"tune-a{attempt}-1-abcde", 1)
        sim.step[f"tune-a{attempt}"] = 0
        sim.tick()
        sim.tick()
        sim.tick()
    gaps = [(b - a).total_seconds() for a, b in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 20


def test_a_deleted_batch_job_is_made_anew(sim: Simulation) -> None:
    sim.run("tune", until="Running")
    del sim.children_of["Job", "tune-a1"]
    sim.workers.clear()
    status = sim.run("tune")
    assert [a["cause"] for a in status["attempts"]] == ["JobDeleted", "Succeeded"]


def test_ttl_deletes_the_finished_job() -> None:
    sim = Simulation()
    sim.submit("tune", {**GOOD_SPEC, "ttlSecondsAfterFinished": 30})
    sim.run("tune")
    assert sim.reconcile("tune").requeue == pytest.approx(30, abs=2)
    for _ in range(31):
        sim.tick()
    sim.reconcile("tune")
    assert sim.jobs == {}
    assert sim.children_of == {}


def test_a_chain_waits_for_its_input_and_says_for_what() -> None:
    sim = Simulation()
    sim.submit("second", {**GOOD_SPEC, "model": {"uri": "job://first"}})
    sim.reconcile("second")
    assert sim.reason("second", "InputsReady") == ("False", "WaitingForJob")
    assert "first" in sim.message("second", "InputsReady")
    assert sim.status("second")["state"] == "Waiting"
    sim.submit("first")
    sim.run("first")
    status = sim.run("second")
    assert status["state"] == "Succeeded"
    assert '"s3://team/first"' in sim.children_of["ConfigMap", "second-config"]["data"]["config.json"]


@pytest.mark.parametrize("kind", ["adapter", "model", "merged"])
def test_a_policy_waits_for_its_reward_model(kind: str) -> None:
    sim = Simulation()
    sim.submit("second", {**GOOD_SPEC, "stage": "ppo", "ppo": {"reward_model": {"uri": "job://first"}}})
    sim.reconcile("second")
    assert sim.reason("second", "InputsReady") == ("False", "WaitingForJob")
    sim.submit("first")
    sim.run("first", until="Running")
    outputs = [OutputInfo(uri="s3://team/judge", kind=kind, digest="sha256:1", size=1)]
    for pod in sim.pods():
        sim.exit(pod, 0, Termination(cause=Cause.SUCCEEDED, rank=_index(sim.workers[pod].raw), outputs=outputs))
    assert sim.run("first")["state"] == "Succeeded"
    assert sim.run("second")["state"] == "Succeeded"
    assert '"s3://team/judge"' in sim.children_of["ConfigMap", "second-config"]["data"]["config.json"]


def first_writes(sim: Simulation, output: OutputInfo) -> None:
    """A job named first runs to its end."""
    sim.submit("first")
    sim.run("first", until="Running")
    for pod in sim.pods():
        sim.exit(pod, 0, Termination(cause=Cause.SUCCEEDED, rank=_index(sim.workers[pod].raw), outputs=[output]))
    assert sim.run("first")["state"] == "Succeeded"


@pytest.mark.parametrize(
    ("kind", "model", "state"),
    [
        ("adapter", {"uri": "hf://a/b", "adapters": [{"uri": "job://first", "train": True}]}, "Succeeded"),
        ("adapter", {"uri": "job://first"}, "Succeeded"),
        ("model", {"uri": "hf://a/b", "adapters": [{"uri": "job://first"}]}, "Waiting"),
    ],
)
def test_a_chain_takes_a_model_or_an_adapter_as_it_asks_for(kind: str, model: dict[str, Any], state: str) -> None:
    sim = Simulation()
    sim.submit("second", {**GOOD_SPEC, "model": model})
    sim.reconcile("second")
    assert sim.reason("second", "InputsReady") == ("False", "WaitingForJob")
    first_writes(sim, OutputInfo(uri="s3://team/first", kind=kind, digest="sha256:1", size=1))
    if state == "Waiting":
        sim.reconcile("second")
        assert sim.reason("second", "Stalled") == ("True", "InputJobFailed")
        assert "spec.model.adapters" in sim.message("second", "Stalled")
        return
    assert sim.run("second")["state"] == state
    config = json.loads(sim.children_of["ConfigMap", "second-config"]["data"]["config.json"])
    train = model["uri"] != "job://first"
    assert config["model"]["adapters"] == [{"uri": "s3://team/first", "revision": "main", "train": train}]
    assert config["model"]["uri"] == ("hf://a/b" if train else GOOD_SPEC["model"]["uri"])


@pytest.mark.parametrize(
    ("first", "why"),
    [
        ({"method": {"type": "mam"}}, "what method.type mam trains is no part of any weight"),
        ({"method": {"type": "moelora", "tasks": ["a"]}}, "several adapters, one per task"),
        ({"stage": "reward"}, "stage reward has given its model another head"),
        ({"model": {"uri": "s3://team/model", "gguf_file": "x.gguf"}}, "its model is a GGUF file"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_no_model_to_start_from(first: dict[str, Any], why: str) -> None:
    sim = Simulation(output_kind="adapter")
    sim.submit("first", GOOD_SPEC | first)
    sim.run("first")
    sim.submit("second", {**GOOD_SPEC, "model": {"uri": "job://first"}})
    sim.reconcile("second")
    assert sim.reason("second", "Stalled") == ("True", "InputJobFailed")
    assert why in sim.message("second", "Stalled")


@pytest.mark.parametrize(("kind", "state"), [("data", "Succeeded"), ("model", "Waiting")])
def test_a_chain_takes_rows_where_it_asks_for_rows(kind: str, state: str) -> None:
    sim = Simulation()
    data = {"train": [{"uri": "s3://team/rows.jsonl"}, {"uri": "job://first"}]}
    sim.submit("second", {**GOOD_SPEC, "stage": "dpo", "data": data})
    sim.reconcile("second")
    assert sim.reason("second", "InputsReady") == ("False", "WaitingForJob")
    rows = OutputInfo(uri="s3://team/first/preferences.jsonl", kind=kind)
    first_writes(sim, rows)
    if state == "Waiting":
        sim.reconcile("second")
        assert sim.reason("second", "Stalled") == ("True", "InputJobFailed")
        assert "wrote no rows" in sim.message("second", "Stalled")
        return
    assert sim.run("second")["state"] == state
    config = json.loads(sim.children_of["ConfigMap", "second-config"]["data"]["config.json"])
    assert [s["uri"] for s in config["data"]["train"]] == ["s3://team/rows.jsonl", rows.uri]


def test_rows_are_no_model() -> None:
    sim = Simulation()
    first_writes(sim, OutputInfo(uri="s3://team/first/preferences.jsonl", kind="data"))
    sim.submit("second", {**GOOD_SPEC, "model": {"uri": "job://first"}})
    sim.reconcile("second")
    assert "wrote rows and no model" in sim.message("second", "Stalled")


def test_a_pass_over_a_job_that_is_made_anew_meanwhile_writes_nothing_on_the_new_one(sim: Simulation) -> None:
    class MadeAnew(Simulation):
        def children(self, namespace: str, name: str) -> list[Any]:
            self.children_of.clear()
            self.submit(name, uid="another")
            return []

    sim.run("tune", until="Running")
    told = list(sim.events)
    sim.__class__ = MadeAnew
    assert reconcile(sim, sim.settings, "team", "tune", lambda: sim.now).job is None
    assert sim.status("tune") == {"observedGeneration": -1}
    assert sim.events == told


@pytest.mark.parametrize("seen", [True, False])
def test_a_gang_whose_queue_takes_the_room_back_was_preempted(sim: Simulation, seen: bool) -> None:
    while sim.step.get("tune-a1", 0) < 5:
        sim.reconcile("tune")
        sim.tick()
    sim.children_of["Job", "tune-a1"]["spec"]["suspend"] = True
    for pod in sim.pods():
        sim._delete_pod(sim.workers[pod].raw)
    if not seen:
        sim.workers.clear()
    status = sim.run("tune")
    assert status["state"] == "Succeeded"
    assert [a["cause"] for a in status["attempts"]] == ["Preempted", "Succeeded"]
    assert status["attempts"][0]["message"].startswith("A queue took its room back: Job tune-a1")
    assert (status["restarts"], status["countedRestarts"]) == (1, 0)


def beside(sim: Simulation, pod: str, state: dict[str, Any], phase: str = "Running") -> None:
    """The pod's trainer has ended with 0 and left its word; the sidecar beside it is in this state."""
    worker = sim.workers[pod]
    sim.exit(pod, 0)
    assert worker.termination
    terminated = {"exitCode": 0, "finishedAt": "2026-01-01T00:00:05Z", "message": worker.termination.to_message()}
    worker.raw["spec"]["containers"] = [{"name": "trainer"}, {"name": "mesh"}]
    worker.raw["status"] |= {
        "phase": phase,
        "containerStatuses": [{"name": "trainer", "state": {"terminated": terminated}}, {"name": "mesh", **state}],
    }
    worker.exit_code = None  # the kubelet waits for the sidecar


RUNS = {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
ENDED = {"state": {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": "2026-01-01T00:00:06Z"}}}


@pytest.mark.parametrize(("state", "phase"), [(RUNS, "Running"), (ENDED, "Failed")])
def test_a_run_whose_trainers_ended_well_has_succeeded_whatever_stands_beside_them(
    sim: Simulation, state: dict[str, Any], phase: str
) -> None:
    sim.run("tune", until="Running")
    sim._train = lambda: None  # type: ignore[method-assign]
    first, second = sim.pods()
    beside(sim, first, state, phase)
    sim.reconcile("tune")
    assert sim.status("tune")["state"] == "Running"
    beside(sim, second, state, phase)
    sim._job_controller()
    status = sim.run("tune", ticks=1)
    assert (status["state"], status["restarts"]) == ("Succeeded", 0)
    assert status["outputs"] == [{"uri": "s3://team/tune", "kind": "model", "digest": "sha256:1", "size": "2.0Ki"}]
    # It has a moment to end by itself; then the Job goes, and the GPUs are free.
    for _ in range(29):
        sim.reconcile("tune")
        sim.tick()
    assert sim.pods() == [first, second]
    for _ in range(5):
        sim.reconcile("tune")
        sim.tick()
    assert sim.pods() == ([] if phase == "Running" else [first, second])
    assert sim.status("tune") == {**status, "gpus": {"wanted": 0, "held": 0}}


def test_a_worker_that_hangs_while_others_have_ended_is_noticed(sim: Simulation) -> None:
    sim.edit("tune", recovery={"hangTimeout": "1m"})
    while sim.step.get("tune-a1", 0) < 4:
        sim.reconcile("tune")
        sim.tick()
    sim.frozen.add("tune-a1-1-abcde")
    beside(sim, "tune-a1-0-abcde", RUNS)
    status = sim.run("tune", ticks=1000)
    assert [a["cause"] for a in status["attempts"]] == ["Stalled", "Succeeded"]


def evict(sim: Simulation, message: str) -> None:
    """The kubelet ends every pod that runs."""
    for worker in sim.workers.values():
        if worker.raw["status"]["phase"] == "Running":
            worker.raw["status"] |= {"phase": "Failed", "reason": "Evicted", "message": message}


def test_a_job_that_is_too_large_for_its_own_limit_fails_and_blames_no_node(sim: Simulation) -> None:
    sim.edit("tune", recovery={"maxRestarts": 2})
    for _ in range(200):
        sim.reconcile("tune")
        evict(sim, 'Usage of EmptyDir volume "cache" exceeds the limit "200Gi". ')
        sim.tick()
    status = sim.status("tune")
    assert (status["state"], [a["cause"] for a in status["attempts"]]) == ("Failed", ["OutOfDisk"] * 3)
    assert not any(a["nodeSuspect"] for a in status["attempts"])
    assert "cache.sizeLimit" in sim.message("tune", "Failed")


def test_a_free_cause_that_repeats_without_a_step_calls_for_a_person(sim: Simulation) -> None:
    sim.edit("tune", workers={"replicas": 1, "gpusPerWorker": 8})
    sim._train = lambda: None  # type: ignore[method-assign]
    for ticks in itertools.count():
        sim.reconcile("tune")
        if sim.reason("tune", "Stalled")[0] == "True":
            break
        evict(sim, "The node was low on resource: ephemeral-storage. ")
        sim.tick()
        assert ticks < 1000
    status = sim.status("tune")
    assert [a["cause"] for a in status["attempts"] if a["cause"] != "NoOtherNode"] == ["Evicted"] * 6
    assert sim.reason("tune", "Stalled") == ("True", "NoProgress")
    assert "The last 6 attempts ended before they had finished a step" in sim.message("tune", "Stalled")
    assert status["countedRestarts"] == 0
    assert [reason for reason, _ in sim.events].count("NoProgress") == 1
    del sim._train  # type: ignore[method-assign]
    assert sim.run("tune", ticks=2000)["state"] == "Succeeded"
    assert sim.reason("tune", "Stalled")[0] == "False"


def cannot_start(sim: Simulation, said: str) -> str:
    """No container can be started on the node of the only worker, whose name is returned."""
    while not (worker := next(iter(sim.workers.values()), None)) or worker.raw["status"]["phase"] != "Running":
        sim.reconcile("tune")
        sim.tick()
    ended = {"exitCode": 128, "reason": "StartError", "message": said, "finishedAt": "2026-01-01T00:00:05Z"}
    worker.raw["status"] |= {
        "phase": "Failed",
        "containerStatuses": [{"name": "trainer", "state": {"terminated": ended}}],
    }
    return str(worker.raw["spec"]["nodeName"])


def test_nodes_that_are_overloaded_are_tried_again(sim: Simulation) -> None:
    sim.edit("tune", workers={"replicas": 1})
    train, sim._train = sim._train, lambda: None  # type: ignore[method-assign]
    for _ in range(2):
        cannot_start(sim, "failed to create containerd task: context deadline exceeded")
    sim._train = train  # type: ignore[method-assign]
    status = sim.run("tune")
    assert [a["cause"] for a in status["attempts"]] == ["StartError", "StartError", "Succeeded"]


def test_a_container_that_a_second_node_cannot_start_either_is_not_the_nodes_fault(sim: Simulation) -> None:
    sim.edit("tune", workers={"replicas": 1})
    sim._train = lambda: None  # type: ignore[method-assign]
    said = 'error mounting "/etc/ssl" to rootfs: not a directory'
    first = cannot_start(sim, said)
    second = cannot_start(sim, said)
    assert first != second
    status = sim.run("tune")
    assert status["state"] == "Failed"
    assert [(a["cause"], a["counted"], a["nodeSuspect"]) for a in status["attempts"]] == [
        ("StartError", True, True)
    ] * 2
    assert sim.reason("tune", "Failed") == ("True", "NotRetryable")
    assert sim.message("tune", "Failed").endswith(f" Attempt 1 ended the same way, on node {first}.")


@pytest.mark.parametrize(("broken", "state"), [(1, "Succeeded"), (2, "Failed")])
def test_a_node_that_lost_its_gpus_is_left_and_an_image_that_sees_none_anywhere_is_a_mistake(
    sim: Simulation, broken: int, state: str
) -> None:
    sim.edit("tune", workers={"replicas": 1})
    for attempt in range(1, 1 + broken):
        pod = f"tune-a{attempt}-0-abcde"
        while pod not in sim.workers or sim.workers[pod].raw["status"]["phase"] != "Running":
            sim.reconcile("tune")
            sim.tick()
        sim.exit(pod, 1, Termination(cause=Cause.NO_ACCELERATOR, message="No GPU was found", exit_code=1))
        sim.step[f"tune-a{attempt}"] = 0
    status = sim.run("tune")
    assert (status["state"], [a["cause"] for a in status["attempts"]].count("NoAccelerator")) == (state, broken)
    assert len({a["node"] for a in status["attempts"] if a["nodeSuspect"]}) == broken


def test_a_node_without_its_gpu_driver_is_left(sim: Simulation) -> None:
    sim.edit("tune", workers={"replicas": 1})
    broken = cannot_start(
        sim, "nvidia-container-cli: initialization error: nvml error: driver/library version mismatch"
    )
    status = sim.run("tune")
    assert [(a["cause"], a["node"] == broken) for a in status["attempts"]] == [("GPUError", True), ("Succeeded", False)]


def test_what_is_wrong_with_a_claim_of_devices_is_told_beside_the_schedulers_words() -> None:
    sim = Simulation(nodes={})
    claims = {"spec": {"resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "eight"}]}}
    sim.submit("tune", {**GOOD_SPEC, "workers": {"replicas": 1, "template": claims}})
    said = "resourceclaimtemplate eight not found"
    sim.told_of["tune-a1-0-abcde"] = [
        {"reason": "FailedResourceClaimCreation", "type": "Warning", "lastTimestamp": "2026", "message": said}
    ]
    sim.run("tune", ticks=40)
    assert sim.reason("tune", "PodsReady") == ("False", "Unschedulable")
    assert sim.message("tune", "PodsReady").endswith(f"0/4 nodes fit FailedResourceClaimCreation: {said}")


@pytest.mark.parametrize(
    ("told", "reason", "says"),
    [
        (("FailedMount", 'secret "no-such" not found'), "VolumeNotMounted", 'FailedMount: secret "no-such" not found'),
        (("FailedCreatePodSandBox", "no CNI"), "PodNotStarted", "FailedCreatePodSandBox: no CNI"),
        (("Pulling", 'Pulling image "trainer:1"'), "PodsPending", 'Pulling image "trainer:1"'),
    ],
)
def test_what_holds_up_a_pod_is_told_where_only_its_events_say_it(
    sim: Simulation, told: tuple[str, str], reason: str, says: str
) -> None:
    sim._tick_pod = lambda worker: worker.raw["spec"].update(nodeName="node-1")  # type: ignore[method-assign]
    sim.told_of["tune-a1-1-abcde"] = [
        {"reason": "Scheduled", "type": "Normal", "eventTime": "2026-01-01T00:00:09Z", "message": "assigned"},
        {"reason": "FailedMount", "type": "Warning", "lastTimestamp": "2026-01-01T00:00:01Z", "message": "early"},
        {
            "reason": told[0],
            "type": "Normal" if reason == "PodsPending" else "Warning",
            "lastTimestamp": "2026-01-01T00:00:05Z",
            "message": told[1],
        },
    ]
    for _ in range(20):
        sim.reconcile("tune")
        sim.tick()
    assert sim.message("tune", "PodsReady") == "0 of 2 workers run."
    for _ in range(20):
        sim.reconcile("tune")
        sim.tick()
    assert sim.reason("tune", "PodsReady") == ("False", reason)
    assert sim.message("tune", "PodsReady") == f"0 of 2 workers run. tune-a1-1-abcde: {says}"
    assert [r for r, _ in sim.events if r == reason] == ([reason] if reason != "PodsPending" else [])


def test_a_job_that_its_queue_holds_back_waits_in_its_first_attempt(sim: Simulation) -> None:
    sim.reconcile("tune")
    sim.children_of["Job", "tune-a1"]["spec"]["suspend"] = True
    for _ in range(30):
        sim.reconcile("tune")
        sim.tick()
    assert sim.reason("tune", "PodsReady") == ("False", "Queued")
    sim.children_of["Job", "tune-a1"]["spec"]["suspend"] = False
    assert [a["cause"] for a in sim.run("tune")["attempts"]] == ["Succeeded"]


def test_a_chain_whose_input_failed_is_stalled_until_that_one_is_made_anew() -> None:
    sim = Simulation()
    sim.submit("first")
    sim.run("first", until="Running")
    sim.exit("first-a1-0-abcde", 64, Termination(cause=Cause.ACCESS_DENIED, message="no", exit_code=64))
    assert sim.run("first")["state"] == "Failed"
    sim.submit("second", {**GOOD_SPEC, "model": {"uri": "job://first"}})
    sim.reconcile("second")
    assert sim.status("second")["state"] == "Waiting"
    assert sim.reason("second", "Stalled") == ("True", "InputJobFailed")
    assert sim.message("second", "Stalled") == "FineTuneJob first has failed; this job waits for its output."
    sim.delete_job(sim.jobs["first"])
    sim.workers.clear()
    sim.submit("first")
    sim.reconcile("second")
    assert sim.reason("second", "Stalled") == ("False", "NotFailed")


@pytest.mark.parametrize(
    ("waiting", "reason"),
    [("CreateContainerConfigError", "ContainerConfigInvalid"), ("ImagePullBackOff", "ImageNotPulled")],
)
def test_what_a_container_waits_for_is_told(sim: Simulation, waiting: str, reason: str) -> None:
    while not sim.pods():
        sim.reconcile("tune")
        sim.tick()
    state = {"waiting": {"reason": waiting, "message": 'secret "storage" not found'}}
    sim.workers["tune-a1-0-abcde"].raw["status"]["containerStatuses"] = [{"name": "trainer", "state": state}]
    sim.reconcile("tune")
    assert sim.reason("tune", "PodsReady") == ("False", reason)
    assert sim.message("tune", "PodsReady").endswith('secret "storage" not found')


def test_mistakes_are_told_all_at_once_and_nothing_is_made() -> None:
    sim = Simulation()
    sim.submit("tune", {**GOOD_SPEC, "training": {"learning_rate": -1, "num_train_epochs": 0}, "stage": "nope"})
    sim.reconcile("tune")
    assert sim.status("tune")["state"] == "Invalid"
    message = sim.message("tune", "Accepted")
    for field in ("spec.training.learning_rate", "spec.training.num_train_epochs", "spec.stage"):
        assert field in message
    assert sim.children_of == {}
    sim.edit("tune", training={}, stage="sft")
    assert sim.run("tune")["state"] == "Succeeded"


def test_an_unknown_profile_is_told() -> None:
    sim = Simulation()
    sim.submit("tune", {**GOOD_SPEC, "profile": "gold"})
    sim.reconcile("tune")
    assert sim.reason("tune", "Accepted") == ("False", "UnknownProfile")
    assert "gold" in sim.message("tune", "Accepted")
    assert "default" in sim.message("tune", "Accepted")


def test_what_changes_the_result_is_kept_after_the_start(sim: Simulation) -> None:
    sim.run("tune", until="Running")
    sim.edit("tune", training={"learning_rate": 0.5})
    sim.reconcile("tune")
    assert sim.reason("tune", "Accepted") == ("False", "ImmutableFieldChanged")
    assert "spec.training" in sim.message("tune", "Accepted")
    sim.exit("tune-a1-0-abcde", 137)
    assert sim.run("tune")["state"] == "Succeeded"
    assert '"learning_rate": 0.0002' in sim.children_of["ConfigMap", "tune-config"]["data"]["config.json"]


def test_what_steers_is_taken_from_the_spec_of_the_day(sim: Simulation) -> None:
    sim.run("tune", until="Running")
    sim.edit("tune", workers={"replicas": 1, "gpusPerWorker": 8})
    sim.exit("tune-a1-0-abcde", 137)
    assert sim.run("tune")["state"] == "Succeeded"
    assert sim.children_of["Job", "tune-a2"]["spec"]["completions"] == 1


def test_a_failure_of_the_cluster_is_a_condition(sim: Simulation) -> None:
    sim.fail_calls = {"apply"}
    with pytest.raises(ClusterError):
        sim.reconcile("tune")
    assert sim.reason("tune", "Reconciled") == ("False", "ReconcileError")
    assert "the API server is ill" in sim.message("tune", "Reconciled")
    sim.fail_calls = set()
    assert sim.run("tune")["state"] == "Succeeded"
    assert sim.reason("tune", "Reconciled") == ("True", "Reconciled")


@settings(max_examples=300, deadline=None)
@given(
    kills=st.lists(st.integers(0, 40), max_size=20),
    crash_at=st.lists(st.integers(1, 60), max_size=3),
    suspend_at=st.one_of(st.none(), st.integers(1, 40)),
)
def test_killing_the_operator_anywhere_changes_nothing(
    kills: list[int], crash_at: list[int], suspend_at: int | None
) -> None:
    """kill -9 of the operator at arbitrary calls, with workers that crash and a user who suspends: the job always
    succeeds, no two gangs ever run at once, no attempt is counted twice."""
    sim = Simulation()
    sim.submit("tune", {**GOOD_SPEC, "recovery": {"maxRestarts": 100}})
    pending = list(kills)
    crashes = 0
    for second in range(2000):
        if second in crash_at:
            for pod in sim.pods()[:1]:
                if sim.workers[pod].raw["status"]["phase"] == "Running" and sim.workers[pod].exit_code is None:
                    sim.exit(pod, 137)
                    crashes += 1
        if second == suspend_at:
            sim.edit("tune", suspend=True)
        if suspend_at is not None and second == suspend_at + 20:
            sim.edit("tune", suspend=False)
        if sim.calls_until_killed is None and pending:
            sim.calls_until_killed = pending.pop()
        try:
            sim.reconcile("tune")
        except OperatorKilled:
            sim.calls_until_killed = None
        sim.tick()
        if sim.status("tune").get("state") == "Succeeded":
            break
    status = sim.status("tune")
    assert status["state"] == "Succeeded"
    assert sim.most_gangs == 1
    numbers = [a["number"] for a in status["attempts"]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert status["restarts"] <= crashes
