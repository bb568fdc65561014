"""The metrics that rules and dashboards are written against are those the code tells."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from finetune_operator.metrics import OperatorMetrics
from finetune_operator.settings import Settings
from finetune_trainer.telemetry import Metrics
from tests.chart import metrics

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "info": ("_info",), "gauge": ("",)}


def told(registry: CollectorRegistry) -> set[str]:
    """Names as Prometheus stores them."""
    return {family.name + suffix for family in registry.collect() for suffix in SUFFIXES[family.type]}


def labels(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Label names by sample name."""
    return {s.name: set(s.labels) for family in registry.collect() for s in family.samples}


def test_the_operator_tells_these_metrics() -> None:
    job = {
        "metadata": {"namespace": "team-a", "name": "chat"},
        "spec": {"model": {"uri": "hf://org/model"}},
        "status": {"state": "Running"},
    }
    own = OperatorMetrics(lambda: [job], Settings())
    own.leader.set(1)
    own.attempt_failures.labels("team-a", "chat", "NodeLost").inc()
    assert told(own.registry) == set(metrics.OPERATOR)
    for name, found in labels(own.registry).items():
        if not name.endswith("_created"):
            assert found == set(metrics.OPERATOR[name]), name


def test_the_trainer_tells_these_metrics() -> None:
    own = Metrics("chat")
    own.memory("rss", 1.0)
    own.heartbeat("0", 0.0)
    own.evaluation({"loss": 1.0, "perplexity": 2.7, "accuracy": 0.9})
    own.info("sft", "lora", "hf://org/model", 1)
    assert told(own.registry) == set(metrics.TRAINER)
    for name, found in labels(own.registry).items():
        if not name.endswith("_created"):
            assert found == set(metrics.TRAINER[name]), name
