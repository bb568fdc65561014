"""Every format: the rows of its golden file, the records they give, and what of them is learned.

``data_golden/NAME.jsonl`` (or .txt) is the file, ``NAME.expected.json`` what must come of it. After a change that is
meant, ``UPDATE_GOLDEN=1 pytest tests/trainer/test_data_golden.py`` writes them anew; read the difference.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("transformers", reason="needs the trainer extra")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api import formats as api
from finetune_api.spec import CHAT_TEMPLATES, DataFormat, DataSource
from finetune_trainer.data.encode import document, judged, preference
from finetune_trainer.data.formats import FORMATS, TABLE
from finetune_trainer.data.recognise import UnknownFormatError, recognise
from finetune_trainer.data.records import (
    KIND_NAMES,
    BadRowError,
    Conversation,
    Judged,
    Labelled,
    Preference,
    Prompt,
    Ranked,
    SourceTarget,
    Tagged,
    Text,
    accepts,
    as_kind,
)
from finetune_trainer.data.render import Renderer
from finetune_trainer.data.sources import BadRows, records
from finetune_trainer.outcome import RunError
from finetune_trainer.templates import TEMPLATES
from tests.trainer.test_data_render import byte_level, learned
from tests.trainer.tiny import ROOT

GOLDEN = Path(__file__).parent / "data_golden"
FILES = {path.name.partition(".")[0]: path for path in GOLDEN.iterdir() if ".expected" not in path.name}


def test_every_format_has_a_golden_file_and_every_template_a_name() -> None:
    assert set(FORMATS) | {"auto"} == set(get_args(DataFormat))
    assert set(FILES) == set(FORMATS)
    assert set(TEMPLATES) == set(CHAT_TEMPLATES)


def test_the_api_knows_what_each_format_gives() -> None:
    assert {name: entry.kind.__name__ for name, entry in TABLE.items()} == api.FORMATS
    kinds = {kind.__name__: kind for kind in KIND_NAMES}
    for wanted, serving in api.SERVES.items():
        assert {name for name, kind in kinds.items() if accepts(kind, kinds[wanted])} == set(serving)


def read(name: str, wanted: type | None = None, form: str = "auto", **more: Any) -> tuple[list[Any], dict[str, Any]]:
    source = DataSource(uri=FILES[name].as_uri(), format=form, **more)  # type: ignore[arg-type]
    counts: dict[str, Any] = {"rows": 0, "unused": 0}
    bad = BadRows(source.uri, 0)
    found = [record for _, _, record in records(source, FILES[name], wanted or TABLE[name].kind, bad, counts)]
    bad.close()
    return found, counts


def sketched(renderer: Renderer, record: Any) -> list[list[str]]:
    """The words learned of a record, by sequence."""
    sketches = {
        Text: document,
        Conversation: lambda r, record: [type("S", (), {"texts": r.render(record)})],
        Preference: preference,
        Judged: judged,
    }.get(type(record), lambda *_: [])(renderer, record)
    tokenizer = renderer.tokenizer
    return [
        learned(tokenizer, tokens)  # type: ignore[arg-type]
        for sketch in sketches
        for tokens in renderer.encode(list(sketch.texts))
    ]


def plain(record: Any) -> dict[str, Any]:
    return {"kind": type(record).__name__} | {k: v for k, v in vars(record).items() if k != "fields" and v != []}


@pytest.mark.parametrize("name", FORMATS)
def test_auto_recognises_the_file_and_its_rows_say_what_is_expected(name: str) -> None:
    found, counts = read(name)
    assert counts["format"] == name
    assert [plain(record) for record in read(name, form=name)[0]] == [plain(record) for record in found]
    renderer = Renderer(byte_level(TEMPLATES["qwen"].jinja))
    told = []
    for record in found:
        told.append(plain(record))
        parts = as_kind(record, Preference) if isinstance(record, Ranked) else [record]
        mask = [row for part in parts for row in sketched(renderer, part)]
        if mask:
            told[-1]["learned"] = mask
    document = {"rows": counts["rows"], "unused": counts["unused"], "records": told}
    path = GOLDEN / f"{name}.expected.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    assert document == json.loads(path.read_text())


@pytest.mark.parametrize("name", [n for n, f in TABLE.items() if accepts(f.kind, Conversation)])
def test_auto_finds_the_same_where_conversations_are_learned(name: str) -> None:
    assert read(name, Conversation)[1]["format"] == name


# --- columns and auto -------------------------------------------------------------------------------------------


def test_columns_of_other_names_are_renamed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,reply,input\nHi,Hello!,x\n")
    names = {"question": "instruction", "reply": "output", "input": "unused"}
    source = DataSource(uri=(tmp_path / "a.csv").as_uri(), columns=names)
    counts: dict[str, Any] = {"rows": 0, "unused": 0}
    [(place, row, record)] = records(source, tmp_path / "a.csv", Conversation, BadRows("", 0), counts)
    assert counts["format"] == "alpaca" and str(place) == "a.csv:2"
    assert row == {"instruction": "Hi", "output": "Hello!", "unused": "x"}
    assert [message["content"] for message in record.messages] == ["Hi", "Hello!"]


@pytest.mark.parametrize(
    ("rows", "wanted", "found"),
    [
        # of published data sets
        ([{"instruction": "a", "output": "b", "text": "### Instruction:\na\n\n### Response:\nb"}], Text, "text"),
        ([{"instruction": "a", "output": "b", "text": "### Instruction:\na### Response:\nb"}], Conversation, "alpaca"),
        ([{"prompt": "a", "prompt_id": "1", "messages": [{"role": "user", "content": "a"}]}], Conversation, "messages"),
        ([{"prompt": "a", "messages": [], "chosen": [1], "rejected": [2]}], Preference, "preference"),
        ([{"prompt": "a", "completion": "b", "label": True}], Judged, "kto"),
        ([{"prompt": "a", "completion": "b", "label": True}], Conversation, "kto"),
        ([{"text": "a", "label": 1}], Labelled, "labelled"),
        ([{"text": "a", "label": 1}], Text, "text"),
        ([{"prompt": "a", "answer": "b"}], Prompt, "prompt"),
        ([{"messages": [{"role": "user"}], "text": "x"}], Conversation, "messages"),
        ([{"x": 1}, {"text": "a"}, {"text": "b"}], Text, "text"),
    ],
)  # fmt: skip
def test_of_several_that_fit_the_stage_chooses(rows: list[dict[str, Any]], wanted: type, found: str) -> None:
    assert recognise(rows, wanted) == found


def test_what_could_be_two_things_is_refused_with_both() -> None:
    row = {"instruction": "a", "output": "b", "messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(UnknownFormatError, match=r"could be read as alpaca or as messages\. Set format to one"):
        recognise([row], Conversation)


def test_what_is_nothing_is_refused_with_all_formats_and_the_remedy() -> None:
    with pytest.raises(
        UnknownFormatError, match=r"columns q, r.*Set format, and columns.*alpaca \(instruction, output"
    ):
        recognise([{"q": "a", "r": "b"}], Conversation)


def test_rows_of_another_kind_than_the_stage_learns_from_are_refused_with_what_fits() -> None:
    with pytest.raises(
        RunError, match=r"format text, which gives texts; this stage learns from compared answers.*hh_rl"
    ):
        read("text", Preference)


def test_ranked_answers_give_all_pairs_or_the_best_one() -> None:
    [best, second], _ = read("ranked", Conversation)
    assert best.messages[-1]["content"] == "Seven." and second.messages[-1]["content"] == "好"
    pairs, _ = read("ranked", Preference)
    assert [(p.chosen[0]["content"], p.rejected[0]["content"]) for p in pairs] == [
        *(("Seven.", "A number."), ("Seven.", "No."), ("A number.", "No.")),
        *(("好", "差"), ("好极了", "差")),  # equal scores decide nothing between themselves
    ]


# --- nothing but records or a BadRowError -----------------------------------------------------------------------

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_WORDS = st.sampled_from(
    [
        *("", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", "[Round 0]\n问：a\n答：b", "[Round 1]"),
        *(
            "答：",
            "### Instruction: a ### Response: b",
            "### Input: x",
            "<|im_start|>",
            "nan",
            "true",
            "{}",
            "[]",
            "[[",
        ),
        *("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb", '{"name": "f", "arguments": {}}', '[{"name": 3}]'),
    ]
)
_KEYS = st.sampled_from(
    [
        *("role", "content", "from", "value", "text", "replies", "rank", "name", "arguments", "function", "tool_calls"),
        *("weight", "type", "deleted"),
    ]
)
_ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "prompter"])
_MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": _ROLES, "from": _ROLES, "content": _WORDS | _SCALARS, "value": _WORDS, "weight": st.just(0)}
)
_VALUES = st.recursive(
    _SCALARS | _WORDS,
    lambda inner: st.lists(inner | _MESSAGE, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_row_gives_valid_records_or_a_clear_complaint(name: str, data: st.DataObject) -> None:
    entry = TABLE[name]
    columns = dict.fromkeys((*entry.needs, *entry.knows), _VALUES)
    row = data.draw(st.fixed_dictionaries({}, optional=columns | {"other": _SCALARS}))
    try:
        made = entry.convert(row)
    except BadRowError as error:
        assert "accepted: " in str(error), error
        return
    for record in made:
        assert isinstance(record, entry.kind)
        valid(record)
        for kind in (Conversation, Prompt, Preference, Judged, SourceTarget):
            if accepts(type(record), kind):
                for turned in as_kind(record, kind):
                    valid(turned)


def valid(record: Any) -> None:
    """What the stages rely on."""
    match record:
        case Text():
            assert record.text.strip()
        case Conversation():
            said(record.messages)
            assert record.messages[-1]["role"] == "assistant"
            assert all(isinstance(tool.get("function"), dict) for tool in record.tools)
        case Prompt():
            said(record.messages)
        case Preference():
            for part in (record.prompt, record.chosen, record.rejected):
                said(part)
            assert record.chosen != record.rejected and record.prompt
            assert record.chosen[-1]["role"] == record.rejected[-1]["role"] == "assistant"
        case Ranked():
            assert record.ranks == sorted(record.ranks) and len(record.ranks) == len(record.answers) > 0
        case Judged():
            said(record.prompt)
            assert record.completion[-1]["role"] == "assistant" and isinstance(record.desirable, bool)
        case Labelled():
            assert record.text.strip() and record.label is not None
        case Tagged():
            assert len(record.tokens) == len(record.tags) > 0
        case SourceTarget():
            assert isinstance(record.source, str) and record.target.strip()


def said(messages: list[dict[str, Any]]) -> None:
    assert messages
    for message in messages:
        assert message["role"] in ("system", "developer", "user", "assistant", "tool")
        assert isinstance(message["content"], str)
        for call in message.get("tool_calls", []):
            assert isinstance(call["function"]["name"], str) and isinstance(call["function"]["arguments"], dict)


# --- the documentation ------------------------------------------------------------------------------------------

_EXAMPLES = re.findall(r"^```json (\w+)\n(.*?)^```$", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_documentation_shows_every_format() -> None:
    assert {name for name, _ in _EXAMPLES} == set(FORMATS)


@pytest.mark.parametrize(("name", "text"), _EXAMPLES, ids=[name for name, _ in _EXAMPLES])
def test_the_rows_of_the_documentation_are_what_it_says(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    source = DataSource(uri=(tmp_path / "rows.jsonl").as_uri())
    counts: dict[str, Any] = {"rows": 0, "unused": 0}
    bad = BadRows(source.uri, 0)
    found = [record for _, _, record in records(source, tmp_path / "rows.jsonl", TABLE[name].kind, bad, counts)]
    bad.close()
    assert counts["format"] == name and len(found) == counts["rows"] == len(text.splitlines())
