"""The methods that no library brings: adapter, mam, unipelt and moelora.

Against the papers' equations computed by hand, on the architectures of the table, and in whole runs that crash.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the trainer extra")

import torch
import transformers
from peft import PeftModel
from torch.nn.functional import layer_norm, linear
from transformers import AutoModelForCausalLM

from finetune_api.causes import Cause
from finetune_api.methods import BottleneckAdapter, Mam, Unipelt
from finetune_trainer import data
from finetune_trainer.data import collate
from finetune_trainer.data.stream import Item, Sequence
from finetune_trainer.fetch import fetch
from finetune_trainer.methods import METHODS, load_adapter, parts
from finetune_trainer.methods.places import FAMILIES
from finetune_trainer.methods.unipelt import figures
from finetune_trainer.model import load_model, load_tokenizer, parameter_counts
from finetune_trainer.outcome import RunError
from tests.trainer import test_resume as runs
from tests.trainer import tiny

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")
IDS = torch.arange(4, 36).reshape(2, 16)
WANTED = IDS % 2 + 5
TASKS = ("first", "second", "third")

HOULSBY = {"type": "adapter", "bottleneck_size": 6, "non_linearity": "gelu"}
PFEIFFER = HOULSBY | {"adapter_variant": "pfeiffer"}
PARALLEL = HOULSBY | {"adapter_variant": "parallel", "scaling": 4.0}
MAM = {"type": "mam", "num_virtual_tokens": 3, "encoder_hidden_size": 5, "bottleneck_size": 6, "non_linearity": "gelu"}
UNIPELT = MAM | {"type": "unipelt", "r": 2}
MOELORA = {"type": "moelora", "tasks": list(TASKS), "num_experts": 2, "r": 4, "task_embedding_dim": 8}
INJECTED = {
    "houlsby": HOULSBY,
    "pfeiffer": PFEIFFER,
    "parallel": PARALLEL,
    "mam": MAM,
    "mam, flat": MAM | {"prefix_projection": False},
    "unipelt": UNIPELT,
}
CLASSES = {"adapter": BottleneckAdapter, "mam": Mam, "unipelt": Unipelt}


def of_words(**config: Any) -> dict[str, Any]:
    return {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **config}


_HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _HEADS | {"intermediate_size": 64, "num_key_value_heads": 2}
_BERT = _HEADS | {"intermediate_size": 64, "max_position_embeddings": 64}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART: dict[str, Any] = {"d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2}
for _side in ("encoder", "decoder"):
    _BART |= {f"{_side}_layers": 2, f"{_side}_ffn_dim": 64, f"{_side}_attention_heads": 4}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralForCausalLM", _LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", _LLAMA | {"head_dim": 16}),
    "smollm3": ("SmolLM3ForCausalLM", _LLAMA),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (
        "OPTForCausalLM",
        _HEADS | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    "bert": ("BertForMaskedLM", _BERT),
    "roberta": ("RobertaForMaskedLM", _BERT),
    "distilbert": ("DistilBertForMaskedLM", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "t5": ("T5ForConditionalGeneration", _T5),
    "mt5": ("MT5ForConditionalGeneration", _T5),
    "bart": ("BartForConditionalGeneration", _BART),
    "mbart": ("MBartForConditionalGeneration", _BART),
}
CAUSAL = ("llama", "qwen3", "gpt2", "opt")


def new_model(family: str, **changes: Any) -> Any:
    """A tiny model, the same for every call."""
    name, shape = SHAPES[family]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = model_class.config_class(**of_words(**shape | changes))
    return model_class._from_config(config, attn_implementation="sdpa").eval()


def settings(method: dict[str, Any]) -> Any:
    return CLASSES[method["type"]].model_validate(method)


def adapted(family: str, method: dict[str, Any], **changes: Any) -> Any:
    model = new_model(family, **changes)
    torch.manual_seed(1)
    METHODS[method["type"]].inject(model, settings(method))
    return model


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    model.eval()
    inputs = {"input_ids": IDS, **inputs}
    if "decoder_start_token_id" in vars(model.config) and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :6]
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def shaken(model: Any, amount: float = 0.2) -> Any:
    """Every trained weight away from zero, so that every part shows."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn_like(parameter)
    return model


def far(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


# --- what is added --------------------------------------------------------------------------------------------------


def test_the_table_is_tried_on_every_architecture_it_names() -> None:
    assert set(SHAPES) == set(FAMILIES)


@pytest.mark.parametrize("family", SHAPES)
def test_an_adapted_model_begins_as_the_model_it_was(family: str) -> None:
    expected = logits(new_model(family))
    for method in (HOULSBY, PFEIFFER, PARALLEL):
        assert torch.equal(logits(adapted(family, method)), expected)
    near = far(logits(adapted(family, HOULSBY | {"adapter_init": "houlsby"})), expected)
    assert 0 < near < 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("method", [PFEIFFER, PARALLEL, MAM, UNIPELT], ids=["pfeiffer", "parallel", "mam", "unipelt"])
def test_switched_off_it_is_the_model_it_was(family: str, method: dict[str, Any]) -> None:
    expected = logits(new_model(family))
    model = shaken(adapted(family, method))
    on = logits(model)
    with parts.switched_off(model):
        assert far(logits(model), expected) < 1e-5
    assert torch.equal(logits(model), on) and far(on, expected) > 1e-3


@pytest.mark.parametrize("family", SHAPES)
def test_every_part_reaches_the_result_and_nothing_else_is_trained(family: str) -> None:
    original = new_model(family)
    names = {name for name, _ in original.named_parameters()}
    for method in INJECTED.values():
        model = adapted(family, method)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained & names == ({name for name in names if is_layer_norm(name)} if method == HOULSBY else set())
        shaken(model).train()
        inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        (model(input_ids=IDS, **inputs).logits ** 2).sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in trained), name
            assert parameter.grad is None or parameter.grad.abs().max() > 0, name
        for name, parameter in original.named_parameters():
            assert name in trained or torch.equal(parameter, model.get_parameter(name))


def is_layer_norm(name: str) -> bool:
    """A norm of a repeated layer."""
    inside = any(part in name for part in ("layers.", ".h.", "encoder.layer.", "transformer.layer.", ".block."))
    return inside and any(part in name for part in ("layernorm", "LayerNorm", "ln_1", "ln_2", "layer_norm"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "distilbert"])
def test_the_number_of_trained_weights_is_the_closed_form(family: str) -> None:
    d, m, layers, length, hidden, r = 32, 6, 2, 3, 5, 2
    kv = 16 if family == "llama" else 32  # 2 of 4 heads
    adapter, norm = 2 * m * d + d + m, d if family == "llama" else 2 * d
    prefixes = length * d + d * hidden + hidden + layers * (hidden * 2 * kv + 2 * kv)
    expected = {
        "houlsby": layers * (2 * adapter + 2 * norm),
        "pfeiffer": layers * adapter,
        "parallel": layers * adapter,
        "mam": layers * adapter + prefixes,
        "mam, flat": layers * (adapter + length * 2 * kv),
        # LoRA of query (d → d) and value (d → kv), and three gates
        "unipelt": layers * (adapter + r * (d + d) + r * (d + kv) + 3 * (d + 1)) + prefixes,
    }
    for name, method in INJECTED.items():
        assert parameter_counts(adapted(family, method))[0] == expected[name], name


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**of_words(**_HEADS | {"intermediate_size": 64}))
    )
    for kind, method in (("adapter", HOULSBY), ("mam", MAM), ("unipelt", UNIPELT)):
        with pytest.raises(RunError, match=r"'gpt_neox' .*accepted: llama, mistral.*method\.type: lora") as error:
            METHODS[kind].inject(model, settings(method))
        assert error.value.cause is Cause.INVALID_CONFIGURATION


def test_a_prefix_without_its_attention_is_refused() -> None:
    model = new_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(RunError, match="a prefix needs scaled-dot-product attention"):
        METHODS["mam"].inject(model, settings(MAM))


@pytest.mark.parametrize("name", INJECTED)
def test_a_copy_of_an_adapted_model_has_parts_of_its_own(name: str) -> None:
    model = shaken(adapted("llama", INJECTED[name]))
    expected, copied = logits(model), copy.deepcopy(model)
    shaken(model)
    assert torch.equal(logits(copied), expected)
    assert far(logits(model), expected) > 1e-3


# --- the papers' equations, by hand ---------------------------------------------------------------------------------


def weights_of(layer: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().double() for name, parameter in layer.named_parameters()}


def bottleneck(w: dict[str, torch.Tensor], at: str, x: torch.Tensor) -> torch.Tensor:
    inner = torch.relu(linear(x, w[f"{at}.down.weight"], w[f"{at}.down.bias"]))
    return linear(inner, w[f"{at}.up.weight"], w[f"{at}.up.bias"])


def gated(w: dict[str, torch.Tensor], at: str, x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(linear(x, w[f"{at}.project.weight"], w[f"{at}.project.bias"]))


def by_hand(w: dict[str, torch.Tensor], h: torch.Tensor, kind: str, prefix: Any = None) -> torch.Tensor:
    """An OPT layer (pre-norm, 4 heads of 8) over h (T, 32) with what the papers add to it, one token at a time."""
    x = layer_norm(h, (32,), w["self_attn_layer_norm.weight"], w["self_attn_layer_norm.bias"])
    q, k, v = (linear(x, w[f"self_attn.{n}_proj.weight"], w[f"self_attn.{n}_proj.bias"]) for n in "qkv")
    ones = torch.ones(len(h), 1, dtype=h.dtype)
    g_prefix = ones
    if kind == "unipelt":
        g_lora, g_prefix = gated(w, "self_attn.lora_gate", x), gated(w, "self_attn.prefix.gate", x)
        a, b = "lora_A.weight", "lora_B.weight"
        q = q + g_lora * (x @ w[f"self_attn.q_proj.query_update.{a}"].T @ w[f"self_attn.q_proj.query_update.{b}"].T)
        v = v + g_lora * (x @ w[f"self_attn.v_proj.value_update.{a}"].T @ w[f"self_attn.v_proj.value_update.{b}"].T)
    rows = []
    for t in range(len(h)):
        heads = []
        for n in range(4):
            part = slice(8 * n, 8 * n + 8)
            keys, values = k[: t + 1, part], v[: t + 1, part]
            if prefix is not None:
                p_k, p_v = prefix[0][:, part], prefix[1][:, part]  # (3, 8) each
                keys, values = torch.cat([g_prefix[t] * p_k, keys]), torch.cat([g_prefix[t] * p_v, values])
            heads.append(torch.softmax(keys @ q[t, part] / math.sqrt(8), 0) @ values)
        rows.append(torch.cat(heads))
    out = linear(torch.stack(rows), w["self_attn.out_proj.weight"], w["self_attn.out_proj.bias"])
    if kind == "houlsby":
        out = out + bottleneck(w, "self_attn.out_proj.adapter", out)
    h = h + out
    x = layer_norm(h, (32,), w["final_layer_norm.weight"], w["final_layer_norm.bias"])
    f = linear(torch.relu(linear(x, w["fc1.weight"], w["fc1.bias"])), w["fc2.weight"], w["fc2.bias"])
    if kind in ("houlsby", "pfeiffer"):
        f = f + bottleneck(w, "fc2.adapter", f)
    elif kind in ("parallel", "mam"):
        f = f + 4.0 * bottleneck(w, "fc2.adapter", x)
    elif kind == "unipelt":
        f = f + gated(w, "fc2.adapter.gate", f) * bottleneck(w, "fc2.adapter", f)
    return h + f


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel", "mam", "unipelt"])
def test_a_layer_computes_the_equations_of_its_paper(kind: str) -> None:
    method = INJECTED[kind] | {"non_linearity": "relu"}
    model = shaken(adapted("opt", method)).double()
    layer = model.model.decoder.layers[0]
    h = torch.randn(1, 7, 32, dtype=torch.float64)
    prefix = None
    if kind in ("mam", "unipelt"):
        trunk = weights_of(model.model.prefix_trunk)
        own = weights_of(layer.self_attn.prefix)
        hidden = torch.tanh(linear(trunk["embedding"], trunk["project.weight"], trunk["project.bias"]))
        prefix = linear(hidden, own["project.weight"], own["project.bias"]).split(32, -1)  # P_K, P_V: (3, 32)
    with torch.no_grad():
        expected = by_hand(weights_of(layer), h[0], kind, prefix)
        assert far(layer(h, attention_mask=None)[0], expected) < 1e-12
        assert far(by_hand(weights_of(layer), h[0], ""), expected) > 1e-2, "the parts show"


def test_houlsby_stands_in_a_bert_layer_where_the_paper_draws_it() -> None:
    model = shaken(adapted("bert", HOULSBY | {"non_linearity": "relu"})).double()
    layer = model.bert.encoder.layer[0]
    w, h = weights_of(layer), torch.randn(1, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        found = layer(h)
        attention = layer.attention.self(h)[0]
        a = linear(attention, w["attention.output.dense.weight"], w["attention.output.dense.bias"])
        a = a + bottleneck(w, "attention.output.dropout.adapter", a)
        norm = "attention.output.LayerNorm"
        h = layer_norm(a + h, (32,), w[f"{norm}.weight"], w[f"{norm}.bias"], eps=1e-12)
        f = torch.nn.functional.gelu(linear(h, w["intermediate.dense.weight"], w["intermediate.dense.bias"]))
        f = linear(f, w["output.dense.weight"], w["output.dense.bias"])
        f = f + bottleneck(w, "output.dropout.adapter", f)
        expected = layer_norm(f + h, (32,), w["output.LayerNorm.weight"], w["output.LayerNorm.bias"], eps=1e-12)
    assert far(found, expected) < 1e-12


# --- prefixes and everything that passes through attention -----------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("name", ["houlsby", "mam", "unipelt"])
def test_packed_documents_see_the_prefix_and_not_each_other(family: str, name: str) -> None:
    model = shaken(adapted(family, INJECTED[name]))
    apart = torch.cat([logits(model, input_ids=IDS[:1]), logits(model, input_ids=IDS[1:, :11])], 1)
    packed = torch.cat([IDS[:1], IDS[1:, :11]], 1)
    positions = torch.cat([torch.arange(16), torch.arange(11)])[None]
    model.config.use_cache = False
    assert far(logits(model, input_ids=packed, position_ids=positions), apart) < 1e-5


@pytest.mark.parametrize("family", [*CAUSAL, "mistral", "bert", "distilbert"])
@pytest.mark.parametrize("name", ["mam", "unipelt"])
def test_padding_changes_nothing(family: str, name: str) -> None:
    model = shaken(adapted(family, INJECTED[name]))
    short = logits(model, input_ids=IDS[:1, :9])
    mask = (torch.arange(16) < 9).long()[None]
    assert far(logits(model, input_ids=IDS[:1], attention_mask=mask)[:, :9], short) < 1e-5


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("name", INJECTED)
def test_a_token_after_the_other_gives_what_all_at_once_give(family: str, name: str) -> None:
    model = shaken(adapted(family, INJECTED[name]))
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    said = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=True, eos_token_id=None, **options)
    at_once = logits(model, input_ids=said.sequences)[:, 15:-1]
    assert far(torch.stack(said.logits, 1), at_once) < 1e-4


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("name", INJECTED)
def test_gradient_checkpointing_gives_the_same_gradients(family: str, name: str) -> None:
    model = shaken(adapted(family, INJECTED[name])).train()
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert far(*gradients) <= 1e-6 * float(gradients[0].abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", INJECTED)
def test_new_weights_are_float32_beside_a_bfloat16_model(family: str, name: str) -> None:
    exact = logits(shaken(adapted(family, INJECTED[name]), 0.02))
    model = new_model(family).bfloat16()
    torch.manual_seed(1)
    METHODS[INJECTED[name]["type"]].inject(model, settings(INJECTED[name]))
    shaken(model, 0.02)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = logits(model)
        assert found.dtype == torch.bfloat16
        assert far(found.float(), exact) < 0.05 * float(exact.abs().max())


def test_gates_are_told_as_their_mean_over_the_tokens() -> None:
    model = shaken(adapted("llama", UNIPELT)).train()
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, parts.Gate):
            module.register_forward_hook(
                lambda m, i, output, name=name: seen.__setitem__(name, round(float(output.detach().mean()), 6))
            )
    model(input_ids=IDS)
    told = figures(model)
    places = {"adapter": "mlp.adapter.gate", "prefix": "self_attn.prefix.gate", "lora": "self_attn.lora_gate"}
    for kind, place in places.items():
        layers = [seen[f"model.layers.{number}.{place}"] for number in range(2)]
        assert [told[f"gate_{kind}/{number}"] for number in range(2)] == layers
        assert told[f"gate_{kind}"] == pytest.approx(sum(layers) / 2, abs=1e-6)
    assert len(told) == 9
    logits(model, input_ids=IDS[:, :3])
    assert figures(model) == told, "only training counts"


# --- training, writing, reading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    tiny.make_model(root / "model")
    tiny.make_rows(root / "train.jsonl", 40, tasks=TASKS)
    tiny.make_rows(root / "held-out.jsonl", 7, seed=1, tasks=TASKS)
    return root


class NoTokenizer:
    """For families without a tokenizer here."""

    def save_pretrained(self, directory: Path) -> None: ...


def trained(model: Any, steps: int = 30, **inputs: Any) -> tuple[float, float]:
    """The loss before and after a few steps of AdamW."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    if model.config.is_encoder_decoder is not True:
        inputs = {"use_cache": False, **inputs}
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=WANTED, **inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def with_words(model: Any) -> Any:
    """The model with an output layer that can tell words apart, as a trained one can."""
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(generator=torch.Generator().manual_seed(4))
    return model


@pytest.mark.parametrize("family", [*CAUSAL, "bert", "distilbert", "t5"])
@pytest.mark.parametrize("name", INJECTED)
def test_it_learns_and_is_read_back_with_the_same_logits(root: Path, family: str, name: str) -> None:
    original = with_words(new_model(family))
    model = with_words(adapted(family, INJECTED[name]))
    before, after = trained(model)
    assert after < 0.6 * before
    moving = {n for n, p in model.named_parameters() if p.requires_grad}
    for parameter, tensor in original.named_parameters():
        assert torch.equal(model.get_parameter(parameter), tensor) == (parameter not in moving), parameter
    expected = logits(model)
    directory = root / f"{family}-{name}"
    directory.mkdir()
    config = tiny.make_config(root, method=INJECTED[name])
    gathered = None
    if family == "llama":  # as ZeRO-3 hands them over
        gathered = {n: model.get_parameter(n).detach().clone() for n in moving}
        shaken(model)
    METHODS[config.method.type].save(model, NoTokenizer(), directory, gathered, config)
    assert sorted(file.name for file in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert far(logits(load_adapter(original, directory)), expected) < 1e-5 * max(1.0, float(expected.abs().max()))


def test_an_adapter_is_not_read_into_another_model(root: Path) -> None:
    directory = root / "of-llama"
    directory.mkdir()
    config = tiny.make_config(root, method=PFEIFFER)
    METHODS["adapter"].save(adapted("llama", PFEIFFER), NoTokenizer(), directory, None, config)
    with pytest.raises(RunError, match=r"16 of its weights differ .* Load it into the model"):
        load_adapter(new_model("gpt2"), directory)


@pytest.mark.parametrize("name", INJECTED)
def test_what_is_not_linear_is_not_merged(root: Path, name: str) -> None:
    config = tiny.make_config(root, method=INJECTED[name])
    with pytest.raises(RunError, match=r"output\.merge does not go with method\.type '(adapter|mam|unipelt)'"):
        METHODS[config.method.type].merge(root / "model", root / "x", root / "y", config)


# --- MOELoRA --------------------------------------------------------------------------------------------------------


def experts(root: Path, **changes: Any) -> tuple[Any, Any]:
    config = tiny.make_config(root, method=MOELORA | changes)
    model = load_model(root / "model", config, CPU)
    torch.manual_seed(1)
    return config, METHODS["moelora"].prepare(model, config.method, config)


def of_task(number: int) -> torch.Tensor:
    return torch.full_like(IDS, number)


def test_moelora_begins_as_the_model_it_was_and_trains_the_closed_form(root: Path) -> None:
    _, model = experts(root)
    base = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    assert torch.equal(logits(model, tasks=of_task(1)), logits(base))
    linears = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3
    assert parameter_counts(model)[0] == 2 * 4 * linears + 3 * 8 + 2 * 8
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("task_gate.") for name in names)


def test_moelora_computes_the_equation_of_its_paper(root: Path) -> None:
    _, model = experts(root)
    shaken(model).double()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    found: list[Any] = []
    layer.register_forward_hook(lambda module, inputs, output: found.append((inputs[0], output)))
    logits(model, tasks=torch.cat([of_task(0)[:1], of_task(2)[:1]]))
    x, y = found[0]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    embedding, project = model.task_gate.embedding.weight.detach(), model.task_gate.project.weight.detach()
    for row, task in ((0, 0), (1, 2)):
        omega = torch.softmax(project @ embedding[task], 0)
        expected = linear(x[row], layer.base_layer.weight.detach())
        for i in range(2):  # two experts of rank 2; alpha / r = 32 / 4
            a_i, b_i = a[2 * i : 2 * i + 2], b[:, 2 * i : 2 * i + 2]
            expected = expected + 32 / 4 * omega[i] * (x[row] @ a_i.T @ b_i.T)
        assert far(y[row], expected) < 1e-6


@pytest.mark.parametrize("gathered", [False, True], ids=["own", "gathered"])
def test_every_task_is_one_plain_lora_that_peft_reads_and_merges(root: Path, gathered: bool) -> None:
    config, model = experts(root, lora_dropout=0.1)
    tasks = torch.cat([of_task(0)[:1], of_task(1)[:1]])
    untouched = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before, after = trained(model, steps=15, tasks=tasks)
    assert after < before - 0.3
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in untouched.items())
    with torch.no_grad():
        model.task_gate.embedding.weight.add_(torch.randn(3, 8))
    expected = [logits(model, tasks=of_task(n)) for n in range(3)]
    assert far(logits(model), expected[0]) < 1e-5, "no task is the first"
    assert min(far(expected[0], expected[1]), far(expected[1], expected[2])) > 1e-3, "tasks differ"
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad} if gathered else None
    if gathered:
        shaken(model)
    out, merged = root / f"moelora-{gathered}", root / f"moelora-merged-{gathered}"
    METHODS["moelora"].save(model, load_tokenizer(root / "model", config), out, weights, config)
    METHODS["moelora"].merge(root / "model", out, merged, config)
    for number, task in enumerate(TASKS):
        base = AutoModelForCausalLM.from_pretrained(root / "model")
        assert far(logits(PeftModel.from_pretrained(base, out / task)), expected[number]) < 1e-5
        described = json.loads((out / task / "adapter_config.json").read_text())
        assert (described["peft_type"], described["r"]) == ("LORA", 4)
        assert far(logits(AutoModelForCausalLM.from_pretrained(merged / task)), expected[number]) < 1e-4


def test_tasks_that_contradict_each_other_are_both_learned(root: Path) -> None:
    """The same text with another answer per task: without the gate no loss is below ln 2."""
    _, model = experts(root)
    with_words(model)
    text, tasks = IDS[:1].repeat(2, 1), torch.cat([of_task(0)[:1], of_task(1)[:1]])
    wanted = torch.cat([torch.full((1, 16), 5), torch.full((1, 16), 6)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    for _ in range(80):
        loss = model(input_ids=text, labels=wanted, tasks=tasks, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss) < 0.3 * math.log(2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_keep_their_own_tasks(root: Path, checkpointing: bool) -> None:
    _, model = experts(root)
    shaken(model)
    apart = [logits(model, input_ids=IDS[n : n + 1], tasks=of_task(n)[:1]) for n in (0, 1)]
    rows = [
        Sequence(IDS[n].numpy(), IDS[n].numpy(), torch.arange(16).numpy(), True, of_task(n)[0].numpy()) for n in (0, 1)
    ]
    pack = Sequence(
        *(sum_of(rows, name) for name in ("input_ids", "labels", "position_ids")), True, sum_of(rows, "tasks")
    )
    batch = collate([Item((pack,), ())], 0)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "tasks")}
    assert far(logits(model, use_cache=False, **inputs), torch.cat(apart, 1)) < 1e-5
    if checkpointing:
        model.train()
        gradients = []
        for on in (False, True):
            if on:
                model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            model(use_cache=False, labels=batch["labels"], **inputs).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        assert far(*gradients) <= 1e-6 * float(gradients[0].abs().max())


def sum_of(rows: list[Sequence], name: str) -> Any:
    return torch.cat([torch.as_tensor(getattr(row, name)) for row in rows]).numpy()


def test_rows_know_their_tasks_also_out_of_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(root / "cache"))
    for method, tasks in ((MOELORA, [0, 1, 2] * 13 + [0]), (MOELORA, [0, 1, 2] * 13 + [0]), ({"type": "lora"}, None)):
        config = tiny.make_config(root, method=method)
        fetched = fetch(config, root / "cache")
        rows = data.prepare(config, fetched, load_tokenizer(root / "model", config)).train.rows[0]
        assert {name: each.tolist() for name, each in rows.numbers.items()} == ({"task": tasks} if tasks else {})
    assert len(list((root / "cache" / "tokens").glob("*/ids.npy"))) == 2


@pytest.mark.parametrize(("row", "told"), [({"task": "fourth"}, "'fourth'"), ({}, "None")])
def test_a_row_of_an_unknown_task_is_refused_with_its_line(tmp_path: Path, row: dict[str, str], told: str) -> None:
    tiny.make_model(tmp_path / "model")
    tiny.make_rows(tmp_path / "train.jsonl", 3, tasks=TASKS)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "say", "output": "red"} | row) + "\n")
    config = tiny.make_config(tmp_path, method=MOELORA)
    with pytest.raises(
        RunError, match=rf"train\.jsonl:4: task is {told}; accepted: one of method\.tasks: first, second, third"
    ) as error:
        data.prepare(config, fetch(config, tmp_path / "cache"), load_tokenizer(tmp_path / "model", config))
    assert error.value.cause is Cause.INVALID_DATA


# --- whole runs -----------------------------------------------------------------------------------------------------


def under(stage: int, method: dict[str, Any], **more: Any) -> dict[str, Any]:
    # ZeRO-3 leaves weights as small as ours whole, unless it is told not to.
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return tiny.merge({"method": method, "deepspeed": {"zero_optimization": zero}}, more)


PACKED = {"data": {"packing": True}, "training": {"gradient_checkpointing": True}}
RUNS: dict[str, dict[str, Any]] = {
    "houlsby, packed and checkpointed": under(0, HOULSBY | {"adapter_dropout": 0.1}, **PACKED),
    "mam, packed and checkpointed": under(0, MAM | {"adapter_dropout": 0.1}, **PACKED),
    "unipelt, ZeRO-2, checkpointed": under(2, UNIPELT | {"lora_dropout": 0.1}, training=PACKED["training"]),
    "moelora, ZeRO-1, packed and checkpointed": under(1, MOELORA | {"lora_dropout": 0.1}, merge=True, **PACKED),
}
STAGED = {"houlsby": HOULSBY, "mam": MAM, "unipelt": UNIPELT, "moelora": MOELORA}


@pytest.fixture(scope="module")
def played(root: Path) -> dict[str, dict[str, Any]]:
    plans = [plan for name, changes in RUNS.items() for plan in runs.interrupted(root, f"own/{name}", changes)]
    plans += [
        runs.job(root, f"zero/{name}-{stage}", under(stage, method, training={"max_steps": 4, "eval_steps": 0}))
        for name, method in STAGED.items()
        for stage in (0, 2, 3)
    ]
    asked = {"evaluation": {"prompts": ["say red"], "max_new_tokens": 3}, "training": {"max_steps": 4, "eval_steps": 0}}
    bf16 = asked | {"model": {"dtype": "bfloat16"}}
    plans += [
        runs.job(root, f"bf16/{name}-{stage}", under(stage, method, **bf16, deepspeed={"bf16": {"enabled": stage > 0}}))
        for name, method in STAGED.items()
        for stage in (0, 3)
    ]
    return runs.play(root, plans, 1)


@pytest.fixture(scope="module")
def together(root: Path, played: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Two processes."""
    short = {"max_steps": 4, "eval_steps": 0}
    plans = [
        runs.job(root, f"gang/{name}-{stage}", under(stage, method, training=short))
        for name, method in STAGED.items()
        for stage in (2, 3)
    ]
    return runs.play(root, plans, 2)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_crashed_continues_exactly(name: str, played: dict[str, Any]) -> None:
    whole, again = played[f"own/{name}/whole"], played[f"own/{name}/again"]
    assert again["progress"]["resumed_from_step"] == 3
    assert runs.figures(again) == runs.figures(whole)
    gates = [[{k: v for k, v in line.items() if "gate_" in k} for line in run["records"]] for run in (again, whole)]
    assert gates[0] == gates[1]
    assert bool(gates[0][0]) == name.startswith("unipelt")
    assert whole["moved"] == whole["trained"]


def test_moelora_writes_an_adapter_and_a_merged_model_per_task(root: Path, played: dict[str, Any]) -> None:
    name = "own/moelora, ZeRO-1, packed and checkpointed"
    assert [output["kind"] for output in played[f"{name}/whole"]["outputs"]] == ["adapter", "merged"]
    output = root / name / "whole" / "output"
    for task in TASKS:
        merged = AutoModelForCausalLM.from_pretrained(output / "merged" / task)
        base = AutoModelForCausalLM.from_pretrained(root / "model")
        adapted = logits(PeftModel.from_pretrained(base, output / task))
        assert far(logits(merged), adapted) < 1e-4


def test_the_report_tells_the_gates(root: Path, played: dict[str, Any]) -> None:
    def page(name: str) -> str:
        return (root / f"own/{name}/whole/output/report.html").read_text()

    unipelt, mam, *_ = (page(name) for name in sorted(RUNS, reverse=True) if name.startswith(("unipelt", "mam")))
    assert "Gates" in unipelt
    assert "Gates" not in mam


@pytest.mark.parametrize("name", STAGED)
def test_all_zero_stages_learn_the_same_and_write_the_same(root: Path, name: str, played: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    def written(stage: int) -> dict[str, torch.Tensor]:
        folder = root / f"zero/{name}-{stage}/output"
        return load_file(folder / ("second" if name == "moelora" else "") / "adapter_model.safetensors")

    reference = played[f"zero/{name}-0"]
    for stage in (2, 3):
        result = played[f"zero/{name}-{stage}"]
        assert runs.losses(result) == pytest.approx(runs.losses(reference), rel=1e-5)
        assert written(stage).keys() == written(0).keys()
        for key, tensor in written(stage).items():
            assert far(tensor, written(0)[key]) < 1e-4, key


@pytest.mark.parametrize("name", STAGED)
def test_two_processes_learn_what_one_does(name: str, played: dict[str, Any], together: dict[str, Any]) -> None:
    reference = played[f"zero/{name}-0"]
    for stage in (2, 3):
        assert runs.losses(together[f"gang/{name}-{stage}"]) == pytest.approx(runs.losses(reference), rel=1e-5)


@pytest.mark.parametrize("name", STAGED)
def test_a_bfloat16_model_is_trained_and_asked(root: Path, name: str, played: dict[str, Any]) -> None:
    reference = runs.losses(played[f"bf16/{name}-0"])
    assert reference[-1] < reference[0]
    assert runs.losses(played[f"bf16/{name}-3"]) == pytest.approx(reference, rel=0.05)
    for stage in (0, 3):
        answers = json.loads((root / f"bf16/{name}-{stage}/output/answers.json").read_text())
        assert answers[0]["prompt"] == "say red"
