"""Several GPUs of one host: speed, scaling against one GPU, memory, communication; and what becomes of a lost rank.

    python benchmarks/multi_gpu.py                     # all cases, on all GPUs of this machine
    python benchmarks/multi_gpu.py --only "lora, ZeRO-0" "qlora, ZeRO-2" --faults
    python benchmarks/multi_gpu.py --tiny --cpu        # does it work at all?

Every case is what a worker pod starts (``throughput.start_worker``). Rows are packed, 400 tokens on average. Cases on
one GPU run beside each other. Prints one JSON line per case as soon as it ends.
"""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import throughput
from throughput import Worker

from finetune_api.run import EXIT_STOPPED, Termination
from finetune_operator.cluster import processes


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    arguments: str
    """Of ``throughput.py``."""
    baseline: bool = True
    """It fits on one GPU: it is measured there too."""


ADAPTER = "--shape 8b --batch 2 --length 4096"
FULL = "--method full --checkpointing --batch 4 --length 4096"
CASES = [
    Case("lora, ZeRO-0", f"{ADAPTER} --method lora --zero 0"),
    Case("lora, ZeRO-0, accumulation 8", f"{ADAPTER} --method lora --zero 0 --accumulation 8 --steps 5"),
    Case("lora, ZeRO-1", f"{ADAPTER} --method lora --zero 1", baseline=False),
    Case("lora, ZeRO-2", f"{ADAPTER} --method lora --zero 2"),
    Case("lora, ZeRO-3, checkpointing", f"{ADAPTER} --method lora --zero 3 --checkpointing", baseline=False),
    Case("qlora, ZeRO-2", f"{ADAPTER} --method qlora --zero 2"),
    Case("full 2B, ZeRO-2", f"--shape 2b {FULL} --zero 2"),
    Case("full 2B, ZeRO-2, accumulation 8", f"--shape 2b {FULL} --zero 2 --accumulation 8 --steps 5"),
    Case("full 8B, ZeRO-3", f"--shape 8b {FULL} --zero 3 --steps 6", baseline=False),
    Case("full 8B, ZeRO-3, optimizer on the host", f"--shape 8b {FULL} --zero 3 --offload --steps 4", baseline=False),
]


def arguments(case: Case, options: argparse.Namespace, gpus: int) -> argparse.Namespace:
    """Of one run of the case."""
    words = f"--steps 10 {case.arguments} --packing --document 400 --gpus {gpus} --folder {options.folder}".split()
    if options.tiny:
        words += ["--shape", "tiny", "--length", "1024"]
    return throughput.arguments().parse_args(words + (["--cpu"] if options.cpu else []))


def start(case: Case, options: argparse.Namespace, gpus: list[int]) -> tuple[Worker, int]:
    """A run on these GPUs, and how many steps are wanted of it."""
    asked = arguments(case, options, len(gpus))
    profile = {"FINETUNE_PROFILE": str(options.folder / f"profile-{gpus[0]}")}
    return throughput.launch(asked, options.folder, gpus, **profile), asked.steps


def tell(**row: Any) -> None:
    """One row."""
    print(json.dumps(row), flush=True)


def measure(cases: list[Case], options: argparse.Namespace, gpus: list[int]) -> None:
    """All cases: first those on one GPU, as many side by side as there are GPUs, then those on all."""
    alone: dict[str, int] = {}
    waiting = [case for case in cases if case.baseline and not options.no_baseline]
    while waiting:
        side_by_side, waiting = waiting[: len(gpus)], waiting[len(gpus) :]
        for case in side_by_side:
            throughput.prepare(arguments(case, options, 1), options.folder)
        runs = [(case, *start(case, options, [gpu])) for case, gpu in zip(side_by_side, gpus, strict=False)]
        for case, worker, steps in runs:
            found = throughput.figures(worker, steps)
            alone[case.name] = found.get("tokens_per_second", 0)
            tell(case=case.name, gpus=1, **found)
    for case in cases:
        found = throughput.figures(*start(case, options, gpus))
        speed, one = found.get("tokens_per_second", 0), alone.get(case.name)
        tell(case=case.name, gpus=len(gpus), scaling=round(speed / one, 2) if one else None, **found)


FAULTS = {"kill -9 of one rank": signal.SIGKILL, "SIGSTOP of one rank": signal.SIGSTOP, "SIGTERM of all": None}
SILENCE = 20
"""Seconds after which a rank that says nothing counts as lost, in these runs."""


def break_it(name: str, options: argparse.Namespace, gpus: list[int]) -> None:
    """Start a run, let a fault happen in the middle of its steps, and tell what comes of it and when."""
    case = Case(name, "--shape 1b --method lora --batch 1 --length 4096 --zero 0")
    asked = arguments(case, options, len(gpus))
    worker = throughput.launch(asked, options.folder, gpus, FINETUNE_SILENCE=str(SILENCE))
    if not worker.reach(12):
        tell(fault=name, error=worker.process.wait(), tail=worker.log[-3000:])
        worker.end()
        return
    victim = pid_of(worker, len(gpus) - 1)
    step, began = len(worker.records), time.monotonic()
    if FAULTS[name] is None:
        worker.process.send_signal(signal.SIGTERM)
    else:
        os.kill(victim, FAULTS[name])
    code = worker.process.wait(timeout=300)
    seconds = time.monotonic() - began
    word = Termination.model_validate_json((worker.folder / "termination").read_bytes())
    saved = sorted(path.parent.name for path in worker.folder.glob("result/checkpoints/*/manifest.json"))
    tell(
        fault=name,
        at_step=step,
        seconds=round(seconds, 1),
        exit_code=code,
        stopped=code == EXIT_STOPPED,
        cause=word.cause,
        message=word.message,
        word_step=word.step,
        checkpoints=saved,
        tail=worker.log[-1500:] if options.verbose else "",
    )
    worker.end()


def pid_of(worker: Worker, rank: int) -> int:
    """The process of a rank."""
    for pid in processes.alive(str(worker.folder)):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if f"RANK={rank}".encode() in variables and b"finetune_trainer.run" in command:
            return pid
    raise LookupError(f"no process of rank {rank}")


def main() -> None:
    """Measure what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these cases, by name; none: no case")
    parser.add_argument("--faults", action="store_true", help="the faults too")
    parser.add_argument("--no-baseline", action="store_true", help="nothing on one GPU")
    parser.add_argument("--gpus", type=int, help="how many of the machine's GPUs; else all")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--folder", type=Path, default=throughput.arguments().get_default("folder"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.cpu:
        count = options.gpus or 1
    else:
        import torch

        count = options.gpus or torch.cuda.device_count()
    if unknown := set(options.only or []) - {case.name for case in CASES}:
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are: {'; '.join(c.name for c in CASES)}")
    wanted = [case for case in CASES if options.only is None or case.name in options.only]
    measure(wanted, options, list(range(count)))
    if options.faults:
        for name in FAULTS:
            break_it(name, options, list(range(count)))


if __name__ == "__main__":
    sys.exit(main())
