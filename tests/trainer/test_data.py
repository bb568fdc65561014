"""From files to streams: what is counted, cut, dropped, refused and cached."""

import json
import weakref

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the trainer extra")

from finetune_api.causes import Cause
from finetune_api.run import ENV_CACHE, ENV_WORK
from finetune_api.spec import DataSource
from finetune_trainer.data import prepare, source_names
from finetune_trainer.data.cache import Spool
from finetune_trainer.data.render import Tokens
from finetune_trainer.data.stream import Draft, Rows
from finetune_trainer.fetch import Fetched, fetch
from finetune_trainer.model import load_tokenizer
from finetune_trainer.outcome import RunError
from tests.trainer.tiny import make_config, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("data") / "model")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv(ENV_WORK, raising=False)
    monkeypatch.setenv(ENV_CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file://{path}"


def row(question, answer):
    return {"instruction": question, "output": answer}


def prepared(model, tmp_path, rows, **data):
    """Prepare rows written to train.jsonl."""
    uri = write(tmp_path / "train.jsonl", rows)
    data = {"train": [{"uri": uri}], "max_length": 16} | data
    config = make_config(tmp_path, model={"uri": f"file://{model}"}, data=data)
    return prepare(config, fetch(config, tmp_path / "cache"), load_tokenizer(model, config))


def test_a_tokenizer_that_cannot_be_read_is_told_whole(model, tmp_path):
    config = make_config(tmp_path, model={"uri": f"file://{model}"}, data={"train": [{"uri": "file:///rows.jsonl"}]})
    there = tmp_path / "model without a tokenizer"
    there.mkdir()
    (there / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(RunError, match=r"no file of one that transformers .* knows lies in it \(tokenizer\.json; or"):
        load_tokenizer(there, config)
    cut = (model / "tokenizer.json").read_text()[:1000]
    (there / "tokenizer.json").write_text(cut)
    with pytest.raises(RunError, match="one of its JSON files is cut off or damaged"):
        load_tokenizer(there, config)


def test_tokens_are_found_again_only_of_the_files_that_were_read(model, tmp_path, cache):
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in range(3):
        write(parts / f"part-{number}.jsonl", [row("red", f"blue {number}")] * 10)
    config = make_config(tmp_path, model={"uri": f"file://{model}"}, data={"train": [{"uri": parts.as_uri()}]})
    fetched = fetch(config, tmp_path / "cache")
    tokenizer = load_tokenizer(model, config)
    first = Fetched(fetched.model, [parts / "part-0.jsonl"], [], digests=fetched.digests)
    assert prepare(config, first, tokenizer).report["parts"]["rows"] == 10
    assert prepare(config, fetched, tokenizer).report["parts"]["rows"] == 30


def test_long_rows_are_cut_and_rows_without_an_answer_left_are_dropped_and_both_are_counted(model, tmp_path, cache):
    # the template writes: <user> … <end> <assistant> … <end>
    rows = [row("red", "blue"), row("red " * 9, "cat " * 9), row("red " * 12, "cat"), row("red " * 13, "cat")]
    made = prepared(model, tmp_path, rows)
    counts = made.report["train"]
    assert (counts["rows"], counts["sequences"], counts["truncated"], counts["dropped"]) == (4, 3, 3, 1)
    assert counts["longest"] == 9 + 9 + 4
    assert counts["tokens"] == 6 + 16 + 16
    assert counts["learned_tokens"] == 2 + 4 + 1
    assert max(len(made.train.item(0, index)) for index in range(3)) == 16


def test_sources_keep_their_order_names_and_weights(model, tmp_path, cache):
    first = write(tmp_path / "one.jsonl", [row("red", "blue")] * 4)
    (tmp_path / "b").mkdir()
    second = write(tmp_path / "b" / "one.jsonl", [row("cat", "dog")] * 3)
    made = prepared(
        model,
        tmp_path,
        [],
        train=[{"uri": first, "weight": 0.5}, {"uri": second, "weight": 2}],
        eval=[{"uri": second}],
    )
    assert made.train.items(0) == 2 + 6
    assert list(made.report) == ["one", "one-2", "eval/one"]
    assert list(made.eval) == ["one"]
    assert [made.eval["one"].item(0, index).rows for index in range(3)] == [((0, 0),), ((0, 1),), ((0, 2),)]


def test_names_of_sources():
    uris = ["hf://datasets/org/alpaca", "s3://b/p/alpaca.jsonl", "s3://b/alpaca/", "file:///x/y.v2.json"]
    assert source_names([DataSource(uri=uri) for uri in uris]) == ["alpaca", "alpaca-2", "alpaca-3", "y.v2"]


def test_several_bad_rows_are_named_at_once(model, tmp_path, cache):
    rows = [row("red", "blue"), {"instruction": "red"}, row("red", 3), row("cat", "dog")]
    with pytest.raises(RunError) as error:
        prepared(model, tmp_path, rows)
    assert error.value.cause is Cause.INVALID_DATA
    message = error.value.message
    assert "2 rows are not in the format 'alpaca': train.jsonl:2: output is missing" in message
    assert "train.jsonl:3: output is a number; accepted: a text" in message


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "holds no rows"),
        (
            [row("red " * 20, "blue")],
            r"begins after, or does not fit into, data.max_length \(16 tokens; the longest row has 25\)",
        ),
    ],
)
def test_nothing_to_learn_is_an_error_that_says_why(model, tmp_path, cache, rows, complaint):
    with pytest.raises(RunError, match=complaint) as error:
        prepared(model, tmp_path, rows)
    assert error.value.cause is Cause.INVALID_DATA


def test_a_tokenizer_of_another_model_is_refused(model, tmp_path, cache):
    small = tmp_path / "small"
    small.mkdir()
    for file in model.iterdir():
        (small / file.name).write_bytes(file.read_bytes())
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    with pytest.raises(RunError, match="but the model has embeddings for 0 to 7 only"):
        prepared(small, tmp_path, [row("red", "blue")])


def test_tokens_are_made_once_and_mapped_from_the_cache(model, tmp_path, cache, monkeypatch):
    rows = [row("red", "blue"), row("red " * 14, "cat")]
    first = prepared(model, tmp_path, rows)
    assert len(list((cache / "tokens").glob("*/ids.npy"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr("finetune_trainer.data._tokenize", lambda *_: pytest.fail("tokenised again"))
        again = prepared(model, tmp_path, rows)
    assert again.report == first.report
    assert (
        again.train.item(0, 0).sequences[0].input_ids.tolist() == first.train.item(0, 0).sequences[0].input_ids.tolist()
    )


@pytest.mark.parametrize("change", ["rows", "max_length", "chat_template"])
def test_another_content_is_another_entry_of_the_cache(model, tmp_path, cache, change):
    prepared(model, tmp_path, [row("red", "blue")])
    template = "{% for m in messages %}{{ m['content'] + ' <end> ' }}{% endfor %}"
    changes = {"max_length": {"max_length": 17}, "chat_template": {"chat_template": template}}
    prepared(model, tmp_path, [row("red", "cat" if change == "rows" else "blue")], **changes.get(change, {}))
    assert len(list((cache / "tokens").glob("*/ids.npy"))) == 2


def test_two_files_of_one_hub_repository_are_two_entries(model, tmp_path, cache):
    files = [write(tmp_path / f"{word}.jsonl", [row("say", word)]) for word in ("red", "blue")]
    learned = []
    for file in files:
        name = file.rpartition("/")[2]
        uri = f"hf://datasets/org/rows/{name}"
        config = make_config(tmp_path, model={"uri": f"file://{model}"}, data={"train": [{"uri": uri}]})
        fetched = Fetched(model, [tmp_path / name], [], {f"{uri}@main": "git:abc"})
        made = prepare(config, fetched, load_tokenizer(model, config))
        learned.append(made.train.item(0, 0).sequences[0].input_ids.tolist())
    assert learned[0] != learned[1]


def test_a_damaged_cache_entry_is_made_again(model, tmp_path, cache):
    first = prepared(model, tmp_path, [row("red", "blue")])
    [entry] = (cache / "tokens").glob("*/ids.npy")
    entry.write_bytes(entry.read_bytes()[:-4])
    assert prepared(model, tmp_path, [row("red", "blue")]).report == first.report


def test_a_cache_that_cannot_be_written_costs_time_only(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(ENV_CACHE, str(tmp_path / "file"))
    assert prepared(model, tmp_path, [row("red", "blue")]).report["train"]["sequences"] == 1


def test_while_a_source_is_read_its_tokens_leave_the_memory(cache):
    cache.mkdir()
    spool, held = Spool("rows"), []
    for first in (0, 10):
        part = Rows.of("rows", [Draft((Tokens(np.arange(first, first + 5, dtype=np.int32), np.arange(5) > 1),))])
        held += [weakref.ref(part.ids), weakref.ref(part.learned)]
        spool.add(part)
        del part
    assert [reference() for reference in held] == [None] * 4
    rows = spool.rows()
    assert rows.ids.tolist() == [*range(5), *range(10, 15)] and rows.starts.tolist() == [0, 5, 10]
    assert rows.learned.tolist() == [False, False, True, True, True] * 2
