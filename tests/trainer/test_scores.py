"""The figures are those of the libraries that define them: ``scores_golden.json`` holds what they gave."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_trainer import scores

pytestmark = pytest.mark.trainer

GOLDEN: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("scores_golden.json").read_text(encoding="utf-8")
)


def made(name: str) -> scores.Figures:
    case = GOLDEN[name]
    wanted, given = case["wanted"], case["given"]
    if name in ("single", "two"):
        halves = [
            scores.confusion(np.array(wanted[part]), np.array(given[part]), case["labels"])
            for part in (slice(0, 11), slice(11, None))
        ]
        return scores.of_confusion(sum(halves))
    if name == "several":
        return scores.of_overlaps(scores.overlaps(np.array(wanted, bool), np.array(given, bool)))
    if name == "numbers":
        return scores.of_numbers(np.array(wanted), np.array(given))
    pairs = zip(wanted, given, strict=True)
    if name == "entities":
        return scores.of_entities(sum(scores.entity_counts(*pair, case["kinds"]) for pair in pairs), case["kinds"])
    return scores.of_texts(sum(scores.text_counts(*pair) for pair in pairs))


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "made_by"])
def test_figures_are_those_of_the_libraries(name: str) -> None:
    found = made(name)
    for figure, value in GOLDEN[name]["figures"].items():
        assert found[figure] == pytest.approx(value, abs=1e-9), figure


def test_nothing_at_all_is_no_error() -> None:
    assert scores.of_confusion(np.zeros((2, 2), np.int64))["mcc"] == 0.0
    assert scores.of_entities(np.zeros((0, 3), np.int64), [])["f1"] == 0.0
    assert scores.of_texts(scores.text_counts("", ""))["bleu"] == 0.0
    assert scores.of_numbers(np.ones(3), np.ones(3))["spearman"] == 0.0


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O", {("A", 0, 1)}),
        ("B-A B-A", {("A", 0, 0), ("A", 1, 1)}),
        ("I-A I-A", {("A", 0, 1)}),
        ("B-A I-B", {("A", 0, 0), ("B", 1, 1)}),
        ("O O", set()),
    ],
)
def test_entities_of_tags(tags: str, expected: set[tuple[str, int, int]]) -> None:
    assert scores.entities(tags.split()) == expected


def test_words_of_other_scripts_count_for_rouge() -> None:
    assert scores.of_texts(scores.text_counts("你好 мир", "你好 мир"))["rougeL"] == 1.0
