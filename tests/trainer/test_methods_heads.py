"""Every method on a tiny BERT and DistilBERT with a classifier's head and on a tiny T5, as on the language models of
``test_methods_each.py``: what it trains, that it learns, and that its result is read by others."""

import functools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the trainer extra")

import torch
import transformers
from peft import PeftModel

from finetune_api.compatibility import COMPATIBILITY
from finetune_trainer.data.labels import SINGLE, Labels
from finetune_trainer.methods import METHODS, hooks, load_adapter
from finetune_trainer.model import kind_of, load_model, load_tokenizer, parameter_counts
from tests.trainer import tiny_heads
from tests.trainer.methods_cases import CASES
from tests.trainer.tiny import make_config

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).reshape(2, 16)
LABELS = Labels(("no", "yes", "perhaps"), SINGLE)
STAGES = {"bert": "sequence_classification", "distilbert": "token_classification", "t5": "seq2seq"}
STEPS = 30
import os
ONLY=os.environ.get("ONLY")

@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    for family in STAGES:
        tiny_heads.make(root / family, family)
    return root


def batch(family: str) -> dict[str, Any]:
    stage = STAGES[family]
    wanted = {"sequence_classification": torch.tensor([2, 0]), "token_classification": IDS % 3, "seq2seq": IDS % 7 + 5}
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": wanted[stage]}


def logits(model: Any, family: str) -> torch.Tensor:
    inputs = batch(family)
    wanted = inputs.pop("labels")
    if family == "t5":
        inputs["decoder_input_ids"] = wanted
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found[:, -IDS.shape[1] :] if family != "bert" else found


def plain(root: Path, family: str, **more: Any) -> Any:
    torch.manual_seed(4711)
    return getattr(transformers, kind_of(STAGES[family]).auto).from_pretrained(root / family, **more)


@functools.cache
def worked(root: Path, name: str, family: str) -> dict[str, Any]:
    case = CASES[name]
    found: dict[str, Any] = {"case": case}
    config = make_config(
        root,
        stage=STAGES[family],
        method=case.method,
        model={"uri": f"file://{root}/{family}", "dtype": "float32"},
    )
    torch.manual_seed(0)
    model = load_model(root / family, config, CPU, LABELS if family != "t5" else None)
    found["base"] = logits(model, family)
    found["names"] = set(model.state_dict())
    model = METHODS[config.method.type].prepare(model, config.method, config)
    found["begins"] = logits(model, family)
    found["count"] = parameter_counts(model)[0]
    added = hooks(model, config, STEPS)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    places = {p.data_ptr() for p in trained.values()}
    found["trained"] = {n for n, value in model.state_dict().items() if value.data_ptr() in places}
    before = {n: value.detach().clone() for n, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=case.learning_rate)
    model.train()
    losses = []
    for step in range(1, STEPS + 1):
        loss = model(**batch(family)).loss
        loss.backward()
        optimizer.step()
        if added.after_update is not None:
            added.after_update(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    found["losses"] = losses
    after = model.state_dict()
    found["moved"] = {n for n in after if not after[n].equal(before[n])}
    found["moved"] |= {n for n in trained if "lora_E" in n and not after[n].any()}
    found["logits"] = logits(model, family)
    out = root / f"{name}-{family}".replace(" ", "-")
    METHODS[config.method.type].save(model, load_tokenizer(root / family, config), out, None, config)
    described = {"config": transformers.AutoConfig.from_pretrained(out)} if family != "t5" else {}
    torch.manual_seed(4711)
    if COMPATIBILITY[config.method.type].whole_model:
        again = getattr(transformers, kind_of(STAGES[family]).auto).from_pretrained(out)
    else:
        again = PeftModel.from_pretrained(plain(root, family, **described), out)
    found["again"] = logits(again, family)
    if case.merge:
        METHODS[config.method.type].merge(root / family, out, out / "merged", config)
        merged = getattr(transformers, kind_of(STAGES[family]).auto).from_pretrained(out / "merged")
        found["merged"] = logits(merged, family)
    return found

P=[(n,f) for n in CASES for f in STAGES]
@pytest.mark.parametrize(("name", "family"), P)
def test_a_method(root: Path, name: str, family: str) -> None:
    found = worked(root, name, family)
    case = found["case"]
    print(name, family, found["count"], found["losses"][0], found["losses"][-1])
    assert found["losses"][-1] < found["losses"][0] - 0.04, "it learns"
    assert found["moved"] == found["trained"], "exactly what is trained has changed"
    if case.begins_as_base:
        assert float((found["begins"] - found["base"]).abs().max()) <= 1e-5
    assert float((found["again"] - found["logits"]).abs().max()) <= 1e-5
    if case.merge:
        assert float((found["merged"] - found["logits"]).abs().max()) <= 1e-4
