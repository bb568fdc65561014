"""Every example is right, says how it is run, and those that can, run here: on a tiny model, by ``finetune run``."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from finetune_api.stages import STAGES
from finetune_operator.cli.main import main
from finetune_operator.cluster import processes
from finetune_operator.cluster.store import Folder
from tests import gate
from tests.gate import Gate
from tests.trainer import tiny_heads
from tests.trainer.judge_server import longer, serving
from tests.trainer.tiny import make_model

ROOT = Path(__file__).parents[2]
STEPS = 40
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_opens_with_the_command_that_runs_it(example: Path) -> None:
    result = CliRunner().invoke(main, ["validate", str(example)])
    assert result.exit_code == 0, result.output
    comment = example.read_text().split("apiVersion")[0]
    assert re.search(rf"^#   (finetune run|kubectl apply -f) examples/{example.name}\b", comment, re.MULTILINE)
    assert CliRunner().invoke(main, ["plan", str(example)]).exit_code == 0


def test_the_examples_are_numbered_from_one() -> None:
    assert [int(path.name[:2]) for path in EXAMPLES] == list(range(1, len(EXAMPLES) + 1))


@pytest.mark.parametrize("name", ["self_cognition", "replay"])
def test_the_rows_are_whole(name: str) -> None:
    rows = [json.loads(line) for line in (ROOT / "examples" / "data" / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) == {"self_cognition": 18, "replay": 9}[name]
    assert all(row["instruction"] and row["output"] for row in rows)
    if name == "self_cognition":
        assert all("Nova" in row["output"] and "finetune-operator" in row["output"] for row in rows)
        assert sum("\u4e00" <= char <= "\u9fff" for char in "".join(r["output"] for r in rows)) > 100


def test_the_rows_in_the_cluster_s_example_are_those_of_the_file() -> None:
    path = next(path for path in EXAMPLES if path.name.startswith("07"))
    config_map = next(o for o in yaml.safe_load_all(path.read_text()) if o["kind"] == "ConfigMap")
    rows = config_map["data"]["rows.jsonl"].splitlines()
    known = (ROOT / "examples" / "data" / "self_cognition.jsonl").read_text().splitlines()
    assert len(rows) == 9 and set(rows) <= set(known)


def test_the_job_of_the_readme_is_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    job = next(block for block in blocks if "kind: FineTuneJob" in block)
    (tmp_path / "job.yaml").write_text(job)
    result = CliRunner().invoke(main, ["validate", str(tmp_path / "job.yaml")])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


class Place:
    """A folder in which examples are run."""

    def __init__(self, home: Path, model: Path) -> None:
        self.home = home
        self.model = model
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "trainer_image")),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "FINETUNE_CACHE": str(home / "cache"),
        }

    def command(self, example: str, *options: str, output: str = "out") -> list[str]:
        """The command line; what the example downloads is replaced by the tiny model."""
        path = next(p for p in EXAMPLES if p.name.startswith(example))
        sets = ["evaluation.max_new_tokens=4", f"model.uri=file://{self.model}", *options]
        for job in yaml.safe_load_all(path.read_text()):
            name = job["metadata"]["name"]
            sets.append(f"{name}:output.uri=file://{self.home}/{output}/{name}")
            if job["spec"]["model"]["uri"].startswith("job://"):
                sets.append(f"{name}:model.uri={job['spec']['model']['uri']}")
        flags = [part for change in sets for part in (["--set", change] if "=" in change else [change])]
        state = str(self.home / f"state-{output}")
        return [sys.executable, "-m", "finetune_operator.cli.main", "run", str(path), "--state-dir", state, *flags]

    def run(self, example: str, *options: str, output: str = "out") -> str:
        """To a good end; what was said."""
        done = subprocess.run(
            self.command(example, *options, output=output), env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        # A tiny model that knows hardly a word of the rows may well learn to say nothing.
        assert "Doubtful" not in done.stdout.replace("Doubtful (EmptyAnswers)", ""), done.stdout
        return done.stdout

    def status(self, name: str, output: str = "out") -> dict[str, Any]:
        """The status of a job."""
        job = Folder(self.home / f"state-{output}" / "default" / name).job
        assert job is not None
        found: dict[str, Any] = job["status"]
        return found

    def records(self, name: str, output: str = "out") -> list[dict[str, Any]]:
        """metrics.jsonl of a job."""
        path = self.home / output / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Place:
    return Place(tmp_path, model)


@pytest.mark.trainer
def test_self_cognition_on_two_nodes(place: Place) -> None:
    told = place.run("01", "workers.replicas=2", "training.max_steps=3", "checkpoint.save_steps=2")
    folder = place.home / "out" / "self-cognition"
    for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "loss.png", "report.html"):
        assert (folder / name).exists()
    assert f"  report      {folder}/report.html" in told
    assert "  Who are you?\n    before  " in told
    status = place.status("self-cognition")
    assert status["state"] == "Succeeded"
    assert status["progress"]["step"] == 3
    assert [o["kind"] for o in status["outputs"]] == ["adapter"]
    assert [r["step"] for r in place.records("self-cognition")] == [1, 2, 3]
    logs = [place.home / "state-out/default/self-cognition/logs" / f"self-cognition-a1-{i}/trainer.log" for i in (0, 1)]
    assert all(log.stat().st_size for log in logs)


@pytest.mark.trainer
def test_full_fine_tuning_with_zero_2_on_two_nodes(place: Place) -> None:
    place.run("03", "--cpu", "workers.replicas=2", "training.max_steps=2")
    assert (place.home / "out" / "full-zero2" / "model.safetensors").exists()
    assert "loss" in place.status("full-zero2")["evaluation"]


@pytest.mark.trainer
def test_qlora_with_a_merged_model(place: Place) -> None:
    place.run("04", "--cpu", "training.max_steps=2")
    assert (place.home / "out" / "qlora" / "merged" / "model.safetensors").exists()
    assert {o["kind"] for o in place.status("qlora")["outputs"]} == {"adapter", "merged"}


@pytest.mark.trainer
def test_a_chain_of_two_jobs(place: Place) -> None:
    told = place.run("06", "training.max_steps=2")
    assert "chain-identity  waiting" in told
    first, second = place.status("chain-knowledge"), place.status("chain-identity")
    assert (first["state"], second["state"]) == ("Succeeded", "Succeeded")
    assert first["completionTime"] <= second["startTime"]


@pytest.mark.trainer
def test_judged_pairs_teach_a_reward_model_and_dpo(place: Place) -> None:
    """The judge is a real HTTP server; then the reward model tells its figures on the rows it learned from."""
    with serving(longer) as server:
        judge = json.dumps({"endpoint": server.url, "model": "judge-1"})
        told = place.run(
            "10",
            f"judged-pairs:rlaif.judge={judge}",
            "judged-pairs:rlaif.max_new_tokens=8",
            "judged-reward:training.max_steps=2",
            "judged-dpo:training.max_steps=2",
        )
    assert "judged-dpo  waiting" in told and "judged-reward  waiting" in told
    [output] = place.status("judged-pairs")["outputs"]
    assert (output["kind"], output["uri"]) == ("data", f"file://{place.home}/out/judged-pairs/preferences.jsonl")
    assert float(place.status("judged-pairs")["evaluation"]["agreement"]) == 1.0
    assert place.status("judged-pairs")["progress"]["step"] == 19 * 3
    rows = (place.home / "out" / "judged-pairs" / "preferences.jsonl").read_text().splitlines()
    for name in ("judged-reward", "judged-dpo"):
        assert place.status(name)["state"] == "Succeeded"
        manifest = json.loads((place.home / "out" / name / "manifest.json").read_text())
        assert output["uri"] in manifest["inputs"]
    command = [sys.executable, "-m", "finetune_operator.cli.main", "evaluate", "job://judged-reward", "--json", "--cpu"]
    command += ["--data", "job://judged-pairs", "--state-dir", str(place.home / "state-out")]
    done = subprocess.run(command, env=place.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"loss", "accuracy", "margin"} <= found["model"].keys()
    assert found["data"]["eval/preferences"]["rows"] == len(rows)


@pytest.mark.trainer
def test_sentiment_by_all_weights_and_by_lora(place: Place) -> None:
    """On a tiny DistilBERT and rows that follow a rule; both learn it, side by side."""
    model = tiny_heads.make(place.home / "distilbert", "distilbert", initializer_range=0.12)
    for name, count, seed in (("train", 1500, 1), ("validation", 150, 2)):
        rows = [{"sentence": row["text"], "label": row["label"]} for row in tiny_heads.opinions(count, seed)]
        tiny_heads.write_rows(place.home / f"{name}.jsonl", rows)
    options = [
        f"model.uri=file://{model}",
        f"data.train[0].uri=file://{place.home}/train.jsonl",
        f"data.eval[0].uri=file://{place.home}/validation.jsonl",
        "data.eval[0].split=train",
        "training.max_steps=80",
        "sentiment-full:training.learning_rate=2e-3",
        "sentiment-lora:training.learning_rate=1e-2",
    ]
    place.run("09", *options)
    trained = {}
    for name in ("sentiment-full", "sentiment-lora"):
        status = place.status(name)
        assert float(status["evaluation"]["accuracy"]) > 0.95, name
        page = (place.home / "out" / name / "report.html").read_text()
        assert "Confusion matrix" in page and "Training time" in page
        [words] = re.findall(r"by \w+, ([\d,.]+(?: M)?) of [\d,.]+(?: M)? parameters trained", page)
        trained[name] = int(words.replace(",", ""))
    # (q, v) x 2 layers of rank 8, and the head: pre_classifier and classifier
    assert trained["sentiment-lora"] == 4 * 8 * (64 + 64) + (64 * 64 + 64) + (64 * 2 + 2)
    assert trained["sentiment-full"] > 5 * trained["sentiment-lora"]


@pytest.mark.trainer
def test_the_sft_step_of_deepspeed_chat(place: Place) -> None:
    """A tiny OPT, rows as rm-static has them, two nodes under ZeRO-2: the perplexity falls epoch by epoch."""
    model = tiny_heads.make(place.home / "opt", "opt")
    for name, count, seed in (("train", 300, 1), ("test", 20, 2)):
        tiny_heads.write_rows(place.home / f"{name}.jsonl", tiny_heads.transcripts(count, seed))
    options = [f"model.uri=file://{model}"]
    options += [
        f"data.{kind}[0].uri=file://{place.home}/{name}.jsonl" for kind, name in (("train", "train"), ("eval", "test"))
    ]
    options += ["data.eval[0].split=train", "data.max_length=96", "model.dtype=float32"]
    options += ["training.num_train_epochs=4", "training.learning_rate=3e-3", "training.logging_steps=1000"]
    place.run("11", "--cpu", "workers.replicas=2", "evaluation.perplexity_positions=[8, 16]", *options)
    records = place.records("deepspeed-chat-sft")
    steps = 300 * 0.2 / (8 * 2)
    assert [record["step"] for record in records] == [0, *(math.ceil(steps * epoch) for epoch in (1, 2, 3, 4))]
    told = [record["eval_perplexity"] for record in records]
    assert told == sorted(told, reverse=True) and told[-1] < 0.7 * told[0]
    assert {f"eval_perplexity_to_{end}" for end in (8, 16, 96)} <= records[0].keys()
    assert "loss" not in records[0]
    assert "Perplexity by position" in (place.home / "out" / "deepspeed-chat-sft" / "report.html").read_text()


SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "stages.md").read_text(), re.M | re.S))


@pytest.mark.parametrize("stage", SECTIONS)
def test_the_examples_of_the_stages_are_valid(stage: str, tmp_path: Path) -> None:
    """Every heading of docs/stages.md is a stage, and has a block below it."""
    assert stage in STAGES
    block = re.findall(r"```yaml\n(.*?)```", SECTIONS[stage], re.DOTALL)[0]
    spec = yaml.safe_load(block) | {"output": {"uri": "file://./output"}}
    assert spec["stage"] == stage
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "x"}, "spec": spec}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    result = CliRunner().invoke(main, ["validate", str(path)])
    assert result.exit_code == 0, result.output


@pytest.mark.trainer
def test_keeping_knowledge_stopped_and_killed_ends_with_the_same_losses(place: Place) -> None:
    """Ctrl-C, then kill -9 of the command, then kill -9 of a worker: every loss is that of a run left alone."""
    options = [f"training.max_steps={STEPS}", "checkpoint.save_steps=5"]
    place.run("02", *options, output="alone")
    name = "self-cognition-keep-knowledge"
    held = Gate(place.home, "default", name)
    gated = place.environment | gate.environment(place.home, place.environment["PYTHONPATH"])
    command = place.command("02", *options, output="disturbed")
    told: list[str] = []

    def saved() -> int:
        """The newest checkpoint that was told of."""
        found = [int(step) for line in told for step in re.findall(r"Checkpoint of step (\d+)", line)]
        return max(found, default=0)

    def until_the_next_save(process: "subprocess.Popen[str]") -> None:
        before = saved()
        for line in process.stdout or ():
            told.append(line)
            if saved() > before:
                return
        raise AssertionError("".join(told))

    def started(at: int) -> "subprocess.Popen[str]":
        """It makes no more than so many steps."""
        held.hold(at)
        return subprocess.Popen(command, env=gated, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    with started(12) as process:
        until_the_next_save(process)
        process.send_signal(signal.SIGINT)
        told += process.stdout or ()
        assert process.wait() == 130, "".join(told)
    assert re.search(r"stopped at step (\d+); a checkpoint of step \1 is saved\.", told[-2])
    with started(22) as process:
        until_the_next_save(process)
        process.kill()
    with started(32) as process:
        until_the_next_save(process)
        pod = place.home / "state-disturbed" / "default" / name / "pods" / f"{name}-a3-0"
        for pid in processes.alive(str(pod)):
            os.kill(pid, signal.SIGKILL)
        held.open()
        told += process.stdout or ()
        assert process.wait() == 0, "".join(told)
    attempts = place.status(name, "disturbed")["attempts"]
    assert [a["cause"] for a in attempts] == ["Suspended", "Terminated", "Killed", "Succeeded"]
    alone, disturbed = place.records(name, "alone"), place.records(name, "disturbed")
    assert [r["step"] for r in disturbed] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in disturbed] == [r["loss"] for r in alone]
