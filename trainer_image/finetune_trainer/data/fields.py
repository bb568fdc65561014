"""A field of a row as what it must be, or a BadRowError that says what is accepted. Called by the converters."""

import json
from typing import Any

from finetune_trainer.data.records import BadRowError

Row = dict[str, Any]


class Cell(str):
    """The text of a table's cell (.csv, .tsv), which can hold a list or an object only as JSON."""

    __slots__ = ()


def text(row: Row, field: str, optional: bool = False) -> str:
    """The text in a field; "" where an optional one is missing."""
    if row.get(field) is None:
        if optional:
            return ""
        raise missing(row, field, "a text")
    if not isinstance(row[field], str):
        raise BadRowError(f"{field} is {kind(row[field])}; accepted: a text")
    return str(row[field])


def filled(row: Row, field: str) -> str:
    """The text in a field, which must not be empty."""
    found = text(row, field)
    if not found.strip():
        raise BadRowError(f"{field} is empty; accepted: a text")
    return found


def answer(row: Row, field: str) -> str:
    """The text in a field that is to be learned."""
    found = text(row, field)
    if not found.strip():
        raise BadRowError(f"{field} is empty, there is nothing to learn; accepted: a text")
    return found


def items(row: Row, field: str, accepted: str) -> list[Any]:
    """The list in a field, or its JSON (of a table's cell); not empty."""
    found = decoded(row.get(field))
    if found is None:
        raise missing(row, field, accepted)
    if not isinstance(found, list) or not found:
        raise BadRowError(f"{field} is {shown(found)}; accepted: {accepted}")
    return found


def number(row: Row, field: str) -> float:
    """The number in a field, also where it is written as text (of a table's cell)."""
    found = row.get(field)
    if found is None:
        raise missing(row, field, "a number")
    try:
        if not isinstance(found, str | int | float) or isinstance(found, bool):
            raise ValueError
        value = float(found)
    except (ValueError, OverflowError) as error:
        raise BadRowError(f"{field} is {shown(found)}; accepted: a number") from error
    if value != value:
        raise BadRowError(f"{field} is not a number; accepted: a number")
    return value


def truth(row: Row, field: str) -> bool:
    """true or false, also as 1 and 0 or as text (of a table's cell)."""
    found = row.get(field)
    if found is None:
        raise missing(row, field, "true or false")
    if isinstance(found, bool):
        return found
    said = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    value = said.get(str(found).strip().lower()) if isinstance(found, str | int | float) else None
    if value is None:
        raise BadRowError(f"{field} is {shown(found)}; accepted: true or false")
    return value


def decoded(value: Any) -> Any:
    """A list or an object that was written as JSON text; everything else as it is. For fields that never hold a text.

    BadRowError where the JSON holds half a character.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return whole_characters(value, found)
    return value


def of_cell(value: Any) -> Any:
    """The same for fields that may hold a text, which may itself be JSON: only a table's cell is decoded."""
    return decoded(value) if isinstance(value, Cell) else value


def whole_characters(written: str, value: Any) -> Any:
    """``value``, which was read from the JSON text ``written``. BadRowError where an escape in it stands for half a
    character (a lone surrogate, U+D800 to U+DFFF): JSON allows that, but it is no text and cannot be tokenised."""
    if "\\ud" in written or "\\uD" in written:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise BadRowError(
                f"it holds {half}, half a character (a surrogate without its other half); accepted: whole characters, "
                "in UTF-8 or as a pair of escapes"
            ) from None
    return value


def missing(row: Row, field: str, accepted: str) -> BadRowError:
    """The complaint about a field that is not there."""
    names = sorted(map(str, row))
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return BadRowError(f"{field} is missing; accepted: {accepted} (the row has {listed or 'no fields'})")


def kind(value: Any) -> str:
    """What a value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "missing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def shown(value: Any) -> str:
    """A value for a message: itself where it is short, else what it is."""
    if value is None or (isinstance(value, dict | list) and len(repr(value)) > 60):
        return kind(value)
    return repr(value)[:60]
