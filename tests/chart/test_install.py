"""The chart on a real API server with real controllers (and simulated kubelets): every object is accepted, a release
lives through install, upgrade, rollback and uninstall, pods are admitted under Pod Security "restricted", and the
operator may do what it does and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.charts import CHART, NAMESPACE, ROOT, VALUES, template_set
from tests.cluster.access import Access, CommandError
from tests.cluster.binaries import UnavailableError
from tests.cluster.cluster import Cluster

pytestmark = pytest.mark.cluster

CRD = "finetunejobs.finetune.dev"
CRDS = "apiextensions.k8s.io/v1/customresourcedefinitions"
OPERATOR = "app.kubernetes.io/component=operator"
JOB = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "chat"},
    "spec": {
        "model": {"uri": "hf://org/model"},
        "data": {"train": [{"uri": "s3://team/rows.jsonl"}]},
        "output": {"uri": "s3://team/models/chat"},
    },
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    """A cluster that nobody has put our CRD into: one of our own, or a spare one named by KUBECONFIG."""
    if given := os.environ.get("KUBECONFIG"):
        access = Access(Path(given), tmp_path_factory.mktemp("cluster"))
        if access.try_kubectl("get", "crd", CRD).returncode == 0:
            pytest.skip(f"the cluster of KUBECONFIG has {CRD} already; these tests would delete it")
        yield from _prepared(access)
        return
    own = Cluster("simulated")
    try:
        own.start()
    except UnavailableError as reason:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must not pass without a cluster: {reason}", pytrace=False)
        pytest.skip(str(reason))
    yield from _prepared(own)
    own.stop()


def _prepared(access: Access) -> Iterator[Access]:
    access.apply((Path(__file__).parent / "monitoring.yaml").read_text())
    for kind in ("servicemonitors", "podmonitors", "prometheusrules"):
        access.wait_for_condition(CRDS, f"{kind}.monitoring.coreos.com", "Established", namespace=None)
    restricted = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    for name, labels in ((NAMESPACE, restricted), ("team-a", restricted), ("team-b", {})):
        access.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        access.wait_for("serviceaccounts", bool, name="default", namespace=name)
    yield access
    for name in (NAMESPACE, "team-a", "team-b"):
        access.kubectl("delete", "namespace", name, "--wait=false")
    access.try_kubectl("delete", "crd", CRD)


@pytest.fixture
def release(api: Access) -> Iterator[str]:
    """A name for a release, which is gone afterwards, its CRD too."""
    yield "finetune-operator"
    for found in json.loads(api.helm("list", "--all-namespaces", "--output", "json")):
        api.helm("uninstall", found["name"], "--namespace", found["namespace"], "--wait")
    api.try_kubectl("delete", "crd", CRD, "--wait=true")


def install(api: Access, name: str, *options: str, chart: Path = CHART, namespace: str = NAMESPACE) -> str:
    """``helm upgrade --install``, waiting until the operator's pods are ready."""
    command = ["upgrade", "--install", name, str(chart), "--namespace", namespace, "--wait", "--timeout", "60s"]
    return api.helm(*command, *options)


# --- every object is accepted ---


@pytest.mark.parametrize("name", VALUES)
def test_the_api_server_accepts_every_object(api: Access, name: str) -> None:
    for found in template_set(name):
        space = found["metadata"].get("namespace", NAMESPACE)
        done = api.try_kubectl(
            "apply", "--server-side", "--dry-run=server", "--validate=strict", "-n", space, "-f", "-",
            input=json.dumps(found),
        )  # fmt: skip
        assert done.returncode == 0, f"{found['kind']} {found['metadata']['name']}: {done.stderr}"
        assert "Warning" not in done.stderr, done.stderr


@pytest.mark.parametrize("path", ["gitops/kustomize/base", "gitops/kustomize/overlays/example"])
def test_the_api_server_accepts_the_kustomize_targets(api: Access, path: str) -> None:
    done = api.try_kubectl(
        "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-k", str(ROOT / path)
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


# --- the life of a release ---


def test_a_release_is_installed_upgraded_rolled_back_and_taken_away(api: Access, release: str, tmp_path: Path) -> None:
    old = older_chart(tmp_path)
    told = install(api, release, chart=old)
    assert "kubectl get ftj -w" in told
    first = api.wait_for_pods(OPERATOR, 2, namespace=NAMESPACE)
    assert not has_later_column(api)
    api.apply(JOB, namespace="team-a")

    # An upgrade brings the new CRD and restarts the pods for new settings.
    install(api, release, "--set", "settings.workers=16")
    second = api.wait_for_pods(OPERATOR, 2, namespace=NAMESPACE)
    assert not {pod["metadata"]["uid"] for pod in first} & {pod["metadata"]["uid"] for pod in second}
    assert has_later_column(api)
    assert settings(api)["workers"] == 16

    # One that changes nothing restarts nothing.
    install(api, release, "--set", "settings.workers=16")
    third = api.wait_for_pods(OPERATOR, 2, namespace=NAMESPACE)
    assert {pod["metadata"]["uid"] for pod in second} == {pod["metadata"]["uid"] for pod in third}

    # A rollback takes settings and CRD back; the user's job stays.
    api.helm("rollback", release, "1", "--namespace", NAMESPACE, "--wait", "--timeout", "60s")
    api.wait_for_pods(OPERATOR, 2, namespace=NAMESPACE)
    assert settings(api)["workers"] == 8
    assert not has_later_column(api)
    assert api.get("finetune.dev/v1alpha1/finetunejobs", "chat", namespace="team-a")

    # Taken away, nothing is left but the CRD, which is kept, and with it the job; a new install adopts it.
    api.helm("uninstall", release, "--namespace", NAMESPACE, "--wait")
    assert left_over(api) == [f"customresourcedefinition.apiextensions.k8s.io/{CRD}"]
    install(api, release)
    assert has_later_column(api)
    assert api.get("finetune.dev/v1alpha1/finetunejobs", "chat", namespace="team-a")


def older_chart(folder: Path) -> Path:
    """The chart of an earlier version, whose CRD had one column less."""
    chart = folder / "finetune-operator"
    shutil.copytree(CHART, chart)
    path = next((chart / "files" / "crds").glob("*.yaml"))
    crd = yaml.safe_load(path.read_text())
    columns = crd["spec"]["versions"][0]["additionalPrinterColumns"]
    crd["spec"]["versions"][0]["additionalPrinterColumns"] = [c for c in columns if c["name"] != LATER_COLUMN]
    path.write_text(yaml.safe_dump(crd, sort_keys=False))
    return chart


LATER_COLUMN = "Restarts"


def has_later_column(api: Access) -> bool:
    crd = api.get(CRDS, CRD, namespace=None)
    return LATER_COLUMN in [column["name"] for column in crd["spec"]["versions"][0]["additionalPrinterColumns"]]


def settings(api: Access) -> Any:
    found = api.get("configmaps", "finetune-operator", namespace=NAMESPACE)
    return yaml.safe_load(found["data"]["settings.yaml"])


def left_over(api: Access) -> list[str]:
    """Everything of the cluster that carries the release's label."""
    kinds = (
        "deployments,pods,services,configmaps,serviceaccounts,secrets,roles,rolebindings,clusterroles,"
        "clusterrolebindings,networkpolicies,poddisruptionbudgets,leases,crds"
    )
    selector = "app.kubernetes.io/part-of=finetune-operator"
    return api.kubectl("get", kinds, "--all-namespaces", "-l", selector, "--output", "name").split()


def test_the_installed_crd_is_the_one_of_the_repository(api: Access, release: str) -> None:
    install(api, release)
    installed = api.get(CRDS, CRD, namespace=None)
    source = ROOT / "crds" / "finetune.dev_finetunejobs.yaml"
    command = ("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--output=json", "-f", str(source))
    assert json.loads(api.kubectl(*command))["spec"] == installed["spec"]


def test_without_keep_the_crd_goes_with_the_release(api: Access, release: str) -> None:
    install(api, release, "--set", "crds.keep=false")
    api.helm("uninstall", release, "--namespace", NAMESPACE, "--wait")
    api.wait_gone(CRDS, name=CRD, namespace=None)
    assert left_over(api) == []


def test_two_releases_share_a_cluster(api: Access, release: str) -> None:
    install(api, release, "--set", "watchNamespaces={team-a}")
    second = ("--set", "watchNamespaces={team-b},crds.enabled=false,rbac.userRoles=never")
    install(api, "other", *second, namespace="team-b")
    assert len(api.objects("pods", namespace="team-b", selector=OPERATOR)) == 2


# --- Pod Security ---


def test_the_operators_pods_are_admitted_where_restricted_is_enforced(api: Access, release: str) -> None:
    install(api, release, "--set", "replicas=3")  # --wait: the pods are there
    pods = api.wait_for_pods(OPERATOR, 3, namespace=NAMESPACE)
    assert len(pods) == 3
    with pytest.raises(CommandError, match="violates PodSecurity"):
        api.kubectl("run", "privileged", "--image=x", "--privileged", "-n", NAMESPACE)


@pytest.mark.parametrize("profile", ["default", "cpu", "nvidia"])
def test_workers_of_the_charts_profiles_are_admitted_where_restricted_is_enforced(api: Access, profile: str) -> None:
    from finetune_api.spec import FineTuneJobSpec
    from finetune_operator import manifests
    from finetune_operator.plan import Owner, make_plan
    from finetune_operator.settings import Settings
    from tests.chart.charts import only, template

    text = only(template(), "ConfigMap")["data"]["settings.yaml"]
    spec = FineTuneJobSpec.model_validate({**JOB["spec"], "profile": profile})
    found = Settings.model_validate(yaml.safe_load(text)).profiles[profile]
    plan = make_plan(Owner("team-a", "chat", "00000000-0000-0000-0000-000000000000", {}), spec, found, {})
    made = manifests.pod_template(plan, 1, ())
    worker = {"apiVersion": "v1", "kind": "Pod", **made, "metadata": {**made["metadata"], "name": "worker"}}
    api.kubectl(
        "apply", "--server-side", "--dry-run=server", "--validate=strict", "-n", "team-a", "-f", "-",
        input=json.dumps(worker),
    )  # fmt: skip


# --- rights ---

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:finetune-operator"


def may(api: Access, verb: str, resource: str, namespace: str, *, who: str = ACCOUNT, name: str = "") -> bool:
    """Whether the API server would let them."""
    what = f"{resource}/{name}" if name else resource
    answer = api.try_kubectl("auth", "can-i", verb, what, "--as", who, "-n", namespace)
    return answer.stdout.strip() == "yes"


NEEDED = [
    ("list", "finetunejobs.finetune.dev"),
    ("watch", "finetunejobs.finetune.dev"),
    ("delete", "finetunejobs.finetune.dev"),
    ("create", "jobs.batch"),
    ("patch", "jobs.batch"),
    ("delete", "jobs.batch"),
    ("patch", "configmaps"),
    ("patch", "services"),
    ("patch", "networkpolicies.networking.k8s.io"),
    ("watch", "pods"),
    ("delete", "pods"),
    ("create", "events"),
]
REFUSED = [
    ("get", "secrets"),
    ("list", "secrets"),
    ("create", "pods"),
    ("patch", "finetunejobs.finetune.dev"),
    ("create", "finetunejobs.finetune.dev"),
    ("delete", "configmaps"),
    ("delete", "services"),
    ("create", "serviceaccounts"),
    ("create", "rolebindings.rbac.authorization.k8s.io"),
    ("patch", "deployments.apps"),
    ("get", "persistentvolumeclaims"),
]


def test_rights_where_all_namespaces_are_watched(api: Access, release: str) -> None:
    install(api, release)
    for verb, resource in NEEDED:
        assert may(api, verb, resource, "team-a"), f"{verb} {resource}"
    for verb, resource in REFUSED:
        assert not may(api, verb, resource, "team-a"), f"{verb} {resource}"
    assert may(api, "get", "nodes", "team-a")
    assert not may(api, "list", "nodes", "team-a")
    assert may(api, "update", "leases.coordination.k8s.io", NAMESPACE, name="finetune-operator")
    assert not may(api, "update", "leases.coordination.k8s.io", NAMESPACE, name="other")
    assert not may(api, "create", "leases.coordination.k8s.io", "team-a")


def test_rights_where_some_namespaces_are_watched(api: Access, release: str) -> None:
    install(api, release, "--set", "watchNamespaces={team-a}")
    for verb, resource in NEEDED:
        assert may(api, verb, resource, "team-a"), f"{verb} {resource}"
        assert not may(api, verb, resource, "team-b"), f"{verb} {resource}"
        assert not may(api, verb, resource, NAMESPACE), f"{verb} {resource}"
    assert not may(api, "get", "nodes", "team-a")


def test_users_get_their_rights_by_the_roles_they_have(api: Access, release: str) -> None:
    install(api, release)
    for role in ("view", "edit", "admin"):
        api.apply(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "RoleBinding",
                "metadata": {"name": f"user-{role}"},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
                "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": f"user-{role}"}],
            },
            namespace="team-a",
        )
    # The roles are put together by a controller: wait until it has done so.
    api.wait_for(
        "rbac.authorization.k8s.io/v1/clusterroles",
        lambda roles: any("finetunejobs" in r["resources"] and "create" in r["verbs"] for r in roles[0]["rules"]),
        name="edit",
        namespace=None,
    )
    jobs = "finetunejobs.finetune.dev"
    assert may(api, "get", jobs, "team-a", who="user-view")
    assert not may(api, "create", jobs, "team-a", who="user-view")
    assert may(api, "create", jobs, "team-a", who="user-edit")
    assert not may(api, "create", jobs, "team-b", who="user-edit")
    assert may(api, "delete", jobs, "team-a", who="user-admin")
