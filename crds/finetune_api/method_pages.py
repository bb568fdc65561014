"""Generates ``docs/methods.md`` and tells ``finetune methods`` the same: all methods, figures, what they go with.

``python -m finetune_api.method_pages --write`` writes the page, ``--check`` fails where the committed file is another
one, without either it is printed. The figures were seen by the trainer's tests (``make methods-table``).
"""

import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from finetune_api.compatibility import COMPATIBILITY, Row
from finetune_api.generated import command
from finetune_api.guide import GUIDES, Refused
from finetune_api.methods import METHODS
from finetune_api.schema import accepted, of_model, text, unwrapped

PATH = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
FACTS = Path(__file__).with_name("method_facts.json")
HEAD = (
    *("Method", "Trained", "8B: trained", "8B: GiB", "ZeRO", "2 processes", "Packing", "Checkpointing", "4-bit"),
    "Merge",
)
NO_4BIT = "A base model in 4 bits is trained by qlora alone; every other method refuses such a model."
_ARXIV = re.compile(r"(?<=arXiv:)\d{4}\.\d{5}|(?<=, )\d{4}\.\d{5}(?=\))")

INTRODUCTION = """\
# Methods

<!-- Generated from crds/finetune_api by `make generate` (python -m finetune_api.method_pages --write). Do not edit. -->

`spec.method.type` names the method, its parameters stand beside it under their PEFT or paper names:

```yaml
method: {type: lora, r: 16, lora_alpha: 32, target_modules: all-linear}
```

`finetune methods` prints this table, `finetune methods lora` what is said of one method. Start with `lora`; with
`qlora` where memory is short; with `full` where data is plenty. NEFTune (`training.neftune_noise_alpha`) goes with all
of them. What 13 of them learn, forget and cost on a real model:
[methods-side-by-side.md](methods-side-by-side.md). Speed and memory on a GPU: [performance.md](performance.md).
"""
MEANING = """\
- *Trained*: weights trained and all weights, in the tests' small case on a Llama of two layers (`bitfit`: a GPT-2).
- *8B*: an 8B Llama with the method's defaults (`bitfit` has nothing to train there): weights trained, and memory of
  weights, gradients and AdamW in bf16 on one process, without activations.
- *ZeRO*, *2 processes*, *Packing*, *Checkpointing* (of gradients), *Merge*: what tests show to give the same losses,
  gradients or logits. What is not there is refused at admission, with the remedy.

How well a method learns is no column: it is a matter of the data, the rate and the number of steps, and a toy says
nothing of it. [methods-side-by-side.md](methods-side-by-side.md) compares on a real model.
"""


@cache
def facts() -> dict[str, Any]:
    """What the tests saw."""
    found: dict[str, Any] = json.loads(FACTS.read_text())
    return found


def memory(name: str, trained: int, total: int) -> float:
    """GiB of weights, gradients and AdamW's state of the 8B model, in bf16 and without ZeRO.

    Whole-model methods: DeepSpeed keeps bf16 weights and gradients, and float32 weights and two moments. Adapters are
    float32 with gradients and moments beside a frozen model in bf16, whose linear layers take 4.127 bits with qlora.
    """
    if COMPATIBILITY[name].whole_model:
        size: float = 2 * total + 14 * trained
    else:
        size = 2 * (total - trained) + 16 * trained
    if COMPATIBILITY[name].quantized:
        size -= (16 - 4.127) / 8 * facts()["linear_weights_8b"]
    return size / 2**30


def footnotes() -> dict[str, int]:
    """Every reason for a refusal, numbered as the table meets them."""
    met = (_reason(name, row, what) for name, row in COMPATIBILITY.items() for what in _ORDER)
    return {reason: number for number, reason in enumerate(dict.fromkeys(filter(None, met)), start=1)}


_ORDER = ("ZeRO", "packing", "gradient checkpointing", "4-bit", "merge")


def refused(row: Row) -> tuple[Refused, ...]:
    """What a row of the compatibility table excludes, but for 4-bit models."""
    found: dict[Refused, bool] = {
        "ZeRO": len(row.zero_stages) == 4,
        "packing": row.packing,
        "gradient checkpointing": row.gradient_checkpointing,
        "merge": row.merge,
    }
    return tuple(what for what, goes in found.items() if not goes)


def _reason(name: str, row: Row, what: str) -> str:
    if what == "4-bit":
        return "" if row.quantized else NO_4BIT
    return GUIDES[name].why[what] if what in refused(row) else ""


def cells(name: str, notes: dict[str, int]) -> tuple[str, ...]:
    """The row of a method, as :data:`HEAD` names its columns; refusals carry the number of their reason."""
    row, seen = COMPATIBILITY[name], facts()["methods"][name]

    def goes(what: str) -> str:
        reason = _reason(name, row, what)
        return f"no [{notes[reason]}]" if reason else "yes"

    stages = f"{row.zero_stages[0]}-{row.zero_stages[-1]}" if len(row.zero_stages) > 1 else str(row.zero_stages[0])
    large = seen["8b"]
    return (
        name,
        f"{seen['trained']:,} of {seen['total']:,}",
        _short(large["trained"]) if large else "-",
        f"{memory(name, large['trained'], large['total']):.1f}" if large else "-",
        stages + (f" [{notes[_reason(name, row, 'ZeRO')]}]" if len(row.zero_stages) < 4 else ""),
        "yes",
        *(goes(what) for what in _ORDER[1:]),
    )


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def lines(name: str) -> dict[str, str]:
    """Five lines on a method, each under its heading."""
    guide, kind = GUIDES[name], _class(name)
    said = unwrapped(kind.__doc__ or "")
    numbers = _ARXIV.findall(said)
    what = re.sub(r" \([^()]*arXiv[^()]*\)", "", said)
    listed = ", ".join(f"{key} {value}".strip() for key, _, value, _ in parameters(name))
    limits = [guide.limits, *dict.fromkeys(guide.why[what] for what in refused(COMPATIBILITY[name]))]
    return {
        "What": what,
        "When": guide.when,
        "Paper": ". ".join(filter(None, (guide.paper, ", ".join(f"arXiv:{number}" for number in numbers)))) or "none",
        "Parameters": listed or "none",
        "Limits": " ".join(limits),
    }


def parameters(name: str) -> list[tuple[str, str, str, str]]:
    """Name, what is accepted, default and meaning of each parameter of a method."""
    node = of_model(_class(name))
    return [
        (key, accepted(child), text(child["default"]), child["description"])
        for key, child in node["properties"].items()
        if key != "type"
    ]


def _class(name: str) -> Any:
    return next(m for m in METHODS if m.model_fields["type"].annotation.__args__[0] == name)  # type: ignore[union-attr]


def rendered() -> str:
    """The page."""
    return "\n".join([INTRODUCTION, *_table(), *_sections()]).rstrip() + "\n"


def _table() -> Iterator[str]:
    notes = footnotes()
    rows = [cells(name, notes) for name in COMPATIBILITY]
    lines = [HEAD, tuple("---" for _ in HEAD), *((f"[{row[0]}](#{row[0]})", *row[1:]) for row in rows)]
    yield "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    yield "\n".join(f"[{number}] {reason}<br>" for reason, number in notes.items()) + "\n"
    yield MEANING


def _sections() -> Iterator[str]:
    for name in COMPATIBILITY:
        told = lines(name)
        told["Paper"] = _ARXIV.sub(lambda found: f"[{found[0]}](https://arxiv.org/abs/{found[0]})", told["Paper"])
        told["Parameters"] = ", ".join(f"`{key}` {value}" for key, _, value, _ in parameters(name)) or "none"
        yield f"## {name}\n"
        yield "\n".join(f"- **{heading}**: {words}" for heading, words in told.items()) + "\n"


def main(arguments: list[str] | None = None) -> int:
    return command("method_pages", __doc__, PATH, rendered, arguments)


if __name__ == "__main__":
    sys.exit(main())
