"""A FineTuneJob as a user wrote it → its spec, or everything that is wrong with it, at once.

Called by the operator before every plan and by ``finetune run``. It refuses what the API server refuses, and
besides what only Python can see; a test applies one table of bad specs to both.
"""

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from finetune_api import schema
from finetune_api.base import DURATION, seconds
from finetune_api.checks import CHECKS, close
from finetune_api.guesses import meant
from finetune_api.rules import IMMUTABLE, NAME_ACCEPTED, NEW_JOB, RULES, Rule, foreign_parameter
from finetune_api.schema import METHOD_PARAMETERS, PATTERNS, PRESERVE, text
from finetune_api.spec import FineTuneJobSpec

API_VERSION, KIND = "finetune.dev/v1alpha1", "FineTuneJob"
_LONGEST_VALUE = 200

Path = tuple[str | int, ...]
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Mistake:
    """One thing a user has to change."""

    field: str
    value: Any
    accepted: str
    remedy: str
    problem: str = ""
    """What is wrong, where showing the value would not tell it."""

    def text(self) -> str:
        """One line: field, value, what is accepted, remedy."""
        value = " ".join(text(self.value).split())
        if len(value) > _LONGEST_VALUE:
            value = value[:_LONGEST_VALUE] + "…"
        problem = self.problem or f"{value} is not accepted"
        return f"{self.field}: {problem}; accepted: {self.accepted}; remedy: {self.remedy}"


def read(raw: Mapping[str, Any]) -> FineTuneJobSpec | list[Mistake]:
    """The spec of a whole object, or all its mistakes."""
    mistakes = list(_envelope(raw))
    if not isinstance(raw.get("spec"), dict):
        missing = raw.get("spec") is None
        mistakes.append(
            Mistake(
                "spec",
                raw.get("spec"),
                "an object with model, data, output",
                "add it: what to train, on what, and where the result goes",
                "it is missing" if missing else "",
            )
        )
        return mistakes
    data = copy.deepcopy(raw["spec"])
    mistakes += _unknown_fields(schema.spec_schema(), data, ("spec",))
    data = _as_stored(schema.spec_schema(), data)
    spec, more = _parse(data)
    mistakes += more
    metadata = raw.get("metadata") if isinstance(raw.get("metadata"), dict) else {}
    name = (metadata or {}).get("name")
    subject = _Object(_Metadata(name if isinstance(name, str) else ""), spec)
    mistakes += _rules(subject)
    mistakes += _checks(subject)
    return sorted(mistakes, key=_place) if mistakes else spec


def _place(mistake: Mistake) -> int:
    """Where in the file a mistake is, more or less."""
    sections = ("apiVersion", "kind", "metadata", *(f"spec.{name}" for name in schema.spec_schema()["properties"]))
    return next((i for i, name in enumerate(sections) if re.match(rf"{name}\b", mistake.field)), -1)


def changed(old: FineTuneJobSpec, new: FineTuneJobSpec) -> list[Mistake]:
    """What of a started job was changed although it is immutable."""
    before, after = (spec.model_dump(mode="json", by_alias=True) for spec in (old, new))
    return [
        Mistake(
            field,
            theirs,
            f"{text(ours)}, which the run was started with",
            NEW_JOB,
        )
        for path in IMMUTABLE
        for field, ours, theirs in _differences(path, _at(before, path), _at(after, path))
    ]


# ---- around the spec ----


def _envelope(raw: Mapping[str, Any]) -> Iterator[Mistake]:
    known = ("apiVersion", "kind", "metadata", "spec", "status")
    for key, value in raw.items():
        if key not in known:
            yield _no_such_field((key,), value, known)
    for key, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        if raw.get(key) != expected:
            missing = "it is missing" if raw.get(key) is None else ""
            yield Mistake(key, raw.get(key), expected, f"write {key}: {expected}", missing)
    yield from _metadata(raw.get("metadata"))


_NAMESPACE = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_LABEL_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"


def _metadata(given: Any) -> Iterator[Mistake]:
    """What the API server refuses of metadata; only the fields a user writes."""
    if given is not None and not isinstance(given, dict):
        yield Mistake("metadata", given, "an object with name", "write name: and its value below it")
        return
    metadata = given or {}
    name = metadata.get("name")
    if name is None or name == "":
        yield Mistake("metadata.name", name, "a name", "add metadata.name", "it is missing")
    elif not isinstance(name, str):
        # Quotes alone do not help: no number is a name.
        number = isinstance(name, int | float) and not isinstance(name, bool)
        yield Mistake("metadata.name", name, NAME_ACCEPTED, "begin it with a letter" if number else "write a text")
    namespace = metadata.get("namespace")
    if namespace is not None and not (isinstance(namespace, str) and re.fullmatch(_NAMESPACE, namespace)):
        yield Mistake(
            "metadata.namespace",
            namespace,
            "at most 63 lower-case letters, digits and -, beginning and ending with a letter or digit",
            "use the name the namespace has",
        )
    for field in ("labels", "annotations"):
        entries = metadata.get(field)
        if entries is not None and not isinstance(entries, dict):
            yield Mistake(f"metadata.{field}", entries, "an object of texts", "write it as name: value")
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if value is not None and not isinstance(value, str):
                yield Mistake(f"metadata.{field}[{key}]", value, "a text", "put it into quotes")
            elif value and field == "labels" and not re.fullmatch(_LABEL_VALUE, value):
                yield Mistake(
                    f"metadata.labels[{key}]",
                    value,
                    "at most 63 letters, digits, -, _ and ., beginning and ending with a letter or digit",
                    "shorten or rewrite it, or make it an annotation",
                )


_FEW = 12
"""Names that are listed in one message; of more, the first in a list of all is not what helps."""


def _no_such_field(path: Path, value: Any, siblings: Iterable[str]) -> Mistake:
    section, names = _dotted(path[:-1]), list(siblings)
    elsewhere = [field for field, _, _ in schema.fields(schema.spec_schema(), "spec") if "[]" not in field]
    guess = meant(str(path[-1]), section, names, elsewhere)
    accepted = f"one of {', '.join(names)}"
    if len(names) > _FEW:
        accepted = f"the fields of {section}, all of them in docs/api.md"
        accepted = f"{guess}, or another of {accepted}" if guess in names else accepted
    remedy = f"did you mean {guess}?" if guess else "remove it, or correct its name"
    return Mistake(_dotted(path), value, accepted, remedy, "there is no such field")


def _names(node: Mapping[str, Any], value: Mapping[str, Any], path: Path) -> Iterable[str]:
    """The fields that an object may have; of a method its own."""
    kind = value.get("type", schema.DEFAULT_METHOD)
    own = METHOD_PARAMETERS.get(kind) if path == ("spec", "method") and isinstance(kind, str) else None
    return node["properties"] if own is None else ("type", *own)


def _unknown_fields(node: Mapping[str, Any], value: Any, path: Path) -> Iterator[Mistake]:
    """Told from the schema, not by pydantic: pydantic also takes a Kubernetes field by its Python name."""
    if isinstance(value, dict) and "properties" in node:
        for key in list(value):
            child = node["properties"].get(key)
            if child is not None:
                yield from _unknown_fields(child, value[key], (*path, key))
            elif not node.get(PRESERVE):
                yield _no_such_field((*path, key), value.pop(key), _names(node, value, path))
    elif isinstance(value, list) and isinstance(node.get("items"), dict):
        for index, item in enumerate(value):
            yield from _unknown_fields(node["items"], item, (*path, index))


def _as_stored(node: Mapping[str, Any], value: Any) -> Any:
    """As the API server stores it: an optional null is left out, a whole number is an integer."""
    if isinstance(value, dict) and "properties" in node:
        required = node.get("required", ())
        return {
            key: _as_stored(node["properties"].get(key, {}), child)
            for key, child in value.items()
            if child is not None or key in required or key not in node["properties"]
        }
    if isinstance(value, dict) and isinstance(node.get("additionalProperties"), dict):
        return {key: _as_stored(node["additionalProperties"], v) for key, v in value.items() if v is not None}
    if isinstance(value, list) and isinstance(node.get("items"), dict):
        return [_as_stored(node["items"], item) for item in value]
    if node.get("type") == "integer" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# ---- pydantic ----

_STAND_INS: dict[str, Any] = {
    "uri": "file:///-.jsonl",
    "secretName": "x",
    "train": [{"uri": "file:///-.jsonl"}],
    "data": {"train": [{"uri": "file:///-.jsonl"}]},
    "model": {"uri": "file:///-"},
    "output": {"uri": "file:///--"},
    "judge": {"uri": "file:///-"},
}


def _parse(data: dict[str, Any]) -> tuple[FineTuneJobSpec, list[Mistake]]:
    """The spec with every wrong field taken out, and what is wrong with those.

    A field that was taken out is not there for predicates either: reading it raises AttributeError.
    """
    mistakes: list[Mistake] = []
    holes: set[Path] = set()
    while True:
        try:
            spec = FineTuneJobSpec.model_validate(data, strict=True)
            break
        except ValidationError as error:
            told: set[Path] = set()
            for detail in error.errors(include_url=False):
                path = _located(("spec", *detail["loc"]))
                if path not in told:
                    told.add(path)
                    mistakes.append(_translated(path, dict(detail)))
            for path in sorted(told, key=len, reverse=True):
                _take_out(data, path, holes)
    for hole in holes:
        _pierce(spec, hole)
    return spec, mistakes


def _located(loc: Path) -> Path:
    """Pydantic's location without the tags of unions, and no deeper than the schema knows."""
    node: Mapping[str, Any] = schema.spec_schema()
    path: list[str | int] = ["spec"]
    for part in loc[1:]:
        properties = node.get("properties", {})
        if isinstance(part, int) and "items" in node:
            node = node["items"]
        elif part in properties:
            node = properties[part]
        elif part in properties.get("type", {}).get("enum", ()):
            continue  # the tag of a union
        else:
            break  # below a field of several types
        path.append(part)
    return tuple(path)


def _translated(path: Path, detail: dict[str, Any]) -> Mistake:
    kind, value = detail["type"], detail["input"]
    field = _dotted(path)
    node = schema.at_path(path) or {}
    if kind == "extra_forbidden" and path[:2] == ("spec", "method"):
        accepted, remedy = foreign_parameter(str(path[-1]))
        return Mistake(field, value, accepted, remedy)
    if kind.startswith("union_tag"):
        node = node["properties"]["type"]
        field, value = f"{field}.type", value.get("type") if isinstance(value, dict) else value
    accepted = schema.accepted(node)
    if kind == "missing":
        return Mistake(field, None, accepted, f"add it: {_first_sentence(node)}", "it is missing")
    return Mistake(field, value, accepted, _remedy(node, kind, value, field))


def _remedy(node: Mapping[str, Any], kind: str, value: Any, field: str) -> str:
    if "enum" in node:
        meant = close(str(value), [str(v) for v in node["enum"]])
        return f"did you mean {meant}?" if meant else "write one of them" if len(node["enum"]) > 1 else "write that"
    if kind != "string_too_long" and "pattern" in node:
        remedy = PATTERNS[node["pattern"]][1]
        return remedy + (f"; here: {guess}" if (guess := _guess(str(value), node["pattern"])) else "")
    wanted = node.get("type")
    if wanted in ("integer", "number", "boolean") and isinstance(value, str):
        return _unquoted(str(wanted), value, field)
    if wanted == "string" and not isinstance(value, str):
        return "put it into quotes" if isinstance(value, int | float) else "write a text"
    if wanted == "array" and not isinstance(value, list):
        return "write a list, each item on a line that begins with -"
    if wanted == "object":
        if isinstance(value, str) and "uri" in node.get("properties", {}):
            uri = (
                value
                if "://" in value
                else f"file://{value if value.startswith('/') else f'./{value}'.replace('././', './')}"
            )
            return f"write {{uri: {uri}}}"
        return "write its fields below it"
    if wanted == "string":
        return "shorten it"
    if wanted == "array":
        return "add items" if not value else "remove items"
    default = node.get("default")
    return "choose such a value" + (f", or leave it out for the default {text(default)}" if default is not None else "")


def _unquoted(wanted: str, value: str, field: str) -> str:
    """What to write in place of a text, where a number or true or false is wanted.

    Quotes are spoken of only where the text is right but for them: otherwise there may have been none.
    """
    if wanted == "boolean":
        return "write it without quotes" if value in ("true", "false") else "write true or false, without quotes"
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isfinite(number) and (wanted == "number" or number.is_integer()):
        return f"write it as a number, without quotes: {_plainly(number)}"
    if field.rpartition(".")[2].endswith(_SECONDS):
        here = f"; here: {math.ceil(seconds(value))}" if re.fullmatch(DURATION, value) else ""
        return "write a whole number of seconds" + here
    return "write a whole number" if wanted == "integer" else "write a number"


def _plainly(number: float) -> str:
    """A number as every reader of YAML takes it for one: some take 2e-4 for a text, none 2.0e-4."""
    written = text(number)
    return written if "e" not in written or "." in written else written.replace("e", ".0e")


_SECONDS = "SecondsAfterFinished"


def _guess(value: str, pattern: str) -> str:
    """What was probably meant by a URI without a known scheme."""
    for wrong, right in (("gcs://", "gs://"), ("s3a://", "s3://"), ("abfs://", "az://"), ("azure://", "az://")):
        if value.startswith(wrong):
            return right + value.removeprefix(wrong)
    path = value.removeprefix("file://")
    if path.startswith("/") and path != "/":
        return f"file://{path}"
    if path.startswith("~/"):
        return f"file:///home/NAME/{path.removeprefix('~/')} (~ is not resolved)"
    rows = pattern == schema.DATA_URI and value.endswith((".jsonl", ".json", ".parquet")) and "://" not in value
    if (value.startswith(("file://", "./", "../")) and path.strip("/")) or rows:
        relative = path if path.startswith(("./", "../")) else f"./{path}"
        return f"file://{relative} (from the folder of the YAML file, with finetune only)"
    hub = re.sub(r"^https?://(www\.)?(huggingface\.co|hf\.co)/", "", value)
    if pattern in (schema.MODEL_URI, schema.DATA_URI) and re.fullmatch(r"(datasets/)?[\w.-]+/[\w.-]+", hub):
        prefix = "" if pattern == schema.MODEL_URI or hub.startswith("datasets/") else "datasets/"
        return f"hf://{prefix}{hub}"
    return ""


def _first_sentence(node: Mapping[str, Any]) -> str:
    sentence = re.split(r"(?<=[\w)])\.(?:\s|$)", node.get("description", ""))[0].rstrip(".")
    return sentence[:1].lower() + sentence[1:]


def _take_out(data: dict[str, Any], path: Path, holes: set[Path]) -> None:
    """Remove what is wrong; where something must be there, put a stand-in and remember the hole."""
    if any(isinstance(part, int) for part in path[-1:]):
        path = path[:-1]  # a wrong item makes its whole list unreadable
    parent: Any = data
    for part in path[1:-1]:
        parent = parent[part]
    name = str(path[-1])
    parent.pop(name, None)
    if (
        name in METHOD_NAMES
        and path[-2:-1] == ("method",)
        and name not in METHOD_PARAMETERS.get(parent.get("type", schema.DEFAULT_METHOD), ())
    ):
        return  # another method's parameter: nothing of this spec is unreadable
    holes.add(path)
    owner = schema.at_path(path[:-1]) or {}
    if name in owner.get("required", ()):
        node = schema.at_path(path) or {}
        parent[name] = copy.deepcopy(node["enum"][0] if "enum" in node else _STAND_INS[name])


METHOD_NAMES = frozenset(name for names in METHOD_PARAMETERS.values() for name in names)


def _pierce(spec: BaseModel, hole: Path) -> None:
    target: Any = spec
    for part in hole[1:-1]:
        target = target[part] if isinstance(part, int) else getattr(target, _attribute(target, part), None)
        if target is None:
            return
    target.__dict__.pop(_attribute(target, str(hole[-1])), None)


def _attribute(model: BaseModel, key: str) -> str:
    return next((n for n, f in type(model).model_fields.items() if key in (f.alias, n)), key)


# ---- rules ----


@dataclass(frozen=True)
class _Metadata:
    name: str


@dataclass(frozen=True)
class _Object:
    metadata: _Metadata
    spec: FineTuneJobSpec


def _rules(subject: _Object) -> Iterator[Mistake]:
    for rule in RULES:
        if rule.holds is not None:
            for path, target in _targets(subject, rule.at):
                yield from _readable(_judge(rule, path, target))


def _judge(rule: Rule, path: str, target: Any) -> Iterator[Mistake]:
    if rule.field == "metadata.name" and not target.metadata.name:
        return  # told already
    assert rule.holds is not None
    if rule.holds(target):
        return
    value = target
    for part in rule.field.split(".") if rule.field else ():
        value = getattr(value, _attribute(value, part)) if isinstance(value, BaseModel) else getattr(value, part)
    field = ".".join(part for part in (path, rule.field) if part)
    yield Mistake(field, value, rule.accepted, rule.remedy, rule.problem)


def _checks(subject: _Object) -> Iterator[Mistake]:
    for at, check in CHECKS:
        for path, target in _targets(subject, at):
            findings = _readable(check(target))
            yield from (Mistake(f"{path}.{field}", *rest) for field, *rest in findings)


def _targets(subject: _Object, at: str) -> list[tuple[str, Any]]:
    targets: list[tuple[str, Any]] = [("", subject)]
    for part in at.replace("[]", ".[]").split(".") if at else ():
        if part == "[]":
            targets = [(f"{path}[{i}]", item) for path, items in targets for i, item in enumerate(items)]
        else:
            targets = [
                (f"{path}.{part}".strip("."), getattr(target, part))
                for path, target in targets
                if vars(target).get(part) is not None
            ]
    return targets


def _readable(judgement: Iterator[_Found]) -> Iterator[_Found]:
    """What a judgement says until it reads a field that is wrong itself and was told already."""
    try:
        yield from judgement
    except AttributeError as error:
        if not (isinstance(error.obj, BaseModel) and error.name in type(error.obj).model_fields):
            raise


# ---- paths ----


def _dotted(path: Path) -> str:
    dotted = ""
    for part in path:
        dotted += f"[{part}]" if isinstance(part, int) else f".{part}" if dotted else part
    return dotted


def _at(dump: Mapping[str, Any], path: str) -> Any:
    value: Any = dump
    for part in path.split(".")[1:]:
        value = value[part]
    return value


def _differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from _differences(f"{path}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield path, old, new
