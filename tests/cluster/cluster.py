"""`Cluster`: a Kubernetes of this machine, started and stopped by one object."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Literal

from tests.cluster import binaries, control_plane
from tests.cluster.access import Access
from tests.cluster.sandbox import Sandbox

Profile = Literal["simulated", "full"]


class Cluster(Access):
    """A control plane with simulated GPU nodes ("simulated"), or with real kubelets, DNS and S3 ("full").

    Use it as a context manager, or call `start()` and `stop()`. With FINETUNE_KEEP_STATE=1 the state folder with all
    logs is kept.
    """

    def __init__(self, profile: Profile = "simulated") -> None:
        self.profile = profile
        self.simulated = profile == "simulated"

    def start(self) -> None:
        """Starts everything and returns once pods can run."""
        check_machine()
        bin = binaries.require(binaries.SIMULATED)
        state = Path(tempfile.mkdtemp(prefix="finetune-"))
        self.sandbox = Sandbox(state, keep_state=bool(os.environ.get("FINETUNE_KEEP_STATE")))
        try:
            super().__init__(control_plane.start(self.sandbox, bin), state / "scratch")
            control_plane.start_simulation(self.sandbox, bin)
            for number in (1, 2):
                self.add_simulated_node(f"gpu-{number}")
            self.wait_for("serviceaccounts", bool, name="default")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends everything; no process, interface, mount, cgroup or file is left."""
        self.sandbox.close()

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.stop()

    def add_simulated_node(self, name: str, gpus: int = 8, labels: dict[str, str] | None = None) -> None:
        """Adds a node whose pods are simulated, and waits until it is ready."""
        self.kubectl("create", "-f", "-", input=json.dumps(control_plane.simulated_node(name, gpus, labels or {})))
        self.wait_for_condition("nodes", name, "Ready", namespace=None)

    def forward(self, host: str, port: int) -> tuple[str, int]:
        """Makes an address inside, say of a pod, reachable from outside; returns the local (host, port)."""
        return self.sandbox.forward(host, port)

    def run_inside(
        self, *argv: str | Path, input: str | None = None, check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the cluster's namespaces, where pods, services' addresses and S3 are reachable."""
        return self.sandbox.run(*argv, input=input, check=check, timeout=timeout)


def check_machine() -> None:
    """Raises `UnavailableError` where no sandbox can be made."""
    if os.geteuid():
        raise binaries.UnavailableError("the test cluster needs root, for namespaces of its own")
    if lacking := [
        program for program in ("unshare", "nsenter", "ip", "mount", "openssl") if not shutil.which(program)
    ]:
        raise binaries.UnavailableError(
            f"the test cluster needs {', '.join(lacking)}: install util-linux, iproute2, openssl"
        )
