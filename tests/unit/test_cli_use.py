"""``finetune evaluate`` and ``finetune chat``: what they hand to the trainer, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run import ChatConfig, EvaluateConfig
from finetune_operator.cli.files import RefusedError
from finetune_operator.cli.use import configuration
from finetune_operator.cluster.store import Folder

ROWS = [{"uri": "s3://team/rows.jsonl", "format": "alpaca", "columns": {"question": "instruction"}}]


def made(tmp_path: Path, model: str, *, base: str = "", kind: Any = ChatConfig, **options: Any) -> Any:
    adapters = options.pop("adapters", [])
    revision, gguf = options.pop("revision", ""), options.pop("gguf_file", "")
    return configuration(kind, model, adapters, base, revision, gguf, (tmp_path, "default"), **options)


def test_paths_become_uris_and_options_are_those_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    config = made(tmp_path, "./x", base="hf://org/base", revision="v1", gguf_file="a.gguf", temperature=0)
    assert (config.model.uri, config.base.uri) == (f"file://{tmp_path}/x", "hf://org/base")
    assert (config.base.revision, config.base.gguf_file, config.model.revision) == ("v1", "a.gguf", "main")
    config = made(tmp_path, "hf://org/base", adapters=["s3://a/b", "x"], revision="v2", kind=EvaluateConfig, data=ROWS)
    assert [adapter.uri for adapter in config.model.adapters] == ["s3://a/b", f"file://{tmp_path}/x"]
    assert config.model.revision == "v2"
    assert config.data[0].columns == {"question": "instruction"}


def test_a_run_of_this_machine_is_named_by_its_job(tmp_path: Path) -> None:
    for name, state, kinds in [
        ("a", "Succeeded", ["adapter", "merged"]),
        ("b", "Running", []),
        ("c", "Succeeded", ["data"]),
    ]:
        folder = Folder(tmp_path / "default" / name)
        outputs = [{"uri": f"s3://team/{name}/{kind}", "kind": kind} for kind in kinds]
        folder.path.mkdir(parents=True)
        job = {"metadata": {"namespace": "default", "name": name}, "status": {"state": state, "outputs": outputs}}
        (folder.path / "finetunejob.json").write_text(json.dumps(job))
        assert folder.job is not None
    assert made(tmp_path, "job://a").model.uri == "s3://team/a/adapter"
    assert made(tmp_path, "job://a", base="job://a").base.uri == "s3://team/a/merged"
    rows = [{"uri": "job://c"}]
    assert made(tmp_path, "job://a", kind=EvaluateConfig, data=rows).data[0].uri == "s3://team/c/data"
    for model, told in [
        ("job://b", "it is Running"),
        ("job://d", "not run on this machine"),
        ("job://c", "wrote data"),
    ]:
        with pytest.raises(RefusedError) as refused:
            made(tmp_path, model)
        assert told in refused.value.mistakes[0]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    rows = [{"uri": "pvc://claim/rows.jsonl"}, {"uri": "s3://team/rows.jsonl", "format": "alpacca"}]
    with pytest.raises(RefusedError) as refused:
        made(tmp_path, "./nowhere", kind=EvaluateConfig, data=rows, stage="stf")
    told = "\n".join(refused.value.mistakes)
    assert "./nowhere: there is no such file or folder" in told
    assert "pvc://claim/rows.jsonl: a cluster's claims are not seen" in told
    assert "data.1.format: 'alpacca' is not accepted" in told and "stage: 'stf' is not accepted" in told
