"""``finetune run --fresh``: what earlier runs of a job left on this machine, and what becomes of it.

Called by ``run.py``. Only what a run wrote itself is touched: the files its manifests list, its report, its
checkpoints. Whatever else lies in those folders stays. Nothing is deleted unless somebody at a terminal said so.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from finetune_operator.cli.files import Document
from finetune_operator.cluster.local import folder_of
from finetune_operator.cluster.store import free
from finetune_operator.plan import Owner, checkpoint_uri
from finetune_operator.status import size

MANIFEST = "manifest.json"
REPORT = ("report.html", "loss.png", "metrics.jsonl", "answers.json")
"""What a run writes into its output beside what the manifest lists."""
STATES = ("step-*", "attempts", "asked")
"""What a run writes into its folder of checkpoints."""


class Choice(StrEnum):
    """What becomes of what an earlier run left."""

    KEEP = "keep"
    """It is moved into a folder beside it."""
    DELETE = "delete"
    CANCEL = "cancel"


Ask = Callable[[str], Choice]


@dataclass(frozen=True)
class Left:
    """What earlier runs of one job left on this machine."""

    name: str
    checkpoints: tuple[Path, ...]
    results: tuple[Path, ...]
    folders: tuple[Path, ...]
    """That these lie in."""
    elsewhere: str
    """Where its checkpoints lie, if not on this machine."""
    told: str
    """How much of it there is, and where: a sentence."""

    def __bool__(self) -> bool:
        return bool(self.checkpoints or self.results)

    def put_aside(self) -> list[Path]:
        """Move it into new folders beside those it lies in; these come back."""
        places = []
        waiting = [*self.checkpoints, *self.results]
        for folder in self.folders:
            mine = [path for path in waiting if path.is_relative_to(folder)]
            waiting = [path for path in waiting if path not in mine]
            place = free(folder.with_name(f"{folder.name}.earlier-1"))
            for path in mine:
                _move(path, place / path.relative_to(folder), folder)
            places += [place] if mine else []
        return places

    def delete(self) -> None:
        """Delete it. It is moved out of the way first: nothing continues from what is half deleted."""
        for place in self.put_aside():
            shutil.rmtree(place)


def left_by(document: Document, root: Path) -> Left:
    """What earlier runs of a job left; ``root`` is the state folder."""
    namespace, name = document.key
    uri = checkpoint_uri(Owner(namespace, name, "", {}), document.spec)
    states, output = folder_of(uri, root), folder_of(document.spec.output.uri, root)
    checkpoints = tuple(path for pattern in STATES for path in sorted(states.glob(pattern))) if states else ()
    results = tuple(dict.fromkeys(_results(output))) if output else ()
    folders = [folder for folder in (output, states) if folder is not None]
    if states and output and states.is_relative_to(output):
        folders = [output]
    told = f"{name}: an earlier run left {' and '.join(_told(checkpoints, results))}."
    return Left(name, checkpoints, results, tuple(folders), "" if states else uri, told)


def _told(checkpoints: Sequence[Path], results: Sequence[Path]) -> Iterator[str]:
    if checkpoints:
        count = sum(path.name.startswith("step-") for path in checkpoints)
        yield f"{count} checkpoint{'s' * (count != 1)} ({_size(checkpoints)}) in {checkpoints[0].parent}"
    if results:
        report = " with its report" if any(path.name == REPORT[0] for path in results) else ""
        what = f"a result{report}" if any(path.name not in REPORT for path in results) else "a report"
        yield f"{what} ({_size(results)}) in {results[0].parent}"


def finished(document: Document, root: Path) -> Path | None:
    """The output folder, where a complete result lies in it."""
    output = folder_of(document.spec.output.uri, root)
    return output if output and _listed(output) is not None else None


def _listed(folder: Path) -> list[str] | None:
    """The files of a complete result, as its manifest lists them."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return [str(name) for name in manifest["files"]] if "kind" in manifest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _results(output: Path) -> Iterator[Path]:
    for folder, others in ((output, REPORT), (output / "merged", ()), (output / "unfinished", REPORT)):
        listed = _listed(folder)
        for name in (*(listed or ()), *others, *([MANIFEST] if listed is not None else [])):
            path = folder / name
            if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
                yield path


def _move(path: Path, to: Path, top: Path) -> None:
    """Move, and take away the folders that are empty then, but for ``top``."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, to)
    for folder in path.parents:
        if folder == top:
            break
        with contextlib.suppress(OSError):
            folder.rmdir()


def _size(paths: Sequence[Path]) -> str:
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return f"{size(sum(file.stat().st_size for file in files))}B"
