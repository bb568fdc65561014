"""The generated files, and that the schema is one that Kubernetes takes."""

import copy
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, Field

from finetune_api import crd, reference, schema
from finetune_api.base import HyperModel, KubeModel
from finetune_api.causes import RETRY, Cause
from finetune_api.conditions import Condition, Reason, State
from finetune_api.mistakes import read
from finetune_api.rules import IMMUTABLE, RULES
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from tests.unit import good_specs

pytestmark = pytest.mark.unit

ROOT = crd.crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of a structural schema."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from nodes(node[key], f"{path}[]")


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and all models in it."""
    yield model
    for field in model.model_fields.values():
        pending: list[Any] = [field.annotation]
        while pending:
            kind = pending.pop()
            pending += getattr(kind, "__args__", ())
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from models(kind)


# ---- generated files ----


def test_the_crd_file_is_current() -> None:
    assert crd.PATH.read_text() == crd.rendered(), "run `make generate`"
    assert crd.main(["--check"]) == 0


def test_the_reference_is_current() -> None:
    assert reference.PATH.read_text() == reference.rendered(), "run `make generate`"
    assert reference.main(["--check"]) == 0


def test_a_stale_file_fails_the_check(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for module in (crd, reference):
        monkeypatch.setattr(module, "PATH", tmp_path / "docs" / module.__name__)
        (tmp_path / "docs").mkdir(exist_ok=True)
        assert module.main(["--check"]) == 1
        assert "make generate" in capsys.readouterr().err
        assert module.main(["--write"]) == 0
        assert module.main(["--check"]) == 0
        assert module.main([]) == 0
        assert capsys.readouterr().out == module.PATH.read_text()


def test_the_file_is_what_was_made() -> None:
    assert yaml.safe_load(crd.rendered()) == crd.crd()


# ---- the schema ----


@pytest.mark.parametrize("model", [FineTuneJobSpec, FineTuneJobStatus])
def test_every_field_and_every_model_has_a_docstring(model: type[BaseModel]) -> None:
    silent = []
    for each in models(model):
        own = each.__doc__ and each.__doc__ not in (HyperModel.__doc__, KubeModel.__doc__, BaseModel.__doc__)
        silent += [] if own else [each.__name__]
        silent += [f"{each.__name__}.{n}" for n, f in each.model_fields.items() if n != "type" and not f.description]
    assert not silent


def test_the_schema_is_structural() -> None:
    for path, node in nodes(ROOT):
        unknown = node.keys() & {"$ref", "anyOf", "oneOf", "allOf", "not", "title", "const", "$defs", "discriminator"}
        assert not unknown, path
        assert "type" in node or node.get(schema.PRESERVE), path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert isinstance(node.get("exclusiveMinimum", True), bool), path


def test_every_field_is_described() -> None:
    silent = [
        path
        for path, node in nodes(ROOT)
        if path not in ("", ".metadata", ".metadata.name") and not node.get("description") and not path.endswith("[]")
    ]
    assert not silent


def test_every_text_and_list_of_the_spec_is_bounded() -> None:
    """CEL's cost is estimated from the bounds; without them the API server refuses the whole CRD."""
    for path, node in nodes(ROOT["properties"]["spec"]):
        if node.get("type") == "string":
            assert "maxLength" in node or "enum" in node, path
        if node.get("type") == "array":
            assert "maxItems" in node, path


def test_every_pattern_has_words() -> None:
    patterns = {node["pattern"] for _, node in nodes(schema.spec_schema()) if "pattern" in node}
    assert patterns == set(schema.PATTERNS)


def test_of_the_status_only_the_generation_is_there_from_the_beginning() -> None:
    found = {path: node["default"] for path, node in nodes(ROOT["properties"]["status"]) if "default" in node}
    assert found == {"": {"observedGeneration": -1}, ".observedGeneration": -1}


def test_conditions_are_a_map_by_type() -> None:
    assert ROOT["properties"]["status"]["properties"]["conditions"]["x-kubernetes-list-map-keys"] == ["type"]


def defaulted(node: dict[str, Any], value: Any) -> Any:
    """What the API server makes of a value: defaults, from the top down."""
    if isinstance(value, dict) and "properties" in node:
        result = {key: child for key, child in value.items() if child is not None}
        for name, child in node["properties"].items():
            if name not in result and "default" in child:
                result[name] = copy.deepcopy(child["default"])
            if name in result:
                result[name] = defaulted(child, result[name])
        return result
    if isinstance(value, list) and isinstance(node.get("items"), dict):
        return [defaulted(node["items"], item) for item in value]
    return value


@pytest.mark.parametrize("good", good_specs.GOOD, ids=lambda good: good.id)
def test_defaults_of_the_schema_are_those_of_the_models(good: good_specs.Good) -> None:
    raw = good.object
    stored = {**raw, "spec": defaulted(schema.spec_schema(), raw["spec"])}
    assert read(stored) == read(raw)


def test_every_default_is_shown() -> None:
    """Whatever the models have a default for is in the schema; only methods' parameters depend on the type."""
    found = read(good_specs.GOOD[0].object)
    assert isinstance(found, FineTuneJobSpec)
    stored = defaulted(schema.spec_schema(), good_specs.GOOD[0].object["spec"])
    dump = found.model_dump(mode="json", by_alias=True, exclude_none=True)
    dump["method"] = {"type": dump["method"]["type"]}
    assert stored == dump


# ---- rules ----


def validations() -> list[tuple[str, dict[str, Any]]]:
    return [(path, rule) for path, node in nodes(ROOT) for rule in node.get("x-kubernetes-validations", ())]


def test_every_rule_is_in_the_crd_with_its_words() -> None:
    found = [(rule["rule"], rule["message"]) for _, rule in validations()]
    for rule in RULES:
        assert any(cel == rule.cel and rule.accepted in message and rule.remedy in message for cel, message in found)


def test_messages_fit() -> None:
    for path, rule in validations():
        assert len(rule["message"]) <= 2048, path
        assert "\n" not in rule["message"], path


def test_every_field_that_is_immutable_has_a_transition_rule() -> None:
    paths = {rule["fieldPath"] for path, rule in validations() if path == "" and "oldSelf" in rule["rule"]}
    for section in IMMUTABLE:
        assert any(path == f".{section}" or path.startswith(f".{section}.") for path in paths), section
    assert ".spec.training.learning_rate" in paths
    for steering in ("suspend", "workers", "recovery", "credentials", "profile", "ttl", "save_"):
        assert not [path for path in paths if f".spec.{steering}" in path or f"checkpoint.{steering}" in path]


# ---- models that cannot be shown ----


def test_parameters_of_one_name_must_be_of_one_kind() -> None:
    class One(HyperModel):
        """One."""

        type: Literal["one"]
        r: int = 1
        """Rank."""

    class Two(HyperModel):
        """Two."""

        type: Literal["two"]
        r: str = "x"
        """Rank."""

    class Both(HyperModel):
        """Both."""

        method: Annotated[One | Two, Field(discriminator="type")]
        """Which."""

    with pytest.raises(schema.NotStructuralError, match=r"r: two gives it .*; parameters of one name"):
        schema.of_model(Both)


def test_defaults_that_depend_on_the_method_are_told_in_words() -> None:
    class One(HyperModel):
        """One."""

        type: Literal["lora"]
        r: int = 1
        """Rank."""

    class Two(HyperModel):
        """Two."""

        type: Literal["two"]
        r: int = 2
        """Rank."""

    class Both(HyperModel):
        """Both."""

        method: Annotated[One | Two, Field(discriminator="type")]
        """Which."""

    described = schema.of_model(Both)["properties"]["method"]["properties"]["r"]
    assert described["description"] == "Rank. Default 1 for lora; 2 for two."
    assert "default" not in described


# ---- the reference ----


def test_every_state_and_cause_is_explained() -> None:
    assert set(reference.STATES) == set(State)
    assert set(reference.CAUSES) == {str(cause) for cause in Cause}
    assert set(RETRY) == set(Cause)


def test_every_condition_and_reason_is_listed() -> None:
    page = reference.rendered()
    for name in (*Condition, *Reason):
        assert f"`{name}`" in page


def test_paths_of_the_schema() -> None:
    assert schema.at_path(("spec", "data", "train", 0, "weight")) is not None
    assert schema.at_path(("spec", "nothing")) is None
    assert schema.at_path(("status",)) is None
