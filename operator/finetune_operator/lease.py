"""Leadership: one active replica, by a Lease. Called by ``handlers.py``.

The election is the Kubernetes client's own. A leader that cannot renew its Lease stops at once: two leaders would be
worse than none (Jobs are named by attempt, so that even then no gang runs twice).
"""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from kubernetes.leaderelection import electionconfig, leaderelection
from kubernetes.leaderelection.resourcelock.leaselock import LeaseLock

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


def elect(settings: LeaderElection, leading: asyncio.Event, lost: Callable[[], None]) -> None:
    """Take part in the election, in a thread. Sets ``leading`` when won; calls ``lost`` when lost after that."""
    loop = asyncio.get_running_loop()
    if not settings.enabled:
        leading.set()
        return

    def started() -> None:
        log.info("this replica leads")
        loop.call_soon_threadsafe(leading.set)

    election = leaderelection.LeaderElection(
        electionconfig.Config(
            LeaseLock(settings.lease_name, settings.namespace or own_namespace(), identity()),
            lease_duration=round(seconds(settings.lease_duration)),
            renew_deadline=round(seconds(settings.renew_deadline)),
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
        lost()  # whether it ended or broke: without it nobody knows who leads

    threading.Thread(target=run, name="leader-election", daemon=True).start()
