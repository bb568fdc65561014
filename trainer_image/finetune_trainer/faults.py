"""From an exception to a cause and a sentence for the user, and the file in which a process leaves its last word.

Called by ``run.py`` and ``launch.py`` only. Knows the texts of torch, NCCL and gloo; never raises on its own.
Several processes of a pod share one termination file: the first real cause stands, and only the causes that
merely follow from another process's death (``ECHOES``) give way to it.
"""

import fcntl
import json
import os
import signal
import sys
from pathlib import Path

from finetune_api.causes import RETRY, Cause, Retry
from finetune_api.run import ENV_TERMINATION_LOG, EXIT_FAILED, EXIT_STOPPED, EXIT_USER, Termination
from finetune_trainer.outcome import RunError, disk_is_full, where_it_runs

ECHOES = frozenset({Cause.COMMUNICATION_ERROR, Cause.TERMINATED})
"""Causes that are often only the echo of what happened in another process."""

_COMMUNICATION = (
    "nccl",
    "gloo",
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket timeout",
    "timed out waiting",
    "process group",
    "tcpstore",
    "collective operation timeout",
)
_GPU = ("cuda error", "cuda driver", "cublas", "cudnn", "device-side assert", "nvml", "ecc error")


def diagnose(error: BaseException, *, phase: str = "", batch: str = "") -> tuple[Cause, str]:
    """The cause and a message for the user.

    ``phase`` is what the run was doing, ``batch`` the settings that decide over memory, in words.
    """
    if isinstance(error, RunError):
        return error.cause, error.message
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0][:600]
    lower = text.lower()
    during = f" while {phase}" if phase else ""
    torch = sys.modules.get("torch")
    if (torch is not None and isinstance(error, torch.OutOfMemoryError)) or "cuda out of memory" in lower:
        return Cause.OUT_OF_GPU_MEMORY, (
            f"The GPU's memory is full{during} ({batch or 'as configured'}). {first} Lower "
            "training.per_device_train_batch_size (raising gradient_accumulation_steps keeps the result), set "
            "training.gradient_checkpointing: true, shorten data.max_length, or raise "
            "deepspeed.zero_optimization.stage."
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in lower or "cannot allocate memory" in lower:
        return Cause.OUT_OF_MEMORY, f"The host's memory is full{during}. {first} Give the workers more memory."
    if disk_is_full(error):
        if "/dev/shm" in lower or "shared memory" in lower:
            remedy = where_it_runs(cluster="Raise shmSize of the job's profile.", machine="Give /dev/shm more room.")
            return Cause.OUT_OF_DISK, f"The shared memory is full{during}: {first} {remedy}"
        remedy = where_it_runs(
            cluster="Give the job's profile a larger cache (cache.sizeLimit, cache.claimName), or the pods a node or "
            "claim with more room.",
            machine="Make room, or name another folder by FINETUNE_CACHE or output.uri.",
        )
        return Cause.OUT_OF_DISK, f"A disk is full{during}: {first} {remedy}"
    if isinstance(error, ModuleNotFoundError):
        return Cause.INVALID_CONFIGURATION, (
            f"{text}{during}: the image lacks a Python package that the run needs. Add it to the image, or leave out "
            "what asks for it."
        )
    if isinstance(error, KeyboardInterrupt):
        return Cause.TERMINATED, "Interrupted from the keyboard."
    if torch is not None and _is_communication(error, lower):
        return Cause.COMMUNICATION_ERROR, (
            f"The connection to another process was lost{during}: {first} Most often that process ended; "
            "its own message tells why."
        )
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if (accelerator_error is not None and isinstance(error, accelerator_error)) or (
        isinstance(error, RuntimeError) and any(mark in lower for mark in _GPU)
    ):
        return Cause.GPU_ERROR, f"The GPU reported an error{during}: {first}"
    return Cause.TRAINER_ERROR, f"{type(error).__name__}{during}: {text[:1500]}"


def _is_communication(error: BaseException, lower: str) -> bool:
    import torch.distributed as dist

    kinds = tuple(
        kind
        for name in ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
        if (kind := getattr(dist, name, None)) is not None
    )
    if isinstance(error, kinds):
        return True
    return isinstance(error, RuntimeError) and any(mark in lower for mark in _COMMUNICATION)


def exit_code(cause: Cause) -> int:
    """What a process exits with after this cause."""
    if cause is Cause.SUCCEEDED:
        return 0
    if cause in (Cause.TERMINATED, Cause.SUSPENDED):
        return EXIT_STOPPED
    return EXIT_USER if RETRY[cause] is Retry.NEVER else EXIT_FAILED


def describe_exit(code: int) -> str:
    """An exit code in words: ``killed by SIGKILL`` or ``exited with 3``."""
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def leave_word(termination: Termination, path: str | None = None, *, over_echo: bool = True) -> bool:
    """Write the last word of this process, unless a better one stands there. True: it was written.

    ``path`` defaults to ``$FINETUNE_TERMINATION_LOG``; without that nothing is written. ``over_echo`` says that
    a word whose cause is in ``ECHOES`` may be replaced by one whose cause is not. The kubelet mounts the file,
    so it is rewritten in place, under a lock, and never renamed.
    """
    path = path if path is not None else os.environ.get(ENV_TERMINATION_LOG, "")
    if not path:
        return False
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            standing = _cause_of(file.read())
            if standing is not None and not (over_echo and standing in ECHOES and termination.cause not in ECHOES):
                return False
            file.seek(0)
            file.truncate()
            file.write(termination.to_message().encode())
            file.flush()
    except OSError as error:  # the exit code still speaks
        print(f"cannot write the termination message to {path}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def last_word(path: str | None = None) -> Termination | None:
    """What stands in the termination file, None where nothing readable does."""
    path = path if path is not None else os.environ.get(ENV_TERMINATION_LOG, "")
    try:
        return Termination.model_validate_json(Path(path).read_bytes()) if path else None
    except (OSError, ValueError):
        return None


def _cause_of(content: bytes) -> Cause | None:
    try:
        return Cause(json.loads(content)["cause"]) if content.strip() else None
    except (ValueError, KeyError, TypeError):
        return None
