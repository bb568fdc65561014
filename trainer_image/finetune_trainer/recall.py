"""Says again what an attempt said last: out of its checkpoint folder, for an operator that found no pod any more.

``python -m finetune_trainer.recall``, in a pod of its own that has the credentials and volumes of the workers but no
GPU. Imports neither torch nor transformers. Its termination message is the attempt's last word; where there is none,
its exit code is that of a mistake, and its own word says so.
"""

import os
import sys

from finetune_api.causes import Cause
from finetune_api.run import ENV_ATTEMPT, Termination
from finetune_trainer.faults import diagnose, exit_code, leave_word
from finetune_trainer.fence import CLAIMS, last_word
from finetune_trainer.fetch import configuration
from finetune_trainer.outcome import RunError
from finetune_trainer.storage import Store


def recalled() -> Termination:
    """The last word of the attempt that the environment names. RunError(DATA_NOT_FOUND) where it left none."""
    store, attempt = Store(configuration().checkpoint_uri), int(os.environ[ENV_ATTEMPT])
    word = last_word(store, attempt)
    if word is None or not word.outputs:
        raise RunError(
            Cause.DATA_NOT_FOUND,
            f"{store.uri(CLAIMS)} does not tell what attempt {attempt} wrote: it was deleted since, or the attempt's "
            "trainer is of an older version.",
        )
    return word


def main() -> int:
    """The container: everything comes from the environment."""
    try:
        word = recalled()
    except Exception as error:
        cause, message = diagnose(error, phase="reading what the attempt wrote")
        word = Termination(cause=cause, message=message[:2000], exit_code=exit_code(cause))
    print(f"{word.cause}: {word.message}", file=sys.stderr, flush=True)
    leave_word(word)
    return exit_code(word.cause)


if __name__ == "__main__":
    sys.exit(main())
