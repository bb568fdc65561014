"""What the chart makes of values, seen by Helm alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from finetune_operator.settings import Settings
from tests.chart.charts import CHART, ROOT, VALUES, Object, helm, kinds, only, template, template_set

pytestmark = pytest.mark.cluster  # needs Helm


def settings(objects: list[Object], name: str = "finetune-operator") -> Settings:
    """The settings the operator would read."""
    text = only(objects, "ConfigMap", name)["data"]["settings.yaml"]
    return Settings.model_validate(yaml.safe_load(text))


def pod(objects: list[Object]) -> Any:
    return only(objects, "Deployment")["spec"]["template"]


@pytest.mark.parametrize("name", VALUES)
def test_helm_lint_is_content(name: str) -> None:
    done = helm("lint", "--strict", CHART, "--values", VALUES[name])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", VALUES)
def test_every_object_says_whose_it_is_and_where(name: str) -> None:
    for one in template_set(name):
        if one["metadata"]["name"].endswith(("-extra", "-text")):
            continue
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "finetune-operator"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        cluster_wide = one["kind"].startswith("Cluster") or one["kind"] == "CustomResourceDefinition"
        assert ("namespace" in one["metadata"]) != cluster_wide, one["kind"]


# --- settings ---


@pytest.mark.parametrize(
    ("name", "full"), [("defaults", "finetune-operator"), ("minimal", "finetune-operator"), ("everything", "tuner")]
)
def test_the_operator_can_read_the_settings_it_is_given(name: str, full: str) -> None:
    found = settings(template_set(name), full)
    assert found.leader_election.lease_name == full
    assert found.leader_election.namespace == "finetune-system"
    assert found.http_port == 8080


def test_profiles_without_an_image_use_the_trainers() -> None:
    found = settings(template_set("everything"), "tuner").profiles
    assert found["default"].image == "mirror/finetune-trainer:1.2.3"
    assert found["default"].price_per_gpu_hour == 2.5
    assert found["h100"].image.startswith("mirror/trainer-h100@sha256:")
    assert found["h100"].image_pull_policy == "Always"


def test_pull_secrets_of_the_workers_are_in_every_profile() -> None:
    found = settings(template_set("everything"), "tuner").profiles
    shared = {"name": "pull-trainer"}
    assert found["h100"].template["spec"]["imagePullSecrets"] == [shared, {"name": "pull"}]
    assert found["h100"].template["spec"]["nodeSelector"] == {"gpu": "h100"}
    for name in ("default", "cpu", "nvidia"):
        assert found[name].template["spec"]["imagePullSecrets"] == [shared]
    for profile in settings(template()).profiles.values():
        assert "imagePullSecrets" not in profile.template.get("spec", {})


def test_profiles_set_to_null_are_gone() -> None:
    assert set(settings(template_set("minimal")).profiles) == {"default"}


def test_new_settings_restart_the_pods_and_others_do_not() -> None:
    def checksum(*options: str) -> str:
        return str(pod(template(*options))["metadata"]["annotations"]["finetune.dev/settings-checksum"])

    assert checksum() == checksum("--set", "replicas=3")
    assert checksum() != checksum("--set", "settings.workers=9")
    assert checksum() != checksum("--set", "trainer.image.tag=two")


def test_several_replicas_without_an_election_are_refused() -> None:
    done = helm("template", "x", CHART, "--set", "settings.leaderElection.enabled=false")
    assert done.returncode
    assert "set replicas to 1 or enable leader election" in done.stderr


def test_wrong_values_are_refused_by_helm_itself() -> None:
    done = helm("template", "x", CHART, "--set", "settings.progressInterval=fast")
    assert done.returncode
    assert "progressInterval" in done.stderr


# --- images ---


@pytest.mark.parametrize(
    ("options", "image"),
    [
        ((), "finetune-operator:0.1.0"),
        (("--set", "image.tag=edge"), "finetune-operator:edge"),
        (("--set", "image.registry=localhost:5000,image.repository=ml/op"), "localhost:5000/ml/op:0.1.0"),
        (("--set", "image.tag=edge,image.digest=sha256:abc"), "finetune-operator@sha256:abc"),
    ],
)
def test_image_names(options: tuple[str, ...], image: str) -> None:
    assert pod(template(*options))["spec"]["containers"][0]["image"] == image


# --- rights ---


def rules(objects: list[Object]) -> list[Any]:
    """All rules of the operator, wherever they hold."""
    own = [
        o
        for o in objects
        if o["kind"] in ("Role", "ClusterRole") and not re.search("(view|edit|admin)$", o["metadata"]["name"])
    ]
    return [rule for role in own for rule in role["rules"]]


@pytest.mark.parametrize("name", VALUES)
def test_the_operator_never_reads_secrets_and_asks_for_no_wildcard(name: str) -> None:
    for rule in rules(template_set(name)):
        assert "secrets" not in rule["resources"]
        for part in ("apiGroups", "resources", "verbs"):
            assert "*" not in rule[part]


def test_namespaced_mode_makes_roles_only() -> None:
    objects = template_set("minimal")
    assert not {kind for kind in kinds(objects) if kind.startswith("Cluster")}
    assert "CustomResourceDefinition" not in kinds(objects)
    assert sorted(o["metadata"]["namespace"] for o in objects if o["kind"] == "Role") == ["team-a", "team-b"]
    for binding in (o for o in objects if o["kind"] == "RoleBinding"):
        assert binding["subjects"][0]["namespace"] == "finetune-system"
    assert settings(objects).namespaces == ["team-a", "team-b"]


def test_pods_proxy_only_where_progress_goes_through_it() -> None:
    def may(options: tuple[str, ...]) -> bool:
        return any("pods/proxy" in rule["resources"] for rule in rules(template(*options)))

    assert not may(())
    assert may(("--set", "settings.progressThrough=apiserver"))


def test_pod_groups_only_of_those_that_a_profile_asks_for() -> None:
    def groups(*schedulers: str) -> list[str]:
        chosen = [f"profiles.p{n}.gangScheduling={one}" for n, one in enumerate(schedulers)]
        found = rules(template("--set", ",".join([*chosen, "profiles.cpu=null", "profiles.plain.shmSize=1Gi"])))
        assert all(rule["verbs"] == ["get", "create", "patch"] for rule in found if "podgroups" in rule["resources"])
        return [group for rule in found if "podgroups" in rule["resources"] for group in rule["apiGroups"]]

    assert groups() == groups("kueue") == groups("") == []
    assert groups("kubernetes", "kubernetes", "kueue") == ["scheduling.k8s.io"]
    assert sorted(groups("volcano", "coscheduling")) == ["scheduling.volcano.sh", "scheduling.x-k8s.io"]
    wrong = helm("template", "x", CHART, "--set", "profiles.default.gangScheduling=yunikorn")
    assert "'kubernetes', 'kueue', 'coscheduling', 'volcano'" in wrong.stderr


def test_no_rights_where_they_are_managed_elsewhere() -> None:
    objects = template("--set", "rbac.create=false,rbac.userRoles=never")
    assert not {kind for kind in kinds(objects) if "Role" in kind}


def test_a_service_account_of_someone_else_must_be_named() -> None:
    assert "name the service account" in helm("template", "x", CHART, "--set", "serviceAccount.create=false").stderr
    objects = template("--set", "serviceAccount.create=false,serviceAccount.name=mine")
    assert pod(objects)["spec"]["serviceAccountName"] == "mine"
    assert only(objects, "ClusterRoleBinding")["subjects"][0]["name"] == "mine"


# --- the CRD ---


def test_the_crd_is_the_generated_one_and_is_kept() -> None:
    source = yaml.safe_load((ROOT / "crds" / "finetune.dev_finetunejobs.yaml").read_text())
    made = only(template(), "CustomResourceDefinition")
    assert made["spec"] == source["spec"]  # also to PyYAML, for which 1e-08 would be a text
    assert made["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_the_crd_goes_with_the_release_where_wanted() -> None:
    made = only(template("--set", "crds.keep=false"), "CustomResourceDefinition")
    assert "helm.sh/resource-policy" not in (made["metadata"].get("annotations") or {})


# --- monitoring ---


def test_monitoring_is_off_until_asked_for() -> None:
    assert not kinds(template()) & {"ServiceMonitor", "PodMonitor", "PrometheusRule"}


def test_monitors_select_what_the_chart_and_the_operator_make() -> None:
    from finetune_operator import manifests

    objects = template("--set", "serviceMonitor.enabled=true,podMonitor.enabled=true")
    service, monitor = only(objects, "Service"), only(objects, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert service["spec"]["selector"].items() <= pod(objects)["metadata"]["labels"].items()
    workers = only(objects, "PodMonitor")["spec"]
    wanted = dict(workers["selector"]["matchLabels"])
    assert wanted.pop(manifests.INDEX_LABEL) == "0"
    assert wanted.pop("app.kubernetes.io/component") == "worker"
    assert wanted == manifests.MANAGED_BY
    assert workers["namespaceSelector"] == {"any": True}
    for endpoint in (monitor["endpoints"][0], workers["podMetricsEndpoints"][0]):
        assert endpoint["honorLabels"] is True


def test_workers_are_scraped_in_watched_namespaces_only() -> None:
    options = ("--set", "podMonitor.enabled=true,watchNamespaces={team-a,team-b}")
    assert only(template(*options), "PodMonitor")["spec"]["namespaceSelector"] == {"matchNames": ["team-a", "team-b"]}


def test_dashboards_come_as_the_sidecar_wants_them() -> None:
    maps = [o for o in template("--set", "dashboards.enabled=true") if "dashboard" in o["metadata"]["name"]]
    assert len(maps) == 2
    for one in maps:
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        ((name, text),) = one["data"].items()
        assert name.startswith("finetune-") and name.endswith(".json")
        source = CHART / "dashboards" / name.removeprefix("finetune-")
        assert text.strip() == source.read_text().strip()


def test_notes_tell_the_next_step() -> None:
    done = helm("install", "x", CHART, "--dry-run=client", "--set", "watchNamespaces={team-a}")
    assert done.returncode == 0, done.stderr
    assert "kubectl get ftj -w" in done.stdout
    assert "team-a" in done.stdout
    assert "prometheusRule.enabled" in done.stdout


# --- the pods ---


@pytest.mark.parametrize("name", VALUES)
def test_the_operators_pods_ask_for_no_privilege(name: str) -> None:
    template_ = pod(template_set(name))["spec"]
    assert template_["securityContext"]["runAsNonRoot"] is True
    container = template_["containers"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {probe for probe in container if probe.endswith("Probe")} >= {"livenessProbe", "readinessProbe"}
    assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]


def test_replicas_are_spread_by_themselves() -> None:
    spread = pod(template())["spec"]["topologySpreadConstraints"][0]
    assert spread["labelSelector"]["matchLabels"] == only(template(), "Deployment")["spec"]["selector"]["matchLabels"]
