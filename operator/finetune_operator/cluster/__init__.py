"""The two clusters a job can run on, behind one small interface: ``kubernetes.py`` and ``local.py``.

``reconcile.py`` knows only this interface. Objects are plain dictionaries in Kubernetes' own form, on both.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from finetune_api.conditions import Reason

Object = dict[str, Any]


class ClusterError(Exception):
    """The cluster did not do what was asked. ``message`` is for the user; the pass is tried again later."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RefusedError(ClusterError):
    """What a job needs is not accepted, for a ``reason`` that does not pass by asking again: a person, or what holds a
    quota, has to act."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def is_same(there: Object | None, job: Object) -> bool:
    """What lies under a FineTuneJob's name is that very one: it was neither deleted nor made anew since."""
    return there is not None and bool(there["metadata"]["uid"] == job["metadata"]["uid"])


class Cluster(Protocol):
    """What the reconcile loop needs of a cluster. Every call may raise :class:`ClusterError`."""

    def finetunejob(self, namespace: str, name: str) -> Object | None:
        """The FineTuneJob, or None where there is none."""

    def children(self, namespace: str, name: str) -> list[Object]:
        """All Jobs, Pods and ConfigMaps made for the FineTuneJob of that name, each with its ``kind``; and Events, of
        Jobs whose pods cannot be made."""

    def node(self, name: str) -> Object | None:
        """A node; None where it is gone. Raises where it may not be read."""

    def apply(self, manifest: Object) -> None:
        """Make an object, or bring it up to date where it is there and has the manifest's controller; a Job that is
        there stays as it is. Raises :class:`RefusedError` where the name is another's or the object not accepted."""

    def relabel(self, kind: str, namespace: str, name: str, uid: str, labels: Mapping[str, str]) -> None:
        """Put labels on the object with that uid, beside those it has. Gone already is fine."""

    def delete(self, kind: str, namespace: str, name: str, uid: str, *, force: bool = False) -> None:
        """Delete the object with that uid and what it owns (foreground). Gone already, or made anew under its name, is
        fine. ``force``: without waiting for the kubelet, for pods of dead nodes only."""

    def delete_job(self, job: Object) -> None:
        """Delete this FineTuneJob and what it owns. Gone already, or made anew under its name, is fine."""

    def patch_status(self, job: Object, status: Mapping[str, Any]) -> bool:
        """Replace the status of this FineTuneJob. False: it is gone, or was made anew under its name."""

    def event(self, job: Object, kind: str, reason: str, message: str) -> None:
        """Record an event (kind Normal or Warning) on a FineTuneJob. Never fails."""

    def events_of(self, pod: Object) -> list[Object]:
        """The events of a pod; none where they may not be read."""

    def progress(self, pod: Object) -> Object | None:
        """The progress document of a worker pod; None where it cannot be reached (yet)."""

    def logs(self, namespace: str, pod: str, container: str, lines: int) -> list[str]:
        """Last lines of a container's log; empty where there is none."""
