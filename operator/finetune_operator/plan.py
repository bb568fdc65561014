"""spec → Plan: every decision taken, every default resolved. Pure.

Called by ``reconcile.py`` with the validated spec; read by ``manifests.py``. It never looks at a cluster:
what it needs of the world (the profile, the outputs of input jobs, the frozen configuration of a run that has
begun) is handed in.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.base import seconds
from finetune_api.compatibility import COMPATIBILITY
from finetune_api.reinforcement import Rollout
from finetune_api.run import TrainerConfig
from finetune_api.schema import DEFAULT_METHOD, default_of
from finetune_api.spec import AdapterSource, FineTuneJobSpec, ModelSource
from finetune_api.stages import SECTIONS, STAGES, Rlaif
from finetune_operator.settings import Profile

CLAIM_ROOT = "/mnt/claims"
"""Where claims named by pvc:// are mounted, each under its own name."""


@dataclass(frozen=True)
class Owner:
    """The FineTuneJob everything is made for."""

    namespace: str
    name: str
    uid: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What is to run, complete: no reader of it has to know the spec."""

    owner: Owner
    config: TrainerConfig
    spec_part: dict[str, Any]
    """The part of the spec that decides the result, without defaults; frozen with the first attempt."""
    steering: dict[str, Any]
    """The part of the spec that every attempt takes anew (:func:`steering`)."""
    profile: Profile
    workers: int
    gpus_per_worker: int
    template: dict[str, Any]
    """The user's pod template fields."""
    credentials_secret: str
    claims: tuple[str, ...]
    """PersistentVolumeClaims to mount."""
    save_steps: int
    save_total_limit: int
    max_restarts: int
    hang_timeout: float
    """Seconds."""
    start_timeout: float
    """Seconds."""
    pending_timeout: float
    """Seconds."""

    @property
    def processes_per_worker(self) -> int:
        """Training processes in one pod: one per GPU, one on the CPU."""
        return max(1, self.gpus_per_worker)

    @property
    def digest(self) -> str:
        """``sha256:…`` of the trainer's configuration."""
        return "sha256:" + hashlib.sha256(self.config.model_dump_json().encode()).hexdigest()


RESULT_FIELDS = ("stage", "model", "method", "data", "training", *SECTIONS, "evaluation", "deepspeed", "output")
"""Top-level fields of the spec that change the result of a run, or where it lies."""


def result_part(spec: FineTuneJobSpec) -> dict[str, Any]:
    """What of the spec is immutable once the job has started, without defaults (so that an operator that
    knows new fields still finds it equal)."""
    dump = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    part = {field: dump[field] for field in RESULT_FIELDS if field in dump}
    part["checkpoint"] = {"uri": spec.checkpoint.uri, "resume": spec.checkpoint.resume}
    return part


def steering(spec: FineTuneJobSpec) -> dict[str, Any]:
    """What of the spec an attempt is made with, and changes with the next one. Of the pod template, which may be long,
    a digest."""
    workers, checkpoint, credentials = spec.workers, spec.checkpoint, spec.credentials
    template = json.dumps(workers.template, sort_keys=True)
    return {
        "workers": {
            "replicas": workers.replicas,
            "gpusPerWorker": workers.gpus_per_worker,
            "template": "sha256:" + hashlib.sha256(template.encode()).hexdigest()[:12],
        },
        "checkpoint": {"save_steps": checkpoint.save_steps, "save_total_limit": checkpoint.save_total_limit},
        "profile": spec.profile,
        "credentials": {"secretName": credentials.secret_name if credentials else ""},
    }


def changed_fields(frozen: Mapping[str, Any], present: Mapping[str, Any], at: str = "spec") -> list[str]:
    """Paths at which two results of :func:`result_part` differ, each with both values."""
    changes = []
    for key in sorted({*frozen, *present}):
        before, after = frozen.get(key), present.get(key)
        if isinstance(before, Mapping) or isinstance(after, Mapping):  # one that is missing has its defaults
            before, after = before or {}, after or {}
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += changed_fields(before, after, f"{at}.{key}")
            continue
        default = default_of(f"{at}.{key}", str(present.get("type", DEFAULT_METHOD)))
        if (default if before is None else before) != (default if after is None else after):
            changes.append(f"{at}.{key}: {_told(before, default)} → {_told(after, default)}")
    return changes


def _told(value: Any, default: Any) -> str:
    """A value of :func:`result_part`, which leaves defaults out."""
    if value is not None:
        return json.dumps(value)
    return "not set" if default is None else f"not set (the default, {json.dumps(default)})"


def make_plan(
    owner: Owner,
    spec: FineTuneJobSpec,
    profile: Profile,
    inputs: Mapping[str, str],
    frozen: TrainerConfig | None = None,
    base: ModelSource | None = None,
) -> Plan:
    """Resolve a valid spec.

    ``inputs`` maps each ``job://`` URI of the spec to the URI of that job's output. ``frozen`` is the
    configuration of a run that has begun: it is kept as it is, only what steers is taken from the spec. ``base``:
    what to start from where the output that ``model.uri`` names is an adapter (:func:`with_adapter`).
    """
    written = result_part(spec)
    if base is not None:
        spec = _started_from(spec, base)
    config = frozen or trainer_config(owner, spec, inputs)
    return Plan(
        owner=owner,
        config=config,
        spec_part=written,
        steering=steering(spec),
        profile=profile,
        workers=spec.workers.replicas,
        gpus_per_worker=spec.workers.gpus_per_worker,
        template=spec.workers.template,
        credentials_secret=spec.credentials.secret_name if spec.credentials else profile.credentials_secret,
        claims=claims(config),
        save_steps=spec.checkpoint.save_steps,
        save_total_limit=spec.checkpoint.save_total_limit,
        max_restarts=spec.recovery.max_restarts,
        hang_timeout=seconds(spec.recovery.hang_timeout),
        start_timeout=seconds(spec.recovery.start_timeout),
        pending_timeout=seconds(spec.recovery.pending_timeout),
    )


def not_a_base(config: TrainerConfig) -> str:
    """Why another job cannot start from the adapter that a run has written; empty: it can."""
    row = COMPATIBILITY[config.method.type]
    if not row.chains:
        return f"what method.type {config.method.type} trains is " + (
            "several adapters, one per task" if row.tasks else "no part of any weight"
        )
    if not STAGES[config.stage].generates:
        return f"stage {config.stage} has given its model another head"
    if config.model.gguf_file:
        return "its model is a GGUF file"
    return ""


def with_adapter(model: ModelSource, adapter: str) -> ModelSource:
    """The model of a finished run (its claims are mounted) with the adapter it wrote on top."""
    below = [one for one in model.adapters if not one.train]  # what was trained on is in the new one
    return model.model_copy(
        update={
            "uri": unmounted(model.uri),
            "adapters": [
                *(one.model_copy(update={"uri": unmounted(one.uri)}) for one in below),
                AdapterSource(uri=adapter),
            ],
        }
    )


def _started_from(spec: FineTuneJobSpec, base: ModelSource) -> FineTuneJobSpec:
    """The spec with another model, and its own adapters on top of that one's."""
    own = spec.model
    model = base.model_copy(
        update={
            "dtype": own.dtype,
            "trust_remote_code": base.trust_remote_code or own.trust_remote_code,
            "adapters": [*base.adapters, *own.adapters],
        }
    )
    return spec.model_copy(update={"model": model})


def trainer_config(owner: Owner, spec: FineTuneJobSpec, inputs: Mapping[str, str]) -> TrainerConfig:
    """The trainer's configuration of a job that has not begun."""
    on_gpu = spec.workers.gpus_per_worker > 0
    dtype = spec.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"

    def resolved(uri: str) -> str:
        return mounted(inputs.get(uri, uri))

    processes = spec.workers.replicas * max(1, spec.workers.gpus_per_worker)
    training = spec.training
    return TrainerConfig(
        namespace=owner.namespace,
        name=owner.name,
        stage=spec.stage,
        model=spec.model.model_copy(
            update={
                "uri": resolved(spec.model.uri),
                "dtype": dtype,
                "adapters": [a.model_copy(update={"uri": resolved(a.uri)}) for a in spec.model.adapters],
            }
        ),
        method=spec.method,
        data=spec.data.model_copy(
            update={
                "train": [s.model_copy(update={"uri": resolved(s.uri)}) for s in spec.data.train],
                "eval": [s.model_copy(update={"uri": resolved(s.uri)}) for s in spec.data.eval],
            }
        ),
        training=training,
        **stage_parameters(spec, resolved),
        evaluation=spec.evaluation,
        deepspeed=deepspeed_config(spec, dtype),
        checkpoint_uri=mounted(checkpoint_uri(owner, spec)),
        save_steps=spec.checkpoint.save_steps,
        save_total_limit=spec.checkpoint.save_total_limit,
        resume=spec.checkpoint.resume,
        output_uri=mounted(spec.output.uri).rstrip("/"),
        merge=spec.output.merge,
        max_shard_size=spec.output.max_shard_size,
        global_batch_size=training.per_device_train_batch_size * training.gradient_accumulation_steps * processes,
        accelerator="gpu" if on_gpu else "cpu",
    )


def stage_parameters(spec: FineTuneJobSpec, resolved: Callable[[str], str]) -> dict[str, Any]:
    """``spec.<stage>``, with its defaults where the user wrote none. ``resolved``: of a URI what the pods see."""
    made = STAGES[spec.stage].parameters
    if made is None:
        return {}
    options: Any = getattr(spec, spec.stage) or made()
    if isinstance(options, Rlaif) and options.judge.uri is not None:
        judge = options.judge.model_copy(update={"uri": resolved(options.judge.uri)})
        options = options.model_copy(update={"judge": judge})
    if isinstance(options, Rollout):
        model = options.reward_model
        options = options.model_copy(
            update={
                "reward_model": model and model.model_copy(update={"uri": resolved(model.uri)}),
                "reward_funcs": [f.model_copy(update={"uri": f.uri and mounted(f.uri)}) for f in options.reward_funcs],
            }
        )
    return {spec.stage: options}


def checkpoint_uri(owner: Owner, spec: FineTuneJobSpec) -> str:
    """The folder of this job's checkpoints: ``<checkpoint.uri>/<name>``, else ``<output.uri>/checkpoints``."""
    if spec.checkpoint.uri:
        return f"{spec.checkpoint.uri.rstrip('/')}/{owner.name}"
    return f"{spec.output.uri.rstrip('/')}/checkpoints"


def deepspeed_config(spec: FineTuneJobSpec, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration but for the batch sizes: what the plan decides, the user's keys over it."""
    chosen = spec.deepspeed.zero_optimization.stage
    stage: int = COMPATIBILITY[spec.method.type].default_zero_stage if chosen is None else chosen
    decided: dict[str, Any] = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": spec.training.max_grad_norm,
        "steps_per_print": 1_000_000_000,
    }
    # Adapters keep fp32 parameters of their own beside a bf16 model and need no master copy: DeepSpeed's bf16
    # section would only cost time there.
    if dtype == "bfloat16" and (COMPATIBILITY[spec.method.type].whole_model or stage > 0):
        decided["bf16"] = {"enabled": True}
    user = spec.deepspeed.model_dump(mode="json", exclude_none=True)
    return merge(decided, {key: value for key, value in _without_auto(user).items() if key not in _OURS})


_OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler")
"""Keys that repeat spec.training (a contradiction is refused): the engine sets them from the world and the spec."""


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's ``"auto"`` means: as the rest of the spec says."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != "auto"
    }


Kinds = tuple[str, ...]
MODEL: Kinds = ("merged", "model")
ADAPTER: Kinds = ("adapter",)
DATA: Kinds = ("data",)
"""Kinds of outputs, the preferred first."""


def input_uris(spec: FineTuneJobSpec) -> dict[str, Kinds]:
    """What the job reads, each of which may be the output of another job; and of which kinds that may be."""
    uris: dict[str, Kinds] = dict.fromkeys((s.uri for s in (*spec.data.train, *spec.data.eval)), DATA)
    if spec.rlaif is not None and spec.rlaif.judge.uri is not None:
        uris[spec.rlaif.judge.uri] = MODEL
    options = getattr(spec, spec.stage, None)
    if isinstance(options, Rollout) and options.reward_model is not None:
        uris[options.reward_model.uri] = (*MODEL, *ADAPTER)
    uris |= {adapter.uri: ADAPTER for adapter in spec.model.adapters}
    return {spec.model.uri: MODEL} | uris


def waited_for(spec: FineTuneJobSpec) -> dict[str, Kinds]:
    """Of :func:`input_uris` the outputs of other jobs, ``job://NAME``."""
    return {uri: kinds for uri, kinds in input_uris(spec).items() if uri.startswith("job://")}


def claims(config: TrainerConfig) -> tuple[str, ...]:
    """Names of all claims the job reads or writes through pvc://. From the configuration: what a job:// input was is
    known there also when that job is gone."""
    uris = [config.model.uri, *(adapter.uri for adapter in config.model.adapters)]
    uris += [config.output_uri, config.checkpoint_uri, *(s.uri for s in (*config.data.train, *config.data.eval))]
    uris += [config.rlaif.judge.uri or ""] if config.rlaif is not None else []
    if (judged := config.rollout) is not None:
        uris += [judged.reward_model.uri] if judged.reward_model else []
        uris += [function.uri for function in judged.reward_funcs if function.uri]
    found = (unmounted(uri) for uri in uris)
    return tuple(sorted({uri[len("pvc://") :].split("/", 1)[0] for uri in found if uri.startswith("pvc://")}))


def mounted(uri: str) -> str:
    """``pvc://claim/path`` as the file:// URI the pods see it under; every other URI as it is."""
    if not uri.startswith("pvc://"):
        return uri
    return f"file://{CLAIM_ROOT}/{uri[len('pvc://') :]}"


def unmounted(uri: str) -> str:
    """The other way round."""
    inside = f"file://{CLAIM_ROOT}/"
    return f"pvc://{uri[len(inside) :]}" if uri.startswith(inside) else uri


_NAMED: Mapping[str, Any] = {"name": None}
_IDENTITIES: Mapping[str, Mapping[str, Any]] = {
    "envFrom": {"prefix": "", "configMapRef": None, "secretRef": None},
    "ports": {"containerPort": None, "protocol": "TCP"},
    "tolerations": {"key": "", "operator": "Equal", "value": "", "effect": ""},
    "volumeMounts": {"mountPath": None},
}
"""What tells the items of a list apart, with Kubernetes' defaults; in every other list, the name."""


def merge(base: Any, over: Any, field: str = "") -> Any:
    """``over`` laid over ``base``, the values of ``field``: mappings by key, lists of objects by what tells their items
    apart (:data:`_IDENTITIES`), all else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for key, value in over.items():
            merged[key] = merge(base[key], value, key) if key in base else value
        return merged
    if over and isinstance(base, list) and isinstance(over, list):
        identity = _IDENTITIES.get(field, _NAMED)
        items = [*base, *over]
        named = identity is not _NAMED or all(isinstance(item, dict) and "name" in item for item in items)
        if named and all(isinstance(item, dict) for item in items):
            found: dict[str, Any] = {}
            for item in items:
                key = json.dumps([item.get(part, default) for part, default in identity.items()])
                found[key] = _merge_item(found[key], item, field) if key in found else item
            return list(found.values())
    return over


def _merge_item(base: dict[str, Any], over: dict[str, Any], field: str) -> Any:
    # A variable has either a value or a source, a volume one kind of source: both together would be refused.
    if field == "env" or (field == "volumes" and base.keys() != over.keys()):
        return over
    return merge(base, over)
