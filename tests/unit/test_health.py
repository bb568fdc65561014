"""Worthless results are told, and good ones never are."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from finetune_api.conditions import Condition, Reason
from finetune_api.health import SENTENCES, gravest, sentences
from finetune_api.run import Answer
from finetune_api.status import FineTuneJobStatus
from finetune_operator.observe import parse_time
from finetune_operator.status import events, healthy, merge_conditions
from finetune_trainer.health import Course, Evidence, symptoms
from tests.trainer import tiny

NOWHERE = Path("/nowhere")
NOW = parse_time("2026-01-01T00:00:00Z")


def judged(
    losses: list[float], norms: list[float] | None = None, stage: str = "sft", epochs: bool = False, **evidence: Any
) -> dict[str, str]:
    """Symptoms of a run with these figures, ten steps apart."""
    course = Course()
    norms = norms if norms is not None else [1.0] * len(losses)
    for number, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
        course.add({"step": number * 10, "loss": loss, "grad_norm": norm})
    config = tiny.make_config(NOWHERE, stage=stage, training={"max_steps": -1 if epochs else 1000})
    given = {"vocabulary": 49152, "max_steps": 10 * len(losses), "data": {}, "done": True}
    return symptoms(Evidence(config, course, **(given | evidence)))


def answers(*pairs: tuple[str, str]) -> list[Answer]:
    return [Answer(prompt=f"question {n}", before=before, after=after) for n, (before, after) in enumerate(pairs)]


def test_a_run_that_collapses_is_told_while_it_trains_and_at_its_end() -> None:
    """What was seen: a loss of 3.8 that rose to the logarithm of the vocabulary, and no gradient."""
    losses = [3.8, 3.6, 9.0, *[10.8] * 12]
    norms = [2.0, 5.0, 80.0, *[0.0] * 12]
    for done in (True, False):
        found = judged(losses, norms, done=done, max_steps=1000)
        assert list(found) == [Reason.LOSS_AT_CHANCE, Reason.LOSS_ABOVE_START, Reason.ZERO_GRADIENTS]
        assert found[Reason.LOSS_ABOVE_START] == "3.80 → 10.80"
        assert found[Reason.ZERO_GRADIENTS] == "steps 130 to 150"
    assert judged([3.8, 10.8], [1.0, 0.0]) == {
        Reason.LOSS_AT_CHANCE: "10.80; the logarithm of 49,152 tokens is 10.80"
    }, "two figures tell no trend"


def test_a_collapse_before_the_first_figure_is_told_too() -> None:
    assert Reason.LOSS_AT_CHANCE in judged([10.8] * 8, done=False, max_steps=100)
    assert judged([10.8] * 3, done=False, max_steps=100) == {}, "it may begin with random weights"


@pytest.mark.parametrize("stage", ["dpo", "reward", "kto"])
def test_a_preference_loss_that_explodes_is_told(stage: str) -> None:
    assert list(judged([0.69, 0.8, *[3.0] * 20], stage=stage)) == [Reason.LOSS_ABOVE_START]


def test_single_odd_batches_are_no_trend() -> None:
    """Losses that go nowhere, with the long tail of batches of one row: told in less than one run of a hundred."""
    draw = random.Random(0)
    for length in (2, 4, 9, 15, 60):
        told = [judged([2 * draw.lognormvariate(0, 0.5) for _ in range(length)]) for _ in range(500)]
        assert sum(map(bool, told)) < 5


@pytest.mark.parametrize(("noise", "batch"), [(0.05, 0.2), (0.3, 1.2), (0.6, 2.5)])
def test_good_runs_raise_nothing(noise: float, batch: float) -> None:
    """Falling and flat losses of any length, with noise as of single small batches."""
    draw = random.Random(0)
    for length in (1, 2, 3, 5, 8, 13, 40, 300):
        for fall in (0.0, 0.3, 0.8):
            for _ in range(20):
                losses = [
                    batch * (1 - fall * step / length) + draw.gauss(0, noise * batch / 2.5) for step in range(length)
                ]
                norms = [abs(draw.gauss(1, 0.5)) + 1e-4 for _ in losses]
                for done in (True, False):
                    assert judged(losses, norms, done=done) == {}


@pytest.mark.parametrize(
    ("losses", "norms", "more"),
    [
        ([1.0, 0.1, *[0.0] * 10], [1.0, 0.2, *[0.0] * 10], {}),  # nothing is left to learn
        ([0.0, 0.3, 0.8, 0.9, 0.9], [0.0] * 5, {"stage": "grpo"}),  # advantages, not a likelihood
        ([2.0, 2.0, 9.0, 2.0, 1.9, 1.8, 1.8, 1.7, 1.7, 1.6, 1.6], None, {}),  # one bad batch
        ([0.02, 0.01, 0.01, 0.03, 0.03, 0.04], None, {}),  # near zero a loss may double
        ([1.35] * 20, None, {"vocabulary": 4, "stage": "pretrain"}),  # of four bases
        ([2.0, 1.5], None, {"max_steps": 3}),  # max_steps: 1000 was written
    ],
)
def test_what_looks_like_a_failure_and_is_none(losses: Any, norms: Any, more: dict[str, Any]) -> None:
    assert judged(losses, norms, **more) == {}


@pytest.mark.parametrize(
    ("given", "taught", "reason"),
    [
        (answers(("I am A.", ""), ("Paris.", " ")), False, Reason.EMPTY_ANSWERS),
        (answers(("", ""), ("", "")), False, None),
        (answers(("I am A.", ""), ("Paris.", "Paris.")), False, None),
        (answers(("a", "x x x x"), ("b", "x x x x"), ("c", "x x x x")), False, Reason.IDENTICAL_ANSWERS),
        (answers(("a", "I am B."), ("b", "I am B."), ("c", "I am B.")), True, None),
        (answers(("a", "I am B."), ("b", "I am B.")), False, None),
        (answers(("a", "x"), ("a", "x"), ("a", "x")), False, None),
    ],
)
def test_answers(given: list[Answer], taught: bool, reason: Reason | None) -> None:
    assert list(judged([2.0, 1.0], answers=given, taught=lambda answer: taught)) == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"train": {"rows": 40, "truncated": 40}}, {Reason.ROWS_TRUNCATED: "40 of 40 at 48 tokens"}),
        ({"train": {"rows": 40, "truncated": 20}}, {}),
        (
            {"train": {"rows": 40}, "eval/test": {"rows": 10, "sequences": 10, "contaminated": 4}},
            {Reason.HELD_OUT_ROWS_IN_TRAINING: "test: 4 of 10"},
        ),
        ({"train": {"rows": 40}, "eval/test": {"rows": 200, "sequences": 200, "contaminated": 3}}, {}),
        ({"train": {"rows": 40}, "eval/test": {"rows": 20, "sequences": 20, "truncated": 20}}, {}),
    ],
)
def test_rows(data: dict[str, Any], told: dict[str, str]) -> None:
    assert judged([], data=data, done=False) == told, "known before the first step"


def test_steps_that_follow_from_too_few_rows_are_told_and_those_that_were_asked_for_are_not() -> None:
    assert judged([2.0], epochs=True, max_steps=1) == {Reason.TOO_FEW_STEPS: "1 step"}
    assert judged([2.0], epochs=True, max_steps=4) == {Reason.TOO_FEW_STEPS: "4 steps"}
    assert judged([2.0], epochs=True, max_steps=5) == {}
    assert judged([2.0], max_steps=1) == {}


def test_every_reason_has_a_sentence_with_its_figure_and_a_remedy() -> None:
    for reason, sentence in SENTENCES.items():
        assert Reason(reason) and sentence.count("{}") == 1 and sentence.endswith(".")
    assert sentences({Reason.TOO_FEW_STEPS: "3 steps", "FromTheFuture": "7"}) == [
        SENTENCES[Reason.TOO_FEW_STEPS].format("3 steps"),
        "FromTheFuture: 7",
    ]
    assert gravest({"FromTheFuture": "7"}) == Reason.OTHER_DOUBT
    assert gravest({Reason.TOO_FEW_STEPS: "1", Reason.LOSS_ABOVE_START: "2"}) == Reason.LOSS_ABOVE_START


def test_the_condition_says_it_and_an_event_once() -> None:
    assert NOW is not None
    statuses = [FineTuneJobStatus()]
    for unhealthy in (None, {}, {Reason.LOSS_ABOVE_START: "3 → 4"}, {Reason.LOSS_ABOVE_START: "3 → 5"}, {}):
        conditions = merge_conditions(statuses[-1].conditions, healthy(unhealthy), 1, NOW)
        statuses.append(FineTuneJobStatus(conditions=conditions))
    told = [[event.reason for event in events(*pair)] for pair in pairwise(statuses)]
    assert told == [[], [], [Reason.LOSS_ABOVE_START], [], []]
    found = [[(c.type, c.status, c.reason) for c in status.conditions] for status in statuses[1:]]
    good = [(Condition.HEALTHY, "True", Reason.NO_DOUBT)]
    bad = [(Condition.HEALTHY, "False", Reason.LOSS_ABOVE_START)]
    assert found == [[], good, bad, bad, good], "a trainer that does not judge is not taken for a healthy run"
    assert "(3 → 5)" in statuses[-2].conditions[0].message
