"""``finetune data preview``: the command line starts the trainer's module, which prepares as a run does."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="needs the trainer extra")

from finetune_api.run import ENV_CACHE
from finetune_trainer.data import prepare
from finetune_trainer.data.preview import lines
from finetune_trainer.fetch import fetch
from finetune_trainer.model import load_tokenizer
from tests.trainer.tiny import ROOT, make_config, make_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("preview")
    make_model(root / "model")
    rows = [{"instruction": "say red", "output": "red"}, {"instruction": "say one two three", "output": "one two"}]
    rows += [{"instruction": "count " * 20, "output": "now " * 20}, {"instruction": "x"}]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def page(root, color, **data):
    sources = {"train": [{"uri": f"file://{root}/rows.jsonl", "weight": 2}]}
    config = make_config(root, data={"max_length": 32, "max_bad_rows": 1, **sources, **data})
    tokenizer = load_tokenizer(root / "model", config)
    return "\n".join(lines(config, prepare(config, fetch(config, root / "cache"), tokenizer), tokenizer, 2, color))


def test_it_tells_what_becomes_of_the_rows_and_marks_what_is_learned(root, monkeypatch):
    monkeypatch.setenv(ENV_CACHE, str(root / "cache"))
    text = page(root, color=False)
    assert "format alpaca, 4 rows" in text
    assert "1 cut at 32 tokens (0 answers lost, 1 cut short), 1 left out, as they are not in the format" in text
    assert "25.0% of the rows are cut; the longest has 44 tokens" in text
    assert "bad: rows.jsonl:4: output is missing" in text
    assert "        1 – 16              2  ████" in text and "       17 – 32              1  ████" in text
    assert "│ <user> say red <end> <assistant>⟦red <end>⟧" in text.replace(" ⟦", "⟦")
    assert "One epoch: 98 tokens in 6 rows, 2 steps of 4" in text
    assert "⟦" not in page(root, color=True) and "\x1b[2m<user> say red" in page(root, color=True)
    assert "Packs are filled to" in page(root, color=False, packing=True)


@pytest.mark.parametrize("what", ["a job", "rows"])
def test_the_command(root, what):
    if what == "a job":
        job = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "tiny"},
            "spec": {
                "model": {"uri": f"file://{root}/model"},
                "data": {"train": [{"uri": "file://./rows.jsonl"}], "max_bad_rows": 1},
                "output": {"uri": "file:///out"},
            },
        }
        (root / "job.yaml").write_text(json.dumps(job))
        given = [str(root / "job.yaml")]
    else:
        given = [str(root / "rows.jsonl"), "--model", str(root / "model")]  # which refuses the bad row
    result = subprocess.run(
        [sys.executable, "-m", "finetune_operator.cli.main", "data", "preview", *given, "--rows", "1"],
        env=os.environ | {"FINETUNE_CACHE": str(root / "home"), "PYTHONPATH": _path()},
        capture_output=True,
        text=True,
        check=False,
    )
    if what == "a job":
        assert result.returncode == 0, result.stderr
        assert "row 1" in result.stdout and "row 2" not in result.stdout
    else:
        assert result.returncode == 1
        assert "rows.jsonl: 1 row is not in the format 'alpaca': rows.jsonl:4: output is missing" in result.stderr


def _path():
    return os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "trainer_image"))
