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
    objects = "\n---\n".join(json.dumps(found) for found in template_set(name))
    done = api.try_kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", input=objects)
    assert done.returncode == 0, done.stderr
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
    api.wait_gone("pods", selector=OPERATOR, namespace=NAMESPACE)
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
    api.wait_gone("pods", selector=OPERATOR, namespace=NAMESPACE)
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


Question = tuple[str, ...]
"""Verb, resource, namespace and perhaps a name."""


def allowed(api: Access, *asked: Question, who: str = ACCOUNT) -> list[bool]:
    """Whether the API server would let them do each of these, all asked at once."""

    def review(verb: str, resource: str, namespace: str, name: str = "") -> Any:
        kind, _, group = resource.partition(".")
        about = {"verb": verb, "resource": kind, "group": group, "namespace": namespace, "name": name}
        spec: dict[str, Any] = {"resourceAttributes": about, "user": who}
        if who.startswith("system:serviceaccount:"):
            spec["groups"] = ["system:serviceaccounts", "system:authenticated"]
        return {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}

    reviews = [review(*question) for question in asked]
    bundle = {"apiVersion": "v1", "kind": "List", "items": reviews}
    form = 'jsonpath={.status.allowed}{"\\n"}'
    return [line == "true" for line in api.kubectl("create", "-o", form, "-f", "-", input=json.dumps(bundle)).split()]


def refused(api: Access, *asked: Question, who: str = ACCOUNT) -> list[Question]:
    """Those they may not do."""
    return [question for question, yes in zip(asked, allowed(api, *asked, who=who), strict=True) if not yes]


NEEDED = [
    ("list", "finetunejobs.finetune.dev"),
    ("watch", "finetunejobs.finetune.dev"),
    ("delete", "finetunejobs.finetune.dev"),
    ("create", "jobs.batch"),
    ("patch", "jobs.batch"),
    ("delete", "jobs.batch"),
    ("create", "configmaps"),
    ("delete", "configmaps"),
    ("patch", "services"),
    ("patch", "networkpolicies.networking.k8s.io"),
    ("watch", "pods"),
    ("delete", "pods"),
    ("create", "events"),
    ("list", "events"),
]
REFUSED = [
    ("get", "secrets"),
    ("list", "secrets"),
    ("create", "pods"),
    ("patch", "finetunejobs.finetune.dev"),
    ("create", "finetunejobs.finetune.dev"),
    ("patch", "configmaps"),
    ("delete", "services"),
    ("create", "serviceaccounts"),
    ("create", "rolebindings.rbac.authorization.k8s.io"),
    ("patch", "deployments.apps"),
    ("get", "persistentvolumeclaims"),
]


def of(namespace: str, table: list[tuple[str, str]]) -> list[Question]:
    """The questions of a table, for one namespace."""
    return [(verb, resource, namespace) for verb, resource in table]


def test_rights_where_all_namespaces_are_watched(api: Access, release: str) -> None:
    install(api, release)
    lease = "leases.coordination.k8s.io"
    needed = [*of("team-a", NEEDED), ("get", "nodes", ""), ("update", lease, NAMESPACE, "finetune-operator")]
    denied = [
        *of("team-a", REFUSED),
        ("list", "nodes", ""),
        ("update", lease, NAMESPACE, "other"),
        ("create", lease, "team-a"),
    ]
    assert refused(api, *needed) == []
    assert refused(api, *denied) == denied


def test_rights_where_some_namespaces_are_watched(api: Access, release: str) -> None:
    install(api, release, "--set", "watchNamespaces={team-a}")
    denied = [*of("team-a", REFUSED), *of("team-b", NEEDED), *of(NAMESPACE, NEEDED), ("get", "nodes", "")]
    assert refused(api, *of("team-a", NEEDED)) == []
    assert refused(api, *denied) == denied


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
    for role, verb in (("view", "get"), ("edit", "create"), ("admin", "create")):
        api.wait_for(
            "rbac.authorization.k8s.io/v1/clusterroles",
            lambda roles, verb=verb: any(  # type: ignore[misc]
                "finetunejobs" in r.get("resources", ()) and verb in r["verbs"] for r in roles[0]["rules"]
            ),
            name=role,
            namespace=None,
        )
    jobs = "finetunejobs.finetune.dev"
    asked = [
        ("get", jobs, "team-a"),
        ("create", jobs, "team-a"),
        ("delete", jobs, "team-a"),
        ("create", jobs, "team-b"),
    ]
    assert allowed(api, *asked, who="user-view") == [True, False, False, False]
    assert allowed(api, *asked, who="user-edit") == [True, True, True, False]
    assert allowed(api, *asked, who="user-admin") == [True, True, True, False]
