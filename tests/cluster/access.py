"""What tests do with a Kubernetes API, whoever runs it: kubectl, helm, apply, and waiting by watching.

`Cluster` is one of these; a cluster given by KUBECONFIG is a plain one.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from tests import PATIENCE
from tests.cluster import binaries

T = TypeVar("T")
Object = dict[str, Any]


class CommandError(RuntimeError):
    """A command ended with an error; the message holds what it said."""


class Access:
    """A Kubernetes API by its kubeconfig. Resources are named as in its paths: "pods", "batch/v1/jobs"."""

    #: Whether pods on nodes `gpu-N` are simulated, and obey the annotations described in stages.yaml.
    simulated = False

    def __init__(self, kubeconfig: Path, scratch: Path) -> None:
        """`scratch` takes what kubectl and helm keep, which is otherwise mixed up between clusters."""
        self.kubeconfig = kubeconfig
        self.scratch = scratch

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which kubectl, helm and Kubernetes clients talk to this cluster."""
        return {
            **os.environ,
            "PATH": f"{binaries.folder()}:{os.environ['PATH']}",
            "KUBECONFIG": str(self.kubeconfig),
            "KUBECACHEDIR": str(self.scratch / "kubectl"),
            "HELM_CACHE_HOME": str(self.scratch / "helm"),
            "HELM_CONFIG_HOME": str(self.scratch / "helm"),
            "HELM_DATA_HOME": str(self.scratch / "helm"),
        }

    def _command(
        self, *argv: str, input: str | None = None, check: bool = True, timeout: float = PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            argv,
            input=input,
            text=True,
            capture_output=True,
            env=self.environment,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise CommandError(f"{' '.join(argv)[:500]} failed ({done.returncode}):\n{done.stderr or done.stdout}")
        return done

    def kubectl(self, *args: str, input: str | None = None, timeout: float = PATIENCE) -> str:
        """Runs kubectl and returns what it printed; raises `CommandError` when it fails."""
        return self._command("kubectl", *args, input=input, timeout=timeout).stdout

    def try_kubectl(self, *args: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs kubectl where failing is an answer too."""
        return self._command("kubectl", *args, input=input, check=False)

    def helm(self, *args: str, input: str | None = None, timeout: float = PATIENCE) -> str:
        """Runs helm, which is built at its first use."""
        binaries.require(["helm"])
        return self._command("helm", *args, input=input, timeout=timeout).stdout

    def apply(self, *objects: Object | str, namespace: str = "default") -> None:
        """Applies objects (dicts) or manifests (YAML or JSON text), server-side."""
        text = "\n---\n".join(o if isinstance(o, str) else json.dumps(o) for o in objects)
        self.kubectl("apply", "--server-side", "--force-conflicts", "-n", namespace, "-f", "-", input=text)

    def objects(
        self, resource: str, *, namespace: str | None = "default", selector: str = "", fields: str = ""
    ) -> list[Object]:
        """The objects of a resource; `namespace=None` for all namespaces and for what has none."""
        items: list[Object] = self._list(_path(resource, namespace), selector, fields)["items"]
        return items

    def get(self, resource: str, name: str, *, namespace: str | None = "default") -> Object:
        """One object; raises `CommandError` when there is none."""
        answer: Object = json.loads(self.kubectl("get", "--raw", f"{_path(resource, namespace)}/{name}"))
        return answer

    def _list(self, path: str, selector: str, fields: str, **query: str) -> Object:
        query = {"labelSelector": selector, "fieldSelector": fields, **query}
        answer: Object = json.loads(self.kubectl("get", "--raw", f"{path}?{urlencode(query)}"))
        return answer

    def wait_for(
        self,
        resource: str,
        until: Callable[[list[Object]], T],
        *,
        name: str = "",
        namespace: str | None = "default",
        selector: str = "",
        timeout: float = PATIENCE,
    ) -> T:
        """Watches a resource until `until(its objects)` is true, and returns that.

        Only objects of that name or label selector are handed over, if one is given. Raises `TimeoutError`, showing
        the last state seen.
        """
        path, fields = _path(resource, namespace), f"metadata.name={name}" if name else ""
        deadline = time.monotonic() + timeout
        while True:
            listed = self._list(path, selector, fields)
            objects = {_key(item): item for item in listed["items"]}
            if found := until(list(objects.values())):
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                seen = "\n".join(f"{_key(o)}: {json.dumps(o.get('status', {}))[:1500]}" for o in objects.values())
                raise TimeoutError(f"{resource} {name or selector}: not so after {timeout:.0f} s; last seen:\n{seen}")
            # The API server ends the watch when our time is up, and earlier where it sees fit: then we list anew.
            for event in self._watch(path, selector, fields, listed["metadata"]["resourceVersion"], left):
                if event["type"] == "ERROR":
                    break
                item = event["object"]
                if event["type"] == "DELETED":
                    objects.pop(_key(item), None)
                else:
                    objects[_key(item)] = item
                if found := until(list(objects.values())):
                    return found

    def _watch(self, path: str, selector: str, fields: str, version: str, seconds: float) -> Iterator[Object]:
        query = {"watch": "1", "resourceVersion": version, "timeoutSeconds": str(int(seconds) + 1)}
        query |= {"labelSelector": selector, "fieldSelector": fields}
        watch = subprocess.Popen(
            ["kubectl", "get", "--raw", f"{path}?{urlencode(query)}"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert watch.stdout
            for line in watch.stdout:
                yield json.loads(line)
        finally:
            watch.kill()
            watch.communicate()

    def wait_for_condition(
        self,
        resource: str,
        name: str,
        condition: str,
        *,
        namespace: str | None = "default",
        timeout: float = PATIENCE,
    ) -> Object:
        """Waits until an object has a condition with status True; returns the object."""

        def holds(objects: list[Object]) -> Object | None:
            # A new CRD has null.
            conditions = (objects[0].get("status", {}).get("conditions") if objects else None) or []
            return next((objects[0] for c in conditions if (c["type"], c["status"]) == (condition, "True")), None)

        found = self.wait_for(resource, holds, name=name, namespace=namespace, timeout=timeout)
        assert found
        return found

    def wait_for_pods(
        self,
        selector: str,
        count: int,
        phase: str = "Running",
        *,
        namespace: str = "default",
        timeout: float = PATIENCE,
    ) -> list[Object]:
        """Waits until exactly `count` pods have that label and all are in that phase; returns them by name."""

        def so(pods: list[Object]) -> list[Object] | bool:
            if len(pods) != count or any(pod["status"].get("phase") != phase for pod in pods):
                return False
            return sorted(pods, key=_key) or True

        pods = self.wait_for("pods", so, selector=selector, namespace=namespace, timeout=timeout)
        return pods if isinstance(pods, list) else []

    def wait_for_pod(
        self, name: str, phase: str = "Running", *, namespace: str = "default", timeout: float = PATIENCE
    ) -> Object:
        """Waits until a pod is in that phase; fails at once when it ended in another."""

        def so(pods: list[Object]) -> Object | None:
            now = pods[0]["status"].get("phase") if pods else None
            if now != phase and now in ("Succeeded", "Failed"):
                raise AssertionError(f"pod {name} is {now}: {self.try_kubectl('logs', name, '-n', namespace).stdout}")
            return pods[0] if now == phase else None

        pod = self.wait_for("pods", so, name=name, namespace=namespace, timeout=timeout)
        assert pod
        return pod

    def wait_gone(
        self,
        resource: str,
        *,
        name: str = "",
        selector: str = "",
        namespace: str | None = "default",
        timeout: float = PATIENCE,
    ) -> None:
        """Waits until no such object is left."""
        self.wait_for(
            resource,
            lambda objects: not objects,
            name=name,
            selector=selector,
            namespace=namespace,
            timeout=timeout,
        )

    @contextmanager
    def namespace(self, prefix: str = "test", labels: dict[str, str] | None = None) -> Iterator[str]:
        """A namespace with a fresh name, ready for pods; it is deleted in the end, without waiting for that."""
        name = f"{prefix}-{uuid.uuid4().hex[:6]}"
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels or {}}})
        try:
            # Pods are refused until the controller manager has made the account they run as.
            self.wait_for("serviceaccounts", bool, name="default", namespace=name)
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false")


def _path(resource: str, namespace: str | None) -> str:
    """ "pods" → /api/v1/…/pods, "batch/v1/jobs" → /apis/batch/v1/…/jobs."""
    group, _, plural = resource.rpartition("/")
    root = f"/apis/{group}" if group else "/api/v1"
    return f"{root}/namespaces/{namespace}/{plural}" if namespace else f"{root}/{plural}"


def _key(item: Object) -> str:
    return f"{item['metadata'].get('namespace', '')}/{item['metadata']['name']}"
