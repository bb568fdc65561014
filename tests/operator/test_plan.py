"""The plan: what is decided where the spec is silent, and what the manifests then hold."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finetune_api import run
from finetune_api.spec import FineTuneJobSpec
from finetune_operator import manifests
from finetune_operator.cluster.pods import gpus_wanted
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

OWNER = Owner("team", "tune", "uid-1", {})


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


def of(labels: dict[str, str], annotations: dict[str, str], **profile: Any) -> Plan:
    """The plan of a job with these labels and annotations."""
    owner = Owner("team", "tune", "uid-1", labels, annotations)
    return make_plan(owner, FineTuneJobSpec.model_validate(GOOD_SPEC), Profile(**profile), {})


def test_what_is_said_to_kueue_reaches_the_job_and_its_pods_and_nothing_else_does() -> None:
    labels = {
        "kueue.x-k8s.io/queue-name": "gpus",
        "kueue.x-k8s.io/priority-class": "high",
        "kueue.x-k8s.io/max-exec-time-seconds": "3600",
    }
    annotations = {
        "kueue.x-k8s.io/podset-required-topology": "rack",
        "provreq.kueue.x-k8s.io/maxRunDurationSeconds": "600",
    }
    others = {"team": "nlp", "notkueue.x-k8s.io/queue-name": "x", "example.com/kueue.x-k8s.io": "x"}
    job = manifests.job(of(labels | others, annotations | others), 1)
    ours = manifests.job(of({}, {}), 1)
    assert job["metadata"]["labels"] == ours["metadata"]["labels"] | labels
    pods, plain = (made["spec"]["template"]["metadata"] for made in (job, ours))
    assert pods["labels"] == plain["labels"]  # its queue would make Kueue queue the pods themselves
    for told, before in ((job["metadata"], ours["metadata"]), (pods, plain)):
        assert told["annotations"] == before.get("annotations", {}) | annotations


def test_a_profile_with_kueue_gives_a_queue_to_jobs_that_name_none() -> None:
    queue = "kueue.x-k8s.io/queue-name"
    for labels, profile, found in (
        ({}, {}, "default"),
        ({}, {"queue": "gpus"}, "gpus"),
        ({queue: "mine"}, {"queue": "gpus"}, "mine"),
    ):
        made = of(labels, {}, gang_scheduling="kueue", **profile)
        assert manifests.job(made, 1)["metadata"]["labels"][queue] == found
        assert manifests.pod_groups(made) == []
    assert queue not in manifests.job(of({}, {}, queue="gpus"), 1)["metadata"]["labels"]


def test_kubernetes_own_gang_scheduling_is_told_of_the_gang() -> None:
    made = of({}, {}, gang_scheduling="kubernetes")
    (group,) = manifests.pod_groups(made)
    assert (group["apiVersion"], group["kind"]) == ("scheduling.k8s.io/v1alpha2", "PodGroup")
    assert group["spec"] == {"schedulingPolicy": {"gang": {"minCount": 2}}}
    assert group["metadata"]["ownerReferences"][0]["uid"] == "uid-1"
    assert pod_of(made)["schedulingGroup"] == {"podGroupName": group["metadata"]["name"]}


def test_coscheduling_is_told_of_the_gang() -> None:
    made = of({}, {}, gang_scheduling="coscheduling", template={"spec": {"schedulerName": "second"}})
    (group,) = manifests.pod_groups(made)
    assert (group["apiVersion"], group["spec"]) == ("scheduling.x-k8s.io/v1alpha1", {"minMember": 2})
    template = manifests.job(made, 1)["spec"]["template"]
    assert template["metadata"]["labels"]["scheduling.x-k8s.io/pod-group"] == group["metadata"]["name"]
    assert template["spec"]["schedulerName"] == "second"


def test_volcano_is_told_of_the_gang_its_queue_and_its_priority() -> None:
    annotations = {"volcano.sh/preemptable": "true", "team": "nlp"}
    template = {"spec": {"priorityClassName": "high"}}
    made = of({}, annotations, gang_scheduling="volcano", queue="gpus", template=template)
    (group,) = manifests.pod_groups(made)
    assert group["apiVersion"] == "scheduling.volcano.sh/v1beta1"
    assert group["spec"] == {"minMember": 2, "queue": "gpus", "priorityClassName": "high"}
    assert group["metadata"]["annotations"] == {"volcano.sh/preemptable": "true"}
    pods = manifests.job(made, 1)["spec"]["template"]
    assert pods["metadata"]["annotations"]["scheduling.k8s.io/group-name"] == group["metadata"]["name"]
    assert pods["spec"]["schedulerName"] == "volcano"
    own = of({"scheduling.volcano.sh/queue-name": "mine"}, {}, gang_scheduling="volcano")
    assert manifests.pod_groups(own)[0]["spec"] == {"minMember": 2, "queue": "mine"}


@pytest.mark.parametrize("scheduler", ["kubernetes", "kueue", "coscheduling", "volcano"])
def test_the_pod_that_reads_what_a_gang_wrote_is_no_part_of_it(scheduler: str) -> None:
    made = of({}, {"kueue.x-k8s.io/podset-slice-size": "2"}, gang_scheduling=scheduler)
    reader, plain = manifests.reader(made, 1), manifests.reader(of({}, {}), 1)
    assert reader["spec"] == plain["spec"]
    queue = {"kueue.x-k8s.io/queue-name": "default"} if scheduler == "kueue" else {}
    assert reader["metadata"]["labels"] == plain["metadata"]["labels"] | queue


def test_nobody_is_told_of_a_gang_where_no_profile_asks_for_it() -> None:
    made = of({}, {})
    assert manifests.pod_groups(made) == []
    assert "schedulingGroup" not in pod_of(made)
    with pytest.raises(ValueError, match="'kubernetes', 'kueue', 'coscheduling' or 'volcano'"):
        Profile.model_validate({"gangScheduling": "yunikorn"})


def test_gpus_that_are_claimed_are_not_asked_for_as_a_resource() -> None:
    claim = {"name": "gpus", "resourceClaimTemplateName": "eight-gpus"}
    trainer = {"name": "trainer", "resources": {"claims": [{"name": "gpus"}]}}
    template = {"spec": {"resourceClaims": [claim], "containers": [trainer]}}
    spec = pod_of(of({}, {}, gpu_resource="", template=template))
    assert spec["resourceClaims"] == [claim]
    assert spec["containers"][0]["resources"] == {"claims": [{"name": "gpus"}]}
    assert "--nproc-per-node=8" in spec["containers"][0]["command"]


@pytest.mark.parametrize("resource", ["nvidia.com/gpu", "habana.ai/gaudi", ""])
def test_gpus_are_counted_on_a_single_machine_whatever_they_are_asked_for_by(resource: str) -> None:
    made = of({}, {}, gpu_resource=resource, gang_scheduling="kubernetes")
    assert gpus_wanted(manifests.job(made, 1)["spec"]["template"]) == 8
    assert gpus_wanted(manifests.reader(made, 1)["spec"]["template"]) == 0


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


def test_every_variable_that_the_trainer_reads_is_given_by_the_pod_or_told_in_the_docs() -> None:
    root = Path(__file__).parents[2]
    read = set()
    for file in (root / "trainer_image").rglob("*.py"):
        text = file.read_text()
        read |= set(re.findall(r"\bFINETUNE_[A-Z_]+\b", text))
        read |= {getattr(run, name) for name in re.findall(r"\bENV_[A-Z_]+\b", text) if hasattr(run, name)}
    [worker] = manifests.job(plan(), 1)["spec"]["template"]["spec"]["containers"]
    given = {one["name"]: one.get("value") for one in worker["env"]}
    told = "".join(page.read_text() for page in (root / "docs").rglob("*.md"))
    assert len(read) > 10
    assert not {name for name in read if name not in given and name not in told}
    assert given["FINETUNE_RUN"] == plan().owner.uid and plan().owner.uid


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
    assert changed_fields(before, other) == ["spec.training.learning_rate: not set (the default, 0.0002) → 0.0001"]
    eight, none = (result_part(FineTuneJobSpec.model_validate({**GOOD_SPEC, "method": m})) for m in ({"r": 8}, {}))
    assert changed_fields(eight, none) == ["spec.method.r: 8 → not set (the default, 16)"]


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
