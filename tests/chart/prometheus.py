"""Prometheus and promtool: those on the PATH, else Debian's package unpacked into the tests' cache."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_operator.cluster.processes import free_port
from tests.cluster import binaries


def program(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``."""
    if found := shutil.which(name):
        return found
    return str(binaries.prometheus() / name)


def promtool(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs promtool. Failing is an answer too."""
    command = [program("promtool"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=False)


class Server:
    """A Prometheus over a folder of blocks."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str, **query: Any) -> Any:
        """The ``data`` of an answer; a refused query raises ValueError with Prometheus' words."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error).get("error", str(error))) from error

    def query(self, expr: str, at: int) -> list[Any]:
        """An instant query."""
        return list(self.get("query", query=expr, time=at)["result"])

    def query_range(self, expr: str, since: int, until: int, step: int) -> list[Any]:
        """A range query."""
        return list(self.get("query_range", query=expr, start=since, end=until, step=step)["result"])


@contextlib.contextmanager
def serve(openmetrics: str, folder: Path) -> Iterator[Server]:
    """A Prometheus that knows these samples."""
    text = folder / "samples.txt"
    text.write_text(openmetrics)
    made = promtool("tsdb", "create-blocks-from", "openmetrics", text, folder / "data")
    assert made.returncode == 0, made.stderr
    (folder / "prometheus.yml").write_text("scrape_configs: []\n")
    address = f"127.0.0.1:{free_port()}"
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--storage.tsdb.retention.time=10y",
        f"--web.listen-address={address}",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        _wait_until_ready(process)
        yield Server(address)
    finally:
        process.terminate()
        process.wait(10)


def _wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "Server is ready to receive web requests" in line:
            # What it says from now on is read, so that it never waits for us.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return
    raise RuntimeError("Prometheus does not start:\n" + "".join(said[-20:]))
