"""What goes together: one row per method. Admission refuses the rest (``rules.py``), tests prove what goes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What one method goes with."""

    stages: tuple[str, ...]
    zero_stages: tuple[int, ...]
    packing: bool = True
    gradient_checkpointing: bool = True
    merge: bool = True
    """The trained part can be merged into the model."""
    quantized: bool = False
    """The base model is held in 4 bits."""
    default_zero_stage: int = 0
    """The stage the plan chooses where the user names none."""


COMPATIBILITY: dict[str, Row] = {
    "full": Row(stages=("sft",), zero_stages=(0, 1, 2, 3), merge=False, default_zero_stage=2),
    "lora": Row(stages=("sft",), zero_stages=(0, 1, 2, 3)),
    # DeepSpeed cannot partition packed 4-bit weights.
    "qlora": Row(stages=("sft",), zero_stages=(0, 1, 2), quantized=True),
    # Not linear in their input, so there is nothing to fold into weights.
    "adapter": Row(stages=("sft",), zero_stages=(0, 1, 2, 3), merge=False),
    "mam": Row(stages=("sft",), zero_stages=(0, 1, 2, 3), merge=False),
    "unipelt": Row(stages=("sft",), zero_stages=(0, 1, 2, 3), merge=False),
    "moelora": Row(stages=("sft",), zero_stages=(0, 1, 2, 3)),
}
