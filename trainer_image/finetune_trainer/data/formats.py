"""How rows are written, and what they say: one pure converter per format.

A converter makes records (``records.py``) of a row, one in general, none where the row decides nothing; what it
refuses is a :class:`BadRowError`, which the reader completes with file and line. The simple ones stand here, the
others in ``conversations.py``, ``transcripts.py`` and ``preferences.py``. Called by ``sources.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_trainer.data import preferences, transcripts
from finetune_trainer.data.conversations import (
    TOOLS,
    conversation,
    holds_messages,
    message_list,
    messages,
    sharegpt,
    tools_of,
    with_system,
)
from finetune_trainer.data.fields import Row, answer, decoded, filled, items, kind, missing, of_cell, shown, text
from finetune_trainer.data.records import (
    BadRowError,
    Conversation,
    Judged,
    Labelled,
    Message,
    Preference,
    Prompt,
    Ranked,
    Record,
    SourceTarget,
    Tagged,
    Text,
)


def alpaca(row: Row) -> list[Record]:
    """``instruction``, ``input``, ``output``, optional ``system`` and ``history`` ([[question, answer], …]).

    Instruction and input are joined by a newline, as in LLaMA-Factory.
    """
    turns: list[Message] = with_system([], row)
    history = decoded(row.get("history") or [])
    if not isinstance(history, list):
        raise BadRowError(f"history is {kind(history)}; accepted: a list of [question, answer] pairs")
    for number, pair in enumerate(history):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRowError(f"history[{number}] is {shown(pair)}; accepted: [question, answer], two texts")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = [part for part in (text(row, "instruction"), text(row, "input", optional=True)) if part]
    if not asked:
        raise BadRowError("instruction is empty; accepted: a text")
    turns.append({"role": "user", "content": "\n".join(asked)})
    turns.append({"role": "assistant", "content": answer(row, "output")})
    return [Conversation(turns, fields=row)]


def prompt_completion(row: Row) -> list[Record]:
    """``prompt`` and ``completion``: texts, or lists of messages; optional ``system`` and ``tools``."""
    prompt, tools = preferences.prompt_of(row, "prompt"), tools_of(row)
    if holds_messages(row, "completion"):
        return [conversation([*prompt, *message_list(row, "completion")], row, tools)]
    return [Conversation([*prompt, {"role": "assistant", "content": answer(row, "completion")}], tools, row)]


def prompt(row: Row) -> list[Record]:
    """``prompt``: a text, or a list of messages; optional ``system`` and ``tools``.

    Whatever else the row has is at hand for reward functions.
    """
    return [Prompt(preferences.prompt_of(row, "prompt"), row, tools_of(row))]


def plain_text(row: Row) -> list[Record]:
    """``text``: a document."""
    return [Text(filled(row, "text"))]


def labelled(row: Row) -> list[Record]:
    """``text``, optional ``text_pair``, and ``label``: a name, a number, or a list of names where several may hold."""
    label = of_cell(row.get("label"))
    if label is None:
        raise missing(row, "label", "a name, a number or a list of names")
    parts = label if isinstance(label, list) else [label]
    if not all(isinstance(part, str | int | float) for part in parts) or label != label or label == "":
        raise BadRowError(f"label is {shown(label)}; accepted: a name, a number or a list of names")
    pair = filled(row, "text_pair") if row.get("text_pair") is not None else None
    return [Labelled(filled(row, "text"), pair, label)]


def source_target(row: Row) -> list[Record]:
    """``source`` and ``target``, two texts."""
    return [SourceTarget(filled(row, "source"), answer(row, "target"))]


def conll(row: Row) -> list[Record]:
    """``tokens``, a list of words, and ``tags``, a tag for each (O, B-PER, I-PER …)."""
    tokens, tags = items(row, "tokens", "a list of words"), items(row, "tags", "a list of tags, one for each word")
    for field, given in (("tokens", tokens), ("tags", tags)):
        for place, one in enumerate(given):
            if not isinstance(one, str):
                raise BadRowError(f"{field}[{place}] is {shown(one)}; accepted: a text")
    if len(tokens) != len(tags):
        raise BadRowError(f"tags holds {len(tags)}, tokens {len(tokens)}; accepted: a tag for each word")
    return [Tagged(tokens, tags)]


def _transcript(read: Callable[[str], list[Message]], looks: str) -> Callable[[Row], list[Record]]:
    def convert(row: Row) -> list[Record]:
        turns = read(filled(row, "text"))
        if not turns:
            raise BadRowError(f"text is no such transcript; accepted: {looks}")
        return [conversation(turns, row)]

    return convert


@dataclass(frozen=True)
class Format:
    """One way to write rows."""

    convert: Callable[[Row], list[Record]]
    kind: type
    """Of its records."""
    needs: tuple[str, ...]
    """The columns a row must have."""
    knows: tuple[str, ...] = ()
    """Further columns it reads."""
    telling: Callable[[Row], bool] | None = None
    """What tells the format from another one with the same columns (``recognise.py``)."""


def _marked(*marks: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row["text"], str) and any(mark in row["text"] for mark in marks)


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and "Human:" in value and "Assistant:" in value


def _lists(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(decoded(row[field]), list) for field in fields)


TABLE: dict[str, Format] = {
    "alpaca": Format(alpaca, Conversation, ("instruction", "output"), ("input", "system", "history")),
    "messages": Format(messages, Conversation, ("messages",), ("system", *TOOLS), _lists("messages")),
    "sharegpt": Format(sharegpt, Conversation, ("conversations",), ("system", *TOOLS), _lists("conversations")),
    "chatml": Format(
        _transcript(transcripts.chatml, "<|im_start|>user … <|im_end|> <|im_start|>assistant …"),
        Conversation,
        ("text",),
        telling=_marked("<|im_start|>"),
    ),
    "chatglm": Format(
        _transcript(transcripts.chatglm, "[Round 0] 问：… 答：…"),
        Conversation,
        ("text",),
        telling=lambda row: _marked("[Round ")(row) and _marked("答：", "答:")(row),
    ),
    "claude": Format(
        _transcript(transcripts.claude, "Human: … Assistant: …, each after a blank line"),
        Conversation,
        ("text",),
        telling=lambda row: _is_transcript(row["text"]) and not _marked("###")(row),
    ),
    "guanaco": Format(
        _transcript(transcripts.guanaco, "### Instruction: … ### Response: …, or ### Human: … ### Assistant: …"),
        Conversation,
        ("text",),
        telling=_marked("### Response:", "### Assistant:"),
    ),
    "prompt_completion": Format(prompt_completion, Conversation, ("prompt", "completion"), ("system", *TOOLS)),
    "prompt": Format(
        prompt, Prompt, ("prompt",), ("system", *TOOLS), lambda row: not isinstance(of_cell(row["prompt"]), dict)
    ),
    "preference": Format(
        preferences.preference,
        Preference,
        ("chosen", "rejected"),
        ("prompt", "system", "margin", *TOOLS),
        telling=lambda row: not _is_transcript(row.get("prompt") or row["chosen"]),
    ),
    "hh_rlhf": Format(
        preferences.hh_rlhf,
        Preference,
        ("chosen", "rejected"),
        telling=lambda row: row.get("prompt") is None and _is_transcript(row["chosen"]),
    ),
    "rm_static": Format(
        preferences.rm_static,
        Preference,
        ("prompt", "chosen", "rejected"),
        ("response",),
        telling=lambda row: _is_transcript(row["prompt"]),
    ),
    "shp": Format(
        preferences.shp,
        Preference,
        (
            *("history", "human_ref_A", "human_ref_B", "score_A", "score_B"),
            *("created_at_utc_A", "created_at_utc_B"),
        ),
    ),
    "oasst": Format(
        preferences.oasst,
        Ranked,
        ("prompt",),
        telling=lambda row: isinstance(of_cell(row["prompt"]), dict),
    ),
    "ranked": Format(
        preferences.ranked, Ranked, ("prompt", "answers"), ("system", "ranks", "scores", *TOOLS), _lists("answers")
    ),
    "kto": Format(preferences.kto, Judged, ("prompt", "completion", "label"), ("system", *TOOLS)),
    "text": Format(plain_text, Text, ("text",)),
    "labelled": Format(labelled, Labelled, ("text", "label"), ("text_pair",)),
    "source_target": Format(source_target, SourceTarget, ("source", "target")),
    "conll": Format(conll, Tagged, ("tokens", "tags"), telling=_lists("tokens", "tags")),
}

FORMATS: dict[str, Callable[[Row], list[Record]]] = {name: entry.convert for name, entry in TABLE.items()}
