"""Every stage in whole runs: however the batch is cut, and whoever does it, and after a crash, to the same figures.

As in ``test_resume.py`` all runs of a gang are made in one start.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import tiny
from tests.trainer.test_resume import figures, play

STEPS = 6


def source(root: Path, name: str, form: str, **more: Any) -> dict[str, Any]:
    return {"uri": f"file://{root}/{name}.jsonl", "format": form, **more}


def data(stage: str, root: Path) -> dict[str, Any]:
    """Rows of the stage's kind, and held-out ones."""
    if stage == "pretrain":
        both = [source(root, "general", "text", weight=2.0), source(root, "domain", "text", weight=0.5)]
        return {"train": both, "eval": [source(root, "general-eval", "text"), source(root, "domain-eval", "text")]}
    form = {"sft": "alpaca", "kto": "kto"}.get(stage, "preference")
    names = {"sft": ("rows", "rows-eval"), "kto": ("verdicts", "verdicts-eval")}.get(stage, ("pairs", "pairs-eval"))
    return {"train": [source(root, names[0], form)], "eval": [source(root, names[1], form)]}


def zero(stage: int) -> dict[str, Any]:
    # ZeRO-3 leaves weights as small as ours whole, unless it is told not to.
    threshold = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **threshold}}


FULL = {"method": {"type": "full"}, "training": {"learning_rate": 1e-3}}
LONGER = {"training": {"max_steps": 24, "eval_steps": 8, "learning_rate": 1e-2}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", FULL | {"data": {"packing": True}}),
    "sft, last answer": ("sft", {"sft": {"loss_on": "last_answer"}}),
    "sft, all": ("sft", {"sft": {"loss_on": "all"}}),
    "sft of pairs": ("sft", {"data": {"train": [{"format": "preference"}]}}),
    "dpo": ("dpo", {}),
    "dpo, precomputed": ("dpo", {"dpo": {"precompute_ref_log_probs": True}}),
    "dpo, full": ("dpo", FULL | {"deepspeed": zero(2)}),
    "dpo, checkpointed": ("dpo", {"dpo": {"rpo_alpha": 0.5}, "training": {"gradient_checkpointing": True}}),
    "dpo, prefix": ("dpo", {"method": {"type": "prefix_tuning", "num_virtual_tokens": 4}}),
    "dpo, unipelt": ("dpo", {"method": {"type": "unipelt"}}),
    "kto": ("kto", {}),
    "kto, full": ("kto", FULL),
    "kto of pairs": ("kto", {"data": {"train": [{"format": "preference"}]}}),
    "orpo": ("orpo", {}),
    "reward": ("reward", {"reward": {"center_rewards_coefficient": 0.01}}),
    "reward, full": ("reward", FULL | {"deepspeed": zero(2)}),
    "reward, checkpointed": ("reward", {"training": {"gradient_checkpointing": True}, "merge": True}),
    "reward, adapter": ("reward", {"method": {"type": "adapter"}}),
    "reward, qlora": ("reward", {"method": {"type": "qlora", "r": 4}}),
    "reward, longer": ("reward", LONGER),
    "dpo, longer": ("dpo", LONGER),
    "kto, longer": ("kto", LONGER),
}
GANG: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": RUNS["pretrain"],
    "dpo": RUNS["dpo"],
    "dpo, full": ("dpo", FULL | {"deepspeed": zero(3)}),
    "dpo, ZeRO-3": ("dpo", {"deepspeed": zero(3)}),
    "kto": RUNS["kto"],
    "kto, full": ("kto", FULL | {"deepspeed": zero(1)}),
    "orpo": RUNS["orpo"],
    "reward": RUNS["reward"],
    "reward, full": ("reward", FULL | {"deepspeed": zero(3)}),
}
CUTS = {"pretrain": 4, "dpo": 1, "dpo, checkpointed": 4, "kto": 4, "orpo": 1, "reward": 3}
"""Other sizes of a pass than 2."""
RESUMED = ("pretrain", "dpo", "dpo, full", "kto", "kto, full", "orpo", "reward")


def chain(root: Path) -> list[dict[str, Any]]:
    """sft, then dpo on its adapter and dpo on its merged model; and a third stage on the adapter of the second."""
    plans = [job(root, "chain/sft", ("sft", {"merge": True}), name="chain/sft")]
    outputs = [{"uri": f"file://{root}/chain/{name}/output"} for name in ("sft", "by-adapter")]
    for folder, stage, model in (
        ("chain/by-adapter", "dpo", {"adapters": outputs[:1]}),  # as the plan has it where model.uri is job://sft
        ("chain/by-model", "dpo", {"uri": f"{outputs[0]['uri']}/merged"}),
        ("chain/on", "dpo", {"adapters": [outputs[0] | {"train": True}]}),
        ("chain/reward", "reward", {"adapters": outputs}),
    ):
        plans.append(job(root, folder, (stage, {"model": model}), name=folder))
    return plans


WATCHED = {"load_best_model_at_end": True, "early_stopping_patience": 2, "eval_steps": 1, "max_steps": 12}
"""A learning rate at which the loss of held-out rows soon rises."""
BEST: dict[str, dict[str, Any]] = {
    "best": {"training": {**WATCHED, "learning_rate": 3e-2}, "save_total_limit": 1, "save_steps": 50},
    "best of accuracy": {
        "training": WATCHED | {"metric_for_best_model": "eval_accuracy/pairs-eval", "early_stopping_patience": 0}
    },
    "best of what is not told": {"training": {**WATCHED, "metric_for_best_model": "acuracy"}},
}


def job(root: Path, folder: str, run: tuple[str, dict[str, Any]], **plan: Any) -> dict[str, Any]:
    """A plan whose checkpoints and output go to ``root/folder``."""
    stage, changes = run
    rows = data(stage, root)
    form = changes.get("data", {}).get("train", [{}])[0].get("format")
    if form:
        rows["train"] = [source(root, "pairs", form)]
    where = {
        "stage": stage,
        "checkpoint_uri": f"file://{root}/{folder}/checkpoints",
        "output_uri": f"file://{root}/{folder}/output",
        "training": {"max_steps": STEPS, "eval_steps": 3, "warmup_steps": 0},
        "global_batch_size": 6,
    }
    if changes is LONGER:
        rows["eval"] = rows["train"]  # it learns them by heart
    merged = tiny.merge(tiny.merge(where, changes), {"data": rows})
    config = tiny.make_config(root, **merged)
    return {"name": folder, "config": config.model_dump(mode="json"), "attempt": 1, "work": str(root / "work")} | plan


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and rows of every kind."""
    return make_rows_of_every_kind(tmp_path_factory.mktemp("stages"))


def make_rows_of_every_kind(root: Path) -> Path:
    """A tiny model, and rows and held-out rows of every kind; the folder."""
    tiny.make_model(root / "model")
    for number, name in enumerate(("general", "domain", "general-eval", "domain-eval")):
        tiny.make_texts(root / f"{name}.jsonl", 9 if "eval" in name else 30, seed=number)
    for number, name in enumerate(("pairs", "pairs-eval", "verdicts", "verdicts-eval")):
        tiny.make_preferences(
            root / f"{name}.jsonl", 7 if "eval" in name else 24, seed=number, verdicts="verdicts" in name
        )
    for number, name in enumerate(("rows", "rows-eval")):
        tiny.make_rows(root / f"{name}.jsonl", 7 if "eval" in name else 24, seed=number)
    return root


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, dict[str, Any]]:
    """Everything that one process does."""
    plans = [job(root, name, run, name=name) for name, run in RUNS.items()]
    for name in RESUMED:  # its last checkpoint is lost: it goes on from step 3
        plans.append(job(root, name, RUNS[name], name=f"{name}/again", attempt=2, lose=STEPS))
    for name, size in CUTS.items():
        stage, changes = RUNS[name]
        cut = {"training": {"per_device_train_batch_size": size, "per_device_eval_batch_size": size}}
        plans.append(job(root, f"{name}/cut", (stage, tiny.merge(changes, cut)), name=f"{name}/cut"))
    plans += [job(root, name, ("dpo", changes), name=name) for name, changes in BEST.items()]
    crash = [("best/crash", {"crash_after": 3}), ("best/again", {"attempt": 2})]
    plans += [job(root, "best-broken", ("dpo", BEST["best"]), name=name, **plan) for name, plan in crash]
    return play(root, plans + chain(root), 1)


@pytest.fixture(scope="module")
def gang(root: Path) -> dict[str, dict[str, Any]]:
    """Everything that two processes do."""
    plans = [job(root, f"gang/{name}", run, name=name) for name, run in GANG.items()]
    plans.append(job(root, "gang/best", ("dpo", BEST["best"] | {"deepspeed": zero(2)}), name="best"))
    return play(root, plans, 2)


def close(left: dict[str, Any], right: dict[str, Any]) -> None:
    """The same losses, gradients and figures, but for the order of sums."""
    for one, other in zip(said(left), said(right), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            # A figure of a batch such as accuracy jumps where two numbers are nearly equal; these runs have no such.
            assert other[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


def said(result: dict[str, Any]) -> list[dict[str, float]]:
    assert "cause" not in result, result.get("trace", "")
    assert result["finished"]
    left_out = ("memory", "time", "mfu", "tokens_per_second", "step_seconds", "data_wait_seconds")
    return [{k: v for k, v in record.items() if k not in left_out} for record in result["records"]]


@pytest.mark.parametrize("name", RUNS)
def test_every_run_comes_to_its_end(alone: dict[str, dict[str, Any]], name: str) -> None:
    assert len(said(alone[name])) == (24 if "longer" in name else STEPS)
    # The test's words are few: held-out rows do stand in the training rows.
    assert alone[name]["progress"]["unhealthy"].keys() <= {"HeldOutRowsInTraining"}, "a good run raises no alarm"


@pytest.mark.parametrize("name", CUTS)
def test_the_cut_of_the_batch_changes_nothing(alone: dict[str, dict[str, Any]], name: str) -> None:
    close(alone[name], alone[f"{name}/cut"])


@pytest.mark.parametrize("name", GANG)
def test_two_processes_train_as_one(
    alone: dict[str, dict[str, Any]], gang: dict[str, dict[str, Any]], name: str
) -> None:
    close(alone["dpo" if name == "dpo, ZeRO-3" else name], gang[name])


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_an_uninterrupted_one(alone: dict[str, dict[str, Any]], name: str) -> None:
    assert figures(alone[f"{name}/again"]) == figures(alone[name])
    names = said(alone[name])[-1].keys()
    for whole, again in zip(alone[name]["records"], alone[f"{name}/again"]["records"], strict=True):
        assert {k: whole.get(k) for k in names} == {k: again.get(k) for k in names}


def test_every_source_is_evaluated_by_itself(alone: dict[str, dict[str, Any]]) -> None:
    told = alone["pretrain"]["evaluation"]
    assert {"loss", "loss/general-eval", "loss/domain-eval", "perplexity"} <= told.keys()
    assert told["loss/domain-eval"] < math.log(64)


def test_before_the_first_update_a_model_is_its_reference(alone: dict[str, dict[str, Any]]) -> None:
    """So the loss of the first step is that of no difference: for prefixes and gates, too, which begin at random."""
    for name in ("dpo", "dpo, precomputed", "dpo, full"):
        first = alone[name]["records"][0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5), name
        assert first["margin"] == pytest.approx(0.0, abs=1e-5)
    assert alone["kto"]["records"][0]["loss"] == pytest.approx(0.5, abs=1e-5)
    for name in ("dpo, prefix", "dpo, unipelt"):
        assert alone[name]["records"][0]["loss"] != pytest.approx(math.log(2), abs=1e-5), name


def test_an_asked_reference_says_what_a_precomputed_one_says(alone: dict[str, dict[str, Any]]) -> None:
    close(alone["dpo"], alone["dpo, precomputed"])


def test_what_is_told_of_pairs_and_verdicts(alone: dict[str, dict[str, Any]]) -> None:
    pairs = {"accuracy", "margin", "reward_chosen", "reward_rejected"}
    assert pairs | {"logps_chosen", "logps_rejected"} <= alone["dpo"]["records"][-1].keys()
    assert pairs | {"log_odds", "nll_loss"} <= alone["orpo"]["records"][-1].keys()
    assert {"kl", "margin", "reward_chosen", "reward_rejected"} <= alone["kto"]["records"][-1].keys()
    assert {"accuracy", "accuracy/pairs-eval", "margin"} <= alone["dpo"]["evaluation"].keys()
    line = alone["dpo"]["records"][-1]
    assert line["eval_accuracy"] == line["eval_accuracy/pairs-eval"]


@pytest.mark.parametrize("name", ["dpo", "dpo, full", "kto, full", "orpo"])
def test_it_learns(alone: dict[str, dict[str, Any]], name: str) -> None:
    first, *_, last = said(alone[name])
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize("name", ["dpo, longer", "kto, longer", "reward, longer"])
def test_margins_grow(alone: dict[str, dict[str, Any]], name: str) -> None:
    told = [record for record in said(alone[name]) if "eval_margin" in record]
    margins = [record["eval_margin"] for record in told]
    assert margins == sorted(margins) and margins[-1] > 1.5 * margins[0] > 0
    if "eval_accuracy" in told[-1]:
        assert told[-1]["eval_accuracy"] == 1.0


def test_the_result_is_what_plain_libraries_read(alone: dict[str, dict[str, Any]], root: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(root / "model")
    ids = torch.arange(7, 20)[None]
    plain = base(ids).logits
    for name in ("dpo", "orpo"):
        adapted = PeftModel.from_pretrained(base, root / name / "output")
        assert not torch.allclose(adapted(ids).logits, plain, atol=1e-3)
        base = adapted.unload()
    whole = AutoModelForCausalLM.from_pretrained(root / "kto, full" / "output")
    assert not torch.allclose(whole(ids).logits, plain, atol=1e-3)
    assert json.loads((root / "dpo" / "output" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_an_adapter_serves_as_a_model_to_start_from(alone: dict[str, dict[str, Any]], root: Path) -> None:
    """Merged when it is loaded, as the job that wrote it would have; also one over another."""
    by_adapter, by_model = alone["chain/by-adapter"], alone["chain/by-model"]
    assert said(by_adapter) == said(by_model)
    for name in ("chain/by-adapter", "chain/on"):  # the reference is what the run starts from, adapter and all
        assert said(alone[name])[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(said(alone["chain/reward"])) == STEPS


def test_the_best_evaluation_is_the_result_and_ends_the_run_in_time(
    alone: dict[str, dict[str, Any]], gang: dict[str, dict[str, Any]], root: Path
) -> None:
    for runs, folder in ((alone, "best"), (gang, "gang/best")):
        told = runs["best"]
        losses = [record["eval_loss"] for record in said(told)]
        best = losses.index(min(losses))
        assert len(losses) == best + 3 < 12
        assert told["evaluation"]["loss"] == losses[best]
        assert json.loads((root / folder / "output/manifest.json").read_text())["step"] == best + 1
        kept = [checkpoint["step"] for checkpoint in told["progress"]["checkpoints"]]
        assert kept == [best + 1, best + 3]
    again = alone["best/again"]
    assert figures(again) == figures(alone["best"])
    weights = [(root / folder / "output/adapter_model.safetensors").read_bytes() for folder in ("best", "best-broken")]
    assert weights[0] == weights[1]


def test_the_best_by_another_figure(alone: dict[str, dict[str, Any]], root: Path) -> None:
    told = [record["eval_accuracy"] for record in said(alone["best of accuracy"])]
    step = json.loads((root / "best of accuracy/output/manifest.json").read_text())["step"]
    assert step == told.index(max(told)) + 1
    failed = alone["best of what is not told"]
    assert failed["cause"] == "InvalidConfiguration"
    assert "'acuracy', which the evaluation does not tell. Accepted: accuracy, accuracy/pairs-eval" in failed["message"]


@pytest.mark.parametrize("name", ["reward", "reward, full", "reward, checkpointed"])
def test_a_reward_model_scores_in_plain_libraries_as_in_training(
    alone: dict[str, dict[str, Any]], root: Path, name: str
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = root / name / "output"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = folder if "full" in name else root / "model"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    if "full" not in name:
        model = PeftModel.from_pretrained(model, folder)

    def scores(model: Any, answer: str) -> Any:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[answer]}],
                tokenize=False,
            )
            for row in map(json.loads, (root / "pairs-eval.jsonl").read_text().splitlines())
        ]
        inputs = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            return model.eval()(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits[:, 0]

    told = alone[name]["evaluation"]
    chosen, rejected = scores(model, "chosen"), scores(model, "rejected")
    assert float(chosen.mean()) == pytest.approx(told["reward_chosen"], abs=1e-5)
    assert float(rejected.mean()) == pytest.approx(told["reward_rejected"], abs=1e-5)
    assert float((chosen > rejected).float().mean()) == pytest.approx(told["accuracy"])
    if (folder / "merged").exists():
        merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
        assert torch.allclose(scores(merged, "chosen"), chosen, atol=1e-5)
    assert (folder / "merged").exists() is (name == "reward, checkpointed")
