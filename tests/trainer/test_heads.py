"""Classification and sequence-to-sequence in whole runs: each learns a rule from rows that follow it, its result is
read by plain transformers and peft, and it is the same however the run was cut, shared out and interrupted.

All runs of a gang are made in one start, as in ``test_resume.py``.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import tiny, tiny_heads
from tests.trainer.test_resume import play

STEPS = 6
FAMILY = {
    "opinions": "distilbert",
    "pairs": "bert",
    "numbers": "bert",
    "several": "distilbert",
    "named": "bert",
    "mirrored": "t5",
}
STAGE = dict.fromkeys(FAMILY, "sequence_classification") | {"named": "token_classification", "mirrored": "seq2seq"}
FULL = {"method": {"type": "full"}}
LORA = {"method": {"type": "lora", "r": 4}, "training": {"learning_rate": 5e-3}}
WRITING = {"evaluation": {"predict_with_generate": True, "generation_max_length": 6}}
FASTER = {"training": {"learning_rate": 1e-2}}
LEARNING: dict[str, tuple[str, dict[str, Any], int]] = {
    # what of tiny_heads, changes, steps
    "opinions": ("opinions", FULL, 70),
    "opinions by LoRA": ("opinions", LORA | {"merge": True}, 70),
    "pairs": ("pairs", FULL, 160),
    "numbers": ("numbers", FULL, 60),
    "several": ("several", FULL, 60),
    "named by LoRA": ("named", LORA | FASTER | {"merge": True}, 120),
    "mirrored": ("mirrored", FULL | WRITING | {"training": {"learning_rate": 3e-3}}, 260),
}
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "opinions": ("opinions", LORA),
    "pairs, full": ("pairs", FULL),
    "numbers": ("numbers", {"method": {"type": "mam", "bottleneck_size": 4, "num_virtual_tokens": 3}}),
    "several": ("several", {"method": {"type": "bitfit"}}),
    "named": ("named", {"method": {"type": "p_tuning_v2", "num_virtual_tokens": 3}}),
    "mirrored": ("mirrored", LORA | WRITING),
    "mirrored, prefix": ("mirrored", {"method": {"type": "prefix_tuning", "num_virtual_tokens": 3}} | WRITING),
}


def zero(stage: int) -> dict[str, Any]:
    # ZeRO-3 leaves weights as small as ours whole, unless it is told not to.
    threshold = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **threshold}}


GANG: dict[str, tuple[str, str, dict[str, Any]]] = {
    # the run that one process makes, and how two make it
    "opinions": ("opinions", "opinions", SHORT["opinions"][1]),
    "opinions, ZeRO-3": ("opinions", "opinions", SHORT["opinions"][1] | {"deepspeed": zero(3)}),
    "pairs, ZeRO-2": ("pairs, full", "pairs", FULL | {"deepspeed": zero(2)}),
    "pairs, ZeRO-3": ("pairs, full", "pairs", FULL | {"deepspeed": zero(3)}),
    "numbers": ("numbers", "numbers", SHORT["numbers"][1]),
    "named": ("named", "named", SHORT["named"][1]),
    "mirrored": ("mirrored", "mirrored", SHORT["mirrored"][1]),
}
CUTS = ("opinions", "several", "named", "mirrored")


def job(root: Path, folder: str, rule: str, changes: dict[str, Any], steps: int, **plan: Any) -> dict[str, Any]:
    """A plan whose checkpoints and output go to ``root/folder``."""
    where = {
        "stage": STAGE[rule],
        "model": {"uri": f"file://{root}/{FAMILY[rule]}"},
        "data": {
            "train": [{"uri": f"file://{root}/{rule}.jsonl"}],
            "eval": [{"uri": f"file://{root}/{rule}-eval.jsonl"}],
        },
        "checkpoint_uri": f"file://{root}/{folder}/checkpoints",
        "output_uri": f"file://{root}/{folder}/output",
        "training": {
            "max_steps": steps,
            "eval_steps": max(3, steps),
            "learning_rate": 2e-3,
            "warmup_steps": 0.1 * steps if steps > STEPS else 0,
            "weight_decay": 0.0,
            "per_device_train_batch_size": 16 if steps > STEPS else 2,
            "per_device_eval_batch_size": 64 if steps > STEPS else 4,
        },
        "global_batch_size": 32 if steps > STEPS else 6,
        "save_steps": max(3, steps),
    }
    config = tiny.make_config(root, **tiny.merge(where, changes))
    return {"name": folder, "config": config.model_dump(mode="json"), "attempt": 1, "work": str(root / "work")} | plan


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, and rows of every rule."""
    root = tmp_path_factory.mktemp("heads")
    for family in set(FAMILY.values()):
        wide = {} if family == "t5" else {"initializer_range": 0.12}
        tiny_heads.make(root / family, family, **wide)
    for rule in FAMILY:
        make = getattr(tiny_heads, rule)
        tiny_heads.write_rows(root / f"{rule}.jsonl", make(1500, 1))
        tiny_heads.write_rows(root / f"{rule}-eval.jsonl", make(150, 2))
        tiny_heads.write_rows(root / f"{rule}-few.jsonl", make(21, 3))
    return root


@pytest.fixture(scope="module")
def learned(root: Path) -> dict[str, dict[str, Any]]:
    """The runs that learn their rule."""
    plans = [
        job(root, f"learn/{name}", rule, changes, steps, name=name) for name, (rule, changes, steps) in LEARNING.items()
    ]
    (root / "learn").mkdir()
    return play(root / "learn", plans, 1)


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, dict[str, Any]]:
    """The short runs, by one process."""
    plans = []
    for name, (rule, changes) in SHORT.items():
        few = {"data": {"eval": [{"uri": f"file://{root}/{rule}-few.jsonl"}]}}
        changes = tiny.merge(changes, few)
        plans.append(job(root, name, rule, changes, STEPS, name=name))
        # Its last checkpoint is lost: it goes on from step 3.
        plans.append(job(root, name, rule, changes, STEPS, name=f"{name}/again", attempt=2, lose=STEPS))
        if name in CUTS:
            cut = {"training": {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 5}}
            plans.append(job(root, f"{name}/3", rule, tiny.merge(changes, cut), STEPS, name=f"{name}/3"))
    return play(root, plans, 1)


@pytest.fixture(scope="module")
def gang(root: Path) -> dict[str, dict[str, Any]]:
    """Everything that two processes do."""
    plans = []
    for name, (_, rule, changes) in GANG.items():
        few = {"data": {"eval": [{"uri": f"file://{root}/{rule}-few.jsonl"}]}}
        plans.append(job(root, f"gang/{name}", rule, tiny.merge(changes, few), STEPS, name=name))
    return play(root, plans, 2)


def said(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What must be the same, of every line of metrics.jsonl."""
    assert "cause" not in result, result.get("trace", "")
    assert result["finished"]
    left_out = ("memory", "time", "mfu", "tokens_per_second", "step_seconds", "data_wait_seconds")
    return [{k: v for k, v in record.items() if k not in left_out} for record in result["records"]]


def close(left: dict[str, Any], right: dict[str, Any]) -> None:
    """But for the order of sums."""
    for one, other in zip(said(left), said(right), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name == "eval_confusion":
                assert other[name] == value
            else:
                assert other[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


# --- it learns ------------------------------------------------------------------------------------------------------

FIGURES: dict[str, set[str]] = {
    "opinions": {"accuracy", "f1", "f1_macro", "f1_micro", "mcc"},
    "pairs": {"accuracy", "f1", "f1_macro", "f1_micro", "mcc"},
    "several": {"accuracy", "f1_macro", "f1_micro"},
    "numbers": {"mse", "mae", "pearson", "spearman"},
    "named": {"accuracy", "precision", "recall", "f1", "f1_macro", "f1_PER", "f1_LOC"},
    "mirrored": {"perplexity", "rouge1", "rouge2", "rougeL", "bleu", "exact_match"},
}
MAIN = {"numbers": "spearman", "named": "f1", "mirrored": "exact_match"}


@pytest.mark.parametrize("name", LEARNING)
def test_a_rule_is_learned_from_rows_that_follow_it(learned: dict[str, dict[str, Any]], name: str) -> None:
    rule = LEARNING[name][0]
    result = learned[name]
    said(result)
    told = result["evaluation"]
    assert told[MAIN.get(rule, "accuracy")] > 0.95, told
    assert {key for key in told if "/" not in key} == FIGURES[rule] | {"loss"}
    assert told["loss"] == told[f"loss/{rule}-eval"]


# --- what it leaves -------------------------------------------------------------------------------------------------


def again(root: Path, name: str, part: str = "") -> tuple[Any, Any]:
    """Model and tokenizer of a result, by transformers and peft alone."""
    import transformers
    from peft import PeftModel

    rule, changes, _ = LEARNING[name]
    out = root / "learn" / name / "output" / part
    kind = {
        "sequence_classification": "AutoModelForSequenceClassification",
        "token_classification": "AutoModelForTokenClassification",
        "seq2seq": "AutoModelForSeq2SeqLM",
    }[STAGE[rule]]
    loader = getattr(transformers, kind)
    if changes["method"]["type"] == "lora" and not part:
        described = transformers.AutoConfig.from_pretrained(out)
        model = PeftModel.from_pretrained(loader.from_pretrained(root / FAMILY[rule], config=described), out)
    else:
        model = loader.from_pretrained(out)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(out)


def rows_of(root: Path, rule: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"{rule}-eval.jsonl").read_text().splitlines()]


def their_loss(model: Any, tokenizer: Any, rule: str, rows: list[dict[str, Any]]) -> float:
    """transformers' own loss over all rows at once, of inputs that its tokenizer makes."""
    import torch

    if rule == "mirrored":
        inputs = tokenizer([row["source"] for row in rows], padding=True, return_tensors="pt")
        wanted = tokenizer(text_target=[row["target"] for row in rows], padding=True, return_tensors="pt").input_ids
        inputs["labels"] = wanted.masked_fill(wanted == tokenizer.pad_token_id, -100)
    elif rule == "named":  # one token per word, and one before and behind them
        texts = [row["tokens"] for row in rows]
        inputs = tokenizer(texts, is_split_into_words=True, padding=True, return_tensors="pt")
        inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
        for number, row in enumerate(rows):
            tags = [model.config.label2id[tag] for tag in row["tags"]]
            inputs["labels"][number, 1 : 1 + len(tags)] = torch.tensor(tags)
    else:
        second = [row["text_pair"] for row in rows] if rule == "pairs" else None
        inputs = tokenizer([row["text"] for row in rows], second, padding=True, return_tensors="pt")
        known = model.config.label2id
        labels: list[Any] = [row["label"] for row in rows]
        if rule == "several":
            labels = [[float(name in row["label"]) for name in known] for row in rows]
        elif rule != "numbers":
            labels = [known[row["label"]] for row in rows]
        inputs["labels"] = torch.tensor(labels)
    with torch.no_grad():
        return float(model(**inputs).loss)


@pytest.mark.parametrize("name", LEARNING)
def test_plain_libraries_read_the_result_and_come_to_the_same_loss(
    learned: dict[str, dict[str, Any]], root: Path, name: str
) -> None:
    rule = LEARNING[name][0]
    model, tokenizer = again(root, name)
    loss = their_loss(model, tokenizer, rule, rows_of(root, rule))
    assert loss == pytest.approx(learned[name]["evaluation"]["loss"], abs=1e-5)
    if LEARNING[name][1].get("merge"):
        merged, tokenizer = again(root, name, "merged")
        assert their_loss(merged, tokenizer, rule, rows_of(root, rule)) == pytest.approx(loss, abs=1e-4)


def test_the_written_model_knows_its_labels(learned: dict[str, dict[str, Any]], root: Path) -> None:
    configs = {name: again(root, name)[0].config for name in LEARNING if name != "mirrored"}
    assert configs["opinions"].id2label == {0: "negative", 1: "positive"}
    assert configs["opinions by LoRA"].label2id == {"negative": 0, "positive": 1}
    assert configs["several"].id2label == {0: "bird", 1: "cat", 2: "dog"}
    assert configs["named by LoRA"].id2label == dict(enumerate(("B-LOC", "B-PER", "I-PER", "O")))
    kinds = {name: config.problem_type for name, config in configs.items()}
    assert kinds["pairs"] == "single_label_classification"
    assert kinds["several"] == "multi_label_classification"
    assert (kinds["numbers"], configs["numbers"].num_labels) == ("regression", 1)
    assert not (root / "learn" / "opinions" / "output" / "chat_template.jinja").exists()


def test_a_pipeline_of_transformers_says_the_labels(learned: dict[str, dict[str, Any]], root: Path) -> None:
    from transformers import pipeline

    folder = str(root / "learn" / "opinions" / "output")
    judge = pipeline("text-classification", model=folder)
    assert [said["label"] for said in judge(["red hello the one", "the two five a green"])] == ["positive", "negative"]


def test_figures_and_confusion_stand_in_metrics_and_report(learned: dict[str, dict[str, Any]], root: Path) -> None:
    output = root / "learn" / "opinions" / "output"
    line = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    matrix, told = line["eval_confusion"], learned["opinions"]["evaluation"]
    assert sum(map(sum, matrix)) == 150
    assert (matrix[0][0] + matrix[1][1]) / 150 == pytest.approx(told["accuracy"]) == line["eval_accuracy"]
    page = (output / "report.html").read_text()
    assert "Confusion matrix" in page
    assert "negative" in page
    assert f"{told['mcc']:.4f}" in page
    texts = (root / "learn" / "mirrored" / "output" / "report.html").read_text()
    assert "ROUGE-L" in texts
    assert "BLEU" in texts


# --- it is the same, however it was made ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHORT)
def test_a_resumed_run_is_an_uninterrupted_one(alone: dict[str, dict[str, Any]], name: str) -> None:
    whole, resumed = said(alone[name]), said(alone[f"{name}/again"])
    assert len(whole) == STEPS
    assert resumed == whole


@pytest.mark.parametrize("name", CUTS)
def test_the_cut_of_the_batch_changes_nothing(alone: dict[str, dict[str, Any]], name: str) -> None:
    close(alone[name], alone[f"{name}/3"])


@pytest.mark.parametrize("name", GANG)
def test_two_processes_train_as_one(
    alone: dict[str, dict[str, Any]], gang: dict[str, dict[str, Any]], name: str
) -> None:
    close(alone[GANG[name][0]], gang[name])


def test_a_step_tells_the_accuracy_of_its_rows(learned: dict[str, dict[str, Any]]) -> None:
    last = learned["opinions"]["records"][-1]
    assert last["accuracy"] > 0.9
    assert not math.isnan(last["loss"])
    assert "accuracy" not in learned["numbers"]["records"][-1]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "opt", "bart"])
def test_rows_are_cut_at_the_positions_that_a_model_has(family: str, tmp_path: Path) -> None:
    import torch
    import transformers

    from finetune_trainer.model import most_positions

    tiny_heads.make(tmp_path, family, max_position_embeddings=32)
    most = most_positions(tmp_path)
    assert most is not None and 30 <= most <= 32
    model = getattr(transformers, tiny_heads.SHAPES[family][0]).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        model(input_ids=torch.full((1, most), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1 + (2 if family in ("opt", "bart") else 0)), 7))


def test_a_model_that_computes_its_positions_takes_rows_of_any_length(tmp_path: Path) -> None:
    from finetune_trainer.model import most_positions

    tiny_heads.make(tmp_path, "t5")
    assert most_positions(tmp_path) is None
    assert most_positions(tmp_path / "nothing") is None
