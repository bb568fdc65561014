"""Replicas of the real operator at a real API server: one leads, the next takes over, and no job notices."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api import crd
from finetune_operator.cluster.processes import free_port
from tests import PATIENCE
from tests.cluster.access import Object
from tests.cluster.cluster import Cluster
from tests.operator.jobs_on_a_cluster import (
    BATCH_JOBS,
    JOBS,
    condition,
    end,
    fine_tune_job,
    result,
    uids,
    wait_for_state,
    workers,
)
from tests.operator.operator_process import OperatorProcess, account, settings_in

pytestmark = pytest.mark.cluster

LEASES = "coordination.k8s.io/v1/leases"
SHORT = {"leaseDuration": "10s", "renewDeadline": "8s", "retryPeriod": "1s"}
LONG = {"leaseDuration": "30m", "renewDeadline": "20m", "retryPeriod": "1s"}


@pytest.fixture(scope="module")
def kubeconfig(cluster: Cluster, own: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with account(cluster, own, tmp_path_factory.mktemp("rights")) as path:
        yield path


@pytest.fixture(scope="module")
def pair(
    cluster: Cluster, own: str, kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[OperatorProcess]]:
    folder = tmp_path_factory.mktemp("replicas")
    settings = settings_in(own, leaderElection={"namespace": own, **SHORT})
    started = [OperatorProcess(cluster, kubeconfig, folder, f"replica-{letter}", settings) for letter in "ab"]
    yield started
    for replica in started:
        replica.stop()


@pytest.fixture
def replicas(pair: list[OperatorProcess]) -> list[OperatorProcess]:
    """Two of them, the one that leads first."""
    for replica in pair:
        if replica.process.poll() is not None:
            replica.start()
        replica.wait_until("it answers", replica.answers)
    pair[0].wait_until("one leads", lambda: any(leads(replica) for replica in pair))
    return sorted(pair, key=leads, reverse=True)


def leads(replica: OperatorProcess) -> bool:
    return replica.answers() and replica.metric("finetune_operator_leader") == 1


def wait_for_holder(cluster: Cluster, own: str, name: str) -> None:
    """Until the Lease names this holder."""
    cluster.wait_for(LEASES, lambda found: found[0]["spec"].get("holderIdentity") == name, namespace=own)


def running_job(cluster: Cluster, namespace: str, name: str) -> list[Object]:
    """A job of two workers, of which the operator has seen that they run; the workers."""
    cluster.apply(fine_tune_job(name), namespace=namespace)
    pods = workers(cluster, namespace, name)
    cluster.wait_for(
        JOBS, lambda jobs: condition(jobs[0], "PodsReady")["status"] == "True", name=name, namespace=namespace
    )
    return pods


def let_succeed(cluster: Cluster, namespace: str, name: str) -> Object:
    """The workers end well; the job when it is complete."""
    ended = "simulate.finetune.dev/exit-code=0"
    cluster.kubectl("annotate", "pod", "-n", namespace, "-l", f"finetune.dev/job={name}", ended)
    return cluster.wait_for_condition(JOBS, name, "Complete", namespace=namespace)


def test_one_replica_leads_and_both_are_ready(replicas: list[OperatorProcess]) -> None:
    first, second = replicas
    for replica in replicas:
        assert replica.get("/healthz") == (200, "ok\n")
        # Also the one that does not lead, else a Deployment of two would never be available.
        replica.wait_until("it is ready", lambda replica=replica: replica.get("/readyz") == (200, "ok\n"))  # type: ignore[misc]
    assert (first.metric("finetune_operator_leader"), second.metric("finetune_operator_leader")) == (1, 0)


def test_a_killed_leader_is_replaced_when_the_lease_expires_and_its_job_goes_on(
    cluster: Cluster, own: str, namespace: str, replicas: list[OperatorProcess]
) -> None:
    first, second = replicas
    pods = running_job(cluster, namespace, "tune")
    assert first.metric("finetune_jobs", namespace=namespace, state="Starting") == 1
    assert second.metric("finetune_jobs", namespace=namespace) is None  # it would count twice

    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    wait_for_holder(cluster, own, second.name)
    second.wait_until("it leads", lambda: leads(second))
    # It has looked at the job before its gang is compared.
    second.wait_until("it counts the job", lambda: second.metric("finetune_jobs", namespace=namespace) == 1)
    done = let_succeed(cluster, namespace, "tune")["status"]
    assert [(a["number"], a["cause"]) for a in done["attempts"]] == [(1, "Succeeded")]
    assert done["restarts"] == 0
    assert uids(cluster.objects("pods", namespace=namespace)) == uids(pods)
    assert len(cluster.objects(BATCH_JOBS, namespace=namespace)) == 1

    first.start()
    first.wait_until("it answers", first.answers)
    assert not leads(first)


def test_a_leader_that_is_told_to_stop_gives_the_lease_back(
    cluster: Cluster, own: str, namespace: str, replicas: list[OperatorProcess]
) -> None:
    first, second = replicas
    pods = running_job(cluster, namespace, "tune")
    # As Prometheus does it. A connection that stayed open would hold up the handing over: kopf waits 5 s for it.
    scraper = http.client.HTTPConnection("127.0.0.1", first.port, timeout=PATIENCE)
    scraper.request("GET", "/metrics")
    assert scraper.getresponse().read()
    assert scraper.sock.recv(1) == b"", "it was closed"

    first.process.terminate()
    wait_for_holder(cluster, own, second.name)
    assert first.process.wait(PATIENCE) == 0, first.log.read_text()
    assert "the Lease finetune-operator is given back" in first.log.read_text()
    second.wait_until("it leads", lambda: leads(second))
    done = let_succeed(cluster, namespace, "tune")["status"]
    assert [a["cause"] for a in done["attempts"]] == ["Succeeded"]
    assert uids(cluster.objects("pods", namespace=namespace)) == uids(pods)

    # The last one leaves a Lease that whoever comes next has at once.
    second.process.terminate()
    assert second.process.wait(PATIENCE) == 0, second.log.read_text()
    assert "holderIdentity" not in cluster.get(LEASES, "finetune-operator", namespace=own)["spec"]


CRDS = "apiextensions.k8s.io/v1/customresourcedefinitions"


def test_an_operator_is_ready_when_its_resource_is_served_whenever_that_is(
    cluster: Cluster, namespace: str, pair: list[OperatorProcess]
) -> None:
    """Installed before the CRD, as GitOps may do it; and the CRD deleted and made again."""

    def serve(served: bool) -> None:
        if served:
            cluster.kubectl("apply", "--server-side", "-f", str(crd.PATH))
        else:
            cluster.kubectl("delete", "crd", "finetunejobs.finetune.dev")
            cluster.wait_gone(CRDS, name="finetunejobs.finetune.dev", namespace=None)

    for replica in pair:
        replica.stop()
    replica = pair[0]
    serve(False)
    try:
        replica.start()
        replica.wait_until("it answers", replica.answers)
        replica.wait_until("it has looked", lambda: "does not serve finetunejobs" in replica.log.read_text())
        status, why = replica.get("/readyz")
        assert (status, "install the CustomResourceDefinition" in why) == (503, True)
        assert replica.get("/healthz") == (200, "ok\n")  # to start it again would not help
        for name in ("first", "second"):
            serve(True)
            replica.wait_until("it is ready", lambda: replica.get("/readyz")[0] == 200)
            cluster.wait_for_condition(CRDS, "finetunejobs.finetune.dev", "Established", namespace=None)
            running_job(cluster, namespace, name)
            assert replica.metric("finetune_jobs", namespace=namespace, state="Starting") == 1
            serve(False)
            replica.wait_until("it is not ready", lambda: replica.get("/readyz")[0] == 503)
            assert replica.metric("finetune_jobs", namespace=namespace, state="Starting") is None
        replica.process.terminate()  # also where it only waits
        assert replica.process.wait(PATIENCE) == 0, replica.log.read_text()
    finally:
        serve(True)
        cluster.wait_for_condition(CRDS, "finetunejobs.finetune.dev", "Established", namespace=None)


class Line:
    """A line to the API server that can be cut (connections end, and new ones are refused) or fall silent."""

    def __init__(self, port: int) -> None:
        self.silent = False
        self._far = port
        self._sockets: list[socket.socket] = []
        self.port = free_port()
        self.mend()

    def mend(self) -> None:
        """Connections go through."""
        server = socket.create_server(("127.0.0.1", self.port))
        self._sockets.append(server)
        threading.Thread(target=self._accept, args=(server,), daemon=True).start()

    def cut(self) -> None:
        """No connection goes through."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._sockets.clear()

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = server.accept()[0], socket.create_connection(("127.0.0.1", self._far))
                self._sockets += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not self.silent:
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


def test_an_api_server_that_is_away_for_a_moment_ends_no_leadership_and_one_that_is_silent_does(
    cluster: Cluster, own: str, namespace: str, kubeconfig: Path, tmp_path: Path
) -> None:
    access: Object = json.loads(kubeconfig.read_text())
    server = access["clusters"][0]["cluster"]
    line = Line(int(server["server"].rpartition(":")[2]))
    server["server"] = f"https://127.0.0.1:{line.port}"
    (tmp_path / "kubeconfig").write_text(json.dumps(access))

    def replica_with(lease: dict[str, str]) -> OperatorProcess:
        settings = settings_in(own, leaderElection={"namespace": own, **lease})
        return OperatorProcess(cluster, tmp_path / "kubeconfig", tmp_path, "replica", settings)

    replica = replica_with(LONG)
    try:
        replica.wait_until("it leads", lambda: leads(replica))
        running_job(cluster, namespace, "tune")
        line.cut()
        replica.wait_until("it has noticed", lambda: "the Lease finetune-operator cannot be" in replica.log.read_text())
        cluster.kubectl("annotate", "pod", "-n", namespace, "--all", "simulate.finetune.dev/exit-code=0")
        cluster.wait_for_condition(BATCH_JOBS, "tune-a1", "Complete", namespace=namespace)
        cluster.kubectl("delete", "pod", "-n", namespace, "--all")  # as their node's or the garbage collector's end
        line.mend()
        [reader] = cluster.wait_for_pods("finetune.dev/reads-attempt=1", 1, namespace=namespace)
        assert wait_for_state(cluster, namespace, "tune", "Finishing")
        end(cluster, reader, 0, word=result("tune"))
        done = cluster.wait_for_condition(JOBS, "tune", "Complete", namespace=namespace)["status"]
        assert [a["cause"] for a in done["attempts"]] == ["Succeeded"]
        assert [output["uri"] for output in done["outputs"]] == ["s3://team/tune"], "its pods could not tell it"
        assert cluster.wait_for(BATCH_JOBS, lambda jobs: len(jobs) == 1, namespace=namespace)
        assert replica.process.poll() is None, replica.log.read_text()
        assert leads(replica)

        # Without an answer it must end before another one may lead, however long a connection can hang.
        replica.stop()
        replica = replica_with(LONG | {"renewDeadline": "8s"})
        replica.wait_until("it leads", lambda: leads(replica))
        line.silent = True
        assert replica.process.wait(PATIENCE) == 1
        assert "leadership lost" in replica.log.read_text()
        assert cluster.get(LEASES, "finetune-operator", namespace=own)["spec"]["holderIdentity"] == replica.name
    finally:
        replica.stop()
        line.cut()
