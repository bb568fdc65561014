"""How much of the GPUs' peak a run uses. Pure.

Model FLOPs by PaLM's count (arXiv:2204.02311, appendix B): 2 per weight of a matrix product and token forward, twice
that backward; with frozen weights (adapters) the weights' own gradients fall away: 4 instead of 6. Attention is
counted over the pairs of tokens that are really looked at (causal, within documents).
"""

from dataclasses import dataclass
from typing import Any

PEAKS: tuple[tuple[str, float], ...] = (
    # Dense bf16 TFLOP/s per GPU, from the makers' data sheets; the first name that fits counts.
    ("GB200", 2500.0),
    ("B300", 2500.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX PRO 6000", 503.0),
    ("RTX 6000 Ada", 364.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI355", 2516.0),
    ("MI325", 1307.0),
    ("MI300", 1307.0),
    ("MI250", 362.0),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name its driver gives; None where it is not known."""
    return next((tflops * 1e12 for name, tflops in PEAKS if name.lower() in device_name.lower()), None)


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of a training step, per token and per pair of tokens."""

    per_token: float
    per_pair: float

    def of(self, tokens: int, pairs: int) -> float:
        """FLOPs of a step over so many tokens and pairs."""
        return self.per_token * tokens + self.per_pair * pairs


def model_cost(model: Any, total_parameters: int, trains_all: bool) -> ModelCost:
    """Count a model. ``total_parameters`` includes the embeddings; the input embedding is a look-up, not a product,
    unless the output head shares it. A model whose configuration does not say its shape costs nothing: a figure for
    people never ends a run."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    vocabulary, width = getattr(text, "vocab_size", 0), getattr(text, "hidden_size", 0)
    tied = bool(getattr(text, "tie_word_embeddings", False))
    products = total_parameters - (0 if tied else vocabulary * width)
    # Forward: two products (scores, values) of 2 FLOPs each; backward: twice that, for adapters too.
    return ModelCost(
        per_token=(6.0 if trains_all else 4.0) * products,
        per_pair=3.0 * 4.0 * sum(map(_attention_width, _layers(text))),
    )


def _layers(text: Any) -> list[Any]:
    """The configuration of every layer; those of Gemma 4 differ, and it refuses to give one number for all."""
    try:
        return list(text.per_layer_config)
    except (AttributeError, TypeError, ValueError):
        return [text] * getattr(text, "num_hidden_layers", 0)


def _attention_width(layer: Any) -> int:
    heads = getattr(layer, "num_attention_heads", 0)
    return heads * (getattr(layer, "head_dim", None) or (getattr(layer, "hidden_size", 0) // heads if heads else 0))
