"""The structural schema of a FineTuneJob, made from the models, and its fields in words.

Pure; knows nothing of CEL. ``crd.py`` wraps it into the CRD, ``reference.py`` prints it, ``mistakes.py`` asks
it what a field accepts: three views of one thing, so they cannot contradict each other.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel

from finetune_api.base import DURATION
from finetune_api.methods import DEFAULT_METHOD, METHODS
from finetune_api.reinforcement import FUNCTION
from finetune_api.spec import SHARD_SIZE, SPLIT, FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.uris import DATA_URI, MODEL_URI, NAME, STORAGE_URI

PRESERVE = "x-kubernetes-preserve-unknown-fields"
_KEEP = (
    "description",
    "type",
    "format",
    "default",
    "enum",
    "minimum",
    "exclusiveMinimum",
    "maximum",
    "exclusiveMaximum",
    "pattern",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
)


UNSEEN = -1
"""``status.observedGeneration`` of a job the operator has not looked at."""


class NotStructuralError(Exception):
    """A model says something that a structural schema cannot."""


@cache
def spec_schema() -> dict[str, Any]:
    """The schema of ``spec``, every default in it. Not to be changed by the caller."""
    return of_model(FineTuneJobSpec)


@cache
def status_schema() -> dict[str, Any]:
    """The schema of ``status``. What the operator has not written is not there, but for the generation it has seen:
    kstatus (Flux) calls an object without one Current, and this one is not even begun."""
    schema = _without_defaults(of_model(FineTuneJobStatus))
    schema["default"] = {"observedGeneration": UNSEEN}
    schema["properties"]["observedGeneration"]["default"] = UNSEEN
    return schema


def of_model(model: type[BaseModel]) -> dict[str, Any]:
    """The structural schema of a model."""
    source = model.model_json_schema(by_alias=True)
    return _structural(source, source.get("$defs", {}), model.__name__)


def _structural(node: dict[str, Any], defs: dict[str, Any], at: str) -> dict[str, Any]:
    if "$ref" in node:
        target = defs[node["$ref"].rpartition("/")[2]]
        merged = {**target, **{k: v for k, v in node.items() if k != "$ref"}}
        # The field's docstring or the class's: the one that says more.
        merged["description"] = max(target["description"], merged["description"], key=len)
        return _structural(merged, defs, at)
    if "oneOf" in node:
        return _flat_union(node, defs, at)
    if "anyOf" in node:
        options = [option for option in node["anyOf"] if option.get("type") != "null"]
        rest = {k: v for k, v in node.items() if k != "anyOf"}
        if len(options) == 1:
            if rest.get("default", ...) is None:
                del rest["default"]
            return _structural({**options[0], **rest}, defs, at)
        # Several types: structural schemas have no such thing. The condition judges it.
        return {**_kept(rest), PRESERVE: True}
    if "const" in node:
        node = {**node, "enum": [node["const"]]}
    result = _kept(node)
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if exclusive in node:
            result[bound], result[exclusive] = node[exclusive], True
    if node.get("type") == "array":
        result["items"] = _structural(node["items"], defs, f"{at}[]")
    if node.get("type") == "object":
        extra = node.get("additionalProperties")
        if node.get("properties"):
            result["properties"] = {
                name: _structural(child, defs, f"{at}.{name}") for name, child in node["properties"].items()
            }
            if node.get("required"):
                result["required"] = list(node["required"])
            if "default" in result:
                result["default"] = _defaults(result)
        elif isinstance(extra, dict):
            result["additionalProperties"] = _structural(extra, defs, f"{at}{{}}")
    result.update({k: v for k, v in node.items() if k.startswith("x-kubernetes-")})
    if "type" not in result and not result.get(PRESERVE):
        raise NotStructuralError(f"{at}: no type can be derived from {node}")
    return result


def _defaults(node: dict[str, Any]) -> dict[str, Any]:
    """What an empty object becomes. The API server judges CEL rules on the default as it is written, before
    the defaults of its fields fill it, so it is written in full."""
    return {name: child["default"] for name, child in node["properties"].items() if "default" in child}


def _kept(node: dict[str, Any]) -> dict[str, Any]:
    result = {k: node[k] for k in _KEEP if k in node and not k.startswith("exclusive")}
    if "description" in result:
        result["description"] = unwrapped(result["description"])
    return result


def unwrapped(text: str) -> str:
    """A docstring as running text: single line breaks and reST's double backquotes are gone."""
    return re.sub(r"[ \t]*\n[ \t]*(?!\n)", " ", text.strip()).replace("``", "")


def _flat_union(node: dict[str, Any], defs: dict[str, Any], at: str) -> dict[str, Any]:
    """The classes of a discriminated union as one object: all their parameters, none of them required.

    A default that depends on the type cannot be a schema's; it goes into the description.
    """
    tag = node["discriminator"]["propertyName"]
    members = {
        name: _structural(defs[ref.rpartition("/")[2]], defs, f"{at}({name})")
        for name, ref in node["discriminator"]["mapping"].items()
    }
    properties: dict[str, dict[str, Any]] = {
        tag: {
            "description": "; ".join(f"{n}: {_first_line(m.get('description', ''))}" for n, m in members.items()) + ".",
            "type": "string",
            "default": DEFAULT_METHOD,
            "enum": list(members),
        }
    }
    owners: dict[str, list[str]] = {}
    for name, member in members.items():
        for key, child in member["properties"].items():
            if key == tag:
                continue
            shape = {k: v for k, v in child.items() if k not in ("default", "description")}
            known = properties.setdefault(key, shape)
            if known != shape:
                raise NotStructuralError(
                    f"{at}.{key}: {name} gives it {shape}, {owners[key]} {known}; "
                    "parameters of one name must have one type and range, whichever the method"
                )
            owners.setdefault(key, []).append(name)
    for key, names in owners.items():
        children = {name: members[name]["properties"][key] for name in names}
        properties[key] = {
            "description": _described({n: c["description"] for n, c in children.items()})
            + " Default "
            + "; ".join(f"{v} for {ns}" for v, ns in _grouped({n: text(c["default"]) for n, c in children.items()}))
            + ".",
            **properties[key],
        }
    result: dict[str, Any] = {"description": unwrapped(node["description"]), "type": "object"}
    result["properties"] = properties
    if "default" in node:
        result["default"] = _defaults(result)
    return result


def _described(texts: dict[str, str]) -> str:
    groups = _grouped(texts)
    return groups[0][0] if len(groups) == 1 else " ".join(f"{names}: {told}" for told, names in groups)


def _grouped(texts: dict[str, str]) -> list[tuple[str, str]]:
    """Each text once, with the names it is said of."""
    names: dict[str, list[str]] = {}
    for name, told in texts.items():
        names.setdefault(told, []).append(name)
    return [(told, ", ".join(whose)) for told, whose in names.items()]


def _first_line(description: str) -> str:
    return re.split(r"(?<=\w)\.(?:\s|$)", description)[0].rstrip(".")


def _without_defaults(node: dict[str, Any]) -> dict[str, Any]:
    result = {k: v for k, v in node.items() if k != "default"}
    if "properties" in result:
        result["properties"] = {k: _without_defaults(v) for k, v in result["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(result.get(key), dict):
            result[key] = _without_defaults(result[key])
    return result


# ---- asking the schema ----


def at_path(path: tuple[str | int, ...]) -> dict[str, Any] | None:
    """The schema of the field at a path from the top of the object: ``("spec", "data", "train", 0, "uri")``."""
    if not path or path[0] != "spec":
        return None
    node: Any = spec_schema()
    for part in path[1:]:
        node = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        if node is None:
            return None
    return dict(node)


def default_of(path: str, method: str) -> Any:
    """What a field is (``spec.data.packing``) where it is not set; None where that is nothing, or depends on others."""
    *home, name = path.split(".")
    if home == ["spec", "method"] and name != "type":
        model = next((m for m in METHODS if m.model_fields["type"].annotation.__args__ == (method,)), None)  # type: ignore[union-attr]
        found = model.model_fields.get(name) if model else None
        return None if found is None or found.is_required() else found.get_default(call_default_factory=True)
    return (at_path((*home, name)) or {}).get("default")


def fields(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Every field below a node, parents first: its path (``data.train[].uri``), schema, whether required."""
    for name, child in node.get("properties", {}).items():
        path = f"{prefix}.{name}" if prefix else name
        yield path, child, name in node.get("required", ())
        yield from fields(child, path)
        if isinstance(child.get("items"), dict):
            yield from fields(child["items"], f"{path}[]")


def text(value: Any) -> str:
    """A value as a user would write it, and as CEL's ``string()`` prints it; texts in double quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value + '"'
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e6 else repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(text(v) for v in value) + "]"
    return str(value)


# What a pattern means: what it accepts, and what to do about a text it refuses.
PATTERNS: dict[str, tuple[str, str]] = {
    MODEL_URI: (
        "hf://ORG/NAME, s3:// gs:// az://BUCKET/PATH, pvc://CLAIM/PATH, file:///PATH or job://NAME",
        "name the storage in front; a model of the Hugging Face hub is hf://ORG/NAME, a file has an absolute path",
    ),
    DATA_URI: (
        "hf://datasets/ORG/NAME, s3:// gs:// az://BUCKET/KEY, pvc://CLAIM/PATH, file:///PATH or job://NAME",
        "name the storage in front; a data set of the hub is hf://datasets/ORG/NAME, a file has an absolute path",
    ),
    STORAGE_URI: (
        "s3:// gs:// az://BUCKET/PATH, pvc://CLAIM/PATH or file:///PATH",
        "name a storage that can be written to; a file has an absolute path (finetune run also takes file://./PATH)",
    ),
    NAME: (
        "a name of lower-case letters, digits, - and ., beginning and ending with a letter or digit",
        "use the name the object has",
    ),
    FUNCTION: ("the name of a Python function", "write only its name; the file goes into uri"),
    SPLIT: (
        "the name of a split, e.g. train or validation",
        "write a name alone; for a part of its rows, name files: hf://datasets/ORG/NAME/PATH",
    ),
    SHARD_SIZE: ("a size with its unit MB, GB, MiB or GiB, e.g. 5GB", "add the unit"),
    DURATION: ("a length of time such as 90s, 10m or 1h30m", "write a number and its unit ms, s, m or h"),
}


def accepted(node: dict[str, Any]) -> str:
    """What a field takes, in words."""
    if "enum" in node:
        return "one of " + ", ".join(str(v) for v in node["enum"]) if len(node["enum"]) > 1 else str(node["enum"][0])
    kind = node.get("type")
    if node.get("pattern") in PATTERNS:
        return PATTERNS[node["pattern"]][0]
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(node)
    if kind == "boolean":
        return "true or false"
    if kind == "string":
        return "a text" + (f" of at most {node['maxLength']} characters" if "maxLength" in node else "")
    if kind == "array":
        return "a list" + _count(node)
    if kind == "object":
        return "an object" + (" with " + ", ".join(node["required"]) if node.get("required") else "")
    return "a text or a list of texts"


def _range(node: dict[str, Any]) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    if low is not None and high is not None and not {"exclusiveMinimum", "exclusiveMaximum"} & node.keys():
        return f" from {text(low)} to {text(high)}"
    words = []
    if low is not None:
        words.append(f"greater than {text(low)}" if node.get("exclusiveMinimum") else f"of at least {text(low)}")
    if high is not None:
        words.append(f"less than {text(high)}" if node.get("exclusiveMaximum") else f"at most {text(high)}")
    return (" " + " and ".join(words)) if words else ""


def _count(node: dict[str, Any]) -> str:
    low, high = node.get("minItems"), node.get("maxItems")
    if low and high:
        return f" of {low} to {high} items"
    return f" of at most {high} items" if high else ""


METHOD_PARAMETERS: dict[str, tuple[str, ...]] = {
    method.model_fields["type"].annotation.__args__[0]: tuple(  # type: ignore[union-attr]
        name for name in method.model_fields if name != "type"
    )
    for method in METHODS
}
"""The parameters of every method."""
