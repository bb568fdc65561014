"""How rows are written, and what they say: one pure converter per format.

A converter makes records (``records.py``) of a row, one in general; what it refuses is a :class:`BadRowError`, which
the reader completes with file and line. Called by ``data/__init__.py``.
"""

from collections.abc import Callable
from typing import Any

from finetune_trainer.data.fields import answer, kind, shown, text
from finetune_trainer.data.records import (
    BadRowError,
    Conversation,
    Judged,
    Labelled,
    Message,
    Preference,
    Record,
    SourceTarget,
    Tagged,
    Text,
)

Row = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def alpaca(row: Row) -> list[Record]:
    """``instruction``, ``input``, ``output``, optional ``system`` and ``history`` ([[question, answer], …]).

    Instruction and input are joined by a newline, as in LLaMA-Factory.
    """
    messages: list[Message] = []
    system = text(row, "system", optional=True)
    if system:
        messages.append({"role": "system", "content": system})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadRowError(f"history is {kind(history)}; accepted: a list of [question, answer] pairs")
    for number, pair in enumerate(history):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRowError(f"history[{number}] is {shown(pair)}; accepted: [question, answer], two texts")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = [part for part in (text(row, "instruction"), text(row, "input", optional=True)) if part]
    if not asked:
        raise BadRowError("instruction is empty; accepted: a text")
    messages += [
        {"role": "user", "content": "\n".join(asked)},
        {"role": "assistant", "content": answer(row, "output")},
    ]
    return [Conversation(messages, fields=row)]


def messages(row: Row) -> list[Record]:
    """``messages``: a list of ``role`` and ``content``, as OpenAI's; content is a text or a list of text parts.

    ``weight: 0`` on an assistant's message keeps it out of the loss. Messages after the last answer are dropped.
    """
    given = row.get("messages")
    if not isinstance(given, list) or not given:
        raise BadRowError(f"messages is {shown(given)}; accepted: a list of {{role, content}}")
    result: list[Message] = []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise BadRowError(f"{where} is {kind(message)}; accepted: an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise BadRowError(f"{where}.role is {shown(role)}; accepted: {', '.join(ROLES)}")
        if message.get("tool_calls") or message.get("function_call"):
            raise BadRowError(f"{where} holds tool calls, which are not supported; write the call into its content")
        kept: Message = {"role": role, "content": _content(message.get("content"), where)}
        if role == "assistant" and message.get("weight") == 0:
            kept["train"] = False
        result.append(kept)
    while result and result[-1]["role"] != "assistant":
        result.pop()
    if not any(message["role"] == "assistant" and message.get("train", True) for message in result):
        raise BadRowError("messages hold no answer to learn; accepted: at least one message of role assistant")
    return [Conversation(result, fields=row)]


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise BadRowError(
        f'{where}.content is {shown(content)}; accepted: a text, or a list of {{"type": "text", "text": …}}'
    )


def document(row: Row) -> list[Record]:
    """``text``: running text."""
    return [Text(text(row, "text"))]


def preference(row: Row) -> list[Record]:
    """``prompt``, ``chosen``, ``rejected``: texts; optional ``margin``."""
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise BadRowError(f"margin is {shown(margin)}; accepted: a number")
    return [Preference(_asked(row), _said(row, "chosen"), _said(row, "rejected"), margin)]


def kto(row: Row) -> list[Record]:
    """``prompt``, ``completion``: texts; ``label``: true where the answer is good."""
    if not isinstance(row.get("label"), bool):
        raise BadRowError(f"label is {shown(row.get('label'))}; accepted: true or false")
    return [Judged(_asked(row), _said(row, "completion"), row["label"])]


def _asked(row: Row) -> list[Message]:
    return [{"role": "user", "content": text(row, "prompt")}]


def _said(row: Row, field: str) -> list[Message]:
    return [{"role": "assistant", "content": answer(row, field)}]


def labelled(row: Row) -> list[Record]:
    """``text``, optional ``text_pair``, and ``label``."""
    if "label" not in row:
        raise BadRowError("label is missing; accepted: a text, a number, or a list of texts")
    return [Labelled(text(row, "text"), text(row, "text_pair", optional=True) or None, row["label"])]


def conll(row: Row) -> list[Record]:
    """``tokens`` and ``tags``, as many."""
    tokens, tags = row.get("tokens"), row.get("tags")
    if not isinstance(tokens, list) or not isinstance(tags, list) or len(tokens) != len(tags) or not tokens:
        raise BadRowError("tokens and tags must be lists of the same length")
    return [Tagged([str(token) for token in tokens], [str(tag) for tag in tags])]


def source_target(row: Row) -> list[Record]:
    """``source`` and ``target``."""
    return [SourceTarget(text(row, "source"), text(row, "target"))]


FORMATS: dict[str, Callable[[Row], list[Record]]] = {
    "alpaca": alpaca,
    "messages": messages,
    "text": document,
    "preference": preference,
    "kto": kto,
    "labelled": labelled,
    "conll": conll,
    "source_target": source_target,
}
