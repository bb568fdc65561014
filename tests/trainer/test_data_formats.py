"""Converting rows: every mistake names the field, and says what is accepted."""

import json

import pytest

from finetune_trainer.data.conversations import sharegpt
from finetune_trainer.data.fields import Cell
from finetune_trainer.data.formats import FORMATS, alpaca, messages
from finetune_trainer.data.records import BadRowError, Conversation, Judged, Preference, Prompt, accepts, as_kind


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
            r"messages\[0\].role is 'bot'; accepted: system, dev.*, tool; did you mean assistant\?$",
        ),
        (messages, {"messages": [{"role": "human", "content": "a"}]}, r"did you mean user\?$"),
        (messages, {"messages": [{"role": "Asistant", "content": "a"}]}, r"did you mean assistant\?$"),
        (messages, {"messages": [{"role": "narrator", "content": "a"}]}, r"user, assistant, tool$"),
        (sharegpt, {"conversations": [{"from": "Human", "value": "a"}]}, r"did you mean human\?$"),
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


# --- what a row says reaches the record -------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("convert", [messages, sharegpt])
def test_thoughts_are_kept_by_one_name(convert, name):
    field, turns = (
        ("messages", [user("a"), assistant("b") | {name: "hm"}])
        if convert is messages
        else ("conversations", [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", name: "hm"}])
    )
    assert said(convert, {field: turns})[-1] == assistant("b") | {"reasoning_content": "hm"}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": "0"}, {"weight": 0.0}, {"train": False}, {"loss": False},
                                  {"trainable": "false"}])  # fmt: skip
@pytest.mark.parametrize("convert", [messages, sharegpt])
def test_an_answer_is_kept_out_of_the_loss_by_any_of_the_known_marks(convert, mark):
    field, turns = (
        ("messages", [user("a"), assistant("b") | mark, user("c"), assistant("d") | {"weight": 1, "train": None}])
        if convert is messages
        else (
            "conversations",
            [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"} | mark,
             {"from": "human", "value": "c"}, {"from": "gpt", "value": "d", "loss": True}],
        )
    )  # fmt: skip
    assert [m.get("train", True) for m in said(convert, {field: turns}) if m["role"] == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("convert", "row"),
    [
        (messages, {"messages": [user("a"), assistant("b")]}),
        (FORMATS["prompt_completion"], {"prompt": "a", "completion": "b"}),
        (FORMATS["prompt"], {"prompt": [user("a")]}),
        (FORMATS["preference"], {"prompt": "a", "chosen": "b", "rejected": "c"}),
        (FORMATS["preference"], {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}),
        (FORMATS["kto"], {"prompt": [user("a")], "completion": "b", "label": True}),
        (FORMATS["ranked"], {"prompt": "a", "answers": ["b", "c"]}),
    ],
)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_functions_and_a_system_prompt_reach_the_record_of_every_format(convert, row, column):
    functions = [TOOL] if column == "tools" else json.dumps([TOOL["function"]])
    [record] = convert(row | {column: functions, "system": "s"})
    prompt = getattr(record, "prompt", None) or record.messages
    assert record.tools == [TOOL] and prompt[:2] == [{"role": "system", "content": "s"}, user("a")]
    for wanted in (Conversation, Prompt, Preference, Judged):
        if accepts(type(record), wanted):
            assert all(turned.tools == [TOOL] for turned in as_kind(record, wanted))


def test_two_system_prompts_are_refused():
    row = {"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b")]}
    assert said(messages, row | {"system": "s"}) == row["messages"]
    with pytest.raises(BadRowError, match="column system and another one"):
        messages(row | {"system": "t"})


TEXT = '["Rome", "Oslo"]'


@pytest.mark.parametrize(
    ("name", "row", "read"),
    [
        ("prompt_completion", {"prompt": "a", "completion": TEXT}, lambda r: r.messages[-1]["content"]),
        ("prompt", {"prompt": TEXT}, lambda r: r.messages[0]["content"]),
        ("preference", {"prompt": "a", "chosen": TEXT, "rejected": "c"}, lambda r: r.chosen[0]["content"]),
        ("kto", {"prompt": "a", "completion": TEXT, "label": False}, lambda r: r.completion[0]["content"]),
    ],
)
@pytest.mark.parametrize("kind", [str, Cell])
def test_a_text_that_is_json_is_a_text(name, row, read, kind):
    [record] = FORMATS[name]({key: kind(value) if value == TEXT else value for key, value in row.items()})
    assert read(record) == TEXT


def test_a_cell_may_hold_messages_as_json():
    cells = {"prompt": [user("a")], "completion": [assistant("b")]}
    [record] = FORMATS["prompt_completion"]({key: Cell(json.dumps(value)) for key, value in cells.items()})
    assert record.messages == [user("a"), assistant("b")]


SHARED = [user("a"), assistant("b"), user("c")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a"},
        {"prompt": " c "},
        {"prompt": [user("c")]},
        {"prompt": SHARED},
        {},
    ],
)
def test_a_prompt_beside_whole_conversations_is_not_asked_twice(row):
    sides = {"chosen": [*SHARED, assistant("d")], "rejected": [*SHARED, assistant("e")]}
    [record] = FORMATS["preference"](row | sides)
    assert (record.prompt, record.chosen, record.rejected) == (SHARED, [assistant("d")], [assistant("e")])


def test_answers_that_both_sides_share_belong_to_the_prompt():
    sides = {"chosen": [*SHARED[1:], assistant("d")], "rejected": [*SHARED[1:], assistant("e")]}
    [record] = FORMATS["preference"]({"prompt": "a"} | sides)
    assert (record.prompt, record.chosen, record.rejected) == (SHARED, [assistant("d")], [assistant("e")])


def test_a_prompt_that_whole_conversations_do_not_begin_with_is_refused():
    sides = {"chosen": [*SHARED, assistant("d")], "rejected": [*SHARED, assistant("e")]}
    with pytest.raises(BadRowError, match="prompt says 'x', which chosen and rejected do not begin with"):
        FORMATS["preference"]({"prompt": "x"} | sides)


def test_a_value_of_null_in_a_call_is_kept():
    call = {"function": {"name": "weather", "arguments": {"city": "Rome", "unit": None}}}
    [_, answer] = said(messages, {"messages": [user("a"), {"role": "assistant", "tool_calls": [call]}]})
    assert answer["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "unit": None}
