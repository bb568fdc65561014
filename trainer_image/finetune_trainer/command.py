"""What the commands on finished models share (``merge.py``, ``evaluate.py``, ``chat.py``): a place for what they fetch,
and the words for what went wrong."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from finetune_api.run import ENV_CACHE, ENV_WORK
from finetune_trainer.faults import diagnose, exit_code


def carried_out(phase: str, work: Callable[[Path], None]) -> int:
    """``work`` with the cache's folder; the command's exit code. ``phase``: what it is doing, for the words."""
    try:
        with tempfile.TemporaryDirectory(prefix=f"finetune-{phase}-") as scratch:
            cache = Path(os.environ.get(ENV_CACHE) or scratch)
            os.environ.setdefault(ENV_WORK, scratch)
            cache.mkdir(parents=True, exist_ok=True)
            work(cache)
    except Exception as error:
        cause, message = diagnose(error, phase=phase)
        print(f"{cause}: {message}", file=sys.stderr)
        return exit_code(cause)
    return 0
