"""Fixtures of all tests: the two clusters, each started once a session and only when a test asks for it.

Where neither a cluster can be made nor KUBECONFIG names one, their tests are skipped, saying why; with CI=true they
fail instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.access import Access
from tests.cluster.binaries import UnavailableError
from tests.cluster.cluster import Cluster


def _start(cluster: Cluster) -> Cluster:
    try:
        cluster.start()
    except UnavailableError as reason:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must not pass without a cluster: {reason}", pytrace=False)
        pytest.skip(str(reason))
    return cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    """A Kubernetes API: the one of KUBECONFIG, else a control plane of our own with two simulated 8-GPU nodes.

    Check `cluster.simulated` before relying on simulated pods (tests/cluster/stages.yaml says how to steer them).
    """
    if given := os.environ.get("KUBECONFIG"):
        yield Access(Path(given), tmp_path_factory.mktemp("cluster"))
        return
    own = _start(Cluster("simulated"))
    yield own
    own.stop()


@pytest.fixture(scope="session")
def e2e_cluster() -> Iterator[Cluster]:
    """A Kubernetes with two real kubelets, DNS and S3."""
    own = _start(Cluster("full"))
    yield own
    own.stop()


@pytest.fixture
def namespace(cluster: Access) -> Iterator[str]:
    """A namespace of `cluster` for one test."""
    with cluster.namespace() as name:
        yield name


@pytest.fixture
def e2e_namespace(e2e_cluster: Cluster) -> Iterator[str]:
    """A namespace of `e2e_cluster` for one test."""
    with e2e_cluster.namespace() as name:
        yield name
