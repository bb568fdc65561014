"""The product on the real cluster: installed by Helm, used with kubectl, looked at with an S3 client and Prometheus."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import yaml

from tests import PATIENCE, gate
from tests.cluster import images
from tests.cluster.cluster import Cluster
from tests.gate import Gate

ROOT = Path(__file__).parents[2]
JOBS = "finetune.dev/v1alpha1/finetunejobs"
SYSTEM = "finetune-system"
BUCKET = "team"

Object = dict[str, Any]


@dataclass(frozen=True)
class Image:
    """A real image of the product, from its Containerfile; built once per state of the sources."""

    name: str
    folder: Path
    kept: int
    build_args: Mapping[str, str]

    @property
    def tag(self) -> str:
        return f"localhost/finetune-{self.name}:e2e"

    @property
    def archive(self) -> Path:
        """Where the image of these sources is, or will be."""
        sources = [ROOT / "pyproject.toml", ROOT / "constraints.txt", self.folder / "Containerfile"]
        for package in (ROOT / "crds" / "finetune_api", self.folder / f"finetune_{self.name}"):
            sources += sorted(package.rglob("*.py"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
        return images.cache() / "images" / f"{self.name}-{digest}.tar"

    def build(self) -> Path:
        """Makes the archive where there is none."""
        target = self.archive
        if not target.exists():
            images.build(self.folder / "Containerfile", ROOT, self.tag, target, self.build_args)
            images.keep_newest(f"{self.name}-*.tar", self.kept)
        return target


OPERATOR = Image("operator", ROOT / "operator", kept=2, build_args={})
TRAINER = Image("trainer", ROOT / "trainer_image", kept=1, build_args={"COMPILER": ""})


def overlay_profile(s3_inside: str, gates: Path) -> Object:
    """A profile whose pods run the trainer of this checkout in the tests' own environment, mounted read-only into a
    base image: a trainer image of gigabytes for every test would cost minutes. ``test_image.py`` runs the real one.
    Each run has a gate in ``gates`` (:meth:`Product.gate`)."""
    folders = [ROOT / name for name in ("crds", "operator", "trainer_image")]
    volumes, mounts = images.host_python(*folders, gate.INSIDE, gates)
    variables = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/bin:/bin",
        **gate.environment(gates, ":".join(map(str, folders))),
    }
    env = [{"name": name, "value": value} for name, value in variables.items()]
    containers = [{"name": name, "env": env, "volumeMounts": mounts} for name in ("fetch", "trainer")]
    return {
        "image": images.BASE,
        "imagePullPolicy": "Never",
        "shmSize": "256Mi",
        "networkPolicy": True,
        "credentialsSecret": "team-s3",
        "env": {"OMP_NUM_THREADS": "1", "AWS_ENDPOINT_URL": s3_inside, "PYTHONDONTWRITEBYTECODE": "1"},
        "template": {
            "spec": {
                "volumes": volumes,
                "initContainers": [containers[0]],
                "containers": [containers[1]],
                "terminationGracePeriodSeconds": 20,
                # worker 0 and worker 1 on different nodes: their traffic crosses the pod network
                "topologySpreadConstraints": [
                    {
                        "maxSkew": 1,
                        "topologyKey": "kubernetes.io/hostname",
                        "whenUnsatisfiable": "ScheduleAnyway",
                        "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "worker"}},
                    }
                ],
            }
        },
    }


def sealed_profile(s3_inside: str) -> Object:
    """A profile of the real trainer image, on the one node that gets it."""
    return {
        "image": TRAINER.tag,
        "imagePullPolicy": "Never",
        "credentialsSecret": "team-s3",
        "shmSize": "256Mi",
        "env": {"OMP_NUM_THREADS": "1", "AWS_ENDPOINT_URL": s3_inside},
        "template": {"spec": {"nodeSelector": {"kubernetes.io/hostname": "node-1"}}},
    }


@dataclass
class Product:
    """What the tests use."""

    cluster: Cluster
    prometheus: str
    gates: Path

    def gate(self, name: str, namespace: str) -> Gate:
        """The gate of a job in the default profile."""
        return Gate(self.gates, namespace, name)

    def profile(self) -> Object:
        """The default profile."""
        return overlay_profile(self.cluster.s3.inside, self.gates)

    def s3(self) -> Any:
        """A client of the S3 server, another one than the product's own."""
        s3 = self.cluster.s3
        return boto3.client(
            "s3",
            endpoint_url=s3.outside,
            aws_access_key_id=s3.access_key,
            aws_secret_access_key=s3.secret_key,
            region_name="us-east-1",
        )

    def secret(self, namespace: str) -> None:
        """The credentials a team keeps in its namespace."""
        s3 = self.cluster.s3
        keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
        data = {key: base64.b64encode(value.encode()).decode() for key, value in keys.items()}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "team-s3"}, "data": data}
        self.cluster.apply(secret, namespace=namespace)

    def job(self, name: str, namespace: str) -> Object:
        """A FineTuneJob as it is."""
        return self.cluster.get(JOBS, name, namespace=namespace)

    def wait(self, name: str, namespace: str, until: Callable[[Object], Any]) -> Object:
        """Watches a FineTuneJob until ``until(status)`` holds; returns it. A job that ends otherwise is an error
        at once, told with its conditions and the operator's log."""

        def so(jobs: list[Object]) -> Object | None:
            status = jobs[0].get("status", {}) if jobs else {}
            if until(status):
                return jobs[0]
            if status.get("state") in ("Failed", "Invalid"):
                raise AssertionError(json.dumps(status, indent=1))
            return None

        try:
            found = self.cluster.wait_for(JOBS, so, name=name, namespace=namespace, timeout=2 * PATIENCE)
        except TimeoutError as error:
            pods = self.cluster.kubectl("get", "pods", "-n", namespace, "-o", "wide")
            logs = self.cluster.try_kubectl("logs", "-n", SYSTEM, "deploy/finetune-operator", "--tail=30").stdout
            raise AssertionError(f"{error}\n{pods}\n{logs}") from error
        assert found
        return found

    def wait_state(self, name: str, namespace: str, state: str) -> Object:
        """Waits for a state."""
        return self.wait(name, namespace, lambda status: status.get("state") == state)

    def wait_step(self, name: str, namespace: str, step: int) -> Object:
        """Waits until so many steps are told."""
        return self.wait(name, namespace, lambda status: (status.get("progress") or {}).get("step", 0) >= step)

    def query(self, expression: str) -> list[Object]:
        """An instant query of the real Prometheus; raises where it cannot be evaluated."""
        url = f"{self.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return list(json.load(answer)["data"]["result"])

    def wait_query(self, expression: str) -> list[Object]:
        """An instant query, asked until it has an answer: Prometheus scrapes once a second."""
        deadline = time.monotonic() + PATIENCE
        while not (found := self.query(expression)) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def rules(self) -> list[Object]:
        """The rule groups with their health, as Prometheus evaluated them."""
        with urllib.request.urlopen(f"{self.prometheus}/api/v1/rules", timeout=30) as answer:
            return list(json.load(answer)["data"]["groups"])

    def operator_values(self) -> str:
        """Helm values of the installation under test."""
        values = {
            "image": {"registry": "localhost", "repository": "finetune-operator", "tag": "e2e", "pullPolicy": "Never"},
            "settings": {"progressInterval": "1s"},
            "profiles": {
                "default": self.profile(),
                "narrow": {**self.profile(), "cache": {"sizeLimit": "64Ki"}},
                "sealed": sealed_profile(self.cluster.s3.inside),
            },
        }
        return yaml.safe_dump(values)


def self_cognition(model_file: str, *, replicas: int, name: str = "self-cognition", **spec: Any) -> Object:
    """examples/01 as it stands, with storage on S3 and so many workers; it is asked one of its questions."""
    job: Object = yaml.safe_load((ROOT / "examples" / "01-self-cognition.yaml").read_text())
    job["metadata"]["name"] = name
    body = job["spec"]
    body["model"] = {"uri": f"s3://{BUCKET}/smollm2", "gguf_file": model_file}
    body["data"]["train"][0]["uri"] = f"s3://{BUCKET}/self_cognition.jsonl"
    body["output"] = {"uri": f"s3://{BUCKET}/models/{name}"}
    body["checkpoint"] = {"uri": f"s3://{BUCKET}/checkpoints/", "save_steps": 10, "save_total_limit": 2}
    body["evaluation"] = {"prompts": ["Who are you?"], "max_new_tokens": 24}
    body["workers"] = {"replicas": replicas, "gpusPerWorker": 0}
    body["deepspeed"] = {"zero_optimization": {"stage": 2}}
    return {**job, "spec": {**body, **spec}}
