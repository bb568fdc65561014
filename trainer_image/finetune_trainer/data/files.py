"""From files to rows: which lines and which numbers of a file a row stands in, and what cannot be read at all.

Called by ``data/__init__.py``.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_trainer.data.fields import kind
from finetune_trainer.fetch import DATA_SUFFIXES, hidden
from finetune_trainer.outcome import RunError


@dataclass(frozen=True)
class Place:
    """Where a row stands, for messages."""

    file: str
    line: int
    """From 1; of a .parquet file or a hub data set the number of the row."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


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
        raise _unreadable(place, f"the row is {kind(row)}; accepted: an object {{…}}")
    return row


def _unreadable(place: Place, what: str) -> RunError:
    return RunError(Cause.INVALID_DATA, f"{place}: {what}. Correct the file; nothing was trained.")
