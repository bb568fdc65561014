"""What a classifier can say: the names of its labels, in the order of its outputs. Pure.

The names are listed in the spec or found in the training rows and sorted, so that every attempt and every process
agrees. Called by ``data/`` (which finds them and makes numbers of labels) and ``model.py`` (which writes them into the
model's configuration).
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.causes import Cause
from finetune_trainer.data.records import BadRowError
from finetune_trainer.outcome import RunError

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
"""transformers' ``problem_type``."""
TAGS = ""
"""One label per word: transformers has no name for it."""
MANY = 64
"""More labels than this, and nearly one for every other row, are no labels."""


@dataclass(frozen=True)
class Labels:
    """The labels of a run."""

    names: tuple[str, ...]
    """K of them; of a regression one, which names the number."""
    problem_type: str

    def number(self, label: Any) -> int | float | list[int]:
        """A row's label as the objective takes it: the label's place; K times 0 or 1; the number itself.

        BadRowError where it is none of the run's.
        """
        if self.problem_type == REGRESSION:
            value = _float(label)
            if value is None or not math.isfinite(value):
                raise BadRowError(f"label is {label!r}; accepted: a number, as problem_type is regression")
            return value
        if self.problem_type == MULTI:
            given = label if isinstance(label, list) else [label]
            places = {self._place(one) for one in given}
            return [int(place in places) for place in range(len(self.names))]
        if isinstance(label, list):
            raise BadRowError(
                f"label is the list {label!r}; accepted: one label, as problem_type is {SINGLE}; lists are for {MULTI}"
            )
        return self._place(label)

    def _place(self, label: Any) -> int:
        name = name_of(label)
        if name not in self.names:
            known = ", ".join(self.names[:20]) + (" …" if len(self.names) > 20 else "")
            raise BadRowError(f"label is {name!r}; accepted: one of {known}")
        return self.names.index(name)


def name_of(label: Any) -> str:
    """The name of a label that may be written as a number or a truth value."""
    if label is None or isinstance(label, dict | list):
        raise BadRowError(f"label is {label!r}; accepted: a text or a number")
    if isinstance(label, bool | np.bool_):
        return str(bool(label)).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip()


def _float(label: Any) -> float | None:
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def of_rows(labels: Iterable[Any], listed: list[str], problem_type: str, published: Path) -> Labels:
    """The labels of a run by its training rows' ``labels``, as far as the spec does not list them.

    ``problem_type``: transformers', or ``auto``: lists are several labels, numbers with a fraction a regression.
    ``published``: the folder of the model. Where it already knows labels of the same names, their order is kept: what
    it has learned stays right. RunError(INVALID_CONFIGURATION) where the rows do not say what is to be learned.
    """
    found: set[str] = set()
    rows, lists, fractions, numbers = 0, False, False, True
    if problem_type != REGRESSION and not (listed and problem_type != "auto"):
        for label in labels:
            rows += 1
            lists |= isinstance(label, list)
            for one in label if isinstance(label, list) else [label]:
                value = _float(one)
                numbers &= value is not None
                fractions |= value is not None and not float(value).is_integer()
                found.add(name_of(one))
    if problem_type == "auto":
        problem_type = MULTI if lists else REGRESSION if fractions and numbers and not listed else SINGLE
    if problem_type == REGRESSION:
        return Labels(("score",), REGRESSION)
    if not listed and len(found) > max(MANY, rows / 2):
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"the {rows} training rows have {len(found)} different labels, such as {', '.join(sorted(found)[:5])}. "
            "Accepted: labels that come more than once. Set spec.sequence_classification.problem_type: regression "
            "where they are numbers, or list the labels in spec.sequence_classification.labels.",
        )
    return named(listed, found, problem_type, published)


def named(listed: list[str], found: set[str], problem_type: str, published: Path) -> Labels:
    """The labels ``listed``, else those ``found``, sorted. RunError(INVALID_CONFIGURATION) for fewer than two."""
    names = tuple(listed or _sorted(found))
    if len(names) < (1 if problem_type == MULTI else 2):
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"the training rows have {'no label' if not names else f'one label only, {names[0]!r}'}: there is nothing "
            "to tell apart. Add rows with other labels.",
        )
    before = _published(published)
    return Labels(before if not listed and set(before) == set(names) else names, problem_type)


def _sorted(names: set[str]) -> list[str]:
    """Numbers by value, texts by their letters."""
    whole = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), "") if whole else (0, name))


def _published(folder: Path) -> tuple[str, ...]:
    try:
        named_labels = json.loads((folder / "config.json").read_text())["id2label"]
        return tuple(str(named_labels[str(place)]) for place in range(len(named_labels)))
    except (OSError, ValueError, KeyError, TypeError):
        return ()
