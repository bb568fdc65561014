"""Methods of PEFT against a plain PEFT loop with the same seed, and against published numbers of parameters."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the trainer extra")

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.optimizers import create_loraplus_optimizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from finetune_api.causes import Cause
from finetune_trainer.methods import METHODS, hooks
from finetune_trainer.model import load_model, parameter_counts
from finetune_trainer.outcome import RunError
from tests.trainer import tiny
from tests.trainer.methods_cases import CASES, make_gpt2

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")
STEPS, RATE = 6, 5e-3
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 2, "lora_alpha": 16, "orth_reg_weight": 0.3}
REFERENCES: dict[str, tuple[dict[str, Any], Any]] = {
    "lora": (
        {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    ),
    "lora+": (
        {"type": "lora", "r": 4, "lora_alpha": 8, "loraplus_lr_ratio": 8},
        lambda: LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    ),
    "adalora": (
        {"type": "adalora", **ADALORA},
        lambda: AdaLoraConfig(total_step=STEPS, target_modules="all-linear", task_type="CAUSAL_LM", **ADALORA),
    ),
    "prefix_tuning": (
        {"type": "prefix_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 48},
        lambda: PrefixTuningConfig(
            num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=48, task_type="CAUSAL_LM"
        ),
    ),
    "p_tuning_v2": (
        {"type": "p_tuning_v2", "num_virtual_tokens": 5},
        lambda: PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    ),
    "prompt_tuning": (
        {"type": "prompt_tuning", "num_virtual_tokens": 5},
        lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    ),
    "p_tuning": (
        {"type": "p_tuning", "num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM"},
        lambda: PromptEncoderConfig(
            num_virtual_tokens=5,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=64,
            task_type="CAUSAL_LM",
        ),
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reference")
    tiny.make_model(root / "model")
    make_gpt2(root / "gpt2")
    tiny.make_rows(root / "train.jsonl", 24)
    return root


def ours(root: Path, method: dict[str, Any]) -> tuple[list[float], list[dict[str, Any]], Any]:
    """Losses of our steps over 4 sequences, the batches, and the engine."""
    from finetune_trainer import data, fetch, model
    from finetune_trainer.engine import Engine
    from finetune_trainer.feed import Feed, draw_seed
    from finetune_trainer.objectives import objective
    from finetune_trainer.stopping import Stop
    from finetune_trainer.world import join

    config = tiny.make_config(
        root, method=method, training={"per_device_train_batch_size": 4, "weight_decay": 0.0, "max_grad_norm": 1.0}
    )
    world = join("cpu")
    fetched = fetch.fetch(config, root / "cache")
    tokenizer = model.load_tokenizer(fetched.model, config)
    rows = data.prepare(config, fetched, tokenizer).train
    torch.manual_seed(draw_seed(config.training.seed))
    trained = METHODS[config.method.type].prepare(load_model(fetched.model, config, CPU), config.method, config)
    engine = Engine(trained, config, world, objective(config), Stop(), hooks(trained, config, STEPS))
    feed = Feed(
        rows,
        lambda items: data.collate(items, tokenizer.pad_token_id),
        objective(config),
        rank=0,
        size=1,
        per_device=4,
        global_batch=4,
        first_step=1,
        position=0,
        end=4 * STEPS,
    )
    losses, batches = [], []
    while (batch := feed.take()[0]) is not None:
        losses.append(float(engine.step(batch, batch.weights, RATE).loss_sums[0]) / batch.weights[0])
        batches.append(batch.slots[0].batch)
    return losses, batches, engine


def theirs(root: Path, adapter: Any, batches: list[dict[str, Any]], ratio: float | None) -> tuple[list[float], Any]:
    """As PEFT's documentation has it: loss of the model, step, (AdaLoRA) update_and_allocate, zero_grad."""
    from finetune_trainer.feed import draw_seed

    torch.manual_seed(draw_seed(42))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "model"), adapter)
    if ratio:
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=ratio)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    model.train()
    losses = []
    for step, batch in enumerate(batches, 1):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        out = model(**inputs)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if isinstance(adapter, AdaLoraConfig):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        labels = inputs["labels"][:, 1:].reshape(-1)
        logits = out.logits[:, -inputs["labels"].shape[1] : -1].reshape(len(labels), -1)
        losses.append(float(cross_entropy(logits, labels)))  # AdaLoRA's own loss has the regulariser in it
    return losses, model


@pytest.mark.parametrize("name", REFERENCES)
def test_losses_are_those_of_a_plain_peft_loop(name: str, root: Path) -> None:
    method, adapter = REFERENCES[name]
    told, batches, engine = ours(root, method)
    expected, model = theirs(root, adapter(), batches, method.get("loraplus_lr_ratio"))
    assert told == pytest.approx(expected, rel=1e-5)
    if name == "adalora":
        assert engine.module.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
        assert engine.hooks.figures()["rank_total"] == 2 * 14


def bloomz(method: dict[str, Any]) -> tuple[int, int]:
    """(trained, all) parameters of bloomz-560m's shape."""
    config = tiny.make_config(Path("/none"), method=method, data={"max_length": 48})
    with torch.device("meta"):
        shape = BloomConfig(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16)
        model = METHODS[config.method.type].prepare(BloomForCausalLM(shape), config.method, config)
    return parameter_counts(model)


def test_the_published_numbers_of_parameters() -> None:
    assert bloomz({"type": "prompt_tuning", "num_virtual_tokens": 8}) == (8_192, 559_222_784)
    lstm = {"num_virtual_tokens": 20, "encoder_hidden_size": 128, "encoder_reparameterization_type": "LSTM"}
    assert bloomz({"type": "p_tuning", **lstm})[0] == 1_926_400
    assert bloomz({"type": "p_tuning", **lstm})[1] == 561_140_992


def test_bitfit_of_a_published_shape() -> None:
    trained, total = bloomz({"type": "bitfit"})
    # 24 layers: fused query, key, value; out; into and out of the feed-forward part; two norms. And two norms around.
    assert (trained, total) == (24 * 1024 * (3 + 1 + 4 + 1 + 2) + 2 * 1024, 559_214_592)


def load(root: Path, method: dict[str, Any], folder: str = "model", **changes: Any) -> Any:
    config = tiny.make_config(root, method=method, **changes)
    torch.manual_seed(0)
    return METHODS[config.method.type].prepare(load_model(root / folder, config, CPU), config.method, config)


@pytest.mark.parametrize(
    ("method", "folder", "says"),
    [
        ({"type": "bitfit"}, "model", "trains biases, and LlamaForCausalLM has none. Choose ln_tuning, ia3 or lora"),
        ({"type": "bitfit", "bias_terms": ["query"]}, "gpt2", "computes query, key and value by one layer"),
        ({"type": "freeze", "freeze_trainable_layers": 3}, "model", "has 2 layers. Accepted: -2 to 2"),
        ({"type": "freeze", "freeze_trainable_modules": "self_attention"}, "model", "is found in no parameter of"),
        ({"type": "freeze", "freeze_extra_modules": "head2"}, "model", "There are e.g. model.embed_tokens.weight"),
        ({"type": "lora", "init_lora_weights": "olora"}, "gpt2", "Choose pissa or default"),
        ({"type": "trainable_tokens", "token_indices": [64]}, "model", r"embeddings for 64 tokens only \(0 to 63\)"),
        ({"type": "prompt_tuning", "num_virtual_tokens": 250}, "model", "Lower data.max_length to 6 or less"),
        ({"type": "c3a", "block_size": 48}, "model", "method.type 'c3a' does not fit LlamaForCausalLM"),
        ({"type": "vera", "target_modules": ["query"]}, "model", "does not fit LlamaForCausalLM.*named down_proj"),
        *(
            (CASES[name].method, "gpt2", r"\(Conv1D\). Choose another method, such as lora")
            for name in ("loha", "lokr", "oft", "boft", "hra", "shira", "c3a", "miss", "road", "delora")
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(root: Path, method: dict[str, Any], folder: str, says: str) -> None:
    with pytest.raises(RunError, match=says) as refused:
        load(root, method, folder)
    assert refused.value.cause is Cause.INVALID_CONFIGURATION


def test_adalora_is_refused_where_no_step_is_left_or_weights_are_cut_up(root: Path) -> None:
    config = tiny.make_config(root, method={"type": "adalora", "tinit": 5, "tfinal": 3})
    with pytest.raises(RunError, match="tinit 5 and tfinal 3 leave no step of the run's 8"):
        hooks(load(root, config.method.model_dump()), config, 8)
    with pytest.raises(RunError, match=r"Remove spec\.deepspeed\.bf16"):
        load(root, {"type": "adalora"}, deepspeed={"bf16": {"enabled": True}})


def trained(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_freeze_takes_layers_and_names(root: Path) -> None:
    assert trained(
        load(root, {"type": "freeze", "freeze_trainable_layers": -1, "freeze_trainable_modules": "mlp|q_"})
    ) == {
        *(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "model.layers.0.self_attn.q_proj.weight",
    }
    both = {"type": "freeze", "freeze_trainable_layers": 0, "freeze_trainable_modules": "norm"}
    assert trained(load(root, both | {"freeze_extra_modules": "^lm_head"})) == {
        *(f"model.layers.{n}.{norm}_layernorm.weight" for n in (0, 1) for norm in ("input", "post_attention")),
        "lm_head.weight",
    }


def test_bitfit_takes_components(root: Path) -> None:
    fused = load(root, {"type": "bitfit", "bias_terms": ["query", "key", "value"]}, "gpt2")
    assert trained(fused) == {f"transformer.h.{n}.attn.c_attn.bias" for n in (0, 1)}
    around = load(root, {"type": "bitfit", "bias_terms": ["intermediate", "output"]}, "gpt2")
    assert trained(around) == {
        f"transformer.h.{n}.{name}.bias" for n in (0, 1) for name in ("mlp.c_fc", "mlp.c_proj", "attn.c_proj")
    }


CHECKPOINTED = [name for name, case in CASES.items() if case.method["type"] not in ("prefix_tuning", "p_tuning_v2")]


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(root: Path, name: str) -> None:
    ids = torch.arange(3, 35).reshape(2, 16)
    gradients = []
    for on in (False, True):
        model = load(root, CASES[name].method, training={"gradient_checkpointing": on})
        model.train()
        torch.manual_seed(1)
        for key, p in model.named_parameters():
            if p.requires_grad and not key.endswith("bank.default"):
                p.data += 0.02 * torch.randn_like(p)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert float(gradients[0].abs().max()) > 0
    assert float((gradients[0] - gradients[1]).abs().max()) <= 1e-5 * float(gradients[0].abs().max())


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2"])
def test_virtual_tokens_are_seen_while_answering(root: Path, name: str) -> None:
    """Greedy generation (with a cache) gives what one whole forward pass per token gives."""
    model = load(root, CASES[name].method)
    torch.manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.5 * torch.randn_like(p)
    model.eval()
    ids = torch.tensor([[4, 9, 17, 23]])
    with torch.no_grad():
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert said.tolist() == ids.tolist()


def test_a_text_to_begin_with_is_that_of_the_model(root: Path, tmp_path: Path) -> None:
    model = load(root, CASES["prompt_tuning from text"].method)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    ids = (tokenizer("say red")["input_ids"] * 4)[:4]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, model.get_input_embeddings().weight[ids])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tokenizer_name_or_path"] == f"{root}/model"


def test_the_adapter_of_p_tuning_is_what_the_network_made(root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = load(root, CASES["p_tuning by LSTM"].method)
    model.save_pretrained(tmp_path)
    assert {key: tuple(v.shape) for key, v in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        "prompt_embeddings": (4, 64)
    }


def test_pissa_is_written_as_a_plain_lora_of_twice_the_rank(root: Path, tmp_path: Path) -> None:
    config = tiny.make_config(root, method=CASES["pissa"].method)
    model = load(root, CASES["pissa"].method)
    METHODS["lora"].save(model, AutoTokenizer.from_pretrained(root / "model"), tmp_path, None, config)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (8, 64, True)


def test_adapters_beside_a_bfloat16_model_stay_float32(root: Path) -> None:
    ids = torch.arange(3, 35).reshape(2, 16)
    for name, case in CASES.items():
        if case.method["type"] == "freeze":
            continue
        model = load(root, case.method, model={"dtype": "bfloat16"})
        kinds = {p.dtype for p in model.parameters() if p.requires_grad}
        assert kinds == {torch.float32}, name
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert loss.isfinite(), name
