"""The fine-tuning methods a job can name, one class each: ``spec.method.type`` picks the class.

To add a method: one class here (its parameters under their PEFT or paper names), one row in
``compatibility.py``, one file in ``trainer_image/finetune_trainer/methods/``.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from finetune_api.base import HyperModel


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


DEFAULT_METHOD = "lora"


def _default_type(value: Any) -> Any:
    """``method: {r: 8}`` is lora, as the schema's default makes it on a cluster."""
    return {"type": DEFAULT_METHOD, **value} if isinstance(value, dict) else value


Method = Annotated[Annotated[Full | Lora | Qlora, Field(discriminator="type")], BeforeValidator(_default_type)]
METHODS: tuple[type[Full] | type[Lora] | type[Qlora], ...] = (Full, Lora, Qlora)
