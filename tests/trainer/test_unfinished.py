"""A run that is killed, stopped, fails, meets other rows and trains on with them: what it leaves each time."""

import html
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the trainer extra")

from finetune_api.causes import Cause
from finetune_api.run import ENV_ENDS
from finetune_trainer.run import ENV_TRACE
from tests import PATIENCE, gate
from tests.gate import Gate
from tests.trainer import tiny

pytestmark = pytest.mark.trainer

STEPS = "trace/rows-1-0.jsonl"
"""Where the process would write what each step read."""


def awaited(there: Callable[[], Any]) -> Any:
    """What it gives, as soon as it gives something."""
    end = time.monotonic() + PATIENCE
    while not (found := there()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


class Run:
    """One job over six steps of two epochs, and its attempts."""

    def __init__(self, root: Path) -> None:
        self.root, self.attempt = root, 0
        tiny.make_model(root / "model")
        tiny.make_rows(root / "train.jsonl", 12)
        config = tiny.make_config(root)
        self.gate = Gate(root, config.namespace, config.name)

    def start(self, **changes: Any) -> "Popen[str]":
        self.attempt += 1
        (self.root / "termination").unlink(missing_ok=True)
        training = {"max_steps": -1, "num_train_epochs": 2, "logging_steps": 1} | changes.pop("training", {})
        data = {"eval": [{"uri": f"file://{self.root}/train.jsonl"}]}
        config = tiny.make_config(self.root, training=training, data=data, save_steps=2, **changes)
        variables = {ENV_TRACE: str(self.root / "trace")} if (self.root / "trace").exists() else {}
        if self.attempt == 5:  # the operator knows what a killed process could not write down
            variables[ENV_ENDS] = json.dumps({"1": ["Killed", "Container trainer was killed by SIGKILL."]})
        environ = tiny.environment(self.root, config, self.attempt, **variables)
        return tiny.start(environ | gate.environment(self.root, environ["PYTHONPATH"]))

    def page(self, folder: str = "output") -> str:
        """The report in words."""
        path = self.root / folder / "report.html"
        text = re.sub(r"<[^>]*>", " ", path.read_text()) if path.exists() else ""
        return " ".join(html.unescape(text).split())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each attempt left: its report, its last word, what it printed."""
    run, found = Run(tmp_path_factory.mktemp("unfinished")), {}
    run.gate.hold(3)
    process = run.start()
    awaited(lambda: "Still running." in run.page())
    awaited((run.root / "checkpoints/step-2/manifest.json").exists)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found["killed"] = run.page(), None, sorted(path.name for path in (run.root / "output").iterdir())

    run.gate.hold(4)
    process = run.start()
    awaited(lambda: "step 4/6" in process.stdout.readline())  # type: ignore[union-attr]
    process.send_signal(signal.SIGTERM)
    found["stopped"] = (process.communicate()[0], run.page(), tiny.word(run.root))

    run.gate.open()
    (run.root / STEPS).mkdir(parents=True)  # no file can be there
    process = run.start()
    found["failed"] = process.communicate()[0], run.page(), tiny.word(run.root)

    (run.root / STEPS).rmdir()
    (run.root / "trace").rmdir()
    with (run.root / "train.jsonl").open("a") as rows:
        rows.write('{"instruction": "say one", "input": "", "output": "one"}\n')
    process = run.start()
    found["refused"] = process.communicate()[0], run.page(), tiny.word(run.root)
    process = run.start(resume="always", training={"num_train_epochs": 3})
    found["on"] = process.communicate()[0], run.page(), tiny.word(run.root)
    found["records"] = [line["step"] for line in tiny.records(run.root / "output")]
    process = run.start(resume="always", method={"type": "lora", "r": 2})
    found["other"] = process.communicate()[0], run.page(), tiny.word(run.root)
    found["root"] = run.root
    return found


def test_a_killed_run_leaves_its_report_plot_and_metrics(told: dict[str, Any]) -> None:
    page, _, files = told["killed"]
    assert files == ["loss.png", "metrics.jsonl", "report.html"]
    assert re.search(r"team/tiny Still running\. Step \d of 6 when this was written", page)
    assert "Answers before and after" not in page and "in manifest.json" not in page


def test_a_stopped_run_says_so_first_and_is_no_restart(told: dict[str, Any]) -> None:
    _, page, word = told["stopped"]
    assert word.cause is Cause.TERMINATED
    first = rf"team/tiny Stopped, not finished\. Step {word.step} of 6\. Stopped on request after step {word.step}"
    assert re.search(first, page)
    assert f"The newest checkpoint is that of step {word.step}" in page
    _, page, _ = told["on"]
    assert re.search(r"Restarts 2 ", page) and re.search(r"Stopped and continued 1 ", page)
    assert "without a word: it was killed" in told["failed"][1], "nobody told it more"
    assert "Killed: Container trainer was killed by SIGKILL." in page


def test_a_failure_is_the_first_thing_in_the_report(told: dict[str, Any]) -> None:
    _, page, word = told["failed"]
    assert word.cause is Cause.TRAINER_ERROR
    assert re.search(r"team/tiny Failed: TrainerError\. Step \d of 6\. IsADirectoryError while training", page)
    assert "No result was written by this attempt." in page


def test_other_rows_are_refused_before_anything_is_loaded_with_the_way_to_train_on(told: dict[str, Any]) -> None:
    printed, _, word = told["refused"]
    assert (word.cause, word.exit_code) == (Cause.CHECKPOINT_MISMATCH, 64)
    assert "loading the libraries" not in printed
    assert f"file://{told['root']}/train.jsonl: " in word.message
    assert "set checkpoint.resume: always" in word.message and "choose another checkpoint.uri" in word.message


def test_asked_to_it_trains_on_with_more_rows_and_epochs(told: dict[str, Any]) -> None:
    printed, page, word = told["on"]
    assert word.cause is Cause.SUCCEEDED
    assert word.max_steps == word.step == 10, "39 sequences, four at a time"
    assert told["records"] == list(range(1, 11)), "no step twice, none lost"
    assert "it was made with other rows or another configuration" in printed
    assert "training.num_train_epochs: 2.0 → 3.0" in printed
    assert re.search(rf"adapter file://{told['root']}/output ", page), "where the adapter lies"
    assert "Still running" not in page and "Failed:" not in page


def test_what_makes_the_result_doubtful_is_told_wherever_it_is_looked_at(told: dict[str, Any]) -> None:
    """The held-out rows are those that are trained on."""
    printed, page, word = told["on"]
    assert word.unhealthy == {"HeldOutRowsInTraining": "train: 13 of 13"}
    sentence = "Held-out rows stand in the training rows (train: 13 of 13)"
    assert f"doubtful: {sentence}" in printed
    assert f"Fine-tuning report team/tiny Doubtful. {sentence}" in page
    card = (told["root"] / "output" / "README.md").read_text()
    assert card.split("# tiny\n\n", 1)[1].startswith(f"> **Doubtful.** {sentence}")
    assert "Doubtful. Held-out rows stand in the training rows (train: 12 of 12)" in told["killed"][0]


def test_another_method_is_refused_whatever_is_asked(told: dict[str, Any]) -> None:
    printed, page, word = told["other"]
    assert word.cause is Cause.CHECKPOINT_MISMATCH and "loading the libraries" not in printed
    assert "method.r: 4 → 2" in word.message and "always" not in word.message
    assert page == told["on"][1], "the finished result stays as it is"
