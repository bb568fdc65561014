"""Tokens per second, memory and MFU of real runs of the trainer, on models of a real shape with random weights.

    python benchmarks/throughput.py --shape 8b --method lora --batch 2 --length 4096
    python benchmarks/throughput.py --shape tiny --method full --cpu        # does it work at all?

A run goes through the operator's plan and the trainer, as a job would; nothing is left out. Prints one JSON line per
run: the median over the steps after the first third (compilation and caches are warm then).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api import run
from finetune_api.spec import FineTuneJobSpec
from finetune_operator import manifests
from finetune_operator.cluster import pods, processes
from finetune_operator.plan import Owner, Plan, make_plan
from finetune_operator.settings import Profile

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "2b": {"hidden_size": 2560, "intermediate_size": 8960, "num_hidden_layers": 16, "num_attention_heads": 20,
           "num_key_value_heads": 4, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "33b": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52,
            "num_key_value_heads": 52, "vocab_size": 32000},
}  # fmt: skip
FOUR_BIT = {"33b": "33b", "tiny-4bit": "tiny"}
"""Models that are made in 4 bits, layer by layer, and never lie anywhere in 16: the name of their shape."""
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path, shape: str) -> None:
    """A Llama of that shape with random weights in bf16, and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    make_tokenizer(folder)


def make_four_bit_model(folder: Path, shape: str) -> None:
    """The same in NF4 (double quantisation), as bitsandbytes and transformers store it: neither memory nor disk ever
    holds more than a layer in bf16."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=False)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in empty.named_parameters():
        layer = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = parameter.shape
    folder.mkdir(parents=True)
    places = {}
    for file, shapes in shards.items():
        tensors = {}
        for name, size in shapes.items():
            if len(size) == 1:  # a norm
                tensors[name] = torch.ones(size, dtype=torch.bfloat16)
                continue
            weight = torch.randn(size, dtype=torch.bfloat16, device=device) * 0.02
            if ".layers." not in name:
                tensors[name] = weight
                continue
            tensors[name], state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    config.save_pretrained(folder)
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """A small byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def make_rows(path: Path, count: int, words: int, spread: bool) -> None:
    """Rows of about ``words`` tokens of random text; with ``spread`` of a quarter to seven quarters of it."""
    import random

    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    with path.open("w") as file:
        for _ in range(count):
            text = "".join(
                draw.choice(letters) for _ in range(draw.randint(words // 4, words * 7 // 4) if spread else words)
            )
            file.write(json.dumps({"instruction": "x", "input": "", "output": text}) + "\n")


def plan_of(args: argparse.Namespace, model: Path, rows: Path, out: Path) -> Plan:
    """The operator's plan of the run."""
    zero: dict[str, Any] = {} if args.zero is None else {"stage": args.zero}
    if args.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    spec: dict[str, Any] = {
        "model": {"uri": f"file://{model}"},
        "method": {"type": args.method, **(args.parameters or {})},
        "data": {"train": [{"uri": f"file://{rows}"}], "max_length": args.length, "packing": args.packing},
        "training": {
            "max_steps": 100 * args.steps,  # ended after args.steps
            "per_device_train_batch_size": args.batch,
            "gradient_accumulation_steps": args.accumulation,
            "gradient_checkpointing": args.checkpointing,
            "learning_rate": 1e-4,
        },
        "workers": {"gpusPerWorker": 0 if args.cpu else args.gpus},
        "checkpoint": {"save_steps": args.save_steps},
        "output": {"uri": f"file://{out}/result"},
        **({"deepspeed": {"zero_optimization": zero}} if zero else {}),
    }
    return make_plan(Owner("bench", "bench", "uid", {}), FineTuneJobSpec.model_validate(spec), Profile(), {})


@dataclass(frozen=True)
class Worker:
    """A worker pod's trainer container, as a process of this machine."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    started: float

    @property
    def log(self) -> str:
        """What it has said so far."""
        return (self.folder / "log").read_text()

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of its metrics.jsonl so far."""
        path = self.folder / "metrics-0.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def reach(self, step: int) -> bool:
        """Wait until that step is done; False where the process ended before."""
        while len(self.records) < step:
            if self.process.poll() is not None:
                return False
            time.sleep(0.1)
        return True

    def end(self) -> None:
        """Kill what is left of it, and remove what it wrote."""
        processes.end(str(self.folder), self.process)
        shutil.rmtree(self.folder)


def start_worker(plan: Plan, out: Path, cache: Path, gpus: Iterable[int] = (), **variables: str) -> Worker:
    """Start what the trainer container of the plan's pod would start: the same command, environment, configuration."""
    manifest = manifests.job(plan, 1)
    manifest["metadata"]["uid"] = "uid"
    pod = pods.new_pod(manifest, 0, "worker", "uid", "")
    (container,) = pod["spec"]["containers"]
    config = out / "config"
    config.mkdir()
    for name, text in manifests.config_map(plan)["data"].items():
        (config / name).write_text(text)
    port = processes.free_port()
    place = pods.Place(
        work=out,
        mounts={manifests.CONFIG_DIR: config, manifests.CACHE_DIR: cache, manifests.WORK_DIR: out},
        termination=out / "termination",
        ports={run.MASTER_PORT: port, run.HTTP_PORT: processes.free_port([port])},
        hosts={f"{manifests.job_name('bench', 1)}-0.{manifests.service_name('bench')}": "127.0.0.1"},
        gpus=tuple(str(gpu) for gpu in gpus),
    )
    environment = {**pods.environment(container, place, os.environ), **variables, processes.MARK: str(out)}
    return Worker(processes.start(pods.command(container, place), environment, out, out / "log"), out, time.monotonic())


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The model and the rows of a run, made where they are missing."""
    model, rows = folder / f"model-{args.shape}", folder / f"rows-{args.length}-{args.document}.jsonl"
    if not model.exists():
        started = time.monotonic()
        if args.shape in FOUR_BIT:
            make_four_bit_model(model, FOUR_BIT[args.shape])
        else:
            make_model(model, args.shape)
        print(f"made a {args.shape} model in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    words = args.document or args.length - 16
    wanted = args.steps * args.batch * args.accumulation * max(1, args.gpus) * args.length // words
    if not rows.exists() or rows.read_text().count("\n") < wanted:
        make_rows(rows, max(64, wanted), words, bool(args.document))
    return model, rows


def launch(args: argparse.Namespace, folder: Path, gpus: Iterable[int] = (0,), **variables: str) -> Worker:
    """Start a run on these GPUs."""
    model, rows = prepare(args, folder)
    out = Path(tempfile.mkdtemp(dir=folder))
    plan = plan_of(args, model, rows, out)
    return start_worker(plan, out, folder / "cache", () if args.cpu else gpus, **variables)


def figures(worker: Worker, steps: int) -> dict[str, Any]:
    """What a run came to after so many steps: medians over those after the first third. Ends it: what would follow
    (a checkpoint, the result) is not measured here, and takes a disk for large models."""
    reached = worker.reach(steps)
    seconds = time.monotonic() - worker.started
    records, log = worker.records, worker.log
    worker.end()
    if not reached:
        return {"error": worker.process.returncode, "tail": log[-3000:]}
    warm = records[len(records) // 3 :]
    middle = statistics.median
    return {
        "tokens_per_second": round(middle(r["tokens_per_second"] for r in warm)),
        "step_seconds": round(middle(r["step_seconds"] for r in warm), 3),
        "data_wait_seconds": round(middle(r["data_wait_seconds"] for r in warm), 4),
        "mfu": round(middle(r["mfu"] for r in warm), 3) if warm[0].get("mfu") else None,
        "peak_gib": round(max(r["memory"].get("peak", r["memory"]["rss"]) for r in warm) / 2**30, 1),
        "reserved_gib": round(max(r["memory"].get("reserved", 0) for r in warm) / 2**30, 1),
        "loss": [round(records[0]["loss"], 4), round(records[-1]["loss"], 4)],
        "seconds_in_all": round(seconds),
        "said": [line for line in log.splitlines() if line.startswith("training ")][:1],
        **next(({"gpu": line} for line in log.splitlines() if line.startswith("a step on this GPU: ")), {}),
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A run on as many GPUs as it wants, and its figures."""
    return figures(launch(args, folder, range(args.gpus)), args.steps)


def arguments() -> argparse.ArgumentParser:
    """What a run is made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, *FOUR_BIT], default="8b")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--parameters", type=json.loads, help="the method's, as JSON, where not its defaults")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--document", type=int, default=0, help="mean tokens per row; 0: as long as a sequence")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--save-steps", type=int, default=1000000)
    parser.add_argument("--zero", type=int)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--offload", action="store_true", help="the optimizer's state in host memory")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "finetune-bench")
    return parser


def main() -> None:
    """Measure what the arguments say."""
    args = arguments().parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    asked = {k: v for k, v in vars(args).items() if k != "folder"}
    print(json.dumps({**asked, **measure(args, args.folder)}), flush=True)


if __name__ == "__main__":
    main()
