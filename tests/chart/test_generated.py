"""Generated files are what their sources make, and the schema of the values knows right from wrong."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
import yaml

from finetune_api.spec import FineTuneJobSpec
from finetune_operator import manifests
from finetune_operator.plan import Owner, make_plan
from finetune_operator.settings import LeaderElection, Profile, Settings
from tests.chart.charts import CHART, ROOT, VALUES
from tests.operator.simulation import GOOD_SPEC

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())


def merged(base: Any, over: Any) -> Any:
    """Values as Helm lays them over the defaults."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}


def test_generated_files_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "charts" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", VALUES)
def test_the_schema_accepts_the_value_sets(name: str) -> None:
    values = merged(copy.deepcopy(DEFAULTS), yaml.safe_load(VALUES[name].read_text()))
    jsonschema.Draft7Validator(SCHEMA).validate(values)


@pytest.mark.parametrize(
    "wrong",
    [
        {"replica": 3},
        {"replicas": "two"},
        {"image": {"tga": "1"}},
        {"image": {"pullPolicy": "Sometimes"}},
        {"watchNamespaces": "team-a"},
        {"watchNamespaces": ["Team_A"]},
        {"settings": {"progressInterval": "5 seconds"}},
        {"settings": {"logLevel": "loud"}},
        {"settings": {"httpPort": 9000}},
        {"settings": {"leaderElection": {"leaseName": "other"}}},
        {"profiles": {"gpu": {"gpuResurce": "nvidia.com/gpu"}}},
        {"profiles": {"gpu": {"pricePerGpuHour": "cheap"}}},
        {"prometheusRule": {"alerts": {"JobFaild": {"enabled": False}}}},
        {"prometheusRule": {"alerts": {"RestartsHigh": {"threshold": "many"}}}},
        {"prometheusRule": {"alerts": {"JobInvalid": {"threshold": 3}}}},
        {"rbac": {"userRoles": "sometimes"}},
    ],
    ids=json.dumps,
)
def test_the_schema_refuses_what_is_wrong(wrong: Any) -> None:
    values = merged(copy.deepcopy(DEFAULTS), wrong)
    assert list(jsonschema.Draft7Validator(SCHEMA).iter_errors(values))


def test_the_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)


def test_the_profile_for_rdma_that_is_commented_out_is_one() -> None:
    text = (CHART / "values.yaml").read_text()
    lines = [line.split("#:", 1)[1] for line in text.splitlines() if line.lstrip().startswith("#:")]
    (profile,) = yaml.safe_load("\n".join(lines)).items()
    values = merged(copy.deepcopy(DEFAULTS), {"profiles": dict([profile])})
    jsonschema.Draft7Validator(SCHEMA).validate(values)
    owner = Owner("team", "tune", "uid", {})
    plan = make_plan(owner, FineTuneJobSpec.model_validate(GOOD_SPEC), Profile.model_validate(profile[1]), {})
    made = manifests.job(plan, 1)["spec"]["template"]
    assert made["spec"]["containers"][0]["resources"]["limits"] == {
        "nvidia.com/gpu": "8",
        "rdma/hca_shared_devices_a": 1,
    }
    (together,) = made["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    labels = made["metadata"]["labels"]
    assert together["labelSelector"]["matchLabels"].items() <= labels.items()
    assert set(together["matchLabelKeys"]) <= labels.keys()


def test_every_value_is_documented() -> None:
    text = (CHART / "README.md").read_text()
    for key, value in DEFAULTS.items():
        assert f"`{key}`" in text or (isinstance(value, dict) and f"`{key}." in text), key
    for name, field in Profile.model_fields.items():
        assert f"`{field.alias or name}" in text, name


def test_every_setting_of_the_operator_is_a_value() -> None:
    def keys(model: Any) -> set[str]:
        return {field.alias or name for name, field in model.model_fields.items()}

    settings = DEFAULTS["settings"]
    assert set(settings) == keys(Settings) - {"namespaces", "profiles", "httpPort"}
    assert set(settings["leaderElection"]) == keys(LeaderElection) - {"leaseName", "namespace"}


def test_the_chart_has_the_version_of_the_code() -> None:
    from finetune_operator import __version__

    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__
