"""Progress, metrics, pulses and the history: served, carried and kept."""

import json
import math
import queue
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run import CheckpointInfo, Progress
from finetune_trainer import telemetry
from finetune_trainer.telemetry import History, Metrics, Pulse, Telemetry, host_memory
from tests.trainer import tiny


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A telemetry that is served on a port of its own."""
    monkeypatch.setenv("FINETUNE_HTTP_PORT", "0")
    monkeypatch.setenv("FINETUNE_ATTEMPT", "3")
    telemetry = Telemetry(tiny.make_config(tmp_path), serve=True)
    yield telemetry
    telemetry.close()


def get(telemetry: Telemetry, path: str) -> str:
    """The body of an answer."""
    with urllib.request.urlopen(f"http://127.0.0.1:{telemetry.port}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def test_progress_is_a_progress(served: Telemetry) -> None:
    served.phase("loading")
    served.update(step=3, max_steps=9, loss=1.5)
    served.checkpoints([CheckpointInfo(step=2, uri="file:///x/step-2")], failures=1)
    served.watch(lambda: {"0": 0.2, "1": 40.0})
    told = Progress.model_validate_json(get(served, "/progress"))
    assert (told.attempt, told.phase, told.step, told.max_steps, told.loss) == (3, "loading", 3, 9, 1.5)
    assert told.checkpoints[0].step == 2
    assert told.checkpoint_failures == 1
    assert told.heartbeats == {"0": 0.2, "1": 40.0}


def test_metrics_carry_the_heartbeats(served: Telemetry) -> None:
    served.watch(lambda: {"1": 40.0})
    assert 'finetune_train_heartbeat_age_seconds{finetunejob="tiny",rank="1"} 40.0' in get(served, "/metrics")


def test_health_and_nonsense(served: Telemetry) -> None:
    assert get(served, "/healthz") == "ok\n"
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(served, "/nothing")
    assert caught.value.code == 404


def test_a_taken_port_ends_nothing(
    served: Telemetry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("FINETUNE_HTTP_PORT", str(served.port))
    second = Telemetry(tiny.make_config(tmp_path), serve=True)
    second.update(step=1)
    assert second.progress().step == 1
    assert "going on without" in capsys.readouterr().err


def test_a_gauge_is_not_there_before_its_value() -> None:
    metrics = Metrics("job")
    assert "finetune_train_loss{" not in metrics.text().decode()
    metrics.loss.set(2.5)
    assert 'finetune_train_loss{finetunejob="job"} 2.5' in metrics.text().decode()


def test_evaluation_by_source() -> None:
    metrics = Metrics("job")
    metrics.evaluation({"loss": 1.0, "perplexity": 2.7, "loss/code": 0.5})
    text = metrics.text().decode()
    assert 'finetune_eval_loss{finetunejob="job",source="all"} 1.0' in text
    assert 'finetune_eval_loss{finetunejob="job",source="code"} 0.5' in text
    assert 'finetune_eval_perplexity{finetunejob="job",source="all"} 2.7' in text


def test_a_rank_that_hangs_grows_old() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    beats = {0: 0, 1: 0}
    pulses = [Pulse(store, rank, 2, lambda rank=rank: beats[rank]) for rank in (0, 1)]  # type: ignore[misc]
    for pulse in pulses:
        pulse.close()  # turned by hand
    time.sleep(0.01)

    def turn() -> dict[str, float]:
        pulses[1]._turn()
        pulses[0]._turn()
        return pulses[0].ages()

    assert set(turn()) == {"0", "1"}
    seen = pulses[0]._seen[1][1]
    beats[0] += 1
    turn()
    assert pulses[0]._seen[1][1] == seen, "rank 1 did not go forward"
    beats[1] += 1
    turn()
    assert pulses[0]._seen[1][1] > seen


def test_a_rank_that_falls_silent_is_lost_and_one_that_is_done_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import HashStore

    monkeypatch.setattr(telemetry, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(telemetry, "SILENCE", 0.1)
    store, lost = HashStore(), queue.Queue[int]()
    waiting, done = (Pulse(store, rank, 3, lambda: 1) for rank in (1, 2))
    done.close()
    waiting._turn = lambda: None  # type: ignore[method-assign]  # frozen
    listening = Pulse(store, 0, 3, lambda: 1, lambda rank, seconds: lost.put(rank))
    assert lost.get() == 1
    assert listening._heard[2][1] == math.inf, "rank 2 has ended, and may be silent"
    listening.close()
    waiting.close()


def test_history_goes_on_without_a_step_twice(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        history.add({"step": step, "loss": step / 2})
    kept = history.content()
    again = History(tmp_path / "metrics.jsonl")
    assert again.content() == b""
    again.restore(kept, step=2)
    again.add({"step": 3, "loss": 9.0})
    assert [(r["step"], r["loss"]) for r in again.records()] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert json.loads(again.content().splitlines()[-1]) == {"step": 3, "loss": 9.0}


def test_host_memory_is_some() -> None:
    assert host_memory() > 2**20
