"""Some of the model's own weights are trained: freeze (layers, or by name), BitFit (biases). The result is a model."""

import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from finetune_api.causes import Cause
from finetune_api.methods import Bitfit, Freeze
from finetune_api.run import TrainerConfig
from finetune_trainer.methods.full import merge as merge
from finetune_trainer.methods.full import save as save
from finetune_trainer.model import enable_gradient_checkpointing, head_of
from finetune_trainer.outcome import RunError

COMPONENTS: dict[str, tuple[str, ...]] = {
    # The last names of the modules, as transformers' models call them.
    "query": ("q_proj", "query", "wq", "q_lin", "q"),
    "key": ("k_proj", "key", "wk", "k_lin", "k"),
    "value": ("v_proj", "value", "wv", "v_lin", "v"),
    "intermediate": (
        *("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "w1", "w3", "lin1"),
    ),
    "output": (
        *("o_proj", "out_proj", "out_lin", "c_proj", "dense", "down_proj", "fc2", "fc_out", "dense_4h_to_h"),
        *("wo", "w2", "lin2"),
    ),
}
FUSED = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "W_pack", "wqkv", "in_proj", "attn_qkv")
"""Modules that compute query, key and value at once."""


def prepare(model: PreTrainedModel, method: Freeze | Bitfit, config: TrainerConfig) -> nn.Module:
    """The model itself, a part of it trainable (and a classifier's head). RunError(INVALID_CONFIGURATION) where that is
    nothing."""
    chosen = set(_frozen_but(model, method) if isinstance(method, Freeze) else _biases(model, method))
    head = tuple(f"{name}." for name in head_of(model))
    chosen |= {name for name, _ in model.named_parameters() if name.startswith(head)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def _frozen_but(model: PreTrainedModel, method: Freeze) -> Iterator[str]:
    stacks: dict[str, int] = {}
    """Numbers of layers by what comes before them in names: an encoder-decoder has two such lists."""
    for name, _ in model.named_parameters():
        if (number := layer_number(name)) is not None:
            stack = stack_of(name)
            stacks[stack] = max(stacks.get(stack, 0), number + 1)
    count = min(stacks.values(), default=0)
    wanted = method.freeze_trainable_layers
    if abs(wanted) > count:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"method.freeze_trainable_layers is {wanted}, but {type(model).__name__} has {count} layers. Accepted: "
            f"-{count} to {count}; 0 for all layers.",
        )
    layers = {
        stack: range(size - wanted, size) if wanted > 0 else range(-wanted) if wanted else range(size)
        for stack, size in stacks.items()
    }
    expressions = {
        "freeze_trainable_modules": "" if method.freeze_trainable_modules == "all" else method.freeze_trainable_modules,
        "freeze_extra_modules": method.freeze_extra_modules,
    }
    inside, outside = (re.compile(expression) for expression in expressions.values())
    found: dict[str, list[str]] = {field: [] for field in expressions}
    for name, _ in model.named_parameters():
        number = layer_number(name)
        if number is None:
            if method.freeze_extra_modules and outside.search(name):
                found["freeze_extra_modules"].append(name)
        elif number in layers[stack_of(name)] and inside.search(name):
            found["freeze_trainable_modules"].append(name)
    for field, names in found.items():
        if expressions[field] and not names:
            numbers = list(next(iter(layers.values()), ()))
            where = "outside its layers" if field == "freeze_extra_modules" else f"in layers {numbers}"
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"method.{field} {expressions[field]!r} is found in no parameter of {type(model).__name__} {where}. "
                f"There are e.g. {', '.join(_examples(model, field == 'freeze_extra_modules'))}.",
            )
    for names in found.values():
        yield from names


def layer_number(name: str) -> int | None:
    """2 of model.layers.2.mlp.up_proj.weight: the first number in a parameter's name. None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def stack_of(name: str) -> str:
    """model.layers of model.layers.2.mlp.up_proj.weight: what comes before the first number."""
    parts = name.split(".")
    return ".".join(parts[: next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))])


def _examples(model: nn.Module, outside: bool) -> list[str]:
    names = (name for name, _ in model.named_parameters() if (layer_number(name) is None) is outside)
    return list(dict.fromkeys(names))[:12]


def _biases(model: PreTrainedModel, method: Bitfit) -> Iterator[str]:
    terms: set[str] = set(method.bias_terms)
    modules = dict(model.named_modules())
    found: dict[str, set[str]] = {}
    for name, _ in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if "bias" in last:
            for component in _components(owner, modules[owner]):
                found.setdefault(component, set()).add(name)
    if not found:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"method.type 'bitfit' trains biases, and {type(model).__name__} has none. Choose ln_tuning, ia3 or lora, "
            "or a model with biases (GPT-2, OPT, BLOOM, Phi; Qwen2 in query, key and value).",
        )
    if "all" in terms:
        yield from set().union(*found.values())
        return
    fused = {"query", "key", "value"} & terms
    if "fused" in found and fused:
        if len(fused) < 3:
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"method.bias_terms names {', '.join(sorted(fused))}, but {type(model).__name__} computes query, key "
                "and value by one layer with one bias. Name all three of them.",
            )
        terms = terms | {"fused"}
    missing = sorted(term for term in terms if term not in found and not ("fused" in found and term in fused))
    if missing:
        there = sorted(found.keys() - {"fused", "other"})
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"method.bias_terms names {', '.join(missing)}, but {type(model).__name__} has no such biases. It has "
            f"those of {', '.join(there) or 'none of the named components; all takes every bias'}.",
        )
    for term in terms:
        yield from found.get(term, ())


def _components(owner: str, module: nn.Module) -> list[str]:
    above, _, last = owner.rpartition(".")
    if "norm" in type(module).__name__.lower():
        return ["layer_norm"]
    if last == "dense" and above.rpartition(".")[2] in ("intermediate", "pooler"):  # BERT's are all named alike
        return ["intermediate" if above.endswith("intermediate") else "other"]
    if last in FUSED:
        return ["fused"]
    return [component for component, names in COMPONENTS.items() if last in names] or ["other"]
