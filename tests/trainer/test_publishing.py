"""The report of an unfinished run: beside the training, at a bounded cost, and never over somebody else's."""

import threading
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the trainer extra")

from finetune_trainer.fence import claim
from finetune_trainer.publishing import Publisher
from finetune_trainer.storage import Store


def drawn(folder: Path) -> None:
    (folder / "report.html").write_text("still running")
    (folder / "loss.png.partial").write_text("not published")


def test_the_training_does_not_wait_for_it_and_the_end_does(tmp_path: Path) -> None:
    gate, drawing, count = threading.Event(), threading.Event(), []

    def slowly(folder: Path) -> None:
        drawing.set()
        gate.wait()
        count.append(1)
        drawn(folder)

    publisher = Publisher(f"file://{tmp_path}/out", tmp_path / "work", None, slowly)
    publisher.renew()
    drawing.wait()
    for _ in range(100):
        publisher.renew()  # comes back at once, and nothing piles up
    gate.set()
    publisher.end(60)
    assert len(count) == 2, "the one under way, and the last one"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    publisher.close()
    publisher.end(60)
    assert len(count) == 2, "the result is being written, and its report with it"


def test_it_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, count = [100.0], []

    def takes_a_second(folder: Path) -> None:
        count.append(now[0])
        now[0] += 1

    monkeypatch.setattr("finetune_trainer.publishing.time.monotonic", lambda: now[0])
    publisher = Publisher(f"file://{tmp_path}/out", tmp_path / "work", None, takes_a_second)
    for _ in range(60):
        publisher.renew()
        if publisher._pending is not None:
            publisher._pending.result()
        now[0] += 1
    assert count == [100.0, 121.0, 142.0]


def test_a_finished_result_stays_whole_until_there_is_another(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "manifest.json").write_text("{}")
    (output / "report.html").write_text("finished")
    publisher = Publisher(f"file://{output}", tmp_path / "work", None, drawn)
    publisher.end(60)
    assert (output / "report.html").read_text() == "finished"
    assert (output / "unfinished" / "report.html").read_text() == "still running"
    publisher.close()
    publisher.clear()
    assert not (output / "unfinished" / "report.html").exists()


def test_a_writer_that_was_overtaken_publishes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(f"file://{tmp_path}/checkpoints")
    fence = claim(store, 1, "run")
    claim(store, 2, "run")
    publisher = Publisher(f"file://{tmp_path}/out", tmp_path / "work", fence, drawn)
    publisher.end(60)
    assert not (tmp_path / "out" / "report.html").exists()
    assert "the report in the output is not renewed: Attempt 1 was overtaken" in capsys.readouterr().err
