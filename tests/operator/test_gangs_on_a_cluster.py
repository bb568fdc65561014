"""Jobs of several workers that share too few nodes, and GPUs that are claimed: the real operator and scheduler."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.access import Object
from tests.cluster.cluster import Cluster
from tests.operator.jobs_on_a_cluster import (
    JOBS,
    condition,
    end,
    fine_tune_job,
    wait_for_reason,
    wait_for_state,
    workers,
)

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]

SLOT = "finetune.test/slot"


@pytest.fixture
def slots(cluster: Cluster, own: str, namespace: str) -> Iterator[list[str]]:
    """Two nodes for the jobs of one test, by name."""
    nodes = [f"{own}-0", f"{own}-1"]
    cluster.kubectl("label", "node", *nodes, f"{SLOT}={namespace}")
    yield nodes
    cluster.kubectl("label", "node", "-l", f"{SLOT}={namespace}", f"{SLOT}-")


def job(namespace: str, name: str, replicas: int = 2, gates: bool = False, **spec: Any) -> Object:
    """A job whose workers take a whole node of the test each."""
    pod: Object = {"nodeSelector": {SLOT: namespace}}
    pod |= {"schedulingGates": [{"name": "finetune.test/turn"}]} if gates else {}
    return fine_tune_job(name, workers={"replicas": replicas, "gpusPerWorker": 8, "template": {"spec": pod}}, **spec)


def pods(cluster: Cluster, namespace: str, *, placed: int, there: int) -> list[Object]:
    """The pods of the namespace, by name, once so many are there and so many of them have a node."""

    def so(found: list[Object]) -> list[Object] | None:
        on_nodes = [pod for pod in found if pod["spec"].get("nodeName")]
        right = len(found) == there and len(on_nodes) == placed
        return sorted(found, key=lambda pod: pod["metadata"]["name"]) if right else None

    found = cluster.wait_for("pods", so, namespace=namespace)
    assert found
    return found


def test_of_two_gangs_that_hold_half_of_the_nodes_each_one_gives_way(
    cluster: Cluster, namespace: str, slots: list[str]
) -> None:
    patience = {"first": "10s", "second": "5m"}
    for name, long in patience.items():
        cluster.apply(job(namespace, name, gates=True, recovery={"pendingTimeout": long}), namespace=namespace)
    waiting = pods(cluster, namespace, placed=0, there=4)

    def let_go(*indices: int) -> None:
        for index in indices:
            name = waiting[index]["metadata"]["name"]
            patch = '[{"op": "remove", "path": "/spec/schedulingGates"}]'
            cluster.kubectl("patch", "pod", name, "-n", namespace, "--type=json", "-p", patch)

    let_go(0, 2)
    held = pods(cluster, namespace, placed=2, there=4)
    assert {pod["spec"].get("nodeName") for pod in held} == {*slots, None}
    let_go(1, 3)

    given_back = wait_for_reason(cluster, namespace, "first", "Progressing", "BackingOff")
    assert given_back["message"].startswith("Nodes were given back to others; the next attempt starts in ")
    first = cluster.get(JOBS, "first", namespace=namespace)["status"]["attempts"][0]
    assert (first["cause"], first["counted"]) == ("PartlyPlaced", False)
    assert first["message"].startswith("Only 1 of 2 workers had a node for 1")
    assert "The scheduler said: 0/" in first["message"]
    for pod in workers(cluster, namespace, "second"):
        end(cluster, pod, 0)
    second = wait_for_state(cluster, namespace, "second", "Succeeded")
    assert len(second["attempts"]) == 1


def test_a_gang_is_placed_whole_or_not_at_all(cluster: Cluster, own: str, namespace: str, slots: list[str]) -> None:
    cluster.apply(job(namespace, "tune", replicas=3, profile="gangs"), namespace=namespace)
    said = wait_for_reason(cluster, namespace, "tune", "PodsReady", "Unschedulable")
    assert said["message"].startswith("0 of 3 workers run. No node for tune-a1-")
    pods(cluster, namespace, placed=0, there=3)
    group = cluster.get("scheduling.k8s.io/v1alpha2/podgroups", "tune-x3", namespace=namespace)
    assert group["metadata"]["ownerReferences"][0]["name"] == "tune"

    cluster.kubectl("label", "node", f"{own}-2", f"{SLOT}={namespace}")
    assert len(workers(cluster, namespace, "tune", count=3)) == 3
    # The next attempt may be of another size, which this PodGroup could not be changed to.
    change = {"spec": {"workers": {"replicas": 2}, "suspend": True}}
    for part in (change, {"spec": {"suspend": False}}):
        cluster.kubectl("patch", "ftj", "tune", "-n", namespace, "--type=merge", "-p", json.dumps(part))
        if "workers" in part["spec"]:
            wait_for_state(cluster, namespace, "tune", "Suspended")
    assert len(workers(cluster, namespace, "tune", attempt=2)) == 2


POD_GROUPS = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: podgroups.scheduling.x-k8s.io, annotations: {api-approved.kubernetes.io: "unapproved, for a test"}}
spec:
  group: scheduling.x-k8s.io
  names: {kind: PodGroup, plural: podgroups}
  scope: Namespaced
  versions:
  - name: v1alpha1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        properties: {spec: {type: object, properties: {minMember: {type: integer}}}}
"""


def test_a_scheduler_of_gangs_that_is_not_there_is_named_and_used_once_it_is(
    cluster: Cluster, namespace: str, slots: list[str]
) -> None:
    cluster.apply(job(namespace, "tune", profile="coscheduling"), namespace=namespace)
    said = wait_for_reason(cluster, namespace, "tune", "Reconciled", "ReconcileError")
    assert "The cluster serves no PodGroup of scheduling.x-k8s.io/v1alpha1, which gangScheduling" in said["message"]
    cluster.apply(POD_GROUPS)
    try:
        pods = workers(cluster, namespace, "tune")
        (group,) = cluster.objects("scheduling.x-k8s.io/v1alpha1/podgroups", namespace=namespace)
        assert group["spec"] == {"minMember": 2}
        label = "scheduling.x-k8s.io/pod-group"
        assert [pod["metadata"]["labels"][label] for pod in pods] == [group["metadata"]["name"]] * 2
        # Another attempt finds it there.
        cluster.kubectl("delete", "pod", pods[0]["metadata"]["name"], "-n", namespace, "--wait=false")
        workers(cluster, namespace, "tune", attempt=2)
    finally:
        cluster.kubectl("delete", "crd", "podgroups.scheduling.x-k8s.io")


CLAIMS = """
apiVersion: resource.k8s.io/v1
kind: DeviceClass
metadata: {name: gpus.finetune.test}
spec: {selectors: [{cel: {expression: 'device.driver == "gpus.finetune.test"'}}]}
---
apiVersion: resource.k8s.io/v1
kind: ResourceSlice
metadata: {name: NODE}
spec:
  driver: gpus.finetune.test
  nodeName: NODE
  pool: {name: NODE, generation: 1, resourceSliceCount: 1}
  devices: [{name: gpu-0}, {name: gpu-1}, {name: gpu-2}]
---
apiVersion: resource.k8s.io/v1
kind: ResourceClaimTemplate
metadata: {name: two-gpus}
spec:
  spec:
    devices:
      requests: [{name: gpus, exactly: {deviceClassName: gpus.finetune.test, count: 2}}]
"""


def test_gpus_by_dynamic_resource_allocation_alone(cluster: Cluster, namespace: str, slots: list[str]) -> None:
    cluster.apply(CLAIMS.replace("NODE", slots[1]), namespace=namespace)
    try:
        template = {
            "spec": {
                "resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "two-gpus"}],
                "containers": [{"name": "trainer", "resources": {"claims": [{"name": "gpus"}]}}],
            }
        }
        spec = {"replicas": 1, "gpusPerWorker": 2, "template": template}
        cluster.apply(fine_tune_job("tune", profile="dra", workers=spec), namespace=namespace)
        (pod,) = workers(cluster, namespace, "tune", count=1)
        assert pod["spec"]["nodeName"] == slots[1]
        (claim,) = cluster.objects("resource.k8s.io/v1/resourceclaims", namespace=namespace)
        assert len(claim["status"]["allocation"]["devices"]["results"]) == 2
        job = cluster.get(JOBS, "tune", namespace=namespace)
        assert condition(job, "Accepted")["status"] == "True"
    finally:
        cluster.kubectl("delete", "deviceclass/gpus.finetune.test", f"resourceslice/{slots[1]}")
