"""Every method on a tiny BERT and DistilBERT with a classifier's head and on a tiny T5, as on the language models of
``test_methods_each.py``: what it trains, that it learns, and that its result is read by others."""

import functools
from collections.abc import Callable
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
from finetune_trainer.model import head_of, kind_of, load_model, load_tokenizer, parameter_counts
from finetune_trainer.outcome import RunError
from tests.trainer import tiny_heads
from tests.trainer.methods_cases import CASES, Case, ranks
from tests.trainer.tiny import make_config, make_model

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).reshape(2, 16)
LABELS = Labels(("no", "yes", "perhaps"), SINGLE)
STAGES = {"bert": "sequence_classification", "distilbert": "token_classification", "t5": "seq2seq"}
STEPS = 15

LAYER = [(64, 64)] * 4 + [(64, 128), (128, 64)]
LINEAR = {
    "bert": LAYER * 2,  # its pooler is no part of what was published, so it is trained whole
    "distilbert": LAYER * 2,
    "t5": LAYER * 2 + ([(64, 64)] * 4 + LAYER) * 2,  # two layers that encode, two that decode
}
"""(in, out) of the linear layers: query, key, value, output, and the two of the feed-forward part."""
HEAD = {"bert": (64 * 64 + 64) + (64 * 3 + 3), "distilbert": 64 * 3 + 3, "t5": 0}
"""Pooler and classifier; classifier."""
NORMS = {"bert": 5 * 2 * 64, "distilbert": 5 * 2 * 64, "t5": (2 * 2 + 2 * 3 + 2) * 64}
WHOLE = {"bert": 64 * 64 + 128 * 64 + 2 * 64, "distilbert": 64 * 64 + 128 * 64}
"""Embeddings: words, positions, and BERT's two types."""


def of_layers(family: str) -> int:
    """Weights and biases of the linear layers and of all norms."""
    bias = 0 if family == "t5" else 1
    return sum(i * o + bias * o for i, o in LINEAR[family]) + NORMS[family]


def _freeze(family: str) -> int:
    if family == "t5":  # the last layer that encodes, with two norms, and the last that decodes, with three
        return sum(i * o for i, o in LINEAR["t5"]) // 2 + 5 * 64
    return sum(i * o + o for i, o in LAYER) + 4 * 64


def _ia3(family: str) -> int:
    """Keys, values, and what goes into the last layer of the feed-forward part. PEFT takes BERT's attention output
    too, whose name ends alike."""
    decoding = 2 * (4 * 64 + 128)
    return {"bert": 2 * (3 * 64 + 128), "distilbert": 2 * (2 * 64 + 128), "t5": 2 * (2 * 64 + 128) + decoding}[family]


def _injected(kind: str) -> Callable[[str], int]:
    """d 64, bottleneck 6, 3 virtual tokens, projection over 5, rank 2."""
    adapter, trunk, prefix, lora, gate = 2 * 6 * 64 + 64 + 6, 3 * 64 + 64 * 5 + 5, 5 * 128 + 128, 2 * 2 * 128, 64 + 1

    def count(family: str) -> int:
        layers, attentions = (4, 6) if family == "t5" else (2, 2)
        norm = 64 if family == "t5" else 2 * 64
        return {
            "houlsby": (layers + attentions) * (adapter + norm),
            "pfeiffer": layers * adapter,
            "mam": layers * adapter + trunk + attentions * prefix,
            "unipelt": layers * (adapter + gate) + trunk + attentions * (prefix + lora + 2 * gate),
        }[kind]

    return count


INJECTED = {
    "houlsby": {"type": "adapter", "bottleneck_size": 6},
    "pfeiffer": {"type": "adapter", "bottleneck_size": 6, "adapter_variant": "pfeiffer"},
    "mam": {"type": "mam", "num_virtual_tokens": 3, "encoder_hidden_size": 5, "bottleneck_size": 6},
    "unipelt": {"type": "unipelt", "r": 2, "num_virtual_tokens": 3, "encoder_hidden_size": 5, "bottleneck_size": 6},
}
TASKS = {"type": "moelora", "tasks": ["one", "two"], "num_experts": 2, "r": 4, "task_embedding_dim": 8}
MORE: dict[str, Case] = {
    "full": Case({"type": "full"}, lambda _: 0, merge=False, learning_rate=1e-3),
    "bitfit": Case({"type": "bitfit"}, lambda layers: sum(out for _, out in layers) + 5 * 64, merge=False),
    "bitfit of queries": Case({"type": "bitfit", "bias_terms": ["query"]}, lambda _: 2 * 64, merge=False),
    "bitfit of feed-forward and norms": Case(
        {"type": "bitfit", "bias_terms": ["intermediate", "output", "layer_norm"]},
        lambda _: 2 * (128 + 64 + 64) + 5 * 64,
        merge=False,
    ),
    **{
        name: Case(method, lambda _: 0, begins_as_base=name in ("houlsby", "pfeiffer"), merge=False)
        for name, method in INJECTED.items()
    },
    "moelora": Case(TASKS, lambda layers: ranks(4)(layers) + 2 * 8 + 8 * 2),
}
OTHERWISE: dict[str, Callable[[str], int]] = {
    # Where a closed form is not one of the linear layers alone.
    "full": lambda family: of_layers(family) + WHOLE.get(family, 64 * 64 + 2 * 32 * 4),
    "freeze": _freeze,
    "lora in one layer": lambda family: ranks(4)(LINEAR[family]) // 2,
    "prefix_tuning": lambda family: 4 * 64 + (64 * 64 + 64) + (64 + 1) * 2 * 2 * 64,
    "p_tuning_v2": lambda family: 4 * 2 * 2 * 64,
    "ia3": _ia3,
    "ln_tuning": lambda family: NORMS[family],
    **{name: _injected(name) for name in INJECTED},
}
SLOWER = {"olora": 2e-3, "randlora": 1e-3, "pissa, rslora, patterns": 2e-3, "fourierft": 5e-3}
MILDER: dict[str, dict[str, Any]] = {"fourierft": {"scaling": 30.0}}
"""Its random beginning, as large as PEFT makes it, so unsettles a tiny T5 that rounding alone moves logits by 5e-4."""
NAMED_OTHERWISE = ("lora", "ia3", "ln_tuning", "freeze", "prompt_tuning", "p_tuning", "p_tuning by LSTM")
REFUSED = {
    ("trainable_tokens", "bert"): "TrainableTokensConfig",
    ("prefix_tuning", "distilbert"): r"takes keys and values from outside.*DistilBert.*method\.type: mam",
    ("p_tuning_v2", "distilbert"): r"takes keys and values from outside.*DistilBert.*method\.type: mam",
    **{(name, "t5"): "'bitfit' trains biases, and T5.* has none" for name in MORE if name.startswith("bitfit")},
}
"""What does not go, and what is said. trainable_tokens is refused at admission."""
PAIRS = [
    (name, family)
    for name in (*CASES, *MORE)
    for family in STAGES
    if (family != "distilbert" or name in MORE or name in NAMED_OTHERWISE) and (name, family) not in REFUSED
]


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
    return found if family == "bert" else found[:, -IDS.shape[1] :]


def loss_of(model: Any, family: str) -> torch.Tensor:
    inputs = batch(family)
    if family != "distilbert":
        found: torch.Tensor = model(**inputs).loss
        return found
    wanted = inputs.pop("labels")  # virtual tokens have none
    scores = model(**inputs).logits[:, -wanted.shape[1] :]
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten())


def plain(path: Path, family: str, **more: Any) -> Any:
    """By transformers alone; what it draws for a head that is not there is not what the run has drawn."""
    torch.manual_seed(4711)
    return getattr(transformers, kind_of(STAGES[family]).auto).from_pretrained(path, **more)


def prepared(root: Path, family: str, method: dict[str, Any]) -> tuple[Any, Any, torch.Tensor]:
    """Configuration, adapted model, and the logits of the model before."""
    model = {"uri": f"file://{root}/{family}", "dtype": "float32"}
    config = make_config(root, stage=STAGES[family], method=method, model=model)
    torch.manual_seed(0)
    base = load_model(root / family, config, CPU, LABELS if family != "t5" else None)
    before = logits(base, family)
    return config, METHODS[config.method.type].prepare(base, config.method, config), before


@functools.cache
def worked(root: Path, name: str, family: str) -> dict[str, Any]:
    """Everything that is looked at, done once."""
    case = CASES.get(name) or MORE[name]
    config, model, base = prepared(root, family, case.method | MILDER.get(name, {}))
    found: dict[str, Any] = {"case": case, "base": base, "begins": logits(model, family)}
    found["count"] = parameter_counts(model)[0]
    added = hooks(model, config, STEPS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    places = {p.data_ptr() for p in trained.values()}
    found["trained"] = {name for name, value in model.state_dict().items() if value.data_ptr() in places}
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=SLOWER.get(name, case.learning_rate))
    model.train()
    losses = []
    for step in range(1, STEPS + 1):
        loss = loss_of(model, family)
        loss.backward()
        optimizer.step()
        if added.after_update is not None:
            added.after_update(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    found["losses"] = losses
    after = model.state_dict()
    found["moved"] = {name for name in after if not after[name].equal(before[name])}
    # AdaLoRA begins with E = 0, and so it stays where a rank is taken away at once.
    found["moved"] |= {name for name in trained if "lora_E" in name and not after[name].any()}
    found["logits"] = logits(model, family)
    out = root / f"{name}-{family}".replace(" ", "-")
    out.mkdir()
    METHODS[config.method.type].save(model, load_tokenizer(root / family, config), out, None, config)
    adapter = out / "one" if name == "moelora" else out
    described = {"config": transformers.AutoConfig.from_pretrained(adapter)} if family != "t5" else {}
    if described:
        assert described["config"].id2label == dict(enumerate(LABELS.names))
    if COMPATIBILITY[config.method.type].whole_model:
        again = plain(out, family)
    elif name in INJECTED:
        again = load_adapter(plain(root / family, family, **described), out)
    else:
        again = PeftModel.from_pretrained(plain(root / family, family, **described), adapter)
    found["again"] = logits(again, family)
    if case.merge:
        METHODS[config.method.type].merge(root / family, out, out / "merged", config)
        merged = plain(out / "merged" / adapter.relative_to(out), family)
        found["merged"] = logits(merged, family)
    return found


def test_every_method_is_tried_on_every_family_or_said_to_be_refused() -> None:
    tried = {((CASES.get(name) or MORE[name]).method["type"], family) for name, family in PAIRS}
    refused = {(name, family) for name, family in REFUSED if name in METHODS}
    for family in ("bert", "t5"):
        assert {name for name, there in tried | refused if there == family} >= set(METHODS) - {"qlora"}
    assert {name for name, there in tried | refused if there == "distilbert"} >= {"full", "lora", "mam", "moelora"}


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_method(root: Path, name: str, family: str) -> None:
    found = worked(root, name, family)
    case: Case = found["case"]
    form = OTHERWISE[name](family) if name in OTHERWISE else case.trained(LINEAR[family])
    assert found["count"] == form + HEAD[family], "the closed form"
    assert found["losses"][-1] < found["losses"][0] - 0.04, "it learns"
    assert found["moved"] == found["trained"], "exactly what is trained has changed"
    if case.begins_as_base:
        assert float((found["begins"] - found["base"]).abs().max()) <= 1e-5
    assert float((found["again"] - found["logits"]).abs().max()) <= 1e-5, "read by plain peft or transformers"
    if case.merge:
        assert float((found["merged"] - found["logits"]).abs().max()) <= 1e-4


@pytest.mark.parametrize(("name", "family"), list(REFUSED))
def test_what_does_not_go_together_is_said(root: Path, name: str, family: str) -> None:
    with pytest.raises(RunError, match=REFUSED[name, family]):
        prepared(root, family, (CASES.get(name) or MORE[name]).method)


def test_the_modules_that_make_a_classifier(root: Path) -> None:
    """BERT's pooler is pretrained by BERT's own authors and by few others."""
    config = make_config(root, stage="sequence_classification", model={"uri": f"file://{root}/bert"})
    heads = {}
    for family in ("bert", "distilbert"):
        heads[family] = head_of(load_model(root / family, config, CPU, LABELS))
    assert heads == {"bert": ["classifier", "bert.pooler.dense"], "distilbert": ["pre_classifier", "classifier"]}
    trained = plain(root / "bert", "bert", id2label=dict(enumerate(LABELS.names)))
    trained.save_pretrained(root / "trained")
    again = load_model(root / "trained", config, CPU, LABELS)
    assert head_of(again) == ["classifier"]
    assert again.classifier.weight.equal(trained.classifier.weight), "training goes on from a classifier"
    other = load_model(root / "trained", config, CPU, Labels(("no", "yes"), SINGLE))
    assert other.classifier.weight.shape == (2, 64), "or for other labels, with a head of their number"
    assert other.bert.pooler.dense.weight.equal(trained.bert.pooler.dense.weight)


def test_a_language_model_as_a_classifier(root: Path) -> None:
    """It judges by the last token, which virtual tokens hide; a prefix does not."""
    make_model(root / "llama")
    model = {"uri": f"file://{root}/llama"}
    for method in ("lora", "p_tuning_v2", "prompt_tuning", "p_tuning"):
        config = make_config(root, stage="sequence_classification", method={"type": method}, model=model)
        base = load_model(root / "llama", config, CPU, LABELS)
        assert head_of(base) == ["score"]
        if method in ("lora", "p_tuning_v2"):
            adapted = METHODS[method].prepare(base, config.method, config).eval()
            alone = adapted(input_ids=IDS[:1, :9], attention_mask=torch.ones(1, 9)).logits
            ids, mask = IDS[:1].clone(), (torch.arange(16) < 9)[None].long()
            ids[:, 9:] = base.config.pad_token_id
            padded = adapted(input_ids=ids, attention_mask=mask).logits
            assert (alone - padded).abs().max().item() <= 1e-5, "padding changes nothing"
        else:
            with pytest.raises(RunError, match="judges a text by its last token"):
                METHODS[method].prepare(base, config.method, config)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_qlora_leaves_a_head_unquantised(root: Path, family: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    method = {"type": "qlora", "r": 4}
    config, model, _ = prepared(root, family, method)
    small = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    # transformers keeps T5's last layers of the feed-forward part in float32
    assert len(small) == len(LINEAR[family]) - (4 if family == "t5" else 0)
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        losses.append(loss_of(model, family))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.04
    out = root / f"qlora-{family}"
    out.mkdir()
    METHODS["qlora"].save(model, load_tokenizer(root / family, config), out, None, config)
    METHODS["qlora"].merge(root / family, out, out / "merged", config)
    assert logits(plain(out / "merged", family), family).isfinite().all()
