"""A real node in a sandbox: a containerd and a kubelet of its own, pods on a bridge that all nodes share.

Used by `cluster.py`. Node N has the address 10.85.0.N and gives its pods addresses from 10.85.0.(50·N) on.
"""

from __future__ import annotations

import contextlib
import json
import signal
import textwrap
from pathlib import Path

from tests.cluster import images
from tests.cluster.sandbox import Sandbox

BRIDGE = "pods0"
NETWORK = "10.85.0"
GATEWAY = f"{NETWORK}.1"  # also where DNS and S3 listen
CGROUPS = Path("/sys/fs/cgroup")
NEEDS = ("containerd", "runc", "/usr/lib/cni/bridge", "debootstrap")


def cgroup_folders(name: str) -> list[Path]:
    """Where a cgroup of that name is: one folder with cgroup v2, one per controller with v1."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS / name]
    return [controller / name for controller in sorted(CGROUPS.iterdir()) if not controller.is_symlink()]


def make_cgroup(name: str) -> None:
    """Makes what a kubelet demands to find of its `cgroupRoot`."""
    for folder in cgroup_folders(name):
        controllers = folder.parent / "cgroup.controllers"
        if folder.parent == CGROUPS and controllers.exists():  # v2: children have the controllers enabled above them
            for controller in controllers.read_text().split():
                with contextlib.suppress(OSError):
                    (folder.parent / "cgroup.subtree_control").write_text(f"+{controller}")
        folder.mkdir(exist_ok=True)
        if folder.parent.name == "cpuset":  # v1: starts empty, and then nothing may run in it
            for file in ("cpuset.cpus", "cpuset.mems"):
                (folder / file).write_text((folder.parent / file).read_text())


def available_memory() -> int:
    """The bytes that programs may still take on this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


class Node:
    """`start()` brings it up with the pause and base images; it is not waited until it is Ready."""

    def __init__(self, number: int, sandbox: Sandbox, bin: Path, cgroup: str) -> None:
        self.number = number
        self.name = f"node-{number}"
        self.address = f"{NETWORK}.{number}"
        self._sandbox = sandbox
        self._bin = bin
        self._cgroup = cgroup
        self._folder = sandbox.state / self.name
        self._socket = self._folder / "containerd.sock"

    def start(self) -> None:
        self._folder.mkdir()
        make_cgroup(self._cgroup)
        (self._folder / "cni").mkdir()
        (self._folder / "cni" / "10-pods.conflist").write_text(json.dumps(self._network()))
        (self._folder / "containerd.toml").write_text(self._containerd())
        (self._folder / "kubelet.json").write_text(json.dumps(self._kubelet()))
        (self._folder / "images").mkdir()
        if available_memory() > 12 << 30:
            # Unpacking and removing thousands of small files takes a disk 10 s each, and memory none.
            self._sandbox.run("mount", "-t", "tmpfs", self.name, self._folder / "images")
        name = f"containerd-{self.number}"
        self._sandbox.start(name, "containerd", "--config", self._folder / "containerd.toml")
        self._sandbox.wait_until(name, lambda: self._ctr("version", check=False))
        self.import_image(images.pause_archive())
        self.start_kubelet()
        self.import_image(images.base_archive())

    def start_kubelet(self) -> None:
        """Starts the kubelet, for the first time or again."""
        self._sandbox.start(
            f"kubelet-{self.number}",
            self._bin / "kubelet",
            f"--config={self._folder}/kubelet.json",
            f"--kubeconfig={self._sandbox.state}/kubeconfig-inside",
            f"--root-dir={self._folder}/kubelet",
            f"--cert-dir={self._folder}/pki",
            f"--hostname-override={self.name}",
            f"--node-ip={self.address}",
        )

    def stop_kubelet(self) -> None:
        """Kills the kubelet as if it had crashed; its containers go on."""
        self._sandbox.stop(f"kubelet-{self.number}", grace=0)

    def kill_containers(self) -> None:
        """Kills every process in the node's pods."""
        for task in self._ctr("tasks", "list", "--quiet").split():
            self._ctr("tasks", "kill", "--all", "--signal", str(int(signal.SIGKILL)), task, check=False)

    def import_image(self, archive: Path) -> None:
        """Makes the image of a docker archive available to pods of this node."""
        self._ctr("images", "import", archive)

    def _ctr(self, *args: str | Path, check: bool = True) -> str:
        done = self._sandbox.run("ctr", "--address", self._socket, "--namespace", "k8s.io", *args, check=check)
        return "" if done.returncode else done.stdout or "done"

    def _containerd(self) -> str:
        plugins = next(path for path in ("/usr/lib/cni", "/opt/cni/bin") if (Path(path) / "bridge").exists())
        return textwrap.dedent(f"""\
            version = 2
            root = "{self._folder}/images"
            state = "{self._folder}/state"
            disabled_plugins = ["io.containerd.internal.v1.opt"]
            [grpc]
              address = "{self._socket}"
            [plugins."io.containerd.grpc.v1.cri"]
              sandbox_image = "{images.PAUSE}"
              restrict_oom_score_adj = true  # lowering one's score may be forbidden here
              [plugins."io.containerd.grpc.v1.cri".cni]
                bin_dir = "{plugins}"
                conf_dir = "{self._folder}/cni"
            """)

    def _network(self) -> dict[str, object]:
        start = 50 * self.number
        addresses = {
            "subnet": f"{NETWORK}.0/24",
            "rangeStart": f"{NETWORK}.{start}",
            "rangeEnd": f"{NETWORK}.{start + 49}",
            "gateway": GATEWAY,
        }
        bridge = {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": f"{self._folder}/addresses",
                "ranges": [[addresses]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        return {"cniVersion": "0.4.0", "name": self.name, "plugins": [bridge]}

    def _kubelet(self) -> dict[str, object]:
        endpoint = f"unix://{self._socket}"
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "healthzPort": 10248 + 100 * self.number,
            # Only the sandbox can reach it, and in it everybody is root.
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "containerRuntimeEndpoint": endpoint,
            "imageServiceEndpoint": endpoint,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "clusterDomain": "cluster.local",
            "clusterDNS": [GATEWAY],
            "resolvConf": "",
            "podLogsDir": f"{self._folder}/logs",
            "makeIPTablesUtilChains": False,
            # The disk is the machine's: however full it is, no pod is evicted for it and no image removed. A pod that
            # writes more than its own limits allow is.
            "evictionHard": {"nodefs.available": "1Mi", "memory.available": "1Mi"},
            "volumeStatsAggPeriod": "5s",  # a minute, left to itself
            "imageGCHighThresholdPercent": 100,
            "nodeStatusUpdateFrequency": "2s",
            "nodeLeaseDurationSeconds": 8,
            "maxPods": 40,
        }
