"""What goes together: one row per method. Admission refuses the rest (``rules.py``), tests prove what goes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What one method goes with."""

    stages: tuple[str, ...]
    """Which it trains, of ``stages.py``."""
    zero_stages: tuple[int, ...]
    packing: bool = True
    gradient_checkpointing: bool = True
    merge: bool = True
    """The trained part can be merged into the model."""
    tasks: bool = False
    """It writes a result per task, of which job:// cannot choose one."""
    quantized: bool = False
    """The base model is held in 4 bits."""
    default_zero_stage: int = 0
    """The stage the plan chooses where the user names none."""
    whole_model: bool = False
    """The model's own weights are trained: the result is a model, not an adapter."""

    @property
    def chains(self) -> bool:
        """Another job can start from its output (job://NAME)."""
        return self.whole_model or (self.merge and not self.tasks)


WORDS = ("pretrain", "sft", "dpo", "kto", "orpo")
"""Stages that train a language model."""
WRITING = ("ppo", "grpo")
"""Stages that train a language model by what it writes."""
LABELS = ("sequence_classification", "token_classification")
"""Stages that train a classifier."""
ALL = (*WORDS, *WRITING, "reward", *LABELS, "seq2seq")

COMPATIBILITY: dict[str, Row] = {
    "full": Row(stages=ALL, zero_stages=(0, 1, 2, 3), merge=False, default_zero_stage=2, whole_model=True),
    "freeze": Row(stages=ALL, zero_stages=(0, 1, 2, 3), merge=False, whole_model=True),
    "bitfit": Row(stages=ALL, zero_stages=(0, 1, 2, 3), merge=False, whole_model=True),
    "lora": Row(stages=ALL, zero_stages=(0, 1, 2, 3)),
    # DeepSpeed cannot partition packed 4-bit weights.
    "qlora": Row(stages=ALL, zero_stages=(0, 1, 2), quantized=True),
    # Its allocation reads whole gradients beside whole weights, right after the optimizer's step. Its schedule counts
    # steps of one update each.
    "adalora": Row(stages=tuple(stage for stage in ALL if stage not in WRITING), zero_stages=(0,)),
    # Prefixes are a cache, which gradient checkpointing drops; virtual tokens belong to a row of their own.
    "prefix_tuning": Row(stages=ALL, zero_stages=(0, 1, 2), packing=False, gradient_checkpointing=False, merge=False),
    "p_tuning_v2": Row(stages=ALL, zero_stages=(0, 1, 2), packing=False, gradient_checkpointing=False, merge=False),
    # A reward is that of the last token, which cannot be found behind virtual ones; and behind padding on the left PEFT
    # gives tokens other places when they are written than when they are learned.
    "prompt_tuning": Row(stages=(*WORDS, *LABELS, "seq2seq"), zero_stages=(0, 1, 2), packing=False, merge=False),
    "p_tuning": Row(stages=(*WORDS, *LABELS, "seq2seq"), zero_stages=(0, 1, 2), packing=False, merge=False),
    # ZeRO-3 breaks some of these (LoHa, LN tuning, trainable tokens), and would write others without the random
    # matrices they keep as buffers; LoRA is there for models that need it.
    **dict.fromkeys(
        (
            *("ia3", "loha", "lokr", "oft", "boft", "fourierft", "waveft", "hra", "randlora", "vblora", "shira"),
            *("c3a", "miss", "road", "gralora", "hira", "ln_tuning"),
        ),
        Row(stages=ALL, zero_stages=(0, 1, 2)),
    ),
    # PEFT saves nothing beside the tokens, so no head.
    "trainable_tokens": Row(stages=(*WORDS, *WRITING, "seq2seq"), zero_stages=(0, 1, 2)),
    # They hold float32 constants beside their weights, and DeepSpeed's bf16 section turns only one of the two round.
    "vera": Row(stages=ALL, zero_stages=(0,)),
    "delora": Row(stages=ALL, zero_stages=(0,)),
    # Not linear in their input, so there is nothing to fold into weights.
    "adapter": Row(stages=ALL, zero_stages=(0, 1, 2, 3), merge=False),
    "mam": Row(stages=ALL, zero_stages=(0, 1, 2, 3), merge=False),
    "unipelt": Row(stages=ALL, zero_stages=(0, 1, 2, 3), merge=False),
    "moelora": Row(stages=(*WORDS, *LABELS, "seq2seq"), zero_stages=(0, 1, 2, 3), tasks=True),
}

CONTINUED = (
    *("lora", "qlora", "prompt_tuning", "p_tuning_v2", "ia3", "vera", "loha", "lokr", "oft", "boft", "fourierft"),
    *("waveft", "hra", "randlora", "c3a", "miss", "road", "delora", "gralora", "hira", "adapter", "mam", "unipelt"),
)
"""Methods that go on with an adapter made earlier (``model.adapters[].train``). The others' adapters are not all of
what was trained (p_tuning, prefix_tuning, adalora, vblora, moelora), or are made of random choices (shira)."""
