"""One writer at a time: who may write into a job's checkpoint folder.

A deleted pod is no proof of a dead process. Every start of a run claims the folder by creating the next numbered
object below ``attempts/`` (an atomic create), and a writer whose claim is no longer the newest writes no manifest
and deletes nothing more. Called by ``run.py`` (claim) and ``saving.py`` (check).
"""

import json
import logging
import os
import secrets
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune_api.causes import Cause
from finetune_api.run import ENV_ATTEMPT, ENV_RUN, Termination
from finetune_trainer.outcome import RunError
from finetune_trainer.storage import Store

log = logging.getLogger(__name__)

UNCONDITIONAL = (
    "%s: the storage writes over an object where it was asked not to (If-None-Match: *). Two attempts of a run that "
    "are alive at the same moment, as after a node was lost, can both take this folder for their own and damage its "
    "checkpoints. Use storage that honours conditional writes, as Amazon S3 does (docs/credentials.md)."
)
CLAIMS = "attempts/"


@dataclass(frozen=True)
class Fence:
    """The claim of this run on its checkpoint folder."""

    store: Store
    number: int
    """Of the claim; the highest one holds."""
    attempt: int
    run: str

    def check(self) -> None:
        """Raise RunError(FENCED) where a newer claim exists."""
        newest = max(claims(self.store), default=self.number)
        if newest > self.number:
            raise RunError(
                Cause.FENCED,
                f"Attempt {self.attempt} was overtaken: {self.store.uri(name_of(newest))} holds the checkpoints "
                "now. This process ends without writing; nothing is to be done.",
            )

    def note(self, what: str, facts: dict[str, Any]) -> None:
        """Write something down beside the claim (``attempts/000007.began``), for the report of a later attempt."""
        self.store.put(f"{name_of(self.number)}.{what}", json.dumps(facts).encode())

    def end(self, word: Termination, when: str) -> None:
        """Keep the attempt's last word: what the pod's termination message says, uncut. See :func:`last_word`."""
        self.note("ended", {**json.loads(word.model_dump_json()), "ended": when})

    def attempts(self) -> list[dict[str, Any]]:
        """Every claim of this job so far, oldest first, with what was noted beside it."""
        found = []
        for number in claims(self.store):
            told = read(self.store, name_of(number))
            if told.get("run", "") not in (self.run, ""):  # without one: of an operator of an older version
                continue
            for what in ("began", "ended"):
                told |= read(self.store, f"{name_of(number)}.{what}")
            found.append(told)
        return found


def name_of(number: int) -> str:
    """Path of a claim: ``attempts/000007``."""
    return f"{CLAIMS}{number:06d}"


def claims(store: Store) -> list[int]:
    """Numbers of all claims."""
    names = (entry.path.removeprefix(CLAIMS) for entry in store.list(CLAIMS.rstrip("/")))
    return sorted(int(name) for name in names if name.isdigit())


def claim(store: Store, attempt: int | None = None, run: str | None = None) -> Fence:
    """Claim the folder for this attempt.

    ``attempt`` and ``run`` default to the environment's. Raises RunError(FENCED) where a later attempt of the same
    job has claimed before: an old pod that starts late must not overtake it.
    """
    run = os.environ.get(ENV_RUN, "") if run is None else run
    given = attempt if attempt is not None else int(os.environ.get(ENV_ATTEMPT, "0"))
    while True:
        standing = claims(store)
        last = read(store, name_of(standing[-1])) if standing else {}
        known = int(last.get("attempt", 0)) if last.get("run", "") == run else 0
        # Without an identity an older attempt cannot be told from a job that was made anew: that one is let in.
        if run and given and known > given:
            raise RunError(
                Cause.FENCED,
                f"Attempt {given} started after attempt {known} had claimed {store.uri()}. It ends at once; "
                "nothing is to be done.",
            )
        number = (standing[-1] if standing else 0) + 1
        word = {
            "attempt": given or known + 1,
            "run": run,
            "host": socket.gethostname(),
            "id": secrets.token_hex(8),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        data = json.dumps(word).encode()
        created = store.put_if_absent(name_of(number), data)
        if created and store.put_if_absent(name_of(number), data):  # it is there, so this had to be refused
            log.warning(UNCONDITIONAL, store.uri())
            created = False
        if created or read(store, name_of(number)).get("id") == word["id"]:  # the answer to a create can get lost
            return Fence(store, number, word["attempt"], run)  # type: ignore[arg-type]


def last_word(store: Store, attempt: int, run: str | None = None) -> Termination | None:
    """How an attempt ended, as it told in its checkpoint folder; None where it told nothing there.

    ``run`` as in :func:`claim`: with one, the attempt of another job of the same name is passed over.
    """
    run = os.environ.get(ENV_RUN, "") if run is None else run
    for number in reversed(claims(store)):
        claimed = read(store, name_of(number))
        # An operator of an older version did not say whose attempt it was.
        if claimed.get("attempt") == attempt and claimed.get("run", "") in (run, ""):
            return Termination.from_message(json.dumps(read(store, f"{name_of(number)}.ended")))
    return None


def read(store: Store, path: str) -> dict[str, Any]:
    """A JSON object below ``attempts/``; empty where there is none that can be read."""
    try:
        word = json.loads(store.get(path))
    except (FileNotFoundError, ValueError):
        return {}
    return word if isinstance(word, dict) else {}
