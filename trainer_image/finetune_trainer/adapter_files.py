"""What a folder with an adapter holds, as PEFT and our own methods write it. Nothing heavy is imported."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_trainer.outcome import RunError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def tokenizer_folder(model: Path, adapters: Iterable[Path]) -> Path:
    """Where the tokenizer of a model with adapters lies: with the last adapter that brings one, else with the model.

    An adapter was trained with its own tokenizer: the chat template and the end token are those it answers by.
    """
    bring = [folder for folder in adapters if has_tokenizer(folder)]
    return bring[-1] if bring else model


def has_tokenizer(folder: Path) -> bool:
    """A tokenizer's vocabulary lies in the folder."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def described(folder: Path, uri: str) -> dict[str, Any]:
    """An adapter's configuration. RunError(INVALID_CONFIGURATION) where it is none."""
    try:
        found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            Cause.INVALID_CONFIGURATION, f"{uri} is no adapter: its {CONFIG} cannot be read: {error}"
        ) from error
    return found
