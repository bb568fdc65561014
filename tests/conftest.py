"""Fixtures of all tests: the two clusters, each started once a session and only when a test asks for it.

Where neither a cluster can be made nor KUBECONFIG names one, their tests are skipped, saying why; with CI=true they
fail instead.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster import binaries
from tests.cluster.access import Access
from tests.cluster.binaries import UnavailableError
from tests.cluster.cluster import Cluster

# A shell starts what runs in the background deaf to Ctrl-C, and so would be all processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONG_ONES = (
    *("test_examples", "test_methods_resume", "test_heads", "test_stages", "test_resume", "test_rollouts"),
    *("test_run", "test_methods_own", "test_rlaif", "test_earlier"),
    *("test_install", "test_on_a_cluster", "test_waiting_on_a_cluster", "test_admission", "test_replicas_on_a_cluster"),
)
"""Files that take longest for their number of tests, longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files begin first: where several processes share the files, none is left alone with one at the end.

    The one that needs the trainer's real image is last: the image is brought to its node meanwhile.
    """
    sizes = Counter(item.path for item in items)
    places = {name: place for place, name in enumerate(LONG_ONES)}

    def turn(item: pytest.Item) -> tuple[bool, int, int, Path]:
        last = item.get_closest_marker("image") is not None
        return last, places.get(item.path.stem, len(places)), -sizes[item.path], item.path

    items.sort(key=turn)


def available(make: Callable[[], object]) -> None:
    """Calls what may not be possible on this machine."""
    try:
        make()
    except UnavailableError as reason:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must not pass without a cluster: {reason}", pytrace=False)
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    """A Kubernetes API: the one of KUBECONFIG, else a control plane of our own with two simulated 8-GPU nodes.

    Check `cluster.simulated` before relying on simulated pods (tests/cluster/stages.yaml says how to steer them).
    """
    if given := os.environ.get("KUBECONFIG"):
        if not shutil.which("kubectl"):
            available(lambda: binaries.require(["kubectl"]))
        yield Access(Path(given), tmp_path_factory.mktemp("cluster"))
        return
    own = Cluster("simulated")
    available(own.start)
    yield own
    own.stop()


@pytest.fixture(scope="session")
def e2e_cluster() -> Iterator[Cluster]:
    """A Kubernetes with two real kubelets, DNS and S3."""
    own = Cluster("full")
    available(own.start)
    yield own
    own.stop()


@pytest.fixture(scope="session")
def importing(e2e_cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Future[None] | None]:
    """The trainer's real image on its way to node-1, where a test of this session wants it and it is built already:
    six gigabytes take two minutes, in which the other tests go on."""
    from tests.e2e.product import TRAINER

    wanted = any(item.get_closest_marker("image") for item in request.session.items)
    with ThreadPoolExecutor(1) as beside:
        if wanted and TRAINER.archive.exists():
            yield beside.submit(e2e_cluster.node("node-1").import_image, TRAINER.archive)
        else:
            yield None


@pytest.fixture
def namespace(cluster: Access) -> Iterator[str]:
    """A namespace of `cluster` for one test."""
    with cluster.namespace() as name:
        yield name


@pytest.fixture
def e2e_namespace(e2e_cluster: Cluster, importing: object) -> Iterator[str]:
    """A namespace of `e2e_cluster` for one test."""
    with e2e_cluster.namespace() as name:
        yield name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows, with a test that failed, what was in its namespace."""
    report = yield
    arguments = getattr(item, "funcargs", {})
    for owner, name in (("cluster", "namespace"), ("e2e_cluster", "e2e_namespace")):
        if report.failed and {owner, name} <= arguments.keys():
            access, namespace = arguments[owner], arguments[name]
            with contextlib.suppress(Exception):  # the test's own failure is what must be seen
                for what in ("all", "events"):
                    shown = access.try_kubectl("get", what, "-n", namespace, "-o", "wide").stdout
                    report.sections.append((f"kubectl get {what} -n {namespace}", shown))
    return report
