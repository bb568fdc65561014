"""YAML files → FineTuneJobs as the API would take them, or every mistake in them.

Called by the commands of ``main.py``. Three things a cluster does not do happen here, so that a file can be moved and
tried: ``file://./data.jsonl`` is made absolute, from the folder of the YAML file; ``--set`` changes fields; ``--cpu``
takes the GPUs out. Reads files, starts nothing.
"""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune_api import kubeyaml
from finetune_api.checks import close
from finetune_api.mistakes import Mistake, read
from finetune_api.schema import text
from finetune_api.spec import FineTuneJobSpec
from finetune_operator import __version__
from finetune_operator.cluster import Object
from finetune_operator.manifests import API_VERSION, GROUP, KIND
from finetune_operator.plan import merge
from finetune_operator.settings import Profile, Settings
from finetune_operator.settings import load as load_settings
from finetune_operator.settings import read as read_settings


class RefusedError(Exception):
    """What was given cannot be used: every mistake, a line each."""

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = list(mistakes)
        super().__init__("\n".join(self.mistakes))


@dataclass(frozen=True)
class Document:
    """One FineTuneJob of a file, valid."""

    source: str
    """Name of the file."""
    job: Object
    spec: FineTuneJobSpec

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and name."""
        return self.job["metadata"]["namespace"], self.job["metadata"]["name"]


def load(paths: Sequence[str], changes: Sequence[str] = (), *, cpu: bool = False) -> tuple[list[Document], list[str]]:
    """All FineTuneJobs of the files (``-``: standard input), and what was passed over.

    Raises :class:`RefusedError` with every mistake of every file.
    """
    found: list[Document] = []
    notes: list[str] = []
    mistakes: list[str] = []
    given: set[str] = set()
    for path in paths:
        try:
            objects = _objects(path)
        except RefusedError as refused:
            mistakes += refused.mistakes
            continue
        jobs = [o for o in objects if o.get("kind") == KIND]
        others = [o for o in objects if o.get("kind") != KIND]
        kinds = ", ".join(sorted({str(o.get("kind")) for o in others}))
        misspelt = [mistake for o in others for mistake in _misspelt(path, o)]
        mistakes += misspelt
        if not jobs and not misspelt:
            found_there = f", only {kinds}" if kinds else ""
            mistakes.append(f"{path}: no {KIND} in it{found_there}; accepted: kind: {KIND} of {API_VERSION}.")
        elif others and not misspelt:
            notes.append(f"{path}: {kinds} passed over; only {KIND} is read.")
        given |= {str(_metadata(job).get("name")) for job in jobs}
        for job in jobs:
            try:
                found.append(_document(path, job, changes, cpu))
            except RefusedError as refused:
                mistakes += refused.mistakes
    for change in changes:
        target = _CHANGE.match(change)
        if target is not None and target["job"] and target["job"] not in given:
            known = ", ".join(sorted(given)) or "none"
            mistakes.append(f"--set {change}: there is no job {target['job']}; accepted: {known}.")
    names = [document.key for document in found]
    for name in sorted({n for n in names if names.count(n) > 1}):
        mistakes.append(f"{name[1]}: given {names.count(name)} times; accepted: each name once in a namespace.")
    if mistakes:
        raise RefusedError(mistakes)
    return found, notes


def _objects(path: str) -> list[Object]:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        objects = kubeyaml.load(text)
    except OSError as error:
        raise RefusedError([f"{path}: cannot be read: {error.strerror or error}."]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        at = f" line {where.line + 1}, column {where.column + 1}" if where else ""
        raise RefusedError([f"{path}:{at} is not YAML: {getattr(error, 'problem', None) or error}."]) from error
    flat: list[Object] = []
    for one in objects:
        listed = isinstance(one, dict) and one.get("kind") == "List" and isinstance(one.get("items"), list)
        flat += one["items"] if listed else [one]
    for one in flat:
        if not isinstance(one, dict):
            raise RefusedError([f"{path}: holds {type(one).__name__}; accepted: Kubernetes objects."])
    return flat


def _misspelt(path: str, other: Object) -> Iterator[str]:
    """What was meant as a FineTuneJob and would be passed over."""
    kind, version = other.get("kind"), str(other.get("apiVersion"))
    label = f"{path}: {_metadata(other).get('name') or '(no name)'}"
    if kind is None:
        yield f"{label}: kind: it is missing; accepted: {KIND}; remedy: write kind: {KIND}"
    elif version.startswith(f"{GROUP}/") or close(str(kind), [KIND], 0.8):
        yield f'{label}: kind: "{kind}" is not accepted; accepted: {KIND}; remedy: write kind: {KIND}'


def _metadata(job: Object) -> Object:
    given = job.get("metadata")
    return given if isinstance(given, dict) else {}


def _document(path: str, job: Object, changes: Sequence[str], cpu: bool) -> Document:
    metadata = job.get("metadata")
    name = _metadata(job).get("name")
    label = f"{path}: {name or '(no name)'}"
    base = Path.cwd() if path == "-" else Path(path).absolute().parent
    if metadata is None or isinstance(metadata, dict):
        metadata = {**(metadata or {}), "namespace": _metadata(job).get("namespace") or "default"}
    job = {**job, "metadata": metadata, "spec": _absolute(job.get("spec"), base)}
    for change in changes:
        _change(job, change, str(name))
    if cpu and isinstance(job["spec"], dict):
        workers = job["spec"].get("workers")
        job["spec"]["workers"] = {**(workers if isinstance(workers, dict) else {}), "gpusPerWorker": 0}
    found = read(job)
    if not isinstance(found, FineTuneJobSpec):
        raise RefusedError(f"{label}: {mistake.text()}" for mistake in found)
    return Document(path, job, found)


_RELATIVE = re.compile(r"^file://(\.{1,2}(/.*)?)$")


def _absolute(value: Any, base: Path) -> Any:
    """``file://./x`` and ``file://../x`` → absolute, wherever they stand."""
    if isinstance(value, dict):
        return {key: _absolute(entry, base) for key, entry in value.items()}
    if isinstance(value, list):
        return [_absolute(entry, base) for entry in value]
    if isinstance(value, str) and (found := _RELATIVE.match(value)):
        slash = "/" if value.endswith("/") else ""
        return f"file://{(base / found.group(1)).resolve()}{slash}"
    return value


_CHANGE = re.compile(r"^(?:(?P<job>[a-z0-9][-a-z0-9.]*):)?(?P<path>[A-Za-z_][\w.\[\]-]*)=(?P<value>.*)$", re.DOTALL)


def _change(job: Object, change: str, name: str) -> None:
    """Apply one ``[JOB:]path=value``; the value is YAML."""
    found = _CHANGE.match(change)
    if found is None:
        raise RefusedError([f"--set {change}: accepted: [JOB:]field=value, e.g. training.max_steps=20."])
    if found["job"] and found["job"] != name:
        return
    try:
        value = _absolute(_value(found["value"]), Path.cwd())
    except yaml.YAMLError as error:
        raise RefusedError([f"--set {change}: the value is not YAML: {error}."]) from error
    steps: list[str | int] = [int(s) if s.isdigit() else s for s in re.findall(r"[^.\[\]]+", found["path"])]
    if steps[0] not in ("spec", "metadata"):
        steps.insert(0, "spec")
    at: Any = job
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        fits = isinstance(at, list) and isinstance(step, int) and step < len(at)
        if not fits and not (isinstance(at, dict) and isinstance(step, str)):
            raise RefusedError([f"--set {change}: there is no {step} in {found['path']} of job {name}."])
        if following is None:
            at[step] = value
        elif isinstance(at, dict) and not isinstance(at.get(step), dict | list):
            at[step] = {}
            at = at[step]
        else:
            at = at[step]


def _value(text: str) -> Any:
    """A YAML value; an empty one is null."""
    return next(iter(kubeyaml.load(text)), None)


def operator_settings(path: Path | None) -> Settings:
    """The operator's own settings. RefusedError with every mistake in them."""
    with _settings_explained(path):
        return load_settings(path)


@contextlib.contextmanager
def _settings_explained(path: Path | None) -> Iterator[None]:
    try:
        yield
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RefusedError([f"{path}: cannot be read: {error}."]) from error
    except ValidationError as error:
        raise RefusedError(f"{path}: {_setting(dict(found))}" for found in error.errors()) from error


def _setting(found: dict[str, Any]) -> str:
    """One mistake of the settings: field, value, what is accepted or was meant."""
    field = ".".join(str(part) for part in found["loc"])
    if found["type"] != "extra_forbidden":
        return f"{field}: {text(found['input'])} is not accepted: {found['msg']}."
    model: Any = Settings
    for part in found["loc"][:-1]:
        inner = {info.alias or name: info.annotation for name, info in model.model_fields.items()}.get(str(part))
        model = Profile if part == "profiles" else inner if inner is not None else model
    names = [info.alias or name for name, info in model.model_fields.items()]
    meant = close(str(found["loc"][-1]), names)
    remedy = f"did you mean {meant}?" if meant else "remove it, or correct its name"
    return f"{field}: there is no such setting; accepted: one of {', '.join(names)}; remedy: {remedy}"


def settings(path: Path | None, documents: Sequence[Document] = ()) -> tuple[Settings, list[str]]:
    """Settings for this machine, from a file as for ``finetune operator --config`` or from the chart's values; and what
    to tell of it.

    Profiles are the platform's. One that is not known here is replaced by the default, and that is said.
    """
    with _settings_explained(path):
        found = Settings.model_validate(_settings_of(path, read_settings(path)) if path else {})
    profiles = {"default": Profile(), **found.profiles}
    notes = []
    for name in sorted({d.spec.profile for d in documents} - profiles.keys()):
        notes.append(f"Profile {name} is not known here; the default is used (--profile-file gives profiles).")
        profiles[name] = profiles["default"]
    return found.model_copy(update={"profiles": profiles, "progress_interval": "1s"}), notes


_REPOSITORY = "finetune-trainer"
"""The chart's default of trainer.image.repository."""


def _settings_of(path: Path, given: Any) -> Object:
    """The operator's settings as they are; of Helm values the profiles, as the chart would write them."""
    given = {} if given is None else given
    fields = {field.alias or name for name, field in Settings.model_fields.items()}
    if not isinstance(given, dict) or (given.keys() - fields and not given.keys() & {"profiles", "trainer"}):
        raise RefusedError(
            [
                f"{path}: there are no profiles in it; accepted: the operator's settings, or Helm values; remedy: "
                "write profiles: and the profiles by name below it."
            ]
        )
    if given.keys() <= fields:
        return given
    profiles = {name: found for name, found in _map(given.get("profiles")).items() if found is not None}
    trainer = _map(given.get("trainer"))
    image = _map(trainer.get("image"))
    name = "/".join(
        filter(None, [str(image.get("registry") or "").rstrip("/"), image.get("repository") or _REPOSITORY])
    )
    version = f"@{image['digest']}" if image.get("digest") else f":{image.get('tag') or __version__}"
    defaults: Object = {"image": name + version}
    if image.get("pullPolicy"):
        defaults["imagePullPolicy"] = image["pullPolicy"]
    if trainer.get("imagePullSecrets"):
        defaults["template"] = {"spec": {"imagePullSecrets": trainer["imagePullSecrets"]}}
    return {"profiles": {name: merge(defaults, found) for name, found in {"default": {}, **profiles}.items()}}


def _map(value: Any) -> Object:
    return value if isinstance(value, dict) else {}


def check_profiles(path: Path | None, documents: Sequence[Document]) -> list[str]:
    """What to tell of the profiles the jobs name. Raises RefusedError for those that the file does not know."""
    if path is None:
        names = sorted({d.spec.profile for d in documents} - {"default"})
        return [f"Profile {name} is not checked; --profile-file gives the cluster's profiles." for name in names]
    known = sorted(settings(path)[0].profiles)
    mistakes = []
    for document in documents:
        name = document.spec.profile
        if name not in known:
            meant = close(name, known)
            remedy = f"did you mean {meant}?" if meant else "use one of them"
            mistake = Mistake("spec.profile", name, f"one of {', '.join(known)}", remedy)
            mistakes.append(f"{document.source}: {document.key[1]}: {mistake.text()}")
    if mistakes:
        raise RefusedError(mistakes)
    return []
