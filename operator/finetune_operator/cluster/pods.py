"""Pod template → what to run on this machine instead of a container. Pure but for the ports and folders handed in.

Called by ``local.py``, which plays the kubelet. A container sees the world through its mounts, its environment and its
network names; here each of these is translated, so that the manifests need not know on which cluster they run.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api import run
from finetune_operator.cluster import Object
from finetune_operator.manifests import ANNOTATION_GPUS, INDEX_LABEL

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
ONLY_FOR_IMAGES = ("HOME", "TMPDIR", "HF_HOME")
"""Set in containers because their root file system is read-only; here the user's own are better (tokens, caches)."""


@dataclass(frozen=True)
class Place:
    """What stands for the container's surroundings."""

    work: Path
    """Working directory."""
    mounts: Mapping[str, Path]
    """Mount path → folder of this machine."""
    termination: Path
    """File for the termination message."""
    ports: Mapping[int, int]
    """Port in the manifest → port on this machine."""
    hosts: Mapping[str, str]
    """Host names of the gang → address."""
    gpus: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    """Defaults: the user's environment and the manifest win over them."""


def gpus_wanted(pod: Object) -> int:
    """GPUs of one pod, by whatever resource or claim it asks for them."""
    return int((pod["metadata"].get("annotations") or {}).get(ANNOTATION_GPUS, "0"))


def command(container: Object, place: Place) -> list[str]:
    """Command and arguments, ``$(VAR)`` expanded as Kubernetes does, then translated."""
    values = variables(container, place)
    words = [*(container.get("command") or []), *(container.get("args") or [])]
    words = [translate(expand(word, values), place) for word in words]
    if words and words[0] in ("python", "python3"):
        words[0] = sys.executable
    return words


def variables(container: Object, place: Place) -> dict[str, str]:
    """The variables of the manifest, translated. What comes from Secrets is taken from the user's environment."""
    values: dict[str, str] = {}
    for entry in container.get("env") or []:
        name, value = entry["name"], entry.get("value")
        if value is None:
            continue
        translated = translate(expand(value, values), place)
        if name in ONLY_FOR_IMAGES and translated != value:
            continue
        if name == run.ENV_HTTP_PORT:
            translated = str(place.ports.get(int(value), value))
        values[name] = translated
    return values


def environment(container: Object, place: Place, outer: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of the process: the user's own, the manifest's over it."""
    inherited = dict(outer)
    if "PYTHONPATH" in inherited:  # relative entries were meant for the folder of the user
        entries = inherited["PYTHONPATH"].split(os.pathsep)
        inherited["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in entries if entry)
    return {
        **place.variables,
        **inherited,
        "PYTHONUNBUFFERED": "1",
        **variables(container, place),
        "CUDA_VISIBLE_DEVICES": ",".join(place.gpus),
    }


_REFERENCE = re.compile(r"\$\$|\$\(([^)\s]+)\)")


def expand(text: str, values: Mapping[str, str]) -> str:
    """``$(VAR)`` → its value; an unknown one stays as it is; ``$$`` is a plain ``$``."""

    def found(match: re.Match[str]) -> str:
        if match.group(0) == "$$":
            return "$"
        return values.get(match.group(1), match.group(0))

    return _REFERENCE.sub(found, text)


def translate(text: str, place: Place) -> str:
    """Paths, names and ports of the container → those of this machine."""
    if text == "/dev/termination-log":
        return str(place.termination)
    for mount in sorted(place.mounts, key=len, reverse=True):
        for scheme in ("", "file://"):
            start = scheme + mount
            if text == start or text.startswith(start + "/"):
                return scheme + str(place.mounts[mount]) + text[len(start) :]
    for name, address in place.hosts.items():
        text = text.replace(name, address)
    return re.sub(r"(?<=-port=)\d+$", lambda found: str(place.ports.get(int(found[0]), found[0])), text)


def new_pod(job: Object, index: int, name: str, uid: str, now: str) -> Object:
    """A pod of an Indexed Job as its controller makes it."""
    template, owner = job["spec"]["template"], job["metadata"]
    made_by = {"name": owner["name"], "uid": owner["uid"], "controller": True}
    number = {"name": INDEX_VARIABLE, "value": str(index)}
    spec = {**template["spec"], "hostname": f"{owner['name']}-{index}", "nodeName": "local"}
    for key in ("initContainers", "containers"):
        spec[key] = [{**c, "env": [number, *(c.get("env") or [])]} for c in spec.get(key) or [] if ours(c)]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            **(template.get("metadata") or {}),
            "name": name,
            "namespace": owner["namespace"],
            "uid": uid,
            "creationTimestamp": now,
            "labels": {
                **((template.get("metadata") or {}).get("labels") or {}),
                INDEX_LABEL: str(index),
                "batch.kubernetes.io/job-name": owner["name"],
                "job-name": owner["name"],
                "batch.kubernetes.io/controller-uid": owner["uid"],
            },
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", **made_by}],
        },
        "spec": spec,
        "status": {
            "phase": "Pending",
            "startTime": now,
            "podIP": "127.0.0.1",
            "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": now}],
            "initContainerStatuses": [waiting(c) for c in spec["initContainers"]],
            "containerStatuses": [waiting(c) for c in spec["containers"]],
        },
    }


def ours(container: Object) -> bool:
    """One of the operator's own containers: others need an image, and are not run here."""
    return container["name"] in (run.FETCH_CONTAINER, run.TRAINER_CONTAINER)


def waiting(container: Object) -> Object:
    """Status of a container that has not started."""
    return {"name": container["name"], "state": {"waiting": {"reason": "PodInitializing"}}}


def statuses(pod: Object) -> list[Object]:
    """The statuses of all containers, in the order they run."""
    status = pod["status"]
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def containers(pod: Object) -> list[Object]:
    """All containers, in the order they run."""
    return [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]
