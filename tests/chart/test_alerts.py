"""Every alert fires when it should and only then, says where to read on, and there it is written."""

import re
from pathlib import Path

import pytest
import yaml

from finetune_api.stages import ROLLOUTS
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
    for rule in rules:  # each beside its own scenarios: promtool evaluates every rule at every minute of each
        folder = tmp_path / rule["alert"]
        folder.mkdir()
        _write([{**rule, "annotations": {"summary": rule["annotations"]["summary"]}}], folder)
        (folder / "scenarios.yaml").write_text((SCENARIOS / f"{rule['alert']}.yaml").read_text())
    done = promtool("test", "rules", *sorted(tmp_path.glob("*/scenarios.yaml")), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_scenario_in_which_it_fires_and_three_in_which_it_does_not(rules: list[Object]) -> None:
    for rule in rules:
        name = rule["alert"]
        tests = yaml.safe_load((SCENARIOS / f"{name}.yaml").read_text())["tests"]
        checks = [[bool(t["exp_alerts"]) for t in test["alert_rule_test"] if t["alertname"] == name] for test in tests]
        fires = [any(of_one) for of_one in checks]
        assert all(checks) and fires.count(True) >= 1 and fires.count(False) >= 3, name
        assert len({test["name"] for test in tests}) == len(tests), name
    assert {path.stem for path in SCENARIOS.glob("*.yaml")} == {rule["alert"] for rule in rules}


def test_alerts_tell_clusters_apart(rules: list[Object]) -> None:
    """By the label that who joins several in one Prometheus gives them; without one it is empty everywhere."""
    for rule in rules:
        groups = re.findall(r"\b(?:by|on) \(([^)]*)\)", rule["expr"])
        assert groups and all(group.split(", ")[0] == "cluster" for group in groups), rule["alert"]


def test_the_loss_of_a_stage_that_learns_from_what_it_writes_sets_off_no_alert(rules: list[Object]) -> None:
    rule = next(rule for rule in rules if rule["alert"] == "LossDiverging")
    assert f'finetune_train_info{{stage=~"{"|".join(ROLLOUTS)}"}}' in rule["expr"]


def test_every_alert_has_a_runbook_of_its_name_and_every_runbook_an_alert(rules: list[Object]) -> None:
    for rule in rules:
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{rule['alert']}.md"
        text = (ROOT / rule["annotations"]["runbook_url"]).read_text()
        for heading in ("What it means", "What it costs", "Find out", "Put it right"):
            assert f"\n## {heading}\n" in text, f"{rule['alert']}: {heading}"
    assert {path.stem for path in (ROOT / "docs" / "runbooks").glob("*.md")} == {rule["alert"] for rule in rules}


def test_the_runbook_of_a_job_that_does_not_start_has_a_remedy_for_every_reason() -> None:
    row = next(x for x in (ROOT / "docs" / "api.md").read_text().splitlines() if x.startswith("| `PodsReady` |"))
    reasons = set(re.findall(r"`(\w+)`", row)) - {"PodsReady"}
    text = (ROOT / "docs" / "runbooks" / "JobPending.md").read_text()
    told = {reason for reason in reasons if f"\n| {reason}" in text}
    assert reasons - told == {"Queued", "NoPods"}  # which are no trouble, or of a moment


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
