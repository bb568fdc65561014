"""The CRD on a real API server: it refuses what Python refuses, fills in the defaults Python fills in, and says so.

The proof that CEL and Python are two implementations of one thing. Needs an API server and nothing else.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from finetune_api import crd
from finetune_api.mistakes import Mistake, changed, read
from finetune_api.spec import FineTuneJobSpec
from tests.cluster.access import Access, Object
from tests.unit import bad_specs
from tests.unit.bad_specs import BAD, CONDITION, GOOD, RULE, SCHEMA, Bad
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
    """Asks as ``kubectl create`` or ``kubectl replace`` do, with ``--dry-run=server --validate=strict``: what would
    be stored, or the words of the refusal. A kubectl for each of hundreds of specs would cost a minute."""
    jobs = client.CustomObjectsApi(config.new_client_from_config(str(api.kubeconfig)))
    place = ("finetune.dev", "v1alpha1", space, "finetunejobs")
    how = {"dry_run": "All", "field_validation": "Strict"}

    def ask(body: Object, *, replace: bool = False) -> Object | str:
        try:
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

_CONDITION_ONLY = ("spec.deepspeed.", "spec.workers.template.", "spec.method.target_modules")
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
    if field.startswith("spec.training.lr_scheduler_kwargs"):
        return not isinstance(raw["spec"]["training"].get("lr_scheduler_kwargs", {}), dict)
    declared = ("spec.deepspeed.zero_optimization", "spec.deepspeed.zero_optimization.stage")
    return field in declared or not field.startswith(_CONDITION_ONLY)


def _admissible(raw: Object) -> bool:
    """Python finds nothing that the API server can see."""
    found = read(raw)
    return isinstance(found, FineTuneJobSpec) or not any(_seen_by_the_server(m, raw) for m in found)


@cache
def _random_specs() -> list[Object]:
    """400 specs with up to three changes each, taken from the bad ones and the good ones or made up."""
    chance = random.Random(20)
    pool = [(path, value) for entry in (*BAD, *GOOD_SPECS) for path, value in entry.change.items()]
    # Names are judged by Kubernetes first, and an unknown field is judged by the one who asks (kubectl).
    unknown = {bad.field for bad in BAD if bad.server_says == "unknown field"}
    pool = [(path, value) for path, value in pool if not path.startswith("metadata") and path not in unknown]
    values: list[Any] = [None, True, 0, 1, -1, 1.5, 10**7, "", "x", "1h", [], ["a"], [{}], {}, {"type": "full"}]
    places = [path for path, _ in pool]
    specs: list[Object] = []
    while len(specs) < 400:
        raw = copy.deepcopy(GOOD)
        raw["metadata"]["name"] = f"random-{len(specs)}"
        try:
            for _ in range(chance.randint(1, 3)):
                made_up = (chance.choice(places), chance.choice(values))
                path, value = made_up if chance.random() < 0.4 else chance.choice(pool)
                raw = bad_specs.changed(raw, {path: copy.deepcopy(value)})
        except (KeyError, TypeError, AttributeError, IndexError):
            continue  # one change took away what another one changes
        specs.append(raw)
    return specs


def test_python_and_the_api_server_agree_on_random_specs(api: Access, space: str) -> None:
    specs = _random_specs()
    done = api.try_kubectl(
        "create",
        "--dry-run=server",
        "--validate=strict",
        "-n",
        space,
        "-o",
        "name",
        "-f",
        "-",
        input="\n---\n".join(json.dumps(spec) for spec in specs),
    )
    taken = {line.rpartition("/")[2].split()[0] for line in done.stdout.splitlines()}
    assert 50 < len(taken) < 350, done.stderr[:2000]
    wrong = []
    for raw in specs:
        found = read(raw)
        if (raw["metadata"]["name"] in taken) != _admissible(raw):
            told = [m.text() for m in found] if isinstance(found, list) else ["(nothing)"]
            wrong.append((raw["metadata"]["name"] in taken, raw["spec"], told))
    assert not wrong, "\n".join(f"taken={t} {json.dumps(spec)} Python says {told}" for t, spec, told in wrong[:10])


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
