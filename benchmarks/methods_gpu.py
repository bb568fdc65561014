"""Memory and speed of the fine-tuning methods on one GPU, at the size of models that people fine-tune.

    python benchmarks/methods_gpu.py                       # all cases: about 12 minutes on an H100, 34 GB of disk
    python benchmarks/methods_gpu.py --only qlora-33b dora
    python benchmarks/methods_gpu.py --tiny --cpu         # does it work at all?

Each case is a run as ``throughput.py`` makes it, through the operator's plan and the trainer, on random weights. A JSON
line is printed as soon as its run ends. ``qlora-33b``: the model is made in 4 bits, layer by layer; it fails where
training needs 24 GB.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from throughput import arguments, measure

EIGHT = {"shape": "8b", "length": 2048, "batch": 2, "steps": 12}
CASES: dict[str, dict[str, Any]] = {
    "qlora-33b": {
        "shape": "33b",
        "method": "qlora",
        "parameters": {"r": 16, "lora_alpha": 32},
        "length": 2048,
        "batch": 1,
        "checkpointing": True,
        "steps": 8,
        "limit_gb": 24,
    },
    "lora": EIGHT | {"method": "lora"},
    "qlora": EIGHT | {"method": "qlora"},
    "dora": EIGHT | {"method": "lora", "parameters": {"use_dora": True}},
    "adalora": EIGHT | {"method": "adalora", "parameters": {"init_r": 24, "target_r": 16, "tinit": 2, "tfinal": 4}},
    "prefix_tuning": EIGHT | {"method": "prefix_tuning"},
    "adapter": EIGHT | {"method": "adapter"},
}
TINY = {"33b": "tiny-4bit", "8b": "tiny"}


def main() -> int:
    """Run the cases; 1 where one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="the same on tiny models and short sequences")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "finetune-bench")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in asked.only:
        case = dict(CASES[name])
        limit = case.pop("limit_gb", None)
        if asked.tiny:
            case |= {"shape": TINY[case["shape"]], "length": 64}
        run = arguments().parse_args([])
        vars(run).update(case, cpu=asked.cpu)
        found = measure(run, asked.folder)
        if limit is not None and "peak_gib" in found:
            found["peak_gb"], found["limit_gb"] = round(found["peak_gib"] * 2**30 / 1e9, 1), limit
            failed += found["peak_gb"] >= limit
        failed += "error" in found
        print(json.dumps({"case": name, **case, **found}), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
