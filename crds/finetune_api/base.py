"""The two kinds of models the API is made of. Every other module of the package builds on them."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel


class KubeModel(BaseModel):
    """A piece of Kubernetes structure: attributes are written in camelCase in YAML."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class HyperModel(BaseModel):
    """A group of hyper-parameters: names are those of HF, TRL, PEFT and DeepSpeed, as they stand."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


Preserved = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
"""Keys and values that the schema does not know."""

DURATION = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"
Duration = Annotated[str, StringConstraints(pattern=DURATION, max_length=32)]
"""A length of time as Kubernetes writes it: 90s, 10m, 1h30m."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(duration: str) -> float:
    """``"1h30m"`` → 5400.0. The text must match :data:`Duration`."""
    total, number = 0.0, ""
    unit = ""
    for char in duration + "0":
        if char.isdigit() or char == ".":
            if unit:
                total += float(number) * _UNITS[unit]
                number, unit = "", ""
            number += char
        else:
            unit += char
    return total
