"""Mistakes of a spec: each is told with field, value, what is accepted and the remedy, and all at once."""

import ast
import copy
import importlib.util
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings

from finetune_api import base, kubeyaml, schema
from finetune_api.checks import CHECKS, SCHEDULER_KWARGS
from finetune_api.compatibility import Row
from finetune_api.guesses import FOREIGN
from finetune_api.methods import Full, Lora, Qlora
from finetune_api.mistakes import Mistake, changed, read
from finetune_api.rules import NAME_LENGTH, RULES, compatibility_rules
from finetune_api.spec import FineTuneJobSpec
from finetune_operator import manifests
from tests.unit import bad_specs, good_specs
from tests.unit.bad_specs import BAD, GOOD, Bad
from tests.unit.changed_specs import changed_specs

pytestmark = pytest.mark.unit


def mistakes_of(change: dict[str, Any]) -> list[Mistake]:
    found = read(bad_specs.changed(GOOD, change))
    return found if isinstance(found, list) else []


# ---- the table ----


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.id)
def test_a_bad_spec_is_refused_by_one_message_that_says_it_all(bad: Bad) -> None:
    found = read(bad.object)
    assert isinstance(found, list)
    [mistake] = found
    assert mistake.field == bad.field
    message = mistake.text()
    assert bad.says in message
    assert message.startswith(f"{bad.field}: ")
    assert "; accepted: " in message
    assert "; remedy: " in message
    assert "\n" not in message


def test_every_rule_has_a_bad_spec() -> None:
    told = {(m.field.replace("[0]", "[]").replace("[1]", "[]"), m.accepted) for b in BAD for m in read(b.object)}  # type: ignore[union-attr]
    rules = {(".".join(p for p in (rule.at, rule.field) if p), rule.accepted) for rule in RULES}
    assert not rules - told


def test_ids_are_unique() -> None:
    assert len({bad.id for bad in BAD}) == len(BAD)


@pytest.mark.parametrize("good", good_specs.GOOD, ids=lambda good: good.id)
def test_a_good_spec_is_read(good: good_specs.Good) -> None:
    assert isinstance(read(good.object), FineTuneJobSpec)


# ---- all at once ----


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    found = mistakes_of(
        {
            "metadata.name": "Tune",
            "spec.model": {"uri": "a/b", "revision": 3},
            "spec.method": {"type": "full", "r": 8, "target_modules": ["a"]},
            "spec.data.train[0].weight": 0,
            "spec.data.train[1]": {"uri": "s3://a/b.xlsx"},
            "spec.data.evl": [],
            "spec.training": {"learning_rate": -1, "max_steps": 0, "eval_steps": 5, "warmup_steps": 1.5},
            "spec.deepspeed": {"gradient_clipping": 2, "scheduler": {}, "zero_optimization": {"stage": 9}},
            "spec.workers": {"replicas": 0, "template": {"spec": {"hostname": "x"}}},
            "spec.output": {"merge": True},
            "spec.recovery.hangTimeout": "1s",
        }
    )
    assert [mistake.field for mistake in found] == [
        "metadata.name",
        "spec.model.uri",
        "spec.model.revision",
        "spec.method.r",
        "spec.method.target_modules",
        "spec.data.evl",
        "spec.data.train[0].weight",
        "spec.data.train[1].uri",
        "spec.training.learning_rate",
        "spec.training.max_steps",
        "spec.training.warmup_steps",
        "spec.training.eval_steps",
        "spec.deepspeed.zero_optimization.stage",
        "spec.deepspeed.scheduler",
        "spec.deepspeed.gradient_clipping",
        "spec.workers.replicas",
        "spec.workers.template.spec.hostname",
        "spec.output.uri",
        "spec.output.merge",
        "spec.recovery.hangTimeout",
    ]


def test_a_rule_says_nothing_of_a_field_that_is_wrong_itself() -> None:
    found = mistakes_of({"spec.training.eval_steps": "often", "spec.training.warmup_steps": -1})
    assert [m.field for m in found] == ["spec.training.warmup_steps", "spec.training.eval_steps"]


@pytest.mark.parametrize("spec", [None, [], "x", 3])
def test_a_spec_that_is_no_object_is_one_mistake(spec: Any) -> None:
    found = read({**GOOD, "spec": spec})
    assert isinstance(found, list)
    assert [m.field for m in found] == ["spec"]


def test_the_object_around_the_spec_is_judged_too() -> None:
    found = read({"apiVersion": "finetune.dev/v1", "kind": "Job", "metadata": {}, "sepc": {}, "spec": GOOD["spec"]})
    assert isinstance(found, list)
    assert {m.field for m in found} == {"apiVersion", "kind", "metadata.name", "sepc"}
    assert "did you mean spec?" in found[0].text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"apiVersion": bad_specs.Delete}, "apiVersion: it is missing; accepted: finetune.dev/v1alpha1"),
        ({"kind": bad_specs.Delete}, "kind: it is missing; accepted: FineTuneJob"),
        ({"metadata": bad_specs.Delete}, "metadata.name: it is missing"),
        ({"metadata": "nope"}, 'metadata: "nope" is not accepted; accepted: an object with name'),
        ({"metadata.name": 123}, "remedy: begin it with a letter"),
        ({"metadata.name": ["a"]}, "remedy: write a text"),
        ({"metadata.namespace": "Team_A"}, 'metadata.namespace: "Team_A" is not accepted'),
        ({"metadata.namespace": "team.a"}, "at most 63 lower-case letters, digits and -"),
        ({"metadata.labels": ["a"]}, "metadata.labels: "),
        ({"metadata.labels": {"team": 7}}, "metadata.labels[team]: 7 is not accepted; accepted: a text"),
        ({"metadata.labels": {"team": "a b"}}, "or make it an annotation"),
        ({"metadata.annotations": {"a": True}}, "metadata.annotations[a]: true is not accepted"),
    ],
    ids=str,
)
def test_what_is_wrong_around_the_spec_is_told(change: dict[str, Any], said: str) -> None:
    [mistake] = mistakes_of(change)
    assert said in mistake.text()


def test_what_is_right_around_the_spec_is_let_through() -> None:
    labels = {"a.b/c": "x_1.y", "empty": "", "null": None}
    change = {"metadata": {"name": "a", "namespace": "team-1", "labels": labels, "annotations": {"a": "any thing"}}}
    assert not mistakes_of(change)


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("meta-llama/Llama-3.1-8B", "here: hf://meta-llama/Llama-3.1-8B"),
        ("https://huggingface.co/a/b", "here: hf://a/b"),
        ("/models/x", "here: file:///models/x"),
        ("gcs://bucket/x", "here: gs://bucket/x"),
        ("s3a://bucket/x", "here: s3://bucket/x"),
    ],
)
def test_what_was_probably_meant_by_a_uri_is_told(uri: str, meant: str) -> None:
    [mistake] = mistakes_of({"spec.model.uri": uri})
    assert meant in mistake.text()


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("./x.jsonl", "; here: file://./x.jsonl (from the folder of the YAML file, with finetune only)"),
        ("../x", "; here: file://../x ("),
        ("data/x.jsonl", "; here: file://./data/x.jsonl ("),
        ("file://output/x", "; here: file://./output/x ("),
        ("file://~/x", "; here: file:///home/NAME/x (~ is not resolved)"),
        ("~/x", "; here: file:///home/NAME/x"),
        ("tatsu-lab/alpaca", "; here: hf://datasets/tatsu-lab/alpaca"),
    ],
)
def test_what_was_probably_meant_by_a_path_is_told(uri: str, meant: str) -> None:
    [mistake] = mistakes_of({"spec.data.train[0].uri": uri})
    assert meant in mistake.text()


@pytest.mark.parametrize("uri", ["", "file://", "file:///", "ftp://a/b"])
def test_nothing_is_guessed_where_nothing_is_known(uri: str) -> None:
    [mistake] = mistakes_of({"spec.data.train[0].uri": uri})
    assert "; here: " not in mistake.text()


def test_long_values_are_cut_and_lines_joined() -> None:
    [mistake] = mistakes_of({"spec.data.chat_template": "one\n" * 1000})
    assert len(mistake.text()) < 600
    assert "\n" not in mistake.text()


def test_anything_at_all_is_read_without_an_exception() -> None:
    """300 random specs, each with up to four values of any kind at any known or unknown place."""
    chance = random.Random(7)
    values: list[Any] = [
        None,
        True,
        0,
        -1,
        1.5,
        "",
        "x",
        "1e-3",
        [],
        ["a"],
        [1],
        [None],
        {},
        {"a": 1},
        {"type": "full"},
    ]
    paths = [path for bad in BAD for path in bad.change] + list(GOOD["spec"]) + ["metadata", "metadata.name"]
    for _ in range(300):
        raw = copy.deepcopy(GOOD)
        for path in chance.sample(paths, chance.randint(1, 4)):
            try:
                raw = bad_specs.changed(raw, {path: copy.deepcopy(chance.choice(values))})
            except (KeyError, TypeError, AttributeError, IndexError):
                continue  # the place is gone by an earlier change
        found = read(raw)
        for mistake in found if isinstance(found, list) else []:
            assert mistake.text()


# ---- what is not a mistake ----


def test_keys_of_deepspeed_that_agree_are_no_mistake() -> None:
    assert not mistakes_of(
        {
            "spec.workers": {"replicas": 2, "gpusPerWorker": 4},
            "spec.training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            "spec.deepspeed": {
                "train_batch_size": 64,
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": 4,
                "gradient_clipping": 1,
                "bf16": {"enabled": "auto"},
                "fp16": {"enabled": False},
                "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.9, 0.999], "eps": "auto"}},
                "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
                "some_key_of_tomorrow": {},
            },
        }
    )


def test_null_means_unset_as_on_a_cluster() -> None:
    found = read(bad_specs.changed(GOOD, {"spec.training": None, "spec.checkpoint": {"uri": None, "save_steps": None}}))
    assert found == read(GOOD)


def test_a_whole_float_is_an_integer_as_on_a_cluster() -> None:
    found = read(bad_specs.changed(GOOD, {"spec.workers.replicas": 2.0}))
    assert isinstance(found, FineTuneJobSpec)
    assert found.workers.replicas == 2


def test_a_method_without_a_type_is_lora() -> None:
    found = read(bad_specs.changed(GOOD, {"spec.method": {"r": 8}}))
    assert isinstance(found, FineTuneJobSpec)
    assert found.method == Lora(type="lora", r=8)


# ---- guesses ----


@pytest.mark.parametrize(
    ("written", "guess"),
    {
        "spec.method.lora_r": "r",
        "spec.method.rank": "r",
        "spec.method.lora_alhpa": "lora_alpha",
        "spec.lora_r": "spec.method.r",
        "spec.training.r": "spec.method.r",
        "spec.method.dropout": "lora_dropout",
        "spec.training.batch_size": "per_device_train_batch_size",
        "spec.training.lr": "learning_rate",
        "spec.batch_size": "spec.training.per_device_train_batch_size",
        "spec.data.cutoff_len": "max_length",
        "spec.training.max_seq_length": "spec.data.max_length",
        "spec.training.epochs": "num_train_epochs",
        "spec.training.bf16": "spec.model.dtype",
        "spec.model.torch_dtype": "dtype",
        "spec.output.path": "uri",
        "spec.gpus": "spec.workers.gpusPerWorker",
        "spec.workers.gpus": "gpusPerWorker",
        "spec.dataset": "spec.data.train",
        "spec.data.dataset": "train",
        "spec.output_dir": "spec.output.uri",
        "spec.model.name": None,
        "spec.training.zzz": None,
    }.items(),
)
def test_the_likely_field_is_named_and_not_all_there_are(written: str, guess: str | None) -> None:
    [mistake] = mistakes_of({written: 1})
    assert mistake.remedy == (f"did you mean {guess}?" if guess else "remove it, or correct its name")
    assert mistake.accepted.count(",") <= 12, "a list nobody reads"


def test_what_other_tools_call_a_field_is_a_field_of_ours() -> None:
    known = {path for path, _, _ in schema.fields(schema.spec_schema(), "spec")}
    assert set(FOREIGN.values()) <= known
    assert not {name for name in FOREIGN if f"spec.{name}" in known}


@pytest.mark.parametrize(
    ("written", "remedy"),
    [("2e-4", "0.0002"), ("1e-5", "1.0e-05"), (" 3 ", "3"), ("1.5e-7", "1.5e-07")],
)
def test_a_number_in_quotes_is_given_back_as_every_reader_takes_it(written: str, remedy: str) -> None:
    [mistake] = mistakes_of({"spec.training.learning_rate": written})
    assert mistake.remedy == f"write it as a number, without quotes: {remedy}"
    assert yaml.safe_load(remedy) == kubeyaml.load(remedy)[0] == float(written)


# ---- anything ----


@settings(max_examples=200, deadline=None)
@given(changed_specs())
def test_whatever_is_written_is_judged_in_words(raw: dict[str, Any]) -> None:
    """Never a traceback. The judgement is compared with the API server's in tests/cluster_api."""
    found = read(raw)
    for mistake in found if isinstance(found, list) else ():
        assert re.fullmatch(r"[\w.\[\]/ -]+: .+; accepted: .+; remedy: .+", mistake.text()), mistake.text()


# ---- tables and limits ----


def test_names_are_as_long_as_the_host_names_of_pods_allow() -> None:
    job = manifests.job_name("x" * NAME_LENGTH, 99999)
    assert len(f"{job}-9999") == 63
    assert len(manifests.service_name("x" * NAME_LENGTH)) <= 63


def test_a_row_of_the_table_becomes_rules() -> None:
    table = {
        "full": Row(stages=("sft", "dpo"), zero_stages=(0, 1, 2, 3), merge=False),
        "prompt": Row(stages=("sft",), zero_stages=(0,), packing=False, gradient_checkpointing=False),
    }
    rules = compatibility_rules(table, ("sft", "dpo"))
    assert [(rule.cel, rule.accepted) for rule in rules] == [
        ("self.method.type != 'full' || !self.output.merge", "false with spec.method.type: full"),
        ("self.method.type != 'prompt' || self.stage in ['sft', 'rlaif']", "one of sft with spec.method.type: prompt"),
        (
            "self.method.type != 'prompt' || !has(self.deepspeed.zero_optimization.stage) || "
            "self.deepspeed.zero_optimization.stage in [0]",
            "one of 0 with spec.method.type: prompt",
        ),
        ("self.method.type != 'prompt' || !self.data.packing", "false with spec.method.type: prompt"),
        (
            "self.method.type != 'prompt' || !self.training.gradient_checkpointing",
            "false with spec.method.type: prompt",
        ),
    ]


def test_arguments_of_schedules_are_those_transformers_knows() -> None:
    """Guards the table against a schedule that is added to the spec without its arguments."""
    choices = FineTuneJobSpec.model_fields["training"].annotation.model_fields["lr_scheduler_type"]  # type: ignore[union-attr]
    assert set(SCHEDULER_KWARGS) == set(choices.annotation.__args__)  # type: ignore[union-attr]


def test_every_key_of_the_installed_deepspeed_is_let_through() -> None:
    """Read from its source: importing it takes seconds."""
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        pytest.skip("deepspeed is not installed")
    source = (Path(found.origin).parent / "runtime" / "zero" / "config.py").read_text()
    config = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "DeepSpeedZeroConfig")
    keys = [ast.unparse(node.target) for node in config.body if isinstance(node, ast.AnnAssign)]
    keys += re.findall(r'alias="([^"]+)"', source)
    assert len(keys) > 30
    ours = {"stage", "offload_param", "offload_optimizer", "cpu_offload", "cpu_offload_param"}
    change = {f"spec.deepspeed.zero_optimization.{key}": 1 for key in keys if key not in ours}
    assert not mistakes_of(change)


def test_checks_do_not_raise_on_good_specs() -> None:
    assert len(CHECKS) >= 5
    assert isinstance(read(GOOD), FineTuneJobSpec)


# ---- immutability ----


def test_what_changed_is_told_with_both_values_and_the_way_out() -> None:
    old, new = read(GOOD), read(bad_specs.changed(GOOD, {"spec.training.learning_rate": 0.5, "spec.suspend": True}))
    assert isinstance(old, FineTuneJobSpec) and isinstance(new, FineTuneJobSpec)
    [mistake] = changed(old, new)
    assert mistake.text() == (
        "spec.training.learning_rate: 0.5 is not accepted; accepted: 0.0002, which the run was started with; remedy: "
        "make a new FineTuneJob for another run; with spec.model.uri: job://NAME it starts from the output of this one"
    )


def test_keys_no_schema_knows_are_compared_too() -> None:
    old = read(bad_specs.changed(GOOD, {"spec.deepspeed.a": 1, "spec.method.target_modules": ["q"]}))
    new = read(bad_specs.changed(GOOD, {"spec.deepspeed.a": 2, "spec.method.target_modules": ["k"]}))
    assert isinstance(old, FineTuneJobSpec) and isinstance(new, FineTuneJobSpec)
    assert [m.field for m in changed(old, new)] == ["spec.method.target_modules", "spec.deepspeed.a"]


# ---- small things ----


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("1h30m", 5400), ("500ms", 0.5), ("1.5h", 5400), ("0s", 0)])
def test_lengths_of_time(text: str, value: float) -> None:
    assert base.seconds(text) == value


def test_methods_keep_their_own_defaults() -> None:
    assert Qlora(type="qlora").bnb_4bit_quant_type == "nf4"
    assert Full(type="full").model_dump() == {"type": "full"}


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("spec.data.train", ["rows.jsonl"], "write {uri: file://./rows.jsonl}"),
        ("spec.output", "./out", "write {uri: file://./out}"),
        ("spec.output", "s3://team/out", "write {uri: s3://team/out}"),
        ("spec.method", {"type": "lora", "alpha": 16}, "lora calls it lora_alpha"),
    ],
)
def test_a_remedy_is_what_was_most_likely_meant(field: str, value: Any, remedy: str) -> None:
    assert any(remedy in mistake.text() for mistake in mistakes_of({field: value}))
