"""Every method on a tiny Llama and GPT-2: what it trains, that it learns, and that its result is read by others."""

import functools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the trainer extra")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune_api.compatibility import COMPATIBILITY
from finetune_trainer.methods import METHODS, hooks, switched_off
from finetune_trainer.model import load_model, load_tokenizer, parameter_counts
from finetune_trainer.outcome import RunError
from tests.trainer.methods_cases import CASES, GPT2, LLAMA, ONLY_GPT2, Case, make_gpt2
from tests.trainer.tiny import make_config, make_model

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")
IDS = torch.arange(3, 35).reshape(2, 16)
PAIRS = [(name, kind) for name, case in CASES.items() for kind in ("llama", "gpt2") if kind == "llama" or case.conv1d]
PAIRS += [("bitfit", "gpt2"), ("bitfit of layer norms", "gpt2")]
STEPS = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("methods")
    make_model(root / "llama")
    make_gpt2(root / "gpt2")
    return root


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[:, -IDS.shape[1] :]


def config_of(root: Path, kind: str, method: dict[str, Any], **changes: Any) -> Any:
    return make_config(
        root, method=method, **{"model": {"uri": f"file://{root}/{kind}", "dtype": "float32"}, **changes}
    )


def prepared(root: Path, kind: str, method: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    config = config_of(root, kind, method, **changes)
    torch.manual_seed(0)
    model = load_model(root / kind, config, CPU)
    return config, METHODS[config.method.type].prepare(model, config.method, config)


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@functools.cache
def worked(root: Path, name: str, kind: str) -> dict[str, Any]:
    """Everything that is looked at, done once."""
    case = CASES.get(name) or ONLY_GPT2[name]
    found: dict[str, Any] = {"case": case, "layers": LLAMA if kind == "llama" else GPT2}
    config, model = prepared(root, kind, case.method)
    found["base"] = logits(AutoModelForCausalLM.from_pretrained(root / kind))
    found["begins"] = logits(model)
    found["count"] = parameter_counts(model)[0]
    added = hooks(model, config, STEPS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # By memory: a state dict names what layers share (VB-LoRA's bank, tied embeddings) once for each of them.
    places = {p.data_ptr() for p in trained.values()}
    found["trained"] = {name for name, value in model.state_dict().items() if value.data_ptr() in places}
    assert found["trained"] >= set(trained)
    before = snapshot(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=case.learning_rate)
    model.train()
    losses = []
    for step in range(1, STEPS + 1):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        if added.after_update is not None:
            added.after_update(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    found["losses"] = losses
    after = snapshot(model)
    found["moved"] = {name for name in after if not after[name].equal(before[name])}
    # AdaLoRA begins with E = 0, and so it stays where a rank is taken away at once.
    found["moved"] |= {name for name in trained if "lora_E" in name and not after[name].any()}
    found["logits"] = logits(model)
    found["off"] = None
    if (off := switched_off(model, config)) is not None:
        with off():
            found["off"] = logits(model)
        found["on again"] = logits(model)
        found["trained again"] = {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    out = root / f"{name}-{kind}".replace(" ", "-")
    METHODS[config.method.type].save(model, load_tokenizer(root / kind, config), out, None, config)
    found["same after saving"] = logits(model).equal(found["logits"])
    torch.manual_seed(4711)  # nothing in the file may depend on what is drawn where it is read
    if COMPATIBILITY[config.method.type].whole_model:
        again: Any = AutoModelForCausalLM.from_pretrained(out)
    else:
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / kind), out)
    found["again"] = logits(again)
    found["files"] = {path.name for path in out.iterdir()}
    if case.merge:
        METHODS[config.method.type].merge(root / kind, out, out / "merged", config)
        found["merged"] = logits(AutoModelForCausalLM.from_pretrained(out / "merged"))
    else:
        with pytest.raises(RunError, match=r"output\.merge"):
            METHODS[config.method.type].merge(root / kind, out, out / "merged", config)
    return found


def test_every_method_has_a_case() -> None:
    there = {case.method["type"] for case in (*CASES.values(), *ONLY_GPT2.values())}
    assert there | {"adapter", "mam", "unipelt", "moelora"} >= set(METHODS) - {"full", "qlora"}
    assert {name for name, row in COMPATIBILITY.items() if not row.merge} == {
        *("full", "adapter", "mam", "unipelt"),  # test_methods_own.py
        *(case.method["type"] for case in (*CASES.values(), *ONLY_GPT2.values()) if not case.merge),
    }


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_method(root: Path, name: str, kind: str) -> None:
    found = worked(root, name, kind)
    case: Case = found["case"]
    assert found["count"] == case.trained(found["layers"]), "the closed form"
    assert found["losses"][-1] < found["losses"][0] - 0.04, "it learns"
    assert found["moved"] == found["trained"], "exactly what is trained has changed"
    if case.begins_as_base:
        assert float((found["begins"] - found["base"]).abs().max()) <= 1e-5
    else:
        assert not torch.allclose(found["begins"], found["base"], atol=1e-4)
    assert float((found["logits"] - found["base"]).abs().max()) > 1e-2
    if found["off"] is None:
        assert COMPATIBILITY[case.method["type"]].whole_model or "init_lora_weights" in case.method
    else:
        assert float((found["off"] - found["base"]).abs().max()) <= 1e-5, "switched off it is its reference"
        assert found["on again"].equal(found["logits"]) and found["trained again"]
    assert found["same after saving"]
    assert float((found["again"] - found["logits"]).abs().max()) <= 1e-5, "read by plain peft or transformers"
    if case.merge:
        assert float((found["merged"] - found["logits"]).abs().max()) <= 1e-4
    assert not any(file.endswith((".bin", ".pt")) for file in found["files"])
