"""LoRA, and QLoRA, which differs only in how ``model.py`` loads the base. The result is a PEFT adapter."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.causes import Cause
from finetune_api.methods import Lora
from finetune_api.run import TrainerConfig
from finetune_trainer.model import enable_gradient_checkpointing, load_for_merge, save_model
from finetune_trainer.outcome import RunError
from finetune_trainer.storage import local_path


def prepare(model: PreTrainedModel, method: Lora, config: TrainerConfig) -> nn.Module:
    """The model with adapters, which alone are trainable (with ``modules_to_save``).

    Adapter weights are float32 also beside a bfloat16 model: AdamW's steps of 1e-4 of a weight would be lost in
    the 8 bits of a bfloat16 mantissa, and they are less than a hundredth of the memory.
    RunError(INVALID_CONFIGURATION) where ``target_modules`` finds nothing.
    """
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    targets = method.target_modules
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.r,
        lora_alpha=method.lora_alpha,  # type: ignore[arg-type]  # PEFT computes with it as with any number
        lora_dropout=method.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(method.modules_to_save) or None,
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
    )
    try:
        adapted = get_peft_model(model, adapter, autocast_adapter_dtype=True)
    except ValueError as error:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"method.target_modules {targets!r} does not fit {type(model).__name__}: {str(error).splitlines()[0]} "
            f"Its linear layers are named {', '.join(linear_names(model))}; all-linear takes all but the output.",
        ) from error
    written = adapted.peft_config["default"]
    written.base_model_name_or_path = base_name(config)
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
    """Write adapter and tokenizer into ``directory``, for ``PeftModel.from_pretrained``."""
    del config
    # "auto" would ask the hub whether the embedding was resized; it never is.
    model.save_pretrained(str(directory), state_dict=state_dict, save_embedding_layers=False)
    tokenizer.save_pretrained(directory)


def merge(model_path: Path, adapter_dir: Path, out_dir: Path, config: TrainerConfig) -> None:
    """Write the base model with the adapter of ``adapter_dir`` merged into it, with its tokenizer, to ``out_dir``.

    The base is loaded afresh and unquantised: merging into 4-bit weights would round the adapter away.
    """
    from transformers import AutoTokenizer

    model = load_for_merge(model_path, config)
    merged = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload(safe_merge=True)
    save_model(merged, AutoTokenizer.from_pretrained(adapter_dir), out_dir, config.max_shard_size)


def base_name(config: TrainerConfig) -> str:
    """How the adapter names its base: what ``from_pretrained`` understands, where there is such a name."""
    uri = config.model.uri
    if uri.startswith("hf://"):
        return uri.removeprefix("hf://").removeprefix("models/").strip("/")
    return str(local_path(uri)) if uri.startswith("file://") else uri


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers, e.g. q_proj, for messages."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
