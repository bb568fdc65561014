"""Generates the CustomResourceDefinition from the models and the rules.

``python -m finetune_api.crd --write`` writes ``crds/finetune.dev_finetunejobs.yaml``, ``--check`` fails where
the committed file is another one, without either it is printed.
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from finetune_api.generated import command
from finetune_api.rules import IMMUTABLE, NEW_JOB, RULES, Rule, told
from finetune_api.schema import PATTERNS, PRESERVE, accepted, spec_schema, status_schema
from finetune_api.stages import SECTIONS

GROUP, VERSION, KIND, PLURAL = "finetune.dev", "v1alpha1", "FineTuneJob", "finetunejobs"
PATH = Path(__file__).resolve().parents[1] / f"{GROUP}_{PLURAL}.yaml"
HEADER = """\
# Generated from crds/finetune_api by `make generate` (python -m finetune_api.crd --write). Do not edit.
# Apply it with `kubectl apply --server-side`.
"""

_LONGEST_OF_AN_ENUM = 64

COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    ("State", "string", ".status.state", 0),
    ("Progress", "string", ".status.progress.percent", 0),
    ("Step", "integer", ".status.progress.step", 0),
    ("Loss", "string", ".status.progress.loss", 0),
    ("ETA", "string", ".status.progress.eta", 0),
    ("Checkpoint", "date", ".status.lastCheckpointTime", 0),
    ("Restarts", "integer", ".status.restarts", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Stage", "string", ".spec.stage", 1),
    ("Method", "string", ".spec.method.type", 1),
    ("Model", "string", ".spec.model.uri", 1),
    ("GPUs", "integer", ".status.gpus.held", 1),
    ("Message", "string", ".status.message", 1),
)
SELECTABLE = (".spec.stage", ".spec.profile", ".status.state")


def crd() -> dict[str, Any]:
    """The whole object."""
    root: dict[str, Any] = {
        "description": "A FineTuneJob trains a language model: apply it, and its status tells where the run stands.",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}"},
            "kind": {"type": "string", "description": KIND},
            "metadata": {"type": "object", "properties": {"name": {"type": "string"}}},
            "spec": copy.deepcopy(spec_schema()),
            "status": copy.deepcopy(status_schema()),
        },
    }
    _speak_patterns(root["properties"]["spec"])
    _allow_nothing(root["properties"]["spec"])
    for rule in RULES:
        _validations(_node(root, rule.at)).append(_validation(root, rule))
    _validations(root).extend(_transitions(root))
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ftj"],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path} | ({"priority": wide} if wide else {})
                        for name, kind, path, wide in COLUMNS
                    ],
                    "selectableFields": [{"jsonPath": path} for path in SELECTABLE],
                    "schema": {"openAPIV3Schema": root},
                }
            ],
        },
    }


def rendered() -> str:
    """The file's text."""
    return HEADER + yaml.dump(crd(), Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


# ---- CEL ----


def _node(root: dict[str, Any], path: str) -> dict[str, Any]:
    node = root
    for part in path.replace("[]", ".[]").split(".") if path else ():
        node = node["items"] if part == "[]" else node["properties"][part]
    return node


def _validations(node: dict[str, Any]) -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = node.setdefault("x-kubernetes-validations", [])
    return rules


def _validation(root: dict[str, Any], rule: Rule) -> dict[str, Any]:
    path = f".{rule.field}" if rule.field else ""
    shown = None if rule.problem else _shown(_node(root, f"{rule.at}{path}".strip(".")))
    words = f"; {told(rule)}"
    result: dict[str, Any] = {"rule": rule.cel, "message": (rule.problem or "this is not accepted") + words}
    if shown:
        result["messageExpression"] = f"{_literal(shown + ' is not accepted' + _plain(words))}.format([self{path}])"
    if path:
        result["fieldPath"] = path
    return result


def _shown(node: dict[str, Any]) -> str | None:
    """How CEL's format() prints a value as ``schema.text`` does; None where it cannot.

    One format() makes the whole message: the API server cannot bound the length of ``string(x) + …``
    and refuses such a CRD as too costly.
    """
    return {"string": '"%s"', "integer": "%d", "number": "%s", "boolean": "%s"}.get(node.get("type", ""))


def _plain(text: str) -> str:
    return text.replace("%", "%%")


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _speak_patterns(node: dict[str, Any]) -> None:
    """A pattern's refusal quotes the regular expression; as a CEL rule it says what is meant."""
    pattern = node.pop("pattern", None)
    if pattern is not None:
        words, remedy = PATTERNS[pattern]
        told = f" is not accepted; accepted: {words}; remedy: {remedy}"
        _validations(node).append(
            {
                "rule": f"self.matches(r'{pattern}')",
                "message": f"this{told}",
                "messageExpression": _literal('"%s"' + _plain(told)) + ".format([self])",
            }
        )
    for child in node.get("properties", {}).values():
        _speak_patterns(child)
    if isinstance(node.get("items"), dict):
        _speak_patterns(node["items"])


def _allow_nothing(node: dict[str, Any]) -> None:
    """A field that may be missing may be empty (``uri:`` and no more). Where it has a default, the API server puts that
    in; elsewhere it must be told, or server-side apply refuses what create lets through. To CEL, null is not there.

    An enum of the schema never takes null, not even where null is one of its values: a rule does.
    """
    for name, child in node.get("properties", {}).items():
        if "type" in child and "default" not in child and name not in node.get("required", ()):
            child["nullable"] = True
            if "enum" in child:
                _speak_enum(child)
        _allow_nothing(child)
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            _allow_nothing(node[key])
    if isinstance(node.get("additionalProperties"), dict):
        node["additionalProperties"]["nullable"] = True


def _speak_enum(node: dict[str, Any]) -> None:
    told = f" is not accepted; accepted: {accepted(node)}; remedy: write one of them"
    listed = ", ".join(_literal(value) for value in node.pop("enum"))
    node["maxLength"] = _LONGEST_OF_AN_ENUM
    _validations(node).append(
        {
            "rule": f"self in [{listed}]",
            "message": f"this{told}",
            "messageExpression": _literal('"%s"' + _plain(told)) + ".format([self])",
        }
    )


def _transitions(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What may not change once the run has started: at the root, which sees the status."""
    for section in IMMUTABLE:
        for path, node in _leaves(section, _node(root, section)):
            new, old = f"self.{path}", f"oldSelf.{path}"
            same = f"{new} == {old}"
            if "default" not in node and path.rpartition(".")[2] not in _node(root, path.rpartition(".")[0]).get(
                "required", ()
            ):
                same = f"(has({new}) ? has({old}) && {same} : !has({old}))"
            yield {
                "rule": f"!has(oldSelf.status) || !has(oldSelf.status.startTime) || {same}",
                "message": f"it was changed, which is not accepted once the run has started; remedy: {NEW_JOB}",
                "fieldPath": f".{path}",
                "reason": "FieldValueForbidden",
            }


def _leaves(path: str, node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields that are compared one by one. An object with keys unknown to the schema is compared whole:
    the API server then looks at those too."""
    optional = "properties" in node and "default" not in node and "." in path and path.rpartition(".")[2] in SECTIONS
    whole = node.get(PRESERVE) or "properties" not in node or optional
    if whole or any("type" not in child for child in node["properties"].values()):
        if "type" in node:
            yield path, node
        return
    for name, child in node["properties"].items():
        yield from _leaves(f"{path}.{name}", child)


def main(arguments: list[str] | None = None) -> int:
    return command("crd", __doc__, PATH, rendered, arguments)


if __name__ == "__main__":
    sys.exit(main())
