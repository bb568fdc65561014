"""Methods: exactly the intended weights are trained, and the result is what plain peft and transformers read."""

import json

import pytest

pytest.importorskip("peft", reason="needs the trainer extra")

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.causes import Cause
from finetune_api.methods import METHODS as API_METHODS
from finetune_trainer.methods import METHODS
from finetune_trainer.model import load_model, load_tokenizer, parameter_counts
from finetune_trainer.outcome import RunError
from tests.trainer.tiny import make_config, make_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 35).reshape(2, 16)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    make_model(root / "model")
    return root


def prepared(root, method, **changes):
    """(config, model with its method)"""
    config = make_config(root, method=method, **changes)
    model = load_model(root / "model", config, CPU)
    return config, METHODS[config.method.type].prepare(model, config.method, config)


def trained(model, steps=8):
    """A few steps of AdamW, so that an adapter is not zero."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(config, model, directory, state_dict=None):
    tokenizer = load_tokenizer(directory.parent / "model", config)
    METHODS[config.method.type].save(model, tokenizer, directory, state_dict, config)


def test_every_method_of_the_api_is_here():
    assert set(METHODS) == {method.model_fields["type"].annotation.__args__[0] for method in API_METHODS}
    for module in METHODS.values():
        assert all(callable(getattr(module, name)) for name in ("prepare", "save", "merge"))


def test_full_trains_everything(root):
    _, model = prepared(root, {"type": "full"})
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert len(set(parameter_counts(model))) == 1


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_lora_trains_the_adapters_of_all_linear_layers_and_nothing_else(root, kind):
    _, model = prepared(root, {"type": kind, "r": 4})
    layers = [f"base_model.model.model.layers.{n}.self_attn.{p}" for n in (0, 1) for p in LINEAR[:4]]
    layers += [f"base_model.model.model.layers.{n}.mlp.{p}" for n in (0, 1) for p in LINEAR[4:]]
    assert trainable(model) == {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
    # r x (in + out) of each layer: hidden 64, intermediate 128, 2 of 4 key/value heads
    per_layer = 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert parameter_counts(model)[0] == 2 * per_layer


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*layers\.1\.mlp\..*_proj"], ids=["list", "expression"])
def test_target_modules(root, targets):
    _, model = prepared(root, {"type": "lora", "r": 4, "target_modules": targets})
    named = {name.split(".lora_")[0].removeprefix("base_model.model.model.") for name in trainable(model)}
    if isinstance(targets, list):
        assert named == {f"layers.{n}.self_attn.{p}" for n in (0, 1) for p in targets}
    else:
        assert named == {f"layers.1.mlp.{p}" for p in LINEAR[4:]}


def test_target_modules_that_fit_nothing_name_what_there_is(root):
    with pytest.raises(
        RunError, match=r"method\.target_modules \['query'\] does not fit.*named down_proj, gate_proj"
    ) as e:
        prepared(root, {"type": "lora", "target_modules": ["query"]})
    assert e.value.cause is Cause.INVALID_CONFIGURATION


def test_adapters_of_a_bfloat16_model_stay_float32(root):
    _, model = prepared(root, {"type": "lora"}, model={"dtype": "bfloat16"})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_gradient_checkpointing_gives_the_same_gradients(root, kind):
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        _, model = prepared(root, {"type": kind}, training={"gradient_checkpointing": on})
        model.train()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert float((gradients[0] - gradients[1]).abs().max()) <= 1e-6 * float(gradients[0].abs().max())


VARIANTS = {
    "lora": {"type": "lora", "r": 4},
    "rslora": {"type": "lora", "r": 4, "use_rslora": True, "lora_dropout": 0.1},
    "dora": {"type": "lora", "r": 4, "use_dora": True},
    "lm_head": {"type": "lora", "r": 4, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gathered", [False, True], ids=["own", "gathered"])
def test_an_adapter_is_read_by_plain_peft_with_the_same_logits(root, variant, gathered):
    config, model = prepared(root, VARIANTS[variant])
    trained(model)
    expected = logits(model)
    weights = None
    if gathered:  # as ZeRO-3 hands them over: the trainable weights by their names, while the model holds none
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.zeros_(parameter)
    out = root / f"{variant}-{gathered}"
    save(config, model, out, weights)
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    assert not torch.allclose(logits(base), expected, atol=1e-2), "the adapter does something"
    assert float((logits(PeftModel.from_pretrained(base, out)) - expected).abs().max()) <= 1e-5
    assert float((logits(AutoPeftModelForCausalLM.from_pretrained(out)) - expected).abs().max()) <= 1e-5
    assert AutoTokenizer.from_pretrained(out).chat_template
    names = {file.name for file in out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_model_gives_the_logits_of_the_adapted_one(root, variant):
    config, model = prepared(root, VARIANTS[variant])
    trained(model)
    expected = logits(model)
    save(config, model, root / f"adapter-{variant}")
    out = root / f"merged-{variant}"
    METHODS["lora"].merge(root / "model", root / f"adapter-{variant}", out, config)
    assert float((logits(AutoModelForCausalLM.from_pretrained(out)) - expected).abs().max()) <= 1e-4
    assert json.loads((out / "config.json").read_text())["use_cache"] is True
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_a_qlora_adapter_is_merged_into_an_unquantised_base(root):
    config, model = prepared(root, {"type": "qlora", "r": 4})
    trained(model)
    quantised = logits(model)
    save(config, model, root / "qlora")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "model"), root / "qlora")
    expected = logits(plain)
    assert float((quantised - expected).abs().max()) > 1e-4, "the base was in 4 bits"
    METHODS["qlora"].merge(root / "model", root / "qlora", root / "qlora-merged", config)
    merged = AutoModelForCausalLM.from_pretrained(root / "qlora-merged")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert float((logits(merged) - expected).abs().max()) <= 1e-4
    assert "quantization_config" not in json.loads((root / "qlora-merged" / "config.json").read_text())


def test_a_qlora_adapter_gives_the_same_logits_over_the_same_4_bit_base(root):
    config, model = prepared(root, {"type": "qlora", "r": 4})
    trained(model)
    expected = logits(model)
    save(config, model, root / "qlora-again")
    base = load_model(root / "model", config, CPU)
    assert float((logits(PeftModel.from_pretrained(base, root / "qlora-again")) - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("gathered", [False, True], ids=["own", "gathered"])
def test_a_fully_trained_model_is_read_by_plain_transformers_with_the_same_logits(root, gathered):
    config, model = prepared(root, {"type": "full"})
    trained(model)
    expected = logits(model)
    weights = None
    if gathered:
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    save(config, model, root / f"full-{gathered}", weights)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(root / f"full-{gathered}")), expected)


def test_tied_weights_stay_tied_when_gathered_weights_are_saved(tmp_path):
    make_model(tmp_path / "model", tied=True)
    config, model = prepared(tmp_path, {"type": "full"})
    trained(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert "lm_head.weight" not in weights
    save(config, model, tmp_path / "out", weights)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


def test_there_is_nothing_to_merge_after_full_fine_tuning(root):
    config = make_config(root, method={"type": "full"})
    with pytest.raises(RunError, match=r"output\.merge is for adapters"):
        METHODS["full"].merge(root / "model", root / "x", root / "y", config)


@pytest.mark.parametrize(
    ("uri", "name", "revision"),
    [
        ("hf://org/name", "org/name", "v1"),
        ("s3://bucket/model", "s3://bucket/model", None),
        ("file:///models/a%20b", "/models/a b", None),
    ],
)
def test_an_adapter_names_its_base_as_people_would(root, uri, name, revision):
    config = make_config(root, model={"uri": uri, "revision": "v1"})
    model = load_model(root / "model", config, CPU)
    adapted = METHODS["lora"].prepare(model, config.method, config)
    assert adapted.peft_config["default"].base_model_name_or_path == name
    assert adapted.peft_config["default"].revision == revision
