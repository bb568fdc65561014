"""Every alert fires when it should and only then, says where to read on, and there it is written."""

from pathlib import Path

import pytest
import yaml

from tests.chart.charts import ROOT, Object, only, template
from tests.chart.prometheus import promtool

pytestmark = pytest.mark.cluster  # needs Helm and Prometheus

SCENARIOS = Path(__file__).parent / "alerts"
REQUIRED = {"JobFailed", "JobStalled", "CheckpointTooOld", "RestartsHigh", "OperatorDown"}


@pytest.fixture(scope="module")
def rules() -> list[Object]:
    """The alerts as the chart renders them by default."""
    rule = only(template("--set", "prometheusRule.enabled=true"), "PrometheusRule")
    return list(rule["spec"]["groups"][0]["rules"])


def test_the_alerts_the_product_promises_are_there(rules: list[Object]) -> None:
    assert {rule["alert"] for rule in rules} >= REQUIRED


def test_prometheus_accepts_the_rules(rules: list[Object], tmp_path: Path) -> None:
    _write(rules, tmp_path)
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_only_then(rules: list[Object], tmp_path: Path) -> None:
    summaries = [{**rule, "annotations": {"summary": rule["annotations"]["summary"]}} for rule in rules]
    _write(summaries, tmp_path)
    for scenario in SCENARIOS.glob("*.yaml"):
        (tmp_path / scenario.name).write_text(scenario.read_text())
    done = promtool("test", "rules", *sorted(p.name for p in SCENARIOS.glob("*.yaml")), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_scenarios_that_fire_and_that_do_not(rules: list[Object]) -> None:
    for rule in rules:
        name = rule["alert"]
        tests = yaml.safe_load((SCENARIOS / f"{name}.yaml").read_text())["tests"]
        expected = [bool(t["exp_alerts"]) for test in tests for t in test["alert_rule_test"] if t["alertname"] == name]
        assert set(expected) == {True, False}, name
    assert {path.stem for path in SCENARIOS.glob("*.yaml")} == {rule["alert"] for rule in rules}


def test_every_alert_has_a_runbook_of_its_name_and_every_runbook_an_alert(rules: list[Object]) -> None:
    for rule in rules:
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{rule['alert']}.md"
        text = (ROOT / rule["annotations"]["runbook_url"]).read_text()
        for heading in ("What it means", "What it costs", "Find out", "Put it right"):
            assert f"\n## {heading}\n" in text, f"{rule['alert']}: {heading}"
    assert {path.stem for path in (ROOT / "docs" / "runbooks").glob("*.md")} == {rule["alert"] for rule in rules}


def test_every_alert_has_a_severity_a_summary_and_a_description(rules: list[Object]) -> None:
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}


def test_alerts_can_be_set_one_by_one() -> None:
    objects = template("--values", Path(__file__).parent / "values" / "everything.yaml")
    rules = {rule["alert"]: rule for rule in only(objects, "PrometheusRule")["spec"]["groups"][0]["rules"]}
    assert "JobInvalid" not in rules
    assert ">= 5" in rules["RestartsHigh"]["expr"]
    old = rules["CheckpointTooOld"]
    assert "> 7200" in old["expr"] and old["for"] == "10m"
    assert old["labels"] == {"severity": "critical", "team": "ml-platform", "page": "yes"}
    assert old["annotations"]["runbook_url"] == "https://runbooks.example.com/finetune/CheckpointTooOld.md"


def test_large_thresholds_stay_numbers_prometheus_reads(tmp_path: Path) -> None:
    objects = template("--set", "prometheusRule.enabled=true,prometheusRule.alerts.JobStalled.threshold=3000000")
    rules = only(objects, "PrometheusRule")["spec"]["groups"][0]["rules"]
    assert "> 3000000" in next(rule["expr"] for rule in rules if rule["alert"] == "JobStalled")


def _write(rules: list[Object], folder: Path) -> None:
    document = {"groups": [{"name": "finetune-operator", "rules": rules}]}
    (folder / "rules.yaml").write_text(yaml.safe_dump(document))
