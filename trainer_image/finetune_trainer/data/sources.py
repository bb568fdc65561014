"""From a source of the configuration to records: its files, its format, its columns, and its bad rows.

Called by ``data/__init__.py`` and ``preview.py``.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_api.spec import DataSource
from finetune_trainer.data.fields import Row
from finetune_trainer.data.files import Place, Rows, TextUnit, head, read_rows
from finetune_trainer.data.formats import TABLE
from finetune_trainer.data.recognise import SAMPLE, UnknownFormatError, recognise, recognise_text
from finetune_trainer.data.records import KIND_NAMES, BadRowError, Prompt, accepts, as_kind
from finetune_trainer.fetching.wanted import data_kind, local_files
from finetune_trainer.outcome import RunError

log = logging.getLogger(__name__)

TASK = "task"
"""The column that says which task a row belongs to, for methods that have some."""
_SHOWN = 5  # bad rows named in one message
_TRANSCRIPTS = ("chatml", "chatglm", "claude", "guanaco")


class BadRows:
    """The rows of a source that are not as its format says: counted, the first ones named, endured up to a limit."""

    def __init__(self, uri: str, limit: int) -> None:
        self._uri, self._limit = uri, limit
        self.count = 0
        self.named: list[str] = []
        self.format = ""

    @property
    def endured(self) -> bool:
        """So far."""
        return self.count <= self._limit

    def add(self, place: Place, error: BadRowError) -> None:
        """One more. RunError(INVALID_DATA) beyond the limit, as soon as there are several to name."""
        self.count += 1
        if len(self.named) < _SHOWN:
            self.named.append(f"{place}: {error}")
        if not self.endured and self.count >= _SHOWN:
            raise self._error(" (and perhaps more)")

    def close(self) -> None:
        """All rows are read. RunError(INVALID_DATA) where too many are bad."""
        if not self.endured:
            raise self._error("")
        if self.count:
            log.warning("%s: %d bad rows are left out: %s", self._uri, self.count, "; ".join(self.named))

    def _error(self, more: str) -> RunError:
        allowed = f", and data.max_bad_rows is {self._limit}" if self._limit else ""
        named = "; ".join(self.named)
        rows = "1 row is" if self.count == 1 else f"{self.count} rows are"
        limit = "data.max_bad_rows" + (f": {self.count}" if not more else "")
        return RunError(
            Cause.INVALID_DATA,
            f"{self._uri}: {rows} not in the format {self.format!r}{more}{allowed}: {named}. Correct them, or leave "
            f"them out by {limit}.",
        )


def records(
    source: DataSource, path: Path, wanted: type, bad: BadRows, counts: dict[str, Any]
) -> Iterator[tuple[Place, Row, Any]]:
    """Every record of a source with its place and its row, as records of the kind ``wanted``.

    Counts rows and unused (rows that decide or teach nothing), and names the columns that nobody reads (unread).
    RunError: INVALID_CONFIGURATION where the format is not known, or gives nothing the stage learns from.
    """
    chosen, rows = _opened(source, path, wanted)
    counts["format"] = bad.format = chosen
    columns = {TASK, *((*TABLE[chosen].needs, *TABLE[chosen].knows) if chosen in TABLE else ())}
    unread: set[str] = set()
    counts["unread"] = []
    for place, row in rows:
        counts["rows"] += 1
        try:
            if isinstance(row, BadRowError):
                raise row
            if wanted is not Prompt and (more := row.keys() - columns - unread):
                unread |= more  # reward functions get every column of a prompt
                counts["unread"] = sorted(map(str, unread))
            made = [turned for record in TABLE[chosen].convert(row) for turned in as_kind(record, wanted)]
        except BadRowError as error:
            bad.add(place, error)
            continue
        counts["unused"] += not made
        for record in made:
            yield place, row, record


def _opened(source: DataSource, path: Path, wanted: type) -> tuple[str, Rows]:
    """The format's name and the rows, their columns renamed."""
    chosen: str = source.format
    rename = _renaming(source.columns)
    files = [] if path.is_dir() and source.uri.startswith("hf://") else local_files(path)
    text = bool(files) and data_kind(files[0].name) == ".txt"
    try:
        if text and chosen == "auto":
            chosen = recognise_text(head(path), wanted)
        rows = rename(
            read_rows(path, source.split if source.uri.startswith("hf://") else "", _unit(chosen, source.sample_by))
        )
        if chosen == "auto":
            sample = list(islice(rows, SAMPLE))
            if not sample:
                return "auto", rows
            rows = chain(sample, rows)
            readable = [row for _, row in sample if not isinstance(row, BadRowError)]
            if not readable and sample:
                place, error = sample[0]
                raise UnknownFormatError(f"its rows cannot be read ({place}: {error})")
            chosen = recognise(readable, wanted)
    except UnknownFormatError as error:
        raise RunError(Cause.INVALID_DATA, f"{source.uri}: {error}") from error
    if source.format == "auto":
        log.info("%s: format %s", source.uri, chosen)
    if not accepts(TABLE[chosen].kind, wanted):
        fitting = ", ".join(name for name, entry in TABLE.items() if accepts(entry.kind, wanted))
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{source.uri} is in the format {chosen}, which gives {KIND_NAMES[TABLE[chosen].kind]}; this stage learns "
            f"from {KIND_NAMES[wanted]}. Formats that give them: {fitting}.",
        )
    return chosen, rows


def _renaming(columns: dict[str, str]) -> Callable[[Rows], Rows]:
    if not columns:
        return lambda rows: rows

    def renamed(row: Row | BadRowError) -> Row | BadRowError:
        if isinstance(row, BadRowError):
            return row
        kept = {name: value for name, value in row.items() if name not in columns}
        return kept | {columns[name]: row[name] for name in columns if name in row}

    return lambda rows: ((place, renamed(row)) for place, row in rows)


def _unit(chosen: str, sample_by: TextUnit) -> TextUnit:
    """What of a .txt file is one row."""
    if chosen == "conll":
        return "conll"
    return "document" if chosen in _TRANSCRIPTS else sample_by
