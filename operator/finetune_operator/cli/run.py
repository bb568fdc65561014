"""The loop of ``finetune run``: the operator's own reconcile over the cluster that is this machine.

Called by ``main.py``. :func:`prepare` decides what is to run and refuses what cannot; :class:`Runner` turns until every
job has come to rest. It decides nothing about a run: that is ``reconcile``'s, here as on Kubernetes. Ctrl-C is
``spec.suspend: true``: the trainers save a checkpoint, the pods go, and the same command goes on from there.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from finetune_api.conditions import Condition, Reason, State
from finetune_api.mistakes import read
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cli.files import Document, RefusedError
from finetune_operator.cli.fresh import Ask, Choice, finished, left_by
from finetune_operator.cluster import ClusterError, Object
from finetune_operator.cluster.local import Key, LocalCluster, no_room
from finetune_operator.observe import observe
from finetune_operator.plan import changed_fields, result_part, waited_for
from finetune_operator.reconcile import reconcile
from finetune_operator.settings import Settings
from finetune_operator.status import condition

LONGEST = 3600.0
"""Seconds between two passes without cause."""
RETRY = 5.0
"""Seconds until a pass that failed is tried again."""


class View(Protocol):
    """Who watches: a terminal, a log, a test."""

    def show(self, key: Key, status: FineTuneJobStatus) -> None:
        """Where a job stands now."""

    def say(self, text: str) -> None:
        """A line for the user."""


def status_of(job: Object | None) -> FineTuneJobStatus:
    """The status of a FineTuneJob as it lies in the state folder."""
    return FineTuneJobStatus.model_validate((job or {}).get("status") or {})


def needs_trainer() -> None:
    """Refuse to start where the trainer is not installed: every pod would fail for it."""
    needs("trainer", "finetune_trainer", "torch", "transformers", "peft", "datasets", "deepspeed")


def needs(extra: str, *modules: str) -> None:
    """Refuse what an extra of the package is needed for, where it is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise RefusedError(
            [
                f"This needs the extra {extra} of finetune-operator ({', '.join(missing)} missing). In a checkout: "
                f"pip install -e '.[{extra}]' -c constraints.txt"
            ]
        )


def prepare(
    cluster: LocalCluster, documents: Sequence[Document], say: Callable[[str], None], fresh: Ask | None = None
) -> list[Key]:
    """Submit the jobs; the keys of those that are to run come back. Raises RefusedError, having changed nothing.

    ``fresh``: begin anew, and this says what becomes of what earlier runs left.
    """
    given = {document.key for document in documents}
    mistakes = [m for document in documents for m in _cannot_run(cluster, document, given, fresh is not None)]
    if mistakes:
        raise RefusedError(mistakes)
    chosen = {document.key: _chosen(cluster, document, fresh) for document in documents if fresh is not None}
    keys = []
    for document in documents:
        try:
            cluster.claim(*document.key)
        except ClusterError as error:
            raise RefusedError([error.message]) from error
        name, job = document.key[1], cluster.finetunejob(*document.key)
        before, changes = status_of(job), _changes(cluster, document)
        if before.state == State.SUCCEEDED and fresh is None and not changes:
            say(
                f"{name} has already succeeded; its rows are not looked at again. To learn rows that were added or "
                "changed, add --fresh: it trains from the start, and keeps what there is. With more epochs, --set "
                "checkpoint.resume=always trains it on; few are too few, at the end of its schedule."
            )
        else:
            if fresh is not None:
                _begin_anew(cluster, document, chosen[document.key], say)
            elif before.state == State.FAILED or changes:
                if changes and before.state != State.FAILED:
                    say(f"{name}: goes on from its newest checkpoint with {'; '.join(changes)}")
                cluster.forget(*document.key, keep=True)
            elif before.attempts and (steered := _steered(job, document)):
                say(f"{name}: from this attempt on, {'; '.join(steered)}")
            cluster.submit(document.job)
        keys.append(document.key)
    return keys


def _chosen(cluster: LocalCluster, document: Document, ask: Ask) -> Choice:
    left = left_by(document, cluster.root)
    choice = ask(left.told) if left else Choice.KEEP
    if choice is Choice.CANCEL:
        raise RefusedError(["Nothing was changed. Without --fresh, the run goes on from its newest checkpoint."])
    return choice


def _begin_anew(cluster: LocalCluster, document: Document, choice: Choice, say: Callable[[str], None]) -> None:
    """Put what earlier runs left out of the way of this one."""
    left = left_by(document, cluster.root)
    if left.elsewhere:
        say(
            f"{left.name}: checkpoints in {left.elsewhere} are not touched; the run continues from the newest one that "
            "fits. To begin at step 0, give it another checkpoint.uri."
        )
    if choice is Choice.DELETE:
        left.delete()
        say(f"{left.told} It was deleted.")
    elif left:
        places = " and ".join(str(place) for place in left.put_aside())
        say(f"{left.told} It is now in {places}.")
    cluster.forget(*document.key, keep=choice is not Choice.DELETE)


_SHAPING = ("spec.stage", "spec.model", "spec.method", "spec.checkpoint.uri", "spec.output.uri")
"""Of what a checkpoint, and the place it lies in, is."""


def _changes(cluster: LocalCluster, document: Document) -> list[str]:
    """What of the result's configuration was changed since the job began."""
    frozen = observe(document.key[1], cluster.folder(*document.key).list("ConfigMap")).frozen_spec
    return changed_fields(frozen, result_part(document.spec)) if frozen is not None else []


def _steered(job: Object | None, document: Document) -> list[str]:
    """What was changed of the rest: it counts from the next attempt on."""
    before = read(job or {})
    if not isinstance(before, FineTuneJobSpec):  # of a version that knew other fields
        return []
    fields = {"checkpoint", "workers", "recovery", "profile", "credentials"}
    was, now = (spec.model_dump(mode="json", by_alias=True, include=fields) for spec in (before, document.spec))
    return changed_fields(was, now)


def _cannot_run(cluster: LocalCluster, document: Document, given: set[Key], fresh: bool) -> list[str]:
    mistakes = []
    (namespace, name), spec = document.key, document.spec
    label = f"{document.source}: {name}"
    wanted = spec.workers.replicas * spec.workers.gpus_per_worker
    if wanted > len(cluster.gpus.names):
        mistakes.append(f"{label}: {no_room(wanted, len(cluster.gpus.names))}")
    for uri in waited_for(spec):
        other = uri.removeprefix("job://")
        state = status_of(cluster.finetunejob(namespace, other)).state
        if (namespace, other) not in given and state != State.SUCCEEDED:
            found = f"is {state} here" if state else "was not run here"
            mistakes.append(
                f"{label}: the spec names {uri}: {other} {found}; accepted: a job that has "
                "succeeded, or one given with this one. Add its file to the command."
            )
    folder = cluster.folder(namespace, name)
    before = status_of(folder.job)
    if (changes := _changes(cluster, document)) and not fresh and before.state != State.FAILED:
        what = "has already succeeded" if before.state == State.SUCCEEDED else "has begun"
        shaping = [change for change in changes if change.startswith(_SHAPING)]
        go_on = "" if shaping else "train on from its newest checkpoint with it (--set checkpoint.resume=always), "
        mistakes += [
            f"{label} {what} with another configuration: {change}. Put it back, {go_on}give the job another name, "
            "or start it anew with --fresh (what it has done so far is kept beside it)."
            for change in (shaping if spec.checkpoint.resume == "always" else changes)
        ]
    elif not changes and not fresh and not before.attempts and (output := finished(document, cluster.root)):
        mistakes.append(
            f"{label}: spec.output.uri: a finished result lies in {output}, and the state folder {cluster.root} does "
            "not know the run that made it; accepted: a folder without a result. Start from the directory that you "
            "began in, or name its state folder by --state-dir; or name another output, or add --fresh: what is there "
            "is kept beside it."
        )
    return mistakes


class Runner:
    """Turns the reconcile loop for some jobs until each has come to rest."""

    def __init__(
        self,
        cluster: LocalCluster,
        settings: Settings,
        keys: Sequence[Key],
        view: View,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.cluster = cluster
        self.settings = settings
        self.keys = list(keys)
        self.view = view
        self.interruptions = 0
        self._now = now
        self._stopping = False
        self._problems: dict[Key, str] = {}

    def interrupt(self) -> None:
        """Ctrl-C: once to save and stop, twice to stop at once. Safe in a signal handler."""
        self.interruptions += 1
        self.cluster.wake()

    def run(self) -> None:
        """Until every job has come to rest, or a second interruption."""
        due = dict.fromkeys(self.keys, time.monotonic())
        while due:
            changed = self.cluster.wait(max(0.0, min(due.values()) - time.monotonic()))
            if self.interruptions > 1:
                self.cluster.kill()
                return
            if self.interruptions and not self._stopping:
                self._stopping = True
                for key in due:
                    self.cluster.set_suspended(*key, True)
                changed |= due.keys()
            for key in [key for key in due if key in changed or due[key] <= time.monotonic()]:
                due[key] = time.monotonic() + self._pass(key)
                if self._rests(key):
                    del due[key]
                    for other in due:  # it may be what another one waits for
                        due[other] = 0.0

    def _pass(self, key: Key) -> float:
        """One pass; seconds until the next one."""
        try:
            result = reconcile(self.cluster, self.settings, *key, self._now)
        except ClusterError as error:
            if self._problems.get(key) != error.message:
                self.view.say(f"{key[1]}: {error.message} Tried again every {RETRY:.0f} s.")
            self._problems[key] = error.message
            return RETRY
        self._problems.pop(key, None)
        self.view.show(key, status_of(result.job))
        return result.requeue if result.requeue is not None else LONGEST

    def _rests(self, key: Key) -> bool:
        job = self.cluster.finetunejob(*key)
        if self.cluster.runs(*key):
            return False
        status = status_of(job)
        if job is None or status.state in (State.SUCCEEDED, State.FAILED, State.INVALID, State.SUSPENDED):
            return True
        inputs = condition(status, Condition.INPUTS_READY)
        return inputs is not None and inputs.reason == Reason.INPUT_JOB_FAILED
