"""Processes in network, pid and mount namespaces of their own, and ways in from outside.

Used by `cluster.py`. Knows nothing of Kubernetes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests import PATIENCE
from tests.cluster import init


def commands() -> Iterator[tuple[int, bytes]]:
    """Pid and command line of every process of the machine; arguments end with a NUL."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            yield int(folder.name), (folder / "cmdline").read_bytes()


class SandboxError(RuntimeError):
    """Something in the sandbox did not start or ended by itself; the message ends with its last log lines."""


def answers(url: str, *, authority: Path | None = None, token: str = "") -> bool:
    """Whether a web server of the sandbox says OK."""
    tls = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=authority and str(authority)))
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), tls)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with direct.open(request, timeout=5):
            return True
    except OSError:
        return False


class Sandbox:
    """Starts empty; `close()` or the end of this process ends everything in it."""

    # Programs write to fixed paths there. Empty ones of our own keep the machine's clean, and several clusters apart.
    PRIVATE = ("/run", "/var/lib/kubelet", "/var/lib/cni", "/var/log/containers", "/var/log/pods")

    def __init__(self, state: Path, *, cgroups: Sequence[Path] = (), keep_state: bool = False) -> None:
        self.state = state.resolve()
        self.logs = self.state / "log"
        self.logs.mkdir(parents=True)
        self._cgroups = [str(cgroup) for cgroup in cgroups]
        self._keep_state = keep_state
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        private = [folder for folder in self.PRIVATE if not self.state.is_relative_to(folder)]
        settings = {
            "fd": theirs.fileno(),
            "state": "" if keep_state else str(self.state),
            "cgroups": self._cgroups,
            "private": private,
        }
        command = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        command += [sys.executable, "-I", init.__file__, json.dumps(settings)]
        with (self.logs / "init.log").open("wb") as log:
            self._unshare = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C is for us: we then end the sandbox in order
            )
        theirs.close()
        if not self._control.recv(1 << 16):
            raise SandboxError(f"the sandbox did not start: {self.log_tail('init')}")

    @property
    def unshare_pid(self) -> int:
        """`kill -9` of this process ends everything in the sandbox at once."""
        return self._unshare.pid

    @property
    def pid(self) -> int:
        """The pid, as seen from outside, of the sandbox's process 1: its namespaces are /proc/PID/ns."""
        return int(Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text())

    def _ask(self, do: str, *fds: int, **request: Any) -> dict[str, Any]:
        with self._lock:
            socket.send_fds(self._control, [json.dumps({"do": do, **request}).encode()], fds)
            reply = self._control.recv(1 << 20)
        if not reply:
            raise SandboxError(f"the sandbox has ended: {self.log_tail('init')}")
        answer: dict[str, Any] = json.loads(reply)
        if "error" in answer:
            raise SandboxError(f"{do} {request}: {answer['error']}")
        return answer

    def start(self, name: str, *argv: str | Path, env: dict[str, str] | None = None) -> None:
        """Starts a long-running process; its output goes to `log/NAME.log` of the state folder."""
        log = str(self.logs / f"{name}.log")
        # Nothing in here is reached through the machine's proxy.
        inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        self._ask("start", name=name, argv=[str(a) for a in argv], env={**inherited, **(env or {})}, log=log)

    def stop(self, name: str, grace: float = 5) -> None:
        """Ends a process by SIGTERM, after `grace` seconds (at once with 0) by SIGKILL, and waits for its end."""
        self._ask("stop", name=name, grace=grace)

    def signal(self, name: str, number: int) -> None:
        """Sends a signal, say SIGSTOP, to a process."""
        self._ask("signal", name=name, number=number)

    def run(
        self, *argv: str | Path, input: str | None = None, check: bool = True, timeout: float | None = PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command inside to its end and returns its output."""
        inside = [
            "nsenter",
            f"--target={self.pid}",
            "--net",
            "--mount",
            "--pid",
            "--",
            *(str(a) for a in argv),
        ]
        done = subprocess.run(inside, input=input, text=True, capture_output=True, timeout=timeout, check=False)
        if check and done.returncode:
            raise SandboxError(f"{' '.join(inside[6:])} failed ({done.returncode}): {done.stderr or done.stdout}")
        return done

    def forward(self, host: str, port: int) -> tuple[str, int]:
        """Makes an address of the sandbox reachable from outside; returns the local (host, port)."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            local: tuple[str, int] = server.getsockname()
            self._ask("forward", server.fileno(), host=host, port=port)
        return local

    def wait_until(self, what: str, ready: Callable[[], object], timeout: float = PATIENCE) -> None:
        """Asks `ready` every few milliseconds; fails early, with its log, when a process has ended meanwhile."""
        deadline = time.monotonic() + timeout
        while not ready():
            if ended := self._ask("exits"):
                logs = "\n".join(f"--- {name} ended ({code})\n{self.log_tail(name)}" for name, code in ended.items())
                raise SandboxError(f"{what} is not ready:\n{logs}")
            if time.monotonic() > deadline:
                raise SandboxError(f"{what} is not ready after {timeout:.0f} s; logs are in {self.logs}")
            time.sleep(0.05)

    def log_tail(self, name: str, lines: int = 30) -> str:
        """The last lines a process wrote."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join((self.logs / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])
        return ""

    def close(self) -> None:
        """Ends every process, and removes mounts, interfaces, cgroups and the state folder."""
        self._control.close()
        try:
            self._unshare.wait(20)
        except subprocess.TimeoutExpired:
            self._unshare.kill()
            self._unshare.wait()
        # Process 1 has done this already, unless somebody killed it.
        init.remove_cgroups(self._cgroups)
        if not self._keep_state:
            shutil.rmtree(self.state, ignore_errors=True)
