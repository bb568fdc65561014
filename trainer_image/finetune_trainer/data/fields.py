"""A field of a row as what it must be, or a BadRowError that says what is accepted. Called by the converters."""

from typing import Any

from finetune_trainer.data.records import BadRowError


def text(row: dict[str, Any], field: str, optional: bool = False) -> str:
    """The text in a field; "" where an optional one is missing."""
    if row.get(field) is None:
        if optional:
            return ""
        listed = ", ".join(sorted(map(str, row))) or "no fields"
        raise BadRowError(f"{field} is missing; accepted: a text (the row has {listed})")
    if not isinstance(row[field], str):
        raise BadRowError(f"{field} is {kind(row[field])}; accepted: a text")
    return str(row[field])


def filled(row: dict[str, Any], field: str) -> str:
    """The text in a field, which must not be empty."""
    found = text(row, field)
    if not found.strip():
        raise BadRowError(f"{field} is empty; accepted: a text")
    return found


def answer(row: dict[str, Any], field: str) -> str:
    """The text in a field that is to be learned."""
    found = text(row, field)
    if not found.strip():
        raise BadRowError(f"{field} is empty, there is nothing to learn; accepted: a text")
    return found


def kind(value: Any) -> str:
    """What a value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "missing"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value for a message: itself where it is short, else what it is."""
    if value is None or (isinstance(value, dict | list) and len(repr(value)) > 60):
        return kind(value)
    return repr(value)[:60]
