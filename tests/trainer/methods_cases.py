"""One small configuration of every fine-tuning method, and how many parameters it must train on the tiny models."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.trainer import tiny

LAYERS = 2
LLAMA = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)] * LAYERS
"""(in, out) of the linear layers of ``tiny.make_model``: q, k, v, o, gate, up, down."""
GPT2 = [(64, 192), (64, 64), (64, 256), (256, 64)] * LAYERS
"""Of :func:`make_gpt2`: c_attn, c_proj, c_fc, c_proj."""

Linear = list[tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """A method as a job would write it."""

    method: dict[str, Any]
    trained: Callable[[Linear], int]
    """Parameters, from the linear layers of the model."""
    begins_as_base: bool = True
    """Before the first step it computes what the model does."""
    conv1d: bool = True
    """Goes with GPT-2."""
    merge: bool = True
    learning_rate: float = 1e-2


def ranks(r: int) -> Callable[[Linear], int]:
    return lambda layers: sum(r * (i + o) for i, o in layers)


def _lokr(layers: Linear) -> int:
    def factors(size: int) -> tuple[int, int]:
        small = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
        return small, size // small

    total = 0
    for i, o in layers:
        (a, b), (c, d) = factors(i), factors(o)
        total += a * c + (4 * (b + d) if max(b, d) / 2 > 4 else b * d)
    return total


def _randlora(layers: Linear) -> int:
    pairs = [(min(i, o), math.ceil(min(i, o) / 8)) for i, o in layers]
    return sum(8 * n + n * small for small, n in pairs)


def _freeze(layers: Linear) -> int:
    weights = sum(i * o for i, o in layers) // LAYERS
    if layers is LLAMA:
        return weights + 2 * 64  # two norms
    return weights + sum(o for _, o in layers) // LAYERS + 4 * 64  # biases, two norms with biases


def _wide(layers: Linear) -> int:
    """Keys and values of a layer, which Llama has half as many of."""
    return 32 if layers is LLAMA else 64


def _prefix(layers: Linear) -> int:
    wide, hidden = _wide(layers), 64
    out = 2 * LAYERS * wide
    return 4 * wide + (wide * hidden + hidden) + (hidden * out + out)


def _lstm(_: Linear) -> int:
    hidden, width = 32, 64
    one = [2 * (4 * hidden * (into + hidden) + 8 * hidden) for into in (width, 2 * hidden)]
    return 4 * width + sum(one) + (2 * hidden) ** 2 + 2 * hidden + 2 * hidden * width + width


PROMPT = {"begins_as_base": False, "merge": False}
CASES: dict[str, Case] = {
    "freeze": Case({"type": "freeze", "freeze_trainable_layers": 1}, _freeze, merge=False),
    "lora": Case({"type": "lora", "r": 4}, ranks(4)),
    "lora in one layer": Case(
        {
            "type": "lora",
            "r": 4,
            "layers_to_transform": [1],
            "rank_pattern": {".*mlp.*": 2},
            "alpha_pattern": {".*mlp.*": 8},
        },
        lambda layers: sum(
            (2 if (layers is LLAMA and n > 3) or (layers is GPT2 and n > 1) else 4) * (i + o)
            for n, (i, o) in enumerate(layers[: len(layers) // LAYERS])
        ),
    ),
    "pissa": Case({"type": "lora", "r": 4, "init_lora_weights": "pissa"}, ranks(4)),
    "pissa, rslora, patterns": Case(
        {
            "type": "lora",
            "r": 4,
            "use_rslora": True,
            "init_lora_weights": "pissa_niter_4",
            "rank_pattern": {".*mlp.*": 4},
            "alpha_pattern": {".*mlp.*": 8},
        },
        ranks(4),
    ),
    "olora": Case({"type": "lora", "r": 4, "init_lora_weights": "olora"}, ranks(4), conv1d=False),
    "lora+": Case(
        {"type": "lora", "r": 4, "use_dora": True, "loraplus_lr_ratio": 4},
        lambda layers: ranks(4)(layers) + sum(o for _, o in layers),
    ),
    "adalora": Case(
        {"type": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2},
        lambda layers: sum(4 * (i + o + 1) for i, o in layers),
    ),
    "prompt_tuning": Case(
        {"type": "prompt_tuning", "num_virtual_tokens": 4}, lambda _: 4 * 64, learning_rate=0.1, **PROMPT
    ),
    "prompt_tuning from text": Case(
        {
            "type": "prompt_tuning",
            "num_virtual_tokens": 4,
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "say red",
        },
        lambda _: 4 * 64,
        learning_rate=0.1,
        **PROMPT,
    ),
    "p_tuning": Case({"type": "p_tuning", "num_virtual_tokens": 4}, lambda _: 4 * 64 + 3 * (64 * 64 + 64), **PROMPT),
    "p_tuning by LSTM": Case(
        {
            "type": "p_tuning",
            "num_virtual_tokens": 4,
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 32,
        },
        _lstm,
        **PROMPT,
    ),
    "prefix_tuning": Case({"type": "prefix_tuning", "num_virtual_tokens": 4}, _prefix, **PROMPT),
    "p_tuning_v2": Case(
        {"type": "p_tuning_v2", "num_virtual_tokens": 4},
        lambda layers: 4 * 2 * LAYERS * _wide(layers),
        learning_rate=0.1,
        **PROMPT,
    ),
    "ia3": Case(
        {"type": "ia3"}, lambda layers: LAYERS * (32 + 32 + 128 if layers is LLAMA else 192 + 256), learning_rate=0.1
    ),
    "vera": Case({"type": "vera", "r": 16}, lambda layers: sum(o + 16 for _, o in layers)),
    "loha": Case({"type": "loha", "r": 4}, lambda layers: 2 * ranks(4)(layers), conv1d=False),
    "lokr": Case({"type": "lokr", "r": 4}, _lokr, conv1d=False),
    "oft": Case(
        {"type": "oft", "oft_block_size": 16},
        lambda layers: sum(i // 16 * 16 * 15 // 2 for i, _ in layers),
        conv1d=False,
    ),
    "boft": Case({"type": "boft"}, lambda layers: sum(4 * i + o for i, o in layers), conv1d=False),
    "fourierft": Case(
        {"type": "fourierft", "n_frequency": 200}, lambda layers: 200 * len(layers), begins_as_base=False
    ),
    "waveft": Case({"type": "waveft", "n_frequency": 200}, lambda layers: 200 * len(layers)),
    "hra": Case({"type": "hra", "r": 4}, lambda layers: sum(4 * i for i, _ in layers), conv1d=False),
    "randlora": Case({"type": "randlora", "r": 8}, _randlora),
    "vblora": Case(
        {"type": "vblora", "num_vectors": 64, "vector_length": 16},
        lambda layers: 64 * 16 + ranks(4)(layers) * 64 // 16,
        begins_as_base=False,
    ),
    "shira": Case({"type": "shira", "r": 4}, ranks(4), conv1d=False),
    "c3a": Case(
        {"type": "c3a", "block_size": 16},
        lambda layers: sum(i * o // 16 for i, o in layers),
        begins_as_base=False,
        conv1d=False,
    ),
    "miss": Case({"type": "miss", "r": 8}, lambda layers: sum(8 * o for _, o in layers), conv1d=False),
    "road": Case({"type": "road", "group_size": 16}, lambda layers: sum(o for _, o in layers), conv1d=False),
    "delora": Case({"type": "delora", "r": 4}, lambda layers: ranks(4)(layers) + len(layers), conv1d=False),
    "gralora": Case({"type": "gralora", "r": 8}, ranks(8)),
    "hira": Case({"type": "hira", "r": 8}, ranks(8)),
    "ln_tuning": Case({"type": "ln_tuning"}, lambda layers: (2 * LAYERS + 1) * 64 * (1 if layers is LLAMA else 2)),
    "trainable_tokens": Case({"type": "trainable_tokens", "token_indices": [4, 5, 30]}, lambda _: 3 * 64),
}
ONLY_GPT2 = {
    "bitfit": Case({"type": "bitfit"}, lambda layers: sum(o for _, o in layers) + 5 * 64, merge=False),
    "bitfit of layer norms": Case({"type": "bitfit", "bias_terms": ["layer_norm"]}, lambda _: 5 * 64, merge=False),
}
"""Of Llama's layers none has a bias."""


def _adapters(layers: Linear) -> int:
    return LAYERS * (2 * (2 * 6 * 64 + 64 + 6) + (2 if layers is LLAMA else 4) * 64)


def _mam(layers: Linear) -> int:
    prefixes = 3 * 64 + 64 * 5 + 5 + LAYERS * (5 + 1) * 2 * _wide(layers)
    return prefixes + LAYERS * (2 * 6 * 64 + 64 + 6)


OWN = {
    "full": Case({"type": "full"}, lambda _: 82_240, merge=False),
    "qlora": Case({"type": "qlora", "r": 4}, ranks(4)),
    "adapter": Case({"type": "adapter", "bottleneck_size": 6}, _adapters, merge=False),
    "mam": Case(
        {"type": "mam", "num_virtual_tokens": 3, "encoder_hidden_size": 5, "bottleneck_size": 6}, _mam, merge=False
    ),
    "unipelt": Case(
        {"type": "unipelt", "r": 2, "num_virtual_tokens": 3, "encoder_hidden_size": 5, "bottleneck_size": 6},
        lambda layers: _mam(layers) + LAYERS * (2 * (64 + 64) + 2 * (64 + _wide(layers)) + 3 * 65),
        merge=False,
    ),
    "moelora": Case(
        {"type": "moelora", "tasks": ["first", "second"], "num_experts": 2, "r": 4, "task_embedding_dim": 8},
        lambda layers: ranks(4)(layers) + 2 * 8 + 2 * 8,
    ),
}
"""For the table; ``test_methods.py`` and ``test_methods_own.py`` are about these."""


def make_gpt2(directory: Path) -> Path:
    """A GPT-2 of 64 hidden units and two layers, with the tokenizer of ``tiny.make_model``."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tiny.make_model(directory)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=64,
        n_layer=LAYERS,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config)
    for name, p in model.named_parameters():  # trained models have such biases
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(directory)
    return directory
