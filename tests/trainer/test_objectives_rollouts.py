"""ppo and grpo: rewards per token, advantages, divergence and losses, against plain numpy and against TRL's own trainer
on the same batch, in fp32."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# ruff: noqa: E402  (without the trainer extra, this file is skipped)
torch = pytest.importorskip("torch", reason="needs the trainer extra")

from finetune_api.compatibility import COMPATIBILITY
from finetune_api.reinforcement import Grpo, Ppo
from finetune_trainer.methods import METHODS
from finetune_trainer.model import load_model, load_tokenizer
from finetune_trainer.objectives import grpo, policy, ppo
from finetune_trainer.objectives.head import find_head
from finetune_trainer.rollout import Answer, Draw, _collated, drawn
from tests.trainer import tiny
from tests.trainer.methods_cases import CASES

ANSWERS, PAD = 6, 0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny models: the policy, what it was when it wrote, and the reference."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    root = tmp_path_factory.mktemp("rollouts")
    for seed, name in enumerate(("policy", "old", "reference")):
        tiny.make_model(root / name, seed=seed)
    return root


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(root: Path) -> Any:
    """The policy, with a value head that says something."""
    made = load(root / "policy")
    torch.manual_seed(5)
    made.add_module(policy.VALUE_HEAD, torch.nn.Linear(64, 1, bias=False))
    return made


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    draw = np.random.default_rng(3)
    made = []
    for place in range(ANSWERS):
        prompt, ids = (draw.integers(3, 64, int(draw.integers(2, 9))).astype(np.int32) for _ in range(2))
        made.append(Answer(place // 2, place % 2, prompt, ids, bool(place % 3)))
    return made


def logits_of(model: Any, answer: Answer, temperature: float) -> np.ndarray:
    """(A, words) fp64 of one answer, alone and without padding."""
    ids = torch.from_numpy(np.concatenate([answer.prompt, answer.ids]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, len(answer.prompt) - 1 : -1].double() / temperature
    return logits.numpy()


def log_probs_of(model: Any, answer: Answer, temperature: float = 1.0) -> np.ndarray:
    logits = logits_of(model, answer, temperature)
    logs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logs -= logits.max(-1, keepdims=True)
    return logs[np.arange(len(answer.ids)), answer.ids]


def batch_of(answers: list[Answer], *columns: tuple[str, list[np.ndarray]]) -> dict[str, Any]:
    lessons = [{name: values[n].astype(np.float32) for name, values in columns} for n in range(len(answers))]
    return _collated(answers, PAD, lessons)


# --- what a policy says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_head", [True, False])
def test_what_a_policy_says_of_answers(model: Any, answers: list[Answer], with_head: bool) -> None:
    batch = _collated(answers, PAD)
    head = find_head(model) if with_head else None
    told = policy.said(model, batch, head, 0.7, values=True).detach().split(batch["lengths"])
    for answer, found in zip(answers, told, strict=True):
        logits = logits_of(model, answer, 0.7)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        assert found[:, 0].numpy() == pytest.approx(log_probs_of(model, answer, 0.7), abs=1e-5)
        assert found[:, 1].numpy() == pytest.approx(-(shares * np.log(shares)).sum(-1), abs=1e-5)
        ids = torch.from_numpy(np.concatenate([answer.prompt, answer.ids]).astype(np.int64))[None]
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, len(answer.prompt) - 1 : -1]
        assert found[:, 2].numpy() == pytest.approx(model.value_head(hidden).squeeze(-1).detach().numpy(), abs=1e-5)


class Noted(Draw):
    """Remembers the log-probability of every token it chose."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.said: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        chosen = super().__call__(input_ids, scores)
        logs = torch.log_softmax(scores.float() / self.temperature, -1)
        self.said.append(logs.gather(-1, chosen.argmax(-1, keepdim=True)).squeeze(-1))
        return chosen


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "ppo" in COMPATIBILITY[c.method["type"]].stages])
def test_every_method_is_asked_for_what_it_wrote(name: str, root: Path) -> None:
    """Written token by token behind prompts of several lengths, with cached keys; asked for in one pass."""
    config = tiny.make_config(
        root, method=CASES[name].method, model={"uri": f"file://{root}/policy", "dtype": "float32"}
    )
    torch.manual_seed(0)
    model = METHODS[config.method.type].prepare(
        load_model(root / "policy", config, torch.device("cpu")), config.method, config
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.eval()
    tokenizer = load_tokenizer(root / "policy", config)
    texts = [np.arange(3, 3 + length, dtype=np.int32) for length in (3, 9, 5)]
    draw = Noted(0.8, 1.0, [1, 2, 3], 6, torch.device("cpu"))
    with torch.no_grad():
        output = drawn(model, tokenizer, texts, [2], PAD, 6, draw)
        answers = [
            Answer(n, 0, t, row.astype(np.int32), True) for n, (t, row) in enumerate(zip(texts, output, strict=True))
        ]
        batch = _collated(answers, PAD)
        told = policy.said(model, batch, find_head(model), 0.8, values=False).split(batch["lengths"])
    for row, (ids, found) in enumerate(zip(output, told, strict=True)):
        count = int(np.argmax(ids == 2)) + 1 if (ids == 2).any() else len(ids)
        assert found[:count, 0].tolist() == pytest.approx([float(one[row]) for one in draw.said[:count]], abs=1e-4)


def test_what_is_drawn_has_the_probabilities_of_the_model() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0, float("-inf")]).repeat(4000, 1)
    for top_p in (1.0, 0.8):
        draw = Draw(0.7, top_p, list(range(4000)), 1, torch.device("cpu"))
        counts = np.bincount(draw(scores[:, :0], scores).argmax(-1).numpy(), minlength=5) / 4000
        shares = torch.softmax(scores[0] / 0.7, -1).numpy()
        if top_p < 1:
            shares = np.where(np.array([0, 1, 1, 0, 0]), shares, 0)
        assert counts == pytest.approx(shares / shares.sum(), abs=0.03)
        assert counts[4] == 0


# --- ppo ------------------------------------------------------------------------------------------------------------


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: the sum of all discounted errors that follow."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_generalised_estimates(gamma: float, lam: float) -> None:
    draw = np.random.default_rng(0)
    rewards, values = draw.normal(size=9), draw.normal(size=9)
    assert ppo.gae(rewards, values, gamma, lam) == pytest.approx(
        plain_gae(rewards.tolist(), values.tolist(), gamma, lam), abs=1e-12
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_what_is_learned_of_answers(answers: list[Answer], estimator: Any) -> None:
    options = Ppo(kl_estimator=estimator, missing_eos_penalty=0.5, gamma=0.97, lam=0.9)
    draw = np.random.default_rng(1)
    olds, references, values = ([draw.normal(size=len(a.ids)).astype(np.float32) for a in answers] for _ in range(3))
    scores, ended = draw.normal(size=ANSWERS), np.array([a.ended for a in answers])
    found = ppo.lessons(options, 0.3, scores, ended, olds, references, values)
    advantages, returns, divergences = [], [], []
    for old, ref, value, score, end in zip(olds, references, values, scores, ended, strict=True):
        ratio = [float(r) - float(o) for o, r in zip(old, ref, strict=True)]
        kl = [-r if estimator == "k1" else math.exp(r) - 1 - r for r in ratio]
        rewards = [-0.3 * one for one in kl]
        rewards[-1] += score - (0.0 if end else 0.5)
        advantages.append(plain_gae(rewards, value.tolist(), 0.97, 0.9))
        returns.append([a + float(v) for a, v in zip(advantages[-1], value, strict=True)])
        divergences.append(sum(kl))
    every = np.concatenate(advantages)
    for one, mine in zip(found.advantages, advantages, strict=True):
        assert one == pytest.approx((np.array(mine) - every.mean()) / every.std(ddof=1), abs=1e-5)
    for one, mine in zip(found.returns, returns, strict=True):
        assert one == pytest.approx(mine, abs=1e-5)
    assert found.kl == pytest.approx(divergences, abs=1e-5)


def test_ppo_s_loss(model: Any, root: Path, answers: list[Answer]) -> None:
    options = Ppo(temperature=0.8, cliprange=0.1, cliprange_value=0.15, vf_coef=0.3)
    draw = np.random.default_rng(2)
    old_model = load(root / "old")
    olds = [log_probs_of(old_model, a, 0.8) for a in answers]
    advantages, returns, values = ([draw.normal(size=len(a.ids)) for a in answers] for _ in range(3))
    batch = batch_of(answers, ("old", olds), ("advantages", advantages), ("returns", returns), ("values", values))
    terms, told = ppo.loss_sums(options, model, batch, find_head(model))
    now = np.concatenate([log_probs_of(model, a, 0.8) for a in answers])
    said = policy.said(model, batch, None, 0.8, values=True)[:, 2].detach().double().numpy()
    old, advantage, wanted, before = (np.concatenate(part) for part in (olds, advantages, returns, values))
    ratio = np.exp(now - old)
    limited = -advantage * np.clip(ratio, 0.9, 1.1)
    policy_loss = np.maximum(-advantage * ratio, limited)
    near = np.clip(said, before - 0.15, before + 0.15)
    value_loss = 0.5 * np.maximum((said - wanted) ** 2, (near - wanted) ** 2)
    count = len(ratio)
    assert ppo.weights(batch) == (count, count)
    assert float(terms[0].detach()) / count == pytest.approx(policy_loss.mean(), abs=1e-5)
    assert float(terms[1].detach()) / count == pytest.approx(0.3 * value_loss.mean(), abs=1e-5)
    figures = ppo.figures(told)
    assert figures["clip_fraction"] == pytest.approx((limited > -advantage * ratio).mean())
    assert figures["value_loss"] == pytest.approx(value_loss.mean(), abs=1e-5)
    assert figures["approx_kl"] == pytest.approx((old - now).mean(), abs=1e-5)


def test_the_coefficient_follows_the_divergence() -> None:
    options = Ppo(kl_target=6.0, kl_horizon=100)
    assert ppo.adapted(0.2, 6.0, 50, options) == 0.2
    assert ppo.adapted(0.2, 60.0, 50, options) == pytest.approx(0.2 * 1.1)
    assert ppo.adapted(0.2, 0.0, 50, options) == pytest.approx(0.2 * 0.9)
    assert ppo.adapted(0.2, 6.6, 50, options) == pytest.approx(0.2 * 1.05)
    assert ppo.adapted(0.2, 60.0, 50, Ppo()) == 0.2


# --- grpo -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(root: Path) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(root / "trl"),
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        gradient_checkpointing=False,
        per_device_train_batch_size=ANSWERS,
        num_generations=2,
        max_completion_length=12,
        temperature=0.7,
        beta=0.1,
    )
    return GRPOTrainer(
        model=load(root / "policy"),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "red green"}] * ANSWERS),
        processing_class=AutoTokenizer.from_pretrained(root / "policy"),
    )


def trl_s(trainer: Any, options: Grpo, answers: list[Answer], columns: dict[str, list[np.ndarray]]) -> float:
    trainer.loss_type, trainer.beta = options.loss_type, options.beta
    trainer.epsilon_low = options.epsilon
    trainer.epsilon_high = options.epsilon if options.epsilon_high is None else options.epsilon_high
    trainer.importance_sampling_level = options.importance_sampling_level
    trainer.max_completion_length = options.max_completion_length
    trainer.args.delta, trainer.args.use_bias_correction_kl = options.delta, options.use_bias_correction_kl
    trainer.args.sapo_temperature_pos = options.sapo_temperature_pos
    trainer.args.sapo_temperature_neg = options.sapo_temperature_neg
    trainer.current_gradient_accumulation_steps, trainer.args.steps_per_generation = 1, 1

    def padded(parts: list[np.ndarray], left: bool = False) -> Any:
        width = max(map(len, parts))
        made = torch.zeros(len(parts), width, dtype=torch.from_numpy(np.asarray(parts[0])).dtype)
        for row, part in enumerate(parts):
            place = slice(width - len(part), width) if left else slice(0, len(part))
            made[row, place] = torch.from_numpy(np.asarray(part))
        return made

    inputs = {
        "prompt_ids": padded([a.prompt.astype(np.int64) for a in answers], left=True),
        "prompt_mask": padded([np.ones(len(a.prompt), np.int64) for a in answers], left=True),
        "completion_ids": padded([a.ids.astype(np.int64) for a in answers]),
        "completion_mask": padded([c.astype(np.int64) for c in columns["learned"]]),
        "advantages": torch.tensor([part[0] for part in columns["advantages"]], dtype=torch.float32),
        "num_items_in_batch": torch.tensor(float(sum(c.sum() for c in columns["learned"]))),
    }
    if "old" in columns:
        inputs["old_per_token_logps"] = padded([part.astype(np.float32) for part in columns["old"]])
    if options.beta:
        inputs["ref_per_token_logps"] = padded([p.astype(np.float32) for p in columns["reference_log_probs"]])
    with torch.no_grad():
        return float(trainer._compute_loss(trainer.model.eval(), inputs))


SEQUENCE: dict[str, Any] = {"importance_sampling_level": "sequence"}
LOSSES = [
    *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo")),
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "luspo"} | SEQUENCE,
    {"loss_type": "grpo"} | SEQUENCE,
    {"loss_type": "dapo", "epsilon": 0.05, "epsilon_high": 0.28, "delta": 1.2},
    *({"loss_type": name, "beta": 0.3} for name in ("grpo", "dapo", "dr_grpo")),
    {"loss_type": "luspo", "beta": 0.2} | SEQUENCE,
    {"loss_type": "bnpo", "beta": 0.2, "use_bias_correction_kl": False},
]


@pytest.mark.parametrize("own", [False, True], ids=["older", "own"])
@pytest.mark.parametrize("case", LOSSES, ids=lambda case: "-".join(map(str, case.values())))
def test_grpo_s_loss_is_trl_s(
    case: dict[str, Any], own: bool, root: Path, model: Any, answers: list[Answer], theirs: Any
) -> None:
    options = Grpo(max_completion_length=12, num_generations=2, temperature=0.7, **case)
    draw = np.random.default_rng(4)
    advantages = [float(draw.normal()) * np.ones(len(a.ids), np.float32) for a in answers]
    columns = {"advantages": advantages, "learned": [np.ones(len(a.ids), np.float32) for a in answers]}
    if not own:  # not far away: ratios on both sides of the limits
        now = [log_probs_of(model, a, options.temperature) for a in answers]
        columns["old"] = [part + draw.normal(size=len(part)) * 0.2 for part in now]
    if options.beta:
        reference = load(root / "reference")
        columns["reference_log_probs"] = [log_probs_of(reference, a, options.temperature) for a in answers]
    batch = batch_of(answers, *columns.items())
    terms, _ = grpo.loss_sums(options, model, batch, find_head(model))
    [weight] = grpo.weights(options, batch)
    assert float(terms[0].detach()) / weight == pytest.approx(trl_s(theirs, options, answers, columns), abs=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_groups(scale: Any) -> None:
    rewards = np.array([1.0, 0.0, 0.5, 0.5, 3.0, -1.0])
    found = grpo.advantages(Grpo(num_generations=2, scale_rewards=scale), rewards)
    groups = torch.from_numpy(rewards).view(-1, 2)
    wanted = groups - groups.mean(1, keepdim=True)
    if scale != "none":
        wanted = wanted / ((groups.std(1, keepdim=True) if scale == "group" else groups.std()) + 1e-4)
    assert found == pytest.approx(wanted.reshape(-1).numpy(), abs=1e-6)
