"""Fixtures of the tests of the local cluster and the command line."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.local_runs import PYTHONPATH, Bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A folder to run jobs in; nothing of them is left running."""
    made = Bench(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "train.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    made.script()
    monkeypatch.setenv("FAKE_TRAINER", str(tmp_path / "script.json"))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    yield made
    for cluster in made.opened:
        cluster.close()
    assert not made.left()
