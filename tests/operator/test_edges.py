"""What wakes the loop, the queue and the metrics."""

import asyncio
import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest
from kubernetes.client import ApiClient, Configuration
from prometheus_client import generate_latest

from finetune_api.run import ENV_ENDS
from finetune_operator.cluster import kubernetes
from finetune_operator.cluster.kubernetes import LINE_LENGTH, LOG_BYTES, end_of_log
from finetune_operator.handlers import Operator
from finetune_operator.metrics import OperatorMetrics
from finetune_operator.queue import WorkQueue
from tests.operator.simulation import Simulation


def test_a_key_waits_once_and_has_one_worker_at_a_time() -> None:
    async def story() -> None:
        queue: WorkQueue[str] = WorkQueue()
        queue.add("a")
        queue.add("a")
        assert len(queue) == 1
        assert await queue.get() == "a"
        queue.add("a")  # while it is worked on: afterwards again
        assert len(queue) == 0
        queue.done("a", None)
        assert len(queue) == 1

    asyncio.run(story())


def test_a_requeue_comes_back_and_an_event_comes_sooner() -> None:
    async def story() -> None:
        queue: WorkQueue[str] = WorkQueue()
        queue.add("a")
        await queue.get()
        queue.done("a", 3600)
        assert len(queue) == 0
        queue.add("a")
        assert await queue.get() == "a"
        queue.done("a", 0.05)
        assert await asyncio.wait_for(queue.get(), 5) == "a"

    asyncio.run(story())


def test_failures_back_off_and_a_good_pass_forgets_them() -> None:
    async def story() -> None:
        queue: WorkQueue[str] = WorkQueue()
        loop = asyncio.get_running_loop()
        delays = []
        for _ in range(9):
            queue.add("a")
            await queue.get()
            queue.failed("a")
            delays.append(queue._timers["a"].when() - loop.time())
        assert [round(d, 1) for d in delays] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
        queue.add("a")
        await queue.get()
        queue.done("a", None)
        assert "a" not in queue._failures

    asyncio.run(story())


def test_a_job_is_looked_at_when_others_change_it_and_not_when_its_own_status_does() -> None:
    async def story() -> None:
        sim = Simulation()
        operator = Operator(sim.settings, cast(Any, sim))
        first: dict[str, Any] = {
            "metadata": {"namespace": "team", "name": "tune", "uid": "1"},
            "spec": {"profile": "a"},
        }
        waiting = {"metadata": {"namespace": "team", "name": "next"}, "spec": {"model": {"uri": "job://tune"}}}

        async def woken(job: dict[str, Any], deleted: bool = False) -> set[str]:
            operator.seen(copy.deepcopy(job), deleted)
            keys = {(await operator.queue.get())[1] for _ in range(len(operator.queue))}
            for key in keys:
                operator.queue.done(("team", key), None)
            return keys

        assert await woken(first) == {"tune"}  # as all jobs are listed at the start
        assert await woken(waiting) == {"next"}
        first["metadata"] |= {"resourceVersion": "2", "managedFields": [{"manager": "finetune-operator"}]}
        first["status"] = {"state": "Running", "progress": {"step": 1}}
        assert await woken(first) == {"next"}  # which may have waited for just that
        first["status"]["progress"]["step"] = 2
        assert await woken(first) == set()
        for part, change in (
            ("spec", {"suspend": True}),
            ("metadata", {"labels": {"a": "b"}}),
            ("metadata", {"deletionTimestamp": "2026-01-01T00:00:00Z"}),
            ("metadata", {"uid": "2"}),
        ):
            first[part] |= change
            assert await woken(first) == {"tune"}, change
        assert await woken(first, deleted=True) == {"tune", "next"}
        assert await woken(first) == {"tune", "next"}

    asyncio.run(story())


def test_a_worker_is_asked_directly_whatever_proxy_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"step": 3}')

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as worker:
        threading.Thread(target=worker.serve_forever, daemon=True).start()
        monkeypatch.setattr(kubernetes, "HTTP_PORT", worker.server_port)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
        monkeypatch.setenv("no_proxy", "10.0.0.0/8,.svc,.cluster.local")
        cluster = kubernetes.KubernetesCluster(ApiClient())
        assert cluster.progress({"metadata": {"name": "p"}, "status": {"podIP": "127.0.0.1"}}) == {"step": 3}
        worker.shutdown()
    assert asked == ["/progress"]


def test_of_a_log_its_end_is_kept() -> None:
    """A server that is asked for so many lines and so many bytes at once keeps the first bytes of the last lines."""
    bars = [b"\r".join(b"%3d%% of a long line" % n for n in range(100)) for _ in range(40)]
    text = b"\n".join([*bars, b"Traceback (most recent call last):", "ValueError: größer".encode() + b"!" * 500, b""])
    for size in (1, 7, LOG_BYTES, len(text)):
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        lines = end_of_log(parts, 20)
        assert len(lines) == 20
        assert lines[-2:] == ["Traceback (most recent call last):", ("ValueError: größer" + "!" * 500)[:LINE_LENGTH]]
    assert end_of_log([], 20) == []
    assert end_of_log([b"x" * (3 * LOG_BYTES)], 20) == ["x" * LINE_LENGTH]
    assert end_of_log([b"a\nb\n", b"c"], 2) == ["b", "c"]


def test_a_job_is_made_as_it_is_written_and_the_api_server_judges_it() -> None:
    """The client's own models would refuse a number as quantity, and fields of a newer Kubernetes."""
    made: list[tuple[str, Any]] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()

        def do_POST(self) -> None:
            made.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(201)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None: ...

    trainer = {"name": "trainer", "resources": {"limits": {"cpu": 4}}, "fieldOfNextYear": {"a": 1}}
    owner = {"kind": "FineTuneJob", "name": "tune", "uid": "1", "controller": True}
    job = {
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {"name": "tune-a1", "namespace": "team", "ownerReferences": [owner]},
        "spec": {"template": {"spec": {"containers": [trainer]}}},
    }  # fmt: skip
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        configuration = Configuration(host=f"http://127.0.0.1:{server.server_port}")
        kubernetes.KubernetesCluster(ApiClient(configuration)).apply(job)
        server.shutdown()
    [(path, body)] = made
    assert path.startswith("/apis/batch/v1/namespaces/team/jobs?")
    assert "fieldValidation=Strict" in path
    assert body == job


def scrape(sim: Simulation, leading: bool) -> str:
    metrics = OperatorMetrics(lambda: sim.jobs.values(), sim.settings)
    metrics.leader.set(1 if leading else 0)
    return generate_latest(metrics.registry).decode()


def test_figures_of_jobs_come_from_their_statuses() -> None:
    sim = Simulation()
    sim.submit("tune")
    while sim.step.get("tune-a1", 0) < 5:
        sim.reconcile("tune")
        sim.tick()
    text = scrape(sim, leading=True)
    job = 'finetunejob="tune",namespace="team"'
    assert f"finetune_job_progress_ratio{{{job}}} 0.4" in text
    assert f'finetune_job_state{{{job},state="Running"}} 1.0' in text
    assert f"finetune_job_gpus{{{job}}} 16.0" in text
    assert f"finetune_job_cost_per_hour{{{job}}} 32.0" in text
    assert 'finetune_jobs{namespace="team",state="Running"} 1.0' in text
    assert "finetune_job_checkpoint_timestamp_seconds" in text


def test_a_doubtful_result_is_told_while_the_job_runs_and_when_it_has_succeeded() -> None:
    sim = Simulation(unhealthy={})
    sim.submit("tune")
    sim.run("tune", until="Running")
    assert sim.reason("tune", "Healthy") == ("True", "NoDoubt")
    assert "finetune_job_unhealthy_since" not in "".join(
        line for line in scrape(sim, leading=True).splitlines() if not line.startswith("#")
    )
    sim.unhealthy = {"LossAboveStart": "3.81 → 10.83"}
    for state in ("Running", "Succeeded"):
        sim.tick()
        sim.run("tune", until=state)
        sim.reconcile("tune")
        assert sim.status("tune")["state"] == state
        assert sim.reason("tune", "Healthy") == ("False", "LossAboveStart")
        assert "(3.81 → 10.83)" in sim.message("tune", "Healthy")
        labels = 'finetunejob="tune",namespace="team",reason="LossAboveStart"'
        assert f"finetune_job_unhealthy_since_timestamp_seconds{{{labels}}} 1.767" in scrape(sim, leading=True)
    assert [reason for reason, _ in sim.events].count("LossAboveStart") == 1


def test_an_attempt_is_told_how_the_earlier_ones_ended() -> None:
    sim = Simulation()
    sim.submit("tune")
    told: list[str | None] = []
    for attempt in (1, 2):
        while ("Job", f"tune-a{attempt}") not in sim.children_of or not sim.pods():
            sim.reconcile("tune")
            sim.tick()
        [trainer] = sim.children_of["Job", f"tune-a{attempt}"]["spec"]["template"]["spec"]["containers"]
        told.append(next((entry["value"] for entry in trainer["env"] if entry["name"] == ENV_ENDS), None))
        sim.exit(sim.pods()[0], 137)
    assert told[0] is None
    cause, message = json.loads(told[1] or "")["1"]
    assert cause == "Killed" and "SIGKILL" in message


def test_only_the_leader_tells_of_jobs() -> None:
    sim = Simulation()
    sim.submit("tune")
    sim.run("tune")
    assert 'finetunejob="tune"' not in scrape(sim, leading=False)
