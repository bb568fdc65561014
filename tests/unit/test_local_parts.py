"""The parts of the local cluster by themselves: translation, processes, GPUs, files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_operator.cluster import gpus, pods, processes
from finetune_operator.cluster.gpus import Gpus
from finetune_operator.cluster.store import Folder, tail


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("--node-rank=$(JOB_COMPLETION_INDEX)", "--node-rank=3"),
        ("$(A)/$(B)", "1/2"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$A ${A} $", "$A ${A} $"),
    ],
)
def test_variables_are_expanded_as_kubernetes_does(text: str, expanded: str) -> None:
    assert pods.expand(text, {"A": "1", "B": "2", "JOB_COMPLETION_INDEX": "3"}) == expanded


def place(**more: object) -> pods.Place:
    given: dict[str, object] = {
        "work": Path("/w"),
        "mounts": {"/work": Path("/w"), "/cache": Path("/home/me/cache"), "/work/deep": Path("/d")},
        "termination": Path("/t"),
        "ports": {29500: 20001, 9400: 20002},
        "hosts": {"x-a1-0.x-workers": "127.0.0.1"},
        **more,
    }
    return pods.Place(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "here"),
    [
        ("/cache", "/home/me/cache"),
        ("/cache/huggingface", "/home/me/cache/huggingface"),
        ("/work/deep/x", "/d/x"),
        ("/workshop", "/workshop"),
        ("file:///cache/x", "file:///home/me/cache/x"),
        ("/dev/termination-log", "/t"),
        ("--master-addr=x-a1-0.x-workers", "--master-addr=127.0.0.1"),
        ("--master-port=29500", "--master-port=20001"),
        ("29500", "29500"),
    ],
)
def test_names_of_the_container_become_those_of_this_machine(text: str, here: str) -> None:
    assert pods.translate(text, place()) == here


def test_the_environment_is_the_users_with_the_manifest_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/tmp")
    container = {
        "name": "trainer",
        "env": [
            {"name": "HOME", "value": "/work"},
            {"name": "FINETUNE_HTTP_PORT", "value": "9400"},
            {"name": "NCCL_DEBUG", "value": "INFO"},
            {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        ],
    }
    outer = {
        "HOME": "/home/me",
        "SECRET": "mine",
        "NCCL_DEBUG": "WARN",
        "PYTHONPATH": "crds:/abs",
        "OMP_NUM_THREADS": "7",
    }
    found = pods.environment(container, place(gpus=("2", "3"), variables={"OMP_NUM_THREADS": "1", "B": "2"}), outer)
    assert found["HOME"] == "/home/me"
    assert found["SECRET"] == "mine"
    assert found["NCCL_DEBUG"] == "INFO"
    assert found["FINETUNE_HTTP_PORT"] == "20002"
    assert found["PYTHONPATH"] == "/tmp/crds:/abs"
    assert (found["OMP_NUM_THREADS"], found["B"]) == ("7", "2")
    assert found["CUDA_VISIBLE_DEVICES"] == "2,3"


def start(tmp_path: Path, script: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, processes.MARK: str(tmp_path / "pod")}
    return processes.start(["bash", "-c", script], environment, tmp_path, tmp_path / "log")


def test_a_container_ends_with_its_command_and_reports_its_code(tmp_path: Path) -> None:
    process = start(tmp_path, "setsid sleep 1000 & exit 3")
    assert process.wait() == 3
    assert not processes.alive(str(tmp_path))


def test_a_process_in_the_middle_of_an_exec_is_not_missed(tmp_path: Path) -> None:
    for number in range(25):  # a program that becomes another one just as its container ends
        pod = tmp_path / str(number)
        pod.mkdir()
        assert start(pod, "setsid sleep 1000 & exit 3").wait() == 3
    assert not processes.alive(str(tmp_path))


def test_a_process_without_an_environment_belongs_to_no_pod() -> None:
    bare = subprocess.Popen(["sleep", "1000"], env={})
    assert not processes._has(bare.pid, "/") and not processes._has_one(Path("/proc") / str(bare.pid))
    bare.kill()
    bare.wait()


def test_a_container_reports_signals_as_a_kubelet_does(tmp_path: Path) -> None:
    assert start(tmp_path, "kill -SEGV $$").wait() == 139


def test_sigterm_reaches_the_command_only(tmp_path: Path) -> None:
    process = start(tmp_path, "trap 'echo told; exit 75' TERM; echo ready > ready; while :; do sleep 0.02; done")
    while not (tmp_path / "ready").exists():
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert tail(tmp_path / "log", 1) == ["told"]


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    process = processes.start(["/nowhere"], {**os.environ, processes.MARK: "x"}, tmp_path, tmp_path / "log")
    assert process.wait() == 127
    assert "cannot start /nowhere" in tail(tmp_path / "log", 1)[0]


def test_the_end_of_one_pod_leaves_the_others(tmp_path: Path) -> None:
    environment = {**os.environ, processes.MARK: str(tmp_path / "pod-1")}
    other = subprocess.Popen(["sleep", "1000"], env={**os.environ, processes.MARK: str(tmp_path / "pod-10")})
    process = processes.start(["sleep", "1000"], environment, tmp_path, tmp_path / "log")
    processes.end(str(tmp_path / "pod-1"), process)
    assert process.wait() == -signal.SIGKILL
    assert other.poll() is None
    processes.end(str(tmp_path))
    assert other.wait() == -signal.SIGKILL


def test_ports_are_free_and_differ() -> None:
    first = processes.free_port()
    assert processes.free_port([first]) != first


def test_a_gpu_is_one_users_at_a_time(tmp_path: Path) -> None:
    mine, theirs = Gpus(["0", "1", "2"], tmp_path), Gpus(["0", "1", "2"], tmp_path)
    assert mine.take(2) == ["0", "1"]
    assert theirs.take(2) is None
    assert theirs.take(1) == ["2"]
    assert mine.take(0) == []
    mine.give(["0", "1"])
    assert theirs.take(2) == ["0", "1"]


def test_a_gpu_is_free_again_when_its_user_is_killed(tmp_path: Path) -> None:
    holder = (
        "import sys; from pathlib import Path; from finetune_operator.cluster.gpus import Gpus\n"
        f"g = Gpus(['0'], Path({str(tmp_path)!r})); print(g.take(1), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"['0']\n"
        assert Gpus(["0"], tmp_path).take(1) is None
        process.kill()
    assert Gpus(["0"], tmp_path).take(1) == ["0"]


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [(None, ("0", "1")), ("1", ("1",)), ("1,0", ("1", "0")), ("GPU-b", ("1",)), ("0,7,1", ("0",)), ("", ())],
)
def test_only_visible_gpus_count(monkeypatch: pytest.MonkeyPatch, chosen: str | None, seen: tuple[str, ...]) -> None:
    monkeypatch.setattr(gpus, "_there", lambda: [("0", "GPU-a"), ("1", "GPU-b")])
    if chosen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpus.visible() == seen


def test_the_tail_of_a_log_shows_what_a_terminal_would(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\n 1%\r 50%\r100%\nlast\n")
    assert tail(log, 2) == ["100%", "last"]
    assert tail(tmp_path / "nothing", 2) == []


def test_a_job_is_claimed_once(tmp_path: Path) -> None:
    first, second = Folder(tmp_path / "x"), Folder(tmp_path / "x")
    assert first.claim() and first.claim()
    assert not second.claim()
    first.release()
    assert second.claim()
