"""What a folder with an adapter holds, as PEFT and our own methods write it. Nothing heavy is imported."""

import json
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_trainer.outcome import RunError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def described(folder: Path, uri: str) -> dict[str, Any]:
    """An adapter's configuration. RunError(INVALID_CONFIGURATION) where it is none."""
    try:
        found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            Cause.INVALID_CONFIGURATION, f"{uri} is no adapter: its {CONFIG} cannot be read: {error}"
        ) from error
    return found
