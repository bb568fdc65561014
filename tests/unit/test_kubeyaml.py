"""YAML as kubectl reads it. What kubectl makes of each of these is asked of kubectl in tests/cluster_api."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api import crd
from finetune_api.kubeyaml import Dumper, load

SCALARS: dict[str, Any] = {
    **dict.fromkeys(["y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"], True),
    **dict.fromkeys(["!!bool yes", "!!bool 'on'"], True),
    **dict.fromkeys(["n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"], False),
    **{word: word for word in ["yES", "tRUE", "oN", "nO", "fALSE", "oFF", "nULL"]},
    **dict.fromkeys(("", "~", "null", "Null", "NULL", "!!null ~"), None),
    "0": 0,
    "-0": 0,
    "+1": 1,
    "-1": -1,
    "1_000": 1000,
    "1__0": 10,
    "1_": 1,
    "00": 0,
    "017": 15,
    "0o17": 15,
    "0O17": 15,
    "-017": -15,
    "0_17": 15,
    "08": 8,
    "0888": 888,
    "09.5": 9.5,
    "0x1F": 31,
    "-0x1f": -31,
    "0b11": 3,
    "-0b11": -3,
    "0B11": 3,
    "0x_f": 15,
    "0xg": "0xg",
    "0b2": "0b2",
    "0o8": "0o8",
    "_1": "_1",
    "--1": "--1",
    "1,000": "1,000",
    "1.2.3": "1.2.3",
    "0x1p-2": "0x1p-2",
    "1e3": 1000,
    "1E+3": 1000,
    "1e-3": 1e-3,
    "2e-4": 2e-4,
    "1.": 1,
    ".5": 0.5,
    "-.5": -0.5,
    "+.5": 0.5,
    ".5e3": 500,
    ".1_0": 0.1,
    ".1__0": ".1__0",
    ".": ".",
    "1e": "1e",
    ".e3": ".e3",
    "1.0": 1,
    "1_0.5": 10.5,
    "1e999": "1e999",
    ".5e999": ".5e999",
    "1e-999": 0,
    "1e22": 1e22,
    "9223372036854775807": 2**63 - 1,
    "9223372036854775808": float(2**63),
    "-9223372036854775808": -(2**63),
    "0xffffffffffffffff": float(2**64),
    "0x10000000000000000": "0x10000000000000000",
    "123456789012345678901": 123456789012345678901.0,
    "0777777777777777777777777": 777777777777777777777777.0,
    **{text: text for text in ("12:30", "1:2", "190:20:30", "190:20:30.15", "2020-01-01", "2020-1-1", "2020-13-45")},
    **{text: text for text in ("2020-01-01T00:00:00Z", "2020-01-01 10:00:00", "inf", "NaN", "=", "a:b", "x#y")},
    "!!str 1": "1",
    "!!str y": "y",
    "!!str": "",
    "!!int '3'": 3,
    "!!float 3": 3,
    "!foo 1": "1",
    "! 12": "12",
    "!!binary aGk=": "hi",
    "'y'": "y",
    '"1"': "1",
    '"\\u00e9\\x41"': "éA",
    "'it''s'": "it's",
    "[1, y, 08]": [1, True, 8],
    "[http://a]": ["http://a"],
    "[a, ]": ["a"],
    "a\n  b": "a b",
    "{y: y, 1: a, ~x: b}": {"true": True, "1": "a", "~x": "b"},
    "{x: 1, n: 2}": {"x": 1, "false": 2},
    "{a}": {"a": None},
    "{? a : b}": {"a": "b"},
    "{2020-01-01: x, 12:30: y}": {"2020-01-01": "x", "12:30": True},
    "\tb": "b",
    "b\t# comment": "b",
    "!!set {a: 1}": {"a": 1},
    "!!map [1]": [1],
    "|\n  x\n  y\n": "x\ny\n",
    "{l: &a {b: 1}, m: *a}": {"l": {"b": 1}, "m": {"b": 1}},
    "{l: &a 1, m: &a 2, n: *a}": {"l": 1, "m": 2, "false": 2},
    "{l: &a {b: 1, c: 2}, m: {<<: *a, b: 3}}": {"l": {"b": 1, "c": 2}, "m": {"b": 3, "c": 2}},
    "{l: &a {b: 1}, m: {b: 3, <<: *a}}": {"l": {"b": 1}, "m": {"b": 1}},
    "{<<: [{a: 1}, {a: 2, b: 3}]}": {"a": 1, "b": 3},
    "{'<<': 1}": {"<<": 1},
}
"""What stands behind ``spec:`` → what it means."""
REFUSED = {
    **dict.fromkeys((".nan", ".inf", "-.Inf", "[.NaN]"), "numbers are finite"),
    **dict.fromkeys(("{~: a}", "{[a]: b}", "{18446744073709551615: x}"), "a key is a text; write it in quotes"),
    **dict.fromkeys(("!!int 3.5", "!!int 1e3", "!!int a", "!!bool 1", "!!null x", "!!float y"), "this is not what !!"),
    **dict.fromkeys(("&a [*a]", "&a {b: *a}"), "it contains itself"),
    **dict.fromkeys(("{<<: 1}", "{<<: [1]}", "{<<: ~}"), "behind << a map is needed, or a list of maps"),
    "*x": "found undefined alias",
    "!!binary a": "this is not base64",
    "@b": "cannot start any token",
    "a: b": "mapping values are not allowed here",
    "- a": "sequence entries are not allowed here",
}
"""What kubectl refuses, too."""
STRICTER = {
    **dict.fromkeys(("{a: 1, a: 2}", "{1: a, '1': b}", "{y: 1, yes: 2}"), "stands twice in one map"),
    **dict.fromkeys(("{1.5: a}", "{1e3: a}", "{08: a}"), "a key is a text; write it in quotes"),
    "!!timestamp 2020-01-01": "this is not what !!timestamp says",
    "a\tb": "a tab stands in this line; write spaces",
    "1\n...\nb: 2": "another document begins here; write --- on a line above it",
}
"""What kubectl takes, and nobody can have meant."""


@pytest.mark.parametrize(("text", "meant"), SCALARS.items(), ids=repr)
def test_a_value_is_read_as_kubectl_reads_it(text: str, meant: Any) -> None:
    found = load(f"spec: {text}\n")[0]["spec"]
    assert found == meant
    assert isinstance(found, bool) == isinstance(meant, bool)


@pytest.mark.parametrize(("text", "problem"), [*REFUSED.items(), *STRICTER.items()], ids=repr)
def test_what_is_refused_is_told_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as refused:
        load(f"a: 1\n---\nspec: {text}\n")
    assert problem in str(refused.value.problem)
    assert refused.value.problem_mark is not None and refused.value.problem_mark.line >= 2


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("a: 1\n--- \nb: 2\n", [{"a": 1}, {"b": 2}]),
        ("---\n# nothing\n---\na: 1\n--- # more\n", [{"a": 1}]),
        ("a: 1\r\n---\r\nb: y\r\n", [{"a": 1}, {"b": True}]),
        ("a: |\n  ---\n  b\n", [{"a": "---\nb\n"}]),
        ('{"a":\t1}{"b": 1e3}', [{"a": 1}, {"b": 1000}]),
        ('{"a": 1}\n---\n{"b": y}\n', [{"a": 1}, {"b": True}]),
        ("\ufeffa: 1\n", [{"a": 1}]),
        ("", []),
    ],
    ids=repr,
)
def test_documents_are_told_apart_as_by_kubectl(text: str, documents: list[Any]) -> None:
    assert load(text) == documents


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("--- {a: 1}\n", "behind --- nothing may stand but a comment"),
        ("a: " + "[" * 1000, "it is nested too deeply"),
        ("l: &l0 1\n" + "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 7)), "more"),
    ],
    ids=["document", "nested", "aliases"],
)  # fmt: skip
def test_what_cannot_be_read_is_told(text: str, problem: str) -> None:
    with pytest.raises(yaml.YAMLError, match=problem):
        load(text)


_texts = st.text(max_size=12) | st.sampled_from(list(SCALARS))
_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts


@settings(max_examples=50, deadline=None)
@given(st.lists(_values | st.dictionaries(_texts, _values, max_size=5) | st.lists(_values, max_size=5), max_size=5))
def test_what_is_written_reads_the_same(value: list[Any]) -> None:
    assert load(yaml.dump(value, Dumper=Dumper, allow_unicode=True)) == [value]


def test_the_crd_reads_the_same() -> None:
    assert load(crd.PATH.read_text()) == [crd.crd()]
