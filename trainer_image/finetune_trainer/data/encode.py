"""From records to rows of tokens: what each stage learns of a record. One :class:`Encoding` per stage.

A record becomes texts with what of them is learned (:class:`Sketch`), the texts of many rows are tokenised together,
and the result is brought within ``data.max_length``. Pure. Called by ``data/__init__.py``.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from finetune_api.run import TrainerConfig
from finetune_api.stages import Sft
from finetune_trainer.data.records import Conversation, Judged, Message, Preference, Prompt, Text
from finetune_trainer.data.render import Rendered, Renderer, Tokens
from finetune_trainer.data.stream import Draft, Rows


@dataclass(frozen=True)
class Sketch:
    """A row before it is tokenised."""

    texts: tuple[Rendered, ...]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    raw: tuple[Any, ...] = ()
    """What the tokenizer puts together itself: two texts, words and their tags."""
    note: str = ""
    """What is kept of the record as it is."""


def _tokenised(renderer: Renderer, sketches: list[Sketch]) -> Iterator[Draft]:
    tokens = renderer.encode([text for sketch in sketches for text in sketch.texts])
    for sketch in sketches:
        yield Draft(tuple(islice(tokens, len(sketch.texts))), sketch.numbers, sketch.note)


@dataclass(frozen=True)
class Encoding:
    """How the records of a stage become rows."""

    record: type
    """The kind of record, of ``records.py``."""
    sketch: Callable[[Renderer, Any], list[Sketch]]
    """Rows of a record. BadRowError."""
    fit: Callable[[Draft, int], list[Draft]]
    """(row, max_length) to what can be learned of it: itself, cut; several pieces; nothing."""
    tokenise: Callable[[Renderer, list[Sketch]], Iterator[Draft]] = _tokenised
    """A row for each sketch, in their order."""
    whole: Callable[[Rows], Rows] = lambda rows: rows
    """What is done when all rows of a source are there."""
    version: tuple[Any, ...] = ()
    """What the rows depend on beside the stage's name, for the cache."""


# --- what of a record is learned ------------------------------------------------------------------------------------


def document(renderer: Renderer, record: Text) -> list[Sketch]:
    """The whole text, with the tokenizer's token of beginning, where it has one, and the end token."""
    return [Sketch((renderer.document(record.text),))]


def conversation(loss_on: str) -> Callable[[Renderer, Conversation], list[Sketch]]:
    """``loss_on``: answers, last_answer or all (TRL's assistant_only_loss is answers)."""

    def sketch(renderer: Renderer, record: Conversation) -> list[Sketch]:
        if loss_on == "last_answer":
            record = Conversation(_last_answer_only(record.messages), record.tools, record.fields)
        texts = renderer.render(record)
        if loss_on == "all":
            # Where earlier turns are written differently once later ones follow, each text would repeat the others.
            texts = [Rendered(texts[-1].text, [(0, len(texts[-1].text))])]
        return [Sketch((text,)) for text in texts]

    return sketch


def preference(renderer: Renderer, record: Preference) -> list[Sketch]:
    """The better answer and the worse one, each with the prompt before it."""
    texts = tuple(_answered(renderer, record, answer) for answer in (record.chosen, record.rejected))
    return [Sketch(texts, {"margin": float(record.margin or 0.0)})]


def judged(renderer: Renderer, record: Judged) -> list[Sketch]:
    """The answer, with the prompt before it, and whether it is a good one."""
    text = _answered(renderer, record, record.completion)
    return [Sketch((text,), {"desirable": int(record.desirable)})]


def prompt(renderer: Renderer, record: Prompt) -> list[Sketch]:
    """The prompt up to where the model begins to write. Its messages and columns are kept, for those who judge."""
    note = json.dumps({"messages": record.messages, "fields": record.fields}, ensure_ascii=False, default=str)
    return [Sketch((renderer.asking(record.messages, record.tools),), note=note)]


def _answered(renderer: Renderer, record: Preference | Judged, answer: list[Message]) -> Rendered:
    muted = [message | {"train": False} if message["role"] == "assistant" else message for message in record.prompt]
    return renderer.render(Conversation([*muted, *answer], record.tools))[-1]


def _last_answer_only(messages: list[Message]) -> list[Message]:
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    return [
        message | {"train": False} if message["role"] == "assistant" and number != last else message
        for number, message in enumerate(messages)
    ]


# --- within max_length ----------------------------------------------------------------------------------------------


def _cut(tokens: Tokens, start: int, stop: int) -> Tokens:
    labels = None if tokens.labels is None else tokens.labels[start:stop]
    return Tokens(tokens.ids[start:stop], tokens.learned[start:stop], labels)


def truncated(row: Draft, max_length: int) -> list[Draft]:
    """The row, its sequences cut at the end; nothing where in one of them nothing to learn is left."""
    sequences = tuple(_cut(tokens, 0, max_length) for tokens in row.sequences)
    # The first token has nothing before it to be predicted from.
    return [Draft(sequences, row.numbers)] if all(tokens.learned[1:].any() for tokens in sequences) else []


def pieces(row: Draft, max_length: int) -> list[Draft]:
    """A long document in pieces of max_length: nothing of it is lost, but a last single token."""
    [tokens] = row.sequences
    starts = range(0, len(tokens.ids), max_length)
    return [
        Draft((_cut(tokens, start, start + max_length),), row.numbers)
        for start in starts
        if len(tokens.ids) - start > 1
    ]


def untouched(row: Draft, max_length: int) -> list[Draft]:
    """The row, or nothing where a sequence of it is too long: half an answer cannot be compared with a whole one."""
    return [row] if all(0 < len(tokens.ids) <= max_length for tokens in row.sequences) else []


def with_room(answer: int) -> Callable[[Draft, int], list[Draft]]:
    """The prompt, or nothing where an answer of so many tokens has no room behind it: cut, it asks something else."""
    return lambda row, max_length: untouched(row, max_length - answer)


# --- whole sources --------------------------------------------------------------------------------------------------


def with_strangers(rows: Rows, max_length: int) -> Rows:
    """Every row with a second sequence: its prompt and the answer of the next row with another prompt, behind the last
    row that of the first, cut at ``max_length`` (KTO estimates by them how far the model has moved, as TRL does within
    batches). Only where all prompts are the same, the next row's."""
    count = len(rows)
    sequences = []
    strangers = _next_other_prompt(rows)
    for row in range(count):
        own = slice(rows.starts[row], rows.starts[row + 1])
        other = slice(rows.starts[strangers[row]], rows.starts[strangers[row] + 1])
        prompt = int(np.argmax(rows.learned[own]))
        answer = int(np.argmax(rows.learned[other]))
        sequences.append(Tokens(rows.ids[own], rows.learned[own]))
        sequences.append(
            Tokens(
                np.concatenate([rows.ids[own][:prompt], rows.ids[other][answer:]])[:max_length],
                np.concatenate([rows.learned[own][:prompt], rows.learned[other][answer:]])[:max_length],
            )
        )
    pairs = [Draft(tuple(sequences[2 * row : 2 * row + 2])) for row in range(count)]
    paired = Rows.of(rows.name, pairs)
    return Rows(paired.name, paired.ids, paired.learned, paired.starts, 2, None, rows.numbers) if count else rows


def _next_other_prompt(rows: Rows) -> list[int]:
    """Of each row the next one, in a circle, that does not ask the same."""
    count = len(rows)
    prompts = []
    for start, stop in zip(rows.starts[:-1], rows.starts[1:], strict=True):
        prompts.append(rows.ids[start : start + int(np.argmax(rows.learned[start:stop]))].tobytes())
    following = [(row + 1) % count for row in range(count)]
    for row in reversed(range(2 * count)):  # twice around: what follows the last row is known by then
        here, there = row % count, (row + 1) % count
        following[here] = following[there] if prompts[here] == prompts[there] else there
    return following if len(set(prompts)) > 1 else [(row + 1) % count for row in range(count)]


def encoding(config: TrainerConfig) -> Encoding:
    """The one of the run's stage."""
    return ENCODINGS[config.stage](config)


def _sft(config: TrainerConfig) -> Encoding:
    loss_on = (config.sft or Sft()).loss_on
    return Encoding(Conversation, conversation(loss_on), truncated, version=(loss_on,))


def _rollouts(config: TrainerConfig) -> Encoding:
    options = config.rollout
    assert options is not None
    room = options.max_completion_length
    return Encoding(Prompt, prompt, with_room(room), version=(room,))


ENCODINGS: dict[str, Callable[[TrainerConfig], Encoding]] = {
    "pretrain": lambda config: Encoding(Text, document, pieces),
    "sft": _sft,
    "reward": lambda config: Encoding(Preference, preference, untouched),
    "dpo": lambda config: Encoding(Preference, preference, truncated),
    "kto": lambda config: Encoding(
        Judged, judged, truncated, whole=lambda rows: with_strangers(rows, config.data.max_length)
    ),
    "orpo": lambda config: Encoding(Preference, preference, truncated),
    "ppo": _rollouts,
    "grpo": _rollouts,
}
"""By stage."""
