"""The real trainer image, from its Containerfile, in a namespace that enforces ``restricted``."""

from __future__ import annotations

import hashlib
import json

import pytest

from tests.cluster import images
from tests.e2e.conftest import RESTRICTED
from tests.e2e.product import ROOT, SYSTEM, Product
from tests.e2e.test_whole_path import tiny_job

pytestmark = pytest.mark.image

IMAGE = "localhost/finetune-trainer:e2e"


def test_a_job_runs_in_the_real_image_under_the_restricted_standard(product: Product, tiny_model: str) -> None:
    cluster = product.cluster
    sources = [ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "trainer_image" / "Containerfile"]
    for package in ("crds/finetune_api", "trainer_image/finetune_trainer"):
        sources += sorted((ROOT / package).rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    archive = images.cache() / "images" / f"trainer-{digest}.tar"
    if not archive.exists():
        images.build(ROOT / "trainer_image" / "Containerfile", ROOT, IMAGE, archive, {"COMPILER": ""})
        images.keep_newest("trainer-*.tar", 1)
    node = cluster.node("node-1")
    node.import_image(archive)
    profiles = {
        "default": {
            "image": IMAGE,
            "imagePullPolicy": "Never",
            "credentialsSecret": "team-s3",
            "shmSize": "256Mi",
            "env": {"OMP_NUM_THREADS": "1", "AWS_ENDPOINT_URL": cluster.s3.inside},
            "template": {"spec": {"nodeSelector": {"kubernetes.io/hostname": "node-1"}}},
        }
    }
    chart = str(ROOT / "charts" / "finetune-operator")
    values = product.operator_values(profiles=profiles)
    upgrade = ["upgrade", "finetune-operator", chart, "-n", SYSTEM, "-f", "-", "--wait", "--timeout", "3m"]
    cluster.helm(*upgrade, input=values)
    try:
        with cluster.namespace("restricted", RESTRICTED) as team:
            product.secret(team)
            cluster.apply(json.dumps(tiny_job(tiny_model, product, "sealed", replicas=1, steps=40)), namespace=team)
            done = product.wait_state("sealed", team, "Succeeded", 300)["status"]
            assert [a["cause"] for a in done["attempts"]] == ["Succeeded"]
    finally:
        cluster.helm("rollback", "finetune-operator", "-n", SYSTEM, "--wait", "--timeout", "3m")
