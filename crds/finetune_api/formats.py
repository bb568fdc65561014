"""What kind of record each format gives, and which kinds a stage can learn from.

The converters are the trainer's (``data/formats.py``), the kinds and what is turned into what its ``data/records.py``;
a test compares.
"""

from finetune_api.stages import STAGES

FORMATS: dict[str, str] = {
    **dict.fromkeys(("alpaca", "messages", "sharegpt", "chatml", "chatglm", "claude", "guanaco"), "Conversation"),
    "prompt_completion": "Conversation",
    "prompt": "Prompt",
    **dict.fromkeys(("preference", "hh_rlhf", "rm_static", "shp"), "Preference"),
    **dict.fromkeys(("oasst", "ranked"), "Ranked"),
    "kto": "Judged",
    "text": "Text",
    "labelled": "Labelled",
    "source_target": "SourceTarget",
    "conll": "Tagged",
}
"""By name; ``auto`` is one of them."""

SERVES: dict[str, tuple[str, ...]] = {
    "Conversation": ("Conversation", "Preference", "Ranked", "Judged"),
    "Prompt": ("Prompt", "Conversation", "Preference", "Ranked", "Judged"),
    "Preference": ("Preference", "Ranked"),
    "Judged": ("Judged", "Preference"),
    "SourceTarget": ("SourceTarget", "Conversation"),
    "Text": ("Text",),
    "Labelled": ("Labelled",),
    "Tagged": ("Tagged",),
}
"""For each kind of record those that can stand for it."""


def formats_for(stage: str) -> list[str]:
    """The values of ``data.train[].format`` that a stage can learn from."""
    kinds = SERVES[STAGES[stage].record]
    return ["auto", *(name for name, kind in FORMATS.items() if kind in kinds)]
