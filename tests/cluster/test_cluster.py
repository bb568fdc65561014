"""The test clusters themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import PATIENCE
from tests.cluster import images
from tests.cluster.access import Access, Object
from tests.cluster.cluster import Cluster
from tests.cluster.sandbox import commands


def job(name: str, pod_spec: Object, *, workers: int = 2) -> Object:
    """An Indexed Job whose pods carry the label app=NAME."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completions": workers,
            "parallelism": workers,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"restartPolicy": "Never", "subdomain": name, **pod_spec},
            },
        },
    }


GPU_POD: Object = {
    "containers": [{"name": "trainer", "image": "trainer", "resources": {"limits": {"nvidia.com/gpu": 8}}}]
}


@pytest.fixture
def simulated(cluster: Access) -> Cluster:
    if not isinstance(cluster, Cluster):
        pytest.skip("this test is about our own cluster, and KUBECONFIG names another")
    return cluster


@pytest.mark.cluster
def test_a_gpu_job_runs_on_simulated_nodes_until_the_test_ends_it(simulated: Cluster, namespace: str) -> None:
    simulated.apply(job("train", GPU_POD), namespace=namespace)
    pods = simulated.wait_for_pods("app=train", 2, namespace=namespace)
    assert {pod["spec"]["nodeName"] for pod in pods} == {"gpu-1", "gpu-2"}

    for pod in pods:
        simulated.kubectl(
            "annotate", "pod", pod["metadata"]["name"], "-n", namespace, "simulate.finetune.dev/exit-code=0"
        )
    simulated.wait_for_condition("batch/v1/jobs", "train", "Complete", namespace=namespace)


@pytest.mark.cluster
def test_a_simulated_pod_fails_with_the_given_code_reason_and_message(simulated: Cluster, namespace: str) -> None:
    failing = job("train", GPU_POD, workers=1)
    failing["spec"]["template"]["metadata"]["annotations"] = {
        "simulate.finetune.dev/exit-code": "137",
        "simulate.finetune.dev/reason": "OOMKilled",
        "simulate.finetune.dev/message": "out of memory",
        "simulate.finetune.dev/after": "100ms",
    }
    simulated.apply(failing, namespace=namespace)
    simulated.wait_for_condition("batch/v1/jobs", "train", "Failed", namespace=namespace)
    pods = simulated.objects("pods", namespace=namespace)
    terminated = pods[0]["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (terminated["exitCode"], terminated["reason"], terminated["message"]) == (
        137,
        "OOMKilled",
        "out of memory",
    )


@pytest.mark.cluster
def test_a_simulated_node_can_die_and_come_back(simulated: Cluster) -> None:
    simulated.add_simulated_node("gpu-mortal")
    simulated.kubectl("annotate", "node", "gpu-mortal", "simulate.finetune.dev/not-ready=true")
    simulated.wait_for(
        "nodes",
        lambda nodes: "node.kubernetes.io/unreachable" in str(nodes[0]["spec"].get("taints")),
        name="gpu-mortal",
        namespace=None,
    )
    simulated.kubectl("annotate", "node", "gpu-mortal", "simulate.finetune.dev/not-ready-")
    simulated.wait_for_condition("nodes", "gpu-mortal", "Ready", namespace=None)
    simulated.kubectl("delete", "node", "gpu-mortal")


def traces(cluster: Cluster) -> list[str]:
    """Processes, mounts, cgroups and files that mention the cluster's state folder, as seen from outside."""
    mark = cluster.sandbox.state.name
    running = [command for _, command in commands()]
    found = [c.replace(b"\0", b" ").decode(errors="replace") for c in running if mark.encode() in c]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if mark in line]
    # os.walk passes over what is taken away meanwhile.
    found += [f"{at}/{name}" for at, names, _ in os.walk("/sys/fs/cgroup") for name in names if name.startswith(mark)]
    found += [str(cluster.sandbox.state)] if cluster.sandbox.state.exists() else []
    return found


def interfaces() -> str:
    return subprocess.run(["ip", "-oneline", "link"], text=True, capture_output=True, check=True).stdout


def wait_until_no_trace_is_left(cluster: Cluster) -> None:
    deadline = time.monotonic() + PATIENCE
    while left := traces(cluster):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.cluster
def test_a_cluster_whose_owner_was_killed_vanishes(simulated: Cluster) -> None:
    own = "from tests.cluster.cluster import Cluster; c = Cluster(); c.start(); print(c.sandbox.state, flush=True)"
    command = [sys.executable, "-c", f"{own}; input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        state = Path(owner.stdout.readline().strip())
        assert (state / "kubeconfig").exists()
        owner.kill()
    orphan = Cluster()
    orphan.sandbox = SimpleNamespace(state=state)  # type: ignore[assignment]
    wait_until_no_trace_is_left(orphan)


def python_pod(code: str, name: str, node: str, env: dict[str, str] | None = None) -> Object:
    """A pod that runs Python code with this test's own virtual environment."""
    volumes, mounts = images.host_python()
    container: Object = {
        "name": "python",
        "image": images.BASE,
        "command": [sys.executable, "-c", code],
        "env": [{"name": key, "value": value} for key, value in (env or {}).items()],
        "volumeMounts": mounts,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "test"}},
        "spec": {
            "restartPolicy": "Never",
            "hostname": name,
            "subdomain": "peers",
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [container],
            "volumes": volumes,
        },
    }


PEERS: Object = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "peers"},
    "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app": "test"}},
}
SERVE = "import http.server as h; h.HTTPServer(('', 8000), h.SimpleHTTPRequestHandler).serve_forever()"
ASK_PEER = """
import time, urllib.request
while True:  # until the name is known and the server listens
    try:
        print(urllib.request.urlopen("http://server.peers:8000/etc/hostname").read().decode())
        break
    except OSError:
        time.sleep(0.1)
"""
WRITE_AND_STAY = """
import threading
open("/cache/file", "wb").write(bytes(4 << 20))
threading.Event().wait()
"""
S3_FROM_POD = """
import os
from obstore.store import S3Store
store = S3Store("bucket", endpoint=os.environ["S3"], access_key_id=os.environ["KEY"],
                secret_access_key=os.environ["SECRET"], region="us-east-1", client_options={"allow_http": True})
print(bytes(store.get("from/outside").bytes()).decode())
store.put("from/pod", b"hello from the pod")
"""


@pytest.mark.e2e
def test_pods_of_two_nodes_talk_by_the_names_of_a_headless_service(e2e_cluster: Cluster, e2e_namespace: str) -> None:
    server, client = python_pod(SERVE, "server", "node-1"), python_pod(ASK_PEER, "client", "node-2")
    e2e_cluster.apply(PEERS, server, client, namespace=e2e_namespace)
    e2e_cluster.wait_for_pod("client", "Succeeded", namespace=e2e_namespace)
    assert e2e_cluster.kubectl("logs", "client", "-n", e2e_namespace).strip() == "server"

    address = e2e_cluster.get("pods", "server", namespace=e2e_namespace)["status"]["podIP"]
    host, port = e2e_cluster.forward(address, 8000)
    with urllib.request.urlopen(f"http://{host}:{port}/etc/hostname") as answer:
        assert answer.read().strip() == b"server"


@pytest.mark.e2e
def test_a_pod_is_evicted_that_writes_more_than_its_volume_may_hold(e2e_cluster: Cluster, e2e_namespace: str) -> None:
    pod = python_pod(WRITE_AND_STAY, "writer", "node-1")
    pod["spec"]["volumes"].append({"name": "cache", "emptyDir": {"sizeLimit": "1Mi"}})
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": "cache", "mountPath": "/cache"})
    e2e_cluster.apply(pod, namespace=e2e_namespace)
    evicted = e2e_cluster.wait_for_pod("writer", "Failed", namespace=e2e_namespace)["status"]
    assert evicted["reason"] == "Evicted"
    assert 'Usage of EmptyDir volume "cache" exceeds the limit "1Mi"' in evicted["message"]


@pytest.mark.e2e
def test_s3_holds_what_pods_and_the_outside_put_there(e2e_cluster: Cluster, e2e_namespace: str) -> None:
    obstore = pytest.importorskip("obstore.store", reason="needs the trainer extra")
    s3 = e2e_cluster.s3
    s3.make_bucket("bucket")
    store = obstore.S3Store(
        "bucket",
        endpoint=s3.outside,
        access_key_id=s3.access_key,
        secret_access_key=s3.secret_key,
        region="us-east-1",
        client_options={"allow_http": True},
    )
    store.put("from/outside", b"hello from outside")
    env = {"S3": s3.inside, "KEY": s3.access_key, "SECRET": s3.secret_key}
    e2e_cluster.apply(python_pod(S3_FROM_POD, "client", "node-1", env), namespace=e2e_namespace)
    e2e_cluster.wait_for_pod("client", "Succeeded", namespace=e2e_namespace)
    assert e2e_cluster.kubectl("logs", "client", "-n", e2e_namespace).strip() == "hello from outside"
    assert bytes(store.get("from/pod").bytes()) == b"hello from the pod"


@pytest.mark.e2e
def test_prometheus_scrapes_ports_named_metrics(e2e_cluster: Cluster, e2e_namespace: str) -> None:
    url = e2e_cluster.start_prometheus()
    serve = "from prometheus_client import start_http_server as s; s(8000)[1].join()"
    pod = python_pod(serve, "server", "node-1")
    pod["spec"]["containers"][0]["ports"] = [{"name": "metrics", "containerPort": 8000}]
    e2e_cluster.apply(pod, namespace=e2e_namespace)
    query = f'{url}/api/v1/query?query=up{{namespace="{e2e_namespace}"}}'.replace('"', "%22")
    deadline = time.monotonic() + PATIENCE
    while True:
        with urllib.request.urlopen(query) as answer:
            found = json.load(answer)["data"]["result"]
        if found and found[0]["value"][1] == "1":
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    assert found[0]["metric"]["pod"] == "server"


@pytest.mark.e2e
def test_a_node_whose_kubelet_died_is_noticed_and_comes_back(e2e_cluster: Cluster) -> None:
    node = e2e_cluster.node("node-2")
    node.stop_kubelet()
    e2e_cluster.wait_for("nodes", lambda nodes: nodes[0]["spec"].get("taints"), name="node-2", namespace=None)
    node.start_kubelet()
    e2e_cluster.wait_for_condition("nodes", "node-2", "Ready", namespace=None)


@pytest.mark.e2e
def test_a_second_full_cluster_runs_beside_and_leaves_nothing_when_stopped(e2e_cluster: Cluster) -> None:
    before = interfaces()
    with Cluster("full") as second:
        second.apply(python_pod(SERVE, "server", "node-1"))
        second.wait_for_pod("server", "Running")
        second.kubectl("delete", "pod", "server")
        second.wait_gone("pods")
        second.apply(python_pod(SERVE, "server", "node-2"))
        second.wait_for_pod("server", "Running")
        assert interfaces() == before
    assert traces(second) == []
    assert interfaces() == before
    assert e2e_cluster.get("nodes", "node-1", namespace=None)
