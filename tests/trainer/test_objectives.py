"""Every stage's loss against TRL's own trainers on the same batch, in fp32. One process: importing TRL takes 8 s."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# ruff: noqa: E402  (without the trainer extra, this file is skipped)
torch = pytest.importorskip("torch", reason="needs the trainer extra")

from finetune_api.stages import Dpo, DpoLoss, Kto, Orpo, Reward
from finetune_trainer.data.render import Tokens
from finetune_trainer.data.stream import Draft, Rows, Stream, collate
from finetune_trainer.objectives import answers, dpo, kto, orpo, reward, sft
from finetune_trainer.objectives.head import find_head
from tests.trainer import tiny

PAIRS = 5
LOSSES = DpoLoss.__args__  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models: the policy and what it was."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    root = tmp_path_factory.mktemp("objectives")
    tiny.make_model(root / "policy", seed=0)
    tiny.make_model(root / "reference", seed=1)
    return root


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def batch_of(parts: int, numbers: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """PAIRS items of ``parts`` sequences of differing lengths, with prompts that are not learned."""
    draw = np.random.default_rng(3)

    def tokens(prompt: np.ndarray) -> Tokens:
        answer = draw.integers(3, 64, int(draw.integers(2, 9)))
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        return Tokens(ids, np.arange(len(ids)) >= len(prompt))

    rows = []
    for number in range(PAIRS):
        prompt = draw.integers(3, 64, int(draw.integers(2, 7)))
        rows.append(Draft(tuple(tokens(prompt) for _ in range(parts)), numbers(number)))
    stream = Stream([Rows.of("rows", rows)], [1.0], 0, False, 64, shuffle=False)
    return collate([stream.item(0, number) for number in range(PAIRS)], pad_token_id=0)


@pytest.fixture(scope="module")
def pairs() -> dict[str, Any]:
    return batch_of(2, lambda number: {"margin": number / 4})


def completion_mask(batch: dict[str, Any]) -> Any:
    return (batch["labels"] != -100).long()


def arguments(kind: Any, root: Path, **more: Any) -> Any:
    return kind(output_dir=str(root / "trl"), report_to=[], use_cpu=True, bf16=False, save_strategy="no", **more)


def rows_of_text(*names: str, **more: Any) -> Any:
    """A data set that TRL's trainers can be made with; the batches are given to them by hand."""
    from datasets import Dataset

    return Dataset.from_list([dict.fromkeys(names, "red green") | more] * 4)


def mean(objective: dict[str, Any], model: Any, batch: dict[str, Any], head: Any = None) -> float:
    """Our loss: the sum of its terms, each over its weight."""
    terms, _ = objective["loss_sums"](model, batch, head)
    return sum(float(t) / w for t, w in zip(terms.detach(), objective["weights"](batch), strict=True))


# --- dpo ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def their_dpo(root: Path) -> Any:
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=load(root / "policy"),
        ref_model=load(root / "reference"),
        args=arguments(DPOConfig, root, gradient_checkpointing=False),
        train_dataset=rows_of_text("prompt", "chosen", "rejected"),
        processing_class=AutoTokenizer.from_pretrained(root / "policy"),
    )


def trl_s_dpo(trainer: Any, batch: dict[str, Any], options: Dpo) -> Any:
    trainer.loss_types, trainer.loss_weights = [options.loss_type], [1.0]
    if options.rpo_alpha:
        trainer.loss_types, trainer.loss_weights = [options.loss_type, "sft"], [1.0, options.rpo_alpha]
    trainer.beta, trainer.label_smoothing, trainer.ld_alpha = options.beta, options.label_smoothing, options.ld_alpha
    trainer.args.discopop_tau = options.discopop_tau
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return trainer.compute_loss(trainer.model, inputs | {"completion_mask": completion_mask(batch)})


CASES = [
    *(Dpo(loss_type=name, beta=0.3, label_smoothing=0.1 if name in ("exo_pair", "robust") else 0.0) for name in LOSSES),
    Dpo(rpo_alpha=0.7),
    Dpo(ld_alpha=0.3),
    Dpo(loss_type="ipo", ld_alpha=0.5, rpo_alpha=0.2),
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: f"{o.loss_type}-{o.rpo_alpha}-{o.ld_alpha}")
def test_dpo_is_trl_s(options: Dpo, root: Path, pairs: dict[str, Any], their_dpo: Any) -> None:
    ours = dpo.functions(options)
    batch = ours["prepare"](pairs)
    reference = load(root / "reference")
    model = load(root / "policy")
    with torch.no_grad():
        batch["reference"] = ours["reference"](reference, batch, find_head(reference))
    expected = trl_s_dpo(their_dpo, pairs, options)
    wanted = float(expected.detach())
    for head in (None, find_head(model)):
        assert mean(ours, model, batch, head) == pytest.approx(wanted, abs=1e-5)
    their_dpo.model.zero_grad()
    expected.backward()
    terms, _ = ours["loss_sums"](model, batch, find_head(model))
    sum(t / w for t, w in zip(terms, ours["weights"](batch), strict=True)).backward()  # type: ignore[attr-defined]
    theirs = dict(their_dpo.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-5, name


def test_label_smoothing_of_sigmoid_is_conservative_dpo(root: Path, pairs: dict[str, Any], their_dpo: Any) -> None:
    """TRL has it under another name: aot, which of a single pair is the same."""
    one = {key: value[::PAIRS] if key != "items" else 1 for key, value in pairs.items() if key != "num_tokens"}
    options = Dpo(label_smoothing=0.2)
    ours, reference, model = dpo.functions(options), load(root / "reference"), load(root / "policy")
    batch = ours["prepare"](one)
    with torch.no_grad():
        batch["reference"] = ours["reference"](reference, batch, None)
        expected = trl_s_dpo(their_dpo, one, options.model_copy(update={"loss_type": "aot"}))
    assert mean(ours, model, batch) == pytest.approx(float(expected), abs=1e-5)


def test_the_figures_of_pairs() -> None:
    told = answers.compared(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 2.5, 0.0]))
    found = answers.figures(told)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["margin"] == pytest.approx(1 / 3)
    assert found["reward_chosen"] == pytest.approx(3.5 / 3)


# --- kto ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [Kto(), Kto(beta=0.5, desirable_weight=1.5, undesirable_weight=0.5), Kto(loss_type="apo_zero_unpaired")],
    ids=["plain", "weighted", "apo"],
)
def test_kto_is_trl_s(options: Kto, root: Path) -> None:
    from transformers import AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    trainer = KTOTrainer(
        model=load(root / "policy"),
        ref_model=load(root / "reference"),
        args=arguments(
            KTOConfig,
            root,
            gradient_checkpointing=False,
            per_device_train_batch_size=2,
            **options.model_dump(exclude={"precompute_ref_log_probs"}),
        ),
        train_dataset=rows_of_text("prompt", "completion", label=True),
        processing_class=AutoTokenizer.from_pretrained(root / "policy"),
    )
    given = batch_of(2, lambda number: {"desirable": int(number % 3 != 1)})
    own, other = ({k: given[k][part] for k in ("input_ids", "attention_mask", "labels")} for part in halves())
    expected = trainer.compute_loss(
        trainer.model,
        {
            "input_ids": own["input_ids"],
            "attention_mask": own["attention_mask"],
            "completion_mask": completion_mask(own),
            "KL_input_ids": other["input_ids"],
            "KL_attention_mask": other["attention_mask"],
            "KL_completion_mask": completion_mask(other),
            "label": given["desirable"].bool(),
        },
    )
    ours, reference, model = kto.functions(options), load(root / "reference"), load(root / "policy")
    batch = ours["prepare"](given)
    with torch.no_grad():
        batch["reference"] = ours["reference"](reference, batch, find_head(reference))
        if ours["before"] is not None:
            batch["before"] = ours["before"](model, batch, find_head(model))
    for head in (None, find_head(model)):
        assert mean(ours, model, batch, head) == pytest.approx(float(expected.detach()), abs=1e-5)


def halves() -> tuple[slice, slice]:
    return slice(0, PAIRS), slice(PAIRS, None)


# --- orpo -----------------------------------------------------------------------------------------------------------


def test_orpo_is_trl_s(root: Path, pairs: dict[str, Any]) -> None:
    from transformers import AutoTokenizer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    options = Orpo(beta=0.3)
    trainer = ORPOTrainer(
        model=load(root / "policy"),
        args=arguments(ORPOConfig, root, gradient_checkpointing=False, beta=options.beta, max_length=64),
        train_dataset=rows_of_text("prompt", "chosen", "rejected"),
        processing_class=AutoTokenizer.from_pretrained(root / "policy"),
    )
    given = {
        f"{kind}_{name}": pairs[key][part]
        for kind, part in zip(("chosen", "rejected"), halves(), strict=True)
        for name, key in (("input_ids", "input_ids"), ("attention_mask", "attention_mask"), ("labels", "labels"))
    }
    expected, theirs = trainer.get_batch_loss_metrics(trainer.model, given)
    ours, model = orpo.functions(options), load(root / "policy")
    batch = ours["prepare"](pairs)
    for head in (None, find_head(model)):
        assert mean(ours, model, batch, head) == pytest.approx(float(expected.detach()), abs=1e-5)
    _, told = ours["loss_sums"](model, batch, find_head(model))
    found = ours["figures"](told)
    assert found["accuracy"] == pytest.approx(theirs["rewards/accuracies"])
    assert found["nll_loss"] == pytest.approx(theirs["nll_loss"], abs=1e-5)
    assert found["log_odds"] == pytest.approx(theirs["log_odds_chosen"], abs=1e-5)


def test_orpo_of_an_answer_that_is_certain_is_a_number() -> None:
    value = torch.tensor([0.0, -1e-9, -0.1], requires_grad=True)
    found = orpo._log1mexp(value)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(value.grad).all()
    assert float(found[2].detach()) == pytest.approx(math.log(1 - math.exp(-0.1)), abs=1e-6)


# --- reward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [Reward(), Reward(center_rewards_coefficient=0.01), Reward(use_margin=False)])
def test_reward_is_trl_s(options: Reward, root: Path, pairs: dict[str, Any]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(root / "policy", num_labels=1, dtype=torch.float32)
    trainer = RewardTrainer(
        model=model,
        args=arguments(
            RewardConfig,
            root,
            gradient_checkpointing=False,
            center_rewards_coefficient=options.center_rewards_coefficient,
        ),
        train_dataset=rows_of_text("chosen", "rejected"),
        processing_class=AutoTokenizer.from_pretrained(root / "policy"),
    )
    given = {key: pairs[key] for key in ("input_ids", "attention_mask")}
    expected = trainer.compute_loss(model, given | ({"margin": pairs["margin"]} if options.use_margin else {}))
    assert mean(reward.functions(options), model, pairs) == pytest.approx(float(expected.detach()), abs=1e-5)


# --- what is learned of a record ------------------------------------------------------------------------------------


class Words:
    """A renderer of numbers: a message is its numbers, of an answer they are learned."""

    def render(self, record: Any) -> list[Any]:
        return [record.messages]

    def document(self, text: str) -> Any:
        return [{"role": "assistant", "content": text}]

    def encode(self, texts: Any) -> Any:
        for messages in texts:
            ids = [(int(n), m["role"] == "assistant" and m.get("train", True)) for m in messages for n in m["content"]]
            yield Tokens(np.array([n for n, _ in ids], np.int32), np.array([learned for _, learned in ids], bool))


def rows_of(stage: str, *records: Any, max_length: int = 16, **changes: Any) -> Any:
    from finetune_trainer.data.encode import encoding

    config = tiny.make_config(Path("/"), stage=stage, data={"max_length": max_length}, **changes)
    made = encoding(config)
    renderer: Any = Words()
    sketches = [sketch for record in records for sketch in made.sketch(renderer, record)]
    fitting = [row for draft in made.tokenise(renderer, sketches) for row in made.fit(draft, max_length)]
    return made.whole(Rows.of("rows", fitting))


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def learned_of(rows: Any) -> list[list[int]]:
    cuts = range(len(rows.starts) - 1)
    return [
        rows.ids[rows.starts[n] : rows.starts[n + 1]][rows.learned[rows.starts[n] : rows.starts[n + 1]]].tolist()
        for n in cuts
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_the_perplexity_by_position_is_that_of_each_stretch_of_every_document(root: Path, packing: bool) -> None:
    """Against a loop over single documents."""
    model, ends = load(root / "policy"), [3, 7, 64]
    draw = np.random.default_rng(5)
    documents = [draw.integers(3, 64, size).astype(np.int32) for size in (9, 4, 2, 12)]
    drafts = [Draft((Tokens(ids, np.arange(len(ids)) > 0),), {}) for ids in documents]
    stream = Stream([Rows.of("rows", drafts)], [1.0], 0, packing, 64, shuffle=False)
    batch = collate([stream.item(0, number) for number in range(stream.items(0))], pad_token_id=0)
    assert (len(batch["input_ids"]) == 1) is packing
    objective = sft.by_position(ends)
    with torch.no_grad():
        _, sums = objective["loss_sums"](model, objective["prepare"](batch))
    losses: dict[int, list[float]] = {end: [] for end in ends}
    for ids in documents:
        row = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            each = torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="none")
        for place, loss in enumerate(each.tolist(), start=2):
            losses[next(end for end in ends if place <= end)].append(loss)
    wanted = {f"perplexity_to_{end}": math.exp(sum(found) / len(found)) for end, found in losses.items()}
    assert objective["figures"](sums) == pytest.approx(wanted, rel=1e-5)
    assert objective["loss_sums"](model, objective["prepare"](batch))[1] == {}  # while training


def test_every_stage_learns_from_the_records_that_the_api_names() -> None:
    from finetune_api.stages import STAGES
    from finetune_trainer.data.encode import ENCODINGS
    from finetune_trainer.data.targets import RECORDS

    config = tiny.make_config(Path("/"), ppo={"reward_funcs": [{"type": "exact_match"}]})
    kinds = {name: make(config).record for name, make in ENCODINGS.items()} | RECORDS
    learnt = {name: stage.record for name, stage in STAGES.items() if not stage.makes}
    assert {name: kind.__name__ for name, kind in kinds.items()} == learnt


def test_a_long_document_is_learned_in_pieces() -> None:
    from finetune_trainer.data.records import Text

    rows = rows_of("pretrain", Text("1" * 35), Text("2" * 33), Text("3"))
    assert rows.lengths.tolist() == [16, 16, 3, 16, 16]


def test_what_of_a_conversation_is_learned() -> None:
    from finetune_trainer.data.records import Conversation

    talk = Conversation([*user("12"), *answer("34"), *user("5"), *answer("67")])
    for loss_on, learned in (("answers", [3, 4, 6, 7]), ("last_answer", [6, 7])):
        assert learned_of(rows_of("sft", talk, sft={"loss_on": loss_on})) == [learned]


def test_of_preferences_what_follows_the_prompt_is_learned() -> None:
    from finetune_trainer.data.records import Preference

    pair = Preference([*user("1"), *answer("2"), *user("3")], answer("45"), answer("678"), 0.5)
    rows = rows_of("dpo", pair, Preference(user("1" * 20), answer("2"), answer("3")))
    assert (len(rows), rows.parts, learned_of(rows)) == (1, 2, [[4, 5], [6, 7, 8]])
    assert rows.numbers["margin"].tolist() == [0.5]
    long = Preference(user("1"), answer("2"), answer("3" * 16))
    assert len(rows_of("dpo", long)) == 1
    assert len(rows_of("reward", pair, long)) == 1, "half an answer is not compared"


def test_verdicts_come_with_the_answer_of_another_row() -> None:
    from finetune_trainer.data.records import Judged

    rows = rows_of("kto", Judged(user("12"), answer("3"), True), Judged(user("4"), answer("5" * 15), False))
    assert rows.numbers["desirable"].tolist() == [1, 0]
    sequences = [rows.ids[rows.starts[n] : rows.starts[n + 1]].tolist() for n in range(4)]
    assert sequences == [[1, 2, 3], [1, 2, *[5] * 14], [4, *[5] * 15], [4, 3]]
    assert learned_of(rows) == [[3], [5] * 14, [5] * 15, [3]]


def test_the_strange_answer_of_a_verdict_is_one_to_another_prompt() -> None:
    from finetune_trainer.data.records import Judged, Preference, as_kind

    pair = as_kind(Preference(user("12"), answer("3"), answer("6")), Judged)
    rows = rows_of("kto", *pair, *as_kind(Preference(user("4"), answer("5"), answer("7")), Judged))
    sequences = [rows.ids[rows.starts[n] : rows.starts[n + 1]].tolist() for n in range(8)]
    assert sequences[::2] == [[1, 2, 3], [1, 2, 6], [4, 5], [4, 7]]
    assert sequences[1::2] == [[1, 2, 5], [1, 2, 5], [4, 3], [4, 3]]
    same = rows_of("kto", *pair)
    assert [same.ids[same.starts[n] : same.starts[n + 1]].tolist() for n in (1, 3)] == [[1, 2, 6], [1, 2, 3]]
