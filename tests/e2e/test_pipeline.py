"""One ``kubectl apply`` of examples/08: seven jobs, of which each waits for the one it starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    # The first one has sidecars of both kinds, as a mesh or a log shipper puts them there: neither ends by itself.
    sidecar = {"image": images.BASE, "command": ["sleep", "inf"]}
    beside = [{"name": "shipper", **sidecar}]
    before = [{"name": "mesh", "restartPolicy": "Always", **sidecar}]
    jobs[0]["spec"]["workers"]["template"] = {"spec": {"initContainers": before, "containers": beside}}
    return jobs


def test_a_pipeline_of_seven_stages_by_one_apply(
    product: Product, team: str, tiny_model: str, tmp_path: Path, printed: Callable[[str], str]
) -> None:
    cluster, jobs = product.cluster, pipeline(tiny_model)
    upload(product, ROOT / "examples" / "data", "pipeline")
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump_all(jobs))
    gate = product.gate("pipeline-pretrain", team)
    gate.hold(1)
    cluster.kubectl("apply", "-n", team, "-f", str(path))
    product.wait(
        "pipeline-ppo",
        team,
        lambda status: any("Waiting for FineTuneJob" in c["message"] for c in status.get("conditions", [])),
    )
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
