"""The CRD on a real API server: it refuses what Python refuses, fills in the defaults Python fills in, and says so.

The proof that CEL and Python are two implementations of one thing. Needs an API server and nothing else.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kubernetes import client, config

from finetune_api import crd, schema
from finetune_api.mistakes import Mistake, changed, read
from finetune_api.spec import FineTuneJobSpec
from tests.cluster.access import Access, Object
from tests.unit import bad_specs
from tests.unit.bad_specs import BAD, CONDITION, GOOD, RULE, SCHEMA, Bad
from tests.unit.changed_specs import changed_specs
from tests.unit.good_specs import GOOD as GOOD_SPECS
from tests.unit.good_specs import Good

pytestmark = pytest.mark.cluster

JOBS = "finetune.dev/v1alpha1/finetunejobs"
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))

DryRun = Callable[..., Object | str]


@pytest.fixture(scope="module")
def api(cluster: Access) -> Access:
    """The API server with the CRD."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crd.PATH))
    # Not `kubectl wait`, which fails where there is no condition yet.
    crds = "apiextensions.k8s.io/v1/customresourcedefinitions"
    cluster.wait_for_condition(crds, "finetunejobs.finetune.dev", "Established", namespace=None)
    return cluster


@pytest.fixture(scope="module")
def space(api: Access) -> Iterator[str]:
    """A namespace for this file."""
    with api.namespace("admission") as name:
        yield name


@pytest.fixture(scope="module")
def dry_run(api: Access, space: str) -> DryRun:
    """Asks as ``kubectl create``, ``kubectl replace`` or ``kubectl apply --server-side`` do, with ``--dry-run=server
    --validate=strict``: what would be stored, or the words of the refusal. A kubectl for each of hundreds of specs
    would cost a minute."""
    jobs = client.CustomObjectsApi(config.new_client_from_config(str(api.kubeconfig)))
    place = ("finetune.dev", "v1alpha1", space, "finetunejobs")
    how = {"dry_run": "All", "field_validation": "Strict"}

    def ask(body: Object, *, replace: bool = False, apply: bool = False) -> Object | str:
        try:
            if apply:
                by = {"_content_type": "application/apply-patch+yaml", "field_manager": "somebody"}
                name = body["metadata"]["name"]  # read here: to the client, 201 is no answer of a patch
                done = jobs.patch_namespaced_custom_object(*place, name, body, **how, **by, _preload_content=False)
                return dict(json.loads(done.data))
            if not replace:
                return jobs.create_namespaced_custom_object(*place, body, **how)
            name = body["metadata"]["name"]
            old = jobs.get_namespaced_custom_object(*place, name)["metadata"]
            new = {**body, "metadata": {**body["metadata"], "resourceVersion": old["resourceVersion"]}}
            return jobs.replace_namespaced_custom_object(*place, name, new, **how)
        except client.ApiException as refusal:
            return str(json.loads(refusal.body)["message"])

    return ask


@pytest.fixture(scope="module")
def answers(dry_run: DryRun) -> dict[str, Object | str]:
    """Every bad spec → what the API server says to it. Nothing is stored."""
    return {bad.id: dry_run(bad.object) for bad in BAD}


# ---- bad specs ----


@pytest.mark.parametrize("bad", [b for b in BAD if b.by == RULE], ids=lambda bad: bad.id)
def test_a_rule_refuses_at_admission_in_the_words_of_the_condition(bad: Bad, answers: dict[str, Object | str]) -> None:
    said = answers[bad.id]
    assert isinstance(said, str), "it was taken"
    assert bad.says in said
    found = read(bad.object)
    assert isinstance(found, list)
    # Python alone guesses what URI was meant, and shows lists and maps.
    words = found[0].text().removeprefix(f"{bad.field}: ").partition("; here: ")[0]
    if isinstance(found[0].value, list | dict):
        words = words.partition("; accepted: ")[2]
    assert f"{bad.field}: " in said
    assert words in said


@pytest.mark.parametrize("bad", [b for b in BAD if b.by == SCHEMA], ids=lambda bad: bad.id)
def test_the_schema_refuses_at_admission_naming_the_field(bad: Bad, answers: dict[str, Object | str]) -> None:
    said = answers[bad.id]
    assert isinstance(said, str), "it was taken"
    assert bad.field in said
    assert bad.server_says in said


@pytest.mark.parametrize("bad", [b for b in BAD if b.by == CONDITION], ids=lambda bad: bad.id)
def test_what_the_api_server_cannot_see_is_left_to_the_condition(bad: Bad, answers: dict[str, Object | str]) -> None:
    assert isinstance(answers[bad.id], dict), answers[bad.id]


def test_kubectl_apply_tells_several_mistakes_at_once(api: Access, space: str) -> None:
    bad = bad_specs.changed(
        GOOD,
        {
            "spec.model.uri": "a/b",
            "spec.training.max_steps": 0,
            "spec.training.eval_steps": 5,
            "spec.method": {"type": "full", "r": 8},
            "spec.recovery.hangTimeout": "1s",
        },
    )
    done = api.try_kubectl("apply", "--server-side", "-n", space, "-f", "-", input=json.dumps(bad))
    assert done.returncode
    for field in ("model.uri", "training.max_steps", "training.eval_steps", "method.r", "recovery.hangTimeout"):
        assert f"spec.{field}: " in done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_cluster_takes_the_examples_that_say_so_and_no_others(api: Access, space: str, path: Path) -> None:
    done = api.try_kubectl("create", "--dry-run=server", "--validate=strict", "-n", space, "-f", str(path))
    if "#   kubectl apply -f examples/" in path.read_text():
        assert done.returncode == 0, done.stderr
    else:
        assert "finetune run also takes file://./PATH" in done.stderr


# ---- agreement of the two on anything ----

FUZZED = 400


def _with_nothing() -> list[Object]:
    """A job of every stage and every method, with all that may be missing written and empty."""
    stages = [good.object for good in GOOD_SPECS if good.change.get("spec.stage")]
    found = {raw["spec"]["stage"]: raw for raw in stages}
    found |= {f"sft, {name}": bad_specs.changed(GOOD, {"spec.method": {"type": name}}) for name in ("lora", "adapter")}
    return [
        {**raw, "metadata": {"name": re.sub("[^a-z]+", "-", name)}, "spec": _emptied(schema.spec_schema(), raw["spec"])}
        for name, raw in found.items()
    ]


def _emptied(node: dict[str, Any], value: Any) -> Any:
    if isinstance(value, list):
        return [_emptied(node["items"], item) for item in value] if "items" in node else value
    if not isinstance(value, dict) or "properties" not in node:
        return value
    given = {key: _emptied(node["properties"].get(key, {}), child) for key, child in value.items()}
    return {
        name: None for name in node["properties"] if name not in given and name not in node.get("required", ())
    } | given


_CONDITION_ONLY = re.compile(
    r"spec\.(deepspeed|workers\.template|method\.target_modules)[.\[]|spec\.method\.target_modules$"
)
_CONDITION_SAYS = (
    "the name of a column; YAML",
    "a valid regular expression",
    "every label once",
    "nothing of it with spec.stage",
)


def _seen_by_the_server(mistake: Mistake, raw: Object) -> bool:
    """Whether a mistake is one that the API server can see."""
    field = mistake.field
    if mistake.accepted.startswith(_CONDITION_SAYS):
        return False
    if re.match(r"spec\.training\.lr_scheduler_kwargs\b", field):
        return not isinstance(raw["spec"]["training"].get("lr_scheduler_kwargs", {}), dict)
    declared = ("spec.deepspeed.zero_optimization", "spec.deepspeed.zero_optimization.stage")
    return field in declared or not _CONDITION_ONLY.match(field)


def _admissible(raw: Object) -> bool:
    """Python finds nothing that the API server can see."""
    found = read(raw)
    return isinstance(found, FineTuneJobSpec) or not any(_seen_by_the_server(m, raw) for m in found)


def _as_kubectl_sends(value: Any) -> Any:
    """Whole fractions are integers: kubectl reads files, where 1.0 is 1."""
    if isinstance(value, dict):
        return {key: _as_kubectl_sends(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_as_kubectl_sends(child) for child in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


@settings(
    max_examples=1, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(st.lists(changed_specs(), min_size=FUZZED, max_size=FUZZED, unique_by=lambda raw: json.dumps(raw["spec"])))
def test_python_and_the_api_server_agree_on_what_one_change_makes(api: Access, space: str, specs: list[Object]) -> None:
    """All by one kubectl: one for each would take minutes."""
    named = [_as_kubectl_sends({**raw, "metadata": {"name": f"changed-{n}"}}) for n, raw in enumerate(specs)]
    how = ("--dry-run=server", "--validate=strict", "-n", space, "-o", "name", "-f", "-")
    done = api.try_kubectl("create", *how, input="\n---\n".join(map(json.dumps, named)))
    taken = {line.rpartition("/")[2].split()[0] for line in done.stdout.splitlines()}
    assert FUZZED // 10 < len(taken) < FUZZED - FUZZED // 10, done.stderr[:2000]
    wrong = []
    for raw in named:
        found = read(raw)
        if (raw["metadata"]["name"] in taken) != _admissible(raw):
            told = [m.text() for m in found] if isinstance(found, list) else ["(nothing)"]
            wrong.append((raw["metadata"]["name"] in taken, raw["spec"], told))
    assert not wrong, "\n".join(f"taken={t} {json.dumps(spec)} Python says {told}" for t, spec, told in wrong[:10])


@pytest.mark.parametrize("good", _with_nothing(), ids=lambda good: good["metadata"]["name"])
def test_what_is_empty_is_as_if_it_were_not_there_however_it_is_applied(dry_run: DryRun, good: Object) -> None:
    """`uri:` and no more: kubectl create and kubectl apply --server-side (Argo CD, Flux) take it alike, and Python."""
    created, applied = dry_run(good), dry_run(good, apply=True)
    assert isinstance(created, dict), created
    assert isinstance(applied, dict), applied
    spec = read(good)
    assert isinstance(spec, FineTuneJobSpec)
    assert read(created) == read(applied) == spec
    assert isinstance(dry_run(bad_specs.changed(good, {"spec.model.uri": None}), apply=True), str)


# ---- good specs ----


@pytest.fixture(scope="module")
def stored(api: Access, space: str) -> dict[str, Object]:
    """Every good spec → what the API server makes of it. All by one kubectl, which answers in their order, and writes
    whole floats as integers."""
    asked = "\n---\n".join(json.dumps(good.object) for good in GOOD_SPECS)
    how = ("--dry-run=server", "--validate=strict", "-o", "jsonpath={@}{'\\n'}")
    told = api.kubectl("create", *how, "-n", space, "-f", "-", input=asked).splitlines()
    return {good.id: json.loads(line) for good, line in zip(GOOD_SPECS, told, strict=True)}


@pytest.mark.parametrize("good", GOOD_SPECS, ids=lambda good: good.id)
def test_a_good_spec_is_stored_with_the_defaults_python_knows(good: Good, stored: dict[str, Object]) -> None:
    found = read(stored[good.id])
    assert isinstance(found, FineTuneJobSpec)
    assert found == read(good.object)


def test_defaults_are_shown(stored: dict[str, Object]) -> None:
    spec = stored["the least"]["spec"]
    assert spec["training"]["learning_rate"] == 2e-4
    assert spec["method"] == {"type": "lora"}
    assert spec["data"]["train"][0] == {
        "uri": "s3://team/rows.jsonl",
        "format": "auto",
        "columns": {},
        "sample_by": "line",
        "weight": 1,
        "split": "train",
        "revision": "main",
    }
    assert spec["recovery"] == {
        "maxRestarts": 10, "hangTimeout": "10m", "startTimeout": "1h", "pendingTimeout": "10m",
    }  # fmt: skip
    assert spec["checkpoint"] == {"save_steps": 200, "save_total_limit": 3, "resume": "auto"}


# ---- immutability ----

IMMUTABLE: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("the model", {"spec.model.uri": "hf://a/b"}, "spec.model.uri"),
    ("its revision", {"spec.model.revision": "v2"}, "spec.model.revision"),
    ("the method", {"spec.method.type": "qlora"}, "spec.method"),
    ("a parameter of the method", {"spec.method.r": 32}, "spec.method"),
    ("a parameter taken away", {"spec.method.r": None}, "spec.method"),
    ("the target modules", {"spec.method.target_modules": ["q_proj"]}, "spec.method"),
    ("the rows", {"spec.data.train": [{"uri": "s3://team/others.jsonl"}]}, "spec.data.train"),
    ("held-out rows", {"spec.data.eval": [{"uri": "s3://team/others.jsonl"}]}, "spec.data.eval"),
    ("the length of sequences", {"spec.data.max_length": 64}, "spec.data.max_length"),
    ("the learning rate", {"spec.training.learning_rate": 0.5}, "spec.training.learning_rate"),
    (
        "an argument of the schedule",
        {"spec.training.lr_scheduler_kwargs": {"a": 2}},
        "spec.training.lr_scheduler_kwargs",
    ),
    ("the prompts", {"spec.evaluation.prompts": ["Why?"]}, "spec.evaluation.prompts"),
    ("the ZeRO stage", {"spec.deepspeed.zero_optimization.stage": 1}, "spec.deepspeed"),
    ("a key of DeepSpeed", {"spec.deepspeed.aio": {"block_size": 1}}, "spec.deepspeed"),
    ("the place of checkpoints", {"spec.checkpoint.uri": "s3://team/x"}, "spec.checkpoint.uri"),
    ("the output", {"spec.output.uri": "s3://team/elsewhere"}, "spec.output.uri"),
    ("whether it is merged", {"spec.output.merge": True}, "spec.output.merge"),
)
STEERABLE: tuple[dict[str, Any], ...] = (
    {"spec.suspend": True},
    {"spec.ttlSecondsAfterFinished": 60},
    {"spec.checkpoint": {"save_steps": 5, "save_total_limit": 9}},
    {"spec.workers": {"replicas": 4, "gpusPerWorker": 8, "template": {"spec": {"nodeSelector": {"a": "b"}}}}},
    {"spec.recovery": {"maxRestarts": 1, "hangTimeout": "1m"}},
    {"spec.credentials": {"secretName": "other"}},
    {"spec.profile": "other"},
)


@pytest.fixture(scope="module")
def jobs(api: Access, space: str) -> tuple[Object, Object]:
    """Two jobs of one spec: one that was not started, one that was."""

    def make(name: str) -> Object:
        base = bad_specs.changed(GOOD, {"metadata.name": name, "spec.method.r": 8, "spec.deepspeed.aio": {}})
        api.apply(base, namespace=space)
        return base

    waiting, started = make("waiting"), make("started")
    status = {"status": {"startTime": "2026-01-01T00:00:00Z", "state": "Running"}}
    api.kubectl(
        "patch", "ftj", "started", "-n", space, "--subresource=status", "--type=merge", "-p", json.dumps(status)
    )
    return waiting, started


@pytest.mark.parametrize(("change", "field"), [row[1:] for row in IMMUTABLE], ids=[row[0] for row in IMMUTABLE])
def test_what_changes_the_result_is_immutable_once_the_run_has_started(
    dry_run: DryRun, jobs: tuple[Object, Object], change: dict[str, Any], field: str
) -> None:
    waiting, started = jobs
    assert isinstance(dry_run(bad_specs.changed(waiting, change), replace=True), dict)
    said = dry_run(bad_specs.changed(started, change), replace=True)
    assert isinstance(said, str)
    assert f"{field}: Forbidden: " in said
    assert "once the run has started; remedy: make a new FineTuneJob" in said
    # Python says it too, of what the condition compares.
    old, new = read(started), read(bad_specs.changed(started, change))
    if isinstance(new, FineTuneJobSpec):
        assert isinstance(old, FineTuneJobSpec)
        assert all(mistake.field.startswith(field) for mistake in changed(old, new))
        assert changed(old, new)


@pytest.mark.parametrize("change", STEERABLE, ids=lambda change: next(iter(change)))
def test_what_steers_stays_free(dry_run: DryRun, jobs: tuple[Object, Object], change: dict[str, Any]) -> None:
    assert isinstance(dry_run(bad_specs.changed(jobs[1], change), replace=True), dict)


def test_an_unchanged_apply_of_a_started_job_is_no_change(api: Access, space: str, jobs: tuple[Object, Object]) -> None:
    """GitOps applies the same file for ever; and the defaults of the server are not a change."""
    before = api.get(JOBS, "started", namespace=space)["metadata"]["generation"]
    api.apply(jobs[1], namespace=space)
    assert api.get(JOBS, "started", namespace=space)["metadata"]["generation"] == before


# ---- status and what people see ----


def test_a_status_update_is_not_stopped_by_a_rule_that_is_newer_than_the_object(api: Access, space: str) -> None:
    """Rules hang below the root, and the API server does not judge an unchanged part again."""
    definition = crd.crd()
    old = copy.deepcopy(definition)
    training = old["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["training"]
    training["x-kubernetes-validations"] = [
        rule for rule in training["x-kubernetes-validations"] if "max_steps != 0" not in rule["rule"]
    ]
    bad = bad_specs.changed(GOOD, {"metadata.name": "older", "spec.training.max_steps": 0})
    try:
        api.apply(old)

        def taken() -> bool:
            return not api.try_kubectl(
                "apply", "--server-side", "-n", space, "-f", "-", input=json.dumps(bad)
            ).returncode

        assert any(taken() for _ in range(50))
    finally:
        api.apply(definition)
    fresh = bad_specs.changed(bad, {"metadata.name": "newer"})

    def refused() -> bool:
        return bool(
            api.try_kubectl("create", "--dry-run=server", "-n", space, "-f", "-", input=json.dumps(fresh)).returncode
        )

    assert any(refused() for _ in range(50))
    patch = json.dumps({"status": {"state": "Invalid"}})
    api.kubectl("patch", "ftj", "older", "-n", space, "--subresource=status", "--type=merge", "-p", patch)
    assert api.get(JOBS, "older", namespace=space)["status"]["state"] == "Invalid"


def test_status_is_a_subresource(api: Access, space: str, jobs: tuple[Object, Object]) -> None:
    api.kubectl("patch", "ftj", "waiting", "-n", space, "--type=merge", "-p", '{"status": {"state": "Running"}}')
    assert api.get(JOBS, "waiting", namespace=space)["status"] == {"observedGeneration": -1}


def test_the_whole_status_is_kept(api: Access, space: str) -> None:
    """Nothing that the operator may write is pruned."""
    status: Object = {
        "observedGeneration": 1,
        "state": "Running",
        "conditions": [
            {
                "type": "Accepted",
                "status": "True",
                "reason": "Valid",
                "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
                "observedGeneration": 1,
            }
        ],
        "startTime": "2026-01-01T00:00:00Z",
        "progress": {
            "phase": "training",
            "step": 31,
            "maxSteps": 50,
            "percent": "62 %",
            "loss": "0.0123",
            "eta": "1h12m",
        },
        "checkpoints": [{"step": 30, "uri": "s3://a/step-30", "digest": "sha256:0", "size": "1Mi"}],
        "lastCheckpointTime": "2026-01-01T00:00:00Z",
        "restarts": 2,
        "attempts": [{"number": 1, "cause": "NodeLost", "exitCode": -9, "log": ["one", "two"], "counted": False}],
        "outputs": [{"uri": "s3://a", "kind": "adapter"}],
        "evaluation": {"loss": "1.2"},
    }
    api.apply(bad_specs.changed(GOOD, {"metadata.name": "shown"}), namespace=space)
    patch = json.dumps({"status": status})
    api.kubectl("patch", "ftj", "shown", "-n", space, "--subresource=status", "--type=merge", "-p", patch)
    assert api.get(JOBS, "shown", namespace=space)["status"] == status

    shown = api.kubectl("get", "ftj", "shown", "-n", space).splitlines()
    assert shown[0].split() == ["NAME", "STATE", "PROGRESS", "STEP", "LOSS", "ETA", "CHECKPOINT", "RESTARTS", "AGE"]
    assert shown[1].split()[:7] == ["shown", "Running", "62", "%", "31", "0.0123", "1h12m"]
    wide = api.kubectl("get", "ftj", "shown", "-n", space, "-o", "wide")
    for word in ("STAGE", "METHOD", "MODEL", "MESSAGE", "sft", "lora", "hf://HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert word in wide

    selected = api.kubectl("get", "ftj", "-n", space, "-o", "name", "--field-selector=status.state=Running")
    assert "finetunejob.finetune.dev/shown" in selected
    assert "waiting" not in selected


def test_kubectl_explain_prints_the_docstring(api: Access) -> None:
    assert "Peak learning rate of AdamW." in api.kubectl("explain", "finetunejob.spec.training.learning_rate")
    assert "How many failures of the run itself" in api.kubectl("explain", "ftj.spec.recovery.maxRestarts")
    assert "16 for lora, moelora, qlora" in api.kubectl("explain", "ftj.spec.method.r")


def test_it_is_listed_with_everything(api: Access, space: str, jobs: tuple[Object, Object]) -> None:
    assert "finetunejob.finetune.dev/started" in api.kubectl("get", "all", "-n", space, "-o", "name")
