"""The test clusters themselves."""

from __future__ import annotations

import pytest

from tests.cluster.access import Access, Object
from tests.cluster.cluster import Cluster


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
