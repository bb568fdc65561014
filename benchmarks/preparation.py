"""How fast rows become tokens, and in how much memory: ``python benchmarks/preparation.py --megabytes 1000``.

Writes a file of that size (conversations of generated words), trains a byte-level BPE tokenizer of 32,000 words on its
beginning, and prepares it as a run does, twice: from nothing, and from the cache. No GPU, no network. Memory is what
the process holds for itself; files that it has mapped are the kernel's to drop, as a limit on its pod makes it do.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path


def words(count: int, seed: int) -> list[str]:
    """Words of Zipf's kind: short ones first."""
    draw = random.Random(seed)
    letters = "etaoinshrdlcumwfgypbvk"
    return ["".join(draw.choices(letters, k=2 + number * 9 // count)) for number in range(count)]


def write(path: Path, megabytes: float) -> None:
    """Rows of format messages, two turns each."""
    draw = random.Random(0)
    known = words(40_000, 1)
    weights = [1 / (rank + 3) for rank in range(len(known))]
    pool = draw.choices(known, weights, k=1_000_000)

    def said(most: int) -> str:
        start = draw.randrange(len(pool) - most)
        return " ".join(pool[start : start + draw.randint(5, most)])

    size, limit = 0, megabytes * 1e6
    with path.open("w") as file:
        while size < limit:
            turns = [
                {"role": role, "content": said(most)}
                for _ in range(2)
                for role, most in (("user", 60), ("assistant", 200))
            ]
            size += file.write(json.dumps({"messages": turns}) + "\n")


def make_tokenizer(folder: Path, rows: Path) -> None:
    """A byte-level BPE with the template chatml."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    with rows.open() as file:
        lines = [line for _, line in zip(range(3000), file, strict=False)]
    raw.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=32_000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    raw.add_special_tokens([AddedToken(token) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")])
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>").save_pretrained(folder)


class Memory:
    """The most memory this process held while it was measured, MiB, looked at ten times a second."""

    def __init__(self) -> None:
        self.peak = self.now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def now(self) -> float:
        """Its own memory, without mapped files."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        os.environ["FINETUNE_CACHE"] = str(folder / "cache")
        (folder / "cache").mkdir()
        rows = folder / "rows.jsonl"
        write(rows, arguments.megabytes)
        make_tokenizer(folder / "model", rows)
        prepare(folder, rows)


def prepare(folder: Path, rows: Path) -> None:
    """From nothing, then from the cache."""
    from finetune_api.run import TrainerConfig
    from finetune_trainer import data
    from finetune_trainer.fetch import fetch
    from finetune_trainer.model import load_tokenizer

    config = TrainerConfig.model_validate(
        {
            "namespace": "benchmark",
            "name": "preparation",
            "stage": "sft",
            "model": {"uri": f"file://{folder}/model"},
            "method": {"type": "lora"},
            "data": {"train": [{"uri": rows.as_uri()}], "chat_template": "chatml", "packing": True},
            "training": {},
            "evaluation": {},
            "deepspeed": {},
            "checkpoint_uri": f"file://{folder}/checkpoints",
            "save_steps": 1,
            "save_total_limit": 1,
            "output_uri": f"file://{folder}/output",
            "global_batch_size": 1,
        }
    )
    size = rows.stat().st_size / 1e6
    for what in ("from nothing", "from the cache"):
        start, worked = time.monotonic(), time.process_time()
        memory = Memory()
        imported = memory.peak
        with memory:
            fetched = fetch(config, folder / "cache")
            prepared = data.prepare(config, fetched, load_tokenizer(fetched.model, config))
        seconds, worked = time.monotonic() - start, time.process_time() - worked
        tokens = prepared.report["rows"]["tokens"]
        print(
            f"{what}: {size:.0f} MB, {tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s, "
            f"{size / seconds:.1f} MB/s, {tokens / worked:,.0f} tokens per second of one core; "
            f"peak memory {memory.peak:.0f} MiB, {imported:.0f} of them before",
            flush=True,
        )


if __name__ == "__main__":
    main()
