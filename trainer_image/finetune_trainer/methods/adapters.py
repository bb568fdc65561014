"""PEFT's adapters beside the layers of a model: a row of :data:`CONFIGS` each. The result is a PEFT adapter.

A method's parameters carry PEFT's names, so its class in ``finetune_api/methods.py`` is handed over as it is.
``lora.py`` and ``adalora.py`` use the same functions and add what is theirs.
"""

import re
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import (
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.causes import Cause
from finetune_api.run import TrainerConfig
from finetune_api.spec import ModelSource
from finetune_trainer.adapter_files import WEIGHTS
from finetune_trainer.model import enable_gradient_checkpointing, head_of, kind_of, load_for_merge, save_model
from finetune_trainer.outcome import RunError
from finetune_trainer.storage import local_path

CONFIGS: dict[str, type[PeftConfig]] = {
    "ia3": IA3Config,
    "vera": VeraConfig,
    "loha": LoHaConfig,
    "lokr": LoKrConfig,
    "oft": OFTConfig,
    "boft": BOFTConfig,
    "fourierft": FourierFTConfig,
    "waveft": WaveFTConfig,
    "hra": HRAConfig,
    "randlora": RandLoraConfig,
    "vblora": VBLoRAConfig,
    "shira": ShiraConfig,
    "c3a": C3AConfig,
    "miss": MissConfig,
    "road": RoadConfig,
    "delora": DeloraConfig,
    "gralora": GraloraConfig,
    "hira": HiraConfig,
    "ln_tuning": LNTuningConfig,
    "trainable_tokens": TrainableTokensConfig,
}
IA3_PLACES: dict[str, tuple[list[str], list[str]]] = {"distilbert": (["k_lin", "v_lin", "lin2"], ["lin2"])}
"""By ``config.model_type``: target_modules and feedforward_modules that PEFT does not know."""


def prepare(model: PreTrainedModel, method: Any, config: TrainerConfig) -> nn.Module:
    """The model with adapters, which alone are trainable (with ``modules_to_save``)."""
    chosen = method.model_dump(exclude={"type"})
    if method.type == "ia3":
        chosen["feedforward_modules"] = chosen["feedforward_modules"] or _unless_auto(method, [])
        if method.target_modules == "auto" and (places := IA3_PLACES.get(model.config.model_type)):
            chosen["target_modules"], chosen["feedforward_modules"] = places
    elif method.type == "ln_tuning":
        chosen["target_modules"] = norm_names(model)  # PEFT knows them for some model types only
    elif method.type == "shira":
        chosen["random_seed"] = config.training.seed  # which values are trained; the adapter file says it too
    elif method.type == "trainable_tokens":
        _check_tokens(model, method.token_indices)
    return attach(model, CONFIGS[method.type], chosen, config)


def attach(model: PreTrainedModel, kind: type[PeftConfig], chosen: dict[str, Any], config: TrainerConfig) -> PeftModel:
    """The model with an adapter of PEFT. ``chosen``: the method's parameters, by PEFT's names. A classifier's head is
    trained and saved with it.

    Adapter weights are float32 also beside a bfloat16 model: AdamW's steps of 1e-4 of a weight would be lost in
    the 8 bits of a bfloat16 mantissa, and they are less than a hundredth of the memory.
    RunError(INVALID_CONFIGURATION) where ``target_modules`` finds nothing, or the adapter does not fit.
    """
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    targets = chosen.get("target_modules")
    if targets == "auto":
        chosen = chosen | {"target_modules": None}
    if saved := list(dict.fromkeys([*chosen.get("modules_to_save", ()), *head_of(model)])):
        chosen = chosen | {"modules_to_save": saved}
    else:
        chosen = {name: value for name, value in chosen.items() if name != "modules_to_save"}
    task = kind_of(config.stage).task
    try:
        adapted = get_peft_model(model, kind(task_type=task, **chosen), autocast_adapter_dtype=True)
    except (ValueError, TypeError, KeyError, AssertionError, ZeroDivisionError) as error:
        raise _misfit(model, targets, config, error) from error
    for p in adapted.parameters():
        # PEFT does not think of copies of the model's own modules (norms, modules_to_save).
        if p.requires_grad and p.is_floating_point() and not hasattr(p, "ds_id"):
            p.data = p.data.float()
    written = adapted.peft_config["default"]
    written.base_model_name_or_path = base_name(config.model)
    if config.model.uri.startswith("hf://"):
        written.revision = config.model.revision
    return adapted


def save(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    state_dict: dict[str, torch.Tensor] | None,
    config: TrainerConfig,
) -> None:
    """Write adapter and tokenizer into ``directory``, for ``PeftModel.from_pretrained``; of a classifier the model's
    configuration too, which knows the labels."""
    if kind_of(config.stage).new_head:
        write_labels(model, directory)
    # "auto" would ask the hub whether the embedding was resized; it never is.
    model.save_pretrained(str(directory), state_dict=state_dict, save_embedding_layers=False)
    tokenizer.save_pretrained(directory)


def write_labels(model: Any, directory: Path) -> None:
    """The configuration of the model that an adapter of a classifier belongs to: it knows the labels. Of the model as
    it was published: a base in 4 bits is this run's own affair."""
    base = model.get_base_model()
    config = deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if hasattr(base, "_published_use_cache"):
        config.use_cache = base._published_use_cache
    config.save_pretrained(directory)


def merge(model_path: Path, adapter_dir: Path, out_dir: Path, config: TrainerConfig) -> None:
    """Write the base model with the adapter of ``adapter_dir`` merged into it, with its tokenizer, to ``out_dir``.

    The base is loaded afresh and unquantised: merging into 4-bit weights would round the adapter away.
    """
    from transformers import AutoTokenizer

    model = load_for_merge(model_path, config, adapter_dir)
    merged = merged_into(model, adapter_dir, config.output_uri)
    save_model(merged, AutoTokenizer.from_pretrained(adapter_dir), out_dir, config.max_shard_size)


def merged_into(model: PreTrainedModel, adapter_dir: Path, uri: str) -> PreTrainedModel:
    """The model with a saved adapter, and the modules saved with it, folded into its own weights."""
    merged: PreTrainedModel = put_beside(model, adapter_dir, uri).merge_and_unload(safe_merge=True)
    for name, module in list(merged.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # LN tuning leaves them
            merged.set_submodule(name, module.modules_to_save[str(module.active_adapter)])
    _say_whether_tied(merged)
    return merged


def put_beside(model: Any, folder: Path, uri: str, name: str = "default") -> PeftModel:
    """The model with a saved adapter beside its layers. ``uri``: the adapter, for messages.

    PEFT passes over weights that have no place in the model, such as those of a compiled or a deeper one, and leaves
    those that are missing as they begin: RunError(INVALID_CONFIGURATION) for either.
    """
    first = not isinstance(model, PeftModel)
    if first:
        with warnings.catch_warnings():  # of missing keys, which are told below
            warnings.simplefilter("ignore", UserWarning)
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    else:
        model.load_adapter(str(folder), adapter_name=name)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    known = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    if misfits := [*sorted(saved - known), *sorted(known - saved)]:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri} does not fit {type(model.get_base_model()).__name__}: {len(misfits)} of its weights have no place "
            f"there or are missing, e.g. {misfits[0]}. Name the model it was trained on.",
        )
    _untie(model.get_base_model())
    return model


def _untie(model: Any) -> None:
    """Give output layer and embedding a weight each where an adapter lies on one of them: what is merged into the one
    would change the other, too."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    within, out = (getattr(layer, "base_layer", layer) for layer in layers)
    if out is None or out.weight is not within.weight or not any(isinstance(one, BaseTunerLayer) for one in layers):
        return
    out.weight = nn.Parameter(out.weight.detach().clone(), requires_grad=out.weight.requires_grad)
    _say_whether_tied(model)


def _say_whether_tied(model: Any) -> None:
    """``tie_word_embeddings`` as it is, or whoever loads the model ties what is not the same."""
    within, out = model.get_input_embeddings(), model.get_output_embeddings()
    text = model.config.get_text_config()
    if out is not None and getattr(text, "tie_word_embeddings", False):
        weights = (getattr(layer, "base_layer", layer).weight for layer in (within, out))
        text.tie_word_embeddings = model.config.tie_word_embeddings = _same(*weights)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.shape == other.shape and one.data_ptr() == other.data_ptr())


def base_name(model: ModelSource) -> str:
    """How an adapter names its base: what ``from_pretrained`` understands, where there is such a name."""
    uri = model.uri
    if uri.startswith("hf://"):
        return uri.removeprefix("hf://").removeprefix("models/").strip("/")
    return str(local_path(uri)) if uri.startswith("file://") else uri


def linear_names(model: nn.Module, *, in_layers: bool = False) -> list[str]:
    """The last parts of the names of all linear layers, e.g. q_proj; ``in_layers``: of those in the decoder layers."""
    names = (name for name, module in model.named_modules() if _is_linear(module))
    return sorted({name.rpartition(".")[2] for name in names if not in_layers or re.search(r"\.\d+\.", name)})


def norm_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all normalisation layers, e.g. input_layernorm."""
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in model.named_modules()}
    return sorted(name for name, kind in kinds.items() if "norm" in kind.lower())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's, with its weight turned round


def _unless_auto(method: Any, otherwise: list[str]) -> list[str] | None:
    return None if method.target_modules == "auto" else otherwise


def _check_tokens(model: PreTrainedModel, tokens: list[int]) -> None:
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if beyond := [token for token in tokens if token >= rows]:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"method.token_indices names {beyond[:5]}, but {type(model).__name__} has embeddings for {rows} tokens "
            f"only (0 to {rows - 1}). Name tokens that the model knows.",
        )


def _misfit(model: PreTrainedModel, targets: Any, config: TrainerConfig, error: Exception) -> RunError:
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    linear = f"Its linear layers are named {', '.join(linear_names(model))}; all-linear takes all but the output."
    message = f"method.target_modules {targets!r} does not fit {type(model).__name__}: {said} {linear}"
    if "Conv1D" in said:
        message = (
            f"method.type {config.method.type!r} knows no layers of the kind {type(model).__name__} is made of "
            "(Conv1D). Choose another method, such as lora, ia3, vera or fourierft, or another model."
        )
    elif "target modules" not in said.lower() and "target_modules" not in said:
        message = f"method.type {config.method.type!r} does not fit {type(model).__name__}: {said}"
    return RunError(Cause.INVALID_CONFIGURATION, message)
