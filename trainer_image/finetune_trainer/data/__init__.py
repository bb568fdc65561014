"""From files to the sequences a run trains and evaluates on.

``formats.py`` reads rows, ``render.py`` makes tokens of them, ``stream.py`` puts them in order. Called by ``run.py``.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_api.causes import Cause
from finetune_api.run import TrainerConfig
from finetune_api.spec import DataSource
from finetune_trainer.data.cache import cached_rows
from finetune_trainer.data.formats import FORMATS, BadRowError, read_rows
from finetune_trainer.data.render import Rendered, Renderer, Tokens, check_vocabulary, ensure_chat_template
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


def prepare(config: TrainerConfig, fetched: Fetched, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, render and tokenise every source. RunError(INVALID_DATA) names file and line of up to five bad rows."""
    ensure_chat_template(tokenizer)
    renderer = Renderer(tokenizer)
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
            lambda: _tokenize(source, path, name, renderer, config.data.max_length, tasks),
            tasks,
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
    )


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
    source: DataSource, path: Path, name: str, renderer: Renderer, max_length: int, tasks: list[str] | None = None
) -> tuple[Rows, dict[str, Any]]:
    """The rows of a source as tokens, and what is to be reported of them."""
    counts: dict[str, Any] = {"uri": source.uri, "rows": 0, "sequences": 0, "truncated": 0, "dropped": 0, "longest": 0}
    parts: list[Rows] = []
    for texts, numbers in _chunks(source, path, renderer, counts, tasks):
        kept: list[Draft] = []
        for tokens, beside in zip(renderer.encode(texts), numbers, strict=True):
            counts["longest"] = max(counts["longest"], len(tokens.ids))
            if len(tokens.ids) > max_length:
                counts["truncated"] += 1
                tokens = Tokens(tokens.ids[:max_length], tokens.learned[:max_length])
            if tokens.learned[1:].any():  # the first token has nothing before it to be predicted from
                kept.append(Draft((tokens,), beside))
            else:
                counts["dropped"] += 1
        parts.append(Rows.of(name, kept))
    rows = Rows.joined(name, parts)
    counts |= {"sequences": len(rows), "tokens": len(rows.ids), "learned_tokens": rows.learned_tokens}
    return rows, counts


def _chunks(
    source: DataSource, path: Path, renderer: Renderer, counts: dict[str, Any], tasks: list[str] | None
) -> Iterator[tuple[list[Rendered], list[dict[str, int]]]]:
    """Rendered rows and their numbers, some at a time. Bad rows are gathered, so that a user sees several at once."""
    convert = FORMATS[source.format]
    chunk: list[Rendered] = []
    numbers: list[dict[str, int]] = []
    bad: list[str] = []
    for place, row in read_rows(path, source.split if source.uri.startswith("hf://") else ""):
        counts["rows"] += 1
        try:
            rendered = renderer.render(convert(row))
            beside = {"task": _task(row, tasks)} if tasks else {}
            chunk += rendered
            numbers += [beside] * len(rendered)
        except BadRowError as error:
            bad.append(f"{place}: {error}")
            if len(bad) == _SHOWN:
                break
        if len(chunk) >= _CHUNK and not bad:
            yield chunk, numbers
            chunk, numbers = [], []
    if bad:
        more = " (and perhaps more)" if len(bad) == _SHOWN else ""
        raise RunError(
            Cause.INVALID_DATA,
            f"{source.uri} is not in the format {source.format!r}, by {len(bad)} rows{more}: {'; '.join(bad)}",
        )
    if chunk:
        yield chunk, numbers


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
        f"{counts['uri']}: nothing to learn is left of its {counts['rows']} rows, because every answer begins after "
        f"data.max_length ({max_length} tokens; the longest row has {counts['longest']}). Raise data.max_length."
    )
