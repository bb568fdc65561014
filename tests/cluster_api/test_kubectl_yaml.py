"""Our reader of YAML against kubectl's own: `kubectl label --local` reads, and asks no API server."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from finetune_api.kubeyaml import load
from tests.cluster import binaries
from tests.conftest import available
from tests.unit.test_kubeyaml import REFUSED, SCALARS, STRICTER

pytestmark = pytest.mark.cluster

_HEAD = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\nspec: "


@pytest.fixture(scope="module", autouse=True)
def _kubectl() -> None:
    available(lambda: binaries.require(["kubectl"]))


def asked(*specs: str) -> list[Any] | str:
    """What kubectl makes of texts behind `spec:`, or the words of its refusal."""
    text = "---\n".join(_HEAD + spec + "\n" for spec in specs)
    command = [str(Path(binaries.folder()) / "kubectl"), "label", "--local", "-f", "-", "-o", "json", "a=b"]
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        return done.stderr
    read, rest = [], done.stdout.lstrip()
    while rest:
        found, end = json.JSONDecoder().raw_decode(rest)
        read.append(found.get("spec"))
        rest = rest[end:].lstrip()
    return read


def alike(ours: Any, theirs: Any) -> bool:
    """Equal, and true is not 1. Where a number is too long for JSON in Go, it is equal as a float."""
    if isinstance(ours, dict):
        return (
            isinstance(theirs, dict) and ours.keys() == theirs.keys() and all(alike(ours[k], theirs[k]) for k in ours)
        )
    if isinstance(ours, list):
        return isinstance(theirs, list) and len(ours) == len(theirs) and all(map(alike, ours, theirs))
    if isinstance(ours, float):
        return isinstance(theirs, int | float) and float(theirs) == ours
    return isinstance(ours, bool) == isinstance(theirs, bool) and bool(ours == theirs)


def test_kubectl_reads_every_value_of_the_table_as_we_do() -> None:
    read = asked(*SCALARS)
    assert isinstance(read, list), read
    wrong = [row for row in zip(SCALARS.items(), read, strict=True) if not alike(row[0][1], row[1])]
    assert not wrong


def test_what_we_refuse_kubectl_refuses_but_for_what_we_say() -> None:
    assert [text for text in REFUSED if isinstance(asked(text), list)] == []
    assert [text for text in STRICTER if isinstance(asked(text), str)] == []


_PIECES = st.sampled_from(
    ("a", "b: ", "y", "no", "0", "08", "0x1f", "1e3", "~", "12:30", " ", "\n  ", "\n  - ", ", ", "[", "]", "{", "}",
     "'", '"', "|\n   ", ">\n   ", " #", "&a ", "*a", "!!str ", "!!int ", "<<: ", "é", "\\", "%", "\\n", ".", "_", "+")
)  # fmt: skip
_SCALARS = st.text("0123456789abcdefxo_+-.eEyYnN:~ ", min_size=1, max_size=8)


def _understood(spec: str) -> bool:
    try:
        return len(load(f"{_HEAD}{spec}\n")) == 1
    except yaml.YAMLError:
        return False


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.lists(_SCALARS | st.lists(_PIECES, max_size=8).map("".join), min_size=30, max_size=60))
def test_kubectl_reads_what_nobody_thought_of_as_we_do(texts: list[str]) -> None:
    texts = [text for text in texts if _understood(text)]
    read = asked(*texts) if texts else []
    assert isinstance(read, list), read
    ours = [load(f"{_HEAD}{text}\n")[0]["spec"] for text in texts]
    assert [row for row in zip(texts, ours, read, strict=True) if not alike(*row[1:])] == []
