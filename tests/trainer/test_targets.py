"""Classification and sequence-to-sequence before and in the step: labels, the tokenizer's own encoding, what is left
when a row is cut, and losses that are transformers' own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="needs the trainer extra")

import torch
import transformers

from finetune_api.causes import Cause
from finetune_api.stages import Seq2Seq
from finetune_trainer.data import collate, targets
from finetune_trainer.data.labels import MULTI, REGRESSION, SINGLE, TAGS, Labels, of_rows
from finetune_trainer.data.records import BadRowError, Labelled, SourceTarget, Tagged
from finetune_trainer.data.render import Renderer
from finetune_trainer.data.stream import IGNORED, Draft, Rows, Stream
from finetune_trainer.objectives import Objective, objective
from finetune_trainer.objectives.head import find_head
from finetune_trainer.outcome import RunError
from tests.trainer import tiny_heads
from tests.trainer.tiny import make_config

pytestmark = pytest.mark.trainer

NOWHERE = Path("/nonexistent")


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_are_found_sorted_and_numbered() -> None:
    labels = of_rows(["b", "a", "b", "c"], [], "auto", NOWHERE)
    assert labels == Labels(("a", "b", "c"), SINGLE)
    assert labels.number("b") == 1
    assert of_rows([10, 9, 2.0], [], "auto", NOWHERE).names == ("2", "9", "10")
    assert of_rows([True, False], [], "auto", NOWHERE).names == ("false", "true")
    several = of_rows([["b"], [], ["a", "b"]], [], "auto", NOWHERE)
    assert several == Labels(("a", "b"), MULTI)
    assert several.number(["b"]) == [0, 1]
    assert several.number("a") == [1, 0]
    assert of_rows([0.5, 1, 2.25], [], "auto", NOWHERE).problem_type == REGRESSION
    assert of_rows(["0.5", "1"], [], "auto", NOWHERE).number("0.5") == 0.5
    assert of_rows([0.5, 1], ["1", "0.5"], "auto", NOWHERE) == Labels(("1", "0.5"), SINGLE)


def test_listed_labels_keep_their_order_and_refuse_others() -> None:
    labels = of_rows([], ["no", "yes"], SINGLE, NOWHERE)
    assert labels.names == ("no", "yes")
    with pytest.raises(BadRowError, match="label is 'maybe'; accepted: one of no, yes"):
        labels.number("maybe")
    with pytest.raises(BadRowError, match="accepted: one label, as problem_type is single"):
        labels.number(["yes"])
    with pytest.raises(BadRowError, match="accepted: a number, as problem_type is regression"):
        Labels(("score",), REGRESSION).number("high")


def test_a_model_that_knows_the_labels_keeps_their_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "yes", "1": "no"}}))
    assert of_rows(["no", "yes"], [], "auto", tmp_path).names == ("yes", "no")
    assert of_rows(["no", "perhaps"], [], "auto", tmp_path).names == ("no", "perhaps")


def test_rows_that_say_nothing_to_learn_are_refused() -> None:
    with pytest.raises(RunError, match="one label only, 'a'") as error:
        of_rows(["a", "a"], [], "auto", NOWHERE)
    assert error.value.cause is Cause.INVALID_CONFIGURATION
    with pytest.raises(RunError, match=r"100 different labels.*problem_type: regression"):
        of_rows([f"id-{number}" for number in range(100)], [], "auto", NOWHERE)


# --- encoding ---------------------------------------------------------------------------------------------------------


def encoded(stage: str, family: str, records: list[Any], labels: Labels | None, length: int = 64, **more: Any) -> Any:
    """Drafts, and the tokenizer that made them."""
    config = make_config(NOWHERE, stage=stage, data={"max_length": max(16, length)}, **more)
    tokenizer = tiny_heads.make_tokenizer(family)
    encoding, renderer = targets.encoding(config, labels), Renderer(tokenizer)
    sketches = [sketch for record in records for sketch in encoding.sketch(renderer, record)]
    return [encoding.fit(row, length) for row in encoding.tokenise(renderer, sketches)], tokenizer


def words(tokenizer: Any, ids: np.ndarray) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


LABELS = Labels(("no", "yes"), SINGLE)


def test_pairs_are_put_together_by_the_tokenizer() -> None:
    rows = [Labelled("red cat", "the dog is", "yes"), Labelled("one", None, "no")]
    drafts, tokenizer = encoded("sequence_classification", "bert", rows, LABELS)
    [[pair], [single]] = drafts
    assert words(tokenizer, pair.sequences[0].ids) == "[CLS] red cat [SEP] the dog is [SEP]"
    assert words(tokenizer, single.sequences[0].ids) == "[CLS] one [SEP]"
    assert (pair.numbers["label"], single.numbers["label"]) == (1, 0)
    batch = batch_of([pair, single], "sequence_classification", "bert", LABELS)
    theirs = tokenizer("red cat", "the dog is")
    assert batch["input_ids"][0].tolist() == theirs["input_ids"]
    assert batch["token_type_ids"][0].tolist() == theirs["token_type_ids"]
    assert not batch["token_type_ids"][1].any()
    assert "position_ids" not in batch
    without = batch_of([pair, single], "sequence_classification", "distilbert", LABELS)
    assert "token_type_ids" not in without


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (8, "[CLS] one two three [SEP] red green [SEP]"),
        (7, "[CLS] one two [SEP] red green [SEP]"),
        (6, "[CLS] one [SEP] red green [SEP]"),
        (5, "[CLS] one [SEP] red [SEP]"),
    ],
)
def test_of_a_pair_the_longer_text_is_cut_and_special_tokens_stay(length: int, expected: str) -> None:
    rows = [Labelled("one two three four", "red green", "yes")]
    [[row]], tokenizer = encoded("sequence_classification", "bert", rows, LABELS, length)
    assert words(tokenizer, row.sequences[0].ids) == expected
    second = expected.split().index("[SEP]") + 1
    assert row.numbers["second"] == second


def test_a_row_of_which_no_text_is_left_is_dropped() -> None:
    drafts, _ = encoded("sequence_classification", "bert", [Labelled("one two", None, "yes")], LABELS, 2)
    assert drafts == [[]]


def test_the_first_token_of_a_word_carries_its_tag() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    raw = Tokenizer(
        models.WordPiece({"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "play": 3, "##ing": 4, "ann": 5}, unk_token="[UNK]")
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[SEP]")
    config = make_config(NOWHERE, stage="token_classification")
    encoding = targets.encoding(config, Labels(("B-PER", "O"), TAGS))
    renderer = Renderer(tokenizer)
    [sketch] = encoding.sketch(renderer, Tagged(["playing", "ann", "playing"], ["O", "B-PER", "O"]))
    [row] = encoding.tokenise(renderer, [sketch])
    [whole] = encoding.fit(row, 64)
    assert whole.sequences[0].ids.tolist() == [0, 3, 4, 5, 3, 4, 1]
    assert whole.sequences[0].labels.tolist() == [IGNORED, 1, IGNORED, 0, 1, IGNORED, IGNORED]
    [cut] = encoding.fit(row, 5)
    assert cut.sequences[0].ids.tolist() == [0, 3, 4, 5, 1]
    assert cut.sequences[0].labels.tolist() == [IGNORED, 1, IGNORED, 0, IGNORED]
    with pytest.raises(BadRowError, match="label is 'B-LOC'; accepted: one of B-PER, O"):
        encoding.sketch(renderer, Tagged(["ann"], ["B-LOC"]))


def test_a_slow_tokenizer_is_refused_for_words() -> None:
    config = make_config(NOWHERE, stage="token_classification")
    encoding = targets.encoding(config, Labels(("B-PER", "O"), TAGS))

    class Slow:
        is_fast = False

    renderer: Any = type("R", (), {"tokenizer": Slow()})()
    with pytest.raises(RunError, match="a fast tokenizer"):
        next(iter(encoding.tokenise(renderer, [])))


def test_sources_and_targets_end_and_are_cut_each_by_its_own_limit() -> None:
    options = {"seq2seq": Seq2Seq(source_prefix="say ", max_target_length=3).model_dump()}
    rows = [SourceTarget("one two three four five", "red green blue")]
    [[row]], tokenizer = encoded("seq2seq", "t5", rows, None, 4, **options)
    source, target = row.sequences
    assert words(tokenizer, source.ids) == "say one two </s>"
    assert words(tokenizer, target.ids) == "red green </s>"
    assert not source.learned.any()
    assert target.learned.all()
    batch = batch_of([row, row], "seq2seq", "t5", None)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"][0, :4].tolist() == [*target.ids.tolist(), IGNORED]


# --- losses -----------------------------------------------------------------------------------------------------------


def of_stage(stage: str, family: str, labels: Labels | None) -> Objective:
    return objective(make_config(NOWHERE, stage=stage), tiny_heads.make_tokenizer(family), labels)


def batch_of(rows: list[Draft], stage: str, family: str, labels: Labels | None) -> dict[str, Any]:
    stream = Stream([Rows.of("rows", rows)], [1.0], 0, False, 64, shuffle=False)
    made = of_stage(stage, family, labels)
    assert made.collate is not collate
    return made.prepare(made.collate([stream.item(0, number) for number in range(len(rows))], 0))


CASES: dict[str, tuple[str, str, list[Any], Labels | None]] = {
    "single": (
        "sequence_classification",
        "distilbert",
        [Labelled("red cat", None, "yes"), Labelled("one", None, "no"), Labelled("two dog is", None, "no")],
        LABELS,
    ),
    "pairs": (
        "sequence_classification",
        "bert",
        [Labelled("red cat", "one", "yes"), Labelled("one", "the dog", "no")],
        LABELS,
    ),
    "several": (
        "sequence_classification",
        "bert",
        [Labelled("red cat", None, ["a", "c"]), Labelled("one", None, [])],
        Labels(("a", "b", "c"), MULTI),
    ),
    "numbers": (
        "sequence_classification",
        "bert",
        [Labelled("red cat", None, 0.5), Labelled("one", None, -2)],
        Labels(("score",), REGRESSION),
    ),
    "roberta": (
        "sequence_classification",
        "roberta",
        [Labelled("red cat", "one", "yes"), Labelled("one", "the dog", "no")],
        LABELS,
    ),
    "words": (
        "token_classification",
        "bert",
        [Tagged(["red", "cat"], ["O", "B-A"]), Tagged(["one", "two", "dog"], ["O", "O", "B-A"])],
        Labels(("B-A", "O"), TAGS),
    ),
    "t5": ("seq2seq", "t5", [SourceTarget("red cat", "one two"), SourceTarget("one", "red green blue")], None),
    "bart": ("seq2seq", "bart", [SourceTarget("red cat", "one two"), SourceTarget("one", "red green blue")], None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_transformers_own(name: str, tmp_path: Path) -> None:
    from finetune_trainer.model import load_model

    stage, family, records, labels = CASES[name]
    tiny_heads.make(tmp_path, family)
    config = make_config(tmp_path, stage=stage, model={"uri": f"file://{tmp_path}"}, method={"type": "full"})
    model: Any = load_model(tmp_path, config, torch.device("cpu"), labels).eval()
    drafts, tokenizer = encoded(stage, family, records, labels)
    batch = batch_of([row for rows in drafts for row in rows], stage, family, labels)
    made = of_stage(stage, family, labels)
    if stage == "seq2seq":
        theirs = tokenizer([r.source for r in records], padding=True, return_tensors="pt")
        wanted = tokenizer([r.target for r in records], padding=True, return_tensors="pt").input_ids
        theirs["labels"] = wanted.masked_fill(wanted == tokenizer.pad_token_id, IGNORED)
    elif stage == "token_classification":
        words_of = [r.tokens for r in records]
        theirs = tokenizer(words_of, is_split_into_words=True, padding=True, return_tensors="pt")
        width = theirs["input_ids"].shape[1]
        theirs["labels"] = batch["labels"][:, :width].contiguous()
    else:
        second = [r.text_pair for r in records] if records[0].text_pair else None
        theirs = tokenizer([r.text for r in records], second, padding=True, return_tensors="pt")
        assert labels is not None
        given = [labels.number(r.label) for r in records]
        theirs["labels"] = torch.tensor(given, dtype=torch.float if labels.problem_type != SINGLE else torch.long)
    expected = model(**theirs).loss
    heads = [None, *([find_head(model)] if family == "t5" else [])]
    assert heads[-1] is not None or family != "t5"
    if family == "bart":
        assert find_head(model) is None, "it adds something behind its output layer, if only zeros"
    for head in heads:
        model.zero_grad()
        terms, _ = made.loss_sums(model, batch, head)
        loss = terms.sum() / made.weights(batch)[0]
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        loss.backward()
        ours = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        model(**theirs).loss.backward()
        other = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert float((ours - other).abs().max()) <= 1e-5


@pytest.mark.parametrize("prefix", [False, True])
def test_words_of_a_byte_level_tokenizer_stay_apart(prefix: bool) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    raw.train_from_iterator(["Ada visits Paris"] * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>"]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")
    encoding = targets.encoding(
        make_config(NOWHERE, stage="token_classification"), Labels(("B-LOC", "B-PER", "O"), TAGS)
    )
    renderer = Renderer(tokenizer)
    [sketch] = encoding.sketch(renderer, Tagged(["Ada", "visits", "Paris"], ["B-PER", "O", "B-LOC"]))
    [row] = encoding.tokenise(renderer, [sketch])
    [whole] = encoding.fit(row, 64)
    assert whole.sequences[0].ids.tolist() == tokenizer("Ada visits Paris").input_ids
    tagged = whole.sequences[0].labels
    assert tagged[tagged != IGNORED].tolist() == [1, 2, 0]
    [words] = np.nonzero(tagged != IGNORED)
    assert [tokenizer.decode(whole.sequences[0].ids[n]).strip()[:1] for n in words] == ["A", "v", "P"]
