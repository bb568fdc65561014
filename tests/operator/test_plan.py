"""The plan: what is decided where the spec is silent, and what the manifests then hold."""

from typing import Any

import pytest

from finetune_api.spec import FineTuneJobSpec
from finetune_operator import manifests
from finetune_operator.plan import Owner, Plan, changed_fields, make_plan, merge, result_part
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


def test_a_change_is_named_with_both_values_and_defaults_are_no_change() -> None:
    before = result_part(FineTuneJobSpec.model_validate(GOOD_SPEC))
    same = result_part(FineTuneJobSpec.model_validate({**GOOD_SPEC, "training": {"learning_rate": 2.0e-4}}))
    other = result_part(FineTuneJobSpec.model_validate({**GOOD_SPEC, "training": {"learning_rate": 1.0e-4}}))
    assert changed_fields(before, same) == []
    assert changed_fields(before, other) == ['spec.training: null → {"learning_rate": 0.0001}']


def test_the_digest_changes_with_the_configuration_only() -> None:
    assert plan().digest == plan(recovery={"maxRestarts": 3}).digest
    assert plan().digest != plan(training={"seed": 1}).digest
