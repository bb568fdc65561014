"""From files to rows: which file and line a row stands in, and what cannot be read at all.

Every kind is read in constant memory. A row that alone cannot be read is given as a BadRowError in its place; a file
that cannot be read on is a RunError(INVALID_DATA). Called by ``sources.py``.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from finetune_api.causes import Cause
from finetune_trainer.data.fields import Cell, kind, whole_characters
from finetune_trainer.data.records import BadRowError
from finetune_trainer.fetching.wanted import DATA_KINDS, data_kind, local_files
from finetune_trainer.outcome import RunError

TextUnit = Literal["line", "paragraph", "document", "conll"]
"""What of a .txt file is one row; conll: a sentence of lines of columns, the word first and its tag last."""

Row = dict[str, Any]

_PIECE = 2**20  # bytes read at once
_LARGEST = 2**28  # bytes of one element of a .json list, or of one text
_BATCH = 1000  # rows of a column file decoded at once


@dataclass(frozen=True)
class Place:
    """Where a row stands, for messages."""

    file: str
    line: int
    """From 1; of column files (.parquet, .arrow) and hub data sets the number of the row."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Rows = Iterator[tuple[Place, Row | BadRowError]]


def read_rows(path: Path, split: str = "", unit: TextUnit = "line") -> Rows:
    """Every row of a file, of all data files of a folder in the order of their names, or of those a pattern names.

    ``split``: a folder is a hub data set, read by the rules of ``datasets`` (its README says which file belongs
    to which split).
    """
    if split and path.is_dir():
        yield from _read_split(path, split)
        return
    files = local_files(path)
    for file in files:
        # Files of one name in several folders are told apart.
        name = file.name if len(files) == 1 or path.is_file() else _below(file, path)
        yield from _read_file(file, name, unit)


def _read_file(path: Path, name: str, unit: TextUnit) -> Rows:
    reading = _READERS.get(data_kind(path.name))
    if reading is None:
        raise RunError(
            Cause.INVALID_DATA,
            f"{path.name} is no data file; accepted: names that end in {', '.join(DATA_KINDS)}, "
            "all but .parquet and .arrow also compressed (.gz, .bz2, .xz, .zst)",
        )
    with _damage(name):
        yield from reading(path, name) if reading is not _read_text else _read_text(path, name, unit)


def head(path: Path, size: int = 2**16) -> str:
    """The beginning of the first file's text, to tell what it is."""
    files = local_files(path)
    with _damage(path.name), _opened(files[0]) as file:
        return file.read(size).decode("utf-8-sig", errors="ignore")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked."""
    packed: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    if path.suffix in packed:
        with packed[path.suffix](path, "rb") as file:
            yield file
    elif path.suffix == ".zst":
        import pyarrow

        with pyarrow.OSFile(str(path)) as raw, pyarrow.CompressedInputStream(raw, "zstd") as unpacked:
            yield io.BufferedReader(unpacked, _PIECE)
    else:
        with path.open("rb") as file:
            yield file


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """What the libraries raise while they read a damaged file, as one error."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise RunError(
            Cause.INVALID_DATA,
            f"{name} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}): it is "
            "damaged, or not what its name says. Nothing was trained.",
        ) from error


# --- lines ------------------------------------------------------------------------------------------------------


def _read_lines(path: Path, name: str) -> Rows:
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            place = Place(name, number)
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = whole_characters(text, json.loads(text))
            except BadRowError as error:
                yield place, error
            except UnicodeDecodeError as error:
                yield place, BadRowError(f"not UTF-8 ({error.reason} at byte {error.start})")
            except (ValueError, RecursionError) as error:
                yield place, BadRowError(f"not JSON ({error})")
            else:
                yield place, _an_object(row)


def _read_json(path: Path, name: str) -> Rows:
    """A .json file: one list; some publish JSON lines under that name."""
    with _opened(path) as file:
        begins = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    yield from _read_array(path, name) if begins == b"[" else _read_lines(path, name)


def _read_array(path: Path, name: str) -> Rows:
    """One list, its elements decoded one by one, so that each has its line and none but it is in memory."""
    decoder = json.JSONDecoder()
    with _opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
        text, position, line, counted, ended = "", 0, 1, 0, False
        opened = False

        def more() -> None:
            nonlocal text, position, line, counted, ended
            line += text.count("\n", counted, position)
            piece = file.read(max(_PIECE, len(text) - position))  # twice as much as was not enough
            text, position, counted, ended = text[position:] + piece, 0, 0, not piece

        while True:
            while position >= len(text) and not ended:
                more()
            while position < len(text) and text[position] in (" \t\r\n," if opened else " \t\r\n"):
                position += 1
            if position >= len(text) and not ended:
                continue
            line += text.count("\n", counted, position)
            counted = position
            place = Place(name, line)
            if position >= len(text):
                raise _unreadable(place, "the list is not closed by ]")
            if not opened:
                opened, position = True, position + 1
                continue
            if text[position] == "]":
                return
            begun = position
            try:
                row, position = decoder.raw_decode(text, position)
            except RecursionError as error:
                raise _unreadable(place, "not JSON (nested too deeply)") from error
            except ValueError as error:
                if ended or len(text) - position > _LARGEST:
                    raise _unreadable(place, f"not JSON ({error.args[0].rpartition(': line')[0]})") from error
                more()
            else:
                try:
                    yield place, _an_object(whole_characters(text[begun:position], row))
                except BadRowError as error:
                    yield place, error


# --- tables -----------------------------------------------------------------------------------------------------


def _read_csv(path: Path, name: str) -> Rows:
    yield from _read_table(path, name, csv.reader)


def _read_tsv(path: Path, name: str) -> Rows:
    """A row is a line: as IANA has it, a tab is never part of a cell, and a quotation mark is one."""
    yield from _read_table(
        path, name, lambda lines: csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
    )


def _read_table(path: Path, name: str, reader: Callable[[Any], Any]) -> Rows:
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        rows = reader(file)
        header: list[str] = []
        while True:
            place = Place(name, rows.line_num + 1)
            try:
                cells = next(rows)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                raise _unreadable(place, str(error)) from error
            if not any(cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                repeated = sorted({cell for cell in header if header.count(cell) > 1})
                if repeated:
                    raise _unreadable(place, f"the first row, which names the columns, repeats {', '.join(repeated)}")
            elif len(cells) != len(header):
                yield place, BadRowError(f"{len(cells)} cells; accepted: {len(header)}, as the first row names columns")
            else:
                yield place, dict(zip(header, map(Cell, cells), strict=True))


def _read_parquet(path: Path, name: str) -> Rows:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        yield from _batches(name, file.schema_arrow, file.iter_batches(batch_size=_BATCH))


def _read_arrow(path: Path, name: str) -> Rows:
    """Arrow's file format, or its stream, which ``datasets`` writes."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = batches = pyarrow.ipc.open_stream(source)
        yield from _batches(name, reader.schema, batches)


def _batches(name: str, schema: Any, batches: Any) -> Rows:
    names = _class_names(_features(schema))
    nested = [field.name for field in schema if field.type.num_fields]
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            for row in batch.slice(start, _BATCH).to_pylist():
                number += 1
                for column in nested:
                    row[column] = _unpadded(row[column])
                yield Place(name, number), _named(row, names)


def _read_split(folder: Path, split: str) -> Rows:
    import datasets

    try:
        rows = datasets.load_dataset(str(folder), split=split, streaming=True)
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"split {split!r} of the data set cannot be read: {str(error).splitlines()[0]} Set data.….split, or name "
            "one file: hf://datasets/ORG/NAME/PATH",
        ) from error
    names = _class_names(rows.features.to_dict() if rows.features else {})
    for number, row in enumerate(rows, 1):
        yield Place(f"split {split}", number), _named({key: _unpadded(value) for key, value in row.items()}, names)


def _unpadded(value: Any) -> Any:
    """Without the empty fields of objects. A column gives every object the fields of all: those without a value are
    not this one's."""
    if isinstance(value, dict):
        return {key: _unpadded(one) for key, one in value.items() if one is not None}
    return [_unpadded(one) for one in value] if isinstance(value, list) else value


def _features(schema: Any) -> dict[str, Any]:
    """What ``datasets`` wrote of its columns into the file."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the classes, by column, where numbers stand for them."""
    found = {}
    for column, feature in features.items():
        while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        if isinstance(feature, list) and feature:
            feature = feature[0]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            found[column] = feature["names"]
    return found


def _named(row: Row, names: dict[str, list[str]]) -> Row:
    for column, classes in names.items():
        row[column] = _class_of(row.get(column), classes)
    return row


def _class_of(value: Any, classes: list[str]) -> Any:
    if isinstance(value, list):
        return [_class_of(one, classes) for one in value]
    if isinstance(value, int):
        return classes[value] if 0 <= value < len(classes) else None  # -1: not labelled
    return value


# --- running text -----------------------------------------------------------------------------------------------


def _read_text(path: Path, name: str, unit: TextUnit) -> Rows:
    with _opened(path) as file:
        if unit == "document":
            content = file.read(_LARGEST + 1)
            if len(content) > _LARGEST:
                raise _unreadable(Place(name, 1), f"larger than {_LARGEST >> 20} MiB; set sample_by: line or paragraph")
            yield from _text_row(Place(name, 1), [content])
            return
        gathered: list[bytes] = []
        begun = 1
        for number, raw in enumerate(file, 1):
            blank = not raw.strip()
            if unit == "line":
                if not blank:
                    yield from _text_row(Place(name, number), [raw])
                continue
            if blank and gathered:
                yield from _gathered(Place(name, begun), gathered, unit)
                gathered = []
            elif not blank:
                begun = begun if gathered else number
                gathered.append(raw)
        if gathered:
            yield from _gathered(Place(name, begun), gathered, unit)


def _gathered(place: Place, lines: list[bytes], unit: TextUnit) -> Rows:
    if unit == "paragraph":
        yield from _text_row(place, lines)
        return
    for _, row in _text_row(place, lines):
        if isinstance(row, BadRowError):
            yield place, row
            return
        columns = [line.split() for line in row["text"].splitlines() if not line.startswith(("-DOCSTART-", "# "))]
        short = next((number for number, parts in enumerate(columns) if len(parts) < 2), None)
        if short is not None:
            yield place, BadRowError(f"its line {short + 1} has one column; accepted: the word first and its tag last")
        elif columns:
            yield place, {"tokens": [parts[0] for parts in columns], "tags": [parts[-1] for parts in columns]}


def _text_row(place: Place, raw: list[bytes]) -> Rows:
    try:
        text = b"".join(raw).decode("utf-8-sig" if place.line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        yield place, BadRowError(f"not UTF-8 ({error.reason} at byte {error.start})")
    else:
        yield place, {"text": text.strip("\r\n")}


_READERS: dict[str, Callable[..., Rows]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}


def _below(file: Path, path: Path) -> str:
    """The file's name below the folder or the pattern's fixed part."""
    for parent in (path, *path.parents):
        if file.is_relative_to(parent):
            return str(file.relative_to(parent))
    return file.name


def _an_object(row: Any) -> Row | BadRowError:
    return row if isinstance(row, dict) else BadRowError(f"the row is {kind(row)}; accepted: an object {{…}}")


def _unreadable(place: Place, what: str) -> RunError:
    return RunError(Cause.INVALID_DATA, f"{place}: {what}. Correct the file; nothing was trained.")
