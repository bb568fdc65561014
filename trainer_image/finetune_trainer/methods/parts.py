"""What ``adapter``, ``mam`` and ``unipelt`` are made of, attached to a model by hooks, and how it is written and read.

Hooks and submodules leave the model's own weights, their names and its class as they are, so that generating,
gradient checkpointing and ZeRO go on as before. New weights are float32 also beside a bfloat16 model (``lora.py`` says
why); every part computes in the number format of its own weights and answers in that of its input.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import gelu, linear, pad, relu, silu, tanh
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune_api.causes import Cause
from finetune_api.run import TrainerConfig
from finetune_trainer.adapter_files import CONFIG, WEIGHTS
from finetune_trainer.methods.adapters import base_name
from finetune_trainer.methods.places import Attention, Stack
from finetune_trainer.model import head_of, kind_of
from finetune_trainer.outcome import RunError

NON_LINEARITIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": relu,
    "gelu": gelu,
    "silu": silu,
    "tanh": tanh,
}


# --- adapters ---------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """s · f(x·W_down + b_down)·W_up + b_up: (…, width) to (…, width), to be added by the caller."""

    def __init__(
        self, width: int, bottleneck: int, non_linearity: str, dropout: float, scaling: float, init: str
    ) -> None:
        """``init``: lora, W_up is zero (arXiv:2110.04366); houlsby, both normal with 0.01, cut at two deviations
        (arXiv:1902.00751). Biases are zero."""
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.dropout = nn.Dropout(dropout)
        self.function = NON_LINEARITIES[non_linearity]
        self.scaling = scaling
        self.gate: Gate | None = None
        self.taken: torch.Tensor | None = None  # its input, where that is not what it is attached to
        self.off = False
        with torch.no_grad():
            if init == "lora":
                nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
                self.up.weight.zero_()
            else:
                for layer in (self.down, self.up):
                    nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            self.down.bias.zero_()
            self.up.bias.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = hidden.to(self.down.weight.dtype)
        update = self.up(self.dropout(self.function(self.down(inner)))) * self.scaling
        if self.gate is not None:
            update = update * self.gate(inner)
        return update.to(hidden.dtype)

    # Hooks: methods, because copying a model copies their object with it, and functions not.

    def after(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output if self.off else output + self(output)

    def take(self, module: nn.Module, inputs: Any) -> None:
        self.taken = inputs[0]

    def beside(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        taken, self.taken = self.taken, None
        if self.off:
            return output
        assert taken is not None
        return output + self(taken)


def attach_sequential(place: nn.Module, adapter: Adapter) -> None:
    """h ← h + adapter(h) on what ``place`` puts out."""
    place.add_module("adapter", adapter)
    place.register_forward_hook(adapter.after)


def attach_parallel(first: nn.Module, last: nn.Module, adapter: Adapter) -> None:
    """h ← h + adapter(x), x the input of ``first`` and h what ``last`` puts out (both may be one module)."""
    last.add_module("adapter", adapter)
    first.register_forward_pre_hook(adapter.take)
    last.register_forward_hook(adapter.beside)


class Gate(nn.Module):
    """σ(x·w + b): one number in (0, 1) per token, (…, width) to (…, 1); keeps the mean of its last pass in training.

    UniPELT's code takes the mean over the sequence. In a causal model a token would see its successors by that, and
    generating token by token would give other gates than training: ours is the token's own.
    """

    mean: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 1)
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        with torch.no_grad():
            nn.init.normal_(self.project.weight, std=0.02)
            self.project.bias.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.project(hidden.to(self.project.weight.dtype)))
        if self.training:
            self.mean.copy_(gate.detach().mean())
        return gate


# --- LoRA beside a projection -----------------------------------------------------------------------------------


class LowRank(nn.Module):
    """gate(x) · x·Aᵀ·Bᵀ: (…, inputs) to (…, outputs); B is zero at first (arXiv:2106.09685)."""

    def __init__(self, inputs: int, outputs: int, rank: int, dropout: float, gate: Gate) -> None:
        super().__init__()
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.gate = (gate,)  # a tuple: it is the attention's submodule, not this one's
        self.columns = (0, outputs)
        """Of the output that the update is added to, [first, last)."""
        self.off = False
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
            self.lora_B.weight.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = hidden.to(self.lora_A.weight.dtype)
        return (self.gate[0](inner) * self.lora_B(self.lora_A(self.dropout(inner)))).to(hidden.dtype)

    def beside(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if self.off:
            return output
        update = self(inputs[0])
        first, last = self.columns
        whole = update.shape[-1] == output.shape[-1]
        return output + (update if whole else pad(update, (first, output.shape[-1] - last)))


def attach_query_value(layer: nn.Module, where: Attention, make: Callable[[int, int], LowRank]) -> None:
    """A LoRA beside the query's and one beside the value's projection; ``make(inputs, outputs)``."""
    for name, path, third in (("query_update", where.query, 0), ("value_update", where.value, 2)):
        place = layer.get_submodule(path)
        inputs, outputs = _sizes(place)
        width = outputs // 3 if where.thirds else outputs
        first = width * third if where.thirds else 0
        update = make(inputs, width)
        update.columns = (first, first + width)
        place.add_module(name, update)
        place.register_forward_hook(update.beside)


def _sizes(linear: Any) -> tuple[int, int]:
    """(inputs, outputs), also where ZeRO-3 has taken the weight away."""
    if hasattr(linear, "nf"):  # GPT-2's Conv1D
        return int(linear.nx), int(linear.nf)
    return int(linear.in_features), int(linear.out_features)


# --- prefixes ---------------------------------------------------------------------------------------------------

PREFIXED = "finetune_prefixed"
"""The name under which transformers calls :func:`attend`."""


class Trunk(nn.Module):
    """What the layers' projected prefixes share: an embedding of L vectors and tanh(E·W + b), (L, hidden)."""

    def __init__(self, length: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.project = nn.Linear(width, hidden)

    def forward(self) -> torch.Tensor:
        return torch.tanh(self.project(self.embedding))


class Prefix(nn.Module):
    """L keys and L values of one attention (arXiv:2101.00190): weights, or a projection of the trunk."""

    def __init__(self, length: int, heads: int, head_width: int, trunk: Trunk | None) -> None:
        super().__init__()
        self.shape = (length, 2, heads, head_width)
        self.trunk = (trunk,)
        self.gate: Gate | None = None
        self.gates: torch.Tensor | None = None  # of the pass under way, (B, T, 1)
        self.off = False
        width = 2 * heads * head_width
        if trunk is None:
            self.weight = nn.Parameter(torch.randn(length, width) * 0.02)
        else:
            self.project = nn.Linear(trunk.project.out_features, width)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (heads, L, head_width) each."""
        trunk = self.trunk[0]
        both = self.weight if trunk is None else self.project(trunk())
        key, value = both.reshape(self.shape).permute(1, 2, 0, 3)
        return key, value

    def take(self, module: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        if self.gate is not None and not self.off:
            self.gates = self.gate(inputs[0] if inputs else options["hidden_states"])


def attach_prefix(layer: nn.Module, where: Attention, prefix: Prefix) -> None:
    """Put ``prefix`` before the keys and values of an attention, gated per token where it has a gate."""
    place = layer.get_submodule(where.module)
    place.add_module("prefix", prefix)
    place.register_forward_pre_hook(prefix.take, with_kwargs=True)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: every query of every (packed) document sees the module's prefix.

    query (B, H, T, d), key and value (B, heads, S, d). The prefix joins behind rotary positions and the cache: it has
    no position, it is never cached, and it works where layers are recomputed; ``past_key_values`` would do none of it.
    With a gate g (B, T, 1) the query's prefix is (g·P_K, g·P_V): heads are made twice as wide, [q, g·q] against [k, 0]
    and [0, P_K], and the second half of what they put out is multiplied by g.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    prefix: Prefix | None = getattr(module, "prefix", None)
    causal = options.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    count, length = query.shape[2], key.shape[2]
    mask = attention_mask
    if mask is None and causal and count > 1:
        mask = torch.ones(count, length, dtype=torch.bool, device=key.device).tril()[None, None]
    if position_bias is not None:  # T5's
        low = torch.finfo(position_bias.dtype).min
        mask = (
            position_bias
            if mask is None
            else torch.where(mask, position_bias, low)
            if mask.dtype == torch.bool
            else position_bias + mask
        )
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if prefix is None or prefix.off:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=False, **options)
    first, second = (part.to(key.dtype).expand(len(key), -1, -1, -1) for part in prefix())
    if mask is not None:
        mask = pad(mask, (first.shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)
    gates, prefix.gates = prefix.gates, None
    if gates is None:
        key, value = torch.cat([first, key], 2), torch.cat([second, value], 2)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=False, **options)
    gates = gates.to(query.dtype)
    width = query.shape[-1]
    key = torch.cat([pad(first, (width, 0)), pad(key, (0, width))], 2)
    value = torch.cat([pad(second, (width, 0)), pad(value, (0, width))], 2)
    query = torch.cat([query, query * gates[:, None]], -1)
    out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=False, **options)
    return out[..., :width] + out[..., width:] * gates[:, :, None], None


def use_prefixes(model: Any) -> None:
    """Have the model's attentions call :func:`attend`. RunError(INVALID_CONFIGURATION) where they cannot."""
    if model.config._attn_implementation not in ("sdpa", PREFIXED) or not model._can_set_attn_implementation():
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"a prefix needs scaled-dot-product attention, which {type(model).__name__} does not have here. Accepted: "
            "models with sdpa in this version of transformers; or use method.type: adapter.",
        )
    AttentionInterface.register(PREFIXED, attend)
    AttentionMaskInterface.register(PREFIXED, sdpa_mask)
    model.set_attn_implementation(PREFIXED)


def head_shape(config: Any) -> tuple[int, int]:
    """(heads of keys and values, their width)."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return int(heads), int(width or config.hidden_size // config.num_attention_heads)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as if nothing was attached to it."""
    parts = [module for module in model.modules() if isinstance(module, Adapter | LowRank | Prefix)]
    for part in parts:
        part.off = True
    try:
        yield
    finally:
        for part in parts:
            part.off = False


# --- modules of the model's own that are trained ----------------------------------------------------------------


def train_norms(layer: nn.Module, stack: Stack) -> None:
    """Train a layer's norms."""
    for path in stack.norms:
        _train(layer.get_submodule(path))


def train_head(model: nn.Module, modules: list[str]) -> None:
    """Train the modules of these names, a classifier's head."""
    for path in modules:
        for module in model.get_submodule(path).modules():
            _train(module)


def _train(module: nn.Module) -> None:
    """Train a module's own weights, in float32; it answers in the number format it is asked in."""
    weights = list(module.named_parameters(recurse=False))
    for name, parameter in weights:
        with _whole(parameter):
            module.register_parameter(name, nn.Parameter(parameter.detach().float().clone()))
    if weights:
        _compute_in_float32(module)


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Inside, the parameter is there also where ZeRO-3 has taken it away."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter])
    return gathered


def _compute_in_float32(norm: nn.Module) -> None:
    asked: list[torch.dtype] = []

    def widen(module: nn.Module, inputs: Any) -> Any:
        asked[:] = [inputs[0].dtype]
        return (inputs[0].to(next(module.parameters()).dtype), *inputs[1:])

    def narrow(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(asked[0])

    norm.register_forward_pre_hook(widen)
    norm.register_forward_hook(narrow)


# --- writing and reading ----------------------------------------------------------------------------------------


def write(
    model: nn.Module,
    tokenizer: Any,
    directory: Path,
    state_dict: dict[str, torch.Tensor] | None,
    config: TrainerConfig,
) -> None:
    """What was trained, as safetensors, and the method's parameters, for ``methods.load_adapter``."""
    trained = state_dict or {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    folded = {name: tensor.cpu().contiguous() for name, tensor in _folded(trained).items()}
    save_file(folded, directory / WEIGHTS)
    method = config.method.model_dump(mode="json")
    described = {
        "finetune_method": method | ({"prefix_projection": False} if "prefix_projection" in method else {}),
        "base_model_name_or_path": base_name(config.model),
        "revision": config.model.revision if config.model.uri.startswith("hf://") else None,
        "modules_to_save": head_of(model),
        "load_with": "finetune_trainer.methods.load_adapter(model, directory)",
    }
    if kind_of(config.stage).new_head:
        described_model: Any = model.config
        described_model.save_pretrained(directory)
    (directory / CONFIG).write_text(json.dumps(described, indent=1))
    tokenizer.save_pretrained(directory)


def _folded(trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prefixes as weights: the network that made them is for training only."""
    trunk = next((name.removesuffix("embedding") for name in trained if name.endswith("prefix_trunk.embedding")), None)
    if trunk is None:
        return trained
    first = (trained[trunk + part].float() for part in ("embedding", "project.weight", "project.bias"))
    hidden = torch.tanh(linear(*first))
    result = {}
    for name, tensor in trained.items():
        if name.endswith("prefix.project.weight"):
            stem = name.removesuffix("project.weight")
            result[f"{stem}weight"] = linear(hidden, tensor.float(), trained[f"{stem}project.bias"].float())
        elif not name.startswith(trunk) and not name.endswith("prefix.project.bias"):
            result[name] = tensor
    return result


def read(model: nn.Module, directory: Path) -> None:
    """Put written weights into a model that already has the parts. RunError(INVALID_CONFIGURATION) where they do not
    belong together."""
    weights = load_file(directory / WEIGHTS)
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(
        name
        for name in mine.keys() | weights.keys()
        if name not in mine or name not in weights or mine[name].shape != weights[name].shape
    )
    if wrong:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{directory} does not fit {type(model).__name__}: {len(wrong)} of its weights differ in name or shape, "
            f"e.g. {wrong[0]}. Load it into the model it was trained on.",
        )
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(weights[name])
