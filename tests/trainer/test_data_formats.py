"""Converting rows: every mistake names the field, and says what is accepted."""

import pytest

from finetune_trainer.data.formats import alpaca, messages
from finetune_trainer.data.records import BadRowError


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
        (
            messages,
            {"messages": [user("a"), {"role": "assistant", "tool_calls": [1]}]},
            r"tool_calls\[0\] is 1; accept",
        ),
        (messages, {"messages": ["a"]}, r"messages\[0\] is a text"),
    ],
)
def test_a_bad_row_names_the_field_and_what_is_accepted(convert, row, complaint):
    with pytest.raises(BadRowError, match=complaint):
        convert(row)
