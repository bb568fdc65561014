"""Checkpoints on a real folder: torn ones, fenced writers, failing storage, retention, other numbers of processes.

The state is a dictionary of tensors instead of a DeepSpeed engine; processes are threads with a store of their own.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from finetune_api.causes import Cause
from finetune_api.run import ENV_RUN
from finetune_trainer import saving
from finetune_trainer.checkpoint import (
    MANIFEST,
    Manifest,
    Resumed,
    differences,
    digest_of,
    identity,
    persistently,
    resume,
    survey,
)
from finetune_trainer.fence import Fence, claim, claims
from finetune_trainer.outcome import RunError
from finetune_trainer.saving import Saved, Saver
from finetune_trainer.state import Fragment
from finetune_trainer.storage import Store
from finetune_trainer.world import World
from tests.trainer import tiny

SHAPES = {"a.weight": (5, 3), "b.bias": (7,), "c.weight": (4, 4)}


class State:
    """A rank's slices of three parameters, cut as ZeRO-3 cuts them, with moments in two number formats."""

    def __init__(self, rank: int, size: int, fill: float | None = None) -> None:
        self.taken, self.synced = 0, 0
        self._fragments = []
        for number, (name, shape) in enumerate(SHAPES.items()):
            whole = torch.zeros(shape).flatten() if fill is None else self.value(number, fill)
            part = -(-whole.numel() // size)
            start, stop = min(rank * part, whole.numel()), min((rank + 1) * part, whole.numel())
            if start < stop:
                tensors = {
                    "weight": whole[start:stop].clone(),
                    "exp_avg": (whole[start:stop] * 0.5).to(torch.bfloat16),
                    "exp_avg_sq": whole[start:stop].square(),
                }
                self._fragments.append(Fragment(name, shape, start, stop, tensors))

    @staticmethod
    def value(number: int, fill: float) -> torch.Tensor:
        """A parameter's content."""
        shape = list(SHAPES.values())[number]
        return torch.rand(shape, generator=torch.Generator().manual_seed(int(fill * 100) + number)).flatten()

    def fragments(self) -> list[Fragment]:
        return self._fragments

    def steps_taken(self) -> int:
        return self.taken

    def set_steps_taken(self, step: int) -> None:
        self.taken = step

    def sync(self) -> None:
        self.synced += 1

    def content(self) -> dict[str, list[float]]:
        """Everything, for comparison."""
        return {f"{kind}/{f.name}": t.tolist() for f in self._fragments for kind, t in f.tensors.items()}


def worlds(size: int) -> list[World]:
    """One world per rank, over one store."""
    store = HashStore()
    return [World(rank, 0, size, torch.device("cpu"), store) for rank in range(size)]


def together(work: Callable[[World], Any], size: int) -> list[Any]:
    """``work`` on every rank at once; results by rank. The first error is raised."""
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def one(world: World) -> None:
        try:
            results[world.rank] = work(world)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(world,)) for world in worlds(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    if errors:
        raise errors[0]
    return results


class Folder:
    """A job's checkpoint folder and what works on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "checkpoints"
        self.config = tiny.make_config(root)
        self.store = Store(f"file://{self.path}")
        self.told: list[Saved] = []

    def saver(self, world: World, state: Any, fence: Fence | None = None, **more: Any) -> Saver:
        """A saver of attempt 1, or of the claim given."""
        if fence is None and world.first:
            fence = claim(self.store, attempt=1, run="")
        options: dict[str, Any] = {
            "fence": fence,
            "inputs": {},
            "work": self.root / "work",
            "limit": 3,
            "kept": [],
            "on_saved": self.told.append,
        }
        return Saver(self.store, self.config, world, state, **(options | more))

    def save(self, *steps: int, size: int = 1, **more: Any) -> None:
        """Checkpoints of these steps, of a run of so many processes."""

        def work(world: World) -> None:
            state = State(world.rank, size, fill=0.0)
            saver = self.saver(world, state, **more)
            for step in steps:
                state._fragments = State(world.rank, size, fill=float(step))._fragments
                state.taken = step
                saver.save(step, step * 4, {"metrics.jsonl": b'{"step": %d}\n' % step, "run.json": b"{}"})
                saver.wait()

        together(work, size)

    def resume(self, size: int = 1, **changes: Any) -> list[tuple[Resumed, State]]:
        """What every rank of a new run finds."""
        config = tiny.make_config(self.root, **changes)

        def work(world: World) -> tuple[Resumed, State]:
            state = State(world.rank, size)
            fence = claim(self.store, attempt=2, run="") if world.first else None
            found = resume(self.store, config, world, state, fence, {}, self.root / "work")  # type: ignore[arg-type]
            return found, state

        return together(work, size)

    def steps(self) -> list[int]:
        """Numbers of the folders that hold anything."""
        return sorted({int(path.parent.name[5:]) for path in self.path.glob("step-*/*")})


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """An empty checkpoint folder."""
    return Folder(tmp_path)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 3), (3, 1), (1, 3), (2, 4)])
def test_any_number_of_processes_reads_what_any_number_wrote(before: int, after: int, folder: Folder) -> None:
    folder.save(3, size=before)
    for rank, (found, state) in enumerate(folder.resume(after)):
        assert (found.step, found.position, state.taken, state.synced) == (3, 12, 3, 1)
        assert state.content() == State(rank, after, fill=3.0).content()
        assert {t.dtype for f in state.fragments() for t in f.tensors.values()} == {torch.float32, torch.bfloat16}


def test_a_process_downloads_only_what_it_needs(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save(3, size=3)
    loaded: list[str] = []
    download = Store.download
    monkeypatch.setattr(Store, "download", lambda self, path, to: loaded.append(path) or download(self, path, to))
    folder.resume(3)
    files = [path for path in loaded if path.endswith(".safetensors")]
    assert len(files) == len(set(files)) == 3, "each file once per node, although three processes share it"


def test_the_newest_is_taken_and_told(folder: Folder) -> None:
    folder.save(3, 6, 9)
    found, _ = folder.resume()[0]
    assert found.step == 9
    assert found.metrics == b'{"step": 9}\n'
    assert [info.step for info in found.kept] == [3, 6, 9]
    assert found.info is not None
    assert found.info.uri == f"file://{folder.path}/step-9"
    assert found.info.size == sum(path.stat().st_size for path in (folder.path / "step-9").iterdir())
    assert found.info.digest.startswith("sha256:")


def lose_file(step: Path) -> None:
    next(step.glob("*.safetensors")).unlink()


def lose_manifest(step: Path) -> None:
    (step / MANIFEST).unlink()


def flip_byte(step: Path) -> None:
    path = next(step.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut_file(step: Path) -> None:
    path = next(step.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


def flip_manifest(step: Path) -> None:
    path = step / MANIFEST
    path.write_text(path.read_text().replace('"position":24', '"position":25'))


def cut_manifest(step: Path) -> None:
    path = step / MANIFEST
    path.write_bytes(path.read_bytes()[:100])


def flip_metrics(step: Path) -> None:
    (step / "metrics.jsonl").write_bytes(b'{"step": 7}\n')


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lose_file, "is missing"),
        (lose_manifest, "no manifest"),
        (flip_byte, "is damaged"),
        (cut_file, "bytes instead of"),
        (flip_manifest, "checksum"),
        (cut_manifest, "cannot be read"),
        (flip_metrics, "metrics.jsonl is damaged"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_and_told(
    damage: Callable[[Path], None], problem: str, folder: Folder
) -> None:
    folder.save(3, 6, size=2)
    damage(folder.path / "step-6")
    results = folder.resume(2)
    for rank, (found, state) in enumerate(results):
        assert found.step == 3
        assert state.content() == State(rank, 2, fill=3.0).content()
    (skipped,) = results[0][0].skipped
    assert skipped.step == 6
    assert problem in skipped.problem
    assert [info.step for info in results[0][0].kept] == [3]


def test_nothing_valid_is_a_fresh_start(folder: Folder) -> None:
    folder.save(3)
    lose_manifest(folder.path / "step-3")
    found, state = folder.resume()[0]
    assert (found.step, found.info, state.synced) == (0, None, 0)
    assert [info.step for info in found.skipped] == [3]


def test_retention_counts_and_sweeps_what_was_left_incomplete(folder: Folder) -> None:
    folder.save(1, 2, 3)
    lose_manifest(folder.path / "step-2")
    (folder.path / "step-4").mkdir()
    (folder.path / "step-4" / "000001-00000.safetensors").write_bytes(b"half")
    found, _ = folder.resume()[0]
    folder.save(4, 5, kept=found.kept, leftovers=[info.step for info in found.skipped], limit=2)
    assert folder.steps() == [4, 5]
    assert not (folder.path / "step-4" / "000001-00000.safetensors").exists(), "another attempt's half file"
    assert [manifest.step for manifest, _ in survey(folder.store).complete] == [5, 4]


def test_sweeping_spares_what_another_process_is_writing_by_now(folder: Folder) -> None:
    folder.save(2, 6)
    lose_manifest(folder.path / "step-6")
    (found, _), *_ = folder.resume()
    saver = folder.saver(worlds(1)[0], State(0, 1, fill=3.0), kept=found.kept, leftovers=[6])
    ahead = folder.path / "step-6" / f"{saver._claim:06d}-00001.safetensors"
    ahead.write_bytes(b"rank 1 is a save ahead")
    saver.save(3, 12, {})
    saver.wait()
    assert [path.name for path in (folder.path / "step-6").iterdir()] == [ahead.name]


def test_a_failed_save_deletes_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save(1, 2, limit=2)
    found, _ = folder.resume()[0]
    break_storage(monkeypatch)
    folder.save(3, kept=found.kept, limit=1)
    assert folder.told[-1].info is None
    assert "no space" in folder.told[-1].problem
    monkeypatch.undo()
    assert folder.resume()[0][0].step == 2


def break_storage(monkeypatch: pytest.MonkeyPatch, cause: Cause = Cause.STORAGE_UNAVAILABLE) -> None:
    def put(self: Store, path: str, data: Any) -> None:
        raise RunError(cause, "no space left on device")

    monkeypatch.setattr(Store, "put", put)
    monkeypatch.setattr("finetune_trainer.checkpoint.time.sleep", lambda seconds: None)


def test_failures_are_counted_and_end_the_run_only_after_long(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    world = worlds(1)[0]
    state = State(0, 1, fill=1.0)
    saver = folder.saver(world, state)
    good = Store.put
    break_storage(monkeypatch)
    for step in (1, 2, 3):
        saver.save(step, step, {})
    saver.wait()
    assert (saver.failures, saver.fatal, saver.saved_step) == (3, None, 0)
    monkeypatch.setattr(Store, "put", good)
    saver.save(4, 4, {})
    saver.wait()
    assert (saver.failures, saver.saved_step) == (3, 4)
    break_storage(monkeypatch)
    monkeypatch.setattr(saving, "GIVE_UP_AFTER", -1.0)
    for step in (5, 6, 7):
        saver.save(step, step, {})
    saver.wait()
    assert saver.fatal is not None
    assert saver.fatal.cause is Cause.STORAGE_UNAVAILABLE
    assert "no space" in saver.fatal.message


def test_another_processs_failed_part_makes_no_checkpoint(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Store.put

    def put(self: Store, path: str, data: Any) -> None:
        if path.endswith("00001.safetensors"):
            raise RunError(Cause.ACCESS_DENIED, "not allowed")
        good(self, path, data)

    monkeypatch.setattr(Store, "put", put)
    folder.save(3, size=2)
    assert folder.told[0].problem == "rank 1: not allowed"
    assert not survey(folder.store).complete


def test_the_training_goes_on_while_a_save_is_written(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the state of the step, although the weights move on while it is uploaded."""
    gate = threading.Event()
    good = Store.put

    def put(self: Store, path: str, data: Any) -> None:
        gate.wait(10)
        good(self, path, data)

    monkeypatch.setattr(Store, "put", put)
    state = State(0, 1, fill=3.0)
    wanted = state.content()
    saver = folder.saver(worlds(1)[0], state)
    saver.save(3, 12, {})
    for fragment in state.fragments():
        for tensor in fragment.tensors.values():
            tensor.zero_()
    assert not folder.told
    gate.set()
    saver.wait()
    assert folder.resume()[0][1].content() == wanted


def test_a_newer_claim_fences_the_writer_off(folder: Folder) -> None:
    state = State(0, 1, fill=1.0)
    saver = folder.saver(worlds(1)[0], state)
    saver.save(1, 1, {})
    saver.wait()
    claim(folder.store, attempt=2, run="")
    saver.save(2, 2, {})
    saver.wait()
    assert saver.fatal is not None
    assert saver.fatal.cause is Cause.FENCED
    assert folder.steps() == [1]


def test_a_claim_between_the_upload_and_the_manifest_is_seen(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Store.put

    def put(self: Store, path: str, data: Any) -> None:
        good(self, path, data)
        if path.endswith(".safetensors"):
            claim(folder.store, attempt=2, run="")

    saver = folder.saver(worlds(1)[0], State(0, 1, fill=1.0))
    monkeypatch.setattr(Store, "put", put)
    saver.save(1, 1, {})
    saver.wait()
    assert saver.fatal is not None
    assert saver.fatal.cause is Cause.FENCED
    assert not survey(folder.store).complete


def test_an_old_attempt_that_starts_late_is_fenced_off_at_once(folder: Folder) -> None:
    claim(folder.store, attempt=5, run="uid-1")
    with pytest.raises(RunError, match="Attempt 4 started after attempt 5") as caught:
        claim(folder.store, attempt=4, run="uid-1")
    assert caught.value.cause is Cause.FENCED
    again = claim(folder.store, attempt=1, run="uid-2")
    assert again.number == 2, "a job that was made anew counts from 1 and takes the folder"


def test_claims_are_exclusive(folder: Folder) -> None:
    taken: list[int] = []
    threads = [
        threading.Thread(target=lambda: taken.append(claim(folder.store, attempt=1, run="").number)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == claims(folder.store) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_attempts_tell_what_became_of_them(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_RUN, "uid")
    first = claim(folder.store, attempt=1)
    first.note("began", {"resumed_from": None})
    first.note("ended", {"cause": "OutOfMemory"})
    second = claim(folder.store, attempt=2)
    told = second.attempts()
    assert [(a["attempt"], a.get("cause")) for a in told] == [(1, "OutOfMemory"), (2, None)]


def test_the_identity_holds_what_changes_the_result_and_nothing_else(tmp_path: Path) -> None:
    config = tiny.make_config(tmp_path)
    same = tiny.make_config(
        tmp_path,
        name="other",
        save_steps=77,
        resume="never",
        output_uri="file:///elsewhere",
        checkpoint_uri="file:///elsewhere/too",
        training={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 9},
        deepspeed={"zero_optimization": {"stage": 2}},
        evaluation={"prompts": ["hello"]},
        data={"eval": [{"uri": "file:///held-out.jsonl"}]},
    )
    assert digest_of(identity(config)) == digest_of(identity(same))
    for changes in (
        {"training": {"seed": 1}},
        {"method": {"type": "lora", "r": 8}},
        {"data": {"packing": True}},
        {"global_batch_size": 8},
        {"model": {"dtype": "bfloat16"}},
    ):
        assert differences(identity(config), identity(tiny.make_config(tmp_path, **changes)))


def test_changed_data_is_refused(folder: Folder) -> None:
    folder.save(3, inputs={"file:///train.jsonl": "sha256:aaa"})
    state = State(0, 1)
    with pytest.raises(RunError, match=r'file:///train\.jsonl: "sha256:aaa" → "sha256:bbb"') as caught:
        resume(
            folder.store,
            folder.config,
            worlds(1)[0],
            state,  # type: ignore[arg-type]
            None,
            {"file:///train.jsonl": "sha256:bbb"},
            folder.root,
        )
    assert caught.value.cause is Cause.CHECKPOINT_MISMATCH


def test_never_lets_the_second_attempt_of_the_same_run_continue(folder: Folder) -> None:
    fence = claim(folder.store, attempt=1, run="uid")
    folder.save(3, fence=fence)
    config = tiny.make_config(folder.root, resume="never")
    world = worlds(1)[0]
    second = claim(folder.store, attempt=2, run="uid")
    found = resume(folder.store, config, world, State(0, 1), second, {}, folder.root / "work")  # type: ignore[arg-type]
    assert found.step == 3
    other = claim(folder.store, attempt=1, run="another")
    with pytest.raises(RunError, match="is a checkpoint of another run"):
        resume(folder.store, config, world, State(0, 1), other, {}, folder.root / "work")  # type: ignore[arg-type]


def test_never_does_not_let_a_second_attempt_continue_what_another_job_left(folder: Folder) -> None:
    folder.save(3, fence=claim(folder.store, attempt=1, run="another"))
    config, world = tiny.make_config(folder.root, resume="never"), worlds(1)[0]
    claim(folder.store, attempt=1, run="uid")  # it was killed before it looked
    second = claim(folder.store, attempt=2, run="uid")
    with pytest.raises(RunError, match="is a checkpoint of another run"):
        resume(folder.store, config, world, State(0, 1), second, {}, folder.root / "work")  # type: ignore[arg-type]
    assert [told["attempt"] for told in second.attempts()] == [1, 2], "the other job's attempt is not told"


def test_never_lets_an_attempt_continue_what_one_without_an_identity_saved(folder: Folder) -> None:
    folder.save(3, fence=claim(folder.store, attempt=1, run=""))  # by an operator that gave none
    config, world = tiny.make_config(folder.root, resume="never"), worlds(1)[0]
    second = claim(folder.store, attempt=2, run="uid")
    found = resume(folder.store, config, world, State(0, 1), second, {}, folder.root / "work")  # type: ignore[arg-type]
    assert found.step == 3


def test_a_refusal_reaches_every_process(folder: Folder) -> None:
    folder.save(3, size=2)
    refused: list[str] = []

    def work(world: World) -> None:
        config = tiny.make_config(folder.root, training={"seed": 7})
        try:
            resume(folder.store, config, world, State(world.rank, 2), None, {}, folder.root)  # type: ignore[arg-type]
        except RunError as error:
            refused.append(error.message)

    together(work, 2)
    assert len(refused) == 2
    assert "training.seed: 42 → 7" in refused[0]


def test_a_manifest_is_its_own_witness(folder: Folder) -> None:
    folder.save(3)
    content = (folder.path / "step-3" / MANIFEST).read_bytes()
    assert Manifest.opened(content).step == 3
    document = json.loads(content)
    with pytest.raises(ValueError, match="checksum"):
        Manifest.opened(json.dumps(document | {"adam_steps": 4}).encode())
    newer = Manifest.model_validate(document | {"format": 2}).sealed()
    with pytest.raises(ValueError, match="format is 2"):
        Manifest.opened(newer)


def test_storage_that_fails_for_a_while_is_tried_again() -> None:
    tries = []

    def work() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise RunError(Cause.STORAGE_UNAVAILABLE, "503")
        return "there"

    assert persistently(work, first_pause=0.001) == "there"
    with pytest.raises(RunError, match="not allowed"):
        persistently(lambda: _raise(RunError(Cause.ACCESS_DENIED, "not allowed")), first_pause=0.001)


def _raise(error: Exception) -> None:
    raise error
