"""YAML as kubectl reads it, so that a file means the same with ``finetune`` and on a cluster.

kubectl and Helm read by go-yaml v2 (through sigs.k8s.io/yaml), which is neither YAML 1.1 nor 1.2: ``y`` and ``on``
are true, ``017`` and ``0o17`` are 15, ``08`` is 8, ``1e3`` is 1000, while ``12:30`` and dates are texts. PyYAML finds
the nodes; what a node means is decided here. Tests compare with kubectl itself. What kubectl takes and nobody can have
meant is refused: a key that stands twice (kubectl takes the last one), a fraction as a key, several documents without
``---`` between them (kubectl takes the first one), a tab between words.
"""

import base64
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

_TAG = "tag:yaml.org,2002:"
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
}
_INTEGER = re.compile(r"([-+]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|0[oO]?([0-7]+)|(0|[1-9][0-9]*))")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_FRACTION = re.compile(r"\.[0-9]+(_[0-9]+)*([eE][-+]?[0-9]+(_[0-9]+)*)?")
_LARGEST = 2**63
_MOST_VALUES = 100_000
"""In one document, what aliases repeat counted each time."""


def load(text: str) -> list[Any]:
    """The documents of a text, empty ones left out. Raises yaml.YAMLError, mostly with a ``problem_mark``."""
    found = _json(text)
    if found is None:
        found = [_document(part) for part in _parts(text)]
    return [document for document in found if document is not None]


def plain(text: str) -> Any:
    """What a scalar without quotes means: text, number, truth or nothing."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] in "+-0123456789":
        digits = text.replace("_", "")
        if (found := _INTEGER.fullmatch(digits)) and -_LARGEST <= (number := _integer(found)) < 2 * _LARGEST:
            return number if number < _LARGEST else float(number)  # as in the JSON that Kubernetes reads
        if _NUMBER.fullmatch(digits):
            return _finite(float(digits), text)
    elif _FRACTION.fullmatch(text):
        return _finite(float(text), text)
    return text


def _integer(found: re.Match[str]) -> int:
    sign, *digits = found.groups()
    number = next(int(part, base) for part, base in zip(digits, (16, 2, 8, 10), strict=True) if part)
    return -number if sign == "-" else number


def _finite(number: float, otherwise: str) -> float | int | str:
    """Whole floats go through JSON, which writes them as integers; what is too large stays a text."""
    if math.isinf(number):
        return otherwise
    return int(number) if number.is_integer() and abs(number) < _LARGEST else number


# ---- one text, several documents ----


def _json(text: str) -> list[Any] | None:
    """The values of a text that is JSON from beginning to end; None where it is not."""
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    values, rest = [], text.lstrip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except ValueError:
            return None
        if not isinstance(value, dict | list):
            return None  # 08 is no JSON, and 0 and 8 would be
        values.append(value)
        rest = rest[end:].lstrip()
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _parts(text: str) -> Iterator[str]:
    """The documents, each behind as many empty lines as it has lines above it, so that places are right."""
    part: list[str] = []
    for number, line in enumerate(text.splitlines(keepends=True)):
        if not line.startswith("---"):
            part.append(line)
            continue
        if line[3:].strip() and not re.match(r"\s+#", line[3:]):
            mark = yaml.Mark("", 0, number, 3, None, 0)
            raise yaml.MarkedYAMLError(problem="behind --- nothing may stand but a comment", problem_mark=mark)
        yield "".join(part)
        part = ["\n"] * (number + 1)
    yield "".join(part)


def _document(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _Values().of(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        if "\t" in "".join(text.splitlines()[line : line + 1]):
            error.problem = "a tab stands in this line; write spaces"
        elif (error.problem or "").startswith("expected '<document start>'"):
            error.problem = "another document begins here; write --- on a line above it"
        raise
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """Finds nodes. A scalar's tag is what was written, or whether it stood in quotes."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)

    def scan_to_next_token(self) -> None:
        """Tabs separate, as in libyaml; PyYAML's own scanner refuses them. Not at the beginning of a line."""
        super().scan_to_next_token()
        while self.peek() == "\t" and (self.flow_level or not self.allow_simple_key):
            self.forward()
            super().scan_to_next_token()

    def compose_node(self, parent: Any, index: Any) -> Any:
        """An anchor may be given again; PyYAML's own composer refuses that."""
        event: Any = self.peek_event()
        if not isinstance(event, yaml.AliasEvent):
            self.anchors.pop(event.anchor, None)
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: Any) -> Any:
        """``! 12`` is a text, as with quotes."""
        event: Any = self.peek_event()
        if event.tag == "!":
            event.implicit = (False, True)
        return super().compose_scalar_node(anchor)

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> str:
        """The tag of a node without one."""
        return "" if kind is not ScalarNode or implicit[0] else f"{_TAG}str"


# ---- nodes ----


class _Values:
    """The values of the nodes of one document."""

    def __init__(self) -> None:
        self._within: set[int] = set()
        self._count = 0

    def of(self, node: Node) -> Any:
        """What a node means."""
        self._count += 1
        if self._count > _MOST_VALUES:
            raise _refused(node, f"it holds more than {_MOST_VALUES} values")
        if isinstance(node, ScalarNode):
            return _scalar(node)
        if id(node) in self._within:
            raise _refused(node, "it contains itself")
        self._within.add(id(node))
        value = self._mapping(node) if isinstance(node, MappingNode) else [self.of(item) for item in node.value]
        self._within.remove(id(node))
        return value

    def _mapping(self, node: MappingNode) -> dict[str, Any]:
        found: dict[str, Any] = {}
        own: set[str] = set()
        for key, value in node.value:
            if isinstance(key, ScalarNode) and key.value == "<<" and key.tag in ("", f"{_TAG}merge"):
                found |= self._merged(value)
                continue
            name = _key(key)
            if name in own:
                raise _refused(key, f"the key {name} stands twice in one map")
            own.add(name)
            found[name] = self.of(value)
        return found

    def _merged(self, node: Node) -> dict[str, Any]:
        """What stands behind ``<<``. It overrides the keys above it, as with kubectl."""
        nodes = node.value if isinstance(node, SequenceNode) else [node]
        found: dict[str, Any] = {}
        for one in reversed(nodes):  # the first one wins
            if not isinstance(one, MappingNode):
                raise _refused(one, "behind << a map is needed, or a list of maps")
            found |= self.of(one)
        return found


def _key(node: Node) -> str:
    value = _scalar(node) if isinstance(node, ScalarNode) else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and _whole(node):
        return str(value)
    if isinstance(value, str):
        return value
    raise _refused(node, "a key is a text; write it in quotes")


def _whole(node: Node) -> bool:
    """It is written as a whole number: ``1e3`` is not."""
    return _INTEGER.fullmatch(node.value.replace("_", "")) is not None


def _scalar(node: ScalarNode) -> Any:
    """What a scalar means, by its tag."""
    kind = node.tag.removeprefix(_TAG)
    value: Any = node.value
    if kind == "binary":
        try:
            return base64.b64decode(value.replace("\n", ""), validate=True).decode()
        except ValueError as error:
            raise _refused(node, "this is not base64 of a text in UTF-8") from error
    if kind in _KINDS:
        value = plain(value)
        fits = isinstance(value, _KINDS[kind]) and (kind != "int" or _whole(node))
        if not fits or (kind in ("int", "float") and isinstance(value, bool)):
            raise _refused(node, f"this is not what !!{kind} says")
    if isinstance(value, float) and not math.isfinite(value):
        raise _refused(node, "numbers are finite")
    return value


_KINDS: dict[str, Any] = {
    "": object,
    "bool": bool,
    "int": int,
    "float": (int, float),
    "null": type(None),
    "timestamp": (),  # never: a date is a text
}
"""Tags that say how a scalar is read. With any other it is a text."""


def _refused(node: Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


# ---- writing ----


class Dumper(yaml.SafeDumper):
    """Writes what reads the same: a text that would be something else is in quotes. Text of several lines is a block,
    and nothing is written as an alias: people copy parts of what they are shown."""

    def ignore_aliases(self, data: object) -> bool:
        """Never an alias."""
        return True


def _represent(dumper: yaml.SafeDumper, text: str) -> Node:
    style = "|" if "\n" in text else "'" if plain(text) != text else None
    if re.search("[\x85\u2028\u2029]", text):
        style = '"'  # PyYAML would write these line breaks as they are
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


Dumper.add_representer(str, _represent)
