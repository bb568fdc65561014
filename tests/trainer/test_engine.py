"""The step: against TRL on the same batch, against transformers' schedules, and its parts one by one."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its data."""
    root = tmp_path_factory.mktemp("engine")
    tiny.make_model(root / "model")
    tiny.make_rows(root / "train.jsonl", 12)
    return root


@pytest.fixture(scope="module")
def first_step(root: Path) -> dict[str, Any]:
    """Our first step over 4 rows in 2 passes: loss, gradients before clipping, and the rows themselves."""
    import os

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from finetune_trainer import data, fetch, model
    from finetune_trainer.engine import Engine
    from finetune_trainer.feed import Feed
    from finetune_trainer.methods import METHODS
    from finetune_trainer.objectives import objective
    from finetune_trainer.stopping import Stop
    from finetune_trainer.world import join

    config = tiny.make_config(root, method={"type": "full"}, training={"max_grad_norm": 0.5, "warmup_steps": 0})
    world = join("cpu")
    fetched = fetch.fetch(config, root / "cache")
    tokenizer = model.load_tokenizer(fetched.model, config)
    prepared = data.prepare(config, fetched, tokenizer)
    trained = METHODS["full"].prepare(model.load_model(fetched.model, config, world.device), config.method, config)
    engine = Engine(trained, config, world, objective(config), Stop())
    feed = Feed(
        prepared.train,
        lambda items: data.collate(items, tokenizer.pad_token_id),
        objective(config),
        rank=0,
        size=1,
        per_device=2,
        global_batch=4,
        first_step=1,
        position=0,
        end=4,
    )
    batch, _ = feed.take()
    assert batch is not None
    gradients: dict[str, Any] = {}
    clip = engine._clip

    def spy() -> Any:
        gradients.update({name: p.grad.clone() for name, p in engine.module.named_parameters()})
        return clip()

    engine._clip = spy  # type: ignore[method-assign]
    outcome = engine.step(batch, batch.weights, 1e-3)
    rows = [prepared.train.item(*prepared.train.locate(position)).sequences[0] for position in range(4)]
    return {
        "loss": float(outcome.loss_sums[0]) / batch.weights[0],
        "norm": float(outcome.grad_norm),
        "gradients": gradients,
        "batch": batch,
        "rows": [{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows],
        "engine": engine,
        "config": config,
    }


def test_loss_and_gradients_are_those_of_trl(first_step: dict[str, Any], root: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    theirs: dict[str, Any] = {}

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            theirs["gradients"] = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters()}

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(root / "trl"),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            shuffle_dataset=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(first_step["rows"]),
        processing_class=AutoTokenizer.from_pretrained(root / "model"),
        callbacks=[Spy()],
    )
    loss = trainer.train().training_loss
    assert first_step["loss"] == pytest.approx(loss, rel=1e-5)
    assert theirs["gradients"].keys() == first_step["gradients"].keys()
    for name, gradient in first_step["gradients"].items():
        assert (gradient - theirs["gradients"][name]).abs().max() <= 1e-5, name
    squares = sum(float(g.double().square().sum()) for g in theirs["gradients"].values())
    assert first_step["norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_weight_decay_spares_biases_and_norms(first_step: dict[str, Any]) -> None:
    engine = first_step["engine"]
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    spared = {names[p] for group in engine.optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert spared == {name for name in names.values() if "norm" in name}
    decays = {group["weight_decay"] for group in engine.optimizer.param_groups}
    assert decays == {0.0, 0.01}


def test_a_slot_draws_the_same_whoever_does_it(first_step: dict[str, Any]) -> None:
    import torch

    engine, batch = first_step["engine"], first_step["batch"]
    slot = batch.slots[0]
    drawn = []
    for _ in range(2):
        torch.rand(3)
        engine._seed(7, slot, slot.batch)
        drawn.append(torch.rand(4))
    engine._seed(8, slot, slot.batch)
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(torch.rand(4))


@pytest.mark.parametrize(
    "shape",
    [
        {"lr_scheduler_type": "cosine", "warmup_steps": 5},
        {"lr_scheduler_type": "linear", "warmup_steps": 0.1},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 2},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 4},
    ],
    ids=lambda shape: shape["lr_scheduler_type"],
)
def test_the_learning_rate_is_transformers(shape: dict[str, Any], root: Path) -> None:
    import torch
    from transformers import TrainingArguments, get_scheduler

    from finetune_trainer.schedule import learning_rate

    config = tiny.make_config(root, training={"warmup_steps": 0} | shape)
    arguments = TrainingArguments(output_dir=str(root), warmup_steps=config.training.warmup_steps, use_cpu=True)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=config.training.learning_rate)
    scheduler = get_scheduler(
        config.training.lr_scheduler_type,
        optimizer,
        arguments.get_warmup_steps(30),
        30,
        scheduler_specific_kwargs=config.training.lr_scheduler_kwargs or None,
    )
    ours = learning_rate(config, 30)
    for done in range(30):
        assert ours(done) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("training", "sequences", "steps"),
    [
        ({"max_steps": 7, "num_train_epochs": 1}, 28, 7),
        ({"max_steps": -1, "num_train_epochs": 1}, 11, 3),
        ({"max_steps": -1, "num_train_epochs": 2.5}, 28, 7),
        ({"max_steps": -1, "num_train_epochs": 0.1}, 2, 1),
    ],
)
def test_how_long_a_run_is(training: dict[str, Any], sequences: int, steps: int, root: Path) -> None:
    from finetune_trainer.schedule import sequences_wanted, steps_for

    config = tiny.make_config(root, training=training)
    wanted = sequences_wanted(config, lambda epoch: 11)
    assert (wanted, steps_for(config, wanted)) == (sequences, steps)


def test_noise_goes_by_the_length_of_the_own_document() -> None:
    import torch

    from finetune_trainer.noise import document_lengths

    packed = {"input_ids": torch.zeros(1, 6, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}
    assert document_lengths(packed).tolist() == [[3, 3, 3, 2, 2, 1]]
    padded = {
        "input_ids": torch.zeros(2, 4, dtype=torch.long),
        "position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    assert document_lengths(padded).tolist() == [[4, 4, 4, 4], [2, 2, 1, 1]]


def test_the_first_token_of_a_packed_row_is_nobodys_next_one() -> None:
    import torch

    from finetune_trainer.objectives import sft

    batch = {
        "labels": torch.tensor([[5, 6, 7, 8, 9]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
    }
    assert sft.targets(batch).tolist() == [[6, -100, 8, 9]]
    assert sft.weights(batch) == (3,)


def tiny_model(kind: str, **more: Any) -> Any:
    """A random model of two layers."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig

    kinds = {"llama": LlamaConfig, "gemma2": Gemma2Config, "granite": GraniteConfig}
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return AutoModelForCausalLM.from_config(kinds[kind](**shape, **more))


def prepared_batch() -> dict[str, Any]:
    """Two rows, of which some tokens carry labels."""
    import torch

    from finetune_trainer.objectives import sft

    ids = torch.arange(24).reshape(2, 12) % 64
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, 7:] = -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(12).repeat(2, 1)}
    return sft.prepare(batch)


@pytest.mark.parametrize("trained", ["all", "all, tied", "adapters", "adapters and head"])
def test_the_loss_in_chunks_is_the_loss(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from finetune_trainer.objectives import head, sft

    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 64 * 5)  # 15 label tokens make 3 chunks
    model = tiny_model("llama", tie_word_embeddings="tied" in trained)
    if "adapters" in trained:
        whole = ["lm_head"] if "head" in trained else None
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=whole))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    found = head.find_head(model)
    assert found is not None
    assert found.frozen_weight is (trained == "adapters")
    batch = prepared_batch()
    results = []
    for layer in (None, found):
        model.zero_grad()
        loss = sft.loss_sums(model, batch, layer)[0].sum()
        (loss * 0.37).backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (chunked, theirs) = results
    assert float(chunked) == pytest.approx(float(loss), rel=1e-6)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, theirs[name], atol=1e-6), name
    logits = model(batch["input_ids"]).logits
    assert logits.shape[-1] == 64, "the model is whole again"


@pytest.mark.parametrize(
    ("kind", "more"), [("gemma2", {"final_logit_softcapping": 30.0}), ("granite", {"logits_scaling": 7.0})]
)
def test_a_model_that_changes_its_logits_keeps_its_head(kind: str, more: dict[str, Any]) -> None:
    from finetune_trainer.objectives.head import find_head

    assert find_head(tiny_model(kind, **more)) is None


def test_a_batch_without_labels_adds_nothing_but_a_graph() -> None:
    import torch

    from finetune_trainer.objectives import sft
    from finetune_trainer.objectives.head import find_head

    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    batch = sft.prepare(prepared_batch() | {"labels": torch.full((2, 12), -100)})
    assert sft.weights(batch) == (0,)
    for layer in (None, find_head(model)):
        loss = sft.loss_sums(model, batch, layer)[0].sum()
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_flops_of_a_model_whose_layers_differ() -> None:
    from transformers import Gemma4TextConfig

    from finetune_trainer.flops import model_cost

    class Model:
        config = Gemma4TextConfig(
            vocab_size=100,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=8,
            global_head_dim=32,
            layer_types=["sliding_attention", "full_attention"],
        )

    assert model_cost(Model, 10_000, trains_all=True).per_pair == 3 * 4 * 2 * (8 + 32)
    silent = type("Silent", (), {"config": object()})
    assert model_cost(silent, 10_000, trains_all=True).per_pair == 0, "a figure for people ends no run"


def test_flops_of_a_model() -> None:
    from transformers import LlamaConfig

    from finetune_trainer.flops import model_cost, peak_flops

    class Model:
        config = LlamaConfig(
            vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=False
        )

    full = model_cost(Model, 10_000, trains_all=True)
    assert full.per_token == 6 * (10_000 - 1600)
    assert full.per_pair == 3 * 4 * 2 * 16
    assert model_cost(Model, 10_000, trains_all=False).per_token == 4 * (10_000 - 1600)
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("Abacus 9000") is None
