"""What spans several fields of a spec: one row per rule.

A row is written once and judged twice: its CEL expression by the API server at admission, its Python predicate
by ``mistakes.read`` (the operator's condition, and ``finetune run``). In both, ``self`` is the value at ``at``,
and both say the same words. A row without CEL is about something CEL cannot see (DeepSpeed's own keys, the pod
template, target_modules): only the condition tells it. Rows hang as low in the schema as they can, because the
API server does not judge an unchanged part of an object again: a rule that a new version adds never makes
status updates of older objects fail.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.schema import METHOD_PARAMETERS


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that must hold."""

    at: str
    """The part of the object both predicates get as ``self``: "", "spec", "spec.data.train[]" …"""
    field: str
    """The field the user must change, from ``at``; empty: ``at`` itself."""
    holds: Callable[[Any], bool] | None
    """Python's predicate. None: pydantic's own validation says it (kept here for the CEL)."""
    cel: str | None
    """CEL's predicate. None: only the condition can judge it."""
    accepted: str
    remedy: str
    value: Callable[[Any], Any] | None = None
    """What to show as the value, where it is not the field's own (condition-only rows)."""


def _parameters_of_methods() -> list[Rule]:
    owners: dict[str, list[str]] = {}
    for method, names in METHOD_PARAMETERS.items():
        for name in names:
            owners.setdefault(name, []).append(method)
    return [
        Rule(
            at="spec.method",
            field=name,
            holds=None,
            cel=None
            if name in INVISIBLE
            else f"!has(self.{name}) || self.type in [{', '.join(repr(m) for m in methods)}]",
            accepted=f"a parameter of the method; {name} is one of {', '.join(methods)}",
            remedy=f"remove it, or set spec.method.type to {' or '.join(methods)}",
        )
        for name, methods in owners.items()
    ]


INVISIBLE = ("target_modules",)
"""Parameters of several types: no structural schema, so CEL cannot see them."""

RULES: tuple[Rule, ...] = (*_parameters_of_methods(),)


NEW_JOB = (
    "make a new FineTuneJob for another run; with spec.model.uri: job://NAME it starts from the output of this one"
)
IMMUTABLE: tuple[str, ...] = (
    "spec.stage",
    "spec.model",
    "spec.method",
    "spec.data",
    "spec.training",
    "spec.evaluation",
    "spec.deepspeed",
    "spec.checkpoint.uri",
    "spec.checkpoint.resume",
    "spec.output",
)
"""What changes the result of a run, or where it lies: fixed once ``status.startTime`` is set.
What steers a run stays free: suspend, ttlSecondsAfterFinished, checkpoint.save_steps and save_total_limit,
workers, recovery, credentials, profile."""
