"""What Argo CD, Flux and kstatus make of a job, by their own libraries; Argo CD's actions; the Kustomize base."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lupa import lua51  # the version of Argo CD's interpreter

from finetune_api.causes import Cause
from finetune_api.run import Termination
from finetune_operator.cluster import ClusterError
from tests.chart.charts import ROOT, kinds, only, template
from tests.chart.judges import judge
from tests.cluster import binaries
from tests.operator.simulation import GOOD_SPEC, Simulation

CUSTOMIZATION = ROOT / "gitops" / "argocd" / "resource_customizations" / "finetune.dev" / "FineTuneJob"
HEALTH_TESTS = yaml.safe_load((CUSTOMIZATION / "health_test.yaml").read_text())["tests"]


def lua(script: str, obj: Any) -> Any:
    """What the script answers for an object, in Argo CD's way: no library but the few it opens, a global `obj`."""
    runtime = lua51.LuaRuntime(unpack_returned_tuples=True)
    runtime.execute('debug.setmetatable("", nil)')  # the methods of strings
    for name in ("io", "os", "package", "require", "dofile", "loadfile", "debug", "string", "math", "coroutine"):
        runtime.globals()[name] = None
    runtime.globals()["obj"] = _to_lua(runtime, obj)
    return _to_python(runtime.execute(script))


def _to_lua(runtime: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return runtime.table_from({key: _to_lua(runtime, item) for key, item in value.items() if item is not None})
    if isinstance(value, list):
        return runtime.table_from([_to_lua(runtime, item) for item in value])
    return value


def _to_python(value: Any) -> Any:
    if lua51.lua_type(value) == "table":
        return {key: _to_python(item) for key, item in value.items()}
    return value


def sample(path: str) -> Any:
    return yaml.safe_load((CUSTOMIZATION / path).read_text())


@pytest.mark.parametrize("case", HEALTH_TESTS, ids=lambda case: case["inputPath"])
def test_health_is(case: Any) -> None:
    health = lua((CUSTOMIZATION / "health.lua").read_text(), sample(case["inputPath"]))
    assert health == {key: value for key, value in case["healthStatus"].items() if value}


def _failed(sim: Simulation, name: str = "chat") -> None:
    sim.run(name, until="Running")
    said = Termination(cause=Cause.ACCESS_DENIED, message="no", exit_code=64)
    sim.exit(f"{name}-a1-0-abcde", 64, said)
    sim.run(name)


def _suspended(sim: Simulation) -> None:
    sim.edit("chat", suspend=True)
    sim.run("chat", until="Suspended")


def _input_failed(sim: Simulation) -> None:
    sim.submit("base")
    _failed(sim, "base")
    sim.submit("chat", {**GOOD_SPEC, "model": {"uri": "job://base"}})
    sim.reconcile("chat")


def _invalid(sim: Simulation) -> None:
    sim.edit("chat", profile="h200")
    sim.reconcile("chat")


STORIES: list[tuple[Callable[[Simulation], object], str, str]] = [
    (lambda sim: sim.reconcile("chat"), "Progressing", "Starting: The pods are being made."),
    (lambda sim: sim.run("chat"), "Healthy", "The run has finished after 10 steps"),
    (_failed, "Degraded", "AccessDenied: no"),
    (_suspended, "Suspended", "Suspended; set spec.suspend"),
    (_invalid, "Degraded", 'spec.profile: "h200"'),
    (_input_failed, "Degraded", "FineTuneJob base has failed; this job waits for its output."),
]


@pytest.mark.parametrize(("story", "status", "message"), STORIES)
def test_health_of_what_the_operator_itself_writes_is(
    story: Callable[[Simulation], object], status: str, message: str
) -> None:
    sim = Simulation()
    sim.submit("chat")
    story(sim)
    health = lua((CUSTOMIZATION / "health.lua").read_text(), sim.jobs["chat"])
    assert health["status"] == status
    assert health["message"].startswith(message)


def _running(sim: Simulation) -> None:
    sim.run("chat", until="Running")


def _queued(sim: Simulation) -> None:
    sim.queued = True
    sim.run("chat", until="Queued")


def _refused(sim: Simulation) -> None:
    sim.fail_calls.add("apply")
    with pytest.raises(ClusterError):
        sim.reconcile("chat")


def _changed_after_its_end(sim: Simulation) -> None:
    sim.run("chat")
    sim.edit("chat", training={"learning_rate": 1.0}, ttlSecondsAfterFinished=3600)
    sim.reconcile("chat")


def _changed_and_not_seen(sim: Simulation) -> None:
    sim.run("chat")
    sim.edit("chat", ttlSecondsAfterFinished=3600)


def _changed_while_it_runs(sim: Simulation) -> None:
    _running(sim)
    sim.edit("chat", training={"learning_rate": 1.0})
    sim.reconcile("chat")


EVERYWHERE: list[tuple[Callable[[Simulation], object], str, str, str]] = [
    # the story, and what Flux with our expressions, kstatus without them, and Argo CD make of it
    (lambda sim: None, "InProgress", "InProgress", "Progressing"),
    (_refused, "InProgress", "InProgress", "Progressing"),
    (lambda sim: sim.reconcile("chat"), "InProgress", "InProgress", "Progressing"),
    (_queued, "InProgress", "InProgress", "Progressing"),
    (_running, "InProgress", "InProgress", "Progressing"),
    (lambda sim: sim.run("chat"), "Current", "Current", "Healthy"),
    (_failed, "Failed", "Failed", "Degraded"),
    (_invalid, "Failed", "Failed", "Degraded"),
    (_input_failed, "Failed", "Failed", "Degraded"),
    (_suspended, "InProgress", "InProgress", "Suspended"),
    (_changed_after_its_end, "Current", "Current", "Healthy"),
    (_changed_and_not_seen, "InProgress", "InProgress", "Healthy"),
    # What stands in Git is not what runs, and the run may still end well.
    (_changed_while_it_runs, "Failed", "InProgress", "Degraded"),
]


@pytest.mark.cluster  # needs Go
def test_flux_kstatus_and_argo_cd_judge_what_the_operator_writes() -> None:
    told = []
    for story, *_ in EVERYWHERE:
        sim = Simulation()
        sim.submit("chat")
        story(sim)
        told.append(sim.jobs["chat"])
    found = [(v.flux, v.kstatus, v.argo["status"] if isinstance(v.argo, dict) else v.argo) for v in judge(told)]
    assert found == [tuple(expected) for _, *expected in EVERYWHERE]


@pytest.mark.cluster  # needs Go
def test_argo_cds_own_interpreter_answers_as_the_one_of_these_tests() -> None:
    found = judge(sample(case["inputPath"]) for case in HEALTH_TESTS)
    for case, verdict in zip(HEALTH_TESTS, found, strict=True):
        expected = {key: value for key, value in case["healthStatus"].items() if value}
        assert verdict.argo == expected, case["inputPath"]


def test_all_four_states_of_health_are_tested_and_every_sample_is_used() -> None:
    assert {case["healthStatus"]["status"] for case in HEALTH_TESTS} == {
        "Progressing",
        "Healthy",
        "Degraded",
        "Suspended",
    }
    used = {case["inputPath"] for case in HEALTH_TESTS}
    assert used == {f"testdata/{path.name}" for path in (CUSTOMIZATION / "testdata").glob("*.yaml")}


def test_samples_are_of_conditions_and_statuses_there_are() -> None:
    from finetune_api.conditions import Condition, Reason
    from finetune_api.status import FineTuneJobStatus

    for path in (CUSTOMIZATION / "testdata").glob("*.yaml"):
        status = FineTuneJobStatus.model_validate(yaml.safe_load(path.read_text()).get("status") or {})
        for condition in status.conditions:
            assert condition.type in set(Condition), path.name
            assert condition.reason in set(Reason), path.name


@pytest.mark.parametrize(
    ("path", "enabled"),
    [
        ("testdata/progressing_training.yaml", {"suspend"}),
        ("testdata/suspended.yaml", {"resume"}),
        ("testdata/healthy.yaml", set()),
        ("testdata/degraded_failed.yaml", set()),
        ("testdata/progressing_new.yaml", {"suspend"}),
    ],
)
def test_actions_are_offered_when_they_do_something(path: str, enabled: set[str]) -> None:
    found = lua((CUSTOMIZATION / "actions" / "discovery.lua").read_text(), sample(path))
    assert {name for name, action in found.items() if not action["disabled"]} == enabled


def test_actions_change_suspend_and_nothing_else() -> None:
    before = sample("testdata/progressing_training.yaml")
    for name, value in (("suspend", True), ("resume", False)):
        after = lua((CUSTOMIZATION / "actions" / name / "action.lua").read_text(), before)
        assert after["spec"].pop("suspend") is value
        assert after["spec"]["output"] == before["spec"]["output"]


def test_the_patch_of_argocd_cm_holds_these_scripts() -> None:
    data = yaml.safe_load((ROOT / "gitops" / "argocd" / "argocd-cm.yaml").read_text())["data"]
    assert data["resource.customizations.health.finetune.dev_FineTuneJob"] == (CUSTOMIZATION / "health.lua").read_text()
    actions = yaml.safe_load(data["resource.customizations.actions.finetune.dev_FineTuneJob"])
    assert [action["name"] for action in actions["definitions"]] == ["resume", "suspend"]


# --- Kustomize ---


def build(path: str) -> list[Any]:
    """What ``kubectl apply -k`` would apply."""
    kubectl = shutil.which("kubectl") or str(binaries.require(["kubectl"]) / "kubectl")
    done = subprocess.run([kubectl, "kustomize", ROOT / path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.cluster
def test_the_base_is_what_the_chart_makes() -> None:
    helm = binaries.require(["helm"]) / "helm"
    command = [sys.executable, ROOT / "charts" / "generate.py", "--check", "--kustomize", helm]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.cluster
def test_what_argocd_and_flux_install_needs_no_kind_that_a_cluster_may_lack(tmp_path: Path) -> None:
    application = yaml.safe_load((ROOT / "gitops" / "argocd" / "application.yaml").read_text())
    flux = list(yaml.safe_load_all((ROOT / "gitops" / "flux" / "helmrelease.yaml").read_text()))
    release = next(found for found in flux if found["kind"] == "HelmRelease")
    for values in (application["spec"]["source"]["helm"]["valuesObject"], release["spec"]["values"]):
        path = tmp_path / "values.yaml"
        path.write_text(yaml.safe_dump(values))
        objects = template("--values", path)
        assert not kinds(objects) & {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
        image = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["image"]
        assert image.startswith("registry.example.com/team/finetune-operator:")


@pytest.mark.cluster
@pytest.mark.parametrize("path", ["gitops/kustomize/base", "gitops/kustomize/overlays/example"])
def test_kustomize_gives_the_operator_settings_it_can_read(path: str) -> None:
    from finetune_operator.settings import Settings

    objects = build(path)
    (settings,) = (o for o in objects if o["kind"] == "ConfigMap")
    Settings.model_validate(yaml.safe_load(settings["data"]["settings.yaml"]))
    (deployment,) = (o for o in objects if o["kind"] == "Deployment")
    volume = next(v for v in deployment["spec"]["template"]["spec"]["volumes"] if v["name"] == "settings")
    assert volume["configMap"]["name"] == settings["metadata"]["name"]
    assert not [o for o in objects if "helm.sh/chart" in (o["metadata"].get("labels") or {})]
