"""``format: auto``: which format rows are written in, told by their columns and what stands in them.

Called by ``sources.py``.
"""

from collections.abc import Sequence

from finetune_trainer.data.fields import Row
from finetune_trainer.data.formats import TABLE, Format
from finetune_trainer.data.records import BadRowError, accepts

SAMPLE = 100
"""Rows that are looked at."""

_TRANSCRIPTS = tuple(name for name, entry in TABLE.items() if entry.needs == ("text",) and name != "text")
_FALLBACKS = ("text", "prompt", *_TRANSCRIPTS)
"""Of columns that many data sets have beside what they are about."""


class UnknownFormatError(Exception):
    """The rows are of no known format, or could be of several. The text says which, and the remedy."""


def recognise(rows: Sequence[Row], wanted: type) -> str:
    """The format of most of ``rows``; of several that fit, the one that gives what the stage learns from.

    ``wanted``: kind of the stage's records. UnknownFormatError where none or more than one is left.
    """
    votes = {name: sum(_fits(entry, row) for row in rows) for name, entry in TABLE.items()}
    fitting = [name for name, count in votes.items() if 2 * count > len(rows)]
    fitting = [name for name in fitting if accepts(TABLE[name].kind, wanted)] or fitting
    # What needs the columns of another format and more is the better word for a row that has them all.
    fitting = [
        name for name in fitting if not any(set(TABLE[name].needs) < set(TABLE[other].needs) for other in fitting)
    ]
    if any(name in _TRANSCRIPTS for name in fitting):
        fitting = [name for name in fitting if name != "text"]
    fitting = [name for name in fitting if TABLE[name].kind is wanted] or fitting
    fitting = [name for name in fitting if name not in _FALLBACKS] or fitting
    if len(fitting) == 1:
        return fitting[0]
    columns = ", ".join(sorted({str(column) for row in rows for column in row})[:20]) or "none"
    if fitting:
        raise UnknownFormatError(
            f"the rows (columns {columns}) could be read as {' or as '.join(fitting)}. Set format to one of them."
        )
    serving = {name: entry for name, entry in TABLE.items() if accepts(entry.kind, wanted)}
    listed = "; ".join(f"{name} ({', '.join(entry.needs)})" for name, entry in serving.items())
    raise UnknownFormatError(
        f"the rows (columns {columns}) are in no format that is known. Set format, and columns where they have other "
        f"names, e.g. {{question: instruction, reply: output}} (finetune evaluate: --column question=instruction). "
        f"Formats for this stage and the columns they need: {listed}."
    )


def recognise_text(beginning: str, wanted: type) -> str:
    """The format of a .txt file, told by how it begins."""
    lines = [line.split() for line in beginning.splitlines()[:-1] if line.strip() and not line.startswith("-DOCSTART-")]
    tagged = [parts for parts in lines if len(parts) > 1 and (parts[-1] == "O" or parts[-1][:2] in ("B-", "I-"))]
    if lines and len(tagged) == len(lines):
        return "conll"
    return recognise([{"text": beginning}], wanted)


def _fits(entry: Format, row: Row) -> bool:
    if any(row.get(column) is None for column in entry.needs):
        return False
    try:
        return entry.telling is None or entry.telling(row)
    except BadRowError:
        return False
