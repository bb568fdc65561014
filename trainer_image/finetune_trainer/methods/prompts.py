"""Virtual tokens: prompt tuning, P-tuning, prefix tuning and P-tuning v2. The result is a PEFT adapter.

What is written is what the virtual tokens are in the end; the networks that made them (P-tuning, a projected prefix)
are in the checkpoints only, so that a run can continue.
"""

import inspect
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import nn
from transformers import PreTrainedModel

from finetune_api.causes import Cause
from finetune_api.run import TrainerConfig
from finetune_trainer.methods.adapters import attach, base_name
from finetune_trainer.methods.adapters import save as save
from finetune_trainer.methods.parts import head_shape
from finetune_trainer.model import head_of
from finetune_trainer.outcome import RunError

CONFIGS: dict[str, type[PeftConfig]] = {
    "prompt_tuning": PromptTuningConfig,
    "p_tuning": PromptEncoderConfig,
    "prefix_tuning": PrefixTuningConfig,
    "p_tuning_v2": PrefixTuningConfig,  # the same without the network
}


def prepare(model: PreTrainedModel, method: Any, config: TrainerConfig) -> nn.Module:
    """The model with virtual tokens before every text, which alone are trainable."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and method.num_virtual_tokens + config.data.max_length > positions:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"method.num_virtual_tokens {method.num_virtual_tokens} and data.max_length {config.data.max_length} are "
            f"together more than the {positions} positions of {type(model).__name__}. Lower data.max_length to "
            f"{positions - method.num_virtual_tokens} or less.",
        )
    if "score" in head_of(model) and method.type in ("prompt_tuning", "p_tuning"):
        # It would look for the last token in embeddings, where padding cannot be told from words.
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"method.type {method.type!r} does not go with {type(model).__name__}, which judges a text by its last "
            "token and cannot find it behind virtual ones. Use prefix_tuning, p_tuning_v2 or lora, or an encoder "
            "(BERT).",
        )
    chosen = method.model_dump(exclude={"type"}) | _shape(model, method)
    if "encoder_hidden_size" in chosen:
        chosen["encoder_hidden_size"] = chosen["encoder_hidden_size"] or model.config.get_text_config().hidden_size
    if method.type == "p_tuning" and method.encoder_reparameterization_type == "MLP":
        del chosen["encoder_num_layers"]  # the network has the layers it has
    text = chosen.get("prompt_tuning_init") == "TEXT"
    if text:
        chosen["tokenizer_name_or_path"] = model.name_or_path
        chosen["tokenizer_kwargs"] = {"local_files_only": True}
    adapted = attach(model, CONFIGS[method.type], chosen, config)
    if method.type == "p_tuning" and torch.amp.is_autocast_available(model.device.type):
        for network in adapted.prompt_encoder.values():
            # In the float32 of its weights: many CPUs have no LSTM in bfloat16.
            network.forward = torch.autocast(model.device.type, enabled=False)(network.forward)
    if text:  # where the model lay in this pod is of no use to whoever loads the adapter
        written: Any = adapted.peft_config["default"]
        written.tokenizer_name_or_path, written.tokenizer_kwargs = base_name(config.model), None
    return adapted


def _shape(model: PreTrainedModel, method: Any) -> dict[str, Any]:
    """What PEFT would look for under the names of some architectures only."""
    shape: Any = model.config.get_text_config()
    found: dict[str, Any] = {
        "num_layers": shape.num_hidden_layers,
        "token_dim": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
    }
    if method.type in ("prefix_tuning", "p_tuning_v2"):
        if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"method.type {method.type!r} needs a model that takes keys and values from outside, and "
                f"{type(model).__name__} does not. Use BERT or RoBERTa, or method.type: mam or unipelt, which bring a "
                "prefix of their own.",
            )
        if model.config.is_encoder_decoder:  # T5's heads may be wider or narrower than the model
            heads, width = head_shape(model.config)
            found |= {"num_attention_heads": heads, "token_dim": heads * width}
    elif model.config.is_encoder_decoder:
        found["num_transformer_submodules"] = 1  # they stand before the source; PEFT makes as many again for nothing
    return found


def merge(model_path: Path, adapter_dir: Path, out_dir: Path, config: TrainerConfig) -> NoReturn:
    """Virtual tokens are no part of any weight."""
    del model_path, adapter_dir, out_dir
    raise RunError(
        Cause.INVALID_CONFIGURATION,
        f"output.merge is for methods that change weights; the virtual tokens of method.type {config.method.type!r} "
        "are loaded beside the model by PEFT. Set it to false.",
    )
