"""The lines in every result's README.md, run as they stand in its folder, load what the run has made."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the trainer extra")

import torch

from finetune_api.run import MergeConfig
from finetune_api.spec import ModelSource
from finetune_trainer import export, merge
from finetune_trainer.card import card
from finetune_trainer.data.labels import Labels
from finetune_trainer.methods import METHODS
from finetune_trainer.model import load_model, load_tokenizer
from tests.trainer import tiny, tiny_heads

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).reshape(2, 16)
LABELS = Labels(("bad", "good", "none"), "single_label_classification")
LORA = {"type": "lora", "r": 4, "lora_alpha": 8}
FULL = {"type": "full"}
GGUF = {"gguf_file": "tiny.Q4_1.gguf"}
CASES: dict[str, dict[str, Any]] = {
    "adapter": {"method": LORA},
    "adapter over gguf": {"base": "gguf", "model": GGUF, "method": LORA},
    "model": {"method": FULL},
    "model from gguf": {"base": "gguf", "model": GGUF, "method": FULL},
    "ours": {"method": {"type": "adapter", "bottleneck_size": 6}},
    "ours over gguf": {"base": "gguf", "model": GGUF, "method": {"type": "adapter", "bottleneck_size": 6}},
    "prompt": {"method": {"type": "prompt_tuning", "num_virtual_tokens": 4}},
    "tasks": {"method": {"type": "moelora", "r": 8, "tasks": ["left", "right"]}},
    "reward": {"method": LORA, "stage": "reward"},
    "reward over gguf": {"base": "gguf", "model": GGUF, "method": LORA, "stage": "reward"},
    "classifier": {"base": "bert", "method": LORA, "stage": "sequence_classification"},
    "whole classifier": {"base": "bert", "method": FULL, "stage": "sequence_classification"},
    "tags": {"base": "bert", "method": LORA, "stage": "token_classification"},
    "translator": {"base": "t5", "method": LORA, "stage": "seq2seq"},
    "whole translator": {"base": "t5", "method": FULL, "stage": "seq2seq"},
}
MERGED = ("adapter", "adapter over gguf", "classifier", "translator", "tasks")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cards")
    tiny.make_model(root / "llama")
    tiny.make_gguf(root / "gguf" / GGUF["gguf_file"])
    for family in ("bert", "t5"):
        tiny_heads.make(root / family, family)
    return root


@pytest.fixture(autouse=True)
def _cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(root / "cache"))


def config_of(root: Path, name: str, base: str = "llama", model: dict[str, Any] | None = None, **changes: Any) -> Any:
    found = {"uri": f"file://{root}/{base}", "dtype": "float32", **(model or {})}
    return tiny.make_config(root, name=name.replace(" ", "-"), model=found, **changes)


def written(root: Path, name: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    """The result of a run in ``folder``: the configuration, and the model as it is in memory."""
    config = config_of(root, name, **changes)
    path = Path(config.model.uri.removeprefix("file://"))
    torch.manual_seed(0)
    base = load_model(path, config, CPU, LABELS if "classification" in config.stage else None)
    model = METHODS[config.method.type].prepare(base, config.method, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad and not key.endswith("bank.default"):
                p += 0.05 * torch.randn_like(p)
    export.write_weights(model, load_tokenizer(path, config), None, config, folder)
    return config, model


def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the card's code makes, run in the folder."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)  # the project's own words
    assert names["tokenizer"]("a text")["input_ids"]
    return names["model"]


def logits(model: Any) -> torch.Tensor:
    model.eval()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def far(left: Any, right: Any) -> float:
    return float((logits(left) - logits(right)).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_the_lines_of_a_card_load_the_result(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = written(root, name, tmp_path / "result", **CASES[name])
    found = loaded(tmp_path / "result", monkeypatch)
    if name == "tasks":  # what is loaded is the first task's; in memory each row has a task of its own
        assert "Each task has a folder: left, right." in (tmp_path / "result" / "README.md").read_text()
    else:
        assert far(found, model) <= 1e-5
    if name in MERGED:
        export.merge(config, root / CASES[name].get("base", "llama"), tmp_path / "result", tmp_path / "merged")
        assert far(loaded(tmp_path / "merged", monkeypatch), found) <= 1e-4


def test_adapters_below_are_merged_first(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(root, "first", tmp_path / "first", method=LORA)
    below = {"adapters": [{"uri": f"file://{tmp_path}/first"}]}
    config, _ = written(root, "second", tmp_path / "second", method=LORA, model=below)
    both = merge.merged(root / "llama", [merge.Part("first", tmp_path / "first")], config.model)
    expected = merge.merged(root / "llama", [merge.Part("second", tmp_path / "second")], config.model, base=both)
    assert far(loaded(tmp_path / "second", monkeypatch), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("base", ["llama", "gguf"])
def test_what_the_merge_command_writes_has_a_card_too(
    base: str, kind: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"base": base, "model": GGUF if base == "gguf" else {}}
    config, model = written(root, "one", tmp_path / "one", method=LORA, **more)
    source = config.model.model_dump() | {"adapters": [{"uri": f"file://{tmp_path}/one"}]}
    settings = {"model": source, "weights": [1.0], "kind": kind, "output_uri": f"file://{tmp_path}/out"}
    merge.run(MergeConfig.model_validate(settings | {"dtype": "float32"}), tmp_path)
    found = loaded(tmp_path / "out", monkeypatch)
    assert far(found, model) <= 1e-4


def test_what_plain_libraries_cannot_fetch_is_named_as_a_copy(tmp_path: Path) -> None:
    model = ModelSource.model_validate({"uri": "s3://team/base", "adapters": [{"uri": "s3://team/first"}]})
    text = card(tiny.make_config(tmp_path).model_copy(update={"model": model}), whole=False)
    assert "# ./base is your copy of s3://team/base" in text and 'from_pretrained("./base")' in text
    assert "# ./adapter-1 is your copy of s3://team/first" in text and 'from_pretrained(base, "./adapter-1")' in text


def test_what_is_doubtful_is_said_first(tmp_path: Path) -> None:
    text = card(tiny.make_config(tmp_path), whole=True, unhealthy={"LossAboveStart": "3.81 → 10.83"})
    body = text.split("# tiny\n\n", 1)[1]
    assert body.startswith("> **Doubtful.** The loss is above the one it began with (3.81 → 10.83)")
