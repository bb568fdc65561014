"""Whole runs as a pod makes them: processes, signals, files. Every start costs its imports, so there are few."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.causes import Cause
from finetune_api.run import EXIT_STOPPED, EXIT_USER, Progress, TrainerConfig
from finetune_trainer.faults import exit_code
from finetune_trainer.fence import last_word
from finetune_trainer.storage import Store
from tests import PATIENCE, gate
from tests.gate import Gate
from tests.trainer import tiny

STEPS = 40


class Pod:
    """A started trainer whose log is read as it comes."""

    def __init__(self, root: Path, config: TrainerConfig, attempt: int = 1, processes: int = 1, **env: str) -> None:
        (root / "termination").unlink(missing_ok=True)
        environ = tiny.environment(root, config, attempt, PYTHONUNBUFFERED="1", **env)
        environ |= gate.environment(root, environ["PYTHONPATH"])
        self.process = tiny.start(environ, processes)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def log(self) -> str:
        """What it has printed."""
        return "\n".join(self.lines)

    def wait_for(self, text: str, seconds: float = PATIENCE) -> None:
        """Until a line holds this text."""
        end = time.monotonic() + seconds
        while not any(text in line for line in self.lines):
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log()}"
            assert time.monotonic() < end, f"no {text!r} in:\n{self.log()}"
            time.sleep(0.005)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code."""
        code = self.process.wait(seconds)
        self._reader.join(PATIENCE)
        return code

    def workers(self) -> list[int]:
        """Process ids of the launcher's workers, by rank."""
        found = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                rank = next((int(item[5:]) for item in environ if item.startswith(b"RANK=")), None)
                if rank is not None:
                    found.append((rank, child))
        return [child for _, child in sorted(found)]

    def close(self) -> None:
        """End everything that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its data."""
    root = tmp_path_factory.mktemp("run")
    tiny.make_model(root / "model")
    tiny.make_rows(root / "train.jsonl", 40)
    tiny.make_rows(root / "held-out.jsonl", 7, seed=1)
    return root


@pytest.fixture
def pods() -> Iterator[Any]:
    """Starts pods, and ends what is left of them."""
    started: list[Pod] = []

    def start(*arguments: Any, **options: Any) -> Pod:
        started.append(Pod(*arguments, **options))
        return started[-1]

    yield start
    for pod in started:
        pod.close()


@pytest.fixture(scope="module")
def held(root: Path) -> Gate:
    """The gate of all runs here; a test leaves it open."""
    config = tiny.make_config(root)
    return Gate(root, config.namespace, config.name)


def config_of(root: Path, folder: str, **changes: Any) -> TrainerConfig:
    """LoRA with dropout and noise, evaluation and prompts, its storage below ``root/folder``."""
    base = {
        "checkpoint_uri": f"file://{root}/{folder}/checkpoints",
        "output_uri": f"file://{root}/{folder}/output",
        "method": {"type": "lora", "r": 4, "lora_dropout": 0.1},
        "data": {"eval": [{"uri": f"file://{root}/held-out.jsonl"}]},
        "training": {"max_steps": STEPS, "neftune_noise_alpha": 5.0, "eval_steps": 10, "learning_rate": 2e-2},
        "evaluation": {"prompts": ["say red cat", "what is <b>this</b>"], "max_new_tokens": 6},
        "merge": True,
    }
    return tiny.make_config(root, **tiny.merge(base, changes))


@pytest.fixture(scope="module")
def whole(root: Path, held: Gate) -> dict[str, Any]:
    """An uninterrupted run, asked for its progress while it starts and while it steps."""
    config = config_of(root, "whole")
    port = tiny.free_port()
    held.hold(12)
    pod = Pod(root, config, FINETUNE_HTTP_PORT=str(port))
    try:
        early = watch(pod, port, lambda progress: True)
        stepping = watch(pod, port, lambda progress: progress["step"] == 12)
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE).read().decode()
        held.open()
        code = pod.wait()
    finally:
        pod.close()
    return {
        "code": code,
        "log": pod.log(),
        "early": early,
        "stepping": stepping,
        "metrics": metrics,
        "word": tiny.word(root),
        "output": root / "whole" / "output",
        "config": config,
    }


def watch(pod: Pod, port: int, enough: Any) -> dict[str, Any]:
    """The first progress that is enough."""
    while pod.process.poll() is None:
        try:
            body = urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=PATIENCE).read()
        except OSError:
            time.sleep(0.02)
            continue
        progress: dict[str, Any] = json.loads(body)
        if enough(progress):
            return progress
        time.sleep(0.01)
    raise AssertionError(pod.log())


def test_the_last_word_of_a_good_run(whole: dict[str, Any]) -> None:
    word = whole["word"]
    assert whole["code"] == 0, whole["log"]
    assert (word.cause, word.exit_code, word.step, word.max_steps) == (Cause.SUCCEEDED, 0, STEPS, STEPS)
    assert word.loss == tiny.records(whole["output"])[-1]["loss"]
    assert word.evaluation["loss"] == word.evaluation["loss/held-out"] > 0
    assert word.last_checkpoint is not None
    assert word.last_checkpoint.step == STEPS
    kept = (whole["output"].parent / "checkpoints").rglob("manifest.json")
    assert word.kept == sorted(int(manifest.parent.name.removeprefix("step-")) for manifest in kept)
    assert [(output.kind, output.uri) for output in word.outputs] == [
        ("adapter", f"file://{whole['output']}"),
        ("merged", f"file://{whole['output']}/merged"),
    ]
    folder = Store((whole["output"].parent / "checkpoints").as_uri())
    assert last_word(folder, attempt=1, run="") == word, "it is kept there, too"


def test_outputs_are_sealed_by_digests(whole: dict[str, Any]) -> None:
    import hashlib

    for output in whole["word"].outputs:
        folder = Path(output.uri.removeprefix("file://"))
        content = (folder / "manifest.json").read_bytes()
        assert output.digest == "sha256:" + hashlib.sha256(content).hexdigest()
        manifest = json.loads(content)
        assert manifest["step"] == STEPS
        assert sum(file["size"] for file in manifest["files"].values()) == output.size
        for name, file in manifest["files"].items():
            assert file["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert {"adapter_model.safetensors", "metrics.jsonl", "loss.png", "report.html"} <= manifest_names(whole["output"])


def manifest_names(folder: Path) -> set[str]:
    """The files a manifest lists."""
    return set(json.loads((folder / "manifest.json").read_text())["files"])


def test_the_result_is_what_the_libraries_read(whole: dict[str, Any], root: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(root / "model")
    adapted = PeftModel.from_pretrained(base, whole["output"]).eval()
    merged = AutoModelForCausalLM.from_pretrained(whole["output"] / "merged").eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-4)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-2)


def test_progress_is_there_from_the_start(whole: dict[str, Any]) -> None:
    early, stepping = Progress.model_validate(whole["early"]), Progress.model_validate(whole["stepping"])
    assert early.phase in ("starting", "loading")
    assert stepping.phase in ("training", "evaluating")
    assert stepping.max_steps == STEPS
    assert stepping.loss is not None
    assert stepping.eta_seconds is not None
    assert stepping.trainable_parameters == 8192
    assert stepping.checkpoints
    assert set(stepping.heartbeats) == {"0"}
    assert stepping.last_step_time.endswith("Z")


def test_metrics_have_their_names(whole: dict[str, Any]) -> None:
    label = 'finetunejob="tiny"'
    for name in (
        "finetune_train_loss",
        "finetune_train_learning_rate",
        "finetune_train_grad_norm",
        "finetune_train_step",
        "finetune_train_max_steps",
        "finetune_train_epoch",
        "finetune_train_tokens_total",
        "finetune_train_tokens_per_second",
        "finetune_train_step_seconds_bucket",
        "finetune_train_data_wait_seconds_total",
        "finetune_train_checkpoint_seconds",
        "finetune_train_checkpoint_last_timestamp_seconds",
        "finetune_train_checkpoint_failures_total",
        "finetune_train_checkpoint_bytes",
    ):
        assert f"\n{name}{{{label}" in whole["metrics"], name
    assert f'finetune_train_memory_bytes{{{label},kind="rss"}}' in whole["metrics"]
    assert f'finetune_eval_loss{{{label},source="all"}}' in whole["metrics"]
    assert f'finetune_eval_perplexity{{{label},source="held-out"}}' in whole["metrics"]
    assert f'finetune_train_heartbeat_age_seconds{{{label},rank="0"}}' in whole["metrics"]
    info = (
        f'finetune_train_info{{{label},method="lora",model="{whole["config"].model.uri}",stage="sft",world_size="1"}}'
    )
    assert info in whole["metrics"]
    assert f"finetune_train_mfu_ratio{{{label}}}" not in whole["metrics"], "nobody knows a CPU's peak"


def test_every_step_has_one_line(whole: dict[str, Any]) -> None:
    records = tiny.records(whole["output"])
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if "eval_loss" in record] == [10, 20, 30, 40]
    wanted = {
        *("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds"),
        *("data_wait_seconds", "memory", "mfu", "time"),
    }
    assert wanted == set(records[0])
    losses = [record["loss"] for record in records]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    assert sum(line.startswith("step ") for line in whole["log"].splitlines()) == STEPS


def test_the_report_tells_before_and_after(whole: dict[str, Any]) -> None:
    page = (whole["output"] / "report.html").read_text()
    assert "say red cat" in page
    assert "what is &lt;b&gt;this&lt;/b&gt;" in page
    assert "from the beginning" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (whole["output"] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_killed_and_stopped_at_any_moment_it_goes_on_exactly(
    whole: dict[str, Any], root: Path, held: Gate, pods: Any
) -> None:
    config = config_of(root, "killed")
    # From there on, that the checkpoint of step 3 is complete was waited for by the save of step 6.
    moment = random.Random().randint(7, STEPS - 20)
    held.hold(moment)
    first = pods(root, config)
    first.wait_for(f"step {moment}/{STEPS}")
    first.process.kill()
    assert first.wait() == -signal.SIGKILL
    held.hold(moment + 5)
    second = pods(root, config, attempt=2)
    second.wait_for(f"step {moment + 5}/{STEPS}")
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() == EXIT_STOPPED, second.log()
    assert "continuing from file://" in second.log()
    word = tiny.word(root)
    assert word.cause is Cause.TERMINATED
    assert word.last_checkpoint is not None
    assert word.last_checkpoint.step == word.step == moment + 6, "the step it was in is finished and saved"
    held.open()
    third = pods(root, config, attempt=3)
    assert third.wait() == 0, third.log()
    assert f"continuing from file://{root}/killed/checkpoints/step-{word.step} " in third.log()

    def figures(folder: str) -> list[Any]:
        names = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss")
        return [[record.get(name) for name in names] for record in tiny.records(root / folder / "output")]

    assert figures("killed") == figures("whole"), f"killed after step {moment}"
    page = (root / "killed" / "output" / "report.html").read_text()
    assert "without a word: it was killed" in page
    assert f"Stopped on request after step {word.step}, which is saved." in page
    assert f"from the checkpoint of step {word.step}<" in page
    before = [answer["before"] for answer in told_answers(page)]
    assert before == [answer["before"] for answer in told_answers((whole["output"] / "report.html").read_text())]


def told_answers(page: str) -> list[dict[str, str]]:
    """The answers in a report."""
    import re

    pattern = r"<h4>Before</h4><p>(.*?)</p></div><div class=after><h4>After</h4><p>(.*?)</p>"
    return [{"before": before, "after": after} for before, after in re.findall(pattern, page, re.S)]


def test_a_gang_is_killed_and_stopped(root: Path, held: Gate, pods: Any) -> None:
    config = config_of(root, "gang", merge=False)
    held.hold(8)
    first = pods(root, config, processes=2)
    first.wait_for(f"step 8/{STEPS}")
    os.kill(first.workers()[1], signal.SIGKILL)
    assert first.wait() == 128 + signal.SIGKILL
    word = tiny.word(root)
    assert (word.cause, word.exit_code, word.rank) == (Cause.KILLED, -9, 1), word
    assert "Process 1 was killed by SIGKILL" in word.message
    assert word.step >= 5, "what the other worker knew is kept"

    held.hold(10)
    second = pods(root, config, attempt=2, processes=2)
    second.wait_for("continuing from")
    second.wait_for(f"step 10/{STEPS}")
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() == EXIT_STOPPED, second.log()
    word = tiny.word(root)
    assert word.cause is Cause.TERMINATED
    assert word.exit_code == EXIT_STOPPED
    assert word.last_checkpoint is not None
    assert word.last_checkpoint.step == word.step == 11
    held.open()


@pytest.mark.parametrize(
    ("changes", "cause", "text"),
    [
        ({"model": {"uri": "file:///nowhere/model"}}, Cause.MODEL_NOT_FOUND, "/nowhere/model"),
        ({"accelerator": "gpu"}, Cause.NO_ACCELERATOR, "No GPU was found"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], cause: Cause, text: str, root: Path) -> None:
    import torch

    if cause is Cause.NO_ACCELERATOR and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (root / "termination").unlink(missing_ok=True)
    environ = tiny.environment(root, tiny.make_config(root, **changes))
    done = subprocess.run([sys.executable, "-m", "finetune_trainer.run"], env=environ, capture_output=True, text=True)
    assert done.returncode == exit_code(cause), done.stderr
    word = tiny.word(root)
    assert word.cause is cause
    assert text in word.message
    assert word.exit_code == exit_code(cause)


def test_no_configuration_is_told_at_once(tmp_path: Path) -> None:
    environ = tiny.environment(tmp_path, tiny.make_config(tmp_path))
    (tmp_path / "config.json").write_text('{"name": "x"}')
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "finetune_trainer.launch"],
        env=environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == EXIT_USER
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "finetune_api.run" in imported
    assert "torch" not in imported, "it takes seconds"
    assert tiny.word(tmp_path).cause is Cause.INVALID_CONFIGURATION
    assert "config.json" in tiny.word(tmp_path).message
