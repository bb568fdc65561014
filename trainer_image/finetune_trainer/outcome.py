"""How a run ends: the one exception the trainer raises on purpose, with a cause the operator understands.

Raised anywhere in the package; turned into a termination message by ``run.py`` only.
"""

from finetune_api.causes import Cause


class RunError(Exception):
    """The run cannot go on. ``message`` is for the user: what happened, the value, what is accepted, the remedy."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message
