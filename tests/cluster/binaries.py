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
import tempfile
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
    "pause": "./pause",
    "helm": "helm.sh/helm/v4/cmd/helm",
}
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
SIMULATED = (*CONTROL_PLANE, "kwok")
FULL = (*CONTROL_PLANE, "kubelet", "coredns", "versitygw", "pause")
# What comes from Debian: program → package.
DEBIAN = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "debootstrap": "debootstrap",
    "buildah": "buildah",
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
    with locked(target):
        missing = [name for name in missing if not (target / name).exists()]
        target.mkdir(exist_ok=True)
        if missing:
            say(f"building {', '.join(missing)} into {target}")
            say("  once per machine: about 10 minutes on 2 cores, or 1 where Go has its parts compiled already")
        for name in missing:
            build(PACKAGES[name], target / name)
    return target


def build(package: str, path: Path, module: Path = MODULES) -> None:
    """Builds a program of a Go module, to lie at `path`."""
    if not shutil.which("go"):
        raise UnavailableError("Go is not installed, and Kubernetes is built from Go modules: install Go 1.26 or newer")
    started = time.monotonic()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    flags = f"-s -w -X k8s.io/component-base/version.gitVersion=v{KUBERNETES}"
    command = ["go", "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", flags]
    done = subprocess.run(
        [*command, "-o", str(unfinished), package],
        cwd=module,
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"},
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise UnavailableError(f"go build {package} failed:\n{done.stderr[-3000:]}")
    unfinished.rename(path)  # whoever looks sees the whole binary or none
    say(f"  {path.name} {time.monotonic() - started:.0f} s")


def flat_s3() -> Path:
    """Builds the S3 server of `flat_s3/`; a module of its own, because it takes seconds and the others minutes."""
    module = MODULES.with_name("flat_s3")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(module.iterdir()))).hexdigest()[:12]
    target = cache() / "bin" / f"flat-s3-{digest}"
    if not target.exists():
        with locked(target):
            if not target.exists():
                build(".", target, module)
    return target


def require_debian(programs: Iterable[str] = DEBIAN) -> None:
    """Installs the Debian packages of `programs` that are missing; without root or apt-get it says which."""
    lacking = sorted({DEBIAN[p] for p in programs if not (shutil.which(p) or Path(p).is_file())})
    if not lacking:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise UnavailableError(f"these packages are missing, and only root can install them: {' '.join(lacking)}")
    with locked(cache() / "apt"):
        say(f"installing {' '.join(lacking)}")
        _apt_get("update", "-qq")
        _apt_get("install", "-y", "-qq", "--no-install-recommends", *lacking)


def prometheus() -> Path:
    """The folder with Debian's prometheus and promtool, unpacked into the cache: installing would start a service."""
    target = cache() / "prometheus"
    binaries = target / "usr" / "bin"
    if (binaries / "promtool").exists():
        return binaries
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise UnavailableError("Prometheus is taken from Debian's package, and there is no apt-get here")
    with locked(target), tempfile.TemporaryDirectory(dir=cache()) as scratch:
        if not (binaries / "promtool").exists():
            say("fetching Debian's prometheus package")
            if not os.geteuid():  # else the machine's package lists must do
                _apt_get("update", "-qq")
            _apt_get("download", "-qq", "prometheus", cwd=Path(scratch))
            package = next(Path(scratch).glob("prometheus_*.deb"))
            subprocess.run(["dpkg", "--extract", package, Path(scratch) / "unpacked"], check=True)
            (Path(scratch) / "unpacked").rename(target)
    return binaries


def _apt_get(*args: str, cwd: Path | None = None) -> None:
    done = subprocess.run(
        ["apt-get", "-o", "DPkg::Lock::Timeout=600", *args],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        cwd=cwd,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise UnavailableError(f"apt-get {args[0]} failed: {done.stderr[-2000:]}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes what belongs at `path`, whose parent folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
