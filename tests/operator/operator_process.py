"""The operator as a process of its own beside a simulated cluster, with the rights the chart gives it, and workers
that tell their progress."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api import crd
from finetune_api.run import HTTP_PORT, Progress
from finetune_operator.cluster.processes import free_port
from tests import PATIENCE
from tests.chart.charts import ROOT, only, template
from tests.cluster.access import Access, Object
from tests.cluster.cluster import Cluster
from tests.cluster.control_plane import simulated_node
from tests.operator import progress_server

POOL = "finetune.test/pool"
ACCOUNT = "operator-under-test"


def simulated(cluster: Access) -> Cluster:
    """The cluster, where its pods are simulated; elsewhere these tests are skipped."""
    if not isinstance(cluster, Cluster) or not cluster.simulated:
        pytest.skip("needs simulated pods, and the cluster of KUBECONFIG has none")
    return cluster


class OperatorProcess:
    """One replica: ``python -m finetune_operator.cli.main operator``."""

    def __init__(self, access: Access, kubeconfig: Path, folder: Path, name: str, settings: Object) -> None:
        self.name = name
        self.port = free_port()
        self.log = folder / f"{name}.log"
        self._settings = folder / f"{name}.yaml"
        self._settings.write_text(yaml.safe_dump({**settings, "httpPort": self.port}))
        self._environment = {
            **access.environment,
            "KUBECONFIG": str(kubeconfig),
            "POD_NAME": name,
            "PYTHONPATH": ":".join(str(ROOT / d) for d in ("crds", "operator")),
        }
        self.start()

    def start(self) -> None:
        """A process, as of a container that is started, or restarted in its pod."""
        command = [sys.executable, "-m", "finetune_operator.cli.main", "operator", "--config", str(self._settings)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def stop(self) -> None:
        """Ends it, whatever it does."""
        self.process.kill()
        self.process.wait()

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an HTTP answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def answers(self) -> bool:
        """Whether its web server is there."""
        with contextlib.suppress(OSError):
            return self.get("/healthz")[0] == 200
        return False

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of a sample of /metrics; None where there is none."""
        for line in self.get("/metrics")[1].splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if (
                found
                and found[1] == name
                and labels.items() <= dict(re.findall(r'(\w+)="(.*?)"', found[2] or "")).items()
            ):
                return float(found[3])
        return None

    def wait_until(self, what: str, ready: Callable[[], object], timeout: float = PATIENCE) -> None:
        """For what cannot be watched: its log and its web server."""
        deadline = time.monotonic() + timeout
        while not ready():
            ended = self.process.poll()
            assert ended is None, f"{self.name} ended ({ended}):\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"{what}: not so:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)


@contextlib.contextmanager
def prepared(cluster: Cluster, nodes: int) -> Iterator[str]:
    """The CRD, nodes that only these tests' pods use, and the operator's own namespace, whose name is given."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crd.PATH))
    crds = "apiextensions.k8s.io/v1/customresourcedefinitions"
    cluster.wait_for_condition(crds, "finetunejobs.finetune.dev", "Established", namespace=None)
    with cluster.namespace("operator") as own:
        names = [f"{own}-{number}" for number in range(nodes)]
        # As with some cloud providers, the label of a node's host is not its name.
        labels = {name: {POOL: own, "kubernetes.io/hostname": f"ip-{name}"} for name in names}
        made = [json.dumps(simulated_node(name, 8, labels[name])) for name in names]
        cluster.kubectl("create", "-f", "-", input="\n---\n".join(made))
        for name in names:
            cluster.wait_for_condition("nodes", name, "Ready", namespace=None)
        yield own
        cluster.kubectl("delete", "node", "--wait=false", *names)


def settings_in(own: str, **more: Any) -> Object:
    """Settings with short times, for the nodes of :func:`prepared`."""
    return {
        "profiles": {"default": profile(own)},
        "progressInterval": "300ms",
        "progressThrough": "apiserver",
        "leaderElection": {
            "namespace": own, "leaseDuration": "6s", "renewDeadline": "4s", "retryPeriod": "1s",
        },
        **more,
    }  # fmt: skip


def profile(own: str, **annotations: str) -> Object:
    """A profile for those nodes; the annotations of its pods say how they live (tests/cluster/stages.yaml)."""
    pods = {"metadata": {"annotations": annotations}, "spec": {"nodeSelector": {POOL: own}}}
    return {"terminationGracePeriod": "1s", "template": pods}


CHART_VALUES = (
    "--set",
    "settings.progressThrough=apiserver,profiles.gangs.gangScheduling=kubernetes,"
    "profiles.coscheduling.gangScheduling=coscheduling",
)


def chart_role() -> Object:
    """What the chart lets the operator do."""
    return only(template(*CHART_VALUES), "ClusterRole", "finetune-operator")


@contextlib.contextmanager
def without_right(cluster: Cluster, own: str, verb: str, resource: str) -> Iterator[None]:
    """The operator under test lacks one right of the chart's meanwhile."""

    def rights(rules: list[Object]) -> None:
        role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": own}}
        cluster.apply({**role, "rules": rules})

    rules = chart_role()["rules"]
    left = [{**r, "verbs": [v for v in r["verbs"] if (r["resources"], v) != ([resource], verb)]} for r in rules]
    rights([rule for rule in left if rule["verbs"]])
    try:
        yield
    finally:
        rights(rules)


@contextlib.contextmanager
def account(cluster: Cluster, own: str, folder: Path) -> Iterator[Path]:
    """A kubeconfig of a service account with the rights of the chart and no others."""
    objects = template(*CHART_VALUES)
    leader = only(objects, "Role", "finetune-operator-leader")
    subjects = [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": own}]
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    cluster.apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT}},
        {**rbac, "kind": "ClusterRole", "metadata": {"name": own}, "rules": chart_role()["rules"]},
        {**rbac, "kind": "ClusterRoleBinding", "metadata": {"name": own}, "subjects": subjects,
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": own}},
        {**rbac, "kind": "Role", "metadata": {"name": "leader"}, "rules": leader["rules"]},
        {**rbac, "kind": "RoleBinding", "metadata": {"name": "leader"}, "subjects": subjects,
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "leader"}},
        namespace=own,
    )  # fmt: skip
    kubeconfig: Object = json.loads(cluster.kubeconfig.read_text())
    kubeconfig["users"][0]["user"] = {"token": cluster.kubectl("create", "token", ACCOUNT, "-n", own).strip()}
    path = folder / "kubeconfig"
    path.write_text(json.dumps(kubeconfig))
    yield path
    cluster.kubectl("delete", "clusterrole,clusterrolebinding", own)


class Trainers:
    """Answers GET /progress for every simulated pod of a cluster, each with what it was last told to say."""

    def __init__(self, cluster: Cluster) -> None:
        self._folder = cluster.sandbox.state / "progress"
        self._folder.mkdir(exist_ok=True)
        # The addresses kwok makes up become the sandbox's own.
        cluster.run_inside("ip", "route", "replace", "local", "10.0.0.0/16", "dev", "lo")
        server = Path(progress_server.__file__)
        cluster.sandbox.start("progress", sys.executable, "-I", server, str(HTTP_PORT), self._folder)
        self._stop = lambda: cluster.sandbox.stop("progress", grace=0)

    def say(self, pod: Object, **progress: Any) -> None:
        """What this pod answers from now on."""
        answer = self._folder / f"{pod['status']['podIP']}.new"
        answer.write_text(Progress(**progress).model_dump_json())
        answer.rename(answer.with_suffix(".json"))

    def forget(self) -> None:
        """No pod answers until it is told to again."""
        for answer in self._folder.iterdir():
            answer.unlink()

    def stop(self) -> None:
        """Nobody answers any more."""
        self._stop()
