"""A step of the stages that learn from what the model writes (ppo, grpo).

One step is one rollout: the prompts of a global batch are answered (*write*), the answers are judged and every token
looked at (*experience*), and learned from in every epoch and mini-batch (*learn*), by the same engine and pure losses
as all other stages. Nothing is kept from step to step but the weights and PPO's coefficient of divergence, so a
checkpoint after a step is an exact one.

Answers are drawn token by token by (seed, step, place in the batch, number of the answer), and written in slots of
fixed content, so any number of processes writes the same. Afterwards every process gets all answers with their
numbers: what is learned of them (advantages, whitening, mini-batches) is a pure function of the global batch.

Called by ``run.py``. ``rewards.py`` judges, ``objectives/ppo.py`` and ``grpo.py`` know what is to be learned.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from finetune_api.run import TrainerConfig
from finetune_trainer.data import Item, Sequence, Stream
from finetune_trainer.data.stream import IGNORED, collate, permutation
from finetune_trainer.engine import Engine, StepOutcome
from finetune_trainer.feed import Slot, StepBatch, draw_seed
from finetune_trainer.generate import end_tokens, written
from finetune_trainer.objectives import Objective, Sums, grpo, policy, ppo, sft
from finetune_trainer.objectives.head import find_head
from finetune_trainer.rewards import Asked, Rewards

_MINI_BATCHES = 3
"""First part of the key of the order of answers; ``data/stream.py`` has 0 to 2 and more for its own."""


@dataclass
class Answer:
    """What was written to one prompt, and what is known of it: A tokens."""

    place: int
    """Of its prompt in the global batch."""
    number: int
    """Among the answers to it."""
    prompt: np.ndarray
    """int32 (P,)"""
    ids: np.ndarray
    """int32 (A,), with the end token where it ended."""
    ended: bool
    """It ended by itself."""
    rewards: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """float64 (judges,): what each says, NaN where it has no opinion."""
    reward: float = 0.0
    """Their sum by weight."""
    old: np.ndarray | None = None
    """fp32 (A,): the log-probabilities it was written with."""
    reference: np.ndarray | None = None
    """fp32 (A,): the reference's."""
    values: np.ndarray | None = None
    """fp32 (A,): the reward still to come, as the policy estimated it before each token."""

    @property
    def item(self) -> Item:
        """Prompt and answer as a sequence; the answer is learned."""
        ids = np.concatenate([self.prompt, self.ids]).astype(np.int32)
        labels = np.where(np.arange(len(ids)) < len(self.prompt), IGNORED, ids).astype(np.int32)
        return Item((Sequence(ids, labels, np.arange(len(ids), dtype=np.int32)),), ())


def prompts_at_once(config: TrainerConfig) -> int:
    """Prompts that a process answers at once. Of the configuration alone, so that the slots are always the same."""
    options = config.rollout
    assert options is not None
    fitting = options.local_rollout_forward_batch_size // (config.grpo.num_generations if config.grpo else 1)
    mine = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    return max(1, min(fitting, mine))


def prompts(items: list[Item]) -> dict[str, Any]:
    """What :class:`Feed` makes of a slot: the prompts as they are."""
    return {"prompts": items}


def reading(terms: int) -> Objective:
    """For :class:`Feed`: a slot of prompts has no loss yet."""
    return Objective(weights=lambda batch: (0.0,) * terms, loss_sums=lambda *_: (None, {}), terms=terms)


@dataclass(frozen=True)
class Parts:
    """What stands beside the policy, made before the engine."""

    reference: torch.nn.Module | None
    """A second model, where the method cannot be switched off to ask the model as it was."""
    judges: Rewards
    detach: Callable[[], None]
    """Takes everything out of the policy that is no part of the result."""


def furnish(
    config: TrainerConfig, model: torch.nn.Module, can_switch_off: bool, load_rewards: Callable[[], Rewards]
) -> Parts:
    """Give the policy what the stage needs: a reference, judges, and for ppo a value head, which is trained with it."""
    reference = None
    if needs_reference(config) and not can_switch_off:
        reference = deepcopy(model).eval().requires_grad_(False)
    judges = load_rewards()
    for module in model.modules():  # the probabilities of an answer must be those it was written with
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if config.stage == "ppo":
        described: Any = model.config
        one = next(p for p in model.parameters() if p.requires_grad)
        head = torch.nn.Linear(described.get_text_config().hidden_size, 1, bias=False, dtype=one.dtype)
        torch.nn.init.zeros_(head.weight)
        model.add_module(policy.VALUE_HEAD, head.to(one.device))

    def detach() -> None:
        judges.detach()
        if hasattr(model, policy.VALUE_HEAD):
            delattr(model, policy.VALUE_HEAD)

    return Parts(reference, judges, detach)


def needs_reference(config: TrainerConfig) -> bool:
    """The divergence from the model the job starts from costs something."""
    if config.ppo is not None:
        return config.ppo.kl_coef > 0
    return config.grpo is not None and config.grpo.beta > 0


class Rollouts:
    """Makes the steps of a run."""

    def __init__(self, engine: Engine, tokenizer: Any, config: TrainerConfig, parts: Parts, kl_coef: float | None):
        """``kl_coef``: where a checkpoint left PPO's coefficient of divergence."""
        options = config.rollout
        assert options is not None
        self.options = options
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.judges, self.reference = parts.judges, parts.reference
        self.world = engine.world
        self.answers = config.grpo.num_generations if config.grpo else 1
        self.epochs = config.ppo.num_ppo_epochs if config.ppo else config.grpo.num_iterations if config.grpo else 1
        self.kl_coef = config.ppo.kl_coef if config.ppo and kl_coef is None else kl_coef
        """PPO's, of the next step."""
        self._ends = end_tokens(engine.module, tokenizer)
        self._pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._ends[0])
        self._reference_head = find_head(parts.reference) if parts.reference is not None else None

    # The step

    def step(self, batch: StepBatch, learning_rate: float) -> tuple[StepOutcome, StepBatch]:
        """Answer the prompts of a global batch and learn from the answers; ``batch`` is this process's part of it.

        The loss is the mean over the updates. The batch comes back with the tokens that were looked at.
        """
        mine: list[Answer] = []
        for slot in batch.slots:
            if not slot.stand_in:
                mine += self._experience(self._write(slot, batch.step))
            self.engine.stop.beat()
        answers = self._all(mine)
        lessons, told = self._lessons(answers)
        outcome = self._learn(answers, lessons, batch, learning_rate, told)
        lengths = [len(answer.prompt) + len(answer.ids) for answer in mine]
        return outcome, replace(batch, tokens=sum(lengths), pairs=sum(n * (n + 1) // 2 for n in lengths))

    def _all(self, mine: list[Answer]) -> list[Answer]:
        """The answers of all processes, in the order of the batch. Collective."""
        parts: list[Any] = [mine]
        if self.world.size > 1:
            parts = [None] * self.world.size
            dist.all_gather_object(parts, mine)
        return sorted((one for part in parts for one in part), key=lambda answer: (answer.place, answer.number))

    # Write

    def _write(self, slot: Slot, step: int) -> list[tuple[Answer, Asked]]:
        """Answers to the prompts of a slot, drawn by (seed, step, place, number)."""
        items: list[Item] = slot.batch["prompts"]
        first = slot.number * prompts_at_once(self.config)
        places = [(first + number, again) for number in range(len(items)) for again in range(self.answers)]
        seeds = [draw_seed(self.config.training.seed, step, place, again) for place, again in places]
        return self._answers(items, places, seeds)

    def _answers(
        self, items: list[Item], places: list[tuple[int, int]], seeds: list[int] | None
    ) -> list[tuple[Answer, Asked]]:
        """``seeds``: of each answer; None: the likeliest tokens, nothing is drawn."""
        each = len(places) // len(items)
        texts = [item.sequences[0].input_ids for item in items for _ in range(each)]
        longest = self.options.max_completion_length
        draw = Draw(self.options.temperature, self.options.top_p, seeds, longest, self.world.device)
        with self.engine.looking():
            output = drawn(self.engine.module, self.tokenizer, texts, self._ends, self._pad, longest, draw)
        found: list[tuple[Answer, Asked]] = []
        for (place, number), text, row in zip(places, texts, output, strict=True):
            ends = np.flatnonzero(np.isin(row, self._ends))
            said = row[: ends[0] + 1] if len(ends) else row
            answer = Answer(place, number, np.array(text, np.int32), said.astype(np.int32), bool(len(ends)))
            found.append((answer, self._asked(items[len(found) // each], answer)))
        return found

    def _asked(self, item: Item, answer: Answer) -> Asked:
        note = json.loads(item.note)
        told = str(self.tokenizer.decode(answer.ids, skip_special_tokens=True)).strip()
        return Asked(note["messages"], told, len(answer.ids), answer.ids.tolist(), note["fields"])

    # Experience

    def _experience(self, written_now: list[tuple[Answer, Asked]]) -> list[Answer]:
        """What the judges, the policy and the reference say of the answers of a slot."""
        answers = [answer for answer, _ in written_now]
        told = self.judges.of([asked for _, asked in written_now])
        for answer, row, total in zip(answers, told, self.judges.total(told), strict=True):
            answer.rewards, answer.reward = row, float(total)
        batch = _collated(answers, self._pad)
        if self.config.ppo is not None or self.updates > 1:
            values = self.config.ppo is not None
            for answer, part in zip(answers, self._said(batch, values=values), strict=True):
                answer.old, answer.values = part[:, 0], part[:, 2] if values else None
        if needs_reference(self.config):
            for answer, part in zip(answers, self._said(batch, reference=True), strict=True):
                answer.reference = part[:, 0]
        return answers

    def _said(self, batch: dict[str, Any], *, values: bool = False, reference: bool = False) -> list[np.ndarray]:
        """fp32 (A, k) of each answer: ``policy.said``."""

        def said(model: Any, inputs: dict[str, Any], head: Any) -> torch.Tensor:
            return policy.said(model, inputs, head, self.options.temperature, values=values)

        if reference and self.reference is not None:
            told = self.engine.ask(
                lambda model, inputs, head: said(self.reference, inputs, self._reference_head), batch
            )
        else:
            told = self.engine.ask(said, batch, reference=reference)
        return [part.cpu().numpy() for part in told.float().split(batch["lengths"])]

    # Learn

    @property
    def updates(self) -> int:
        """Of the weights, in a step."""
        return self.epochs * self.options.num_mini_batches

    def _lessons(self, answers: list[Answer]) -> tuple[list[dict[str, np.ndarray]], Sums]:
        """By answer and name, (A,) each: what is to be learned of its tokens; and sums for ``figures``. The same on all
        processes."""
        scores = np.array([answer.reward for answer in answers])
        ended = np.array([answer.ended for answer in answers])
        told: Sums = {
            "answers": len(answers),
            "reward": scores.sum(),
            "square": (scores**2).sum(),
            "ended": ended.sum(),
            "length": sum(len(answer.ids) for answer in answers),
            "judged": np.nansum([answer.rewards for answer in answers], axis=0),
            "opinions": np.isfinite([answer.rewards for answer in answers]).sum(0),
        }
        found: list[dict[str, Any]]
        if (options := self.config.ppo) is not None:
            assert self.kl_coef is not None
            references = [answer.reference for answer in answers] if needs_reference(self.config) else None
            lessons = ppo.lessons(
                options,
                self.kl_coef,
                scores,
                ended,
                [answer.old for answer in answers],  # type: ignore[misc]
                references,  # type: ignore[arg-type]
                [answer.values for answer in answers],  # type: ignore[misc]
            )
            found = [
                {"old": answer.old, "values": answer.values, "advantages": advantage, "returns": back}
                for answer, advantage, back in zip(answers, lessons.advantages, lessons.returns, strict=True)
            ]
            kl = float(lessons.kl.mean())
            told |= {"kl": lessons.kl.sum(), "kl_coef": self.kl_coef * len(answers)}
            self.kl_coef = ppo.adapted(self.kl_coef, kl, len(answers), options)
        else:
            assert self.config.grpo is not None
            advantages = grpo.advantages(self.config.grpo, scores)
            groups = scores.reshape(-1, self.answers)
            told["undecided"] = self.answers * int((np.ptp(groups, axis=1) == 0).sum())
            found = []
            for answer, advantage in zip(answers, advantages, strict=True):
                kept = answer.ended or not self.config.grpo.mask_truncated_completions
                one = np.ones(len(answer.ids), np.float32)
                found.append({"advantages": advantage * one, "learned": float(kept) * one})
                found[-1] |= {} if answer.old is None else {"old": answer.old}
                found[-1] |= {} if answer.reference is None else {"reference_log_probs": answer.reference}
        return found, {key: torch.as_tensor(value, dtype=torch.float64) for key, value in told.items()}

    def _learn(
        self,
        answers: list[Answer],
        lessons: list[dict[str, np.ndarray]],
        batch: StepBatch,
        learning_rate: float,
        told: Sums,
    ) -> StepOutcome:
        """All updates of a step. The outcome's figures are sums over them, and ``told``."""
        terms, device = self.engine.objective.terms, self.world.device
        losses = torch.zeros(terms, dtype=torch.float64, device=device)
        sums: Sums = {}
        norm, applied = 0.0, True
        updates = list(self._mini_batches(len(answers), batch.step))
        for number, chosen in enumerate(updates):
            update, weights = self._update(answers, lessons, chosen, batch, number)
            outcome = self.engine.step(update, weights, learning_rate)
            losses += outcome.loss_sums / torch.tensor([max(weight, 1) for weight in weights], device=device)
            for name, value in self.engine.unflattened(outcome.sums.tolist()).items():
                sums[name] = sums.get(name, 0.0) + value
            norm, applied = norm + float(outcome.grad_norm), applied and outcome.applied
        shared = {key: value if self.world.first else value * 0.0 for key, value in told.items()}  # all have the same
        flat = self.engine.flattened(sums | shared)
        return StepOutcome(losses / len(updates), [1.0] * terms, flat, norm / len(updates), applied)

    def _mini_batches(self, count: int, step: int) -> Iterator[list[int]]:
        """The answers of each update, in an order that depends on (seed, step, epoch)."""
        for epoch in range(self.epochs):
            order = permutation(count, self.config.training.seed, _MINI_BATCHES, step, epoch)
            for part in np.array_split(order, self.options.num_mini_batches):
                if len(part):
                    yield part.tolist()

    def _update(
        self,
        answers: list[Answer],
        lessons: list[dict[str, np.ndarray]],
        chosen: list[int],
        batch: StepBatch,
        number: int,
    ) -> tuple[StepBatch, list[float]]:
        """This process's slots of one update, and the weights of the whole of it."""
        size = self.config.training.per_device_train_batch_size
        parts = [chosen[first : first + size] for first in range(0, len(chosen), size)]
        made = [_collated([answers[n] for n in part], self._pad, [lessons[n] for n in part]) for part in parts]
        every = [self.engine.objective.weights(one) for one in made]
        slots = []
        for turn in range(-(-len(parts) // self.world.size)):
            own = turn * self.world.size + self.world.rank
            stand_in = own >= len(parts)
            slots.append(Slot(number * len(chosen) + own, made[0 if stand_in else own], stand_in))
        return replace(batch, slots=slots), [sum(column) for column in zip(*every, strict=True)]

    # Evaluate

    def evaluate(self, sources: dict[str, Stream]) -> dict[str, float]:
        """The judges' words on answers to held-out prompts, by the likeliest tokens: ``reward`` … over all sources and
        ``reward/NAME`` … of each. Collective."""
        size = prompts_at_once(self.config)
        names = ("answers", "reward", "ended", "length")
        totals = torch.zeros(len(sources), len(names) + 2 * len(self.judges.names), dtype=torch.float64)
        for row, stream in enumerate(sources.values()):
            for places, stand_in in self.engine.shared_out(stream.items(0), size):
                if stand_in:
                    continue
                items = [stream.item(0, place) for place in places]
                found = self._answers(items, [(place, 0) for place in places], None)
                told = self.judges.of([asked for _, asked in found])
                total = self.judges.total(told).sum()
                answers = [answer for answer, _ in found]
                counts = [len(found), total, sum(a.ended for a in answers), sum(len(a.ids) for a in answers)]
                totals[row] += torch.tensor([*counts, *np.nansum(told, 0), *np.isfinite(told).sum(0)])
                self.engine.stop.beat()
        totals = totals.to(self.world.device)
        if self.world.size > 1:
            dist.all_reduce(totals)
        figures: dict[str, float] = {}
        kinds = len(self.judges.names)
        for name, row_of in [
            ("", totals.sum(0)),
            *((f"/{name}", one) for name, one in zip(sources, totals, strict=True)),
        ]:
            values = row_of.tolist()
            count = max(values[0], 1.0)
            figures |= {f"{key}{name}": value / count for key, value in zip(names[1:], values[1:4], strict=True)}
            if kinds > 1:
                told_by = zip(self.judges.names, values[4 : 4 + kinds], values[4 + kinds :], strict=True)
                figures |= {f"reward_{key}{name}": value / max(n, 1.0) for key, value, n in told_by}
        return figures


Figures = Callable[[Sums], dict[str, float]]


def figures(judges: tuple[str, ...], of_objective: Figures) -> Figures:
    """What a step tells: ``reward`` and its deviation, ``length`` (tokens) of the answers and the share that ``ended``
    by themselves; of ppo ``kl`` (nats per answer away from the reference) and ``kl_coef``; of grpo ``undecided``, the
    share of answers whose group was judged alike; ``reward_NAME`` where there are several judges; and the objective's.
    """

    def told(sums: Sums) -> dict[str, float]:
        if "answers" not in sums:
            return {}
        count = max(float(sums["answers"]), 1.0)
        mean = float(sums["reward"]) / count
        found = {"reward": mean, "reward_std": max(float(sums["square"]) / count - mean**2, 0.0) ** 0.5}
        for name in ("length", "ended", "kl", "kl_coef", "undecided"):
            if name in sums:
                found[name] = float(sums[name]) / count
        if len(judges) > 1:
            opinions = zip(judges, sums["judged"].tolist(), sums["opinions"].tolist(), strict=True)
            found |= {f"reward_{name}": total / max(n, 1.0) for name, total, n in opinions}
        return found | of_objective(sums)

    return told


def _collated(answers: list[Answer], pad: int, lessons: list[dict[str, np.ndarray]] | None = None) -> dict[str, Any]:
    """Answers as a prepared batch (``objectives/policy.py``)."""
    batch = sft.prepare(collate([answer.item for answer in answers], pad))
    batch["lengths"] = [len(answer.ids) for answer in answers]
    for name in lessons[0] if lessons else ():
        assert lessons is not None
        batch[name] = torch.from_numpy(np.concatenate([lesson[name] for lesson in lessons]))
    return batch


# --- writing --------------------------------------------------------------------------------------------------------


class Draw(LogitsProcessor):
    """Chooses the next token of every row, at a temperature and among the likeliest ones, by the row's own numbers: it
    leaves only that one, so that greedy search takes it."""

    def __init__(
        self, temperature: float, top_p: float, seeds: list[int] | None, longest: int, device: torch.device
    ) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.numbers: torch.Tensor | None = None
        if seeds is not None:
            rows = [torch.rand(longest, dtype=torch.float64, generator=_generator(seed)) for seed in seeds]
            self.numbers = torch.stack(rows).to(device)
        self.done = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, words) to the same, -inf but for one token per row."""
        if self.numbers is None:
            return scores
        shares = torch.softmax(scores.double() / self.temperature, -1)
        if self.top_p < 1:
            ordered, places = shares.sort(dim=-1, descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # the likeliest one always stays
            shares = shares.scatter(-1, places, ordered.masked_fill(beyond, 0.0))
        sums = shares.cumsum(-1)
        number = self.numbers[:, self.done].unsqueeze(-1) * sums[:, -1:]
        self.done += 1
        chosen = torch.searchsorted(sums, number, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


def drawn(
    model: Any, tokenizer: Any, texts: list[np.ndarray], ends: list[int], pad: int, longest: int, draw: Draw
) -> np.ndarray:
    """int64 (B, T): what the model writes behind B prompts, T at most ``longest``; behind an end token is padding."""
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.from_numpy(np.array(text, np.int64))
        mask[row, width - len(text) :] = 1
    device = next(model.parameters()).device
    with _nothing_else(model, ends, pad):
        output = written(
            model,
            tokenizer,
            {"input_ids": ids.to(device), "attention_mask": mask.to(device)},
            together=False,
            max_new_tokens=longest,
            logits_processor=LogitsProcessorList([draw]),
        )
    found: np.ndarray = output[:, width:].cpu().numpy()
    return found


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def _nothing_else(model: Any, ends: list[int], pad: int) -> Iterator[None]:
    """Inside, nothing that a model was published with changes what it writes (penalties, forbidden words)."""
    models = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    kept = [(one, one.generation_config) for one in models if hasattr(one, "generation_config")]
    try:
        for one, _ in kept:
            one.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
        yield
    finally:
        for one, before in kept:
            one.generation_config = before
