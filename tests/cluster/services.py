"""What a full cluster offers besides Kubernetes: DNS, S3, and Prometheus on demand.

Used by `cluster.py`. All of it listens on the pods' gateway, so that pods reach it by that address.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import binaries
from tests.cluster.access import Access, CommandError, Object
from tests.cluster.node import GATEWAY
from tests.cluster.sandbox import Sandbox, answers

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


def start_prometheus(sandbox: Sandbox, access: Access, rules: str = "") -> str:
    """Starts a Prometheus that each second scrapes ports named "metrics" or "http" of all pods; returns its URL.

    `rules` is the text of a rule file, as in `spec` of a PrometheusRule.
    """
    folder = sandbox.state / "prometheus"
    folder.mkdir()
    (folder / "rules.yaml").write_text(rules or "groups: []")
    pods: Object = {"job_name": "pods", "honor_labels": True}
    # Debian's Prometheus is built without the discovery of Kubernetes: a file of targets is kept current instead.
    targets = folder / "pods.json"
    targets.write_text("[]")
    pods["file_sd_configs"] = [{"files": [str(targets)]}]
    threading.Thread(target=_keep_targets, args=(access, targets), name="prometheus-targets", daemon=True).start()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [f"{folder}/rules.yaml"],
        "scrape_configs": [pods],
    }
    (folder / "prometheus.yaml").write_text(json.dumps(config))
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


def set_prometheus_rules(sandbox: Sandbox, rules: str) -> None:
    """Gives a running Prometheus other rules."""
    (sandbox.state / "prometheus" / "rules.yaml").write_text(rules)
    sandbox.signal("prometheus", signal.SIGHUP)


def _keep_targets(access: Access, targets: Path) -> None:
    """Writes the pods to scrape, with the labels that a PodMonitor would give, as they come and go."""

    def write(pods: list[Object]) -> None:
        found = [
            {
                "targets": [f"{pod['status']['podIP']}:{port['containerPort']}"],
                "labels": {
                    "namespace": pod["metadata"]["namespace"],
                    "pod": pod["metadata"]["name"],
                    "container": container["name"],
                },
            }
            for pod in pods
            if pod["status"].get("podIP")
            for container in pod["spec"]["containers"]
            for port in container.get("ports", [])
            if port.get("name") in ("metrics", "http")
        ]
        unfinished = targets.with_suffix(".new")
        unfinished.write_text(json.dumps(found))
        unfinished.rename(targets)  # Prometheus sees each new file at once

    with contextlib.suppress(CommandError, OSError):  # the cluster has ended
        access.wait_for("pods", write, namespace=None, timeout=1e6)
