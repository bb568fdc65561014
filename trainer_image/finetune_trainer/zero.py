"""What DeepSpeed is told: the plan's configuration, with what depends on the world and on how we step.

Called by ``engine.py``, and by ``run.py`` before a model is loaded.
"""

import math
from copy import deepcopy
from typing import Any

from finetune_api.run import TrainerConfig
from finetune_trainer.world import World


def forget_dry_run(optimizer: Any) -> None:
    """DeepSpeed's optimizer for bf16 without ZeRO takes a step with zero gradients to make AdamW's state. Left alone
    it counts, and spoils the bias correction of the real steps (and, but for a learning rate of 0, the weights)."""
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.state.clear()


def zero_stage(config: TrainerConfig) -> int:
    """0 to 3."""
    return int(config.deepspeed.get("zero_optimization", {}).get("stage") or 0)


def is_plain(config: TrainerConfig) -> bool:
    """Neither ZeRO nor a precision section of DeepSpeed is asked for."""
    return zero_stage(config) == 0 and not any(
        config.deepspeed.get(section, {}).get("enabled") for section in ("bf16", "fp16")
    )


def passes(config: TrainerConfig, world: World) -> int:
    """Forward passes per process that a global batch takes."""
    return math.ceil(config.global_batch_size / (config.training.per_device_train_batch_size * world.size))


def deepspeed_config(config: TrainerConfig, world: World) -> dict[str, Any]:
    """The plan's DeepSpeed configuration, with what depends on the world and on how we step."""
    given = deepcopy(config.deepspeed)
    given["train_micro_batch_size_per_gpu"] = config.training.per_device_train_batch_size
    given["gradient_accumulation_steps"] = passes(config, world)
    given.pop("train_batch_size", None)
    given["gradient_clipping"] = 0.0 if is_plain(config) else config.training.max_grad_norm
    given.setdefault("zero_allow_untested_optimizer", True)
    # torch's AdamW runs on the host too; DeepSpeed's own would be compiled with g++ at the first run.
    given.setdefault("zero_force_ds_cpu_optimizer", False)
    given.setdefault("steps_per_print", 1_000_000_000)
    return given


def before_loading(config: TrainerConfig, world: World) -> Any:
    """Under ZeRO-3: tell transformers to partition the weights while it reads them. Keep what is returned alive
    until the model is loaded. None otherwise."""
    if zero_stage(config) < 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(deepspeed_config(config, world))
