"""What the tests see of each method, for docs/methods.md: compared with the committed file, or written to it.

``make methods-table`` sets ``FINETUNE_METHOD_FACTS=write``; every other run fails where the file says something else.
"""

import json
import os
from typing import Any

import pytest

from finetune_api.method_pages import FACTS

WRITING = os.environ.get("FINETUNE_METHOD_FACTS") == "write"


def seen(method: str, **facts: Any) -> None:
    """Facts about one method: numbers, truths and lists to the letter, losses nearly.

    4-bit arithmetic is another one on every kind of CPU (bitsandbytes has kernels for each), and so are its losses.
    """
    document = json.loads(FACTS.read_text()) if FACTS.exists() else {"methods": {}}
    if WRITING:
        document["methods"].setdefault(method, {}).update(facts)
        FACTS.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        return
    known = {name: document["methods"].get(method, {}).get(name) for name in facts}
    nearly = 0.25 if facts.get("quantized") else 0.1
    for name, fact in facts.items():
        expected: Any = pytest.approx(known[name], abs=nearly) if name == "loss" else known[name]
        assert fact == expected, f"{FACTS.name}: {name} of {method} is another one now; run `make methods-table`"


def seen_of_all(**facts: Any) -> None:
    """Facts that are not of one method."""
    document = json.loads(FACTS.read_text()) if FACTS.exists() else {"methods": {}}
    if WRITING:
        FACTS.write_text(json.dumps(document | facts, indent=1, sort_keys=True) + "\n")
        return
    assert {name: document.get(name) for name in facts} == facts, "run `make methods-table`"
