"""Valid specs with one thing changed, by hypothesis: what users, tools and accidents make of them.

``test_api_mistakes.py`` asks Python of each, ``tests/cluster_api/test_admission.py`` a real API server as well.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from finetune_api import kubeyaml, schema
from finetune_api.stages import SECTIONS as STAGE_SECTIONS
from tests.unit.good_specs import GOOD

EXAMPLES = Path(__file__).parents[2] / "examples"
Object = dict[str, Any]
Place = tuple[str | int, ...]


def _valid() -> Iterator[Object]:
    """The good specs, and the examples with their data where a cluster may look for it."""
    yield from (good.object for good in GOOD)
    for path in sorted(EXAMPLES.glob("*.yaml")):
        for document in kubeyaml.load(path.read_text().replace("file://./", "file:///home/")):
            if document["kind"] == "FineTuneJob":
                yield document


VALID = [copy.deepcopy(found) for found in _valid()]
SECTIONS = set(STAGE_SECTIONS)
_DECLARED = [path.replace("[]", ".0").split(".") for path, _, _ in schema.fields(schema.spec_schema(), "spec")]
_ANYTHING: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.5, 10**7, 2**31, 2**63, 1e-9, 1e300),
    *("", "x", "1", "2e-4", "true", "auto", "1h", "0s", "none", "~", " a ", "ä", "x" * 300, "s3://a/b", "job://x", "hf://a/b"),
    *([], ["a"], ["a", "a"], [1], [None], [{}], [[]], [{"uri": "s3://a/b"}]),
    *({}, {"a": 1}, {"a": None}, {"type": "full"}, {"uri": "s3://a/b"}, {"true": "a"}),
]  # fmt: skip


def _places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Everything in a value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from _places(child, (*at, key))


def _of_its_own(spec: Object) -> list[list[str]]:
    """The declared fields but for those of other methods and stages."""
    method = spec.get("method", {}).get("type", "lora")
    foreign = SECTIONS - {spec.get("stage", "sft"), *spec}
    own = {"type", *schema.METHOD_PARAMETERS[method]}
    return [p for p in _DECLARED if p[1] not in foreign and (p[1] != "method" or len(p) < 3 or p[2] in own)]


def _near(node: dict[str, Any]) -> list[Any]:
    """Values at the bounds of what a field takes, and beyond."""
    found: list[Any] = list(node.get("enum", ()))
    found += [str(name)[:-1] for name in found]
    for bound in (node.get("minimum"), node.get("maximum")):
        if bound is not None:
            step = 1 if node.get("type") == "integer" else 0.001
            found += [bound, bound - step, bound + step, float(bound), str(bound)]
    for size in (node.get("minLength"), node.get("maxLength")):
        if size is not None and size < 5000:
            found += ["x" * size, "x" * max(0, size - 1), "x" * (size + 1)]
    if "maxItems" in node:
        found += [["s3://a/b"] * node["maxItems"], ["a"] * (node["maxItems"] + 1)]
    return [*found, node["default"]] if "default" in node else found


@st.composite
def changed_specs(draw: st.DrawFn) -> Object:
    """A valid object with one thing in its spec changed, taken out, emptied, or added."""
    raw = copy.deepcopy(draw(st.sampled_from(VALID)))
    if draw(st.booleans()):
        place = draw(st.sampled_from(list(_places(raw["spec"], ("spec",)))))
    else:
        path = draw(st.sampled_from(_of_its_own(raw["spec"]) if draw(st.integers(0, 9)) else _DECLARED))
        place = tuple(int(part) if part.isdigit() else part for part in path)
    *way, last = place
    parent: Any = raw
    for part, following in zip(way, place[1:], strict=True):
        if isinstance(parent, dict):
            empty: Any = [{}] if isinstance(following, int) else {}
            if not isinstance(parent.get(part), dict | list) or (isinstance(following, int) and parent[part] == []):
                parent[part] = empty
        parent = parent[part]
    if draw(st.integers(0, 4)) == 0 and (isinstance(last, int) or last in parent):
        del parent[last]
    elif draw(st.integers(0, 9)) == 0 and isinstance(last, str):
        value = parent.pop(last, 1)
        parent[draw(st.sampled_from([f"{last}s", last[:-1] or "x", last.upper(), f"{last}_", "name"]))] = value
    else:
        node = schema.at_path(place) or {}
        near = _near(node)
        value = copy.deepcopy(draw(st.sampled_from(near if near and draw(st.booleans()) else _ANYTHING)))
        if isinstance(parent, list) and last == len(parent):
            parent.append(value)
        else:
            parent[last] = value
    return raw
