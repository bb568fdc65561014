"""Several sources together: shares, repetitions, held-out rows among the training rows."""

import json
import random

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the trainer extra")

from finetune_api.run import ENV_CACHE
from finetune_trainer.data import prepare
from finetune_trainer.data.contamination import LENGTH, seen
from finetune_trainer.data.duplicates import Duplicates, minima
from finetune_trainer.data.records import Conversation, Text
from finetune_trainer.data.render import Tokens
from finetune_trainer.data.stream import Draft, Rows
from finetune_trainer.fetch import fetch
from finetune_trainer.model import load_tokenizer
from tests.trainer.tiny import WORDS, make_config, make_model


def words(count, seed):
    return random.Random(seed).choices([f"word{number}" for number in range(5000)], k=count)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_minima_estimate_what_two_texts_have_in_common(share):
    text = words(600, 1)
    other = text[: round(600 * share)] + words(600 - round(600 * share), 2)
    sets = [{tuple(t[n : n + 3]) for n in range(len(t) - 2)} for t in (text, other)]
    true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    estimate = float((minima(" ".join(text)) == minima(" ".join(other))).mean())
    assert estimate == pytest.approx(true, abs=0.12)  # three deviations of 128 draws


def test_exact_repetitions_differ_in_white_space_only():
    known = Duplicates("exact", 0.8)
    given = ["a b", "a  b\n", "a c", "A b"]
    assert [known.repeats(Text(text)) for text in given] == [False, True, False, False]


def test_near_repetitions_share_most_of_their_word_sequences():
    text, other = words(200, 3), words(200, 4)
    known = Duplicates("near", 0.8)
    assert not known.repeats(Text(" ".join(text)))
    assert not known.repeats(Text(" ".join(other)))
    assert known.repeats(Text(" ".join([*text[:100], "else", *text[101:]])))  # 3 of 198 sequences differ
    assert not known.repeats(Text(" ".join([*text[:100], *words(100, 5)])))
    chinese = "春天来了，花园里的花都开了，孩子们在草地上奔跑，老人们坐在长椅上聊天，享受着温暖的阳光。"
    assert not known.repeats(Text(chinese))
    assert known.repeats(Text(chinese.replace("聊天", "下棋"))) is False  # 4 of 36: 0.78 < 0.8
    assert known.repeats(Text(chinese + "是"))


def test_a_system_prompt_that_all_rows_share_makes_no_duplicates():
    known = Duplicates("near", 0.8)
    system = {"role": "system", "content": " ".join(words(300, 6))}
    for number in range(20):
        turns = [{"role": "user", "content": f"what is {number}"}, {"role": "assistant", "content": f"it is {number}"}]
        assert not known.repeats(Conversation([system, *turns]))


def rows_of(*sequences):
    return Rows.of("x", [Draft((Tokens(np.array(s, np.int32), np.ones(len(s), bool)),)) for s in sequences])


def test_held_out_rows_that_stand_in_the_training_rows_are_found():
    draw = np.random.default_rng(0)
    text = draw.integers(0, 9999, 400)
    template = draw.integers(0, 9999, 30)
    held_out = [draw.integers(0, 9999, 60) for _ in range(20)]
    held_out[3] = text[100:160]
    held_out[4] = np.concatenate([text[200:230], held_out[4][:30]])  # half
    held_out[5] = np.concatenate([text[300:320], held_out[5][:40]])  # a third
    held_out[6] = np.array([7, 8, 9])
    training = [rows_of(text[:170], text[170:]), rows_of([7, 8, 9], np.concatenate([template, [1] * 20]))]
    with_template = [np.concatenate([template, row]) if len(row) > LENGTH else row for row in held_out]
    found = seen(rows_of(*held_out), training)
    assert np.flatnonzero(found).tolist() == [3, 6]
    assert np.flatnonzero(seen(rows_of(*with_template), training)).tolist() == [3, 6]
    assert not seen(rows_of([]), training).any()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("mixing") / "model")


def prepared(model, tmp_path, sources, **data):
    for name, answers in sources.items():
        rows = [{"instruction": "say", "output": answer} for answer in answers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [{"uri": f"file://{tmp_path}/{name}.jsonl"} for name in sources if name != "eval"]
    held_out = [{"uri": f"file://{tmp_path}/eval.jsonl"}] if "eval" in sources else []
    config = make_config(tmp_path, model={"uri": f"file://{model}"}, data={"train": train, "eval": held_out, **data})
    return prepare(config, fetch(config, tmp_path / "cache"), load_tokenizer(model, config))


def test_repetitions_are_left_out_over_all_sources_also_where_one_comes_from_the_cache(model, tmp_path, monkeypatch):
    monkeypatch.setenv(ENV_CACHE, str(tmp_path / "cache"))
    one, two = ["red", "blue", "red"], ["blue", "green", "cat", "dog"]
    expected = {"one": (1, 2), "two": (1, 3)}
    for _ in range(2):
        made = prepared(model, tmp_path, {"one": one, "two": two}, deduplication="exact")
        assert {n: (c["duplicates"], c["sequences"]) for n, c in made.report.items()} == expected
    two.append("red")  # made anew; the first source comes from the cache
    made = prepared(model, tmp_path, {"one": one, "two": two}, deduplication="exact")
    assert made.report["two"]["duplicates"] == 2


@pytest.mark.parametrize(
    ("data", "items"),
    [
        ({}, [40, 10]),
        ({"temperature": 1e6}, [40, 40]),
        ({"temperature": 2}, [40, 20]),
        ({"temperature": 2, "stopping_strategy": "first_exhausted"}, [20, 10]),
        ({"stopping_strategy": "first_exhausted"}, [40, 10]),
    ],
)
def test_temperature_evens_out_sources_of_different_sizes(model, tmp_path, monkeypatch, data, items):
    monkeypatch.setenv(ENV_CACHE, str(tmp_path / "cache"))
    made = prepared(model, tmp_path, {"one": [f"{w} red" for w in WORDS] + ["cat"] * 3, "two": ["dog"] * 10}, **data)
    assert len(made.train.rows[0]) == 40
    places = [made.train.item(0, index).rows[0][0] for index in range(made.train.items(0))]
    assert [places.count(0), places.count(1)] == items


def test_contaminated_rows_are_counted_and_told(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(ENV_CACHE, str(tmp_path / "cache"))
    draw = random.Random(0)
    answers = [" ".join(draw.choices(WORDS, k=24)) for _ in range(30)]
    sources = {"one": answers[:20], "eval": answers[18:]}
    made = prepared(model, tmp_path, sources)
    assert made.report["eval/eval"]["contaminated"] == 2
    assert "2 of 12 held-out rows stand in the training rows" in caplog.text
    assert "contaminated" not in prepared(model, tmp_path, sources, check_contamination=False).report["eval/eval"]
