"""A finished model is used: its figures on rows, and conversations with it."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the trainer extra")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.run import ChatConfig, EvaluateConfig
from finetune_trainer import chat
from finetune_trainer.evaluate import evaluate, table
from finetune_trainer.outcome import RunError
from tests.trainer import tiny
from tests.trainer.harness import run

STEPS = {"max_steps": 3, "per_device_train_batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-2}
LORA = {"type": "lora", "r": 4, "lora_alpha": 8}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"method": LORA, "merge": True},
    "adapter": {"method": {"type": "adapter", "bottleneck_size": 6}},
    "prompt": {"method": {"type": "prompt_tuning", "num_virtual_tokens": 4}},
    "full": {"method": {"type": "full"}},
    "dpo": {"method": LORA, "stage": "dpo"},
    "reward": {"method": LORA, "stage": "reward"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of each kind, and one over the first one's adapter."""
    root = tmp_path_factory.mktemp("use")
    tiny.make_model(root / "model")
    tiny.make_rows(root / "train.jsonl", 12)
    tiny.make_rows(root / "held-out.jsonl", 5, seed=1)
    tiny.make_preferences(root / "pairs.jsonl", 8)
    stacked = {"method": LORA, "model": {"adapters": [{"uri": f"file://{root}/lora"}]}}
    for name, changes in {**RUNS, "stacked": stacked}.items():
        rows = "pairs" if changes.get("stage") in ("dpo", "reward") else "train"
        data = {"train": [{"uri": f"file://{root}/{rows}.jsonl"}], "eval": [{"uri": f"file://{root}/{held_out(name)}"}]}
        places = {"output_uri": f"file://{root}/{name}", "checkpoint_uri": f"file://{root}/checkpoints/{name}"}
        config = tiny.make_config(root, **changes, **places, training=STEPS, data=data)
        plan = {"name": name, "config": config.model_dump(mode="json"), "attempt": 1, "work": str(root / "work" / name)}
        found = run(plan)
        assert found.get("finished"), found
        (root / f"{name}.json").write_text(json.dumps(found["evaluation"]))
    return root


def held_out(name: str) -> str:
    return "pairs.jsonl" if name in ("dpo", "reward") else "held-out.jsonl"


def figures(root: Path, name: str, **changes: Any) -> dict[str, dict[str, float]]:
    wanted: dict[str, Any] = {
        "model": {"uri": f"file://{root}/{name}", "dtype": "float32"},
        "data": [{"uri": f"file://{root}/{held_out(name)}"}],
        "max_length": 48,
        "accelerator": "cpu",
    }
    found, rows = evaluate(EvaluateConfig.model_validate(wanted | changes), root / "cache")
    assert all(counts["rows"] for counts in rows.values())
    return found


@pytest.mark.parametrize("name", [*RUNS, "stacked"])
def test_the_figures_are_those_that_the_run_told_at_its_end(root: Path, name: str) -> None:
    told = json.loads((root / f"{name}.json").read_text())
    found = figures(root, name)["model"]
    assert found.keys() == told.keys()
    assert found == pytest.approx(told, rel=1e-5, abs=1e-5)


def test_the_base_is_compared_and_a_merged_model_is_the_adapter_in_it(root: Path) -> None:
    compared = figures(root, "lora", compare=True)
    base = figures(root, "model", data=[{"uri": f"file://{root}/held-out.jsonl"}])["model"]
    assert compared["base"]["loss"] == pytest.approx(base["loss"], rel=1e-5)
    assert compared["model"]["loss"] < compared["base"]["loss"]
    merged = figures(root, "lora/merged", data=[{"uri": f"file://{root}/held-out.jsonl"}], stage="sft")["model"]
    assert merged["loss"] == pytest.approx(compared["model"]["loss"], rel=1e-5)
    assert merged["perplexity"] == pytest.approx(torch.tensor(merged["loss"]).exp().item(), rel=1e-5)
    explicit = {"uri": f"file://{root}/model", "dtype": "float32", "adapters": [{"uri": f"file://{root}/lora"}]}
    again = figures(root, "model", model=explicit, data=[{"uri": f"file://{root}/held-out.jsonl"}], compare=True)
    assert again["model"] == pytest.approx(compared["model"], rel=1e-5)
    assert again["base"] == pytest.approx(compared["base"], rel=1e-5)
    shown = table(compared, {"eval/held-out": {"rows": 5, "tokens": 1234}})
    head, line = shown.splitlines()
    assert head.split()[:3] == ["source", "rows", "tokens"] and "loss (base)" in head
    assert line.split()[:3] == ["held-out", "5", "1,234"]
    assert f"{compared['base']['loss']:.4f}" in line and f"{compared['model']['perplexity']:.4f}" in line


def test_perplexity_is_told_by_position_where_it_is_asked_for(root: Path) -> None:
    found = figures(root, "lora", perplexity_positions=[16, 8, 100])["model"]
    assert [key for key in found if "_to_" in key and "/" not in key] == [
        "perplexity_to_8",
        "perplexity_to_16",
        "perplexity_to_48",
    ]
    low, high = (pick(v for k, v in found.items() if "_to_" in k) for pick in (min, max))
    assert low < found["perplexity"] < high


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("lora/merged", {"stage": "dpo", "data": "pairs"}, "Name the adapter"),
        ("lora/merged", {"compare": True}, "Name the adapter"),
        ("lora", {"base": "full-of-nothing"}, "full-of-nothing"),
        ("lora", {"stage": "reward", "perplexity_positions": [8]}, "add --stage pretrain or --stage sft"),
        ("lora", {"adapters": "adapter"}, "Name its model first"),
    ],
)
def test_what_cannot_be_evaluated_is_told(root: Path, name: str, changes: dict[str, Any], told: str) -> None:
    if "data" in changes:
        changes = changes | {"data": [{"uri": f"file://{root}/{changes['data']}.jsonl"}]}
    else:
        changes = changes | {"data": [{"uri": f"file://{root}/held-out.jsonl"}]}
    if "base" in changes:
        changes = changes | {"base": {"uri": f"file://{root}/{changes['base']}"}}
    if "adapters" in changes:
        on_top = [{"uri": f"file://{root}/{changes.pop('adapters')}"}]
        changes = changes | {"model": {"uri": f"file://{root}/{name}", "adapters": on_top}}
    with pytest.raises(RunError) as refused:
        figures(root, name, **changes)
    assert told in refused.value.message


# ---- chat ----


def talk(root: Path, name: str, lines: list[str], **changes: Any) -> str:
    model = {"uri": f"file://{root}/{name}", "dtype": "float32"}
    wanted = {"model": model, "accelerator": "cpu", "temperature": 0, "max_new_tokens": 6} | changes
    config = ChatConfig.model_validate(wanted)
    out = io.StringIO()
    chat.converse(chat.opened(config, root / "cache"), config.system, io.StringIO("\n".join(lines)), out, False)
    return out.getvalue()


def expected(folder: Path, turns: list[str], system: str = "") -> list[str]:
    """Greedy answers by transformers alone, each to the whole conversation so far."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(ids["input_ids"], do_sample=False, max_new_tokens=6, pad_token_id=0)
        said = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": said})
        answers.append(said)
    return answers


TURNS = ["say red green", "and the blue cat", "who are you"]


def test_a_conversation_is_remembered_and_begun_anew(root: Path) -> None:
    said = talk(root, "lora/merged", [*TURNS, "/reset", TURNS[0], "/system you are blue", "", TURNS[1], "/exit", "no"])
    merged = root / "lora" / "merged"
    answers = [*expected(merged, TURNS), *expected(merged, TURNS[:1]), *expected(merged, TURNS[1:2], "you are blue")]
    assert [line.strip() for line in said.splitlines()] == answers
    assert answers[0] == answers[3]


@pytest.mark.parametrize("name", ["lora", "adapter", "prompt", "stacked"])
def test_an_adapter_and_its_base_answer_side_by_side(root: Path, name: str) -> None:
    said = talk(root, name, TURNS[:2], compare=True).splitlines()
    # Below an adapter that was learned on top of another one lies the model with that one.
    base = expected(root / "lora" / "merged" if name == "stacked" else root / "model", TURNS[:2])
    assert [line.removeprefix("base: ").strip() for line in said[::2]] == base
    tuned = talk(root, name, TURNS[:2]).splitlines()
    assert [line.removeprefix("tuned: ").strip() for line in said[1::2]] == [line.strip() for line in tuned]
    if name == "lora":
        assert [line.strip() for line in tuned] == expected(root / "lora" / "merged", TURNS[:2])


def test_a_whole_model_is_compared_with_the_one_named(root: Path) -> None:
    said = talk(root, "full", TURNS[:1], compare=True, base={"uri": f"file://{root}/model", "dtype": "float32"})
    one, two = expected(root / "model", TURNS[:1]) + expected(root / "full", TURNS[:1])
    assert [line.strip() for line in said.splitlines()] == [f"base: {one}".strip(), f"tuned: {two}".strip()]
    with pytest.raises(RunError, match="--base"):
        talk(root, "full", TURNS[:1], compare=True)
    with pytest.raises(RunError, match="stage reward and holds no conversation"):
        talk(root, "reward", TURNS[:1])


def test_sampling_is_repeated_by_its_seed_and_long_talks_forget_their_beginning(root: Path) -> None:
    config = ChatConfig.model_validate({"model": {"uri": f"file://{root}/model"}, "accelerator": "cpu"})
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        said.append(talk(root, "model", TURNS[:2], temperature=1.5, top_p=1.0))
    assert said[0] == said[1] != said[2]
    [(_, one)] = chat.opened(config.model_copy(update={"max_new_tokens": 200, "temperature": 0}), root).items()
    one.begin("you are blue")
    for _ in range(6):
        one.answer("say " + "red " * 20, lambda piece: None)
    assert one.forgotten > 0 and one.messages[0]["role"] == "system"
    assert [message["role"] for message in one.messages[1:3]] == ["user", "assistant"]


def test_two_columns() -> None:
    shown = chat.side_by_side(("base", "one two three four five six"), ("tuned", "你好\n\nend"), 43).splitlines()
    assert shown[0] == "base                   tuned"
    assert [line[:20].rstrip() for line in shown[2:]] == ["one two three four", "five six", ""]
    assert [line[23:] for line in shown[2:]] == ["你好", "", "end"]


def test_the_command_reads_lines_and_answers_in_lines(root: Path, tmp_path: Path) -> None:
    environment = tiny.environment(tmp_path, tiny.make_config(root), FINETUNE_CACHE=str(root / "cache"))
    command = [sys.executable, "-m", "finetune_operator.cli.main", "chat", str(root / "lora"), "--cpu"]
    command += ["--temperature", "0", "--max-new-tokens", "6", "--compare"]
    done = subprocess.run(command, env=environment, input="\n".join(TURNS[:2]), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == talk(root, "lora", TURNS[:2], compare=True)
