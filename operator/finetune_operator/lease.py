"""Leadership: one active replica, by a Lease. Called by ``handlers.py``.

The election is the Kubernetes client's own. A leader that cannot renew its Lease stops at once: two leaders would be
worse than none (Jobs are named by attempt, so that even then no gang runs twice). One that stops in order gives the
Lease back, so that the next need not wait until it expires.
"""

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.leaderelection import electionconfig, leaderelection
from kubernetes.leaderelection.resourcelock.leaselock import LeaseLock
from urllib3.exceptions import HTTPError

from finetune_api.base import seconds
from finetune_operator.settings import LeaderElection

log = logging.getLogger(__name__)

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def identity() -> str:
    """Who this replica is. The pod's name: a container restarted in its pod is leader again without waiting."""
    return os.environ.get("POD_NAME") or f"{socket.gethostname()}_{os.getpid()}"


def own_namespace() -> str:
    """The namespace this process runs in; ``default`` outside a cluster."""
    if found := os.environ.get("POD_NAMESPACE"):
        return found
    return _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else "default"


class _ImpatientClient(client.ApiClient):
    """Every request ends within ``patience`` seconds and is not repeated: the election repeats it."""

    def __init__(self, patience: float) -> None:
        configuration = client.Configuration.get_default_copy()
        configuration.retries = False
        super().__init__(configuration)
        self._patience = patience

    def call_api(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["_request_timeout"] = self._patience
        return super().call_api(*args, **kwargs)


class _Lock(LeaseLock):
    """The client's own, but for two things. An API server that cannot be reached is a try that failed, where the
    client's raises, which ends the election (and waits for an answer without end). And it can be given back."""

    def __init__(self, name: str, namespace: str, identity: str, patience: float) -> None:
        super().__init__(name, namespace, identity)
        self.api_instance = client.CoordinationV1Api(_ImpatientClient(patience))
        self.given_back = False
        self.renewed = 0.0
        """When it was last written (``time.monotonic``); what was written is valid from then on."""
        self._writing = threading.Lock()

    def get(self, name: str, namespace: str) -> tuple[bool, Any]:
        try:
            found: tuple[bool, Any] = super().get(name, namespace)
            return found
        except (HTTPError, OSError) as error:
            log.warning("the Lease %s cannot be read: %s", name, error)
            return False, ApiException(reason=str(error))

    def create(self, name: str, namespace: str, election_record: Any) -> bool:
        return self._write(super().create, name, namespace, election_record)

    def update(self, name: str, namespace: str, updated_record: Any) -> bool:
        return self._write(super().update, name, namespace, updated_record)

    def _write(self, write: Callable[..., bool], name: str, *rest: Any) -> bool:
        with self._writing:
            asked = time.monotonic()
            try:
                written = not self.given_back and write(name, *rest)
            except (HTTPError, OSError) as error:
                log.warning("the Lease %s cannot be written: %s", name, error)
                return False
            self.renewed = asked if written else self.renewed
            return written

    def give_back(self) -> None:
        """Names no holder where that was us, and never takes it again."""
        with self._writing:
            self.given_back = True
            try:
                lease = self.api_instance.read_namespaced_lease(self.name, self.namespace)
                if lease.spec and lease.spec.holder_identity == self.identity:
                    lease.spec.holder_identity = None
                    self.api_instance.replace_namespaced_lease(self.name, self.namespace, lease)
                    log.info("the Lease %s is given back", self.name)
            except (ApiException, HTTPError, OSError) as error:
                log.warning("the Lease %s could not be given back (%s); it expires by itself", self.name, error)


def elect(settings: LeaderElection, leading: asyncio.Event, lost: Callable[[], None]) -> Callable[[], None]:
    """Take part in the election, in a thread. Sets ``leading`` when won; calls ``lost`` when lost after that.

    Returns what gives the Lease back, to be called when nothing is done any more.
    """
    loop = asyncio.get_running_loop()
    if not settings.enabled:
        leading.set()
        return lambda: None

    def ended() -> None:
        if not lock.given_back:
            lost()

    def started() -> None:
        """Runs in a thread of its own."""
        log.info("this replica leads")
        loop.call_soon_threadsafe(leading.set)
        # The client counts the deadline from its first failure on, and looks at it between two tries only: late enough
        # for another replica to lead already.
        while (left := lock.renewed + renew_deadline - time.monotonic()) > 0:
            time.sleep(left)
        ended()

    renew_deadline = seconds(settings.renew_deadline)
    # Half the deadline: an unanswered try leaves time for another one.
    lock = _Lock(settings.lease_name, settings.namespace or own_namespace(), identity(), renew_deadline / 2)
    election = leaderelection.LeaderElection(
        electionconfig.Config(
            lock,
            lease_duration=round(seconds(settings.lease_duration)),
            renew_deadline=round(renew_deadline),
            retry_period=round(seconds(settings.retry_period)),
            onstarted_leading=started,
            onstopped_leading=lambda: None,
        )
    )

    def run() -> None:
        try:
            election.run()
        except Exception:
            log.exception("the election broke")
        ended()  # or broken: without it nobody knows who leads

    threading.Thread(target=run, name="leader-election", daemon=True).start()
    return lock.give_back
