"""etcd, API server, controller manager and scheduler in a sandbox, and simulated GPU nodes.

Used by `cluster.py`. The API server listens on the address of the `kubernetes` service itself, so that this service
works without a kube-proxy.
"""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
from pathlib import Path

from tests.cluster.sandbox import Sandbox, answers

SERVICES = "10.96.0.0/16"
API = "10.96.0.1"
STAGES = Path(__file__).with_name("stages.yaml")
GANGS = "--feature-gates=GenericWorkload=true,GangScheduling=true"
"""Kubernetes' own gang scheduling, which is off by default: without a PodGroup it changes nothing."""


def start(sandbox: Sandbox, bin: Path) -> Path:
    """Starts all but the nodes, waits until the API answers; returns a kubeconfig for the outside."""
    state = sandbox.state
    token = secrets.token_hex(16)
    (state / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
    certificate, key, account_key = make_keys(state)
    sandbox.run("ip", "address", "add", f"{API}/32", "dev", "lo")
    sandbox.start(
        "etcd",
        bin / "etcd",
        f"--data-dir={state}/etcd",
        "--unsafe-no-fsync",  # the data may be lost with the machine
        "--log-level=warn",
    )
    sandbox.start(
        "kube-apiserver",
        bin / "kube-apiserver",
        "--etcd-servers=http://127.0.0.1:2379",
        f"--bind-address={API}",
        "--secure-port=443",
        f"--advertise-address={API}",
        f"--service-cluster-ip-range={SERVICES}",
        f"--tls-cert-file={certificate}",
        f"--tls-private-key-file={key}",
        f"--token-auth-file={state}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={account_key}",
        f"--service-account-signing-key-file={account_key}",
        "--allow-privileged",
        "--kubelet-preferred-address-types=InternalIP",
        "--shutdown-delay-duration=0s",
        "--runtime-config=scheduling.k8s.io/v1alpha2=true",
        GANGS,
    )
    inside = write_kubeconfig(state / "kubeconfig-inside", API, 443, certificate, token)
    host, port = sandbox.forward(API, 443)
    outside = write_kubeconfig(state / "kubeconfig", host, port, certificate, token)
    readyz = f"https://{host}:{port}/readyz"
    sandbox.wait_until("the API server", lambda: answers(readyz, authority=certificate, token=token))
    sandbox.start(
        "kube-controller-manager",
        bin / "kube-controller-manager",
        f"--kubeconfig={inside}",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
        "--use-service-account-credentials",
        f"--service-account-private-key-file={account_key}",
        f"--root-ca-file={certificate}",
        # Made for the one cluster of one test: it need not be spared, and waits for 20 requests a second take seconds.
        "--kube-api-qps=500",
        "--kube-api-burst=500",
        # A dead node is noticed after 16 s instead of 40: the tests of faults wait for it.
        "--node-monitor-period=2s",
        "--node-monitor-grace-period=16s",
        GANGS,
    )
    sandbox.start(
        "kube-scheduler",
        bin / "kube-scheduler",
        f"--kubeconfig={inside}",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
        GANGS,
    )
    return outside


def start_simulation(sandbox: Sandbox, bin: Path) -> None:
    """Starts kwok, which plays the kubelet for nodes with the annotation `kwok.x-k8s.io/node: fake`."""
    sandbox.start(
        "kwok",
        bin / "kwok",
        f"--kubeconfig={sandbox.state}/kubeconfig-inside",
        f"--config={STAGES}",
        "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
        "--node-lease-duration-seconds=10",
    )


def simulated_node(name: str, gpus: int, labels: dict[str, str]) -> dict[str, object]:
    """The Node object of a simulated machine."""
    resources = {"cpu": "192", "memory": "2Ti", "ephemeral-storage": "10Ti", "pods": "110"}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **labels},
        },
        "status": {"capacity": resources, "allocatable": resources},
    }


def make_keys(state: Path) -> tuple[Path, Path, Path]:
    """The API server's certificate (its own authority) and key, and the key that signs service account tokens."""
    certificate, key, account_key = state / "apiserver.crt", state / "apiserver.key", state / "accounts.key"
    names = ["IP:127.0.0.1", f"IP:{API}", "DNS:localhost"]
    names += [f"DNS:kubernetes{suffix}" for suffix in ("", ".default", ".default.svc", ".default.svc.cluster.local")]
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key)]
    subject = ["-subj", "/CN=kube-apiserver", "-addext", f"subjectAltName={','.join(names)}"]
    _openssl("req", "-x509", "-days", "30", *new_key, *subject, "-out", str(certificate))
    _openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", str(account_key))
    return certificate, key, account_key


def _openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)


def write_kubeconfig(path: Path, host: str, port: int, certificate: Path, token: str) -> Path:
    """A kubeconfig of the administrator; JSON is YAML."""
    authority = base64.b64encode(certificate.read_bytes()).decode()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "test",
                "cluster": {"server": f"https://{host}:{port}", "certificate-authority-data": authority},
            }
        ],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin", "namespace": "default"}}],
        "current-context": "test",
    }
    path.write_text(json.dumps(config, indent=1))
    path.chmod(0o600)
    return path
