"""The prompts of a stage that makes data: read from any format that has some, each once, in a fixed order."""

import json
import random
from typing import Any

from finetune_api.causes import Cause
from finetune_api.run import TrainerConfig
from finetune_trainer.data.records import Message, Prompt
from finetune_trainer.data.sources import BadRows, records
from finetune_trainer.fetch import Fetched
from finetune_trainer.outcome import RunError

Prompts = list[list[Message]]


def read(config: TrainerConfig, fetched: Fetched, limit: int) -> tuple[Prompts, dict[str, dict[str, Any]]]:
    """Prompts (messages that end with the user), and what is to be reported of every source by its URI.

    ``limit``: a random choice of so many, by the seed, in the order of the files; 0: all. RunError(INVALID_DATA).
    """
    found: dict[str, list[Message]] = {}
    report: dict[str, dict[str, Any]] = {}
    for source, path in zip(config.data.train, fetched.train, strict=True):
        counts: dict[str, Any] = {"uri": source.uri, "format": source.format, "rows": 0, "unused": 0, "repeated": 0}
        bad = BadRows(source.uri, config.data.max_bad_rows)
        for _, _, prompt in records(source, path, Prompt, bad, counts):
            plain = [{key: value for key, value in message.items() if key != "train"} for message in prompt.messages]
            text = json.dumps(plain, ensure_ascii=False)
            counts["repeated"] += text in found
            found.setdefault(text, plain)
        bad.close()
        report[source.uri] = counts | {"bad_rows": bad.count, "bad_examples": bad.named}
    prompts = list(found.values())
    if not prompts:
        raise RunError(Cause.INVALID_DATA, f"there is no prompt in {', '.join(report)}")
    if 0 < limit < len(prompts):
        chosen = sorted(random.Random(config.training.seed).sample(range(len(prompts)), limit))
        prompts = [prompts[number] for number in chosen]
    return prompts, report
