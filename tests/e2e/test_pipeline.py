"""One ``kubectl apply`` of examples/08: seven jobs, of which each waits for the one it starts from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import PATIENCE
from tests.cluster import images
from tests.e2e.conftest import upload
from tests.e2e.product import BUCKET, ROOT, Product

pytestmark = pytest.mark.e2e

STARTS_FROM = {"sft": "pretrain", "reward": "sft", "ppo": "reward", "dpo": "sft", "kto": "sft", "orpo": "pretrain"}
"""Of a stage the one whose output it waits for longest."""


def pipeline(model: str) -> list[dict[str, Any]]:
    """The jobs of the example as they stand: on a tiny model, with storage on S3, some steps each."""
    jobs = list(yaml.safe_load_all((ROOT / "examples" / "08-pipeline.yaml").read_text()))
    for job in jobs:
        spec = job["spec"]
        if not spec["model"]["uri"].startswith("job://"):
            spec["model"]["uri"] = model
        for source in (*spec["data"]["train"], *spec["data"].get("eval", [])):
            source["uri"] = source["uri"].replace("file://./data", f"s3://{BUCKET}/pipeline")
        if "evaluation" in spec:
            spec["evaluation"]["max_new_tokens"] = 4
        spec["training"] |= {"num_train_epochs": 1, "max_steps": 3}
        spec["output"]["uri"] = f"s3://{BUCKET}/models/{job['metadata']['name']}"
    return jobs


SIDECAR = f'image: "{images.BASE}", command: ["sleep", "inf"]'
"""Neither kind ends by itself."""
INJECTS = f"""
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {{name: sidecars}}
spec:
  failurePolicy: Fail
  reinvocationPolicy: Never
  matchConstraints:
    resourceRules: [{{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}}]
    objectSelector: {{matchLabels: {{finetune.dev/job: pipeline-pretrain}}}}
  mutations:
    - patchType: JSONPatch
      jsonPatch:
        expression: >
          [JSONPatch{{op: "add", path: "/spec/containers/-",
            value: Object.spec.containers{{name: "shipper", {SIDECAR}}}}},
           JSONPatch{{op: "add", path: "/spec/initContainers/0",
            value: Object.spec.initContainers{{name: "mesh", restartPolicy: "Always", {SIDECAR}}}}}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {{name: sidecars}}
spec: {{policyName: sidecars}}
"""
"""Puts a log shipper and a mesh's proxy into the workers of the first job, as a mesh's webhook does."""


def inject_sidecars(product: Product, namespace: str) -> None:
    """Returns when the API server does it: a policy is taken up a moment after it was made."""
    product.cluster.apply(INJECTS)
    container = {"name": "trainer", "image": images.BASE}
    worker = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "labels": {"finetune.dev/job": "pipeline-pretrain"}},
        "spec": {"initContainers": [container | {"name": "fetch"}], "containers": [container]},
    }
    ask = ("create", "--dry-run=server", "-o", "json", "-n", namespace, "-f", "-")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        made = json.loads(product.cluster.kubectl(*ask, input=json.dumps(worker)))["spec"]
        if [len(made["initContainers"]), len(made["containers"])] == [2, 2]:
            return
        time.sleep(0.2)  # nothing tells when it is taken up
    raise TimeoutError("the policy puts no sidecars into pods")


def test_a_pipeline_of_seven_stages_by_one_apply(
    product: Product, team: str, tiny_model: str, tmp_path: Path, printed: Callable[[str], str]
) -> None:
    cluster, jobs = product.cluster, pipeline(tiny_model)
    upload(product, ROOT / "examples" / "data", "pipeline")
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump_all(jobs))
    inject_sidecars(product, team)
    gate = product.gate("pipeline-pretrain", team)
    gate.hold(1)
    cluster.kubectl("apply", "-n", team, "-f", str(path))
    product.wait(
        "pipeline-ppo",
        team,
        lambda status: any("Waiting for FineTuneJob" in c["message"] for c in status.get("conditions", [])),
    )
    workers = cluster.wait_for("pods", list, namespace=team, selector="finetune.dev/job=pipeline-pretrain")
    for worker in workers:
        names = [c["name"] for kind in ("initContainers", "containers") for c in worker["spec"][kind]]
        assert names == ["mesh", "fetch", "trainer", "shipper"]
    gate.open()
    done = {
        job["spec"]["stage"]: product.wait_state(job["metadata"]["name"], team, "Succeeded")["status"] for job in jobs
    }
    for stage, earlier in STARTS_FROM.items():
        began, ended = (datetime.fromisoformat(t) for t in (done[stage]["startTime"], done[earlier]["completionTime"]))
        assert began >= ended, stage
    seen = printed("Succeeded")
    for stage in STARTS_FROM:
        assert any(f"pipeline-{stage} " in line and "Waiting" in line for line in seen.splitlines()), stage
    # The sidecars of the first one have been ended, and what they held is free.
    cluster.wait_gone("pods", selector="finetune.dev/job=pipeline-pretrain", namespace=team)
    # What each has learned from: the digests of the adapters below it stand in its own manifest.
    for stage, below in {"ppo": ("pretrain", "sft", "reward"), "dpo": ("pretrain", "sft")}.items():
        body = product.s3().get_object(Bucket=BUCKET, Key=f"models/pipeline-{stage}/manifest.json")["Body"].read()
        assert {f"s3://{BUCKET}/models/pipeline-{one}" for one in below} <= json.loads(body)["inputs"].keys()
    assert {output["kind"] for output in done["dpo"]["outputs"]} == {"adapter", "merged"}
    assert {"loss/observatory", "loss/general"} <= done["pretrain"]["evaluation"].keys()
    assert "accuracy" in done["reward"]["evaluation"]
