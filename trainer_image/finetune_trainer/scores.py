"""How good predictions are: figures from counts that add up over batches and processes. Pure numpy.

Every kind of score is a pair of functions: one counts what a batch shows, the other makes figures of the sum of all
counts. They give the numbers of the libraries that define them: scikit-learn (accuracy, F1, Matthews), scipy
(Pearson, Spearman), seqeval (entities), sacrebleu (BLEU, tokenizer 13a), rouge-score (ROUGE without stemming).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

Figures = dict[str, float]


def _ratio(above: float, below: float) -> float:
    return float(above) / float(below) if below else 0.0


def _f1(hits: float, given: float, wanted: float) -> float:
    """Of hits, all that were given (predicted), and all that were wanted."""
    return _ratio(2 * hits, given + wanted)


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; of a loss beyond all floats the largest that is one."""
    return math.exp(min(loss, 700.0))


# --- one label of several ---------------------------------------------------------------------------------------


def confusion(wanted: np.ndarray, given: np.ndarray, labels: int) -> np.ndarray:
    """int64 (K, K): how often label i was predicted as j. ``wanted`` and ``given``: (N,) numbers of labels."""
    return np.bincount(wanted.astype(np.int64) * labels + given, minlength=labels * labels).reshape(labels, labels)


def of_confusion(matrix: np.ndarray) -> Figures:
    """accuracy, f1_macro, f1_micro and mcc (Matthews' correlation) of a confusion matrix; f1 too for two labels.

    f1 is that of the second label, as scikit-learn's ``average="binary"``. Labels that are neither wanted nor given
    do not count in f1_macro.
    """
    counts = matrix.astype(np.float64)
    hits, wanted, given, total = counts.diagonal(), counts.sum(1), counts.sum(0), counts.sum()
    each = [_f1(*three) for three in zip(hits, given, wanted, strict=True)]
    there = [f1 for f1, one, other in zip(each, wanted, given, strict=True) if one or other]
    root = math.sqrt(total**2 - (given**2).sum()) * math.sqrt(total**2 - (wanted**2).sum())
    figures = {
        "accuracy": _ratio(hits.sum(), total),
        "f1_macro": _ratio(sum(there), len(there)),
        "f1_micro": _ratio(hits.sum(), total),
        "mcc": _ratio(hits.sum() * total - (wanted * given).sum(), root),
    }
    return figures | ({"f1": each[1]} if len(each) == 2 else {})


# --- any number of labels ---------------------------------------------------------------------------------------


def overlaps(wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """int64 (K + 1, 3): hits, given and wanted of every label, then [rows all right, rows, 0].

    ``wanted`` and ``given``: bool (N, K).
    """
    each = np.stack([(wanted & given).sum(0), given.sum(0), wanted.sum(0)], 1)
    exact = [int((wanted == given).all(1).sum()), len(wanted), 0]
    return np.concatenate([each, [exact]]).astype(np.int64)


def of_overlaps(counts: np.ndarray) -> Figures:
    """accuracy (all labels of a row right), f1_micro and f1_macro."""
    each, (exact, rows, _) = counts[:-1], counts[-1]
    return {
        "accuracy": _ratio(exact, rows),
        "f1_micro": _f1(*each.sum(0)),
        "f1_macro": _ratio(sum(_f1(*three) for three in each), len(each)),
    }


# --- numbers ----------------------------------------------------------------------------------------------------


def of_numbers(wanted: np.ndarray, given: np.ndarray) -> Figures:
    """mse, mae, pearson and spearman of (N,) numbers."""
    error = given.astype(np.float64) - wanted
    return {
        "mse": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
        "pearson": _correlation(wanted.astype(np.float64), given.astype(np.float64)),
        "spearman": _correlation(_ranks(wanted), _ranks(given)),
    }


def _correlation(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left - left.mean(), right - right.mean()
    return _ratio((left * right).sum(), math.sqrt((left**2).sum() * (right**2).sum()))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Places in order, the mean of them where values are equal."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


# --- entities ---------------------------------------------------------------------------------------------------


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, last) of every entity in a row of IOB tags, as seqeval reads them: an I- without a B- before it,
    or of another type, begins one too."""
    found: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        inside = prefix == "I" and name == kind
        if kind and not inside:
            found.add((kind, start, place - 1))
            kind = ""
        if prefix in ("B", "I") and not inside:
            kind, start = name, place
    return found


def entity_counts(wanted: Sequence[str], given: Sequence[str], kinds: Sequence[str]) -> np.ndarray:
    """int64 (K, 3): hits, given and wanted entities of one row, for every type."""
    theirs, ours = entities(wanted), entities(given)
    each = (theirs & ours, ours, theirs)
    return np.array([[sum(e[0] == kind for e in part) for part in each] for kind in kinds], np.int64).reshape(-1, 3)


def of_entities(counts: np.ndarray, kinds: Sequence[str]) -> Figures:
    """precision, recall and f1 over all entities, f1_macro, and f1_TYPE of every type."""
    hits, given, wanted = counts.sum(0)
    each = {kind: _f1(*three) for kind, three in zip(kinds, counts, strict=True)}
    return {
        "precision": _ratio(hits, given),
        "recall": _ratio(hits, wanted),
        "f1": _f1(hits, given, wanted),
        "f1_macro": _ratio(sum(each.values()), len(each)),
        **{f"f1_{kind}": f1 for kind, f1 in each.items()},
    }


# --- texts ------------------------------------------------------------------------------------------------------

ROUGE = ("rouge1", "rouge2", "rougeL")
_ORDER = 4


def text_counts(wanted: str, given: str) -> np.ndarray:
    """float64 (3 + 2 · 4 + 4,): ROUGE-1, -2 and -L of one pair of texts; hits and n-grams of the given text for BLEU,
    n from 1 to 4; the lengths of both in words; 1 where both are equal; 1."""
    left, right = _rouge_words(wanted), _rouge_words(given)
    rouge = [_f1(*_common(left, right, n)) for n in (1, 2)]
    rouge.append(_f1(_longest_common(left, right), len(right), len(left)))
    theirs, ours = bleu_words(wanted), bleu_words(given)
    grams = [_common(theirs, ours, n)[:2] for n in range(1, _ORDER + 1)]
    flat = [value for pair in grams for value in pair]
    return np.array([*rouge, *flat, len(theirs), len(ours), wanted.strip() == given.strip(), 1], np.float64)


def of_texts(counts: np.ndarray) -> Figures:
    """rouge1, rouge2, rougeL (mean F1 of the rows), bleu (of the corpus, 0 to 100) and exact_match."""
    rows = counts[-1]
    figures = {name: _ratio(value, rows) for name, value in zip(ROUGE, counts[:3], strict=True)}
    return figures | {"bleu": _bleu(counts), "exact_match": _ratio(counts[-2], rows)}


def _bleu(counts: np.ndarray) -> float:
    """sacrebleu's: geometric mean of the precisions, halved ones for none ("exp" smoothing), times the brevity
    penalty."""
    wanted, given = counts[-4], counts[-3]
    logs, halves = [], 1.0
    for hits, total in counts[3:-4].reshape(_ORDER, 2):
        if not total:
            break
        if not hits:
            halves *= 2
        logs.append(math.log(hits / total if hits else 1 / (halves * total)))
    if not given or not counts[3]:
        return 0.0
    brevity = 1.0 if given >= wanted else math.exp(1 - wanted / given)
    return 100 * brevity * math.exp(sum(logs) / _ORDER) if len(logs) == _ORDER else 0.0


def _common(wanted: list[str], given: list[str], n: int) -> tuple[int, int, int]:
    """n-grams in both, of the given, of the wanted."""
    left, right = (Counter(zip(*(words[k:] for k in range(n)), strict=False)) for words in (wanted, given))
    return sum((left & right).values()), sum(right.values()), sum(left.values())


def _longest_common(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        before = 0
        for place, other in enumerate(right, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def _rouge_words(text: str) -> list[str]:
    """rouge-score's words; those of other scripts than Latin count too, each Chinese or Japanese character by
    itself, where rouge-score sees nothing at all."""
    return re.findall(r"[a-z0-9]+|[㐀-鿿豈-﫿぀-ヿ]|[^\W_a-z0-9㐀-鿿豈-﫿぀-ヿ]+", text.lower())


def bleu_words(text: str) -> list[str]:
    """mteval-v13a's words, as sacrebleu's ``tokenize="13a"``; Chinese and Japanese characters by themselves, as its
    ``tokenize="zh"``."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, plain in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, plain)
    text = re.sub(r"([㐀-鿿豈-﫿぀-ヿ＀-￯　-〿])", r" \1 ", f" {text} ")
    text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", text)
    text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)
    text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()
