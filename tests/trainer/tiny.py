"""A tiny model, tokenizer and data set, and a run of the trainer over them: what the trainer's tests share.

Everything is made on the spot from fixed seeds: a Llama of two layers and 64 hidden units, a word-level tokenizer
with a chat template, and rows whose answers follow from their questions, so that the loss can fall.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetune_api.run import (
    ENV_ATTEMPT,
    ENV_CONFIG,
    ENV_HTTP_PORT,
    ENV_TERMINATION_LOG,
    ENV_WORK,
    Termination,
    TrainerConfig,
)
from finetune_operator.cluster.processes import free_port

ROOT = Path(__file__).parents[2]
WORDS = [
    *("red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven", "cat", "dog", "bird", "fish"),
    *("tree", "house", "is", "the", "a", "an", "of", "and", "to", "what", "who", "color", "number", "animal"),
    *("thing", "you", "are", "hello", "name", "say", "count", "please", "now"),
]

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def make_model(
    directory: Path, *, dtype: str = "float32", seed: int = 0, tied: bool = False, words: tuple[str, ...] = ()
) -> Path:
    """A Llama of 64 hidden units and two layers with its tokenizer, as transformers saves them. ``words``: that it
    knows beside the usual ones."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    special = ["<pad>", "<s>", "<end>", "<unk>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def make_gguf(path: Path, seed: int = 0) -> Path:
    """A Llama of the same size in one GGUF file, a part of its weights in blocks of 4 bits; tokens are bytes."""
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    hidden, inner, layers = 64, 128, 2
    tokens = ["<pad>", "<s>", "<end>", *bytes_to_unicode().values(), "he", "ll"]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    draw = np.random.default_rng(seed)

    def add(name: str, *shape: int, packed: bool = False) -> None:
        values = (draw.standard_normal(shape) * 0.05).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        if packed:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ones(shape, np.float32) if "norm" in name else values)

    add("token_embd.weight", len(tokens), hidden)
    add("output_norm.weight", hidden)
    add("output.weight", len(tokens), hidden)
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", hidden)
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", hidden // 2, hidden),
            ("attn_v", hidden // 2, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            add(f"blk.{layer}.{name}.weight", rows, columns, packed=name.startswith("ffn"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_rows(path: Path, count: int, seed: int = 0, tasks: tuple[str, ...] = ()) -> Path:
    """Alpaca rows of differing lengths, of each task in turn."""
    import random

    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 9))]
        rows.append({"instruction": "say " + " ".join(words), "input": "", "output": " ".join(words[::-1])})
        if tasks:
            rows[-1]["task"] = tasks[number % len(tasks)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_texts(path: Path, count: int, seed: int = 0, words: tuple[int, int] = (3, 40)) -> Path:
    """Documents that count through the vocabulary, so that the next word follows from the last one."""
    import random

    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        first, length = draw.randrange(len(WORDS)), draw.randint(*words)
        rows.append({"text": " ".join(WORDS[(first + number) % len(WORDS)] for number in range(length))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_preferences(path: Path, count: int, seed: int = 0, verdicts: bool = False) -> Path:
    """Pairs of answers: the better one repeats the question's words backwards, the worse one is of other words.

    ``verdicts``: single answers judged good or bad instead, in turn.
    """
    import random

    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 6))]
        good = " ".join(words[::-1])
        bad = " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 6)))
        row: dict[str, Any] = {"prompt": "say " + " ".join(words)}
        if verdicts:
            rows.append(row | {"completion": bad if number % 2 else good, "label": number % 2 == 0})
        else:
            rows.append(row | {"chosen": good, "rejected": bad, "margin": number % 3 / 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(root: Path, **changes: Any) -> TrainerConfig:
    """A configuration over ``root/model`` and ``root/train.jsonl``; ``changes`` as in ``merge``."""
    document: dict[str, Any] = {
        "namespace": "team",
        "name": "tiny",
        "stage": "sft",
        "model": {"uri": f"file://{root}/model", "dtype": "float32"},
        "method": {"type": "lora", "r": 4, "lora_alpha": 8},
        "data": {"train": [{"uri": f"file://{root}/train.jsonl"}], "max_length": 48},
        "training": {
            "learning_rate": 3e-3,
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "weight_decay": 0.01,
        },
        "evaluation": {},
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "checkpoint_uri": f"file://{root}/checkpoints",
        "save_steps": 3,
        "save_total_limit": 3,
        "output_uri": f"file://{root}/output",
        "global_batch_size": 4,
        "accelerator": "cpu",
    }
    return TrainerConfig.model_validate(merge(document, changes))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, mappings key by key; a mapping with ``type`` replaces."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and "type" not in value
        merged[key] = merge(merged[key], value) if both else value
    return merged


def environment(root: Path, config: TrainerConfig, attempt: int = 1, **more: str) -> dict[str, str]:
    """The environment of a trainer process, with its configuration written to ``root/config.json``."""
    path = root / "config.json"
    path.write_text(config.model_dump_json())
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("FINETUNE_", "TORCHELASTIC"))}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        keep.pop(key, None)
    return keep | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "trainer_image")),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        ENV_CONFIG: str(path),
        ENV_ATTEMPT: str(attempt),
        ENV_WORK: str(root / f"work-{attempt}"),
        ENV_HTTP_PORT: "0",
        ENV_TERMINATION_LOG: str(root / "termination"),
        **more,
    }


def start(environ: dict[str, str], processes: int = 1, module: str = "launch") -> subprocess.Popen[str]:
    """A trainer, started as in a pod."""
    command = [sys.executable, "-m", f"finetune_trainer.{module}"]
    if processes > 1:
        command += [f"--nproc-per-node={processes}", f"--master-port={free_port()}"]
    return subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def word(root: Path) -> Termination:
    """The termination message of the last run."""
    return Termination.model_validate_json((root / "termination").read_bytes())


def records(directory: Path) -> list[dict[str, Any]]:
    """The lines of a folder's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
