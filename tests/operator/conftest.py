"""Fixtures of the tests on a cluster; a file that uses them has an operator of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.access import Access
from tests.cluster.cluster import Cluster
from tests.operator.operator_process import (
    OperatorProcess,
    Trainers,
    account,
    prepared,
    profile,
    settings_in,
    simulated,
)


@pytest.fixture(scope="module")
def own(cluster: Access) -> Iterator[str]:
    """The operator's namespace, and nodes for its pods."""
    with prepared(simulated(cluster), nodes=8) as name:
        yield name


@pytest.fixture(scope="module")
def progress(cluster: Cluster) -> Iterator[Trainers]:
    speaking = Trainers(cluster)
    yield speaking
    speaking.stop()


@pytest.fixture
def trainers(progress: Trainers) -> Iterator[Trainers]:
    """The trainers of one test: the next one's pods may have the same addresses."""
    yield progress
    progress.forget()


@pytest.fixture(scope="module")
def operator(cluster: Cluster, own: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """One operator for all of these tests, with the rights of the chart."""
    folder = tmp_path_factory.mktemp("operator")
    profiles = {
        "default": profile(own),
        "on-silent-nodes": profile(own, **{"simulate.finetune.dev/silent": "true"}),
        "gangs": {**profile(own), "gangScheduling": "kubernetes"},
        "dra": {**profile(own), "gpuResource": ""},
        "coscheduling": {**profile(own), "gangScheduling": "coscheduling"},
    }
    with account(cluster, own, folder) as kubeconfig:
        # Nobody takes its place: a slow moment of the machine must not end its leadership.
        alone = {"namespace": own, "leaseDuration": "60s", "renewDeadline": "40s", "retryPeriod": "2s"}
        settings = settings_in(own, profiles=profiles, leaderElection=alone)
        process = OperatorProcess(cluster, kubeconfig, folder, "operator", settings)
        process.wait_until("it answers", process.answers)
        yield process
        process.stop()
