"""The plan: what is decided where the spec is silent, and what the manifests then hold."""

import json
from typing import Any

import pytest

from finetune_api import run
from finetune_api.spec import FineTuneJobSpec
from finetune_operator import manifests
from finetune_operator.plan import (
    Owner,
    Plan,
    changed_fields,
    make_plan,
    merge,
    result_part,
    waited_for,
    with_adapter,
)
from finetune_operator.settings import Cache, Profile
from tests.operator.simulation import GOOD_SPEC

OWNER = Owner("team", "tune", "uid-1", {"kueue.x-k8s.io/queue-name": "gpus", "team": "nlp"})


def plan(profile: Profile | None = None, **spec: Any) -> Plan:
    return make_plan(OWNER, FineTuneJobSpec.model_validate({**GOOD_SPEC, **spec}), profile or Profile(), {})


@pytest.mark.parametrize(
    ("spec", "stage", "bf16"),
    [
        ({"method": {"type": "lora"}}, 0, False),
        ({"method": {"type": "qlora"}}, 0, False),
        ({"method": {"type": "full"}}, 2, True),
        ({"method": {"type": "full"}, "workers": {"gpusPerWorker": 0}}, 2, False),
        ({"method": {"type": "full"}, "model": {"uri": "hf://a/b", "dtype": "float32"}}, 2, False),
        ({"method": {"type": "lora"}, "deepspeed": {"zero_optimization": {"stage": 3}}}, 3, True),
    ],
)
def test_zero_stage_and_precision_are_chosen_by_method(spec: dict[str, Any], stage: int, bf16: bool) -> None:
    config = plan(**spec).config.deepspeed
    assert config["zero_optimization"]["stage"] == stage
    assert config.get("bf16", {}).get("enabled", False) is bf16


def test_the_users_deepspeed_keys_lie_over_the_plans() -> None:
    config = plan(deepspeed={"zero_optimization": {"stage": 2, "overlap_comm": True}, "wall_clock_breakdown": True})
    assert config.config.deepspeed["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert config.config.deepspeed["wall_clock_breakdown"] is True


def test_auto_and_repeats_of_the_spec_leave_the_plan_as_it_is() -> None:
    repeated = {"train_batch_size": "auto", "gradient_clipping": "auto", "optimizer": {"type": "AdamW"}}
    assert plan(deepspeed={**repeated, "zero_optimization": {"stage": 0}}).config.deepspeed == plan().config.deepspeed


def test_the_global_batch_counts_all_processes() -> None:
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert plan(training=training).config.global_batch_size == 2 * 3 * 16


@pytest.mark.parametrize(
    ("checkpoint", "uri"),
    [({}, "s3://team/out/checkpoints"), ({"uri": "s3://team/checkpoints/"}, "s3://team/checkpoints/tune")],
)
def test_checkpoints_lie_in_a_folder_of_the_jobs_own(checkpoint: dict[str, Any], uri: str) -> None:
    assert plan(checkpoint=checkpoint).config.checkpoint_uri == uri


def test_claims_are_mounted_and_named_as_files() -> None:
    made = plan(model={"uri": "pvc://models/llama"}, output={"uri": "pvc://results/x"})
    assert made.config.model.uri == "file:///mnt/claims/models/llama"
    assert made.claims == ("models", "results")
    mounts = manifests.job(made, 1)["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {"name": "claim-models", "mountPath": "/mnt/claims/models"} in mounts


def test_queue_labels_reach_the_job_and_others_do_not() -> None:
    labels = manifests.job(plan(), 1)["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "gpus"
    assert "team" not in labels


def test_a_gang_is_never_patched_up_in_place() -> None:
    spec = manifests.job(plan(), 3)["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (2, 2, 0)
    assert spec["podReplacementPolicy"] == "Failed"
    command = spec["template"]["spec"]["containers"][0]["command"]
    assert "--master-addr=tune-a3-0.tune-workers" in command
    assert "--nproc-per-node=8" in command


def test_what_reads_a_result_is_a_small_pod_with_what_the_workers_reach_it_by() -> None:
    sidecar = {"name": "proxy", "image": "proxy:1"}
    claim = {"name": "gpus", "resourceClaimTemplateName": "gpus"}
    trainer = {"name": "trainer", "resources": {"claims": [{"name": "gpus"}], "limits": {"memory": "500Gi"}}}
    template = {"spec": {"resourceClaims": [claim], "containers": [trainer, sidecar], "nodeSelector": {"pool": "a"}}}
    made = plan(
        output={"uri": "pvc://results/x"},
        credentials={"secretName": "keys"},
        workers={"replicas": 2, "gpusPerWorker": 8, "template": template},
    )
    worker, reader = (maker(made, 3)["spec"]["template"]["spec"] for maker in (manifests.job, manifests.reader))
    assert "resourceClaims" not in reader
    assert reader["initContainers"] == []
    assert reader["nodeSelector"] == {"pool": "a"}
    first, second = reader["containers"]
    assert second == sidecar
    assert first["command"] == ["python", "-m", "finetune_trainer.recall"]
    assert first["resources"]["limits"] == first["resources"]["requests"] == {"cpu": "500m", "memory": "512Mi"}
    for same in ("env", "envFrom", "volumeMounts", "image", "securityContext"):
        assert first[same] == worker["containers"][0][same]
    labels = manifests.reader(made, 3)["spec"]["template"]["metadata"]["labels"]
    assert (labels["finetune.dev/job"], labels["finetune.dev/reads-attempt"]) == ("tune", "3")
    assert "finetune.dev/attempt" not in labels


def test_pods_fit_the_restricted_standard() -> None:
    spec = manifests.job(plan(), 1)["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in (*spec["initContainers"], *spec["containers"]):
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_profile_over_operator_and_user_over_profile() -> None:
    profile = Profile(
        cache=Cache(claim_name="models"),
        env={"NCCL_DEBUG": "WARN"},
        template={"spec": {"nodeSelector": {"pool": "gpu"}, "priorityClassName": "low"}},
    )
    template = {
        "spec": {
            "priorityClassName": "high",
            "containers": [{"name": "trainer", "resources": {"limits": {"memory": "64Gi"}}}],
        }
    }
    spec = manifests.job(plan(profile, workers={"template": template, "gpusPerWorker": 8}), 1)["spec"]["template"][
        "spec"
    ]
    assert spec["nodeSelector"] == {"pool": "gpu"}
    assert spec["priorityClassName"] == "high"
    trainer = spec["containers"][0]
    assert trainer["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "64Gi"}
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in trainer["env"]
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "models"}} in spec["volumes"]


def test_lists_of_named_things_merge_by_name_and_others_are_replaced() -> None:
    base = {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}], "args": [1, 2]}
    over = {"env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}], "args": [9]}
    assert merge(base, over) == {
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
        "args": [9],
    }


def pod_of(made: Plan, *excluded: str) -> Any:
    return manifests.job(made, 1, excluded)["spec"]["template"]["spec"]


def test_tolerations_add_up_and_the_same_one_is_changed() -> None:
    gpu = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
    lost = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
    users = [{**gpu, "effect": "NoExecute"}, {**gpu, "effect": "NoSchedule"}, {**lost, "tolerationSeconds": 300}]
    made = plan(
        Profile(template={"spec": {"tolerations": [gpu]}}), workers={"template": {"spec": {"tolerations": users}}}
    )
    found = pod_of(made)["tolerations"]
    assert [(t["key"], t["effect"], t.get("tolerationSeconds")) for t in found] == [
        ("node.kubernetes.io/not-ready", "NoExecute", 10),
        ("node.kubernetes.io/unreachable", "NoExecute", 300),
        ("gpu", "NoSchedule", None),
        ("gpu", "NoExecute", None),
    ]


def test_mounts_sources_and_ports_of_the_users_lie_beside_the_operators() -> None:
    trainer = {
        "name": "trainer",
        "volumeMounts": [{"name": "cache", "mountPath": "/data2"}, {"name": "mine", "mountPath": "/dev/shm"}],
        "envFrom": [{"configMapRef": {"name": "proxies"}}, {"secretRef": {"name": "storage"}}],
        "ports": [{"containerPort": 6006}, {"containerPort": run.HTTP_PORT, "name": "mine"}],
    }
    made = plan(Profile(credentials_secret="storage"), workers={"template": {"spec": {"containers": [trainer]}}})
    found = pod_of(made)["containers"][0]
    mounts = [(m["mountPath"], m["name"]) for m in found["volumeMounts"]]
    assert mounts[1:] == [("/cache", "cache"), ("/work", "work"), ("/dev/shm", "mine"), ("/data2", "cache")]
    assert found["envFrom"] == [{"secretRef": {"name": "storage"}}, {"configMapRef": {"name": "proxies"}}]
    assert [p["containerPort"] for p in found["ports"]] == [run.HTTP_PORT, 6006]


def test_a_volume_or_variable_of_another_kind_takes_the_place_of_the_operators() -> None:
    volumes = [
        {"name": "work", "ephemeral": {"volumeClaimTemplate": {}}},
        {"name": "shm", "emptyDir": {"sizeLimit": "64Gi"}},
    ]
    secret = {"name": "HF_HOME", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    trainer = {"name": "trainer", "env": [secret]}
    spec = pod_of(plan(workers={"template": {"spec": {"volumes": volumes, "containers": [trainer]}}}))
    assert volumes[0] in spec["volumes"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}} in spec["volumes"]
    assert [e for e in spec["containers"][0]["env"] if e["name"] == "HF_HOME"] == [secret]


REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def affine(*terms: dict[str, Any]) -> dict[str, Any]:
    return {"spec": {"affinity": {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": list(terms)}}}}}


@pytest.mark.parametrize("who", ["profile", "user"])
def test_excluded_nodes_stay_excluded_whatever_affinity_is_asked_for(who: str) -> None:
    zone = {"key": "zone", "operator": "In", "values": ["a"]}
    name = {"key": "metadata.name", "operator": "NotIn", "values": ["x"]}
    template = affine({"matchExpressions": [zone]}, {"matchFields": [name]}, {})
    before = json.dumps(template)
    made = plan(Profile(template=template)) if who == "profile" else plan(workers={"template": template})
    off = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in ("bad", "worse")]
    terms = pod_of(made, "bad", "worse")["affinity"]["nodeAffinity"][REQUIRED]["nodeSelectorTerms"]
    assert terms == [{"matchExpressions": [zone], "matchFields": off}, {"matchFields": [name, *off]}, {}]
    assert json.dumps(template) == before
    assert pod_of(made)["affinity"] == template["spec"]["affinity"]


def test_excluded_nodes_lie_beside_other_affinity() -> None:
    spread = {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}, "nodeAffinity": None}
    affinity = pod_of(plan(workers={"template": {"spec": {"affinity": spread}}}), "bad")["affinity"]
    assert affinity["podAffinity"] == spread["podAffinity"]
    (term,) = affinity["nodeAffinity"][REQUIRED]["nodeSelectorTerms"]
    assert [e["values"] for e in term["matchFields"]] == [["bad"]]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"memory": "32Gi"}}),
        (
            {"limits": {"memory": "4Gi"}},
            {"requests": {"cpu": "4"}, "limits": {"memory": "4Gi"}},
        ),
    ],
)
def test_what_fetches_has_the_trainers_room_and_no_gpu(own: dict[str, Any], expected: dict[str, Any]) -> None:
    """A ResourceQuota on limits asks every container for one."""
    room = {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"memory": "32Gi"}}
    fetch, trainer = {"name": "fetch", "resources": own}, {"name": "trainer", "resources": room}
    template = {"spec": {"initContainers": [fetch], "containers": [trainer]}}
    assert pod_of(plan(workers={"template": template}))["initContainers"][0]["resources"] == expected
    assert pod_of(plan())["initContainers"][0]["resources"] == {}


def test_a_change_is_named_with_both_values_and_defaults_are_no_change() -> None:
    before = result_part(FineTuneJobSpec.model_validate(GOOD_SPEC))
    same = result_part(FineTuneJobSpec.model_validate({**GOOD_SPEC, "training": {"learning_rate": 2.0e-4}}))
    other = result_part(FineTuneJobSpec.model_validate({**GOOD_SPEC, "training": {"learning_rate": 1.0e-4}}))
    assert changed_fields(before, same) == []
    assert changed_fields(before, other) == ['spec.training: null → {"learning_rate": 0.0001}']


def test_the_digest_changes_with_the_configuration_only() -> None:
    assert plan().digest == plan(recovery={"maxRestarts": 3}).digest
    assert plan().digest != plan(training={"seed": 1}).digest


def test_adapters_are_resolved_and_their_claims_mounted() -> None:
    adapters = [{"uri": "job://first"}, {"uri": "pvc://models/second", "train": True}]
    spec = FineTuneJobSpec.model_validate({**GOOD_SPEC, "model": {"uri": "hf://a/b", "adapters": adapters}})
    found = make_plan(OWNER, spec, Profile(), {"job://first": "pvc://outputs/first"})
    uris = [adapter.uri for adapter in found.config.model.adapters]
    assert uris == ["file:///mnt/claims/outputs/first", "file:///mnt/claims/models/second"]
    assert {"models", "outputs"} <= set(found.claims)


def test_rows_and_a_judge_of_other_jobs_are_resolved() -> None:
    data = {"train": [{"uri": "job://rows"}, {"uri": "s3://team/more.jsonl"}]}
    spec = FineTuneJobSpec.model_validate(
        {**GOOD_SPEC, "stage": "rlaif", "data": data, "rlaif": {"judge": {"uri": "job://judge"}}}
    )
    assert waited_for(spec) == {"job://rows": ("data",), "job://judge": ("merged", "model")}
    found = make_plan(OWNER, spec, Profile(), {"job://rows": "pvc://rows/a.jsonl", "job://judge": "pvc://models/judge"})
    assert [s.uri for s in found.config.data.train] == ["file:///mnt/claims/rows/a.jsonl", "s3://team/more.jsonl"]
    assert found.config.rlaif is not None and found.config.rlaif.judge.uri == "file:///mnt/claims/models/judge"
    assert {"rows", "models"} <= set(found.claims)


def test_a_chain_of_adapters_is_one_model_with_all_of_them() -> None:
    first = plan(
        model={"uri": "pvc://models/base", "adapters": [{"uri": "s3://a/old"}, {"uri": "s3://a/on", "train": True}]}
    )
    base = with_adapter(first.config.model, "pvc://out/first")
    assert base.uri == "pvc://models/base"
    assert [one.uri for one in base.adapters] == ["s3://a/old", "pvc://out/first"]
    spec = FineTuneJobSpec.model_validate(GOOD_SPEC | {"model": {"uri": "job://first", "dtype": "float32"}})
    second = make_plan(OWNER, spec, Profile(), {"job://first": "pvc://out/first"}, None, base)
    assert second.config.model.uri == "file:///mnt/claims/models/base"
    assert [one.uri for one in second.config.model.adapters] == ["s3://a/old", "file:///mnt/claims/out/first"]
    assert second.config.model.dtype == "float32"
    assert second.claims == ("models", "out")
    again = make_plan(OWNER, spec, Profile(), {}, second.config)  # that job may be gone by then
    assert again.claims == second.claims
    assert second.spec_part["model"] == {"uri": "job://first", "dtype": "float32"}


def test_a_reward_model_is_an_input_and_what_judges_is_mounted() -> None:
    function = {"type": "python", "uri": "pvc://code/rewards.py"}
    ppo = {"reward_model": {"uri": "job://judge"}, "reward_funcs": [function, {"type": "exact_match"}]}
    spec = FineTuneJobSpec.model_validate(GOOD_SPEC | {"stage": "ppo", "ppo": ppo})
    assert waited_for(spec)["job://judge"] == ("merged", "model", "adapter")
    found = make_plan(OWNER, spec, Profile(), {"job://judge": "pvc://outputs/judge"})
    options = found.config.ppo
    assert options is not None and options.reward_model is not None
    assert options.reward_model.uri == "file:///mnt/claims/outputs/judge"
    assert [f.uri for f in options.reward_funcs] == ["file:///mnt/claims/code/rewards.py", None]
    assert {"code", "outputs"} <= set(found.claims)
