"""The dashboards are files Grafana's sidecar can load, and every query in them shows something."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api.conditions import State
from tests.chart import metrics
from tests.chart.charts import CHART, only, template
from tests.chart.prometheus import Server, serve

FILES = sorted((CHART / "dashboards").glob("*.json"))
DASHBOARDS: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in FILES}
NAME = re.compile(r"\bfinetune_[a-z0-9_]+\b")


def panels(dashboard: Any) -> list[Any]:
    """All panels that show something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


QUERIES = [
    (name, panel["title"], target)
    for name, one in DASHBOARDS.items()
    for panel in panels(one)
    for target in panel["targets"]
]


def test_there_are_two_dashboards_each_with_an_identity_of_its_own() -> None:
    assert sorted(DASHBOARDS) == ["fleet", "job"]
    assert len({one["uid"] for one in DASHBOARDS.values()}) == 2
    assert len({one["title"] for one in DASHBOARDS.values()}) == 2


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_have_titles_ids_of_their_own_and_do_not_overlap(name: str) -> None:
    dashboard = DASHBOARDS[name]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["title"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_use_the_chosen_data_source_and_have_units(name: str) -> None:
    dashboard = DASHBOARDS[name]
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    for panel in panels(dashboard):
        assert panel["fieldConfig"]["defaults"]["unit"]
        for used in [panel, *panel["targets"]]:
            assert used["datasource"]["uid"] == "${datasource}", panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)


def test_dashboards_link_to_each_other() -> None:
    assert "/d/finetune-job?" in json.dumps(DASHBOARDS["fleet"])
    assert "/d/finetune-fleet?" in json.dumps(DASHBOARDS["job"])


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboards_name_only_metrics_there_are(name: str) -> None:
    found = {word for panel in panels(DASHBOARDS[name]) for t in panel["targets"] for word in NAME.findall(t["expr"])}
    assert found
    assert found <= set(metrics.KNOWN)


def test_every_state_has_a_colour() -> None:
    panel = next(panel for panel in panels(DASHBOARDS["fleet"]) if panel["title"] == "Jobs by state")
    assert {one["matcher"]["options"] for one in panel["fieldConfig"]["overrides"]} == set(State)


def test_every_metric_of_the_trainer_is_seen_somewhere() -> None:
    shown = {word for _, _, target in QUERIES for word in NAME.findall(target["expr"])}
    ruled = {word for path in (CHART / "rules").glob("*.yaml") for word in NAME.findall(path.read_text())}
    alone = {name for name in metrics.KNOWN if name not in shown | ruled and not name.endswith(("_sum", "_count"))}
    # The operator's own timestamp of the newest checkpoint outlives the pod; the others stand in the status.
    assert alone == {
        "finetune_train_checkpoint_last_timestamp_seconds",
        "finetune_job_max_restarts",
        "finetune_job_start_timestamp_seconds",
    }


# --- with a real Prometheus ---

NOW = int(time.time()) // 60 * 60 - 600
SINCE = NOW - 7200
VARIABLES = {
    "$cluster": ".*",  # All
    "$__rate_interval": "1m",
    "$__range": "3h",
    "$namespace": "team-a",
    "$finetunejob": "chat",
}


def filled_in(expr: str, **chosen: str) -> str:
    """The query as Grafana would send it."""
    for name, value in {**VARIABLES, **{f"${name}": value for name, value in chosen.items()}}.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, expr
    return expr


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real Prometheus that has watched the sample fleet for two hours."""
    with serve(metrics.openmetrics(SINCE, NOW), tmp_path_factory.mktemp("prometheus")) as server:
        yield server


@pytest.mark.cluster  # needs Prometheus
@pytest.mark.parametrize(("dashboard", "title", "target"), QUERIES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_query_shows_something(prometheus: Server, dashboard: str, title: str, target: Any) -> None:
    expr = filled_in(target["expr"])
    found = prometheus.query(expr, NOW) if target["instant"] else prometheus.query_range(expr, SINCE, NOW, 60)
    assert found, expr
    for label in re.findall(r"{{\s*(\w+)\s*}}", target["legendFormat"]):
        assert all(label in series["metric"] for series in found), label


@pytest.mark.cluster
def test_variables_and_annotations_find_something(prometheus: Server) -> None:
    for dashboard in DASHBOARDS.values():
        for variable in dashboard["templating"]["list"][1:]:
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert match
            assert prometheus.get(f"label/{match[2]}/values", **{"match[]": filled_in(match[1])})
        for annotation in dashboard["annotations"]["list"]:
            if expr := annotation.get("expr"):
                assert prometheus.query_range(filled_in(expr), SINCE, NOW, 60), expr


@pytest.mark.cluster
def test_the_table_of_jobs_has_a_line_for_every_job(prometheus: Server) -> None:
    table = next(panel for panel in panels(DASHBOARDS["fleet"]) if panel["title"] == "Jobs")
    lines: dict[tuple[str, str, str], set[str]] = {}
    for target in table["targets"]:
        for series in prometheus.query(filled_in(target["expr"]), NOW):
            key = tuple(series["metric"].get(label, "") for label in ("cluster", "namespace", "finetunejob"))
            assert target["refId"] not in lines.setdefault(key, set()), "two values for one cell"
            lines[key].add(target["refId"])
    jobs = [("team-a", name) for name in ("broken", "chat", "later")]
    assert sorted(lines) == [(cluster, *job) for cluster in ("", "east") for job in jobs]
    for cluster in ("", "east"):
        assert lines[cluster, "team-a", "chat"] == {target["refId"] for target in table["targets"]}


@pytest.mark.cluster
def test_failures_are_counted_from_the_first(prometheus: Server) -> None:
    panel = next(panel for panel in panels(DASHBOARDS["fleet"]) if panel["title"] == "Failed attempts by cause")
    found = prometheus.query(filled_in(panel["targets"][0]["expr"], cluster="east"), NOW)
    assert {s["metric"]["cause"]: s["value"][1] for s in found} == {"NodeLost": "1", "OutOfGPUMemory": "1"}


@pytest.mark.cluster
@pytest.mark.parametrize(("cluster", "gpus"), [(".*", "32"), ("east", "16")])
def test_all_clusters_are_shown_or_one_of_them(prometheus: Server, cluster: str, gpus: str) -> None:
    """Also what has no such label, as where each cluster has a Prometheus of its own."""
    panel = next(panel for panel in panels(DASHBOARDS["fleet"]) if panel["title"] == "GPUs held")
    (found,) = prometheus.query(filled_in(panel["targets"][0]["expr"], cluster=cluster), NOW)
    assert found["value"][1] == gpus


@pytest.mark.cluster
def test_each_alert_can_be_asked_of_a_real_prometheus(prometheus: Server) -> None:
    rule = only(template("--set", "prometheusRule.enabled=true"), "PrometheusRule")
    for alert in rule["spec"]["groups"][0]["rules"]:
        assert set(NAME.findall(alert["expr"])) <= set(metrics.KNOWN), alert["alert"]
        prometheus.query(alert["expr"], NOW)
