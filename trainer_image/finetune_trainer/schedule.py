"""How long a run is and what its learning rate is at each step: pure functions of the configuration.

The shapes are transformers' own (``get_scheduler``), evaluated as functions of the step, so that a checkpoint need
not hold a scheduler. Called by ``run.py``.
"""

import math
from collections.abc import Callable
from typing import Any

from finetune_api.run import TrainerConfig


def sequences_wanted(config: TrainerConfig, per_epoch: Callable[[int], int]) -> int:
    """Sequences of the data stream that the run uses, over all processes.

    ``per_epoch(e)`` is the number of sequences of epoch e. With max_steps: whole batches. Without: exactly
    num_train_epochs passes, of the last one the fraction asked for, so the last batch may be smaller.
    """
    training = config.training
    if training.max_steps > 0:
        return training.max_steps * config.global_batch_size
    whole = int(training.num_train_epochs)
    wanted = sum(per_epoch(epoch) for epoch in range(whole))
    if fraction := training.num_train_epochs - whole:
        wanted += math.ceil(round(fraction * per_epoch(whole), 6))
    return wanted


def steps_for(config: TrainerConfig, sequences: int) -> int:
    """Optimizer steps for so many sequences."""
    return math.ceil(sequences / config.global_batch_size)


def learning_rate(config: TrainerConfig, max_steps: int) -> Callable[[int], float]:
    """The learning rate of the step after ``done`` steps, as transformers' scheduler gives it."""
    import torch
    from transformers import get_scheduler

    training = config.training
    warmup = training.warmup_steps
    warmup_steps = math.ceil(warmup * max_steps) if warmup < 1 else int(warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    kwargs: dict[str, Any] = dict(training.lr_scheduler_kwargs)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=max_steps,
        scheduler_specific_kwargs=kwargs or None,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda done: training.learning_rate * float(factor(done))
