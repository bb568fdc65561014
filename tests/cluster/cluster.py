"""`Cluster`: a Kubernetes of this machine, started and stopped by one object."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal

from tests import PATIENCE
from tests.cluster import binaries, control_plane, images, node, services
from tests.cluster.access import Access
from tests.cluster.node import Node
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
        self.nodes: list[Node] = []
        self._prometheus = ""

    def start(self) -> None:
        """Starts everything, building first what is missing, and returns once pods can run."""
        check_machine()
        bin = binaries.require(binaries.SIMULATED if self.simulated else binaries.FULL)
        if not self.simulated:
            binaries.require_debian(node.NEEDS)
            images.pause_archive()
            images.base_archive()
        state = Path(tempfile.mkdtemp(prefix="finetune-"))
        # A cluster's cgroups are its own: several may run at the same time.
        cgroups = [] if self.simulated else [f"{state.name}-{number}" for number in (1, 2)]
        self.sandbox = Sandbox(
            state,
            cgroups=[folder for name in cgroups for folder in node.cgroup_folders(name)],
            keep_state=bool(os.environ.get("FINETUNE_KEEP_STATE")),
        )
        try:
            if not self.simulated:
                self._make_network()
            super().__init__(control_plane.start(self.sandbox, bin), state / "scratch")
            if self.simulated:
                control_plane.start_simulation(self.sandbox, bin)
                for number in (1, 2):
                    self.add_simulated_node(f"gpu-{number}")
            else:
                self._start_nodes(bin, cgroups)
            self.wait_for("serviceaccounts", bool, name="default")
        except BaseException:
            self.stop()
            raise

    def _make_network(self) -> None:
        """The bridge of the pods, which has the nodes' addresses too: so everything in the sandbox reaches all."""
        self.run_inside("ip", "link", "add", node.BRIDGE, "type", "bridge")
        for number in (1, 2):
            self.run_inside("ip", "address", "add", f"{node.NETWORK}.{number}/24", "dev", node.BRIDGE)
        self.run_inside("ip", "link", "set", node.BRIDGE, "up")

    def _start_nodes(self, bin: Path, cgroups: list[str]) -> None:
        services.start_dns(self.sandbox, bin)
        self._s3 = services.start_s3(self.sandbox, bin)
        self.nodes = [Node(number, self.sandbox, bin, cgroup) for number, cgroup in enumerate(cgroups, 1)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(Node.start, self.nodes))
        for each in self.nodes:
            self.wait_for_condition("nodes", each.name, "Ready", namespace=None)

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

    @property
    def s3(self) -> services.S3:
        """The S3 server of a full cluster."""
        return self._s3

    def node(self, name: str) -> Node:
        """The node of that name, "node-1" or "node-2" of a full cluster; kubelets stop and start by it."""
        return next(each for each in self.nodes if each.name == name)

    def import_image(self, archive: Path) -> None:
        """Makes the image of a docker archive available on all nodes of a full cluster."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda each: each.import_image(archive), self.nodes))

    def start_prometheus(self, rules: str = "") -> str:
        """Starts a Prometheus in a full cluster (see services.py), or gives the running one the rules.

        Returns its URL for the outside.
        """
        if not self._prometheus:
            self._prometheus = services.start_prometheus(self.sandbox, self, rules)
        elif rules:
            services.set_prometheus_rules(self.sandbox, rules)
        return self._prometheus

    def forward(self, host: str, port: int) -> tuple[str, int]:
        """Makes an address inside, say of a pod, reachable from outside; returns the local (host, port)."""
        return self.sandbox.forward(host, port)

    def run_inside(
        self, *argv: str | Path, input: str | None = None, check: bool = True, timeout: float = PATIENCE
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
