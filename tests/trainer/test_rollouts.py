"""ppo and grpo in whole runs: what they learn, that the cut of the batch, the number of processes and a crash change
nothing, and what judges the answers.

As in ``test_stages.py`` all runs of a gang are made in one start.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import tiny
from tests.trainer.test_resume import figures, play
from tests.trainer.test_stages import close, said, zero

STEPS = 4
REWARDS = """
import re

def cats(prompts, completions, answer, **columns):
    assert prompts[0][-1]["role"] == "user" and len(prompts) == len(completions) == len(answer)
    words = [completion[0]["content"].split() for completion in completions]
    return [None if not line else line.count("cat") / len(line) for line in words]

def wrong(completions, **columns):
    return [0.5]

def broken(completions, **columns):
    return [1 / 0 for _ in completions]
"""


def python(root: Path, function: str = "cats", **more: Any) -> dict[str, Any]:
    return {"type": "python", "uri": f"file://{root}/rewards.py", "function": function, **more}


FULL = {"method": {"type": "full"}, "training": {"learning_rate": 3e-3}}
PPO = {"num_ppo_epochs": 2, "num_mini_batches": 2, "kl_target": 0.5, "kl_horizon": 20, "missing_eos_penalty": 0.1}
GRPO = {"num_generations": 3, "num_iterations": 2, "beta": 0.1, "temperature": 0.9}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {"ppo": PPO}),
    "ppo, full": ("ppo", FULL | {"ppo": PPO, "deepspeed": zero(2)}),
    "ppo, prefix": ("ppo", {"ppo": PPO, "method": {"type": "prefix_tuning", "num_virtual_tokens": 4}}),
    "ppo, unipelt": ("ppo", {"ppo": PPO, "method": {"type": "unipelt"}}),
    "grpo": ("grpo", {"grpo": GRPO}),
    "grpo, full": ("grpo", FULL | {"grpo": GRPO, "deepspeed": zero(1)}),
    "grpo, own": ("grpo", {"grpo": {"num_generations": 2, "mask_truncated_completions": True, "top_p": 0.9}}),
}
GANG = ("ppo", "ppo, full", "grpo", "grpo, full")
CUTS = ("ppo", "grpo")
RESUMED = ("ppo", "ppo, full", "grpo")
LEARNERS: dict[str, dict[str, Any]] = {
    "ppo": {"kl_coef": 0.0, "num_mini_batches": 2},
    "grpo": {"num_generations": 4},
}
LEARNING: dict[str, Any] = {
    "method": {"type": "full"},
    "training": {
        "max_steps": 30,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 2,
    },
    "data": {"eval": []},
}


def job(root: Path, folder: str, run: tuple[str, dict[str, Any]], **plan: Any) -> dict[str, Any]:
    """A plan whose checkpoints and output go to ``root/folder``."""
    stage, changes = run
    options = {"max_completion_length": 8, "reward_funcs": [python(root), {"type": "length", "target_length": 4}]}
    rows = [{"uri": f"file://{root}/{name}.jsonl", "format": "alpaca"} for name in ("rows", "held-out")]
    where = {
        "stage": stage,
        "checkpoint_uri": f"file://{root}/{folder}/checkpoints",
        "output_uri": f"file://{root}/{folder}/output",
        "training": {"max_steps": STEPS, "eval_steps": 2, "warmup_steps": 0, "gradient_accumulation_steps": 2},
        "data": {"train": rows[:1], "eval": rows[1:]},
        "evaluation": {"prompts": ["say red"], "max_new_tokens": 4},
        "save_steps": 2,
        "global_batch_size": 6,
    }
    if stage in ("ppo", "grpo"):
        where[stage] = options
    config = tiny.make_config(root, **tiny.merge(where, changes))
    return {"name": folder, "config": config.model_dump(mode="json"), "attempt": 1, "work": str(root / "work")} | plan


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, pairs of answers, and functions that judge."""
    root = tmp_path_factory.mktemp("rollouts")
    tiny.make_model(root / "model")
    tiny.make_rows(root / "rows.jsonl", 24)
    tiny.make_rows(root / "held-out.jsonl", 5, seed=1)
    tiny.make_preferences(root / "pairs.jsonl", 24)
    (root / "rewards.py").write_text(REWARDS)
    return root


def judged_by(root: Path, folder: str) -> tuple[str, dict[str, Any]]:
    model = {"uri": f"file://{root}/{folder}", "weight": 2.0}
    return "ppo", {"ppo": PPO | {"reward_model": model, "reward_funcs": [{"type": "exact_match"}]}}


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, dict[str, Any]]:
    """Everything that one process does."""
    plans = [job(root, name, run) for name, run in RUNS.items()]
    for name in RESUMED:  # its last checkpoint is lost: it goes on from step 2
        plans.append(job(root, name, RUNS[name], name=f"{name}/again", attempt=2, lose=STEPS))
    for name in CUTS:
        stage, changes = RUNS[name]
        cut = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}}
        plans.append(job(root, f"{name}/cut", (stage, tiny.merge(changes, cut))))
    pairs = {"uri": f"file://{root}/pairs.jsonl", "format": "preference"}
    reward = {"data": {"train": [pairs], "eval": []}, "evaluation": {"prompts": []}, "merge": True}
    plans.append(job(root, "reward", ("reward", reward | {"training": {"learning_rate": 1e-2}})))
    for name, folder in (("by an adapter", "reward/output"), ("by a model", "reward/output/merged")):
        plans.append(job(root, f"judged {name}", judged_by(root, folder)))
    full = tiny.merge(judged_by(root, "reward/output")[1], FULL)
    plans.append(job(root, "judged beside a full policy", ("ppo", full)))
    for name in ("wrong", "broken", "absent"):
        plans.append(job(root, name, ("ppo", {"ppo": {"reward_funcs": [python(root, name)]}})))
    plans.append(job(root, "no judge", judged_by(root, "model")))
    plans.append(job(root, "no answer", ("ppo", {"ppo": {"reward_funcs": [{"type": "exact_match", "column": "x"}]}})))
    plans += [learning(root, stage) for stage in LEARNERS]
    return play(root, plans, 1)


def learning(root: Path, stage: str, **changes: Any) -> dict[str, Any]:
    """The plan of a run that is long enough to learn what is rewarded."""
    options = {"temperature": 1.0, "local_rollout_forward_batch_size": 64, "reward_funcs": [python(root)]}
    options |= LEARNERS[stage]
    changes |= {stage: options, "global_batch_size": 64 if stage == "ppo" else 16}
    return job(root, f"{stage} learns", (stage, tiny.merge(LEARNING, changes)))


@pytest.fixture(scope="module")
def gang(root: Path) -> dict[str, dict[str, Any]]:
    """Everything that two processes do."""
    return play(root, [job(root, f"gang/{name}", RUNS[name], name=name) for name in GANG], 2)


@pytest.mark.parametrize("name", RUNS)
def test_every_run_comes_to_its_end(alone: dict[str, dict[str, Any]], name: str) -> None:
    records = said(alone[name])
    assert len(records) == STEPS
    assert {"reward", "reward_std", "reward_cats", "reward_length", "length", "ended", "entropy"} <= records[0].keys()
    assert {"eval_reward", "eval_reward/held-out", "eval_length", "eval_reward_cats"} <= records[-1].keys()


@pytest.mark.parametrize("name", CUTS)
def test_the_cut_of_the_batch_changes_nothing(alone: dict[str, dict[str, Any]], name: str) -> None:
    close(alone[name], alone[f"{name}/cut"])


@pytest.mark.parametrize("name", GANG)
def test_two_processes_write_and_learn_as_one(
    alone: dict[str, dict[str, Any]], gang: dict[str, dict[str, Any]], name: str
) -> None:
    close(alone[name], gang[name])


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_an_uninterrupted_one(alone: dict[str, dict[str, Any]], name: str) -> None:
    assert figures(alone[f"{name}/again"]) == figures(alone[name])
    assert said(alone[f"{name}/again"]) == said(alone[name])


@pytest.mark.parametrize("name", ["ppo", "ppo, full", "ppo, prefix", "ppo, unipelt"])
def test_the_first_answers_are_the_reference_s(alone: dict[str, dict[str, Any]], name: str) -> None:
    """Unless the method begins at random; then the coefficient follows the divergence."""
    records = said(alone[name])
    begins_as_the_base = name in ("ppo", "ppo, full")
    assert (abs(records[0]["kl"]) < 1e-5) is begins_as_the_base
    coefficients = [record["kl_coef"] for record in records]
    assert coefficients[0] == pytest.approx(0.05) and len(set(coefficients)) > 1


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_reward_is_learned(alone: dict[str, dict[str, Any]], stage: str) -> None:
    rewards = [record["reward"] for record in said(alone[f"{stage} learns"])]
    assert rewards[0] < 0.1
    assert max(rewards) > 0.9 and sum(rewards[-5:]) / 5 > 0.9


def test_a_reward_model_judges_the_same_as_an_adapter_and_as_a_model(alone: dict[str, dict[str, Any]]) -> None:
    names = ("judged by an adapter", "judged by a model", "judged beside a full policy")
    shared, whole, beside = (said(alone[name]) for name in names)
    for name in ("reward", "reward_model", "reward_exact_match", "eval_reward_model"):
        if name in shared[0]:
            assert shared[0][name] == pytest.approx(whole[0][name], abs=1e-4), name
            assert shared[0][name] == pytest.approx(beside[0][name], abs=1e-4), name
    assert shared[0]["reward_std"] > 0
    for one, other in zip(shared, whole, strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-3)


def test_what_is_left_is_the_policy_alone(alone: dict[str, dict[str, Any]], root: Path) -> None:
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    assert alone["judged by an adapter"]["finished"]
    folder = root / "judged by an adapter" / "output"
    assert not (folder / "reward").exists()
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert all("lora_" in key for key in file.keys())  # noqa: SIM118
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    PeftModel.from_pretrained(base, folder)
    _, info = AutoModelForCausalLM.from_pretrained(root / "ppo, full" / "output", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("name", "cause", "words"),
    [
        ("wrong", "InvalidConfiguration", "gave 1 values for"),
        ("broken", "InvalidConfiguration", "ZeroDivisionError: division by zero (line 13 of rewards.py"),
        ("absent", "InvalidConfiguration", "cats, wrong, broken"),
        ("no judge", "InvalidConfiguration", "is no reward model but a LlamaForCausalLM"),
        ("no answer", "InvalidData", "Name its column in reward_funcs[].column"),
    ],
)
def test_what_does_not_judge(alone: dict[str, dict[str, Any]], name: str, cause: str, words: str) -> None:
    assert alone[name]["cause"] == cause
    assert words in alone[name]["message"]
