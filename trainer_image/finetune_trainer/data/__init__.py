"""From files to the sequences a run trains and evaluates on.

``sources.py`` reads rows (``files.py``) and finds what is in them (``formats.py``: ``records.py``), ``encode.py`` and
``targets.py`` say what a stage learns of that, ``render.py`` makes text and tokens, ``stream.py`` puts them in order.
Called by ``run.py``.
"""

import logging
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune_api.causes import Cause
from finetune_api.run import TrainerConfig
from finetune_api.spec import Data, DataSource
from finetune_trainer.data import targets
from finetune_trainer.data.cache import Spool, cached_rows
from finetune_trainer.data.contamination import seen
from finetune_trainer.data.duplicates import Duplicates
from finetune_trainer.data.encode import Encoding, Sketch, encoding
from finetune_trainer.data.labels import Labels
from finetune_trainer.data.records import BadRowError
from finetune_trainer.data.render import Renderer, Tokens, check_vocabulary
from finetune_trainer.data.sources import TASK, BadRows, records
from finetune_trainer.data.stream import Draft, Item, Rows, Sequence, Stream, collate
from finetune_trainer.fetch import Fetched, source_key
from finetune_trainer.fetching.wanted import data_kind, split_pattern
from finetune_trainer.model import most_positions, vocabulary_rows
from finetune_trainer.outcome import RunError
from finetune_trainer.world import rank

__all__ = ["Item", "Prepared", "Rows", "Sequence", "Stream", "collate", "prepare"]

log = logging.getLogger(__name__)

_COUNTED = (
    "rows",
    "unused",
    "duplicates",
    "sequences",
    "truncated",
    "answers_cut",
    "answers_lost",
    "split",
    "dropped",
    "longest",
)
_CHUNK = 1000  # rows tokenised together, by all cores
_CHUNK_TEXT = 2**20  # characters, where rows are long: a token takes some 300 bytes while it is made


@dataclass(frozen=True)
class Prepared:
    """What a run trains and evaluates on."""

    train: Stream
    eval: dict[str, Stream]
    """By source, in the order of the configuration; their rows are in the order of the file."""
    report: dict[str, dict[str, Any]]
    """By source (``eval/`` before held-out ones): uri, format, rows, unused (rows that decide nothing), unread
    (columns), duplicates (left out), bad_rows and bad_examples, sequences, tokens, learned_tokens, truncated (rows cut
    at max_length) with answers_cut and answers_lost (none of their tokens is left), split (documents in pieces of
    max_length), dropped (rows with nothing to learn left), longest (tokens, before the cut); of held-out ones
    contaminated (rows that stand in the training rows)."""
    labels: Labels | None = None
    """What a classifier is to tell apart."""


def prepare(config: TrainerConfig, fetched: Fetched, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, render and tokenise every source. RunError(INVALID_DATA) names file and line of up to five bad rows.

    Rows are cut at ``data.max_length``, or at the most tokens that the model has positions for.
    """
    most = most_positions(fetched.model)
    if most is not None and most < config.data.max_length:
        log.warning(
            "data.max_length is %d, but %s has positions for %d tokens: rows are cut there",
            *(config.data.max_length, config.model.uri, most),
        )
        config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": most})})
    labels = targets.find_labels(config, _records(config, fetched), fetched.model)
    renderer = Renderer(tokenizer)
    encoded = targets.encoding(config, labels) if config.stage in targets.RECORDS else encoding(config)
    report: dict[str, dict[str, Any]] = {}
    known = vocabulary_rows(fetched.model)
    tasks: list[str] | None = getattr(config.method, "tasks", None)

    training = [
        partial(_quietly, source, path, encoded.record)
        for source, path in zip(config.data.train, fetched.train, strict=True)
    ]
    known_rows = _duplicates(config)
    digests = [fetched.digests.get(source_key(source), "") for source in config.data.train]

    def load(source: DataSource, path: Path, name: str, number: int | None = None) -> Rows:
        start = time.monotonic()
        repeated = known_rows if number is not None else None
        earlier = [
            config.data.deduplication,
            config.data.deduplication_threshold,
            *_told_apart(config.data.train, digests)[:number],
        ]

        def make() -> tuple[Rows, dict[str, Any]]:
            if repeated is not None and number is not None:
                repeated.catch_up(training, number)
                repeated.sources = number + 1
            return _tokenize(source, path, name, renderer, encoded, config, tasks, repeated)

        rows, counts = cached_rows(
            source,
            path,
            fetched.digests.get(source_key(source), ""),
            name,
            tokenizer,
            config.data.max_length,
            make,
            (config.stage, *encoded.version, config.data.max_bad_rows, tasks, earlier if repeated else None),
        )
        if len(rows):
            check_vocabulary(int(rows.ids.max()), known, config.model.uri)
        report[name] = counts
        log.info("%s: %s; %.1f s", name, told(counts, config.data.max_length), time.monotonic() - start)
        return rows

    names = source_names(config.data.train)
    train = [load(*each) for each in zip(config.data.train, fetched.train, names, range(len(names)), strict=True)]
    held_out = {
        name: load(source, path, f"eval/{name}")
        for source, path, name in zip(config.data.eval, fetched.eval, source_names(config.data.eval), strict=True)
    }
    for name, rows in [*zip(names, train, strict=True), *held_out.items()]:
        if not len(rows):
            raise RunError(Cause.INVALID_DATA, _nothing_left(name, report, config.data.max_length))
    if config.data.check_contamination and rank() == 0:
        for name, rows in held_out.items():
            _check_contamination(name, rows, train, report)
    weights = _weights(config.data, train)
    return Prepared(
        train=Stream(train, weights, config.training.seed, config.data.packing, config.data.max_length),
        eval={
            name: Stream([rows], [1.0], config.training.seed, False, config.data.max_length, shuffle=False)
            for name, rows in held_out.items()
        },
        report=report,
        labels=labels,
    )


def _records(config: TrainerConfig, fetched: Fetched) -> Iterator[Any]:
    """The records of the training rows, before anything is made of them."""
    for source, path in zip(config.data.train, fetched.train, strict=True):
        yield from _quietly(source, path, targets.RECORDS[config.stage])


def _quietly(source: DataSource, path: Path, wanted: type) -> Iterator[Any]:
    """The records of a source. Bad rows are told when tokens are made of them."""
    unheard = BadRows(source.uri, sys.maxsize)
    for _, _, record in records(source, path, wanted, unheard, {"rows": 0, "unused": 0}):
        yield record


def _told_apart(sources: list[DataSource], digests: list[str]) -> list[Any]:
    """What the records of each source depend on."""
    return [[source.model_dump(exclude={"weight"}), digest] for source, digest in zip(sources, digests, strict=True)]


def _duplicates(config: TrainerConfig) -> Duplicates | None:
    kind = config.data.deduplication
    return None if kind == "none" else Duplicates(kind, config.data.deduplication_threshold)


def _check_contamination(name: str, rows: Rows, train: list[Rows], report: dict[str, dict[str, Any]]) -> None:
    count = int(seen(rows, train).sum())
    report[f"eval/{name}"]["contaminated"] = count
    if count:
        log.warning(
            "eval/%s: %d of %d held-out rows stand in the training rows, by half or more: their figures tell nothing "
            "about what was learned. data.deduplication does not look at held-out rows; take them out of one side.",
            name,
            count,
            len(rows),
        )


def _weights(data: Data, train: list[Rows]) -> list[float]:
    """How often each source's rows come in an epoch (mT5, arXiv:2010.11934, for the temperature)."""
    sizes = [max(len(rows), 1) for rows in train]
    reference = max(sizes) if data.stopping_strategy == "all_exhausted" else min(sizes)
    even = 1 - 1 / data.temperature
    return [source.weight * (reference / size) ** even for source, size in zip(data.train, sizes, strict=True)]


def source_names(sources: list[DataSource]) -> list[str]:
    """A short name per source, for metrics: its file's name without endings, of a pattern what is fixed of it; a number
    is added where two are equal."""
    names: list[str] = []
    for source in sources:
        folder, pattern = split_pattern(source.uri.split("://", 1)[1].rstrip("/"))
        path = PurePosixPath(pattern or folder)
        base = path.name.removesuffix(path.suffix) if data_kind(path.name) else path.name
        base = base.removesuffix(data_kind(path.name))
        if pattern:
            base = re.sub(r"[*?]|\[[^]]*\]", "", base).strip("-_.") or PurePosixPath(folder).name
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _tokenize(
    source: DataSource,
    path: Path,
    name: str,
    renderer: Renderer,
    encoding: Encoding,
    config: TrainerConfig,
    tasks: list[str] | None = None,
    repeated: Duplicates | None = None,
) -> tuple[Rows, dict[str, Any]]:
    """The rows of a source as tokens, and what is to be reported of them."""
    counts: dict[str, Any] = {"uri": source.uri, "format": source.format}
    counts |= dict.fromkeys(_COUNTED, 0)
    bad = BadRows(source.uri, config.data.max_bad_rows)
    spool = Spool(name)
    for sketches in _chunks(source, path, renderer, encoding, counts, bad, tasks, repeated):
        kept: list[Draft] = []
        for row in encoding.tokenise(renderer, sketches):
            fitting = encoding.fit(row, config.data.max_length)
            _count(counts, row, fitting, config.data.max_length)
            kept += fitting
        spool.add(Rows.of(name, kept))
    bad.close()
    rows = encoding.whole(spool.rows())
    sequences = len(rows) * rows.parts
    counts |= {"sequences": sequences, "tokens": len(rows.ids), "learned_tokens": rows.learned_tokens}
    counts |= {"bad_rows": bad.count, "bad_examples": bad.named}
    return rows, counts


def _count(counts: dict[str, Any], row: Draft, fitting: list[Draft], max_length: int) -> None:
    """What it costs a row to be brought within ``max_length``: answers of which nothing or not all is left."""
    longest = max(len(tokens.ids) for tokens in row.sequences)
    counts["longest"] = max(counts["longest"], longest)
    counts["dropped"] += not fitting
    counts["split"] += len(fitting) > 1
    before, left = _sequences([row]), _sequences(fitting)
    shrunk = sum(len(tokens.ids) for tokens in left) < sum(len(tokens.ids) for tokens in before)
    if not shrunk or (not fitting and longest <= max_length):
        return
    counts["truncated"] += 1
    counts["answers_lost"] += max(0, sum(map(_answers, before)) - sum(map(_answers, left)))
    if len(left) == len(before):
        counts["answers_cut"] += sum(
            bool(len(now.ids) < len(then.ids) and then.learned[len(now.ids) - 1] and then.learned[len(now.ids)])
            for then, now in zip(before, left, strict=True)
        )


def _sequences(rows: list[Draft]) -> list[Tokens]:
    return [tokens for row in rows for tokens in row.sequences]


def _answers(tokens: Tokens) -> int:
    """Runs of learned tokens."""
    learned = tokens.learned
    return int(np.count_nonzero(learned[1:] > learned[:-1])) + bool(len(learned) and learned[0])


def _chunks(
    source: DataSource,
    path: Path,
    renderer: Renderer,
    encoding: Encoding,
    counts: dict[str, Any],
    bad: BadRows,
    tasks: list[str] | None,
    repeated: Duplicates | None,
) -> Iterator[list[Sketch]]:
    """Rows as texts, some at a time."""
    chunk: list[Sketch] = []
    size = 0
    for place, row, record in records(source, path, encoding.record, bad, counts):
        if repeated is not None and repeated.repeats(record):
            counts["duplicates"] += 1
            continue
        try:
            sketches = encoding.sketch(renderer, record)
            if tasks:
                number = _task(row, tasks)
                sketches = [replace(one, numbers={**one.numbers, "task": number}) for one in sketches]
            chunk += sketches
            size += sum(len(text.text) for one in sketches for text in one.texts)
        except BadRowError as error:
            bad.add(place, error)
        if (len(chunk) >= _CHUNK or size >= _CHUNK_TEXT) and bad.endured:
            yield chunk
            chunk, size = [], 0
    if chunk and bad.endured:
        yield chunk


def _task(row: dict[str, Any], tasks: list[str]) -> int:
    """The number of the row's task."""
    if row.get(TASK) not in tasks:
        raise BadRowError(f"{TASK} is {row.get(TASK)!r}; accepted: one of method.tasks: {', '.join(tasks)}")
    return tasks.index(row[TASK])


def told(counts: dict[str, Any], max_length: int) -> str:
    """What became of a source's rows, in words."""
    words = [
        f"format {counts['format']}, {counts['rows']} rows, {counts['tokens']} tokens "
        f"({counts['learned_tokens']} learned)"
    ]
    if counts["truncated"]:
        words.append(
            f"{counts['truncated']} cut at {max_length} tokens ({counts['answers_lost']} answers lost, "
            f"{counts['answers_cut']} cut short)"
        )
    for key, meaning in (
        ("split", "split into pieces of that length"),
        ("dropped", "dropped, as nothing to learn is left"),
        ("unused", "unused, as they decide nothing"),
        ("duplicates", "left out, as they repeat earlier ones"),
        ("bad_rows", "left out, as they are not in the format"),
    ):
        if counts[key]:
            words.append(f"{counts[key]} {meaning}")
    if counts["unread"]:
        shown = counts["unread"][:12]
        more = f" and {len(counts['unread']) - len(shown)} more" if len(counts["unread"]) > len(shown) else ""
        words.append(f"nothing read of its columns {', '.join(shown)}{more}")
    return ", ".join(words)


def _nothing_left(name: str, report: dict[str, dict[str, Any]], max_length: int) -> str:
    counts = report.get(name) or report[f"eval/{name}"]
    if not counts["rows"]:
        return f"{counts['uri']} holds no rows"
    if counts["unused"] + counts["bad_rows"] == counts["rows"]:
        return f"{counts['uri']}: none of its {counts['rows']} rows can be used ({told(counts, max_length)})"
    return (
        f"{counts['uri']}: nothing to learn is left of its {counts['rows']} rows, because what is learned "
        f"begins after, or does not fit into, data.max_length ({max_length} tokens; the longest row has "
        f"{counts['longest']}). Raise data.max_length."
    )
