"""What the API server cannot see in a spec: keys without a schema. Told by the ``Accepted`` condition.

Each check gets a part of the spec and yields its findings: path below that part, value, accepted, remedy
(``mistakes.py`` makes mistakes of them). A check never raises, whatever the user wrote there.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from finetune_api import run
from finetune_api.compatibility import COMPATIBILITY
from finetune_api.schema import text
from finetune_api.spec import DataSource, FineTuneJobSpec, Training, Workers
from finetune_api.stages import ROLLOUTS, STAGES, SequenceClassification, TokenClassification

Finding = tuple[str, Any, str, str]


def close(name: str, names: Iterable[str], least: float = 0.7) -> str | None:
    """The one of the names that was probably meant."""
    plain = {_plain(known): known for known in names}
    found = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=least)
    return plain[found[0]] if found else None


_CERTAIN = 0.9
"""As like a known name as a key must be to be refused as misspelt: newer versions know more keys than we do."""


def _words(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


# ---- spec.training.lr_scheduler_kwargs ----

SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "constant": (),
    "constant_with_warmup": (),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
}
"""What transformers' schedulers take."""


def scheduler(training: Training) -> Iterator[Finding]:
    kind, given = training.lr_scheduler_type, training.lr_scheduler_kwargs
    known = SCHEDULER_KWARGS[kind]
    for name, value in given.items():
        at = f"lr_scheduler_kwargs.{name}"
        if name not in known:
            homes = [k for k, names in SCHEDULER_KWARGS.items() if name in names]
            meant = close(name, known)
            yield (
                at,
                value,
                (" or ".join(known) if known else "no arguments") + f" with lr_scheduler_type: {kind}",
                f"write {meant}" if meant else f"set lr_scheduler_type: {homes[0]}" if homes else "remove it",
            )
        elif isinstance(value, bool) or not isinstance(value, int | float):
            yield at, value, "a number", "write a number (without quotes)"
        elif name in ("min_lr", "lr_end") and not 0 <= value < training.learning_rate:
            yield (
                at,
                value,
                f"at least 0 and less than learning_rate, {text(training.learning_rate)}",
                "lower it, or raise spec.training.learning_rate",
            )
        elif name == "min_lr_rate" and not 0 <= value < 1:
            yield at, value, "a share of learning_rate: at least 0 and less than 1", "e.g. 0.1"
    if kind == "cosine_with_min_lr":
        both = [name for name in ("min_lr", "min_lr_rate") if name in given]
        if len(both) != 1:
            yield (
                "lr_scheduler_kwargs",
                given,
                "exactly one of min_lr and min_lr_rate with lr_scheduler_type: cosine_with_min_lr",
                "remove one of them" if both else "add e.g. min_lr_rate: 0.1",
            )


# ---- spec.data ----


def columns(source: DataSource) -> Iterator[Finding]:
    """YAML makes truth of a column's name before anybody can see what was written."""
    for name in ("true", "false"):
        if name in source.columns:
            words = "y, yes, on" if name == "true" else "n, no, off"
            yield (
                f"columns[{name}]",
                source.columns[name],
                f"the name of a column; YAML reads {words} as {name}",
                "put the column's name into quotes",
            )


# ---- spec.method.target_modules ----


def target_modules(method: Any) -> Iterator[Finding]:
    given = getattr(method, "target_modules", None)
    if given is None:
        return
    if not given:
        yield (
            "target_modules",
            given,
            "all-linear, a list of module names, or a regular expression",
            "name at least one module, or leave it out for all-linear",
        )
    elif isinstance(given, list):
        if not all(given) or len(set(given)) != len(given):
            yield "target_modules", given, "every module name once, none empty", "remove empty and repeated names"
        both = [name for name in given if name in getattr(method, "modules_to_save", ())]
        if both:
            yield (
                "target_modules",
                given,
                f"modules that are not in modules_to_save, as {', '.join(both)} is",
                "train a module whole (modules_to_save) or by the adapter (target_modules), not both",
            )
    elif given not in ("all-linear", "auto"):
        if getattr(method, "layers_to_transform", None):
            yield (
                "target_modules",
                given,
                "all-linear or a list of module names, with layers_to_transform",
                "put the numbers of the layers into the regular expression, and remove layers_to_transform",
            )
        try:
            re.compile(given)
        except re.error as error:
            yield "target_modules", given, "a valid regular expression", f"correct it: {error}"
            return
        if re.fullmatch(r"[\w\s,-]+", given):
            names = [name for name in re.split(r"[\s,]+", given) if name]
            yield (
                "target_modules",
                given,
                "all-linear, a list of module names, or a regular expression over full module names",
                f"write a list: [{', '.join(names)}]; one text is a regular expression, and this one "
                "matches no full name such as model.layers.0.self_attn.q_proj",
            )


# ---- spec.method: regular expressions, and AdaLoRA's schedule ----


def patterns(method: Any) -> Iterator[Finding]:
    for name in ("freeze_trainable_modules", "freeze_extra_modules"):
        given = getattr(method, name, None) or ""
        try:
            re.compile(given)
        except re.error as error:
            yield name, given, "a valid regular expression", f"correct it: {error}"


def rewards(spec: FineTuneJobSpec) -> Iterator[Finding]:
    for stage in ROLLOUTS:
        options = getattr(spec, stage)
        for number, function in enumerate(options.reward_funcs if options else ()):
            try:
                re.compile(function.pattern)
            except re.error as error:
                at = f"{stage}.reward_funcs[{number}].pattern"
                yield at, function.pattern, "a valid regular expression", f"correct it: {error}"


def adalora(spec: FineTuneJobSpec) -> Iterator[Finding]:
    method: Any = spec.method
    if method.type != "adalora":
        return
    if 0 < spec.training.max_steps <= method.tinit + method.tfinal:
        yield (
            "method.tinit",
            method.tinit,
            f"tinit + tfinal less than spec.training.max_steps, {spec.training.max_steps}",
            "lower tinit or tfinal: the ranks are given in the steps between them",
        )


def bf16_section(spec: FineTuneJobSpec) -> Iterator[Finding]:
    if COMPATIBILITY[spec.method.type].zero_stages == (0,) and _get(spec.deepspeed.model_extra, "bf16.enabled") is True:
        yield (
            "deepspeed.bf16.enabled",
            True,
            f"no bf16 section with spec.method.type: {spec.method.type}",
            "remove it: the adapter stays float32 beside a bfloat16 model",
        )


# ---- spec.sequence_classification, spec.token_classification ----


def labels(section: SequenceClassification | TokenClassification) -> Iterator[Finding]:
    """Comparing a thousand names with each other is more than a rule of the API server may cost."""
    twice = [name for number, name in enumerate(section.labels) if name in section.labels[:number]]
    if twice:
        yield "labels", twice[0], "every label once", "remove the repetition"


# ---- spec.deepspeed ----

_DEEPSPEED_KEYS = _words(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler fp16 bf16 amp
    torch_autocast gradient_clipping zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    communication_data_type seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor
    sparse_gradients steps_per_print wall_clock_breakdown dump_state flops_profiler activation_checkpointing
    comms_logger tensorboard wandb comet csv_monitor data_types aio checkpoint nebula elasticity autotuning
    data_efficiency curriculum_learning compression_training disable_allgather memory_breakdown dataloader_drop_last
    use_data_before_expert_parallelism hybrid_engine tensor_parallel pipeline
    gradient_allreduce_op compile disable_python_gc vocabulary_size max_grad_norm eigenvalue progressive_layer_drop
    """
)
_ZERO_KEYS = _words(
    """
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
    allgather_partitions allgather_bucket_size overlap_comm load_from_fp32_weights elastic_checkpoint offload_param
    offload_optimizer sub_group_size cpu_offload cpu_offload_param cpu_offload_use_pin_memory
    stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size
    stage3_param_persistence_threshold stage3_model_persistence_threshold
    stage3_gather_fp16_weights_on_model_save stage3_gather_16bit_weights_on_model_save
    stage3_module_granularity_threshold ignore_unused_parameters round_robin_gradients zero_hpz_partition_size
    zero_quantized_weights zero_quantized_gradients zero_quantized_nontrainable_weights memory_efficient_linear
    pipeline_loading_checkpoint override_module_apply mics_shard_size mics_hierarchical_params_gather
    log_trace_cache_warnings leaf_module compute_grad_norm save_muon_momentum_buffer_in_memory zenflow
    parameter_alignment allgather_sequential stage3_allgather_sequential stage3_use_all_reduce_for_fetch_params
    use_all_reduce_for_fetch_params model_persistence_threshold param_persistence_threshold max_live_parameters
    max_reuse_distance prefetch_bucket_size gather_16bit_weights_on_model_save module_granularity_threshold
    enable_sanity_checks legacy_stage1
    """
)

_OURS: dict[str, tuple[str, str]] = {
    "scheduler": ("no scheduler", "remove it and set spec.training.lr_scheduler_type and warmup_steps"),
    "amp": ("no amp", "remove it and set spec.model.dtype"),
    "elasticity": ("no elasticity", "remove it; the batch is kept when spec.workers.replicas changes"),
    "curriculum_learning": ("no curriculum_learning", "remove it; the order of rows is the trainer's"),
    "data_efficiency": ("no data_efficiency", "remove it; the order of rows is the trainer's"),
    "pipeline": ("no pipeline", "remove it; layers are not spread over processes"),
    "tensor_parallel": ("no tensor_parallel", "remove it; use zero_optimization.stage: 3 for large models"),
    "hybrid_engine": ("no hybrid_engine", "remove it; it has no use in supervised training"),
    "sequence_parallel_size": ("no sequence_parallel_size", "remove it; sequences are not cut over processes"),
    **{
        name: (f"no {name}", "remove it; metrics.jsonl, the report and Prometheus have the figures")
        for name in ("tensorboard", "wandb", "comet", "csv_monitor")
    },
    **{
        name: (f"no {name}", "remove it; it changes what is learned, behind the trainer's back")
        for name in ("compression_training", "progressive_layer_drop", "eigenvalue", "sparse_attention")
    },
    "autotuning": ("no autotuning", "remove it; it starts trainings of its own"),
    "nebula": ("no nebula", "remove it; checkpoints are the trainer's"),
}


def _processes(spec: FineTuneJobSpec) -> int:
    return spec.workers.replicas * max(1, spec.workers.gpus_per_worker)


# What DeepSpeed's keys repeat of the spec: key, what the spec says, its field.
_REPEATED: tuple[tuple[str, Callable[[FineTuneJobSpec], Any], str], ...] = (
    (
        "train_micro_batch_size_per_gpu",
        lambda spec: spec.training.per_device_train_batch_size,
        "per_device_train_batch_size",
    ),
    (
        "gradient_accumulation_steps",
        lambda spec: spec.training.gradient_accumulation_steps,
        "gradient_accumulation_steps",
    ),
    (
        "train_batch_size",
        lambda spec: (
            spec.training.per_device_train_batch_size * spec.training.gradient_accumulation_steps * _processes(spec)
        ),
        "per_device_train_batch_size x gradient_accumulation_steps x processes",
    ),
    ("gradient_clipping", lambda spec: spec.training.max_grad_norm, "max_grad_norm"),
    ("optimizer.params.lr", lambda spec: spec.training.learning_rate, "learning_rate"),
    (
        "optimizer.params.betas",
        lambda spec: [spec.training.adam_beta1, spec.training.adam_beta2],
        "adam_beta1 and adam_beta2",
    ),
    ("optimizer.params.eps", lambda spec: spec.training.adam_epsilon, "adam_epsilon"),
    ("optimizer.params.weight_decay", lambda spec: spec.training.weight_decay, "weight_decay"),
)


def _repeats(key: str, says: Callable[[FineTuneJobSpec], Any], field: str) -> Callable[[Any], Iterator[Finding]]:
    def check(spec: FineTuneJobSpec) -> Iterator[Finding]:
        value = _get(spec.deepspeed.model_extra, key)
        if value is not _NOTHING and value != "auto" and value != says(spec):
            yield (
                f"deepspeed.{key}",
                value,
                f"{text(says(spec))}, as spec.training.{field} says, or auto",
                f"remove it here and set spec.training.{field}",
            )

    return check


def deepspeed(spec: FineTuneJobSpec) -> Iterator[Finding]:
    given: Mapping[str, Any] = spec.deepspeed.model_extra or {}
    yield from _misspelt(given, _DEEPSPEED_KEYS, "deepspeed.")
    optimizer = _get(given, "optimizer.type")
    if optimizer is not _NOTHING and optimizer not in ("auto", "AdamW", "Adam"):
        yield "deepspeed.optimizer.type", optimizer, "AdamW", "remove it; the trainer optimises by AdamW"
    for key, (accepted, remedy) in _OURS.items():
        if key in given:
            yield f"deepspeed.{key}", given[key], accepted, remedy


def precision(spec: FineTuneJobSpec) -> Iterator[Finding]:
    given = spec.deepspeed.model_extra
    dtype: str = spec.model.dtype
    field = f"spec.model.dtype: {dtype}"
    if dtype == "auto":
        dtype = "bfloat16" if spec.workers.gpus_per_worker else "float32"
        field = f"spec.model.dtype: auto with spec.workers.gpusPerWorker: {spec.workers.gpus_per_worker}"
    if _get(given, "fp16.enabled") not in (_NOTHING, "auto", False):
        yield (
            "deepspeed.fp16.enabled",
            _get(given, "fp16.enabled"),
            f"false, as {field} says",
            "remove fp16 and set spec.model.dtype: bfloat16, which needs no loss scaling",
        )
    wanted = dtype == "bfloat16"
    if _get(given, "bf16.enabled") not in (_NOTHING, "auto", wanted):
        yield (
            "deepspeed.bf16.enabled",
            _get(given, "bf16.enabled"),
            f"{text(wanted)}, as {field} says, or auto",
            f"remove bf16 and set spec.model.dtype: {'float32' if wanted else 'bfloat16'}",
        )


def zero_optimization(spec: FineTuneJobSpec) -> Iterator[Finding]:
    zero = spec.deepspeed.zero_optimization
    given: Mapping[str, Any] = zero.model_extra or {}
    at = "deepspeed.zero_optimization"
    yield from _misspelt(given, _ZERO_KEYS, f"{at}.")
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if given.get(old):
            yield f"{at}.{old}", given[old], f"{new}, its successor", f"write {new}: {{device: cpu}}"
    stage = COMPATIBILITY[spec.method.type].default_zero_stage if zero.stage is None else zero.stage
    chosen = f"stage is {stage}" + (f" (by default with {spec.method.type})" if zero.stage is None else "")
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        if key not in given:
            continue
        device = _get(given, f"{key}.device")
        if device in ("none", None):
            continue
        if device not in ("cpu", "nvme"):
            yield (
                f"{at}.{key}",
                given[key],
                "{device: cpu} or {device: nvme, nvme_path: PATH}",
                "name the device",
            )
            continue
        if stage not in stages:
            yield (
                f"{at}.{key}",
                given[key],
                f"{key} with stage {' or '.join(map(str, stages))}, and here {chosen}",
                f"set spec.{at}.stage: {3 if key == 'offload_param' else 2}, or remove {key}",
            )
        if device == "nvme" and _get(given, f"{key}.nvme_path") is _NOTHING:
            yield f"{at}.{key}", given[key], "nvme_path beside device: nvme", "add nvme_path"


_NOTHING: Any = object()


def _get(mapping: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(mapping, Mapping) or part not in mapping:
            return _NOTHING
        mapping = mapping[part]
    return mapping


def _misspelt(given: Mapping[str, Any], known: Iterable[str], at: str) -> Iterator[Finding]:
    """Keys nearly spelt like known ones. Others are passed on: newer versions know more."""
    for key, value in given.items():
        meant = None if key in known else close(key, known, _CERTAIN)
        if meant:
            yield f"{at}{key}", value, f"a known key, such as {meant}", f"write {meant}"


# ---- spec.workers.template ----

_POD_FIELDS = _words(
    """
    activeDeadlineSeconds affinity automountServiceAccountToken containers dnsConfig dnsPolicy enableServiceLinks
    hostAliases hostIPC hostNetwork hostPID hostUsers hostname hostnameOverride imagePullSecrets initContainers
    nodeName nodeSelector os overhead preemptionPolicy priority priorityClassName readinessGates resourceClaims
    resources restartPolicy runtimeClassName schedulerName schedulingGates securityContext serviceAccountName
    setHostnameAsFQDN shareProcessNamespace subdomain terminationGracePeriodSeconds tolerations
    topologySpreadConstraints volumes
    """
)
_POD_OBJECTS = _words("affinity dnsConfig nodeSelector os overhead resources securityContext")
_POD_LISTS = _words(
    """
    hostAliases imagePullSecrets readinessGates resourceClaims schedulingGates tolerations topologySpreadConstraints
    """
)
_POD_BOOLEANS = _words(
    "automountServiceAccountToken enableServiceLinks hostIPC hostNetwork hostPID hostUsers shareProcessNamespace"
)
_POD_INTEGERS = _words("priority terminationGracePeriodSeconds")
_POD_TEXTS = _words(
    "dnsPolicy nodeName preemptionPolicy priorityClassName runtimeClassName schedulerName serviceAccountName"
)
_OWNED_POD_FIELDS = {
    "restartPolicy": "a failed worker ends the attempt; spec.recovery says what happens then",
    "hostname": "workers find each other by the names the Job gives them",
    "hostnameOverride": "workers find each other by the names the Job gives them",
    "setHostnameAsFQDN": "workers find each other by the names the Job gives them",
    "subdomain": "workers find each other through the operator's Service",
    "activeDeadlineSeconds": "it would end each attempt as failed; limit a run by spec.training.max_steps",
}
_OWNED_CONTAINER_FIELDS = {
    "command": "the operator starts the trainer",
    "args": "the operator starts the trainer",
    "terminationMessagePath": "the cause of a failure is read from there",
    "restartPolicy": "a failed worker ends the attempt; spec.recovery says what happens then",
}
_OWNED_ENVIRONMENT = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "JOB_COMPLETION_INDEX",
)
_OWNED_LABELS = ("finetune.dev/", "batch.kubernetes.io/", "app.kubernetes.io/managed-by")
_EMPTY_DIRS = ("cache", "work", "shm")
_OURS_BY_NAME = (run.TRAINER_CONTAINER, run.FETCH_CONTAINER)


def template(workers: Workers) -> Iterator[Finding]:
    given = workers.template
    for key, value in given.items():
        at = f"template.{key}"
        if key == "metadata":
            yield from _template_metadata(at, value)
        elif key == "spec":
            yield from _template_spec(at, value, workers.gpus_per_worker)
        else:
            below = "spec" if key in _POD_FIELDS else "metadata" if key in ("labels", "annotations") else None
            yield (
                at,
                value,
                "metadata and spec",
                f"write it as spec.workers.template.{below}.{key}" if below else "remove it",
            )


def _template_metadata(at: str, metadata: Any) -> Iterator[Finding]:
    if not isinstance(metadata, Mapping):
        yield at, metadata, "an object with labels and annotations", "write labels: or annotations: below it"
        return
    for key, entries in metadata.items():
        if key not in ("labels", "annotations"):
            yield f"{at}.{key}", entries, "labels and annotations", "remove it; the Job names its pods"
        elif not isinstance(entries, Mapping):
            yield f"{at}.{key}", entries, "an object of texts", "write it as name: value"
        else:
            for name, value in entries.items():
                if not isinstance(value, str):
                    yield f"{at}.{key}[{name}]", value, "a text", "put it into quotes"
                if key == "labels" and str(name).startswith(_OWNED_LABELS):
                    yield (
                        f"{at}.labels[{name}]",
                        value,
                        "labels that are not the operator's",
                        "remove it; the operator finds its pods by this label",
                    )


def _template_spec(at: str, spec: Any, gpus: int) -> Iterator[Finding]:
    if not isinstance(spec, Mapping):
        yield at, spec, "an object with the fields of a pod's spec", "write the fields below it"
        return
    for key, value in spec.items():
        if key in _OWNED_POD_FIELDS:
            yield f"{at}.{key}", value, "what the operator sets", f"remove it; {_OWNED_POD_FIELDS[key]}"
        elif key not in _POD_FIELDS and (meant := close(key, _POD_FIELDS, _CERTAIN)):
            yield f"{at}.{key}", value, f"a field of a pod's spec, such as {meant}", f"write {meant}"
        else:
            yield from _typed(f"{at}.{key}", key, value)
    for key in ("containers", "initContainers", "volumes"):
        if key in spec:
            yield from _named(f"{at}.{key}", spec[key])
    for key in ("containers", "initContainers"):
        for index, container in enumerate(_objects(spec.get(key))):
            if container.get("name") in _OURS_BY_NAME:
                yield from _our_container(f"{at}.{key}[{index}]", container, gpus)
    for index, volume in enumerate(_objects(spec.get("volumes"))):
        yield from _volume(f"{at}.volumes[{index}]", volume)


def _typed(at: str, key: str, value: Any) -> Iterator[Finding]:
    """A field of another type would only be found when the first Job is made."""
    if value is None:
        return
    if key in _POD_OBJECTS and not isinstance(value, Mapping):
        yield at, value, "an object", "write its fields below it, as name: value"
    elif key in _POD_LISTS:
        if not isinstance(value, list):
            yield at, value, "a list of objects", "write each item on a line that begins with -"
        elif not all(isinstance(item, Mapping) for item in value):
            yield at, value, "a list of objects", "write the fields of each item behind its -, as name: value"
    elif key in _POD_BOOLEANS and not isinstance(value, bool):
        yield at, value, "true or false", "write true or false, without quotes"
    elif key in _POD_INTEGERS and (isinstance(value, bool) or not isinstance(value, int | float) or value % 1):
        yield at, value, "a whole number", "write a whole number, without quotes"
    elif key in _POD_TEXTS and not isinstance(value, str):
        yield at, value, "a text", "put it into quotes" if isinstance(value, int | float) else "write a text"
    elif key == "nodeSelector":
        for name, wanted in value.items():
            if not isinstance(wanted, str):
                yield f"{at}[{name}]", wanted, "a text", "put it into quotes"


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [v if isinstance(v, Mapping) else {} for v in value] if isinstance(value, list) else []


def _named(at: str, entries: Any) -> Iterator[Finding]:
    """Lists are merged by name: each entry needs one, of its own."""
    if not isinstance(entries, list):
        yield at, entries, "a list of objects, each with a name", "begin every entry with - name:"
        return
    seen: set[str] = set()
    for index, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not name:
            hint = f"; the training container is named {run.TRAINER_CONTAINER}" if at.endswith("ontainers") else ""
            yield f"{at}[{index}]", entry, "an object with a name", f"add name, by which it is merged{hint}"
        elif name in seen:
            yield f"{at}[{index}].name", name, "every name once", "write all fields into one entry"
        else:
            seen.add(name)


def _our_container(at: str, container: Mapping[str, Any], gpus: int) -> Iterator[Finding]:
    for key, why in _OWNED_CONTAINER_FIELDS.items():
        if key in container:
            yield f"{at}.{key}", container[key], "what the operator sets", f"remove it; {why}"
    if "env" in container:
        yield from _named(f"{at}.env", container["env"])
    for index, variable in enumerate(_objects(container.get("env"))):
        name, value = str(variable.get("name", "")), variable.get("value", "")
        if value is not None and not isinstance(value, str):
            yield f"{at}.env[{index}].value", value, "a text", "put it into quotes"
        if name.startswith("FINETUNE_") or name in _OWNED_ENVIRONMENT:
            yield (
                f"{at}.env[{index}].name",
                name,
                "names other than FINETUNE_… and torchrun's (RANK, WORLD_SIZE, MASTER_ADDR …)",
                "remove it; operator and torchrun set it",
            )
    for kind in ("requests", "limits"):
        resources = _get(container, f"resources.{kind}")
        for resource, amount in resources.items() if isinstance(resources, Mapping) else ():
            if str(resource).endswith("/gpu") and str(amount) != str(gpus):
                yield (
                    f"{at}.resources.{kind}[{resource}]",
                    amount,
                    f"{gpus}, as spec.workers.gpusPerWorker says",
                    "remove it and set spec.workers.gpusPerWorker",
                )


def _volume(at: str, volume: Mapping[str, Any]) -> Iterator[Finding]:
    name = volume.get("name")
    if name == "config":
        yield f"{at}.name", name, "a name other than config", "choose another name; the operator has a volume config"
    elif name in _EMPTY_DIRS:
        others = [key for key in volume if key not in ("name", "emptyDir")]
        if others:
            yield (
                f"{at}.{others[0]}",
                volume[others[0]],
                f"emptyDir for the operator's volume {name}",
                "choose another name"
                + ("; a shared cache is cache.claimName of a profile in the Helm values" if name == "cache" else ""),
            )


# ---- stages that train nothing ----


def unused(spec: FineTuneJobSpec) -> Iterator[Finding]:
    """Parameters of a training where there is none; its seed is that of the sampling."""
    if not STAGES[spec.stage].makes:
        return
    for section, used in _USED.items():
        given = getattr(spec, section).model_dump(mode="json", exclude_defaults=True)
        for name, value in given.items():
            if name not in used:
                yield (
                    f"{section}.{name}",
                    value,
                    f"nothing of it with spec.stage: {spec.stage}",
                    "remove it: nothing is trained",
                )


_USED = {
    "method": ("type",),  # rules.py has it
    "training": ("seed",),
    "deepspeed": ("zero_optimization",),  # rules.py has it
    "data": ("train", "eval", "packing", "max_length", "chat_template", "max_bad_rows"),
}
"""What of a section a stage that makes data reads, or a rule refuses."""


CHECKS: tuple[tuple[str, Callable[[Any], Iterator[Finding]]], ...] = (
    ("spec.training", scheduler),
    ("spec.data.train[]", columns),
    ("spec.data.eval[]", columns),
    ("spec.method", target_modules),
    ("spec.method", patterns),
    ("spec", unused),
    ("spec", rewards),
    ("spec", adalora),
    ("spec.sequence_classification", labels),
    ("spec.token_classification", labels),
    ("spec", bf16_section),
    ("spec", deepspeed),
    *(("spec", _repeats(*row)) for row in _REPEATED),
    ("spec", precision),
    ("spec", zero_optimization),
    ("spec.workers", template),
)
"""Every check, with the part of the spec it gets."""
