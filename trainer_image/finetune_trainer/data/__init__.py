"""From files to the sequences a run trains and evaluates on.

``files.py`` reads rows, ``formats.py`` says what is in them (``records.py``), ``encode.py`` what the stage learns of
that, ``render.py`` makes text and tokens, ``stream.py`` puts them in order. Called by ``run.py``.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_api.causes import Cause
from finetune_api.run import TrainerConfig
from finetune_api.spec import DataSource
from finetune_trainer.data import targets
from finetune_trainer.data.cache import cached_rows
from finetune_trainer.data.encode import Encoding, Sketch, encoding
from finetune_trainer.data.files import read_rows
from finetune_trainer.data.formats import FORMATS
from finetune_trainer.data.labels import Labels
from finetune_trainer.data.records import BadRowError, as_kind
from finetune_trainer.data.render import Renderer, check_vocabulary, ensure_chat_template
from finetune_trainer.data.stream import Draft, Item, Rows, Sequence, Stream, collate
from finetune_trainer.fetch import DATA_SUFFIXES, Fetched, source_key
from finetune_trainer.model import vocabulary_rows
from finetune_trainer.outcome import RunError

__all__ = ["Item", "Prepared", "Rows", "Sequence", "Stream", "collate", "prepare"]

log = logging.getLogger(__name__)

_CHUNK = 1000  # rows tokenised together, by all cores
_SHOWN = 5  # bad rows named in one message


@dataclass(frozen=True)
class Prepared:
    """What a run trains and evaluates on."""

    train: Stream
    eval: dict[str, Stream]
    """By source, in the order of the configuration; their rows are in the order of the file."""
    report: dict[str, dict[str, Any]]
    """By source (``eval/`` before held-out ones): uri, rows, sequences, tokens, learned_tokens, truncated (rows
    cut at max_length), dropped (rows with nothing to learn left), longest (tokens, before the cut)."""
    labels: Labels | None = None
    """What a classifier is to tell apart."""


def prepare(config: TrainerConfig, fetched: Fetched, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, render and tokenise every source. RunError(INVALID_DATA) names file and line of up to five bad rows."""
    if config.stage not in targets.RECORDS:
        ensure_chat_template(tokenizer)
    labels = targets.find_labels(config, _records(config, fetched), fetched.model)
    renderer = Renderer(tokenizer)
    encoded = targets.encoding(config, labels) if config.stage in targets.RECORDS else encoding(config)
    report: dict[str, dict[str, Any]] = {}
    known = vocabulary_rows(fetched.model)
    tasks: list[str] | None = getattr(config.method, "tasks", None)

    def load(source: DataSource, path: Path, name: str) -> Rows:
        start = time.monotonic()
        rows, counts = cached_rows(
            source,
            fetched.digests.get(source_key(source), ""),
            name,
            tokenizer,
            config.data.max_length,
            lambda: _tokenize(source, path, name, renderer, encoded, config.data.max_length, tasks),
            (config.stage, *encoded.version, *(tasks or [])),
        )
        if len(rows):
            check_vocabulary(int(rows.ids.max()), known, config.model.uri)
        report[name] = counts
        log.info(
            "%s: %d rows, %d tokens (%d learned), %d cut at %d tokens, %d dropped; %.1f s",
            name,
            counts["rows"],
            counts["tokens"],
            counts["learned_tokens"],
            counts["truncated"],
            config.data.max_length,
            counts["dropped"],
            time.monotonic() - start,
        )
        return rows

    names = source_names(config.data.train)
    train = [load(*each) for each in zip(config.data.train, fetched.train, names, strict=True)]
    held_out = {
        name: load(source, path, f"eval/{name}")
        for source, path, name in zip(config.data.eval, fetched.eval, source_names(config.data.eval), strict=True)
    }
    for name, rows in [*zip(names, train, strict=True), *held_out.items()]:
        if not len(rows):
            raise RunError(Cause.INVALID_DATA, _nothing_left(name, report, config.data.max_length))
    weights = [source.weight for source in config.data.train]
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
    """The records of the training rows, before anything is made of them. Bad ones are told when they are."""
    for source, path in zip(config.data.train, fetched.train, strict=True):
        for _, row in read_rows(path, source.split if source.uri.startswith("hf://") else ""):
            with suppress(BadRowError):
                for record in FORMATS[source.format](row):
                    yield from as_kind(record, targets.RECORDS[config.stage])


def source_names(sources: list[DataSource]) -> list[str]:
    """A short name per source, for metrics: its file's name without ending; a number is added where two are equal."""
    names: list[str] = []
    for source in sources:
        path = PurePosixPath(source.uri.split("://", 1)[1].rstrip("/"))
        base = path.stem if path.suffix in DATA_SUFFIXES else path.name
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
    max_length: int,
    tasks: list[str] | None = None,
) -> tuple[Rows, dict[str, Any]]:
    """The rows of a source as tokens, and what is to be reported of them."""
    counts: dict[str, Any] = {"uri": source.uri, "rows": 0, "sequences": 0, "truncated": 0, "dropped": 0, "longest": 0}
    parts: list[Rows] = []
    for sketches in _chunks(source, path, renderer, encoding, counts, tasks):
        kept: list[Draft] = []
        for row in encoding.tokenise(renderer, sketches):
            longest = max(len(tokens.ids) for tokens in row.sequences)
            counts["longest"] = max(counts["longest"], longest)
            fitting = encoding.fit(row, max_length)
            counts["dropped"] += not fitting
            counts["truncated"] += longest > max_length or 0 < sum(map(_length, fitting)) < _length(row)
            kept += fitting
        parts.append(Rows.of(name, kept))
    rows = encoding.whole(Rows.joined(name, parts))
    sequences = len(rows) * rows.parts
    counts |= {"sequences": sequences, "tokens": len(rows.ids), "learned_tokens": rows.learned_tokens}
    return rows, counts


def _length(row: Draft) -> int:
    return sum(len(tokens.ids) for tokens in row.sequences)


def _chunks(
    source: DataSource,
    path: Path,
    renderer: Renderer,
    encoding: Encoding,
    counts: dict[str, Any],
    tasks: list[str] | None,
) -> Iterator[list[Sketch]]:
    """Rows as texts, some at a time. Bad rows are gathered, so that a user sees several at once."""
    convert = FORMATS[source.format]
    chunk: list[Sketch] = []
    bad: list[str] = []
    for place, row in read_rows(path, source.split if source.uri.startswith("hf://") else ""):
        counts["rows"] += 1
        try:
            for record in convert(row):
                for turned in as_kind(record, encoding.record):
                    sketches = encoding.sketch(renderer, turned)
                    if tasks:
                        number = _task(row, tasks)
                        sketches = [replace(one, numbers={**one.numbers, "task": number}) for one in sketches]
                    chunk += sketches
        except BadRowError as error:
            bad.append(f"{place}: {error}")
            if len(bad) == _SHOWN:
                break
        if len(chunk) >= _CHUNK and not bad:
            yield chunk
            chunk = []
    if bad:
        more = " (and perhaps more)" if len(bad) == _SHOWN else ""
        raise RunError(
            Cause.INVALID_DATA,
            f"{source.uri} is not in the format {source.format!r}, by {len(bad)} rows{more}: {'; '.join(bad)}",
        )
    if chunk:
        yield chunk


def _task(row: dict[str, Any], tasks: list[str]) -> int:
    """The number of the row's task."""
    if row.get("task") not in tasks:
        raise BadRowError(f"task is {row.get('task')!r}; accepted: one of method.tasks: {', '.join(tasks)}")
    return tasks.index(row["task"])


def _nothing_left(name: str, report: dict[str, dict[str, Any]], max_length: int) -> str:
    counts = report.get(name) or report[f"eval/{name}"]
    if not counts["rows"]:
        return f"{counts['uri']} holds no rows"
    return (
        f"{counts['uri']}: nothing to learn is left of its {counts['rows']} rows, because what is learned "
        f"begins after, or does not fit into, data.max_length ({max_length} tokens; the longest row has "
        f"{counts['longest']}). Raise data.max_length."
    )
