"""The fine-tuning methods a job can name, one class each: ``spec.method.type`` picks the class.

To add a method: one class here (its parameters under their PEFT or paper names), one row in
``compatibility.py``, one file in ``trainer_image/finetune_trainer/methods/``.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from finetune_api.base import HyperModel

TASK = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"


class Full(HyperModel):
    """Every weight of the model is trained."""

    type: Literal["full"]


class Lora(HyperModel):
    """LoRA: a low-rank update B·A beside frozen linear layers (arXiv:2106.09685; PEFT ``LoraConfig``)."""

    type: Literal["lora"]
    r: int = Field(16, ge=1, le=4096)
    """Rank of the update."""
    lora_alpha: float = Field(32, gt=0, le=65536)
    """Scaling: the update is multiplied by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A, a probability."""
    target_modules: str | list[str] = "all-linear"
    """Which layers: all-linear, a list of module names, or one regular expression over full module names."""
    modules_to_save: list[Annotated[str, Field(max_length=256)]] = Field(default=[], max_length=64)
    """Modules trained and saved whole beside the adapter, e.g. lm_head."""
    use_rslora: bool = False
    """Rank-stabilised scaling lora_alpha / sqrt(r) (arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353): slower, often better at small r."""


class Qlora(Lora):
    """QLoRA: LoRA over a base model held in 4 bits (arXiv:2305.14314; bitsandbytes)."""

    type: Literal["qlora"]  # type: ignore[assignment]
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type of the frozen weights."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants too: 0.4 bits per weight less."""


class BottleneckAdapter(HyperModel):
    """Bottleneck adapters: two small layers with a non-linearity between, in a frozen model (arXiv:1902.00751)."""

    type: Literal["adapter"]
    adapter_variant: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """Where: houlsby (arXiv:1902.00751), behind attention and behind feed-forward, before the residual addition, and
    the layer norms are trained too; pfeiffer (arXiv:2005.00247), behind feed-forward only; parallel
    (arXiv:2110.04366), beside feed-forward."""
    bottleneck_size: int = Field(64, ge=1, le=65536)
    """Width of the bottleneck."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """The function in the bottleneck."""
    adapter_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the bottleneck, a probability."""
    scaling: float = Field(1.0, gt=0, le=65536)
    """What the adapter puts out is multiplied by this; arXiv:2110.04366 takes 4 for parallel adapters."""
    adapter_init: Literal["lora", "houlsby"] = "lora"
    """First weights: lora, the second layer is zero and the model begins as it was; houlsby, both are normal with 0.01
    and it begins nearly so."""


class Mam(HyperModel):
    """MAM (mix-and-match): a prefix in attention and a scaled adapter beside feed-forward (arXiv:2110.04366)."""

    type: Literal["mam"]
    num_virtual_tokens: int = Field(30, ge=1, le=4096)
    """Length of the prefix: keys and values of every attention that all tokens see."""
    prefix_projection: bool = True
    """Make the prefixes of all layers from one embedding by a two-layer network, which learns more steadily."""
    encoder_hidden_size: int = Field(800, ge=0, le=65536)
    """Width of that network; 0: the model's."""
    bottleneck_size: int = Field(512, ge=1, le=65536)
    """Width of the bottleneck."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """The function in the bottleneck."""
    adapter_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the bottleneck, a probability."""
    scaling: float = Field(4.0, gt=0, le=65536)
    """What the adapter puts out is multiplied by this; arXiv:2110.04366 takes 4 for parallel adapters."""


class Unipelt(HyperModel):
    """UniPELT: LoRA of query and value, a prefix and an adapter, each behind a learned gate per layer
    (arXiv:2110.07577)."""

    type: Literal["unipelt"]
    r: int = Field(8, ge=1, le=4096)
    """Rank of the update."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A, a probability."""
    num_virtual_tokens: int = Field(10, ge=1, le=4096)
    """Length of the prefix: keys and values of every attention that all tokens see."""
    prefix_projection: bool = True
    """Make the prefixes of all layers from one embedding by a two-layer network, which learns more steadily."""
    encoder_hidden_size: int = Field(512, ge=0, le=65536)
    """Width of that network; 0: the model's."""
    bottleneck_size: int = Field(48, ge=1, le=65536)
    """Width of the bottleneck."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """The function in the bottleneck."""
    adapter_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the bottleneck, a probability."""


class MoeLora(HyperModel):
    """MOELoRA: LoRA split into experts that a learned gate weighs by the row's task; the result is one plain LoRA
    per task (arXiv:2310.18339)."""

    type: Literal["moelora"]
    tasks: list[Annotated[str, Field(max_length=63, pattern=TASK)]] = Field(default=[], max_length=64)
    """Names of the tasks. Every row names its own in its field task; the result has a folder of each name. The
    questions of evaluation.prompts are put to the first."""
    num_experts: int = Field(8, ge=1, le=256)
    """Number of experts; each has rank r / num_experts."""
    task_embedding_dim: int = Field(64, ge=1, le=4096)
    """Width of a task's embedding, from which the gate is made."""
    r: int = Field(16, ge=1, le=4096)
    """Rank of the update."""
    lora_alpha: float = Field(32, gt=0, le=65536)
    """Scaling: the update is multiplied by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A, a probability."""
    target_modules: str | list[str] = "all-linear"
    """Which layers: all-linear, a list of module names, or one regular expression over full module names."""


DEFAULT_METHOD = "lora"


def _default_type(value: Any) -> Any:
    """``method: {r: 8}`` is lora, as the schema's default makes it on a cluster."""
    return {"type": DEFAULT_METHOD, **value} if isinstance(value, dict) else value


Method = Annotated[
    Annotated[
        Full | Lora | Qlora | BottleneckAdapter | Mam | Unipelt | MoeLora,
        Field(discriminator="type"),
    ],
    BeforeValidator(_default_type),
]
METHODS: tuple[type[HyperModel], ...] = (
    *(Full, Lora, Qlora),
    *(BottleneckAdapter, Mam, Unipelt, MoeLora),
)
