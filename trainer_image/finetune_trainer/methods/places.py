"""Where in a model the adapters of ``adapter``, ``mam`` and ``unipelt`` go: one row per family of architectures.

To add a family: one row in :data:`FAMILIES`. A place is a module's path below a layer; what is attached there are
hooks and submodules (``parts.py``), so no weight of the model changes its name. Called by those three methods.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune_api.causes import Cause
from finetune_trainer.outcome import RunError


@dataclass(frozen=True)
class Attention:
    """One attention sublayer."""

    module: str
    """What calls transformers' attention interface: keys and values meet here, and its first input is h_in."""
    output: str
    """Whose output is added to the residual: the last projection, or the dropout behind it."""
    query: str
    value: str
    thirds: bool = False
    """Query, key and value are one projection, in this order."""


@dataclass(frozen=True)
class Stack:
    """Layers of one shape."""

    layers: str
    """Path of the list of layers below ``model.base_model``."""
    attentions: tuple[Attention, ...]
    feed_forward_input: str
    """Whose first input is the input of the feed-forward sublayer."""
    feed_forward_output: str
    """Whose output is added to the residual."""
    norms: tuple[str, ...]


_LLAMA = Stack(
    layers="layers",
    attentions=(Attention("self_attn", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"),),
    feed_forward_input="mlp",
    feed_forward_output="mlp",
    norms=("input_layernorm", "post_attention_layernorm"),
)
_GPT2 = Stack(
    layers="h",
    attentions=(Attention("attn", "attn.resid_dropout", "attn.c_attn", "attn.c_attn", thirds=True),),
    feed_forward_input="mlp",
    feed_forward_output="mlp",
    norms=("ln_1", "ln_2"),
)
_OPT = Stack(
    layers="decoder.layers",
    attentions=(Attention("self_attn", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj"),),
    feed_forward_input="fc1",
    feed_forward_output="fc2",
    norms=("self_attn_layer_norm", "final_layer_norm"),
)
_BERT = Stack(
    layers="encoder.layer",
    attentions=(
        Attention("attention.self", "attention.output.dropout", "attention.self.query", "attention.self.value"),
    ),
    feed_forward_input="intermediate",
    feed_forward_output="output.dropout",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
)
_DISTILBERT = Stack(
    layers="transformer.layer",
    attentions=(Attention("attention", "attention.out_lin", "attention.q_lin", "attention.v_lin"),),
    feed_forward_input="ffn",
    feed_forward_output="ffn",
    norms=("sa_layer_norm", "output_layer_norm"),
)


def _t5(number: int, name: str) -> Attention:
    part = f"layer.{number}.{name}"
    return Attention(part, f"layer.{number}.dropout", f"{part}.q", f"{part}.v")


def _t5_stack(layers: str, *attentions: Attention) -> Stack:
    last = len(attentions)
    return Stack(
        layers=layers,
        attentions=attentions,
        feed_forward_input=f"layer.{last}.DenseReluDense",
        feed_forward_output=f"layer.{last}.dropout",
        norms=tuple(f"layer.{number}.layer_norm" for number in range(last + 1)),
    )


_T5 = (
    _t5_stack("encoder.block", _t5(0, "SelfAttention")),
    _t5_stack("decoder.block", _t5(0, "SelfAttention"), _t5(1, "EncDecAttention")),
)


def _bart(layers: str, *attentions: str) -> Stack:
    return Stack(
        layers=layers,
        attentions=tuple(Attention(a, f"{a}.out_proj", f"{a}.q_proj", f"{a}.v_proj") for a in attentions),
        feed_forward_input="fc1",
        feed_forward_output="fc2",
        norms=(*(f"{a}_layer_norm" for a in attentions), "final_layer_norm"),
    )


_BART_STACKS = (_bart("encoder.layers", "self_attn"), _bart("decoder.layers", "self_attn", "encoder_attn"))

FAMILIES: dict[str, tuple[Stack, ...]] = {
    # by config.model_type
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), (_LLAMA,)),
    "gpt2": (_GPT2,),
    "opt": (_OPT,),
    **dict.fromkeys(("bert", "roberta"), (_BERT,)),
    "distilbert": (_DISTILBERT,),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("bart", "mbart"), _BART_STACKS),
}


def layers(model: Any) -> Iterator[tuple[nn.Module, Stack]]:
    """Every layer of a transformers model, first to last, with its places.

    RunError(INVALID_CONFIGURATION) where the architecture has no row in the table.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"method.type adapter, mam and unipelt do not know where in a model of type {kind!r} "
            f"({type(model).__name__}) adapters belong; accepted: {', '.join(FAMILIES)}. Use one of these models, or "
            "method.type: lora, which goes with any.",
        )
    for stack in FAMILIES[kind]:
        for layer in model.base_model.get_submodule(stack.layers).children():
            yield layer, stack
