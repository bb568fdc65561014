"""The trainer container's command: starts this pod's processes and tells what became of them.

``python -m finetune_trainer.launch --nnodes N --nproc-per-node G --node-rank R --master-addr H --master-port P``

One process per pod runs right here: a launcher beside it would cost its import of torch before the worker may even
start. For more, torchrun's elastic agent is used in library form with a static rendezvous and without restarts:
recovery recreates the gang (docs/architecture.md). What torchrun does not do is done here: the worker's own exit
code, a termination message for a worker that was killed, and all the time the pod has for a save after SIGTERM.
"""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_api.run import EXIT_FAILED, EXIT_STOPPED, MASTER_PORT, Termination
from finetune_trainer.faults import describe_exit, last_word, leave_word

SAVE_TIME = 24 * 3600
"""Seconds the workers get after SIGTERM: the pod's grace period ends it, not torchrun's 30 s. Workers that can no
longer reach a step boundary leave by themselves (``stopping.py``)."""


AT_ONCE = 5
"""Seconds within which the first failures of a pod are looked at together."""


def main(arguments: list[str] | None = None) -> int:
    """Run the pod's processes; the exit code is theirs."""
    options = _options(arguments)
    if options.nproc_per_node == 1:
        os.environ.update(
            RANK=str(options.node_rank),
            LOCAL_RANK="0",
            WORLD_SIZE=str(options.nnodes),
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR=options.master_addr,
            MASTER_PORT=str(options.master_port),
        )
        from finetune_trainer.run import main as run

        return run()
    return _agent(options)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer.launch", description=__doc__.splitlines()[0])
    parser.add_argument("--nnodes", type=int, default=1, help="pods of the run")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes of this pod, one per GPU")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this pod, from 0")
    parser.add_argument("--master-addr", default="127.0.0.1", help="name of pod 0")
    parser.add_argument("--master-port", type=int, default=MASTER_PORT)
    return parser.parse_args(arguments)


def _agent(options: argparse.Namespace) -> int:
    # Blocked before any thread exists, and passed on by one thread of ours. The agent would otherwise take it as its
    # own end, and kill the workers 30 s later.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.nproc_per_node)))
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVE_TIME)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    options_of_newer: dict[str, Any] = (
        {"signals_to_handle": "SIGINT"} if hasattr(LaunchConfig, "signals_to_handle") else {}
    )
    config = LaunchConfig(
        min_nodes=options.nnodes,
        max_nodes=options.nnodes,
        nproc_per_node=options.nproc_per_node,
        run_id="finetune",
        rdzv_backend="static",
        rdzv_endpoint=f"{options.master_addr}:{options.master_port}",
        rdzv_configs={"rank": options.node_rank, "timeout": 24 * 3600},
        max_restarts=0,
        monitor_interval=1,
        **options_of_newer,
    )
    stopping = threading.Event()
    threading.Thread(target=_pass_on, args=(stopping,), name="sigterm", daemon=True).start()
    try:
        elastic_launch(config, sys.executable)("-m", "finetune_trainer.run")
    except ChildFailedError as error:
        return _after(error, stopping.is_set())
    except KeyboardInterrupt:
        return EXIT_STOPPED
    return 0


def _pass_on(stopping: threading.Event) -> None:
    """SIGTERM goes to every worker, and to nobody else."""
    signal.sigwait([signal.SIGTERM])
    stopping.set()
    for child in _workers():
        try:
            os.kill(child, signal.SIGTERM)
        except ProcessLookupError:
            continue
    if not _workers():  # nothing was started yet
        leave_word(Termination(cause=Cause.TERMINATED, message="Stopped before it began.", exit_code=EXIT_STOPPED))
        os._exit(EXIT_STOPPED)


def _workers() -> list[int]:
    """Process ids of this process's children that run the trainer."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        for child in children:
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if b"finetune_trainer.run" in command:
                found.append(int(child))
    return found


def _after(error: Any, stopping: bool) -> int:
    """The exit code of the worker that ended first, and a word for it where it left none."""
    # What ended later did so because torchrun made it, with SIGTERM and 30 s later with SIGKILL.
    first = min(failure.timestamp for failure in error.failures.values())
    failures = {rank: failure for rank, failure in error.failures.items() if failure.timestamp <= first + AT_ONCE}
    rank, failure = min(failures.items(), key=lambda item: _loudness(item[1].exitcode))
    code = int(failure.exitcode)
    if stopping or code == EXIT_STOPPED:
        codes = {int(other.exitcode) for other in failures.values()}
        if codes <= {EXIT_STOPPED, -signal.SIGTERM}:
            leave_word(Termination(cause=Cause.TERMINATED, message="Stopped on request.", exit_code=EXIT_STOPPED))
            return EXIT_STOPPED
    if code == -signal.SIGABRT:
        message = (
            f"Process {rank} gave up (SIGABRT). Most often NCCL's watchdog does that, when a peer takes no part in a "
            "collective for too long: its own message, or that of its node, tells why."
        )
        leave_word(_instead(Cause.COMMUNICATION_ERROR, message, code, rank))
        return 128 - code
    if code < 0:
        why = ": most often the host's memory ran out." if code == -signal.SIGKILL else "."
        leave_word(_instead(Cause.KILLED, f"Process {rank} {describe_exit(code)}{why}", code, rank))
        return 128 - code
    word = last_word()
    if word is None or word.exit_code != code:
        message = f"Process {rank} {describe_exit(code)} and left no message."
        leave_word(_instead(Cause.TRAINER_ERROR, message, code, rank))
        word = last_word()
    return word.exit_code if word is not None and word.exit_code > 0 else code or EXIT_FAILED


def _instead(cause: Cause, message: str, code: int, rank: int) -> Termination:
    """A word for a worker that left none; another worker's tells where the run stood."""
    told = last_word() or Termination(cause=cause)
    return told.model_copy(update={"cause": cause, "message": message, "exit_code": code, "rank": rank})


def _loudness(code: int) -> int:
    """Among workers that failed within one look (1 s): which one was the cause rather than the echo."""
    if code in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL):
        return 0
    if code > 0 and code != EXIT_STOPPED:
        return 1
    return 2 if code == -signal.SIGABRT else 3


if __name__ == "__main__":
    sys.exit(main())
