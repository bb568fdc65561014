"""Process 1 of a sandbox: starts, signals and reaps its processes, and carries TCP connections into it.

Started by `sandbox.py` in fresh network, pid and mount namespaces; standard library only, never imports the project.
It obeys one JSON request at a time on a socket. When that socket closes, also because the test process was killed,
it kills every process of the sandbox, removes its cgroups and its state folder, and exits: nothing is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MNT_DETACH = 2


class Init:
    """The requests are the methods named `do_…`; each returns what goes back as JSON."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.loop = asyncio.get_running_loop()
        self.done = asyncio.Event()
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.exits: dict[int, asyncio.Future[int]] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop.add_signal_handler(signal.SIGCHLD, self.reap)
        self.loop.add_reader(control, self.receive)

    def reap(self) -> None:
        """Collects dead children, our own as well as orphans (containerd's shims) that fell to process 1."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = found
                if (exit_ := self.exits.get(pid)) and not exit_.done():
                    exit_.set_result(os.waitstatus_to_exitcode(status))

    def receive(self) -> None:
        message, fds, _, _ = socket.recv_fds(self.control, 1 << 20, 1)
        if not message:
            self.loop.remove_reader(self.control)
            self.done.set()
            return
        task = self.loop.create_task(self.answer(json.loads(message), fds))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def answer(self, request: dict[str, Any], fds: list[int]) -> None:
        try:
            reply = await getattr(self, f"do_{request.pop('do')}")(*fds, **request)
        except Exception as error:  # whatever it is belongs to the caller, process 1 must live on
            reply = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(OSError):
            self.control.send(json.dumps(reply or {}).encode())

    async def do_start(self, name: str, argv: list[str], env: dict[str, str], log: str) -> dict[str, Any]:
        with Path(log).open("ab") as output:
            child = subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self.children[name] = child
        self.exits[child.pid] = self.loop.create_future()
        return {"pid": child.pid}

    async def do_stop(self, name: str, grace: float) -> dict[str, Any]:
        """SIGTERM, then SIGKILL once `grace` seconds are over; with a grace of 0 SIGKILL at once."""
        child = self.children.pop(name)
        exit_ = self.exits[child.pid]
        if not exit_.done():
            child_signal = signal.SIGTERM if grace else signal.SIGKILL
            os.kill(child.pid, child_signal)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(exit_), grace or None)
        if not exit_.done():
            os.kill(child.pid, signal.SIGKILL)
        return {"exit": await exit_}

    async def do_signal(self, name: str, number: int) -> None:
        os.kill(self.children[name].pid, number)

    async def do_exits(self) -> dict[str, Any]:
        """The exit codes of the processes that ended without being asked to."""
        ended = {name: self.exits[child.pid] for name, child in self.children.items()}
        return {name: exit_.result() for name, exit_ in ended.items() if exit_.done()}

    async def do_forward(self, fd: int, host: str, port: int) -> None:
        """Carries what connects to a listening socket of the outside to `host:port` as seen from in here.

        A socket stays in the network namespace that created it, whoever accepts on it: so no process per connection
        and none outside is needed.
        """

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                far_reader, far_writer = await asyncio.open_connection(host, port)
            except OSError:
                writer.transport.abort()
                return
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
            for each in (writer, far_writer):
                each.close()

        await asyncio.start_server(connected, sock=socket.socket(fileno=fd))


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies one direction of a connection to its end; a broken connection is dropped on both sides."""
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.transport.abort()


def kill_all() -> None:
    """Ends every process of this pid namespace but ourselves, and waits for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def remove_cgroups(cgroups: Iterable[str]) -> None:
    """Removes cgroup folders, children first; the kernel lets go of killed processes only after a moment."""
    for cgroup in cgroups:
        deadline = time.monotonic() + 60
        while Path(cgroup).exists() and time.monotonic() < deadline:
            for folder, _, _ in os.walk(cgroup, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()
            time.sleep(0.01)


def mounts_below(folder: str) -> list[str]:
    """Where something is mounted in `folder`, the deepest first."""
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return sorted((point for point in points if point.startswith(folder + "/")), reverse=True)


def remove_state(folder: str) -> None:
    """Removes the state folder, but never what containers or volumes have mounted there from elsewhere."""
    umount = ctypes.CDLL(None, use_errno=True).umount2
    for point in mounts_below(folder):
        umount(point.encode().decode("unicode_escape").encode(), MNT_DETACH)  # mountinfo escapes blanks
    if not mounts_below(folder):
        shutil.rmtree(folder, ignore_errors=True)


async def main(fd: int, state: str, cgroups: list[str], private: list[str]) -> None:
    """Prepares the namespaces, answers requests until the socket closes, then cleans up."""
    # Mounts must travel between the kubelets and their containers, which systemd's default allows and unshare undoes.
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    for folder in private:
        Path(folder).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "sandbox", folder], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    control = socket.socket(fileno=fd)
    control.setblocking(False)
    init = Init(control)
    control.send(b"{}")
    await init.done.wait()
    kill_all()
    remove_cgroups(cgroups)
    if state:
        remove_state(state)
    os._exit(0)  # nothing is left to end in order


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
