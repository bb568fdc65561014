"""Reading rows: every mistake names file, line and field, and says what is accepted."""

import json
from pathlib import Path

import pytest

from finetune_api.causes import Cause
from finetune_trainer.data.files import read_rows
from finetune_trainer.data.formats import alpaca, messages
from finetune_trainer.data.records import BadRowError
from finetune_trainer.outcome import RunError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def said(convert, row):
    [record] = convert(row)
    assert record.fields == row
    return record.messages


def test_alpaca_with_everything():
    row = {
        "system": "Be short.",
        "history": [["Hi", "Hello"], ["你好", "您好"]],
        "instruction": "Translate",
        "input": "cat",
        "output": "猫",
    }
    assert said(alpaca, row) == [
        {"role": "system", "content": "Be short."},
        *(user("Hi"), assistant("Hello"), user("你好"), assistant("您好")),
        *(user("Translate\ncat"), assistant("猫")),
    ]


def test_alpaca_with_the_least():
    assert said(alpaca, {"instruction": "Hi", "output": "Hello"}) == [user("Hi"), assistant("Hello")]
    assert said(alpaca, {"instruction": "", "input": "Hi", "output": "Hello", "system": None}) == [
        user("Hi"),
        assistant("Hello"),
    ]


def test_messages_as_openai_writes_them():
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    given = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}, assistant("a") | {"weight": 0}]
    given += [user("b"), assistant("c"), user("left over")]
    assert said(messages, {"messages": given}) == [
        {"role": "system", "content": "s"},
        *(user("Hi there"), assistant("a") | {"train": False}, user("b"), assistant("c")),
    ]


@pytest.mark.parametrize(
    ("convert", "row", "complaint"),
    [
        (alpaca, {"instruction": "a"}, r"output is missing; accepted: a text \(the row has instruction\)"),
        (alpaca, {"instruction": "a", "output": ""}, "output is empty"),
        (alpaca, {"instruction": 3, "output": "a"}, "instruction is a number; accepted: a text"),
        (alpaca, {"instruction": "", "output": "a"}, "instruction is empty"),
        (
            alpaca,
            {"instruction": "a", "output": "b", "history": [["a"]]},
            r"history\[0\] is \['a'\]; accepted: \[question",
        ),
        (alpaca, {"instruction": "a", "output": "b", "history": "x"}, "history is a text"),
        (messages, {"text": "a"}, "messages is missing; accepted: a list"),
        (messages, {"messages": []}, r"messages is \[\]"),
        (
            messages,
            {"messages": [{"role": "bot", "content": "a"}]},
            r"messages\[0\].role is 'bot'; accepted: system, dev",
        ),
        (messages, {"messages": [user("a")]}, "no answer to learn"),
        (messages, {"messages": [user("a"), assistant(None)]}, r"messages\[1\].content is missing"),
        (messages, {"messages": [user("a"), {"role": "assistant", "tool_calls": [1]}]}, "tool calls, which are not"),
        (messages, {"messages": ["a"]}, r"messages\[0\] is a text"),
    ],
)
def test_a_bad_row_names_the_field_and_what_is_accepted(convert, row, complaint):
    with pytest.raises(BadRowError, match=complaint):
        convert(row)


def lines(path: Path, split: str = "") -> list[tuple[str, dict]]:
    return [(str(place), row) for place, row in read_rows(path, split)]


def test_jsonl_with_blank_lines_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"a": "é"}\n\n{"a": 2}'.encode())
    assert lines(file) == [("a.jsonl:1", {"a": "é"}), ("a.jsonl:3", {"a": 2})]


def test_json_lists_know_the_line_of_each_row(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"a": [1]}, {"a": 2}], indent=2))
    assert lines(file) == [("a.json:2", {"a": [1]}), ("a.json:7", {"a": 2})]


def test_json_lines_under_the_name_json(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}\n{"a": 2}\n')
    assert lines(file) == [("a.json:1", {"a": 1}), ("a.json:2", {"a": 2})]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"instruction": ["a", "b"], "output": ["c", "d"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert lines(tmp_path)[1] == ("a.parquet:2", {"instruction": "b", "output": "d"})


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name in ("b.jsonl", "a.json", ".hidden.jsonl", "README.md"):
        (tmp_path / name).write_text(f'{{"from": "{name}"}}')
    assert [row["from"] for _, row in lines(tmp_path)] == ["a.json", "b.jsonl"]


def test_the_split_of_a_hub_data_set(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f'{{"a": "{split} 1"}}\n{{"a": "{split} 2"}}\n')
    assert lines(tmp_path, "test") == [("split test:1", {"a": "test 1"}), ("split test:2", {"a": "test 2"})]
    with pytest.raises(RunError, match="split 'nope' of the data set cannot be read"):
        lines(tmp_path, "nope")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not JSON \(Expecting value"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: the row is a list; accepted: an object"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', r"a\.json:2: not JSON"),
        ("a.json", b'[{"a": 1},\n', r"a\.json:3?2?: the list is not closed"),
        ("a.parquet", b"nonsense", r"a\.parquet:1: not a parquet file"),
        ("a.txt", b"", r"a\.txt is no data file; accepted: names that end in \.jsonl"),
    ],
)
def test_a_broken_file_names_the_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=complaint) as error:
        lines(tmp_path / name)
    assert error.value.cause is Cause.INVALID_DATA
