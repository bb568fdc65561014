"""What a job can wait for, and how it says so: the real operator at a real API server, with simulated pods."""

from __future__ import annotations

import json
import time

import pytest

from finetune_api.causes import Cause
from finetune_api.run import CheckpointInfo, Termination
from tests import PATIENCE
from tests.chart.judges import judge
from tests.cluster.access import Object
from tests.cluster.cluster import Cluster
from tests.operator.jobs_on_a_cluster import (
    BATCH_JOBS,
    CHILDREN,
    JOBS,
    change,
    condition,
    end,
    fine_tune_job,
    result,
    shown,
    told,
    wait_for_reason,
    wait_for_state,
    workers,
)
from tests.operator.operator_process import OperatorProcess, Trainers, without_right

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]


# --- what a job waits for ---


def test_a_chain_waits_for_its_first_job_and_starts_from_its_output(cluster: Cluster, namespace: str) -> None:
    second = fine_tune_job("second", model={"uri": "job://first"})
    cluster.apply(second, namespace=namespace)
    waiting = wait_for_reason(cluster, namespace, "second", "InputsReady", "WaitingForJob")
    assert waiting["message"] == "Waiting for FineTuneJob first, which does not exist yet."
    cluster.apply(fine_tune_job("first"), namespace=namespace)
    pods = workers(cluster, namespace, "first")
    waits = "Waiting for FineTuneJob first (Starting)."
    cluster.wait_for(
        JOBS, lambda jobs: condition(jobs[0], "InputsReady")["message"] == waits, name="second", namespace=namespace
    )
    assert wait_for_state(cluster, namespace, "second", "Waiting")
    assert not cluster.objects(BATCH_JOBS, namespace=namespace, selector="finetune.dev/job=second")

    end(cluster, pods[0], 0, word=result("first"))
    end(cluster, pods[1], 0)
    workers(cluster, namespace, "second")
    started = cluster.get(JOBS, "second", namespace=namespace)
    assert condition(started, "InputsReady")["status"] == "True"
    config = json.loads(cluster.get("configmaps", "second-config", namespace=namespace)["data"]["config.json"])
    assert config["model"]["uri"] == "s3://team/first"


def test_a_chain_tells_that_its_first_job_has_failed(cluster: Cluster, namespace: str) -> None:
    first, second = fine_tune_job("first"), fine_tune_job("second", model={"uri": "job://first"})
    cluster.apply(first, second, namespace=namespace)
    pods = workers(cluster, namespace, "first")
    end(cluster, pods[0], 64, word=Termination(cause=Cause.ACCESS_DENIED, message="no", exit_code=64))
    failed = wait_for_reason(cluster, namespace, "second", "InputsReady", "InputJobFailed")
    assert (failed["status"], failed["message"]) == (
        "False", "FineTuneJob first has failed; this job waits for its output.",
    )  # fmt: skip
    stalled = wait_for_reason(cluster, namespace, "second", "Stalled", "InputJobFailed")
    assert (stalled["status"], stalled["message"]) == ("True", failed["message"])
    assert not cluster.objects(BATCH_JOBS, namespace=namespace, selector="finetune.dev/job=second")


def test_a_job_is_suspended_before_it_starts_and_while_it_runs(
    cluster: Cluster, namespace: str, trainers: Trainers
) -> None:
    cluster.apply(fine_tune_job("tune", suspend=True), namespace=namespace)
    cluster.wait_for_condition(JOBS, "tune", "Suspended", namespace=namespace)
    assert not cluster.kubectl("get", CHILDREN, "-n", namespace, "-l", "finetune.dev/job", "-o", "name")

    change(cluster, namespace, "tune", suspend=False)
    pods = workers(cluster, namespace, "tune")
    saved = CheckpointInfo(step=5, uri="s3://team/tune/checkpoints/step-5")
    trainers.say(pods[0], phase="training", step=6, max_steps=10, checkpoints=[saved])
    wait_for_state(cluster, namespace, "tune", "Running")
    change(cluster, namespace, "tune", suspend=True)
    suspended = cluster.wait_for_condition(JOBS, "tune", "Suspended", namespace=namespace)
    assert not cluster.objects("pods", namespace=namespace)
    assert condition(suspended, "Suspended")["message"] == (
        "Suspended; set spec.suspend: false to continue from step 5."
    )

    change(cluster, namespace, "tune", suspend=False)
    workers(cluster, namespace, "tune", attempt=2)
    status = wait_for_state(cluster, namespace, "tune", "Starting")
    assert ([a["cause"] for a in status["attempts"]], status["restarts"]) == (["Suspended", ""], 0)


QUEUE = """
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {name: a-queue}
spec:
  matchConstraints:
    resourceRules:
    - {apiGroups: [batch], apiVersions: [v1], operations: [CREATE], resources: [jobs]}
  matchConditions:
  - {name: queued, expression: "'kueue.x-k8s.io/queue-name' in object.metadata.?labels.orValue({})"}
  failurePolicy: Fail
  reinvocationPolicy: Never
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration: {expression: "Object{spec: Object.spec{suspend: true}}"}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {name: a-queue}
spec: {policyName: a-queue}
"""


def wait_until_it_queues(cluster: Cluster, namespace: str) -> None:
    """The API server obeys a new policy after a moment, and tells nobody when."""
    container = {"name": "none", "image": "none"}
    probe = {
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {"name": "probe", "labels": {"kueue.x-k8s.io/queue-name": "team"}},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }  # fmt: skip
    create = ("create", "--dry-run=server", "-o", "json", "-n", namespace, "-f", "-")
    deadline = time.monotonic() + PATIENCE
    while not json.loads(cluster.kubectl(*create, input=json.dumps(probe)))["spec"].get("suspend"):
        assert time.monotonic() < deadline


def test_a_queue_holds_a_job_back_and_lets_it_go(cluster: Cluster, namespace: str) -> None:
    """A queue such as Kueue makes the batch Job a suspended one, and undoes it when there is room."""
    cluster.apply(QUEUE)
    try:
        wait_until_it_queues(cluster, namespace)
        job = fine_tune_job("tune")
        job["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "team"}
        cluster.apply(job, namespace=namespace)
        queued = wait_for_reason(cluster, namespace, "tune", "PodsReady", "Queued")
        assert queued["message"] == "0 of 2 workers run. The queue holds Job tune-a1 back."
        columns = shown(cluster, namespace, "tune")
        assert [columns[c] for c in ("STATE", "GPUS", "MESSAGE")] == ["Queued", "0", queued["message"]]
        assert ("Normal", "Queued", queued["message"]) in told(cluster, namespace, "tune", last="Queued")
        cluster.kubectl("label", "ftj", "tune", "kueue.x-k8s.io/priority-class=high", "-n", namespace)
        high = "kueue.x-k8s.io/priority-class=high,kueue.x-k8s.io/queue-name=team"
        cluster.wait_for(BATCH_JOBS, bool, namespace=namespace, selector=high)
        cluster.kubectl("patch", "job", "tune-a1", "-n", namespace, "-p", '{"spec": {"suspend": false}}')
        workers(cluster, namespace, "tune")
        ready = wait_for_reason(cluster, namespace, "tune", "PodsReady", "PodsRunning")
        assert ready["status"] == "True"

        # It takes the room back for something more urgent: that is no failure of the run.
        cluster.kubectl("patch", "job", "tune-a1", "-n", namespace, "-p", '{"spec": {"suspend": true}}')
        ended = cluster.wait_for(
            JOBS, lambda jobs: [a for a in jobs[0]["status"]["attempts"] if a.get("endTime")], name="tune",
            namespace=namespace,
        )  # fmt: skip
        assert (ended[0]["cause"], ended[0]["counted"]) == ("Preempted", False)
        assert ended[0]["message"].startswith("Queue team took its room back: Job tune-a1 was suspended")
        wait_for_reason(cluster, namespace, "tune", "PodsReady", "Queued")
        status = cluster.get(JOBS, "tune", namespace=namespace)["status"]
        assert status["countedRestarts"] == 0
    finally:
        cluster.kubectl("delete", "mutatingadmissionpolicy,mutatingadmissionpolicybinding", "a-queue")


def test_a_quota_that_is_used_up_is_told(cluster: Cluster, namespace: str) -> None:
    """One on cpu and memory asks every container for them, also the one that fetches, of which users say nothing."""
    quota = {"hard": {"requests.nvidia.com/gpu": "8", "requests.cpu": "8", "limits.memory": "64Gi"}}
    cluster.apply(
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "gpus"}, "spec": quota}, namespace=namespace
    )
    cluster.wait_for("resourcequotas", lambda found: found[0].get("status", {}).get("hard"), namespace=namespace)
    trainer = {"name": "trainer", "resources": {"requests": {"cpu": "4"}, "limits": {"memory": "32Gi"}}}
    template = {"spec": {"containers": [trainer]}}
    gang = {"replicas": 2, "gpusPerWorker": 8, "template": template}
    cluster.apply(fine_tune_job("tune", workers=gang), namespace=namespace)

    def exceeded(jobs: list[Object]) -> Object | None:
        ready = condition(jobs[0], "PodsReady")
        return ready if ready["message"].startswith("1 of 2 workers run. No further") else None

    found = cluster.wait_for(JOBS, exceeded, name="tune", namespace=namespace)
    assert found
    assert found["reason"] == "QuotaExceeded"
    assert "No further pod can be made: exceeded quota: gpus, requested: " in found["message"]
    more = '{"spec": {"hard": {"requests.nvidia.com/gpu": "16"}}}'
    cluster.kubectl("patch", "resourcequota", "gpus", "-n", namespace, "-p", more)
    wait_for_reason(cluster, namespace, "tune", "PodsReady", "PodsRunning")


def test_pods_that_are_refused_are_told_in_the_words_of_who_refuses(cluster: Cluster, namespace: str) -> None:
    template = {"spec": {"serviceAccountName": "nobody"}}
    cluster.apply(fine_tune_job("tune", workers={"template": template}), namespace=namespace)
    words = "No further pod can be made: error looking up service account"
    cluster.wait_for(
        JOBS, lambda jobs: words in condition(jobs[0], "PodsReady")["message"], name="tune", namespace=namespace
    )


def test_pods_without_a_place_are_told_in_the_words_of_the_scheduler(cluster: Cluster, namespace: str) -> None:
    cluster.apply(fine_tune_job("tune", workers={"replicas": 1, "gpusPerWorker": 16}), namespace=namespace)
    found = wait_for_reason(cluster, namespace, "tune", "PodsReady", "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in found["message"]
    columns = shown(cluster, namespace, "tune")
    assert (columns["STATE"], columns["GPUS"]) == ("Starting", "0")
    assert columns["MESSAGE"].startswith("0 of 1 workers run. No node for tune-a1-0-")
    events = told(cluster, namespace, "tune", last="Unschedulable")
    assert [message for kind, reason, message in events if (kind, reason) == ("Warning", "Unschedulable")] == [
        found["message"]
    ]


# --- mistakes and errors ---


def test_mistakes_the_api_server_cannot_see_are_all_told_and_corrected(cluster: Cluster, namespace: str) -> None:
    wrong = fine_tune_job(
        "tune",
        method={"type": "lora", "target_modules": "q_proj,v_proj"},
        training={"lr_scheduler_kwargs": {"num_cycle": 2}},
    )
    cluster.apply(wrong, namespace=namespace)
    told_why = wait_for_reason(cluster, namespace, "tune", "Accepted", "InvalidSpec")
    assert told_why["status"] == "False"
    assert len(told_why["message"].splitlines()) == 2
    # More of them than a condition holds.
    many = {f"no_such_thing_{number}": number for number in range(1000)}
    cluster.apply(fine_tune_job("many", training={"lr_scheduler_kwargs": many}), namespace=namespace)
    assert len(wait_for_reason(cluster, namespace, "many", "Accepted", "InvalidSpec")["message"]) == 32768
    assert "spec.method.target_modules: " in told_why["message"]
    assert "spec.training.lr_scheduler_kwargs.num_cycle: " in told_why["message"]
    invalid = wait_for_state(cluster, namespace, "tune", "Invalid")
    assert condition({"status": invalid}, "Stalled")["status"] == "True"
    assert not cluster.kubectl("get", CHILDREN, "-n", namespace, "-l", "finetune.dev/job", "-o", "name")

    cluster.apply(fine_tune_job("tune"), namespace=namespace)
    cluster.wait_for_condition(JOBS, "tune", "Accepted", namespace=namespace)
    workers(cluster, namespace, "tune")
    started = cluster.get(JOBS, "tune", namespace=namespace)
    assert condition(started, "Stalled")["status"] == "False"
    assert started["status"]["observedGeneration"] == started["metadata"]["generation"] == 2


def test_what_the_api_server_does_not_know_in_a_template_is_told_and_everything_can_be_corrected(
    cluster: Cluster, namespace: str, operator: OperatorProcess
) -> None:
    misspelt = {
        "affinity": {"nodeAffinty": {}},
        "securityContext": {"runAsUsr": 1000},
        "containers": [{"name": "trainer", "resources": {"limit": {"memory": "64Gi"}}}],
    }
    errors = operator.metric("finetune_operator_reconcile_errors_total")
    cluster.apply(fine_tune_job("tune", workers={"replicas": 1, "template": {"spec": misspelt}}), namespace=namespace)
    said = wait_for_reason(cluster, namespace, "tune", "Accepted", "InvalidSpec")["message"]
    assert said.startswith("spec.workers.template, or the template of profile default: ")
    for field in ("affinity.nodeAffinty", "securityContext.runAsUsr", "containers[0].resources.limit"):
        assert f'unknown field "spec.template.spec.{field}"' in said
    assert shown(cluster, namespace, "tune")["STATE"] == "Invalid"
    stalled = cluster.get(JOBS, "tune", namespace=namespace)
    assert condition(stalled, "Stalled")["status"] == "True"
    assert stalled["status"]["attempts"] == []
    assert said[:1024] in {message for _, _, message in told(cluster, namespace, "tune", last="Invalid")}
    assert operator.metric("finetune_operator_reconcile_errors_total") == errors

    # Nothing has run: what changes the result may still be corrected, too. (A quantity is text or a number.)
    trainer = {"name": "trainer", "resources": {"requests": {"cpu": 1}}}
    right = {"replicas": 1, "template": {"spec": {"containers": [trainer]}}}
    cluster.apply(fine_tune_job("tune", workers=right, training={"learning_rate": 0.5}), namespace=namespace)
    workers(cluster, namespace, "tune", count=1)
    config = json.loads(cluster.get("configmaps", "tune-config", namespace=namespace)["data"]["config.json"])
    assert config["training"]["learning_rate"] == 0.5
    cluster.wait_for_condition(JOBS, "tune", "Accepted", namespace=namespace)


def test_a_quota_on_jobs_and_a_policy_that_denies_are_told_from_the_first_pass_on(
    cluster: Cluster, namespace: str
) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "jobs"}}
    cluster.apply({**quota, "spec": {"hard": {"count/jobs.batch": "0"}}}, namespace=namespace)
    cluster.wait_for("resourcequotas", lambda found: found[0].get("status", {}).get("hard"), namespace=namespace)
    cluster.apply(fine_tune_job("tune"), namespace=namespace)
    said = wait_for_reason(cluster, namespace, "tune", "PodsReady", "QuotaExceeded")["message"]
    assert "exceeded quota: jobs, requested: count/jobs.batch=1" in said
    waiting = cluster.get(JOBS, "tune", namespace=namespace)
    assert (waiting["status"]["state"], condition(waiting, "Stalled")["status"]) == ("Pending", "False")
    assert ("Warning", "QuotaExceeded", said) in told(cluster, namespace, "tune", last="QuotaExceeded")
    cluster.kubectl("delete", "resourcequota", "jobs", "-n", namespace)

    denies = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": namespace}}
    here = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    policy = {
        "matchConstraints": {"resourceRules": [rule]},
        "validations": [{"expression": "!object.metadata.name.startsWith('big')", "message": "not on Fridays"}],
    }
    binding = {"policyName": namespace, "validationActions": ["Deny"], "matchResources": {"namespaceSelector": here}}
    try:
        cluster.apply(
            {**denies, "kind": "ValidatingAdmissionPolicy", "spec": policy},
            {**denies, "kind": "ValidatingAdmissionPolicyBinding", "spec": binding},
        )
        canary = ["create", "job", "big", "--image=x", "-n", namespace, "--dry-run=server"]
        while cluster.try_kubectl(*canary).returncode == 0:  # a policy is not in force at once, and nothing tells when
            time.sleep(0.1)
        cluster.apply(fine_tune_job("big"), namespace=namespace)
        said = wait_for_reason(cluster, namespace, "big", "PodsReady", "Refused")["message"]
        assert "denied request: not on Fridays" in said
        stalled = cluster.get(JOBS, "big", namespace=namespace)
        assert (stalled["status"]["state"], condition(stalled, "Stalled")["status"]) == ("Pending", "True")
    finally:
        cluster.kubectl(
            "delete", "validatingadmissionpolicy,validatingadmissionpolicybinding", namespace, "--ignore-not-found"
        )


def test_a_right_that_is_lost_is_told_and_found_again(
    cluster: Cluster, namespace: str, own: str, operator: OperatorProcess
) -> None:
    errors = operator.metric("finetune_operator_reconcile_errors_total")
    assert errors is not None
    with without_right(cluster, own, "create", "jobs"):
        cluster.apply(fine_tune_job("tune"), namespace=namespace)
        told_why = wait_for_reason(cluster, namespace, "tune", "Reconciled", "ReconcileError")
        assert shown(cluster, namespace, "tune")["STATE"] == "Pending"
    assert told_why["status"] == "False"
    assert f"Could not apply Job {namespace}/tune-a1: 403 " in told_why["message"]
    assert 'cannot create resource "jobs"' in told_why["message"]
    there = cluster.get(JOBS, "tune", namespace=namespace)
    create = ("create", "--dry-run=server", "-o", "json", "-n", namespace, "-f", "-")
    unseen = json.loads(cluster.kubectl(*create, input=json.dumps(fine_tune_job("unseen"))))
    assert [v.kstatus for v in judge([there, unseen])] == ["InProgress", "InProgress"]
    now = operator.metric("finetune_operator_reconcile_errors_total")
    assert now is not None
    assert now > errors

    workers(cluster, namespace, "tune")
    cluster.wait_for_condition(JOBS, "tune", "Reconciled", namespace=namespace)
    assert len(cluster.get(JOBS, "tune", namespace=namespace)["status"]["attempts"]) == 1
