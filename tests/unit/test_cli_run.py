"""``finetune run`` as a process of its own: its words, its exit codes, and what happens when it is killed."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests import PATIENCE
from tests.unit.local_runs import Bench, job
from tests.unit.test_cli_files import finetune

COMMAND = [sys.executable, "-m", "finetune_operator.cli.main", "run"]


@contextmanager
def running(bench: Bench, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """The command, until it ends."""
    process = subprocess.Popen(
        [*COMMAND, str(bench.file), "--state-dir", str(bench.state), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def lines_until(process: "subprocess.Popen[str]", word: str) -> list[str]:
    """What it says, up to the line with that word."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError(f"{word} was never said:\n{''.join(lines)}")


def rest(process: "subprocess.Popen[str]") -> str:
    """What it says to its end."""
    assert process.stdout is not None
    return process.stdout.read()


def await_the_end(pids: list[int]) -> None:
    """Processes that are not ours to wait for end."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([handle], [], [], PATIENCE)[0], f"{pid} is alive"
        os.close(handle)


def test_success_tells_where_everything_lies(bench: Bench) -> None:
    bench.write(job(bench.home))
    result = finetune("run", bench.file, "--state-dir", bench.state)
    assert result.exit_code == 0
    for told in (
        "tiny: Succeeded after",
        f"  model       {bench.output} (2.0KiB)",
        f"  report      {bench.output}/report.html",
        f"  next        finetune chat {bench.output}\n",
        f"  checkpoints {bench.output}/checkpoints (steps ",
        "    before  A model.",
        "    after   I am Nova.",
    ):
        assert told in result.output
    listed = finetune("get", "--state-dir", bench.state).output.splitlines()
    assert listed[0].split() == ["NAME", "STATE", "PROGRESS", "STEP", "LOSS", "ETA", "CHECKPOINT", "RESTARTS", "AGE"]
    assert listed[1].split()[:6] == ["tiny", "Succeeded", "100", "%", "6/6", "0.3333"]
    assert "step 6" in finetune("logs", "tiny", "--state-dir", bench.state, "-f").output
    said = finetune("suspend", "tiny", "--state-dir", bench.state).output
    assert said == "tiny has ended (Succeeded): there is nothing to stop.\n"
    assert "state: Succeeded" in finetune("status", "tiny", "--state-dir", bench.state).output
    assert finetune("delete", "tiny", "--state-dir", bench.state).output == "tiny is forgotten.\n"
    assert not (bench.state / "default" / "tiny").exists()
    assert bench.output.exists()


def test_a_doubtful_success_is_told_as_one(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.script(unhealthy={"EmptyAnswers": "2 of 2", "TooFewSteps": "3 steps"})
    result = finetune("run", bench.file, "--state-dir", bench.state)
    assert result.exit_code == 0, "the run itself went well"
    told = result.output[result.output.index("tiny: Succeeded after") :].splitlines()
    assert told[1].startswith("  Doubtful (EmptyAnswers): The model answers nothing any more (2 of 2 prompts;")
    assert "The run has 3 steps: too few to learn from." in told[1]


def test_failure_tells_why_with_the_last_lines_of_the_log(bench: Bench) -> None:
    bench.write(job(bench.home, recovery={"maxRestarts": 0}))
    bench.script(exit_at=3, reports=True)
    result = finetune("run", bench.file, "--state-dir", bench.state)
    assert result.exit_code == 1
    assert "tiny: Failed after" in result.output
    assert "recovery.maxRestarts = 0 is used up. Last: TrainerError" in result.output
    assert "    Traceback: worker 0 fails on request" in result.output
    assert f"  log         {bench.state}/default/tiny/logs/tiny-a1-0/trainer.log" in result.output
    assert f"  report      {bench.output}/report.html" in result.output
    assert "tries again from the newest checkpoint" in result.output


def test_mistakes_start_nothing(bench: Bench) -> None:
    bench.write(job(bench.home, training={"learning_rate": 0}))
    result = finetune("run", bench.file, "--state-dir", bench.state)
    assert result.exit_code == 2
    assert "spec.training.learning_rate" in result.stderr
    assert not bench.state.exists()


def test_gpus_that_are_not_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bench.write(job(bench.home, workers={"replicas": 1, "gpusPerWorker": 1}))
    result = finetune("run", bench.file, "--state-dir", bench.state)
    assert result.exit_code == 2
    assert "accepted on this machine: at most 0 (none was found)" in result.stderr
    assert finetune("run", bench.file, "--state-dir", bench.state, "--cpu").exit_code == 0


def test_ctrl_c_saves_and_the_same_command_goes_on(bench: Bench) -> None:
    bench.write(job(bench.home, workers={"replicas": 2, "gpusPerWorker": 0}))
    bench.script(hold_at=2)
    with running(bench) as process:
        lines_until(process, "step")
        process.send_signal(signal.SIGINT)
        told = rest(process)
        assert process.wait() == 130
    assert "Stopping: checkpoints are saved first." in told
    assert "tiny: stopped at step " in told and "a checkpoint of step " in told
    assert "The same command goes on from there." in told
    assert not bench.left()
    bench.script(steps=1)  # what is left to do after the checkpoint: nothing
    with running(bench) as process:
        told = rest(process)
        assert process.wait() == 0
    assert "tiny: Succeeded" in told


def test_no_guess_leads_to_what_destroys() -> None:
    for typed in ("--fres", "--refresh", "--freshh"):
        said = finetune("run", "job.yaml", typed).stderr
        assert "No such option" in said and "'--fresh'" not in said
    said = finetune("delet", "tiny").stderr
    assert "No such command" in said and "'delete'" not in said
    assert "Did you mean '--plain'?" in finetune("run", "job.yaml", "--plai").stderr


def test_going_on_may_be_asked_for(bench: Bench) -> None:
    bench.write(job(bench.home))
    assert finetune("run", bench.file, "--state-dir", bench.state, "--resume").exit_code == 0
    result = finetune("run", bench.file, "--state-dir", bench.state, "--resume", "--fresh")
    assert (result.exit_code, result.stderr) == (2, "--fresh begins at step 0, --resume goes on: accepted is one.\n")


def test_a_terminal_is_asked_before_anything_is_deleted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere nothing is deleted: see test_local_runs.py."""
    bench.write(job(bench.home))
    finetune("run", bench.file, "--state-dir", bench.state)
    master, slave = os.openpty()
    try:
        with subprocess.Popen(
            [*COMMAND, str(bench.file), "--state-dir", str(bench.state), "--fresh", "--plain"],
            stdin=slave, stdout=subprocess.PIPE, stderr=slave,
        ) as process:  # fmt: skip
            told = b""
            while b"[keep]: " not in told:
                told += os.read(master, 4096)
            assert b"tiny: an earlier run left 3 checkpoints" in told and b"(keep, delete, cancel)" in told
            os.write(master, b"cancel\n")
            assert process.wait() == 2
    finally:
        os.close(master)
        os.close(slave)
    assert (bench.output / "report.html").exists()


def test_suspended_from_another_terminal(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.script(hold_at=2)
    with running(bench) as process:
        lines_until(process, "step")
        refused = finetune("run", bench.file, "--state-dir", bench.state)
        assert refused.exit_code == 2 and "Another process runs tiny" in refused.stderr
        assert finetune("delete", "tiny", "--state-dir", bench.state).exit_code == 2
        assert finetune("suspend", "tiny", "--state-dir", bench.state).exit_code == 0
        told = rest(process)
        assert process.wait() == 1
    assert "tiny: stopped at step " in told and "The same command goes on from there." in told
    assert "spec.suspend" not in told, "the remedy of a cluster"
    said = finetune("suspend", "tiny", "--state-dir", bench.state).output
    assert said == "tiny is not running: there is nothing to stop. finetune run goes on with it.\n"


def test_kill_9_of_the_command_ends_the_pods_and_the_same_command_goes_on(bench: Bench) -> None:
    bench.write(job(bench.home, workers={"replicas": 2, "gpusPerWorker": 0}))
    bench.script(hold_at=2)
    with running(bench) as process:
        lines_until(process, "Checkpoint of step")
        deadline = time.monotonic() + PATIENCE
        while len(left := bench.left()) < 6:  # the other worker may begin a moment later
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        assert len(left) == 6
        process.kill()
        process.wait()
        await_the_end(left)
    saved = max(int(path.name.removeprefix("step-")) for path in (bench.output / "checkpoints").iterdir())
    bench.script(steps=saved + 2)
    with running(bench) as process:
        told = rest(process)
        assert process.wait() == 0
    cluster = bench.cluster()
    first, second = bench.status(cluster).attempts
    assert (first.cause, first.counted) == ("Terminated", False)
    assert first.message == "finetune run was killed; its workers ended with it."
    assert (second.cause, second.resumed_from_step) == ("Succeeded", saved)
    assert "tiny: Succeeded" in told
