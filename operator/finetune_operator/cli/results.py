"""What a run came to, for the person who waits for it. Called by ``main.py`` when the loop has ended.

Reads the status and, for outputs on this machine, the files that lie there.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api.causes import RETRY, Cause, Retry
from finetune_api.conditions import Condition, State
from finetune_api.run import TRAINER_CONTAINER
from finetune_api.spec import FineTuneJobSpec
from finetune_api.stages import STAGES
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cluster.store import Folder
from finetune_operator.observe import parse_time
from finetune_operator.status import condition, duration

ANSWERS = "answers.json"
TALKS = ("sft", "dpo", "kto", "orpo", "ppo", "grpo")
"""Stages whose models are talked with."""
FILES = (("metrics", "metrics.jsonl"), ("curves", "loss.png"), ("report", "report.html"))
LOG_LINES = 15


def tell(
    name: str, spec: FineTuneJobSpec, status: FineTuneJobStatus, folder: Folder, say: Callable[[str], None]
) -> None:
    """The summary of one job."""
    say("")
    say(f"{name}: {_headline(status)}")
    if (doubt := condition(status, Condition.HEALTHY)) is not None and doubt.status == "False":
        say(f"  Doubtful ({doubt.reason}): {doubt.message}")
    if status.state == State.SUCCEEDED:
        _succeeded(spec, status, say)
    elif status.state == State.FAILED:
        _failed(status, folder, say)
        for label, path in _files(spec):
            say(f"  {label:<12}{path}")


def _headline(status: FineTuneJobStatus) -> str:
    began, ended = parse_time(status.start_time), parse_time(status.completion_time)
    words = [status.state or str(State.PENDING)]
    if began and ended:
        words.append(f"after {duration((ended - began).total_seconds())}")
    shown = status.progress
    figures = []
    if shown and shown.max_steps:
        figures.append(f"step {shown.step} of {shown.max_steps}")
        figures += [f"loss {shown.loss}"] if shown.loss else []
    figures += [f"evaluation {key} {value}" for key, value in status.evaluation.items() if "/" not in key]
    if status.restarts:
        figures.append(f"{status.restarts} restart{'s' if status.restarts > 1 else ''}")
    return " ".join(words) + (f" ({', '.join(figures)})" if figures else "")


def _succeeded(spec: FineTuneJobSpec, status: FineTuneJobStatus, say: Callable[[str], None]) -> None:
    rows = [(output.kind, f"{output.uri} ({output.size}B)" if output.size else output.uri) for output in status.outputs]
    folder = _local(spec.output.uri)
    rows += _files(spec)
    if status.checkpoints:
        newest = status.checkpoints[-1]
        rows.append(("checkpoints", f"{_shown(newest.uri.rsplit('/', 1)[0])} (steps {_steps(status)})"))
    for label, value in rows:
        say(f"  {label:<12}{_shown(value)}")
    if status.outputs and (following := _next(spec, status.outputs[0].kind, _shown(status.outputs[0].uri))):
        say(f"  {'next':<12}{following}")
    if folder is not None:
        for answer in _answers(folder):
            say("")
            say(f"  {answer['prompt']}")
            say(f"    before  {_one_line(answer.get('before', ''))}")
            say(f"    after   {_one_line(answer.get('after', ''))}")


def _next(spec: FineTuneJobSpec, kind: str, place: str) -> str:
    """The command that looks at a result."""
    if STAGES[spec.stage].makes:
        return ""
    if spec.stage in TALKS:
        return f"finetune chat {place}" + (" --compare" if kind == "adapter" else "")
    return f"finetune evaluate {place} --data FILE"


def _files(spec: FineTuneJobSpec) -> list[tuple[str, str]]:
    """What a run on this machine tells of itself in files, whether it has finished or not."""
    output = _local(spec.output.uri)
    unfinished = output / "unfinished" if output else None
    folder = unfinished if unfinished and unfinished.is_dir() else output
    return [(label, str(folder / name)) for label, name in FILES if (folder / name).exists()] if folder else []


def _failed(status: FineTuneJobStatus, folder: Folder, say: Callable[[str], None]) -> None:
    found = condition(status, Condition.FAILED)
    if found is not None:
        say(f"  {found.message}")
    last = status.attempts[-1] if status.attempts else None
    if last is None:
        return
    if last.log and RETRY.get(Cause(last.cause)) is not Retry.NEVER:  # a mistake is told by its message
        say("")
        say(f"  The last lines of {last.pod}:")
        for line in last.log[-LOG_LINES:]:
            say(f"    {line}")
    if last.pod:
        logs = sorted(folder.log(last.pod, TRAINER_CONTAINER).parent.glob("*.log"))
        for path in logs:
            say(f"  {'log':<12}{path}")


def stopped(name: str, spec: FineTuneJobSpec, status: FineTuneJobStatus) -> str:
    """One line about a job that was interrupted."""
    newest = status.checkpoints[-1].step if status.checkpoints else None
    saved = "nothing was saved yet" if newest is None else f"a checkpoint of step {newest} is saved"
    step = status.progress.step if status.progress else 0
    report = next((f" Its report so far: {path}" for label, path in _files(spec) if label == "report"), "")
    return f"{name}: stopped at step {step}; {saved}.{report}"


def _steps(status: FineTuneJobStatus) -> str:
    return ", ".join(str(checkpoint.step) for checkpoint in status.checkpoints)


def _local(uri: str) -> Path | None:
    return Path(uri.removeprefix("file://")) if uri.startswith("file://") else None


def _shown(uri: str) -> str:
    """file:///x as the path it is."""
    return uri.removeprefix("file://")


def _answers(folder: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads((folder / ANSWERS).read_text())
    except (OSError, ValueError):
        return []
    return [answer for answer in found if isinstance(answer, dict) and answer.get("prompt")]


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"
