"""What a container is on one machine: a process tree that ends as a whole, and never outlives its owner.

Called by ``local.py``; and run as a program of its own (``python processes.py -- COMMAND``), which is the first process
of every local "container". Only the standard library is imported, so that this program starts in a few milliseconds.

A container runtime ends every process of a container with its first one. Here the same is done by a mark: an
environment variable that all processes of a pod inherit, whatever sessions and groups they make for themselves
(torchrun puts each rank into a session of its own). The first process holds the reading end of a pipe whose writing end
only the owner has: when the owner dies, by whatever signal, the pipe closes and the container ends. Linux only
(``/proc``, pidfd); elsewhere only the process group is ended.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import SystemRandom

MARK = "FINETUNE_LOCAL_POD"
"""Environment variable of every process of a pod: the pod's folder."""

GONE_WITHIN = 10.0
"""Seconds within which killed processes must be gone; longer only hangs in the kernel last."""
EXEC_WITHIN = 1.0
"""Seconds that a process may take to become another program."""

_PROC = Path("/proc")


def start(command: list[str], environment: Mapping[str, str], folder: Path, log: Path) -> "subprocess.Popen[bytes]":
    """Start a container: ``environment`` must hold :data:`MARK`. Ends with this process at the latest."""
    with log.open("ab") as output:
        return subprocess.Popen(
            # -I and -S: nothing of the user's environment reaches this first process, and nothing slow is imported
            [sys.executable, "-I", "-S", __file__, "--", *command],
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal is for the owner, not for the pods
        )


def end(mark: str, process: "subprocess.Popen[bytes] | None" = None, spare: Iterable[int] = ()) -> None:
    """SIGKILL every process whose mark is ``mark`` (or lies below that folder), and wait until none is left."""
    if process is not None and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if not _PROC.joinpath("self/environ").exists():
        return
    spared = {os.getpid(), *spare}
    deadline = time.monotonic() + GONE_WITHIN
    while handles := _kill(mark, spared):
        for handle in handles:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            os.close(handle)
        if time.monotonic() > deadline:
            return


def alive(mark: str) -> list[int]:
    """Processes with that mark, or one below it."""
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit() and _has(int(entry.name), mark)]


def _kill(mark: str, spared: set[int]) -> list[int]:
    """Kill by pidfd, so that a number that is used anew meanwhile cannot hit a stranger; the handles come back."""
    handles = []
    for pid in alive(mark):
        if pid in spared:
            continue
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            continue
        if not _has(pid, mark):
            os.close(handle)
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)  # type: ignore[attr-defined,unused-ignore]
        handles.append(handle)
    return handles


def _has(pid: int, mark: str) -> bool:
    try:
        variables = _environment(_PROC / str(pid)).split(b"\0")
    except OSError:
        return False
    prefix = f"{MARK}=".encode()
    value = next((v[len(prefix) :].decode(errors="replace") for v in variables if v.startswith(prefix)), "")
    return value == mark or value.startswith(mark.rstrip("/") + "/")


def _environment(process: Path) -> bytes:
    """The environment of a process. In the middle of an exec it shows none, and would be missed: that is waited for."""
    deadline = time.monotonic() + EXEC_WITHIN
    while not (found := (process / "environ").read_bytes()) and _has_one(process) and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


def _has_one(process: Path) -> bool:
    """A process has an environment, or will have one: the kernel is putting another program into it. Threads of the
    kernel's own have no program. (proc(5), ``env_start`` and ``env_end``.)"""
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    start, stop = fields[47:49]
    return (stop == "0" or start != stop) and (process / "exe").exists()


PORTS = range(20000, 32000)
"""Below the range the system itself takes ports from: none is taken between the choice and its use by chance."""


def free_port(taken: Iterable[int] = ()) -> int:
    """A TCP port of the loopback address that nobody listens on."""
    used = set(taken)
    for port in SystemRandom().sample(PORTS, k=len(PORTS)):
        if port in used:
            continue
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free")


def supervise(command: list[str]) -> int:
    """The first process of a container: run the command, pass SIGTERM on to it, end what it leaves behind.

    The code is the command's own; 128 + n where signal n killed it, as a kubelet reports it.
    """
    mark = os.environ.get(MARK, "")
    child: subprocess.Popen[bytes] | None = None
    told = sent = False

    def pass_on(*_: object) -> None:
        nonlocal told, sent
        told = True
        if child is not None and not sent:
            sent = True
            child.send_signal(signal.SIGTERM)

    def end_with_owner() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        end(mark)
        os._exit(128 + signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # a handler, not SIG_IGN: that would be inherited by the command
    signal.signal(signal.SIGTERM, pass_on)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", flush=True)
        return 127
    threading.Thread(target=end_with_owner, daemon=True).start()
    if told:
        pass_on()
    code = child.wait()
    end(mark)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[sys.argv.index("--") + 1 :]))
