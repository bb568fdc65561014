"""What a run would learn, before it learns it: ``python -m finetune_trainer.data.preview``.

``finetune data preview`` starts it with the run's configuration in the environment. It prepares the data as the run
would (and leaves the tokens in the cache for it), without the model's weights, and prints what became of every source
and some rows with what is not learned dimmed.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune_api.run import ENV_CACHE, TrainerConfig
from finetune_trainer.data import Prepared, prepare, told
from finetune_trainer.data.stream import IGNORED, Rows, Sequence, Stream
from finetune_trainer.fetch import fetch_to_look_at
from finetune_trainer.outcome import RunError
from finetune_trainer.run import read_config

_BAR = 40  # characters of the longest bar
_DIM, _END = "\x1b[2m", "\x1b[0m"


def main() -> int:
    """Print it; 1 where the data cannot be used, and why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3, help="rows shown of every source")
    parser.add_argument("--color", action="store_true", help="dim what is not learned; else learned text is in ⟦ ⟧")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    from finetune_trainer.model import load_tokenizer

    try:
        config = read_config()
        with tempfile.TemporaryDirectory() as folder:
            fetched = fetch_to_look_at(config, Path(os.environ.get(ENV_CACHE) or folder))
            tokenizer = load_tokenizer(fetched.model, config, fetched.adapters)
            prepared = prepare(config, fetched, tokenizer)
            for line in lines(config, prepared, tokenizer, arguments.rows, arguments.color):
                print(line)
    except RunError as error:
        print(f"{error.cause}: {error.message}", file=sys.stderr)
        return 1
    return 0


def lines(
    config: TrainerConfig, prepared: Prepared, tokenizer: PreTrainedTokenizerBase, shown: int, color: bool
) -> Iterator[str]:
    """The whole page."""
    held_out = [(f"eval/{name}", stream.rows[0]) for name, stream in prepared.eval.items()]
    for name, rows in [*((rows.name, rows) for rows in prepared.train.rows), *held_out]:
        yield from _source(name, rows, prepared.report[name], config.data.max_length)
        for number in range(min(shown, len(rows))):
            yield ""
            yield from _row(rows, number, tokenizer, color)
        yield ""
    yield from _epoch(config, prepared.train)


def _source(name: str, rows: Rows, counts: dict[str, Any], max_length: int) -> Iterator[str]:
    yield f"{name} ({counts['uri']})"
    yield f"  {told(counts, max_length)}"
    if counts["truncated"]:
        share = counts["truncated"] / max(counts["rows"], 1)
        yield f"  {share:.1%} of the rows are cut; the longest has {counts['longest']} tokens"
    for place in counts["bad_examples"]:
        yield f"  bad: {place}"
    yield "  tokens of a sequence:"
    yield from _histogram(np.diff(rows.starts), max_length)


def _histogram(lengths: np.ndarray, max_length: int) -> Iterator[str]:
    """Bars over lengths, in steps that double."""
    edges = [0, 16]
    while edges[-1] < max_length:
        edges.append(min(edges[-1] * 2, max_length))
    counts = [int(((lengths > low) & (lengths <= high)).sum()) for low, high in pairwise(edges)]
    most = max(counts, default=0) or 1
    filled = [number for number, count in enumerate(counts) if count]
    for number in range(filled[0], filled[-1] + 1) if filled else ():
        bar = "█" * round(_BAR * counts[number] / most) or ("▏" if counts[number] else "")
        yield f"  {edges[number] + 1:>7} – {edges[number + 1]:<7} {counts[number]:>9}  {bar}"


def _row(rows: Rows, number: int, tokenizer: PreTrainedTokenizerBase, color: bool) -> Iterator[str]:
    beside = ", ".join(f"{key} {np.asarray(values[number]).tolist()}" for key, values in rows.numbers.items())
    yield f"  row {number + 1}" + (f" ({beside})" if beside else "")
    stream = Stream([rows], [1.0], 0, False, 2**31, shuffle=False)
    for sequence in stream.item(0, number).sequences:
        for line in _marked(sequence, tokenizer, color).splitlines():
            yield f"  │ {line}"


def _marked(sequence: Sequence, tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """The text of a sequence, special tokens too. Learned and other tokens alternate in runs."""
    learned = np.concatenate([[False], sequence.labels != IGNORED, [False]])
    edges = [0, *(np.flatnonzero(np.diff(learned.astype(np.int8)))).tolist(), len(sequence)]
    pieces = []
    for place, (start, end) in enumerate(pairwise(edges)):
        text = str(tokenizer.decode(sequence.input_ids[start:end], clean_up_tokenization_spaces=False))
        if not text:
            continue
        if place % 2:
            pieces.append(text if color else f"⟦{text}⟧")
        else:
            pieces.append("\n".join(f"{_DIM}{part}{_END}" for part in text.split("\n")) if color else text)
    return "".join(pieces)


def _epoch(config: TrainerConfig, stream: Stream) -> Iterator[str]:
    items, tokens = stream.items(0), stream.tokens(0)
    steps = -(-items // config.global_batch_size)
    yield f"One epoch: {tokens:,} tokens in {items:,} {'packs' if stream.packing else 'rows'}, {steps:,} steps of " + (
        f"{config.global_batch_size}"
    )
    if stream.packing:
        yield f"Packs are filled to {tokens / (items * stream.max_length):.1%}"
    if len(stream.rows) > 1:
        shares = [
            f"{rows.name} {weight * len(rows.ids) / max(sum(w * len(r.ids) for w, r in _weighted(stream)), 1):.1%}"
            for weight, rows in _weighted(stream)
        ]
        yield f"Of its tokens: {', '.join(shares)}"


def _weighted(stream: Stream) -> list[tuple[float, Rows]]:
    return list(zip(stream.weights, stream.rows, strict=True))


if __name__ == "__main__":
    sys.exit(main())
