"""What the stages with labels and targets learn of a record: texts with a label, words with tags, a source with its
target. The tokenizer's own encoding puts in the special tokens, and a row that is cut keeps them.

Called by ``data/__init__.py``; ``encode.py`` has the other stages.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.causes import Cause
from finetune_api.run import TrainerConfig
from finetune_api.stages import Seq2Seq, SequenceClassification, TokenClassification
from finetune_trainer.data.encode import Encoding, Sketch
from finetune_trainer.data.labels import TAGS, Labels, name_of, named, of_rows
from finetune_trainer.data.records import Labelled, SourceTarget, Tagged
from finetune_trainer.data.render import Renderer, Tokens
from finetune_trainer.data.stream import IGNORED, Draft
from finetune_trainer.outcome import RunError

RECORDS: dict[str, type] = {
    "sequence_classification": Labelled,
    "token_classification": Tagged,
    "seq2seq": SourceTarget,
}
"""By stage."""


def find_labels(config: TrainerConfig, records: Iterable[Any], model: Path) -> Labels | None:
    """The labels of the run by its training records; None for stages without. RunError(INVALID_CONFIGURATION)."""
    if config.stage == "sequence_classification":
        options = config.sequence_classification or SequenceClassification()
        return of_rows((record.label for record in records), options.labels, options.problem_type, model)
    if config.stage == "token_classification":
        listed = (config.token_classification or TokenClassification()).labels
        found = set() if listed else {name_of(tag) for record in records for tag in record.tags}
        return named(listed, found, TAGS, model)
    return None


def encoding(config: TrainerConfig, labels: Labels | None) -> Encoding:
    """How the records of these stages become rows."""
    if config.stage == "seq2seq":
        options = config.seq2seq or Seq2Seq()
        version: tuple[Any, ...] = (options.source_prefix, options.max_target_length)
        return Encoding(SourceTarget, _source_target(options), _both_cut(options), _sources_targets, version=version)
    assert labels is not None
    version = (*labels.names, labels.problem_type)
    if config.stage == "token_classification":
        return Encoding(Tagged, _tagged(labels), _words_cut, _words, version=version)
    return Encoding(Labelled, _labelled(labels), _texts_cut, _texts, version=version)


# --- a text or a pair of texts, and a label -------------------------------------------------------------------------


def _labelled(labels: Labels) -> Callable[[Renderer, Labelled], list[Sketch]]:
    return lambda renderer, record: [
        Sketch((), {"label": labels.number(record.label)}, raw=(record.text, record.text_pair))
    ]


def _texts(renderer: Renderer, sketches: list[Sketch]) -> Iterator[Draft]:
    """``learned`` marks the tokens of the texts. ``second`` is where the second text begins (at the end, where there
    is none)."""
    made: dict[int, Draft] = {}
    for paired in (False, True):
        rows = [number for number, sketch in enumerate(sketches) if (sketch.raw[1] is not None) is paired]
        if not rows:
            continue
        texts = [[sketches[row].raw[part] for row in rows] for part in range(1 + paired)]
        if paired and not renderer.tokenizer.num_special_tokens_to_add(pair=True):
            # Tokenizers of language models put nothing between the two.
            texts = [[f"{first}\n{second}" for first, second in zip(*texts, strict=True)]]
        encoded = renderer.tokenizer(*texts, return_special_tokens_mask=True, truncation=False, verbose=False)
        for place, row in enumerate(rows):
            ids = np.asarray(encoded["input_ids"][place], np.int32)
            content = np.asarray(encoded["special_tokens_mask"][place]) == 0
            second = _second(encoded, place, len(ids)) if len(texts) == 2 else len(ids)
            made[row] = Draft((Tokens(ids, content),), {**sketches[row].numbers, "second": second})
    for number in range(len(sketches)):
        yield made[number]


def _second(encoded: Any, place: int, length: int) -> int:
    if encoded.is_fast:
        return encoded.sequence_ids(place).index(1) if 1 in encoded.sequence_ids(place) else length
    types = encoded.get("token_type_ids")
    return types[place].index(1) if types and 1 in types[place] else length


def _texts_cut(row: Draft, max_length: int) -> list[Draft]:
    """The longer text loses its end first, special tokens stay."""
    [tokens] = row.sequences
    surplus = len(tokens.ids) - max_length
    if surplus <= 0:
        return [row] if tokens.learned.any() else []
    places, second = np.flatnonzero(tokens.learned), int(row.numbers["second"])
    texts = [places[places < second], places[places >= second]]
    longer = 0 if len(texts[0]) >= len(texts[1]) else 1
    alone = min(surplus, len(texts[longer]) - len(texts[1 - longer]))
    lost = [0, 0]
    lost[longer] = alone + (surplus - alone + 1) // 2
    lost[1 - longer] = (surplus - alone) // 2
    if lost[longer] >= len(texts[longer]):
        return []  # max_length holds the special tokens alone
    kept = np.ones(len(tokens.ids), bool)
    for text, count in zip(texts, lost, strict=True):
        kept[text[len(text) - count :]] = False
    numbers = {**row.numbers, "second": int(kept[:second].sum())}
    return [Draft((Tokens(tokens.ids[kept], tokens.learned[kept]),), numbers)]


# --- words, and a tag for each --------------------------------------------------------------------------------------


def _tagged(labels: Labels) -> Callable[[Renderer, Tagged], list[Sketch]]:
    def sketch(renderer: Renderer, record: Tagged) -> list[Sketch]:
        return [Sketch((), {}, raw=(record.tokens, [labels.number(tag) for tag in record.tags]))]

    return sketch


def _words(renderer: Renderer, sketches: list[Sketch]) -> Iterator[Draft]:
    """The first token of every word carries its tag, the others none. ``end`` is where the last word ends."""
    tokenizer = renderer.tokenizer
    if not tokenizer.is_fast:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"stage token_classification needs to know which token belongs to which word, and "
            f"{type(tokenizer).__name__} does not tell. Accepted: a fast tokenizer (a tokenizer.json). Convert it, or "
            "use another model.",
        )
    # With spaces between, as in running text: given words one by one, byte-level tokenizers write them as one.
    texts = [" ".join(sketch.raw[0]) for sketch in sketches]
    encoded = tokenizer(texts, return_offsets_mapping=True, truncation=False, verbose=False)
    for place, sketch in enumerate(sketches):
        ids = np.asarray(encoded["input_ids"][place], np.int32)
        tags = np.full(len(ids), IGNORED, np.int32)
        stops = np.cumsum([len(word) + 1 for word in sketch.raw[0]])  # of each word, with the space behind it
        before, end = None, len(ids)
        sequence = encoded.sequence_ids(place)
        for token, (start, stop) in enumerate(encoded["offset_mapping"][place]):
            if sequence[token] is None or stop <= start:
                continue
            end = token + 1
            # A token may begin with the space before its word.
            word = int(np.searchsorted(stops, stop - 1, side="right"))
            if word != before:
                tags[token] = sketch.raw[1][word]
            before = word
        yield Draft((Tokens(ids, tags != IGNORED, tags),), {**sketch.numbers, "end": end})


def _words_cut(row: Draft, max_length: int) -> list[Draft]:
    [tokens] = row.sequences
    end = int(row.numbers["end"])
    kept = np.ones(len(tokens.ids), bool)
    if len(kept) > max_length:
        kept[max(max_length - (len(kept) - end), 0) : end] = False
    assert tokens.labels is not None
    numbers = {key: value for key, value in row.numbers.items() if key != "end"}
    cut = Tokens(tokens.ids[kept], tokens.learned[kept], tokens.labels[kept])
    return [Draft((cut,), numbers)] if cut.learned.any() else []


# --- a text, and the text to make of it -----------------------------------------------------------------------------


def _source_target(options: Seq2Seq) -> Callable[[Renderer, SourceTarget], list[Sketch]]:
    return lambda renderer, record: [Sketch((), {}, raw=(options.source_prefix + record.source, record.target))]


def _sources_targets(renderer: Renderer, sketches: list[Sketch]) -> Iterator[Draft]:
    """Two sequences each; of the second every token is learned, its end too."""
    tokenizer = renderer.tokenizer
    sources = tokenizer([sketch.raw[0] for sketch in sketches], truncation=False, verbose=False)["input_ids"]
    targets = tokenizer(text_target=[sketch.raw[1] for sketch in sketches], truncation=False, verbose=False)[
        "input_ids"
    ]
    end = tokenizer.eos_token_id
    for sketch, source, target in zip(sketches, sources, targets, strict=True):
        if end is not None and (not target or target[-1] != end):
            target = [*target, end]
        yield Draft(
            (
                Tokens(_array(source), np.zeros(len(source), bool), _array(source)),
                Tokens(_array(target), np.ones(len(target), bool), _array(target)),
            ),
            sketch.numbers,
        )


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)


def _both_cut(options: Seq2Seq) -> Callable[[Draft, int], list[Draft]]:
    def cut(row: Draft, max_length: int) -> list[Draft]:
        source, target = row.sequences
        return [Draft((_ended(source, max_length), _ended(target, options.max_target_length)), row.numbers)]

    return cut


def _ended(tokens: Tokens, length: int) -> Tokens:
    """Cut before the last token, which is the end token."""
    if len(tokens.ids) <= length:
        return tokens
    kept = np.r_[0 : length - 1, len(tokens.ids) - 1]
    labels = None if tokens.labels is None else tokens.labels[kept]
    return replace(tokens, ids=tokens.ids[kept], learned=tokens.learned[kept], labels=labels)
