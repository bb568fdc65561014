"""What makes the result of a run doubtful although it ended well: the reasons of the condition ``Healthy``, in words.

The trainer judges (``finetune_trainer/health.py``) and tells each reason with a figure, because its last word must be
short. Whoever shows them (status, terminal, report, README of the result) makes the sentences by this table.
"""

from collections.abc import Mapping

from finetune_api.conditions import Reason

SENTENCES: dict[str, str] = {
    Reason.LOSS_AT_CHANCE: "The loss is no better than that of a guess among all tokens ({}): the model has collapsed. "
    "Lower training.learning_rate, add training.warmup_steps, and train again from the start.",
    Reason.LOSS_ABOVE_START: "The loss is above the one it began with ({}): the training made the model worse. Lower "
    "training.learning_rate, or add training.warmup_steps.",
    Reason.ZERO_GRADIENTS: "The gradients are zero ({}): nothing is learned any more. After a jump of the loss, lower "
    "training.learning_rate; from the first step on, look at what the method trains and at the rows.",
    Reason.EMPTY_ANSWERS: "The model answers nothing any more ({} prompts; before training it did). Look at what the "
    "training rows answer (finetune data preview), and lower training.learning_rate.",
    Reason.IDENTICAL_ANSWERS: "The model answers all {} prompts alike, with what no training row says. Lower "
    "training.learning_rate.",
    Reason.ROWS_TRUNCATED: "Nearly all training rows are cut ({}): the model sees no row to its end. Raise "
    "data.max_length.",
    Reason.HELD_OUT_ROWS_IN_TRAINING: "Held-out rows stand in the training rows ({}): the evaluation "
    "flatters the result. Take them out of data.train or data.eval.",
    Reason.TOO_FEW_STEPS: "The run has {}: too few to learn from. Raise training.num_train_epochs, lower "
    "gradient_accumulation_steps or per_device_train_batch_size, or add rows.",
}
"""By reason, the gravest first; ``{}`` stands for the figure."""


def sentences(symptoms: Mapping[str, str]) -> list[str]:
    """What is doubtful, the gravest first. A reason that a newer trainer tells stands for itself."""
    known = [sentence.format(symptoms[reason]) for reason, sentence in SENTENCES.items() if reason in symptoms]
    return known + [f"{reason}: {figure}" for reason, figure in symptoms.items() if reason not in SENTENCES]


def gravest(symptoms: Mapping[str, str]) -> Reason:
    """The reason of the condition ``Healthy``."""
    found = next((reason for reason in SENTENCES if reason in symptoms), None)
    return Reason(found) if found else Reason.OTHER_DOUBT if symptoms else Reason.NO_DOUBT
