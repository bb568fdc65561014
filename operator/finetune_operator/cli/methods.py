"""What ``finetune methods`` prints: docs/methods.md for a terminal."""

import difflib
from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from finetune_api import method_pages
from finetune_api.compatibility import COMPATIBILITY
from finetune_operator.cli.files import RefusedError


def table() -> tuple[Table, list[str]]:
    """Every method, its size and what it goes with; and the reasons of refusals, by their numbers."""
    found = Table(box=None, pad_edge=False)
    for title in method_pages.HEAD:
        found.add_column(title.upper(), no_wrap=True)
    notes = method_pages.footnotes()
    for method in COMPATIBILITY:
        found.add_row(*(escape(cell) for cell in method_pages.cells(method, notes)))
    return found, [f"[{number}] {reason}" for reason, number in notes.items()]


def page(name: str) -> Iterator[tuple[str, int]]:
    """Texts on one method and how far each is indented. RefusedError where there is no such method."""
    if name not in COMPATIBILITY:
        near = difflib.get_close_matches(name, COMPATIBILITY, n=1)
        hint = f" Do you mean {near[0]}?" if near else ""
        raise RefusedError([f"{name}: no method has this name; accepted: {', '.join(COMPATIBILITY)}.{hint}"])
    told = method_pages.lines(name)
    for heading in ("What", "When", "Paper", "Limits"):
        yield f"{heading + ':':<8}{told[heading]}", 8
    parameters = method_pages.parameters(name)
    yield "Parameters of spec.method:" if parameters else "It has no parameters.", 0
    for key, accepted, default, meaning in parameters:
        yield f"  {key} ({accepted}; default {default})", 6
        yield f"      {meaning}", 6
