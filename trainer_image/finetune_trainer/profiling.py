"""Where the time of a step goes on the GPU: computing, communicating, both, or neither.

``FINETUNE_PROFILE`` names a folder: rank 0 records a few steps, when compilation is over, writes the trace there
(``trace.json``, for https://ui.perfetto.dev) with its sums (``profile.json``), and prints them. Kernels only, so that
recording hardly costs. Called by ``run.py`` after every step.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ENV_PROFILE = "FINETUNE_PROFILE"
FIRST, COUNT = 4, 2
"""The steps that are recorded, counted from the attempt's first."""

Spans = list[tuple[float, float]]


class Profile:
    """Records steps ``FIRST`` to ``FIRST + COUNT - 1`` of this attempt; without a GPU or a folder nothing."""

    def __init__(self, active: bool) -> None:
        self._folder = os.environ.get(ENV_PROFILE, "") if active else ""
        self._done = 0
        self._recorder: Any = None

    def stepped(self) -> dict[str, float]:
        """A step was made. The sums, once the last recorded one is over; else {}."""
        if not self._folder:
            return {}
        self._done += 1
        if self._done == FIRST - 1:
            from torch.profiler import ProfilerActivity, profile

            self._recorder = profile(activities=[ProfilerActivity.CUDA])
            self._recorder.start()
        if self._done < FIRST + COUNT - 1 or self._recorder is None:
            return {}
        recorder, self._recorder = self._recorder, None
        self._folder, folder = "", Path(self._folder)
        import torch

        torch.cuda.synchronize()
        recorder.stop()
        folder.mkdir(parents=True, exist_ok=True)
        recorder.export_chrome_trace(str(folder / "trace.json"))
        sums = summary(json.loads((folder / "trace.json").read_text())["traceEvents"], COUNT)
        (folder / "profile.json").write_text(json.dumps(sums))
        return sums


def summary(events: Iterable[dict[str, Any]], steps: int) -> dict[str, float]:
    """Seconds per step of a trace of kernels: ``span`` (from the first to the last kernel), ``computing``,
    ``communicating`` (NCCL's kernels, with the wait for the slowest peer), ``communicating_alone`` (while nothing is
    computed) and ``idle``."""
    computing: Spans = []
    communicating: Spans = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kind = communicating if "nccl" in event["name"].lower() else computing
            kind.append((event["ts"], event["ts"] + event["dur"]))
    both = _union([*computing, *communicating])
    if not both:
        return {}
    busy, computed = _length(both), _length(_union(computing))
    span = both[-1][1] - both[0][0]
    sums = {
        "span": span,
        "computing": computed,
        "communicating": _length(_union(communicating)),
        "communicating_alone": busy - computed,
        "idle": span - busy,
    }
    return {name: round(value / 1e6 / steps, 5) for name, value in sums.items()}


def _union(spans: Spans) -> Spans:
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)
