"""The report: everything told, nothing loaded from elsewhere, nothing of the user's taken for markup."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune_api.causes import Cause
from finetune_api.run import Answer, CheckpointInfo, OutputInfo
from finetune_trainer.report import Report, chart, duration, number, page, size, smooth, ticks, write_plot
from tests.trainer import tiny


def report(root: Path, steps: int = 100) -> Report:
    """A report with something in every section."""
    records: list[dict[str, Any]] = [
        {
            "step": step,
            "epoch": step / 50,
            "loss": 3 / step + 1,
            "learning_rate": 1e-3 * (1 - step / 200),
            "grad_norm": 1.0,
            "tokens_per_second": 1000.0 + step,
            "step_seconds": 0.5,
            "data_wait_seconds": 0.001,
            "memory": {"rss": 2**30, "peak": 2**33},
            "mfu": 0.41,
        }
        for step in range(1, steps + 1)
    ]
    if records:
        records[-1]["eval_loss"] = 1.2
    return Report(
        config=tiny.make_config(root),
        records=records,
        evaluation={"loss": 1.2, "perplexity": 3.3, "loss/code": 1.1, "perplexity/code": 3.0},
        answers=[Answer(prompt="<script>alert(1)</script>", before="I am A.", after="I am B & C.")],
        data={"train": {"rows": 40, "tokens": 1234, "truncated": 2}},
        attempts=[
            {"attempt": 1, "time": "2026-01-01T00:00:00Z", "world_size": 2},
            {
                "attempt": 2,
                "resumed_from": 30,
                "skipped": [{"step": 40, "problem": "its file x is damaged"}],
                "cause": "OutOfMemory",
                "message": "The host's memory is full.",
            },
            {"attempt": 3, "resumed_from": 60, "cause": "Succeeded", "message": "100 steps"},
        ],
        checkpoints=[CheckpointInfo(step=100, uri="s3://b/step-100", size=2**20, digest="sha256:" + "a" * 64)],
        skipped=[CheckpointInfo(step=40, uri="s3://b/step-40", problem="its file x is damaged")],
        outputs=[OutputInfo(uri="s3://b/out", kind="adapter", size=5, digest="sha256:" + "b" * 64)],
        trainable_parameters=8192,
        total_parameters=1_350_000_000,
        seconds=3725.0,
    )


class Checked(HTMLParser):
    """Notes what is opened and not closed, and what is loaded."""

    void = frozenset({"meta", "line", "polyline", "circle", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    checked = Checked()
    text = page(report(tmp_path))
    checked.feed(text)
    assert not checked.open
    assert not checked.loads
    assert "script" not in checked.tags
    assert "url(" not in text
    assert "@import" not in text


@pytest.mark.parametrize(
    "told",
    [
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "I am B &amp; C.",
        "without a word: it was killed, or its node was lost",
        "from the checkpoint of step 30; passed over step 40 (its file x is damaged)",
        "OutOfMemory: The host&#x27;s memory is full.",
        "s3://b/step-100",
        "8,192 of 1.35 B parameters",
        "1 h 02 min",
        "41.0%",
        "8.0 GiB",
        "per_device_train_batch_size",
        "Passed over as broken",
    ],
)
def test_it_tells(told: str, tmp_path: Path) -> None:
    assert told in page(report(tmp_path))


def words(text: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


@pytest.mark.parametrize(
    ("cause", "first"),
    [
        (Cause.SUCCEEDED, "Doubtful. The loss is above the one it began with (3.81 → 10.83)"),
        (None, "Still running. Step 40 of 100 when this was written (noon). The newest checkpoint is that of step 100"),
        (Cause.TERMINATED, "Stopped, not finished. Step 40 of 100. So it was."),
        (Cause.OUT_OF_MEMORY, "Failed: OutOfMemory. Step 40 of 100. So it was."),
    ],
)
def test_what_must_be_known_first_comes_first(cause: Cause | None, first: str, tmp_path: Path) -> None:
    told = report(tmp_path)
    told.cause, told.message, told.written = cause, "So it was.", "noon"
    told.step, told.max_steps, told.unhealthy = 40, 100, {"LossAboveStart": "3.81 → 10.83"}
    assert f"Fine-tuning report team/tiny {first}" in words(page(told))


def test_stops_on_request_are_no_restarts(tmp_path: Path) -> None:
    told = report(tmp_path)
    told.attempts[0] |= {"cause": "Terminated", "message": "Stopped on request."}
    text = words(page(told))
    assert "Restarts 1 Stopped and continued 1" in text and "Terminated: Stopped on request." in text


def test_on_a_narrow_screen_every_cell_says_what_it_is(tmp_path: Path) -> None:
    text = page(report(tmp_path))
    assert '<td data-of="Where">s3://b/step-100</td>' in text
    assert all("data-of=" in cell for cell in re.findall(r"<td[^>]*>", text))


@pytest.mark.parametrize("steps", [0, 1, 2, 5000])
def test_runs_of_any_length(steps: int, tmp_path: Path) -> None:
    text = page(report(tmp_path, steps))
    assert len(text) < 400_000
    write_plot(report(tmp_path, min(steps, 200)), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    broken = report(tmp_path, 5)
    broken.records[2]["loss"] = float("nan")
    broken.records[3]["grad_norm"] = float("inf")
    text = page(broken)
    assert not re.search(r'points="[^"]*(nan|inf)', text)


def test_numbers_for_people() -> None:
    assert [number(v) for v in (0.0002, 12.345, 12_400, 1.35e6, 7e9)] == ["0.0002", "12.3", "12,400", "1.35 M", "7 B"]
    assert [size(v) for v in (10, 2048, 5 * 2**30)] == ["10 B", "2.0 KiB", "5.0 GiB"]
    assert [duration(v) for v in (12, 200, 3900)] == ["12 s", "3 min 20 s", "1 h 05 min"]


def test_ticks_are_round() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3.1, 8.7) == [4, 6, 8]
    assert all(0.001 <= t <= 0.0013 for t in ticks(0.001, 0.0013))


def test_smoothing_begins_where_the_curve_does() -> None:
    points = [(float(x), 5.0) for x in range(100)]
    assert smooth(points)[0] == (0.0, pytest.approx(5.0))
    line = [(float(x), 2.0 * x) for x in range(100)]
    assert smooth(line) == [(x, pytest.approx(y)) for x, y in line], "no lag"
    assert chart("empty", [("", "a", [])]) == ""
    assert "polyline" in chart("flat", [("", "a", points)])
