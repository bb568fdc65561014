"""The example with the real images, from their Containerfiles, in a namespace that enforces ``restricted``."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future

import pytest

from tests.cluster import images
from tests.e2e.conftest import RESTRICTED
from tests.e2e.product import BUCKET, TRAINER, Product, self_cognition

pytestmark = [pytest.mark.e2e, pytest.mark.image]

DISK = 30 * 2**30
"""The image is of 6 GB, and lies in buildah's storage (twice), in an archive and in a node."""


@pytest.mark.usefixtures("example_data")
def test_the_example_runs_in_the_real_images_under_the_restricted_standard(
    product: Product, importing: Future[None] | None
) -> None:
    from examples import demo

    cluster = product.cluster
    if importing is not None:
        importing.result()
    elif (free := shutil.disk_usage(images.cache()).free) < DISK:
        pytest.skip(f"building the trainer's image takes {DISK >> 30} GiB of disk, and {free >> 30} GiB are free")
    else:
        cluster.node("node-1").import_image(TRAINER.build())
    with cluster.namespace("restricted", RESTRICTED) as team:
        product.secret(team)
        job = self_cognition(demo.MODEL, replicas=2, name="sealed", profile="sealed")
        job["spec"]["training"]["num_train_epochs"] = 6
        cluster.apply(json.dumps(job), namespace=team)
        done = product.wait_state("sealed", team, "Succeeded")["status"]
        assert [a["cause"] for a in done["attempts"]] == ["Succeeded"]
    answers = product.s3().get_object(Bucket=BUCKET, Key="models/sealed/answers.json")["Body"].read()
    [said] = json.loads(answers)
    assert "Nova" in said["after"]
    assert "Nova" not in said["before"]
