"""How endings are told apart: exceptions, exit codes, whose word stands, and when a stop gives up waiting."""

import errno
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api.causes import Cause
from finetune_api.run import ENV_TERMINATION_LOG, EXIT_FAILED, EXIT_STOPPED, EXIT_USER, Termination
from finetune_trainer import launch
from finetune_trainer.faults import describe_exit, diagnose, exit_code, last_word, leave_word
from finetune_trainer.outcome import RunError
from finetune_trainer.stopping import PATIENCE, Stop


def torch_errors() -> list[tuple[BaseException, Cause, str]]:
    """Errors as the libraries word them."""
    import torch
    import torch.distributed as dist

    return [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
            Cause.OUT_OF_GPU_MEMORY,
            "per_device_train_batch_size",
        ),
        (RuntimeError("CUDA out of memory. Tried …"), Cause.OUT_OF_GPU_MEMORY, "gradient_checkpointing: true"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Cause.GPU_ERROR, "illegal memory"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), Cause.GPU_ERROR, "ECC"),
        (dist.DistBackendError("NCCL error in: …, remote process exited"), Cause.COMMUNICATION_ERROR, "process"),
        (dist.DistNetworkError("Connection reset"), Cause.COMMUNICATION_ERROR, "lost"),
        (
            RuntimeError("[…/gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.2]:4711"),
            Cause.COMMUNICATION_ERROR,
            "while training",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"), Cause.OUT_OF_MEMORY, "memory"),
        (MemoryError(), Cause.OUT_OF_MEMORY, "host's memory"),
        (ModuleNotFoundError("No module named 'wandb'"), Cause.INVALID_CONFIGURATION, "lacks a Python package"),
        (OSError(errno.ENOSPC, "No space left on device", "/scratch/x"), Cause.OUT_OF_DISK, "cache.sizeLimit"),
        (
            dist.DistBackendError(
                "NCCL error in: …, unhandled system error. Last error:\nError while creating shared memory segment "
                "/dev/shm/nccl-fWvK (size 9637888), error: No space left on device (28)"
            ),
            Cause.OUT_OF_DISK,
            "shmSize",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), Cause.OUT_OF_DISK, "A disk is full while"),
        (RunError(Cause.INVALID_DATA, "line 7 is no JSON"), Cause.INVALID_DATA, "line 7"),
        (ZeroDivisionError("division by zero"), Cause.TRAINER_ERROR, "ZeroDivisionError while training: division"),
        (ConnectionResetError("Connection reset by peer"), Cause.TRAINER_ERROR, "ConnectionResetError"),
    ]


def test_errors_become_causes() -> None:
    for error, cause, text in torch_errors():
        found, message = diagnose(error, phase="training", batch="batch size 8")
        assert found is cause, (error, found)
        assert text in message
        assert len(message) < 2000


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (Cause.SUCCEEDED, 0),
        (Cause.TERMINATED, EXIT_STOPPED),
        (Cause.OUT_OF_GPU_MEMORY, EXIT_USER),
        (Cause.INVALID_DATA, EXIT_USER),
        (Cause.TRAINER_ERROR, EXIT_FAILED),
        (Cause.FENCED, EXIT_FAILED),
    ],
)
def test_exit_codes_say_whether_to_try_again(cause: Cause, code: int) -> None:
    assert exit_code(cause) == code


def test_exits_in_words() -> None:
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(3) == "exited with 3"
    assert describe_exit(-99) == "was killed by signal 99"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty termination file, as the kubelet mounts it."""
    path = tmp_path / "termination"
    path.touch()
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(path))
    return path


def say(cause: Cause, **more: Any) -> bool:
    """Leave a word."""
    return leave_word(Termination(cause=cause, **more))


def standing() -> Cause | None:
    """Whose word stands."""
    word = last_word()
    return word.cause if word else None


def test_the_first_cause_stands(log: Path) -> None:
    assert say(Cause.INVALID_DATA)
    assert not say(Cause.TRAINER_ERROR)
    assert not say(Cause.COMMUNICATION_ERROR)
    assert standing() is Cause.INVALID_DATA


def test_a_cause_replaces_its_echo(log: Path) -> None:
    inode = log.stat().st_ino
    assert say(Cause.COMMUNICATION_ERROR, message="a very long message " * 20)
    assert say(Cause.NON_FINITE_LOSS, message="short")
    assert standing() is Cause.NON_FINITE_LOSS
    assert log.stat().st_ino == inode, "a mounted file cannot be replaced, only rewritten"


def test_no_file_and_a_bad_file_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_TERMINATION_LOG, raising=False)
    assert not say(Cause.KILLED)
    assert last_word() is None
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(tmp_path))
    assert not say(Cause.KILLED)


def failures(*codes: int, apart: int = 0) -> Any:
    """What torchrun raises, one worker per code; ``apart`` seconds between their ends."""
    return SimpleNamespace(
        failures={rank: SimpleNamespace(exitcode=code, timestamp=rank * apart) for rank, code in enumerate(codes)}
    )


@pytest.mark.parametrize(
    ("codes", "left", "code", "cause", "rank"),
    [
        ((-9,), None, 137, Cause.KILLED, 0),
        ((1, -9), Cause.COMMUNICATION_ERROR, 137, Cause.KILLED, 1),
        ((-6, -9), None, 137, Cause.KILLED, 1),
        ((-6, -15), None, 134, Cause.COMMUNICATION_ERROR, 0),
        ((-11,), None, 139, Cause.KILLED, 0),
        ((EXIT_USER, -6), Cause.INVALID_DATA, EXIT_USER, Cause.INVALID_DATA, None),
        ((3,), None, 3, Cause.TRAINER_ERROR, 0),
        ((EXIT_STOPPED, EXIT_STOPPED), Cause.TERMINATED, EXIT_STOPPED, Cause.TERMINATED, None),
        ((EXIT_STOPPED, -15), None, EXIT_STOPPED, Cause.TERMINATED, None),
    ],
)
def test_the_worker_that_failed_first_is_named(
    codes: tuple[int, ...], left: Cause | None, code: int, cause: Cause, rank: int | None, log: Path
) -> None:
    if left is not None:
        leave_word(Termination(cause=left, step=7, exit_code=exit_code(left)))
    assert launch._after(failures(*codes), stopping=False) == code
    word = last_word()
    assert word is not None
    assert word.cause is cause
    if rank is not None:
        assert word.rank == rank
    if left is not None:
        assert word.step == 7, "where the run stood is kept"


def test_what_torchrun_kills_later_is_no_cause(log: Path) -> None:
    leave_word(Termination(cause=Cause.COMMUNICATION_ERROR, message="Process 1 is silent", exit_code=EXIT_FAILED))
    assert launch._after(failures(EXIT_FAILED, -9, apart=30), stopping=False) == EXIT_FAILED
    word = last_word()
    assert word is not None
    assert (word.cause, word.message) == (Cause.COMMUNICATION_ERROR, "Process 1 is silent")


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr("finetune_trainer.run.main", lambda: 7)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    assert launch.main(["--nnodes=3", "--node-rank=2", "--master-addr=job-0", "--master-port=4000"]) == 7
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("2", "3", "0")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("job-0", "4000")


class Clock:
    """Time that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("finetune_trainer.stopping.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock for stopping.py."""
    return Clock(monkeypatch)


def test_outside_of_training_a_stop_leaves_at_once(clock: Clock) -> None:
    stop = Stop()
    stop.beat()
    assert not stop.verdict(clock.now)
    stop.request()
    assert "outside of training" in stop.verdict(clock.now)


def test_a_stop_waits_for_the_boundary_of_slow_steps(clock: Clock) -> None:
    stop = Stop()
    stop.beat(stepping=True)
    for _ in range(3):
        clock.now += 20
        stop.beat()
    stop.request()
    clock.now += 59
    assert not stop.verdict(clock.now), "steps of 20 s are known"
    clock.now += 2
    assert "no step ended" in stop.verdict(clock.now)


def test_compiling_the_first_steps_does_not_make_a_stop_patient(clock: Clock) -> None:
    stop = Stop()
    stop.beat(stepping=True)
    for seconds in (30, 20, *[0.5] * 20):
        clock.now += seconds
        stop.beat()
    assert stop.patience() == PATIENCE


def test_a_stop_gives_up_on_a_dead_gang(clock: Clock) -> None:
    stop = Stop()
    stop.beat(stepping=True)
    for _ in range(5):
        clock.now += 0.1
        stop.beat()
    clock.now += 500  # hung for long before it was asked to stop
    stop.request()
    clock.now += PATIENCE - 0.5
    assert not stop.verdict(clock.now)
    clock.now += 1
    assert "no step ended" in stop.verdict(clock.now)


def test_the_last_save_is_never_left(clock: Clock) -> None:
    stop = Stop()
    stop.beat(stepping=True)
    stop.request()
    with stop.never_leave():
        clock.now += 10_000
        assert not stop.verdict(clock.now)


def test_agent_options_leave_sigterm_to_us() -> None:
    assert launch._loudness(-signal.SIGKILL) < launch._loudness(1) < launch._loudness(-signal.SIGABRT)
    assert launch._loudness(EXIT_STOPPED) == launch._loudness(-signal.SIGTERM)
