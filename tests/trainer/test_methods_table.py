"""The figures of docs/methods.md, seen here: each method once on the same small task, and its size at 8B.

What two processes show under the ZeRO stages is told by ``test_methods_resume.py``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the trainer extra")

import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from finetune_api.compatibility import COMPATIBILITY
from finetune_trainer.methods import METHODS, hooks
from finetune_trainer.model import (
    assert_packing_isolated,
    enable_gradient_checkpointing,
    load_model,
    load_tokenizer,
    parameter_counts,
)
from finetune_trainer.outcome import RunError
from tests.trainer.facts import seen, seen_of_all
from tests.trainer.methods_cases import CASES, GPT2, LLAMA, ONLY_GPT2, OWN, Case, make_gpt2, ranks
from tests.trainer.tiny import make_config, make_model

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")
IDS = torch.arange(3, 35).reshape(2, 16)
STEPS = 30
BY_TYPE: dict[str, Case] = {
    case.method["type"]: case for case in reversed([*CASES.values(), *ONLY_GPT2.values(), *OWN.values()])
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("table")
    make_model(root / "llama")
    make_gpt2(root / "gpt2")
    return root


def test_the_table_has_every_method() -> None:
    assert set(BY_TYPE) == set(COMPATIBILITY) == set(METHODS)


@pytest.mark.parametrize("name", COMPATIBILITY)
def test_a_method_on_the_small_task(root: Path, name: str, tmp_path: Path) -> None:
    case, row = BY_TYPE[name], COMPATIBILITY[name]
    kind = "gpt2" if name == "bitfit" else "llama"
    config = make_config(root, method=case.method, model={"uri": f"file://{root}/{kind}", "dtype": "float32"})
    torch.manual_seed(0)
    base = load_model(root / kind, config, CPU)
    model: Any = METHODS[name].prepare(base, config.method, config)
    trained, total = parameter_counts(model)
    assert trained == case.trained(GPT2 if kind == "gpt2" else LLAMA), "the closed form"
    losses = list(learned(model, hooks(model, config, STEPS), case.learning_rate))
    assert losses[-1] < losses[0] - 0.04
    packing = row.packing and isolated(model)
    checkpointing = row.gradient_checkpointing and recomputed(model, base)
    merged = merges(root / kind, model, config, tmp_path)
    seen(
        name,
        case=case.method,
        trained=trained,
        total=total,
        loss=[round(losses[0], 4), round(losses[-1], 4)],
        packing=packing,
        gradient_checkpointing=checkpointing,
        merge=merged,
        quantized=any(type(module).__name__ == "Linear4bit" for module in model.modules()),
    )
    expected = (row.packing, row.gradient_checkpointing, row.merge)
    assert (packing, checkpointing, merged) == expected, "the compatibility table"


def learned(model: Any, added: Any, rate: float) -> Iterator[float]:
    """The losses of a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for step in range(1, STEPS + 1):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        if added.after_update is not None:
            added.after_update(step)
        optimizer.zero_grad()
        yield loss.item()


def isolated(model: Any) -> bool:
    """Packed rows do not see each other, after training."""
    assert_packing_isolated(model)
    return True


def recomputed(model: Any, base: Any) -> bool:
    """Gradients are the same when layers are recomputed, after training."""
    gradients = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        enable_gradient_checkpointing(base)
    assert base.is_gradient_checkpointing
    return float((gradients[0] - gradients[1]).abs().max()) <= 1e-5 * float(gradients[0].abs().max())


def merges(model_path: Path, model: Any, config: Any, folder: Path) -> bool:
    """A merged model is written. That it computes the same, is shown method by method elsewhere."""
    (folder / "out").mkdir()
    METHODS[config.method.type].save(model, load_tokenizer(model_path, config), folder / "out", None, config)
    try:
        METHODS[config.method.type].merge(model_path, folder / "out", folder / "merged", config)
    except RunError:
        return False
    return any((folder / "merged").rglob("model.safetensors"))


# --- at the size of real models, on the meta device -----------------------------------------------------------------

EIGHT = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LAYERS = 32
LINEAR = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
NEEDED = {"trainable_tokens": {"token_indices": [128002]}, "moelora": {"tasks": ["first", "second"]}}
LOOKS_AT_WEIGHTS = {"boft": CASES["boft"].trained, "shira": ranks(32)}
"""Cannot be made without weights: by the closed forms that the small models show to be right."""


def counts_at_8b(name: str, layers: int) -> tuple[int, int]:
    config = make_config(Path("/"), method={"type": name, **NEEDED.get(name, {})}, data={"max_length": 1024})
    with torch.device("meta"):
        base = LlamaForCausalLM._from_config(LlamaConfig(**EIGHT, num_hidden_layers=layers), attn_implementation="sdpa")
        return parameter_counts(METHODS[name].prepare(base, config.method, config))


@pytest.mark.parametrize("name", COMPATIBILITY)
def test_how_large_a_method_is_at_8b(name: str) -> None:
    if name == "bitfit":
        return seen(name, **{"8b": None})
    if name in LOOKS_AT_WEIGHTS:
        trained, (_, base) = LOOKS_AT_WEIGHTS[name](LINEAR * LAYERS), at_all_layers("full")
        return seen(name, **{"8b": {"trained": trained, "total": base + trained}})
    trained, total = at_all_layers(name)
    return seen(name, **{"8b": {"trained": trained, "total": total}})


def at_all_layers(name: str) -> tuple[int, int]:
    """Every count grows by the same number with each layer, from the third one on (freeze takes two)."""
    few, more = counts_at_8b(name, 3), counts_at_8b(name, 4)
    trained, total = (a + (LAYERS - 3) * (b - a) for a, b in zip(few, more, strict=True))
    return trained, total


def test_linear_weights_of_8b() -> None:
    seen_of_all(linear_weights_8b=sum(i * o for i, o in LINEAR) * LAYERS)


@pytest.mark.parametrize(
    ("method", "trained", "total"),
    [
        ({"type": "prompt_tuning", "num_virtual_tokens": 8}, 8_192, 559_222_784),
        (
            {
                "type": "p_tuning",
                "num_virtual_tokens": 20,
                "encoder_reparameterization_type": "LSTM",
                "encoder_hidden_size": 128,
            },
            1_926_400,
            561_140_992,
        ),
    ],
)
def test_published_figures_of_bloomz_560m(method: dict[str, Any], trained: int, total: int) -> None:
    config = make_config(Path("/"), method=method)
    with torch.device("meta"):
        base = BloomForCausalLM(BloomConfig(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16))
        model = METHODS[config.method.type].prepare(base, config.method, config)
    assert parameter_counts(model) == (trained, total)
