"""Builds what the cluster runs from the pinned Go modules in `modules/`, once per machine.

    python -m tests.cluster.binaries [NAME…]

The binaries lie outside the checkout, in a folder named after the pinned versions, so that all clones share them.
All programs are in one Go module: so each library is compiled once, for all of them in one version.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

KUBERNETES = "1.36.3"
MODULES = Path(__file__).parent / "modules"
PACKAGES = {  # binary → Go package
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "kwok": "sigs.k8s.io/kwok/cmd/kwok",
    "kubelet": "k8s.io/kubernetes/cmd/kubelet",
    "coredns": "./coredns",
    "versitygw": "github.com/versity/versitygw/cmd/versitygw",
    "helm": "helm.sh/helm/v4/cmd/helm",
}
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
SIMULATED = (*CONTROL_PLANE, "kwok")
FULL = (*CONTROL_PLANE, "kubelet", "coredns", "versitygw")
# What the nodes need of Debian: program → package.
DEBIAN = {
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "debootstrap": "debootstrap",
    "buildah": "buildah",
    "gcc": "gcc",
}


class UnavailableError(RuntimeError):
    """Says in one line what this machine lacks, and what to do about it."""


def cache() -> Path:
    """The folder that clones share: `$FINETUNE_CACHE`, else `finetune-operator` in the user's cache folder."""
    if chosen := os.environ.get("FINETUNE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"


def folder() -> Path:
    """Where this checkout's versions of the binaries are, or will be."""
    digest = hashlib.sha256()
    for path in sorted(p for p in MODULES.rglob("*") if p.is_file()):
        digest.update(path.read_bytes())
    return cache() / "bin" / f"kubernetes-{KUBERNETES}-{digest.hexdigest()[:12]}"


def require(names: Iterable[str] = SIMULATED) -> Path:
    """Builds those of `names` that are missing; returns the folder that holds them."""
    target = folder()
    missing = [name for name in names if not (target / name).exists()]
    if not missing:
        return target
    if not shutil.which("go"):
        raise UnavailableError("Go is not installed, and Kubernetes is built from Go modules: install Go 1.26 or newer")
    with locked(target):
        missing = [name for name in missing if not (target / name).exists()]
        if missing:
            say(f"building {', '.join(missing)} into {target}: about 1 to 2 minutes each on 2 cores, once per machine")
        for name in missing:
            _build(name, target / name)
    return target


def _build(name: str, path: Path) -> None:
    started = time.monotonic()
    unfinished = path.with_name(f".{name}.{os.getpid()}")
    flags = f"-s -w -X k8s.io/component-base/version.gitVersion=v{KUBERNETES}"
    command = ["go", "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", flags]
    done = subprocess.run(
        [*command, "-o", str(unfinished), PACKAGES[name]],
        cwd=MODULES,
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"},
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise UnavailableError(f"go build {PACKAGES[name]} failed:\n{done.stderr[-3000:]}")
    unfinished.rename(path)  # whoever looks sees the whole binary or none
    say(f"  {name} {time.monotonic() - started:.0f} s")


def require_debian(programs: Iterable[str] = DEBIAN) -> None:
    """Installs the Debian packages of `programs` that are missing; without root or apt-get it says which."""
    lacking = sorted({DEBIAN[p] for p in programs if not (shutil.which(p) or Path(p).is_file())})
    if not lacking:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise UnavailableError(f"these packages are missing, and only root can install them: {' '.join(lacking)}")
    with locked(cache() / "apt"):
        say(f"installing {' '.join(lacking)}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *lacking]):
            done = subprocess.run(
                ["apt-get", "-o", "DPkg::Lock::Timeout=600", *command],
                env=environment,
                text=True,
                capture_output=True,
            )
            if done.returncode:
                raise UnavailableError(f"apt-get {command[0]} failed: {done.stderr[-2000:]}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes what belongs at `path`; its parent folder or itself is created."""
    path.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(line: str) -> None:
    """Progress goes to the terminal at once, past pytest's capture."""
    print(line, file=sys.__stderr__, flush=True)


if __name__ == "__main__":
    try:
        print(require(sys.argv[1:] or PACKAGES))
    except UnavailableError as error:
        sys.exit(str(error))
