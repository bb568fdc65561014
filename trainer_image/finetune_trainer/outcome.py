"""How a run ends: the one exception the trainer raises on purpose, with a cause the operator understands.

Raised anywhere in the package; turned into a termination message by ``run.py`` only.
"""

import errno
import os

from finetune_api.causes import Cause
from finetune_api.run import ENV_LOCAL


class RunError(Exception):
    """The run cannot go on. ``message`` is for the user: what happened, the value, what is accepted, the remedy."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message


def where_it_runs(*, cluster: str, machine: str) -> str:
    """Of two remedies the one that suits the place: a cluster, or the user's own machine (``finetune run``)."""
    return machine if os.environ.get(ENV_LOCAL) else cluster


def disk_is_full(error: BaseException) -> bool:
    """No room is left on a disk (or in shared memory, which is a file system), or none by its quota; as Python says
    it, or a library that has only words for it."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(words in str(error).lower() for words in _FULL)


_FULL = ("no space left on device", "disk quota exceeded", "insufficient shared memory")
