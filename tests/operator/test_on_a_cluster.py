"""Lives of jobs with the real operator at a real API server, with its Job controller and scheduler. Pods are simulated:
they end, and their trainers speak, as a test says."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime

import pytest
from kubernetes import config as kubernetes_config

from finetune_api.causes import Cause
from finetune_api.run import CheckpointInfo, Termination
from finetune_operator.cluster import ClusterError
from finetune_operator.cluster.kubernetes import KubernetesCluster
from tests import PATIENCE
from tests.cluster.access import Object
from tests.cluster.cluster import Cluster
from tests.operator.jobs_on_a_cluster import (
    BATCH_JOBS,
    CHILDREN,
    JOBS,
    change,
    condition,
    end,
    end_trainer,
    fine_tune_job,
    result,
    shown,
    told,
    uids,
    wait_for_reason,
    wait_for_state,
    workers,
)
from tests.operator.operator_process import Trainers, without_right

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]


# --- a life without trouble ---


def test_a_job_runs_on_two_nodes_and_succeeds(cluster: Cluster, namespace: str, trainers: Trainers) -> None:
    cluster.apply(fine_tune_job("tune"), namespace=namespace)
    pods = workers(cluster, namespace, "tune")
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    for pod in pods:
        trainer = next(c for c in pod["spec"]["containers"] if c["name"] == "trainer")
        assert trainer["resources"] == {"requests": {"nvidia.com/gpu": "8"}, "limits": {"nvidia.com/gpu": "8"}}
    indexes = [pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] for pod in pods]
    assert indexes == ["0", "1"]

    trainers.say(pods[0], phase="loading", message="Loading the model.")
    loading = wait_for_reason(cluster, namespace, "tune", "Progressing", "Loading")
    assert wait_for_state(cluster, namespace, "tune", "Starting")
    assert loading["status"] == "False"

    saved = CheckpointInfo(step=3, uri="s3://team/tune/checkpoints/step-3", time="2026-01-01T00:00:00Z", size=1024)
    trainers.say(
        pods[0], phase="training", step=4, max_steps=10, loss=1.25, eta_seconds=72.0, checkpoints=[saved],
        trainable_parameters=7, unhealthy={},
    )  # fmt: skip
    status = wait_for_state(cluster, namespace, "tune", "Running")
    assert (status["progress"]["percent"], status["progress"]["loss"]) == ("40 %", "1.2500")
    assert status["checkpoints"][0]["uri"] == saved.uri
    columns = shown(cluster, namespace, "tune")
    assert {c: columns[c] for c in ("STATE", "PROGRESS", "STEP", "LOSS", "ETA", "RESTARTS")} == {
        "STATE": "Running", "PROGRESS": "40 %", "STEP": "4", "LOSS": "1.2500", "ETA": "1m12s", "RESTARTS": "0",
    }  # fmt: skip

    # What is told is of the gang that runs; what is asked for since then waits for the next one.
    change(cluster, namespace, "tune", workers={"replicas": 4, "gpusPerWorker": 8})
    pending = wait_for_reason(cluster, namespace, "tune", "Accepted", "ChangePending")
    assert pending["message"].startswith("spec.workers.replicas: 2 → 4: taken over by the next attempt")
    running = cluster.get(JOBS, "tune", namespace=namespace)
    assert (running["status"]["state"], condition(running, "PodsReady")["message"]) == ("Running", "All 2 workers run.")

    end(cluster, pods[0], 0, word=result("tune"))
    end(cluster, pods[1], 0)
    done = cluster.wait_for_condition(JOBS, "tune", "Complete", namespace=namespace)
    assert condition(done, "Complete")["message"] == (
        "The run has finished after 10 steps; its output is in s3://team/tune"
    )
    assert condition(done, "Ready")["status"] == "True"  # what Flux and Argo CD wait for
    holding = {c["type"] for c in done["status"]["conditions"] if c["status"] == "True"}
    assert holding == {"Accepted", "InputsReady", "Reconciled", "Complete", "Ready", "Healthy"}
    status = done["status"]
    assert (status["state"], status["restarts"], status["completionTime"] >= status["startTime"]) == (
        "Succeeded",
        0,
        True,
    )
    assert [(a["number"], a["jobName"], a["cause"], a["exitCode"]) for a in status["attempts"]] == [
        (1, "tune-a1", "Succeeded", 0)
    ]
    assert status["outputs"] == [{"uri": "s3://team/tune", "kind": "model", "digest": "sha256:1", "size": "2.0Ki"}]
    assert shown(cluster, namespace, "tune")["PROGRESS"] == "100 %"
    events = told(cluster, namespace, "tune", last="Succeeded")
    assert ("Normal", "AttemptStarted", "Attempt 1: Job tune-a1 made.") in events
    assert ("Normal", "CheckpointSaved", "Checkpoint of step 3 is complete.") in events
    assert {kind for kind, _, _ in events} == {"Normal"}

    # kubectl believes no condition that is older than the last edit, and of a finished run most never change again.
    change(cluster, namespace, "tune", ttlSecondsAfterFinished=3600)
    for kind in ("Complete", "Ready", "Failed=false"):
        cluster.kubectl("wait", "ftj", "tune", "-n", namespace, f"--for=condition={kind}", f"--timeout={PATIENCE:.0f}s")


def test_a_sidecar_neither_holds_up_nor_spoils_the_end_of_a_run(cluster: Cluster, namespace: str) -> None:
    """One that a webhook might have put there runs on in the first pod, and fails the second one with its Job."""
    mesh = {"name": "mesh", "image": "proxy:1"}
    template = {"spec": {"containers": [mesh]}}
    cluster.apply(fine_tune_job("tune", workers={"replicas": 2, "template": template}), namespace=namespace)
    pods = workers(cluster, namespace, "tune")
    failed = {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": pods[1]["status"]["startTime"]}}
    end_trainer(cluster, pods[0], result("tune"))
    end_trainer(cluster, pods[1], Termination(cause=Cause.SUCCEEDED, rank=1), others=failed, phase="Failed")
    done = cluster.wait_for_condition(JOBS, "tune", "Complete", namespace=namespace)["status"]
    assert (done["state"], done["restarts"], [a["cause"] for a in done["attempts"]]) == ("Succeeded", 0, ["Succeeded"])
    assert [output["uri"] for output in done["outputs"]] == ["s3://team/tune"]


# --- failures of the run ---


def test_failed_workers_restart_the_gang_until_the_restarts_are_used_up(cluster: Cluster, namespace: str) -> None:
    cluster.apply(fine_tune_job("tune", recovery={"maxRestarts": 1}), namespace=namespace)
    first = workers(cluster, namespace, "tune")
    end(cluster, first[1], 137, reason="OOMKilled")
    second = workers(cluster, namespace, "tune", attempt=2)
    status = wait_for_state(cluster, namespace, "tune", "Restarting")
    assert (status["restarts"], status["countedRestarts"]) == (1, 1)
    assert shown(cluster, namespace, "tune")["RESTARTS"] == "1"
    # The whole gang was taken away, not only the worker that failed.
    left = cluster.objects("pods", namespace=namespace)
    assert {pod["metadata"]["uid"] for pod in left} == {pod["metadata"]["uid"] for pod in second}

    end(cluster, second[0], 1, word=Termination(cause=Cause.TRAINER_ERROR, message="ValueError: boom", exit_code=1))
    failed = cluster.wait_for_condition(JOBS, "tune", "Failed", namespace=namespace)
    told_why = condition(failed, "Failed")
    assert told_why["reason"] == "RestartsExhausted"
    assert told_why["message"] == "recovery.maxRestarts = 1 is used up. Last: TrainerError: ValueError: boom"
    assert condition(failed, "Stalled")["status"] == "True"
    attempts = failed["status"]["attempts"]
    assert [(a["cause"], a["exitCode"], a["counted"], a["pod"], a["node"]) for a in attempts] == [
        ("OutOfMemory", 137, True, first[1]["metadata"]["name"], first[1]["spec"]["nodeName"]),
        ("TrainerError", 1, True, second[0]["metadata"]["name"], second[0]["spec"]["nodeName"]),
    ]
    assert "resources.limits.memory in spec.workers.template" in attempts[0]["message"]
    events = told(cluster, namespace, "tune", last="Failed")
    assert {reason for kind, reason, _ in events if kind == "Warning"} == {"OutOfMemory", "TrainerError", "Failed"}
    assert ("Warning", "TrainerError", "Attempt 2 ended (exit code 1): ValueError: boom") in events
    # The survivors hold no GPUs.
    cluster.wait_for(
        "pods", lambda pods: not [p for p in pods if p["status"]["phase"] == "Running"], namespace=namespace
    )


def test_a_mistake_of_the_user_is_not_tried_again(cluster: Cluster, namespace: str) -> None:
    cluster.apply(fine_tune_job("tune"), namespace=namespace)
    pods = workers(cluster, namespace, "tune")
    said = "data.train[0].uri: s3://team/train.jsonl does not exist"
    end(cluster, pods[0], 64, word=Termination(cause=Cause.DATA_NOT_FOUND, message=said, exit_code=64))
    failed = cluster.wait_for_condition(JOBS, "tune", "Failed", namespace=namespace)
    told_why = condition(failed, "Failed")
    assert (told_why["reason"], told_why["message"]) == ("NotRetryable", f"DataNotFound: {said}")
    assert [(a["cause"], a["exitCode"]) for a in failed["status"]["attempts"]] == [("DataNotFound", 64)]
    assert failed["status"]["restarts"] == 0


@pytest.mark.parametrize(
    ("code", "last_words", "cause", "says"),
    [
        (137, "", "Killed", "Container trainer was killed by SIGKILL (exit code 137)."),
        (1, "KeyError: 3", "TrainerError", "Container trainer ended with exit code 1. It said: KeyError: 3"),
        (1, "NCCL error: remote process exited", "CommunicationError", "The workers lost each other."),
    ],
)
def test_a_worker_that_could_not_explain_itself_is_explained(
    cluster: Cluster, namespace: str, code: int, last_words: str, cause: str, says: str
) -> None:
    cluster.apply(fine_tune_job("tune", recovery={"maxRestarts": 0}), namespace=namespace)
    pods = workers(cluster, namespace, "tune")
    end(cluster, pods[1], code, word=last_words)
    failed = cluster.wait_for_condition(JOBS, "tune", "Failed", namespace=namespace)["status"]
    assert [(a["cause"], a["exitCode"]) for a in failed["attempts"]] == [(cause, code)]
    assert says in failed["attempts"][0]["message"]


def test_workers_that_hang_are_made_anew(cluster: Cluster, namespace: str, trainers: Trainers) -> None:
    cluster.apply(fine_tune_job("tune"), namespace=namespace)
    pods = workers(cluster, namespace, "tune")
    now = datetime.now(UTC).isoformat()
    trainers.say(
        pods[0], phase="training", step=3, max_steps=9, last_step_time=now, heartbeats={"0": 599.0, "9": 601.0}
    )
    workers(cluster, namespace, "tune", attempt=2)
    hung = cluster.get(JOBS, "tune", namespace=namespace)["status"]["attempts"][0]
    assert (hung["cause"], hung["counted"], hung["lastStep"]) == ("Stalled", True, 3)
    assert hung["message"] == (
        "The workers made no progress for 601 s (recovery.hangTimeout is 600 s). Rank 9 has been silent the longest."
    )


def test_a_killed_pod_costs_no_restart(cluster: Cluster, namespace: str) -> None:
    cluster.apply(fine_tune_job("tune", recovery={"maxRestarts": 0}), namespace=namespace)
    pods = workers(cluster, namespace, "tune")
    cluster.kubectl("delete", "pod", pods[1]["metadata"]["name"], "-n", namespace, "--wait=false")
    workers(cluster, namespace, "tune", attempt=2)
    status = wait_for_state(cluster, namespace, "tune", "Restarting")
    assert (status["restarts"], status["countedRestarts"]) == (1, 0)
    assert [a["cause"] for a in status["attempts"]] == ["Terminated", ""]


def test_a_node_that_cannot_start_containers_is_left_and_the_job_goes_on(cluster: Cluster, namespace: str) -> None:
    cluster.apply(fine_tune_job("tune", recovery={"maxRestarts": 1}), namespace=namespace)
    pods = workers(cluster, namespace, "tune")
    said = "failed to create shim task: nvidia-container-cli: initialization error: driver/library version mismatch"
    end(cluster, pods[1], 128, reason="StartError", word=said)
    again = workers(cluster, namespace, "tune", attempt=2)
    broken = pods[1]["spec"]["nodeName"]
    assert broken not in {pod["spec"]["nodeName"] for pod in again}
    first = cluster.get(JOBS, "tune", namespace=namespace)["status"]["attempts"][0]
    assert (first["cause"], first["node"], first["nodeSuspect"]) == ("GPUError", broken, True)
    assert said in first["message"]


# --- failures of nodes ---


@pytest.mark.parametrize("may_read_nodes", [True, False])
def test_a_node_that_dies_is_left_and_kept_out(
    cluster: Cluster, namespace: str, own: str, may_read_nodes: bool
) -> None:
    """As where the machine is gone: its pod is never confirmed to have ended, and must not be waited for."""
    with contextlib.nullcontext() if may_read_nodes else without_right(cluster, own, "get", "nodes"):
        leave_a_dead_node(cluster, namespace)


def leave_a_dead_node(cluster: Cluster, namespace: str) -> None:
    cluster.apply(fine_tune_job("tune", profile="on-silent-nodes"), namespace=namespace)
    pods = workers(cluster, namespace, "tune")
    dead, silent = pods[1]["spec"]["nodeName"], pods[0]["metadata"]["name"]
    cluster.kubectl("annotate", "node", dead, "simulate.finetune.dev/not-ready=true")
    try:
        wait_for_reason(cluster, namespace, "tune", "Progressing", "Restarting")
        # The other worker's node is well: its kubelet ends the pod.
        cluster.kubectl("annotate", "pod", silent, "-n", namespace, "simulate.finetune.dev/silent-")
        again = workers(cluster, namespace, "tune", attempt=2)
    finally:
        cluster.kubectl("annotate", "node", dead, "simulate.finetune.dev/not-ready-")
    assert dead not in {pod["spec"]["nodeName"] for pod in again}
    status = cluster.get(JOBS, "tune", namespace=namespace)["status"]
    lost = status["attempts"][0]
    assert (lost["cause"], lost["pod"], lost["node"]) == ("NodeLost", pods[1]["metadata"]["name"], dead)
    assert (lost["nodeSuspect"], lost["counted"], status["countedRestarts"]) == (True, False, 0)
    assert dead in lost["message"]


# --- the end of a job ---


def test_a_finished_job_goes_after_its_time_and_takes_its_children_along(cluster: Cluster, namespace: str) -> None:
    cluster.apply(fine_tune_job("tune"), namespace=namespace)
    first, second = workers(cluster, namespace, "tune")
    end(cluster, first, 0, word=result("tune"))
    end(cluster, second, 0)
    cluster.wait_for_condition(JOBS, "tune", "Complete", namespace=namespace)
    assert cluster.objects("pods", namespace=namespace)  # they stay for their logs
    change(cluster, namespace, "tune", ttlSecondsAfterFinished=1)
    cluster.wait_gone(JOBS, name="tune", namespace=namespace)
    wait_until_no_child_is_left(cluster, namespace)


def test_a_running_job_that_is_deleted_leaves_nothing(cluster: Cluster, namespace: str) -> None:
    cluster.apply(fine_tune_job("tune"), namespace=namespace)
    workers(cluster, namespace, "tune")
    made = cluster.kubectl("get", CHILDREN, "-n", namespace, "-l", "finetune.dev/job=tune", "-o", "name").split()
    assert {name.partition("/")[0] for name in made} == {
        "job.batch", "pod", "service", "networkpolicy.networking.k8s.io", "configmap",
    }  # fmt: skip
    cluster.kubectl("delete", "ftj", "tune", "-n", namespace)
    wait_until_no_child_is_left(cluster, namespace)


def test_a_job_made_anew_has_nothing_of_the_one_before(cluster: Cluster, namespace: str) -> None:
    """``kubectl replace --force``: what was made for the job before is still there, and its workers are slow to end."""
    cluster.apply(fine_tune_job("tune", profile="on-silent-nodes"), namespace=namespace)
    before = workers(cluster, namespace, "tune")
    cluster.kubectl("delete", "ftj", "tune", "-n", namespace)
    cluster.apply(fine_tune_job("tune", training={"learning_rate": 0.5}), namespace=namespace)
    clearing = wait_for_reason(cluster, namespace, "tune", "Progressing", "Restarting")
    assert clearing["message"] == "Clearing what is left of an earlier job of this name."
    cluster.kubectl("annotate", "pod", "-n", namespace, "--all", "simulate.finetune.dev/silent-")
    cluster.wait_for("pods", lambda pods: len(pods) == 2 and not uids(before) & uids(pods), namespace=namespace)
    status = wait_for_state(cluster, namespace, "tune", "Starting")
    assert [(a["number"], a["cause"]) for a in status["attempts"]] == [(1, "")]
    config = json.loads(cluster.get("configmaps", "tune-config", namespace=namespace)["data"]["config.json"])
    assert config["training"]["learning_rate"] == 0.5
    told(cluster, namespace, "tune", last="AttemptStarted")


def test_what_was_decided_of_a_job_is_not_done_to_the_next_of_its_name(cluster: Cluster, namespace: str) -> None:
    """By the operator's own client, which has read a job that was deleted and made anew since."""
    cluster.apply(fine_tune_job("tune", suspend=True), namespace=namespace)
    status = wait_for_state(cluster, namespace, "tune", "Suspended")
    there = cluster.get(JOBS, "tune", namespace=namespace)
    client = KubernetesCluster(kubernetes_config.new_client_from_config(str(cluster.kubeconfig)))
    before = {**there, "metadata": {**there["metadata"], "uid": "of-the-one-before"}}
    assert not client.patch_status(before, {"state": "Failed"})
    client.delete_job(before)
    assert cluster.get(JOBS, "tune", namespace=namespace)["status"] == status
    assert client.events_of(before) == []  # field selectors of events, too, go by the uid
    assert {event["involvedObject"]["uid"] for event in client.events_of(there)} == {there["metadata"]["uid"]}
    with pytest.raises(ClusterError, match=r"Could not write the status of FineTuneJob .*/tune: 422 .*restarts"):
        client.patch_status(there, {"restarts": "many"})
    assert client.patch_status(there, status)
    client.delete_job(there)
    cluster.wait_gone(JOBS, name="tune", namespace=namespace)
    assert not client.patch_status(there, status)
    client.delete_job(there)


# --- what is there already, and is not the job's ---


LLAMA: list[Object] = [
    {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "llama-config"}, "data": {"prompts": "precious"}},
    {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "qwen-workers"},
        "spec": {"clusterIP": "None", "selector": {"app": "qwen"}, "ports": [{"name": "rpc", "port": 5000}]},
    },
    {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "bert-workers"},
        "spec": {"podSelector": {"matchLabels": {"app": "bert"}}, "policyTypes": ["Ingress"], "ingress": []},
    },
    {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "phi-a1"},
        "spec": {"suspend": True, "template": {"spec": {
            "restartPolicy": "Never", "containers": [{"name": "own", "image": "own"}],
        }}},
    },
]  # fmt: skip
"""Objects of others under names that jobs llama, qwen, bert and phi need."""


def test_what_others_have_under_a_name_we_need_is_left_alone_and_told(cluster: Cluster, namespace: str) -> None:
    cluster.apply(*LLAMA, namespace=namespace)
    theirs = {thing["kind"]: thing["metadata"]["name"] for thing in LLAMA}

    def as_they_are() -> list[tuple[str, str, str]]:
        names = [f"{kind.lower()}/{name}" for kind, name in theirs.items()]
        found = json.loads(cluster.kubectl("get", *names, "-n", namespace, "-o", "json"))["items"]
        return sorted((o["metadata"]["name"], o["metadata"]["uid"], o["metadata"]["resourceVersion"]) for o in found)

    before = as_they_are()
    jobs = {kind: name.partition("-")[0] for kind, name in theirs.items()}
    cluster.apply(*(fine_tune_job(name) for name in jobs.values()), namespace=namespace)
    for kind, name in jobs.items():
        taken = wait_for_reason(cluster, namespace, name, "PodsReady", "NameTaken")["message"]
        assert taken.startswith(f"{kind} {theirs[kind]} is there already, and is not this job's.")
        assert f"kubectl delete {kind.lower()} {theirs[kind]} -n {namespace}" in taken
        stalled = cluster.get(JOBS, name, namespace=namespace)
        assert condition(stalled, "Stalled")["status"] == "True"
        assert stalled["status"]["state"] == shown(cluster, namespace, name)["STATE"] == "Pending"
        assert ("Warning", "NameTaken", taken) in told(cluster, namespace, name, last="NameTaken")
    # The name is free: the job goes on by itself.
    cluster.kubectl("delete", "job", "phi-a1", "-n", namespace)
    look_again(cluster, namespace, "phi", "Job")
    workers(cluster, namespace, "phi")
    del theirs["Job"]
    before = [entry for entry in before if entry[0] != "phi-a1"]

    cluster.kubectl("delete", "ftj", "--all", "-n", namespace)
    for name in ("llama-workers", "qwen-config", "bert-config", "phi-config"):  # their own go with them
        cluster.wait_gone("services" if name.endswith("workers") else "configmaps", name=name, namespace=namespace)
    assert as_they_are() == before


def look_again(cluster: Cluster, namespace: str, name: str, freed: str) -> None:
    """Whoever has freed a name need not wait for the next look: every change of the FineTuneJob is one."""
    cluster.kubectl("annotate", "ftj", name, f"example.com/freed={freed}", "--overwrite", "-n", namespace)


def test_what_an_earlier_job_left_behind_is_not_taken_for_ones_own(cluster: Cluster, namespace: str) -> None:
    cluster.apply(fine_tune_job("tune"), namespace=namespace)
    orphans = workers(cluster, namespace, "tune")
    cluster.kubectl("delete", "ftj", "tune", "-n", namespace, "--cascade=orphan")
    cluster.apply(fine_tune_job("tune", training={"learning_rate": 0.5}), namespace=namespace)
    taken = wait_for_reason(cluster, namespace, "tune", "PodsReady", "NameTaken")["message"]
    assert "tune-a1-0-" in taken
    cluster.kubectl("delete", "job", "tune-a1", "-n", namespace)
    cluster.wait_gone("pods", selector="finetune.dev/job=tune", namespace=namespace)
    look_again(cluster, namespace, "tune", "Job")

    def named(kind: str) -> None:
        def so(jobs: list[Object]) -> bool:
            return condition(jobs[0], "PodsReady")["message"].startswith(f"{kind} tune-")

        cluster.wait_for(JOBS, so, name="tune", namespace=namespace)
        left = wait_for_reason(cluster, namespace, "tune", "PodsReady", "NameTaken")["message"]
        assert "An earlier FineTuneJob of this name left it behind" in left
        cluster.kubectl("delete", left.split()[0].lower(), left.split()[1], "-n", namespace)
        look_again(cluster, namespace, "tune", kind)

    for kind in ("ConfigMap", "Service", "NetworkPolicy"):
        named(kind)
    config = cluster.wait_for(
        "configmaps", lambda found: found[0] if found else None, name="tune-config", namespace=namespace
    )
    assert config
    assert json.loads(config["data"]["config.json"])["training"]["learning_rate"] == 0.5
    assert not uids(orphans) & uids(workers(cluster, namespace, "tune"))


def test_what_is_another_s_since_it_was_read_is_neither_changed_nor_deleted(cluster: Cluster, namespace: str) -> None:
    """By the operator's own client, between whose reading and writing an object was made anew by someone else."""
    client = KubernetesCluster(kubernetes_config.new_client_from_config(str(cluster.kubeconfig)))
    cluster.apply(fine_tune_job("tune", suspend=True), namespace=namespace)
    job = cluster.get(JOBS, "tune", namespace=namespace)
    owner = {"apiVersion": job["apiVersion"], "kind": "FineTuneJob", "name": "tune", "uid": job["metadata"]["uid"]}
    metadata = {"name": "tune-workers", "namespace": namespace, "ownerReferences": [{**owner, "controller": True}]}
    spec = {"clusterIP": "None", "selector": {"a": "b"}, "ports": [{"name": "metrics", "port": 1, "protocol": "TCP"}]}
    service: Object = {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}
    there = client._there
    theirs = LLAMA[1] | {"metadata": {"name": "tune-workers"}}

    def another(*place: str) -> Object | None:
        found = there(*place)
        if found is not None:
            cluster.kubectl("delete", "service", "tune-workers", "-n", namespace)
        cluster.apply(theirs, namespace=namespace)
        return found

    client._there = another  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match="409"):
        client.apply(service)  # it is made
    cluster.kubectl("delete", "service", "tune-workers", "-n", namespace)
    client._there = there  # type: ignore[method-assign]
    client.apply(service)
    old = cluster.get("services", "tune-workers", namespace=namespace)["metadata"]["uid"]
    client._there = another  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match="409"):
        client.apply(service)  # it is brought up to date
    client._there = there  # type: ignore[method-assign]
    client.delete("Service", namespace, "tune-workers", old)
    left = cluster.get("services", "tune-workers", namespace=namespace)
    assert (left["spec"]["selector"], "ownerReferences" in left["metadata"]) == ({"app": "qwen"}, False)


def wait_until_no_child_is_left(cluster: Cluster, namespace: str) -> None:
    for kind in ("pods", BATCH_JOBS, "services", "networking.k8s.io/v1/networkpolicies", "configmaps"):
        cluster.wait_gone(kind, selector="finetune.dev/job=tune", namespace=namespace)
