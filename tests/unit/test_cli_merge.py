"""``finetune merge``: what it hands to the trainer, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from finetune_operator.cli.files import RefusedError
from finetune_operator.cli.merge import configuration
from tests.unit.test_cli_files import finetune

PLAIN: dict[str, Any] = {
    "kind": "model",
    "combination": "cat",
    "density": None,
    "rank": None,
    "modules": "",
    "dtype": "auto",
    "max_shard_size": "5GB",
    "seed": 42,
}


def test_adapters_have_weights_and_paths_become_uris(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    adapters = ["./a", "s3://team/b=0.5", "hf://org/c=-1", "file://./d=1e-1", "s3://team/x=y"]
    config = configuration("hf://org/base", "v1", adapters, "./out/", **PLAIN)
    assert [adapter.uri for adapter in config.model.adapters] == [
        f"file://{tmp_path}/a",
        "s3://team/b",
        "hf://org/c",
        f"file://{tmp_path}/d",
        "s3://team/x=y",
    ]
    assert config.weights == [1.0, 0.5, -1.0, 0.1, 1.0]
    assert (config.model.uri, config.model.revision) == ("hf://org/base", "v1")
    assert config.output_uri == f"file://{tmp_path}/out"


@pytest.mark.parametrize(("base", "gguf_file"), [("models/x.Q4.gguf", ""), ("models", "x.Q4.gguf")])
def test_a_base_in_gguf_is_named_by_its_file(
    base: str, gguf_file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configuration(base, "main", ["./a"], "./out", gguf_file, **PLAIN)
    assert (config.model.uri, config.model.gguf_file) == (f"file://{tmp_path}/models", "x.Q4.gguf")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"combination": "ties"}, "--density: accepted"),
        ({"density": 0.5}, "--density: accepted"),
        ({"rank": 4}, "--rank: accepted with a combination that decomposes"),
        ({"kind": "adapter", "modules": "mlp"}, "--modules: accepted with --as model"),
        ({"modules": "("}, "is no regular expression"),
    ],
)
def test_what_does_not_go_together_is_told(change: dict[str, Any], told: str) -> None:
    with pytest.raises(RefusedError) as refused:
        configuration("hf://org/base", "main", ["s3://team/a", "s3://team/b"], "s3://team/out", **PLAIN | change)
    assert any(told in mistake for mistake in refused.value.mistakes)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RefusedError) as refused:
        configuration("job://x", "main", ["pvc://claim/a"], "s3://team/out", **PLAIN | {"rank": 2, "density": 0.1})
    told = refused.value.mistakes
    assert len(told) == 4
    assert told[0].startswith("job://x: accepted") and told[1].startswith("pvc://claim/a: accepted")


def test_an_input_is_not_overwritten() -> None:
    with pytest.raises(RefusedError) as refused:
        configuration("s3://team/base", "main", ["s3://team/a"], "s3://team/a", **PLAIN)
    assert "would be overwritten" in refused.value.mistakes[0]


def test_what_lies_in_the_output_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_model.safetensors").write_text("days of work")
    result = finetune("merge", "--base", "hf://a/b", "--adapter", "s3://a/b", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == (
        f"--output {tmp_path}/out: it is not empty, and nothing is written over; accepted: a new or empty folder.\n"
    )
