"""What a full cluster offers besides Kubernetes: DNS, S3, and Prometheus on demand.

Used by `cluster.py`. All of it listens on the pods' gateway, so that pods reach it by that address.
"""

from __future__ import annotations

import json
import secrets
import textwrap
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import binaries
from tests.cluster.node import GATEWAY
from tests.cluster.sandbox import Sandbox

S3_PORT = 7070
PROMETHEUS_PORT = 9090


@dataclass(frozen=True)
class S3:
    """An S3 server: its address for pods and for the outside, and its keys. The region is us-east-1."""

    inside: str
    outside: str
    access_key: str
    secret_key: str
    folder: Path

    def make_bucket(self, name: str) -> None:
        """Makes an empty bucket."""
        (self.folder / name).mkdir()


def start_dns(sandbox: Sandbox, bin: Path) -> None:
    """Starts a CoreDNS that answers for the cluster's names at once, and for no other."""
    # Two blocks: within one, `template` would come before `kubernetes` and answer everything.
    (sandbox.state / "Corefile").write_text(
        textwrap.dedent(f"""\
            cluster.local in-addr.arpa {{
              bind {GATEWAY}
              errors
              kubernetes cluster.local in-addr.arpa {{
                kubeconfig {sandbox.state}/kubeconfig-inside test
                pods insecure
                ttl 0
              }}
            }}
            . {{
              bind {GATEWAY}
              template ANY ANY {{
                rcode NXDOMAIN
              }}
            }}
            """)
    )
    sandbox.start("coredns", bin / "coredns", "-conf", sandbox.state / "Corefile")


def start_s3(sandbox: Sandbox, bin: Path) -> S3:
    """Starts versitygw upon a folder; its buckets are the folder's folders."""
    folder = sandbox.state / "s3"
    folder.mkdir()
    host, port = sandbox.forward(GATEWAY, S3_PORT)
    s3 = S3(
        inside=f"http://{GATEWAY}:{S3_PORT}",
        outside=f"http://{host}:{port}",
        access_key="finetune",
        secret_key=secrets.token_hex(16),
        folder=folder,
    )
    keys = {"ROOT_ACCESS_KEY": s3.access_key, "ROOT_SECRET_KEY": s3.secret_key}
    listen = f"{GATEWAY}:{S3_PORT}"
    sandbox.start("versitygw", bin / "versitygw", "--port", listen, "--health", "/health", "posix", folder, env=keys)
    sandbox.wait_until("S3", lambda: answers(f"{s3.outside}/health"))
    return s3


# Debian's Prometheus is built without the discovery of Kubernetes: a file of targets is kept current instead
# (Cluster.start_prometheus), with the labels that a PodMonitor would give.
PROMETHEUS_CONFIG = """\
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{folder}/rules/*.yaml"]
scrape_configs:
- job_name: pods
  honor_labels: true
  file_sd_configs: [{{files: ["{folder}/targets.json"], refresh_interval: 1s}}]
"""


def start_prometheus(sandbox: Sandbox, rules: str = "") -> str:
    """Starts a Prometheus that scrapes the targets in its folder's ``targets.json`` each second; returns its URL
    outside.

    `rules` is the text of a rule file, as in `spec` of a PrometheusRule.
    """
    folder = sandbox.state / "prometheus"
    (folder / "rules").mkdir(parents=True)
    if rules:
        (folder / "rules" / "rules.yaml").write_text(rules)
    write_targets(folder / "targets.json", [])
    config = PROMETHEUS_CONFIG.format(folder=folder)
    (folder / "prometheus.yaml").write_text(config)
    host, port = sandbox.forward(GATEWAY, PROMETHEUS_PORT)
    sandbox.start(
        "prometheus",
        binaries.prometheus() / "prometheus",
        f"--config.file={folder}/prometheus.yaml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={GATEWAY}:{PROMETHEUS_PORT}",
    )
    url = f"http://{host}:{port}"
    sandbox.wait_until("Prometheus", lambda: answers(f"{url}/-/ready"))
    return url


def write_targets(path: Path, pods: list[dict[str, Any]]) -> None:
    """Ports named "metrics" or "http" of running pods, as targets."""
    found = []
    for pod in pods:
        address, metadata = pod.get("status", {}).get("podIP"), pod["metadata"]
        for container in pod["spec"]["containers"] if address else []:
            labels = {"namespace": metadata["namespace"], "pod": metadata["name"], "container": container["name"]}
            for port in container.get("ports", []):
                if port.get("name") in ("metrics", "http"):
                    found.append({"targets": [f"{address}:{port['containerPort']}"], "labels": labels})
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(found))
    unfinished.rename(path)


def answers(url: str) -> bool:
    """Whether a web server says OK."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False
