"""How rows are written in files, and how each way becomes a conversation.

A conversation is a list of messages ``{"role": "system"|"user"|"assistant"|"tool", "content": str}``, with
``"train": False`` on an assistant's message that must not be learned. One pure converter per format; what it refuses
is a :class:`BadRowError`, which the reader completes with file and line. Called by ``data/__init__.py``.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_trainer.fetch import DATA_SUFFIXES, hidden
from finetune_trainer.outcome import RunError

Message = dict[str, Any]
Conversation = list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool")


class BadRowError(Exception):
    """A row that is not written as its format says. The text names the field and what is accepted."""


@dataclass(frozen=True)
class Place:
    """Where a row stands, for messages."""

    file: str
    line: int
    """From 1; of a .parquet file or a hub data set the number of the row."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


# --- formats ----------------------------------------------------------------------------------------------------


def alpaca(row: dict[str, Any]) -> Conversation:
    """``instruction``, ``input``, ``output``, optional ``system`` and ``history`` ([[question, answer], …]).

    Instruction and input are joined by a newline, as in LLaMA-Factory.
    """
    messages: Conversation = []
    system = _text(row, "system", optional=True)
    if system:
        messages.append({"role": "system", "content": system})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadRowError(f"history is {_kind(history)}; accepted: a list of [question, answer] pairs")
    for number, pair in enumerate(history):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRowError(f"history[{number}] is {_shown(pair)}; accepted: [question, answer], two texts")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = [part for part in (_text(row, "instruction"), _text(row, "input", optional=True)) if part]
    if not asked:
        raise BadRowError("instruction is empty; accepted: a text")
    answer = _text(row, "output")
    if not answer:
        raise BadRowError("output is empty, there is nothing to learn; accepted: a text")
    return [*messages, {"role": "user", "content": "\n".join(asked)}, {"role": "assistant", "content": answer}]


def messages(row: dict[str, Any]) -> Conversation:
    """``messages``: a list of ``role`` and ``content``, as OpenAI's; content is a text or a list of text parts.

    ``weight: 0`` on an assistant's message keeps it out of the loss. Messages after the last answer are dropped.
    """
    given = row.get("messages")
    if not isinstance(given, list) or not given:
        raise BadRowError(f"messages is {_shown(given)}; accepted: a list of {{role, content}}")
    result: Conversation = []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise BadRowError(f"{where} is {_kind(message)}; accepted: an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise BadRowError(f"{where}.role is {_shown(role)}; accepted: {', '.join(ROLES)}")
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
    return result


FORMATS: dict[str, Callable[[dict[str, Any]], Conversation]] = {"alpaca": alpaca, "messages": messages}


def _text(row: dict[str, Any], field: str, optional: bool = False) -> str:
    if row.get(field) is None:
        if optional:
            return ""
        raise BadRowError(f"{field} is missing; accepted: a text (the row has {', '.join(sorted(row)) or 'no fields'})")
    if not isinstance(row[field], str):
        raise BadRowError(f"{field} is {_kind(row[field])}; accepted: a text")
    return str(row[field])


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise BadRowError(
        f'{where}.content is {_shown(content)}; accepted: a text, or a list of {{"type": "text", "text": …}}'
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "missing"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, dict | list) and len(repr(value)) > 60):
        return _kind(value)
    return repr(value)[:60]


# --- files ------------------------------------------------------------------------------------------------------


def read_rows(path: Path, split: str = "") -> Iterator[tuple[Place, dict[str, Any]]]:
    """Every row of a file, or of all data files of a folder in the order of their names.

    ``split``: the folder is a hub data set, read by the rules of ``datasets`` (its README says which file belongs
    to which split). Yields in constant memory, but for .json. RunError(INVALID_DATA) at the first line that cannot
    be read at all.
    """
    if path.is_dir():
        if split:
            yield from _read_split(path, split)
            return
        for file in sorted(path.rglob("*")):
            if file.suffix in DATA_SUFFIXES and not hidden(file, path):
                yield from read_rows(file)
        return
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".json" and _starts_with_bracket(path):
        yield from _read_array(path)
    elif path.suffix in DATA_SUFFIXES:
        yield from _read_lines(path)
    else:
        raise RunError(
            Cause.INVALID_DATA, f"{path.name} is no data file; accepted: names that end in {', '.join(DATA_SUFFIXES)}"
        )


def _read_lines(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = Place(path.name, number)
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise _unreadable(place, f"not UTF-8 ({error.reason} at byte {error.start})") from error
            except ValueError as error:
                raise _unreadable(place, f"not JSON ({error})") from error
            yield place, _an_object(row, place)


def _read_array(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    """A .json file that holds one list. Elements are decoded one by one, so that each has its line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(Place(path.name, 1), f"not UTF-8 ({error.reason} at byte {error.start})") from error
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        place = Place(path.name, line)
        if position >= len(text):
            raise _unreadable(place, "the list is not closed by ]")
        if text[position] == "]":
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise _unreadable(place, f"not JSON ({error})") from error
        yield place, _an_object(row, place)


def _read_parquet(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield Place(path.name, number), row
    except (OSError, ValueError) as error:
        raise _unreadable(Place(path.name, number + 1), f"not a parquet file ({error})") from error


def _read_split(folder: Path, split: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(str(folder), split=split, streaming=True)
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"split {split!r} of the data set cannot be read: {str(error).splitlines()[0]} Set data.….split, or name "
            "one file: hf://datasets/ORG/NAME/PATH",
        ) from error
    for number, row in enumerate(rows, 1):
        yield Place(f"split {split}", number), row


def _starts_with_bracket(path: Path) -> bool:
    """Some publish JSON lines under the name .json."""
    with path.open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


def _an_object(row: Any, place: Place) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise _unreadable(place, f"the row is {_kind(row)}; accepted: an object {{…}}")
    return row


def _unreadable(place: Place, what: str) -> RunError:
    return RunError(Cause.INVALID_DATA, f"{place}: {what}. Correct the file; nothing was trained.")
