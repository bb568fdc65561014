"""Plan → Kubernetes objects. Pure: plain functions, one per kind, that return plain dictionaries.

Called by ``reconcile.py``; both clusters run what is written here.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from finetune_api import run
from finetune_api.base import seconds
from finetune_api.status import AttemptStatus
from finetune_operator.plan import CLAIM_ROOT, Plan, merge

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"

LABEL_JOB = f"{GROUP}/job"
LABEL_ATTEMPT = f"{GROUP}/attempt"
ANNOTATION_GPUS = f"{GROUP}/gpus"
"""Of a worker pod: its GPUs, whatever resource or claim they are asked for by."""
MADE_FROM = f"{GROUP}/made-from"
"""Annotation of a Job: what of the spec it was made from (:func:`plan.steering`), as JSON."""
LABEL_READS = f"{GROUP}/reads-attempt"
"""Of the Job, and its pod, that reads what an attempt wrote: which attempt's."""
MANAGED_BY = {"app.kubernetes.io/managed-by": "finetune-operator"}
KUEUE = "kueue.x-k8s.io"
KUEUE_QUEUE = f"{KUEUE}/queue-name"
KUEUE_PRIORITY = f"{KUEUE}/priority-class"
VOLCANO = "volcano.sh"
VOLCANO_QUEUE = f"scheduling.{VOLCANO}/queue-name"
POD_GROUPS = {
    "kubernetes": "scheduling.k8s.io/v1alpha2",
    "coscheduling": "scheduling.x-k8s.io/v1alpha1",
    "volcano": f"scheduling.{VOLCANO}/v1beta1",
}
"""The API of the PodGroups by which each of them is told of a gang. (Kueue finds it in the Job.)"""
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"

CONFIG_DIR = "/etc/finetune"
CACHE_DIR = "/cache"
WORK_DIR = "/work"
USER_ID = 65532  # "nonroot" of the distroless images; any other works as well


Manifest = dict[str, Any]


def config_name(name: str) -> str:
    """Name of the ConfigMap that holds the frozen configuration."""
    return f"{name}-config"


def service_name(name: str) -> str:
    """Name of the headless Service the workers find each other through."""
    return f"{name}-workers"


def job_name(name: str, attempt: int) -> str:
    """Name of the Job of one attempt. Fixed by the number, so that no attempt can exist twice."""
    return f"{name}-a{attempt}"


def reader_name(name: str, attempt: int) -> str:
    """Name of the Job that reads what an attempt wrote."""
    return f"{job_name(name, attempt)}-word"


def names_a_job_of(name: str, found: str) -> bool:
    """Whether a Job of that name was made for a FineTuneJob ``name``: :func:`job_name`, :func:`reader_name`."""
    return re.fullmatch(re.escape(name) + r"-a\d+(-word)?", found) is not None


def pod_group_name(plan: Plan) -> str:
    """Name of the PodGroup. With the number of workers, because in Kubernetes' own that number cannot be changed."""
    return f"{plan.owner.name}-x{plan.workers}"


def labels(plan: Plan) -> dict[str, str]:
    """Labels of every object made for a job."""
    return {**MANAGED_BY, "app.kubernetes.io/name": "finetune-trainer", LABEL_JOB: plan.owner.name}


def _metadata(plan: Plan, name: str, **extra_labels: str) -> Manifest:
    return {
        "name": name,
        "namespace": plan.owner.namespace,
        "labels": {**labels(plan), **extra_labels},
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": plan.owner.name,
                "uid": plan.owner.uid,
                "controller": True,
            }
        ],
    }


def config_map(plan: Plan) -> Manifest:
    """The trainer's configuration, and the part of the spec it was made from. Immutable: a run that has begun
    keeps its configuration, whatever happens to the operator or to the spec."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(plan, config_name(plan.owner.name)),
        "immutable": True,
        "data": {
            "config.json": plan.config.model_dump_json(indent=1),
            "spec.json": json.dumps(plan.spec_part, sort_keys=True),
        },
    }


def service(plan: Plan) -> Manifest:
    """Headless, and publishing addresses before pods are ready: workers meet while they start."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(plan, service_name(plan.owner.name)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {LABEL_JOB: plan.owner.name},
            "ports": [{"name": "metrics", "port": run.HTTP_PORT, "protocol": "TCP"}],
        },
    }


def network_policy(plan: Plan) -> Manifest:
    """Workers are reached by each other on all ports, by everyone else on the metrics port only."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(plan, service_name(plan.owner.name)),
        "spec": {
            "podSelector": {"matchLabels": {LABEL_JOB: plan.owner.name}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": {LABEL_JOB: plan.owner.name}}}]},
                {"ports": [{"port": run.HTTP_PORT, "protocol": "TCP"}]},
            ],
        },
    }


def job(plan: Plan, attempt: int, excluded_nodes: tuple[str, ...] = ()) -> Manifest:
    """The gang of one attempt: an Indexed Job that never replaces a pod. The operator makes a new Job instead."""
    name = job_name(plan.owner.name, attempt)
    metadata = _metadata(plan, name, **{LABEL_ATTEMPT: str(attempt)}, **queue_labels(plan))
    made_from = {MADE_FROM: json.dumps(plan.steering, sort_keys=True)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        # Kueue reads some of its annotations here, and some at the pods.
        "metadata": {**metadata, "annotations": {**made_from, **of_domain(plan.owner.annotations, KUEUE)}},
        "spec": {
            "completionMode": "Indexed",
            "completions": plan.workers,
            "parallelism": plan.workers,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": pod_template(plan, attempt, excluded_nodes),
        },
    }


ENDS_TOLD = 10
"""Attempts of which a later one is told how they ended: who was killed could not write it down."""


def telling_of(job: Manifest, attempts: Iterable[AttemptStatus]) -> Manifest:
    """The Job of an attempt, whose report can say how the earlier ones ended."""
    ended = [attempt for attempt in attempts if attempt.end_time][-ENDS_TOLD:]
    ends = {str(attempt.number): [attempt.cause, attempt.message[:200]] for attempt in ended}
    for container in job["spec"]["template"]["spec"]["containers"]:
        if ends and container["name"] == run.TRAINER_CONTAINER:
            container["env"] = [*container["env"], {"name": run.ENV_ENDS, "value": json.dumps(ends)}]
    return job


def of_domain(given: Mapping[str, str], domain: str) -> dict[str, str]:
    """Labels or annotations of a domain, and of those below it (provreq.kueue.x-k8s.io)."""
    return {key: value for key, value in given.items() if f".{key.partition('/')[0]}".endswith(f".{domain}")}


def queue_labels(plan: Plan) -> dict[str, str]:
    """Labels of a Job that Kueue reads."""
    queue = {KUEUE_QUEUE: plan.profile.queue} if plan.profile.gang_scheduling == "kueue" else {}
    return queue | of_domain(plan.owner.labels, KUEUE)


def _alone(plan: Plan) -> Plan:
    """For a pod that belongs to no gang: what is said of one, to its scheduler or to Kueue, does not hold for it."""
    profile = plan.profile.model_copy(update={"gang_scheduling": ""})
    return replace(plan, profile=profile, owner=replace(plan.owner, annotations={}))


def pod_groups(plan: Plan) -> list[Manifest]:
    """The object that tells the profile's scheduler of gangs how many pods belong together; none where there is none.
    The job's attempts share it: there is one at a time."""
    scheduler = plan.profile.gang_scheduling
    if scheduler not in POD_GROUPS:
        return []
    metadata = _metadata(plan, pod_group_name(plan))
    spec: Manifest = {"minMember": plan.workers}
    if scheduler == "kubernetes":
        spec = {"schedulingPolicy": {"gang": {"minCount": plan.workers}}}
    if scheduler == "volcano":
        asked = {**plan.owner.labels, **plan.owner.annotations}
        spec["queue"] = asked.get(VOLCANO_QUEUE, plan.profile.queue)
        if priority := pod_template(plan, 1, ())["spec"].get("priorityClassName"):
            spec["priorityClassName"] = priority
        metadata["annotations"] = of_domain(plan.owner.annotations, VOLCANO)
    return [{"apiVersion": POD_GROUPS[scheduler], "kind": "PodGroup", "metadata": metadata, "spec": spec}]


def _member(plan: Plan) -> Manifest:
    """What in a pod tells the profile's scheduler of gangs to which one it belongs."""
    group = pod_group_name(plan)
    members: Mapping[str, Manifest] = {
        "kubernetes": {"spec": {"schedulingGroup": {"podGroupName": group}}},
        "coscheduling": {"metadata": {"labels": {"scheduling.x-k8s.io/pod-group": group}}},
        "volcano": {
            "metadata": {"annotations": {"scheduling.k8s.io/group-name": group}},
            "spec": {"schedulerName": "volcano"},
        },
    }
    return members.get(plan.profile.gang_scheduling, {})


def pod_template(plan: Plan, attempt: int, excluded_nodes: tuple[str, ...]) -> Manifest:
    """The worker pod: the operator's fields, the profile's over them, the user's over those."""
    base: Manifest = {
        "metadata": {
            "labels": {**labels(plan), "app.kubernetes.io/component": "worker", LABEL_ATTEMPT: str(attempt)},
            "annotations": {ANNOTATION_GPUS: str(plan.gpus_per_worker), **of_domain(plan.owner.annotations, KUEUE)},
        },
        "spec": {
            "restartPolicy": "Never",
            "subdomain": service_name(plan.owner.name),
            "terminationGracePeriodSeconds": int(seconds(plan.profile.termination_grace_period)),
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            # A dead node is noticed by its taint; five minutes (the default) would be five minutes lost.
            "tolerations": [
                {
                    "key": f"node.kubernetes.io/{taint}",
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": 10,
                }
                for taint in ("not-ready", "unreachable")
            ],
            "initContainers": [_fetch_container(plan)],
            "containers": [_trainer_container(plan, attempt)],
            "volumes": _volumes(plan),
        },
    }
    template: Manifest = merge(merge(merge(base, _member(plan)), plan.profile.template), plan.template)
    spec = _with_room_to_fetch(template["spec"])
    return {**template, "spec": _kept_off(spec, excluded_nodes) if excluded_nodes else spec}


_ROOM = ("cpu", "memory", "ephemeral-storage")


def _with_room_to_fetch(spec: Manifest) -> Manifest:
    """The pod's spec with the fetch container given what the trainer has of each resource for which it names nothing
    itself. It costs nothing, as the two never run at once; without it a quota on limits refuses the pod, and the pod
    is not of the class Guaranteed, however its trainer is set."""
    trainer = next(c for c in spec["containers"] if c["name"] == run.TRAINER_CONTAINER)
    init = [
        {**c, "resources": _with_room(c.get("resources") or {}, trainer.get("resources") or {})}
        if c["name"] == run.FETCH_CONTAINER
        else c
        for c in spec["initContainers"]
    ]
    return {**spec, "initContainers": init}


def _with_room(own: Manifest, trainer: Manifest) -> Manifest:
    named = {name for kind in ("requests", "limits") for name in own.get(kind) or {}}
    given = {
        kind: {name: value for name, value in (trainer.get(kind) or {}).items() if name in _ROOM and name not in named}
        for kind in ("requests", "limits")
    }
    return {**own, **{kind: {**(own.get(kind) or {}), **more} for kind, more in given.items() if more}}


def reader(plan: Plan, attempt: int) -> Manifest:
    """A Job of one small pod that says again what an attempt wrote, where its own pods are gone. The worker's pod with
    its credentials, volumes and place, without what trains: no GPUs, no fetching."""
    template = pod_template(_alone(plan), attempt, ())
    spec = {key: value for key, value in template["spec"].items() if key not in ("subdomain", "resourceClaims")}
    spec["initContainers"] = [c for c in spec.get("initContainers") or [] if c["name"] != run.FETCH_CONTAINER]
    spec["containers"] = [_reading(c) if c["name"] == run.TRAINER_CONTAINER else c for c in spec["containers"]]
    reads = {LABEL_READS: str(attempt)}
    known = {key: value for key, value in template["metadata"]["labels"].items() if key != LABEL_ATTEMPT}
    known |= {"app.kubernetes.io/component": "reader", **reads}
    notes = {key: value for key, value in template["metadata"]["annotations"].items() if key != ANNOTATION_GPUS}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(plan, reader_name(plan.owner.name, attempt), **reads, **queue_labels(plan)),
        "spec": {
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": 3,
            "podReplacementPolicy": "Failed",
            "template": {"metadata": {**template["metadata"], "labels": known, "annotations": notes}, "spec": spec},
        },
    }


def _reading(trainer: Manifest) -> Manifest:
    small = {"cpu": "500m", "memory": "512Mi"}
    kept = {key: value for key, value in trainer.items() if key not in ("args", "ports", "lifecycle")}
    probes = ("livenessProbe", "readinessProbe", "startupProbe")
    kept = {key: value for key, value in kept.items() if key not in probes}
    command = ["python", "-m", "finetune_trainer.recall"]
    return {**kept, "command": command, "resources": {"requests": small, "limits": small}}


def _kept_off(spec: Manifest, nodes: tuple[str, ...]) -> Manifest:
    """The pod's spec with these nodes excluded, whatever else its node affinity asks for: its terms are alternatives,
    so each of them gets the exclusion. By the node's name: the label kubernetes.io/hostname may say something else."""
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    affinity = spec.get("affinity") or {}
    node_affinity = affinity.get("nodeAffinity") or {}
    # A field takes one value only.
    others = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    selector = node_affinity.get(required) or {}
    terms = [
        # An empty term selects no node, and is to stay so.
        {**term, "matchFields": [*(term.get("matchFields") or []), *others]} if any(term.values()) else term
        for term in selector.get("nodeSelectorTerms") or []
    ]
    if not selector:
        terms = [{"matchFields": others}]
    node_affinity = {**node_affinity, required: {**selector, "nodeSelectorTerms": terms}}
    return {**spec, "affinity": {**affinity, "nodeAffinity": node_affinity}}


def _trainer_container(plan: Plan, attempt: int) -> Manifest:
    by_resource = plan.gpus_per_worker and plan.profile.gpu_resource
    gpus = {plan.profile.gpu_resource: str(plan.gpus_per_worker)} if by_resource else {}
    master = f"{job_name(plan.owner.name, attempt)}-0.{service_name(plan.owner.name)}"
    return {
        "name": run.TRAINER_CONTAINER,
        **_image(plan),
        "command": [
            "python",
            "-m",
            "finetune_trainer.launch",
            f"--nnodes={plan.workers}",
            f"--nproc-per-node={plan.processes_per_worker}",
            "--node-rank=$(JOB_COMPLETION_INDEX)",
            f"--master-addr={master}",
            f"--master-port={run.MASTER_PORT}",
        ],
        "env": [
            *_environment(plan),
            {"name": run.ENV_ATTEMPT, "value": str(attempt)},
            {"name": run.ENV_RUN, "value": plan.owner.uid},
            {"name": run.ENV_HTTP_PORT, "value": str(run.HTTP_PORT)},
            {"name": run.ENV_SAVE_STEPS, "value": str(plan.save_steps)},
            {"name": run.ENV_SAVE_TOTAL_LIMIT, "value": str(plan.save_total_limit)},
        ],
        "envFrom": _credentials(plan),
        "ports": [{"name": "metrics", "containerPort": run.HTTP_PORT, "protocol": "TCP"}],
        "resources": {"requests": gpus, "limits": gpus} if gpus else {},
        "securityContext": _SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(plan),
    }


def _fetch_container(plan: Plan) -> Manifest:
    return {
        "name": run.FETCH_CONTAINER,
        **_image(plan),
        "command": ["python", "-m", "finetune_trainer.fetch"],
        "env": _environment(plan),
        "envFrom": _credentials(plan),
        "securityContext": _SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(plan),
    }


_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def _image(plan: Plan) -> Manifest:
    return {"image": plan.profile.image, "imagePullPolicy": plan.profile.image_pull_policy}


def _credentials(plan: Plan) -> list[Manifest]:
    return [{"secretRef": {"name": plan.credentials_secret}}] if plan.credentials_secret else []


def _environment(plan: Plan) -> list[Manifest]:
    values = {
        run.ENV_CONFIG: f"{CONFIG_DIR}/config.json",
        run.ENV_CACHE: CACHE_DIR,
        run.ENV_WORK: WORK_DIR,
        run.ENV_TERMINATION_LOG: "/dev/termination-log",
        # The root file system is read-only: everything that libraries write goes here.
        "HOME": WORK_DIR,
        "TMPDIR": WORK_DIR,
        "HF_HOME": f"{CACHE_DIR}/huggingface",
        **plan.profile.env,
    }
    return [{"name": name, "value": value} for name, value in values.items()]


def _volumes(plan: Plan) -> list[Manifest]:
    cache: Manifest = {"name": "cache"}
    if plan.profile.cache.claim_name:
        cache["persistentVolumeClaim"] = {"claimName": plan.profile.cache.claim_name}
    else:
        limit = plan.profile.cache.size_limit
        cache["emptyDir"] = {"sizeLimit": limit} if limit else {}
    return [
        {"name": "config", "configMap": {"name": config_name(plan.owner.name)}},
        cache,
        {"name": "work", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": plan.profile.shm_size}},
        *({"name": f"claim-{c}", "persistentVolumeClaim": {"claimName": c}} for c in plan.claims),
    ]


def _mounts(plan: Plan) -> list[Manifest]:
    return [
        {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True},
        {"name": "cache", "mountPath": CACHE_DIR},
        {"name": "work", "mountPath": WORK_DIR},
        {"name": "shm", "mountPath": "/dev/shm"},
        *({"name": f"claim-{c}", "mountPath": f"{CLAIM_ROOT}/{c}"} for c in plan.claims),
    ]
