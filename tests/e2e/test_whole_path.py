"""Apply one file, and a real model is trained on a real cluster."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from tests.chart.test_dashboards import QUERIES, filled_in
from tests.cluster.sandbox import commands
from tests.e2e.product import BUCKET, JOBS, SYSTEM, Product, self_cognition

pytestmark = pytest.mark.e2e

SAVE_STEPS = 20


@pytest.mark.usefixtures("example_data")
def test_the_example_trains_on_two_nodes_from_s3_and_leaves_nothing_behind(
    product: Product, team: str, printed: Callable[[str], str]
) -> None:
    """The example of ``make demo`` with the real SmolLM2, storage on S3, two workers, ZeRO-2 and torchrun."""
    from examples import demo

    cluster, gate = product.cluster, product.gate("self-cognition", team)
    gate.hold(3)  # what is seen of a run that trains is looked at in peace
    job = self_cognition(demo.MODEL, replicas=2)
    cluster.apply(yaml.safe_dump(job), namespace=team)

    training = product.wait_step("self-cognition", team, 3)
    assert training["status"]["state"] == "Running"
    pods = cluster.objects("pods", namespace=team)
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    log = cluster.kubectl("logs", "-n", team, pods[0]["metadata"]["name"], "-c", "trainer")
    assert "ZeRO-2" in log + cluster.kubectl("logs", "-n", team, pods[1]["metadata"]["name"], "-c", "trainer")
    check_scraped(product, team)
    check_queries(product)

    gate.open()
    done = product.wait_state("self-cognition", team, "Succeeded")["status"]
    assert done["restarts"] == 0
    assert [c["step"] for c in done["checkpoints"]] == [20, 23]  # save_steps 10, save_total_limit 2, 23 steps
    mine = [o["Key"] for o in listing(product, "checkpoints/") if "/self-cognition/step-" in o["Key"]]
    kept = {key.split("/step-")[1].split("/")[0] for key in mine}
    assert {int(step) for step in kept} == {20, 23}
    for checkpoint in done["checkpoints"]:
        check_digests(product, checkpoint["uri"], checkpoint["digest"])
    assert {o["kind"] for o in done["outputs"]} == {"adapter"}
    for output in done["outputs"]:
        check_digests(product, output["uri"], output["digest"])
    names = {o["Key"].split("/")[-1] for o in listing(product, "models/self-cognition")}
    expected = {"adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "loss.png", "report.html"}
    assert expected <= names
    report = product.s3().get_object(Bucket=BUCKET, Key="models/self-cognition/report.html")["Body"].read().decode()
    assert "Nova" in report
    metrics = product.s3().get_object(Bucket=BUCKET, Key="models/self-cognition/metrics.jsonl")["Body"].read()
    losses = [json.loads(line)["loss"] for line in metrics.splitlines()]
    assert losses[-1] < 0.5 < 2 < losses[0]

    seen = printed("Succeeded")
    assert "PROGRESS" in seen
    assert " %" in seen

    cluster.kubectl("delete", "ftj", "self-cognition", "-n", team)
    for resource in ("batch/v1/jobs", "pods", "networking.k8s.io/v1/networkpolicies"):
        cluster.wait_gone(resource, namespace=team)
    for resource in ("services", "configmaps"):
        cluster.wait_gone(resource, namespace=team, selector="finetune.dev/job")


def listing(product: Product, prefix: str) -> list[dict[str, Any]]:
    """Objects of the bucket."""
    return list(product.s3().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", []))


def check_digests(product: Product, uri: str, digest: str) -> None:
    """The manifest has the digest the status tells, and every file the digest and size the manifest tells."""
    key = uri.removeprefix(f"s3://{BUCKET}/").rstrip("/")
    body = product.s3().get_object(Bucket=BUCKET, Key=f"{key}/manifest.json")["Body"].read()
    assert f"sha256:{hashlib.sha256(body).hexdigest()}" == digest
    files = json.loads(body)["files"]
    assert files
    for name, told in files.items():
        content = product.s3().get_object(Bucket=BUCKET, Key=f"{key}/{name}")["Body"].read()
        assert len(content) == told["size"], name
        assert hashlib.sha256(content).hexdigest() == told["sha256"], name


def check_scraped(product: Product, team: str) -> None:
    """Prometheus has figures of both endpoints for the running job."""
    prometheus = product.wait_query(f'finetune_train_step{{namespace="{team}",finetunejob="self-cognition"}} > 0')
    assert prometheus
    assert product.wait_query(f'finetune_job_step{{namespace="{team}",finetunejob="self-cognition"}} > 0')
    since = f'finetune_job_running_timestamp_seconds{{namespace="{team}",finetunejob="self-cognition"}}'
    assert product.wait_query(f"time() - {since} > 0")
    assert product.wait_query("finetune_operator_leader == 1")


def check_queries(product: Product) -> None:
    """Every panel's query of both dashboards, and every alert's expression, is evaluated by the real Prometheus."""
    asked = [filled_in(target["expr"]) for _, _, target in QUERIES]
    assert len(asked) > 20
    for expression in asked:
        product.query(expression)
    groups = product.rules()
    alerts = [rule for group in groups for rule in group["rules"]]
    assert {"JobFailed", "JobStalled", "CheckpointTooOld", "RestartsHigh", "OperatorDown"} <= {
        a["name"] for a in alerts
    }
    assert [a["name"] for a in alerts if a["health"] == "err"] == []


def test_a_lost_worker_is_made_good_from_the_checkpoint(product: Product, team: str, tiny_model: str) -> None:
    """kill -9 of a trainer process in a pod: cause and exit code in the status, then success."""
    cluster, gate = product.cluster, product.gate("fragile", team)
    gate.hold(SAVE_STEPS + 4)
    job = tiny_job(tiny_model, product, "fragile", replicas=2, steps=2 * SAVE_STEPS)
    cluster.apply(json.dumps(job), namespace=team)
    product.wait("fragile", team, lambda status: status.get("checkpoints"))
    victim = next(
        p["metadata"]["name"]
        for p in cluster.objects("pods", namespace=team)
        if p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] == "1"
    )
    # From outside: in its own pid namespace nobody can kill a pod's first process.
    [process] = [pid for pid, command in commands() if b"--node-rank=1\0--master-addr=fragile-a1-0." in command]
    os.kill(process, signal.SIGKILL)
    gate.open()
    done = product.wait_state("fragile", team, "Succeeded")["status"]
    first, second = done["attempts"]
    assert (first["cause"], first["exitCode"], first["counted"]) == ("Killed", 137, True)
    assert first["pod"] == victim
    assert second["resumedFromStep"] == SAVE_STEPS
    assert done["restarts"] == 1


def test_suspend_gives_the_pods_back_and_resume_continues(product: Product, team: str, tiny_model: str) -> None:
    cluster, gate = product.cluster, product.gate("patient", team)
    gate.hold(5)
    job = tiny_job(tiny_model, product, "patient", replicas=1, steps=2 * SAVE_STEPS)
    cluster.apply(json.dumps(job), namespace=team)
    product.wait_step("patient", team, 5)
    cluster.kubectl("patch", "ftj", "patient", "-n", team, "--type=merge", "-p", '{"spec":{"suspend":true}}')
    product.wait_state("patient", team, "Suspended")
    assert cluster.objects("pods", namespace=team) == []
    gate.hold(8)
    cluster.kubectl("patch", "ftj", "patient", "-n", team, "--type=merge", "-p", '{"spec":{"suspend":false}}')
    product.wait_step("patient", team, 8)
    with nobody_there(product):  # it ends, and its pods go, before anybody has heard its last word
        gate.open()
        cluster.wait_for_condition("batch/v1/jobs", "patient-a2", "Complete", namespace=team)
        cluster.kubectl("delete", "pod", "-n", team, "-l", "finetune.dev/job=patient")
    product.wait_state("patient", team, "Finishing")
    done = product.wait_state("patient", team, "Succeeded")["status"]
    assert [a["cause"] for a in done["attempts"]] == ["Suspended", "Succeeded"]
    assert done["attempts"][1]["resumedFromStep"] == 6  # the step it was in is finished and saved
    [output] = done["outputs"]
    manifest = product.s3().get_object(Bucket=BUCKET, Key="models/patient/manifest.json")["Body"].read()
    assert output["digest"] == f"sha256:{hashlib.sha256(manifest).hexdigest()}", "read from the storage, by a pod"


@contextmanager
def nobody_there(product: Product) -> Iterator[None]:
    """No operator runs."""
    cluster, deployment = product.cluster, ("deployment/finetune-operator", "-n", SYSTEM)
    replicas = cluster.kubectl("get", *deployment, "-o", "jsonpath={.spec.replicas}")
    cluster.kubectl("scale", *deployment, "--replicas=0")
    cluster.wait_for("pods", lambda pods: not pods or None, namespace=SYSTEM)
    yield
    cluster.kubectl("scale", *deployment, f"--replicas={replicas}")


def test_a_model_that_does_not_fit_into_the_cache_is_counted_and_told_with_the_remedy(
    product: Product, team: str, tiny_model: str
) -> None:
    """The kubelet evicts the pod for a limit of its own: its node is well, and another try would end the same."""
    cluster, job = product.cluster, tiny_job(tiny_model, product, "large", replicas=1, steps=2)
    job["spec"] |= {"profile": "narrow", "recovery": {"maxRestarts": 0}}
    product.gate("large", team).hold(1)  # until the kubelet has looked
    cluster.apply(json.dumps(job), namespace=team)
    failed = cluster.wait_for_condition(JOBS, "large", "Failed", namespace=team)["status"]
    [attempt] = failed["attempts"]
    assert (attempt["cause"], attempt["counted"], attempt.get("nodeSuspect", False)) == ("OutOfDisk", True, False)
    assert "wrote more than 64Ki into its volume cache" in attempt["message"]
    assert "Raise cache.sizeLimit of the job's profile" in attempt["message"]


def tiny_job(model: str, product: Product, name: str, *, replicas: int, steps: int) -> dict[str, Any]:
    """A job of a tiny model. It lasts as long as its gate is held."""
    rows = "\n".join(
        json.dumps({"instruction": f"what color is the {thing}", "input": "", "output": f"{color} {color}"})
        for thing in ("cat", "dog", "bird", "fish", "tree", "house")
        for color in ("red", "green", "blue")
    )
    product.s3().put_object(Bucket=BUCKET, Key="colors.jsonl", Body=rows.encode())
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": model},
            "method": {"type": "full"},
            "data": {"train": [{"uri": f"s3://{BUCKET}/colors.jsonl"}], "max_length": 64},
            "training": {"max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
            "workers": {"replicas": replicas, "gpusPerWorker": 0},
            "checkpoint": {"save_steps": SAVE_STEPS},
            "output": {"uri": f"s3://{BUCKET}/models/{name}"},
        },
    }


def test_every_pod_of_the_operator_passes_restricted(product: Product) -> None:
    """The chart was installed into a namespace that enforces it; nothing was warned of."""
    product.cluster.wait_for_pods("app.kubernetes.io/component=operator", 2, namespace=SYSTEM)
