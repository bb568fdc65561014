"""What Flux, kstatus and Argo CD make of FineTuneJobs, asked of their own libraries.

``judges/`` is a Go module of its own: its libraries go with Flux' versions, not with those of the test cluster.
``python -m tests.chart.judges`` builds it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.chart.charts import ROOT, Object
from tests.cluster import binaries

MODULE = Path(__file__).parent / "judges"
HEALTH = ROOT / "gitops/argocd/resource_customizations/finetune.dev/FineTuneJob/health.lua"
FLUX = ROOT / "gitops/flux/jobs.yaml"


@dataclass(frozen=True)
class Verdict:
    """What the three say of one object. An error is told as such."""

    flux: str
    """By the expressions of gitops/flux/jobs.yaml: Current, Failed, InProgress."""
    kstatus: str
    """Without them: the same words."""
    argo: Any
    """What the script of gitops/argocd answers: status and message."""


def judge(objects: Iterable[Object]) -> list[Verdict]:
    """One verdict an object."""
    flux = next(o for o in yaml.safe_load_all(FLUX.read_text()) if o["kind"] == "Kustomization")
    (expressions,) = flux["spec"]["healthCheckExprs"]
    asked = {"flux": expressions, "argo": HEALTH.read_text(), "objects": list(objects)}
    done = subprocess.run([program()], input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Verdict(**verdict) for verdict in json.loads(done.stdout)]


def program() -> Path:
    """The program, built once a machine (a minute)."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(MODULE.iterdir()))).hexdigest()
    path = binaries.cache() / "bin" / f"judges-{digest[:12]}"
    with binaries.locked(path):
        if not path.exists():
            binaries.build(".", path, MODULE)
    return path


if __name__ == "__main__":
    print(program())
