"""Checkpoints: what one is, which one a run continues from, and how it is read.

``<checkpoint_uri>/step-N/`` holds one safetensors file per writing process (named fragments of the trainable
state, see ``state.py``), ``metrics.jsonl``, ``run.json`` and, written last, ``manifest.json`` with the size and
sha256 of every file. A folder without a valid manifest does not exist. No random state is kept: every draw of a
run is a function of (seed, step, place in the batch), see ``engine.py``; and the learning rate is one of the step.

Called by ``run.py`` (resume) and ``saving.py`` (the format). Reading is agreed on by all processes through
``World``; each process downloads only the files that hold its ranges, once per node.
"""

import contextlib
import fcntl
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from finetune_api.causes import Cause
from finetune_api.run import CheckpointInfo, TrainerConfig
from finetune_api.stages import SECTIONS
from finetune_trainer.fence import Fence
from finetune_trainer.outcome import RunError
from finetune_trainer.storage import Store
from finetune_trainer.world import World

if TYPE_CHECKING:
    from finetune_trainer.state import TrainableState

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
RUN = "run.json"
FORMAT = 1

T = TypeVar("T")


class File(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    size: int
    sha256: str
    fragments: dict[str, tuple[int, int]] = {}
    """Range [start, stop) that the file holds of each (flattened) parameter."""


class Manifest(BaseModel):
    """``manifest.json``: written last, it makes a folder a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    step: int
    """Optimizer steps done."""
    position: int
    """Sequences of the data stream that were used, over all processes."""
    adam_steps: int
    time: str
    attempt: int
    run: str
    world_size: int
    global_batch_size: int
    identity: dict[str, Any]
    """What the result depends on (:func:`identity`), by dotted name."""
    digest: str
    """sha256 of ``identity``."""
    inputs: dict[str, str] = {}
    """Digests of the model's and data's files as this run read them."""
    parameters: dict[str, tuple[int, ...]]
    """Shape of every trainable parameter."""
    files: dict[str, File]
    checksum: str = ""
    """sha256 of this document without this field."""

    def sealed(self) -> bytes:
        """The document with its checksum."""
        body = self.model_copy(update={"checksum": ""})
        checksum = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
        return self.model_copy(update={"checksum": checksum}).model_dump_json().encode()

    @classmethod
    def opened(cls, content: bytes) -> "Manifest":
        """Read a manifest. ValueError says what is wrong with it."""
        try:
            manifest = cls.model_validate_json(content)
        except ValidationError as error:
            raise ValueError(f"its manifest cannot be read: {error.errors()[0]['msg']}") from error
        if manifest.sealed() != manifest.model_dump_json().encode():
            raise ValueError("its manifest does not match its own checksum")
        if manifest.format != FORMAT:
            raise ValueError(f"its format is {manifest.format}; this trainer reads {FORMAT}")
        return manifest

    def info(self, store: Store, content: bytes) -> CheckpointInfo:
        """What the operator is told."""
        return CheckpointInfo(
            step=self.step,
            uri=store.uri(folder(self.step)),
            digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
            size=len(content) + sum(file.size for file in self.files.values()),
            time=self.time,
        )


def folder(step: int) -> str:
    """``step-200``, the folder of a step's checkpoint."""
    return f"step-{step}"


_STEERING = {
    "training": {
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "eval_steps",
        "logging_steps",
    },
    "data": {"eval"},
    "model": {"trust_remote_code"},
    "deepspeed": {"zero_optimization", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer"},
}
"""Fields that steer a run or cut its batches, and leave its result the same."""


def identity(config: TrainerConfig) -> dict[str, Any]:
    """What the result of a run depends on, by dotted name (``training.learning_rate``)."""
    document = config.model_dump(mode="json")
    kept = {key: document[key] for key in ("stage", "model", "method", "data", "training", "deepspeed")}
    kept |= {section: document[section] for section in SECTIONS if document[section] is not None}
    for section, steering in _STEERING.items():
        kept[section] = {key: value for key, value in kept[section].items() if key not in steering}
    kept["global_batch_size"] = config.global_batch_size
    return dict(_dotted(kept))


def digest_of(what: dict[str, Any]) -> str:
    """sha256 of a document, the same for the same content."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``name: then → now`` of every field that differs."""
    missing = "(unset)"
    return [
        f"{name}: {json.dumps(then[name]) if name in then else missing}"
        f" → {json.dumps(now[name]) if name in now else missing}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name, missing) != now.get(name, missing)
    ]


@dataclass
class Survey:
    """What a checkpoint folder holds."""

    complete: list[tuple[Manifest, CheckpointInfo]] = field(default_factory=list)
    """Those with a valid manifest whose files are all there in the right size; newest first."""
    broken: list[CheckpointInfo] = field(default_factory=list)


def survey(store: Store) -> Survey:
    """Look at every ``step-N/``: manifests and file sizes, not contents."""
    sizes: dict[int, dict[str, int]] = {}
    for entry in store.list():
        top, _, name = entry.path.partition("/")
        number = top.removeprefix("step-")
        if top.startswith("step-") and number.isdigit() and name:
            sizes.setdefault(int(number), {})[name] = entry.size
    found = Survey()
    for step in sorted(sizes, reverse=True):
        there = sizes[step]
        try:
            if MANIFEST not in there:
                raise ValueError("it has no manifest: it was never completed")
            content = store.get(f"{folder(step)}/{MANIFEST}")
            manifest = Manifest.opened(content)
            if manifest.step != step:
                raise ValueError(f"its manifest is that of step {manifest.step}")
            for name, file in manifest.files.items():
                if name not in there:
                    raise ValueError(f"its file {name} is missing")
                if there[name] != file.size:
                    raise ValueError(f"its file {name} has {there[name]} bytes instead of {file.size}")
        except (ValueError, FileNotFoundError) as error:
            found.broken.append(CheckpointInfo(step=step, uri=store.uri(folder(step)), problem=str(error)))
        else:
            found.complete.append((manifest, manifest.info(store, content)))
    return found


@dataclass
class Resumed:
    """What a run starts with: nothing, or where a checkpoint left it."""

    step: int = 0
    position: int = 0
    info: CheckpointInfo | None = None
    attempt: int = 0
    """That wrote the checkpoint."""
    world_size: int = 0
    """That wrote the checkpoint."""
    metrics: bytes = b""
    """``metrics.jsonl`` up to the step (rank 0 only)."""
    run: dict[str, Any] = field(default_factory=dict)
    """``run.json`` (rank 0 only)."""
    kept: list[CheckpointInfo] = field(default_factory=list)
    """Complete checkpoints, oldest first (rank 0 only)."""
    skipped: list[CheckpointInfo] = field(default_factory=list)
    """Broken ones (rank 0 only)."""
    changed: list[str] = field(default_factory=list)
    """What has changed since the checkpoint, where it is gone on from nevertheless (rank 0 only)."""


def resume(
    store: Store,
    config: TrainerConfig,
    world: World,
    state: "TrainableState",
    fence: Fence | None,
    inputs: dict[str, str],
    work: Path,
) -> Resumed:
    """Put the newest checkpoint that verifies into ``state``, on all processes the same one.

    ``fence`` is rank 0's claim (None elsewhere), ``inputs`` the digests of model and data, ``work`` a scratch
    folder that the processes of a node share. Raises RunError(CHECKPOINT_MISMATCH) where the newest checkpoint is
    of another configuration, or data, and for ``resume: never`` where there is one of another run.
    """
    mine = identity(config)
    result = Resumed()
    candidates: list[tuple[Manifest, CheckpointInfo]] = []
    if world.first:
        found = persistently(lambda: survey(store))
        candidates, result.skipped = found.complete, found.broken
    for turn in range(1_000_000):
        offer: dict[str, Any] = {}
        if world.first and turn < len(candidates):
            manifest, _ = candidates[turn]
            offer = {"manifest": manifest.model_dump(mode="json")}
            if problem := _of_another_run(config, manifest, fence, store) or _changed(config, manifest, inputs, store):
                offer = {"refused": problem}
        offer = world.share("resume/offer", offer)
        if "refused" in offer:
            raise RunError(Cause.CHECKPOINT_MISMATCH, offer["refused"])
        if not offer:
            break
        manifest = Manifest.model_validate(offer["manifest"])
        local = work / "resume" / folder(manifest.step)
        problems = world.gather("resume/verify", _fetch(store, manifest, state, world, local))
        problem = next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text), "")
        if problem:
            if world.first:
                info = candidates[turn][1]
                result.skipped.append(info.model_copy(update={"problem": problem.partition(": ")[2]}))
            continue
        _apply(manifest, state, local)
        result.step, result.position = manifest.step, manifest.position
        result.attempt, result.world_size = manifest.attempt, manifest.world_size
        if world.first:
            result.info = candidates[turn][1]
            result.changed = differences(manifest.identity, mine)
            result.changed += differences(manifest.inputs, inputs) if manifest.inputs and inputs else []
            result.kept = [info for _, info in reversed(candidates[turn:])]
            result.metrics = (local / METRICS).read_bytes() if METRICS in manifest.files else b""
            result.run = json.loads((local / RUN).read_bytes()) if RUN in manifest.files else {}
        world.barrier("resume/read")
        _remove(local)
        break
    result.skipped.sort(key=lambda info: info.step)
    return result


def take(store: Store, step: int, world: World, state: "TrainableState", work: Path) -> str:
    """Put the checkpoint of a step of this run into ``state``, on all processes; what was wrong with it, or nothing.
    Collective."""
    content: str | None = None
    if world.first:
        try:
            content = store.get(f"{folder(step)}/{MANIFEST}").decode()
        except (FileNotFoundError, RunError):
            content = ""
    content = world.share("take/manifest", content)
    if not content:
        return "it is not there"
    try:
        manifest = Manifest.opened(content.encode())
    except ValueError as error:
        return str(error)
    local = work / "best" / folder(step)
    problems = world.gather("take/verify", _fetch(store, manifest, state, world, local))
    if any(problems):
        return next(problem for problem in problems if problem)
    _apply(manifest, state, local)
    world.barrier("take/read")
    _remove(local)
    return ""


def refuse_changes(store: Store, config: TrainerConfig, inputs: dict[str, str]) -> None:
    """Raise RunError(CHECKPOINT_MISMATCH) as :func:`resume` would, before anything is loaded."""
    if config.resume == "never":
        return
    found = persistently(lambda: survey(store)).complete
    if found and (problem := _changed(config, found[0][0], inputs, store)):
        raise RunError(Cause.CHECKPOINT_MISMATCH, problem)


def _of_another_run(config: TrainerConfig, manifest: Manifest, fence: Fence | None, store: Store) -> str:
    if config.resume != "never" or fence is None:
        return ""
    # An operator of an older version gave no identity: what an earlier attempt of this job saved is empty then.
    if manifest.run == fence.run if manifest.run else fence.attempt > 1:
        return ""
    return (
        f"checkpoint.resume is never, but {store.uri(folder(manifest.step))} is a checkpoint of another run. Choose "
        "another checkpoint.uri, delete that folder, or set checkpoint.resume: auto to continue from it."
    )


_SHAPING = ("stage", "model", "method")
"""What a checkpoint's weights belong to: of another one they cannot be continued."""
_GO_ON = (
    "To train on from there with what it is now, set checkpoint.resume: always (weights and optimizer state stay; "
    "rows, their order and the learning rate follow the new configuration)"
)


def _changed(config: TrainerConfig, manifest: Manifest, inputs: dict[str, str], store: Store) -> str:
    """Why a run with this configuration and these files cannot go on from a checkpoint; empty: it can."""
    where = store.uri(folder(manifest.step))
    of_model = {config.model.uri, *(adapter.uri for adapter in config.model.adapters)}
    fields = differences(manifest.identity, identity(config))
    files = differences(manifest.inputs, inputs) if manifest.inputs and inputs else []
    shaping = [change for change in fields if change.partition(":")[0].partition(".")[0] in _SHAPING]
    shaping += [change for change in files if any(change.startswith((f"{uri}: ", f"{uri}@")) for uri in of_model)]
    if config.resume == "always":
        fields, files = shaping, []
    if not fields and not files:
        return ""
    way = f"{_GO_ON}. Else put it back" if not shaping else "Put it back"
    way += ", or choose another checkpoint.uri to start anew."
    if fields:
        what = f"was made with another configuration. Then → now: {'; '.join(fields[:12])}"
        return f"The newest checkpoint {where} {what}. {way}"
    what = f"The model or data files are not those that {where} was made with. Digests then → now"
    short = re.sub(r"(sha256:[0-9a-f]{12})[0-9a-f]+", r"\1…", "; ".join(files[:6]))
    return f"{what}: {short}. {way}"


def _needed(manifest: Manifest, state: "TrainableState", world: World) -> list[str]:
    ranges = {fragment.name: (fragment.start, fragment.stop) for fragment in state.fragments()}
    names = [METRICS, RUN] if world.first else []
    for name, file in manifest.files.items():
        if any(
            (mine := ranges.get(parameter)) and mine[0] < stop and start < mine[1]
            for parameter, (start, stop) in file.fragments.items()
        ):
            names.append(name)
    return [name for name in names if name in manifest.files]


def _fetch(store: Store, manifest: Manifest, state: "TrainableState", world: World, local: Path) -> str:
    """Download and verify the files this process needs; what is wrong with them, or nothing."""
    try:
        for name in _needed(manifest, state, world):
            _download(store, f"{folder(manifest.step)}/{name}", local / name, manifest.files[name])
    except FileNotFoundError:
        return f"its file {name} is missing"
    except ValueError as error:
        return str(error)
    return ""


def _download(store: Store, path: str, to: Path, file: File) -> None:
    """One file, once per node: the processes of a node take turns, all but the first find it done."""
    to.parent.mkdir(parents=True, exist_ok=True)
    done = to.with_name(to.name + ".verified")
    with to.with_name(to.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists() and done.read_text() == file.sha256:
            return
        persistently(lambda: store.download(path, to))
        if (actual := sha256_of(to)) != file.sha256:
            raise ValueError(f"its file {to.name} is damaged: sha256 {actual[:12]}… instead of {file.sha256[:12]}…")
        done.write_text(file.sha256)


def _apply(manifest: Manifest, state: "TrainableState", local: Path) -> None:
    """Copy the ranges into the live state. Collective: ends with the model's own weights in step."""
    from safetensors import safe_open

    where: dict[str, list[tuple[int, int, str]]] = {}
    for name, file in manifest.files.items():
        for parameter, (start, stop) in file.fragments.items():
            where.setdefault(parameter, []).append((start, stop, name))
    with contextlib.ExitStack() as stack:
        opened: dict[str, Any] = {}
        for fragment in state.fragments():
            shape = manifest.parameters.get(fragment.name)
            if shape != fragment.shape:
                raise RunError(
                    Cause.CHECKPOINT_MISMATCH,
                    f"Parameter {fragment.name} is {list(fragment.shape)} in this run and "
                    f"{list(shape) if shape else 'absent'} in the checkpoint of step {manifest.step}: the model "
                    "or the method is another one. Choose another checkpoint.uri to start anew.",
                )
            copied = 0
            for start, stop, name in where.get(fragment.name, []):
                begin, end = max(start, fragment.start), min(stop, fragment.stop)
                if begin >= end:
                    continue
                if name not in opened:
                    opened[name] = stack.enter_context(safe_open(local / name, framework="pt"))
                for kind, live in fragment.tensors.items():
                    stored = opened[name].get_slice(f"{kind}/{fragment.name}")[begin - start : end - start]
                    live[begin - fragment.start : end - fragment.start].copy_(stored)
                copied += end - begin
            if copied != fragment.stop - fragment.start:
                raise RunError(
                    Cause.CHECKPOINT_MISMATCH,
                    f"The checkpoint of step {manifest.step} holds only {copied} of the "
                    f"{fragment.stop - fragment.start} values of {fragment.name} that this process needs.",
                )
    state.set_steps_taken(manifest.adam_steps)
    state.sync()


def persistently(work: Callable[[], T], tries: int = 6, first_pause: float = 0.5) -> T:
    """``work()``, tried again with growing pauses where the storage fails.

    Only RunError(STORAGE_UNAVAILABLE) is: what is not there and what is forbidden stays so.
    """
    for attempt in range(tries - 1):
        try:
            return work()
        except RunError as error:
            if error.cause is not Cause.STORAGE_UNAVAILABLE:
                raise
            time.sleep(first_pause * 2**attempt)
    return work()


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def _dotted(document: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(document, dict) and document:
        for key, value in document.items():
            yield from _dotted(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, document


def newest_first(infos: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
    """By step, descending."""
    return sorted(infos, key=lambda info: info.step, reverse=True)
