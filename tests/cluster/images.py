"""The container images of the test cluster, as docker archives in the cache: pause, a Debian base, and real ones.

No registry is reachable where tests run: the base comes from the package mirror that this machine's apt uses, and
archives are imported into each node.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster.binaries import UnavailableError, cache, locked, require, require_debian, say

PAUSE = "localhost/pause:1"
#: This machine's own Debian or Ubuntu with its Python 3: also runs a virtual environment mounted from the machine.
BASE = "localhost/finetune-base:1"
BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates")


def pause_archive() -> Path:
    """The image that holds a pod's namespaces."""
    binary = require(["pause"]) / "pause"
    archive = cache() / "images" / f"pause-{binary.parent.name}.tar"
    with locked(archive):
        if not archive.exists():
            layer = io.BytesIO()
            with tarfile.open(fileobj=layer, mode="w") as tar:
                tar.add(binary, arcname="pause")
            layer.seek(0)
            write_archive(archive, PAUSE, layer, {"Entrypoint": ["/pause"]})
    return archive


def base_archive() -> Path:
    """A minimal Debian with Python, made by debootstrap."""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    recipe = hashlib.sha256(" ".join(("2", *BASE_PACKAGES)).encode()).hexdigest()[:8]
    archive = cache() / "images" / f"base-{release}-{recipe}.tar"
    with locked(archive):
        if archive.exists():
            return archive
        require_debian(["debootstrap"])
        say(f"making the base image {archive} by debootstrap: about 1 to 2 minutes, once per machine")
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="finetune-base-") as scratch:
            root = Path(scratch) / "root"
            packages = f"--include={','.join(BASE_PACKAGES)}"
            command = ["debootstrap", "--variant=minbase", packages, release, str(root), apt_mirror(release)]
            done = subprocess.run(command, text=True, capture_output=True)
            if done.returncode:
                raise UnavailableError(f"{' '.join(command[:4])} failed: {done.stdout[-2000:]}{done.stderr[-500:]}")
            for folder in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
                shutil.rmtree(root / folder, ignore_errors=True)
            # A Python below a home folder may be mounted there, and must be reachable for who is not root.
            (root / "root").chmod(0o755)
            with tempfile.TemporaryFile(dir=scratch) as layer:
                with tarfile.open(fileobj=layer, mode="w") as tar:
                    for entry in sorted(root.iterdir()):
                        if entry.name not in ("dev", "proc", "sys"):
                            tar.add(entry, arcname=entry.name)
                layer.seek(0)
                environment = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
                write_archive(archive, BASE, layer, {"Env": environment, "Cmd": ["bash"]})
        say(f"  base image {time.monotonic() - started:.0f} s")
    return archive


def apt_mirror(release: str) -> str:
    """The address from which this machine's apt gets the given release."""
    form = "$(RELEASE) $(COMPONENT) $(REPO_URI)"
    listed = subprocess.run(["apt-get", "indextargets", "--format", form], text=True, capture_output=True, check=True)
    for line in listed.stdout.splitlines():
        name, component, address = line.split()
        if (name, component) == (release, "main"):
            return address
    raise UnavailableError(f"apt-get knows no mirror of {release} main: is /etc/apt/sources.list complete?")


def write_archive(path: Path, tag: str, layer: Any, config: Mapping[str, Any]) -> None:
    """Writes a docker archive of one uncompressed layer, given as an open tar file."""
    digest = hashlib.file_digest(layer, "sha256").hexdigest()
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    image = {
        "architecture": architecture,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{"created_by": "tests/cluster/images.py"}],  # one entry per layer, or buildah builds nothing on it
    }
    described = json.dumps(image).encode()
    name = f"{hashlib.sha256(described).hexdigest()}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": [tag], "Layers": [f"{digest}/layer.tar"]}]).encode()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with tarfile.open(unfinished, "w") as tar:
        for member, content in ((name, described), ("manifest.json", manifest)):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo(f"{digest}/layer.tar")
        info.size = layer.seek(0, io.SEEK_END)
        layer.seek(0)
        tar.addfile(info, layer)
    unfinished.rename(path)


def build(
    containerfile: Path, context: Path, tag: str, target: Path, build_args: Mapping[str, str] | None = None
) -> Path:
    """Builds an image with buildah upon the base image, which BASE_IMAGE names, and writes it to `target`.

    The machine's certificates and pip configuration are mounted while building, so that package registries are
    reached there as they are here; the image keeps nothing of them.
    """
    require_debian(["buildah", "runc"])
    storage = cache() / "buildah"
    buildah = ["buildah", "--root", str(storage / "root"), "--runroot", str(storage / "run")]
    arguments = {"BASE_IMAGE": BASE, **(build_args or {})}
    mounts = [f"{source}:{place}:ro" for source, place in _build_mounts().items()]
    with locked(storage):
        say(f"building the image {tag}")
        started = time.monotonic()
        _run([*buildah, "pull", "--quiet", f"docker-archive:{base_archive()}"])
        _run(
            [*buildah, "bud", "--layers", "--isolation", "chroot", "--network", "host", "--pull-never"]
            + [part for mount in mounts for part in ("--volume", mount)]
            + [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
            + ["--tag", tag, "--file", str(containerfile), str(context)]
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        _run([*buildah, "push", "--quiet", tag, f"docker-archive:{unfinished}:{tag}"])
        unfinished.rename(target)
        say(f"  {tag} {time.monotonic() - started:.0f} s")
    return target


def keep_newest(pattern: str, count: int = 2) -> None:
    """Deletes the older archives of one image from the cache: every change of the sources makes another."""
    found = sorted((cache() / "images").glob(pattern), key=lambda path: path.stat().st_mtime)
    for path in found[:-count]:
        path.unlink(missing_ok=True)


def _build_mounts() -> dict[str, str]:
    mounts = {"/etc/ssl/certs": "/etc/ssl/certs"} if Path("/etc/ssl/certs").is_dir() else {}
    home = Path.home()
    for pip in (Path("/etc/pip.conf"), home / ".config/pip/pip.conf", home / ".pip/pip.conf"):
        if pip.is_file():
            return {**mounts, str(pip): "/etc/pip.conf"}
    return mounts


def _run(command: list[str]) -> None:
    done = subprocess.run(command, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def host_python(*folders: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes and mounts by which a pod of the base image runs `sys.executable` as this process does.

    It sees, read-only and at the same paths, this virtual environment, the Python it was made from, and `folders`.
    """
    paths = dict.fromkeys(str(path.resolve()) for path in (Path(sys.prefix), Path(sys.base_prefix), *folders))
    paths.pop("/usr", None)  # the system's Python is in the base image already
    volumes = [{"name": f"host-{i}", "hostPath": {"path": path, "type": "Directory"}} for i, path in enumerate(paths)]
    mounts = [{"name": f"host-{i}", "mountPath": path, "readOnly": True} for i, path in enumerate(paths)]
    return volumes, mounts
