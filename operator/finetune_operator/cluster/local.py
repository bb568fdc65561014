"""The cluster that is this machine: pods are processes, objects are files, nothing needs root or a container.

Called by ``reconcile.py`` through the ``Cluster`` protocol, and by ``cli/run.py``, which submits jobs and waits. It
plays API server, Job controller and kubelet for exactly what ``manifests.py`` makes, and writes what they would write,
so that ``observe.py`` reads both clusters alike. It decides nothing about a run.

No thread but the caller's changes anything: one thread per process waits for its end and puts a word into a queue,
which :meth:`LocalCluster.wait` works off. Processes die with this one (``processes.py``); what a killed one left behind
is put in order by the next :meth:`LocalCluster.claim`.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from finetune_api import run
from finetune_api.causes import Cause
from finetune_operator import manifests
from finetune_operator.cluster import ClusterError, Object, is_same, pods, processes
from finetune_operator.cluster.gpus import Gpus, visible
from finetune_operator.cluster.store import Folder, tail
from finetune_operator.observe import format_time

Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""

NODE = "local"
CPU_GANGS = 1
"""Gangs without GPUs that run at the same time; further ones are queued."""
CLAIMS = "claims"
"""Below the state folder: a folder for each PersistentVolumeClaim."""
PROGRESS_TIMEOUT = 2.0
LOG_BYTES, LOG_LINES = 2048, 80  # what a kubelet keeps with terminationMessagePolicy FallbackToLogsOnError


def default_cache() -> Path:
    """Where models and data are kept for all runs: ``$FINETUNE_CACHE``, else below ``~/.cache``."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(run.ENV_CACHE) or home / "finetune-operator") / "models"


@dataclass
class _Gang:
    """A Job whose pods were made: what it holds of this machine."""

    key: Key
    job: str
    gpus: list[str]
    master_port: int
    pods: set[str] = field(default_factory=set)


@dataclass
class _Life:
    """A pod with a process."""

    key: Key
    pod: str
    gang: _Gang
    place: pods.Place
    container: str = ""
    process: "subprocess.Popen[bytes] | None" = None
    kill_at: float | None = None
    """When SIGTERM is followed by SIGKILL (monotonic)."""
    ending: bool = False
    """Told to end: no further container is started."""


class LocalCluster:
    """See the module. Use from one thread; only :meth:`wake` may be called from signal handlers."""

    def __init__(
        self,
        root: Path,
        *,
        gpus: Gpus | None = None,
        cache: Path | None = None,
        told: Callable[[Object], None] = lambda event: None,
    ) -> None:
        """``root``: the state folder. ``told`` is called with every event."""
        self.root = root.absolute()
        self.gpus = gpus if gpus is not None else Gpus(visible())
        self._cache = (cache or default_cache()).absolute()
        self._told = told
        self._words: SimpleQueue[tuple[Key, str] | None] = SimpleQueue()
        self._folders: dict[Key, Folder] = {}
        self._lives: dict[tuple[Key, str], _Life] = {}
        self._gangs: dict[tuple[Key, str], _Gang] = {}
        self._queue: list[tuple[Key, str]] = []
        self._leaving: list[tuple[Key, str]] = []
        self._changed: set[Key] = set()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def folder(self, namespace: str, name: str) -> Folder:
        """The files of one FineTuneJob."""
        return self._folder((namespace, name))

    def _folder(self, key: Key) -> Folder:
        found = self._folders.get(key)
        if found is None:
            found = self._folders[key] = Folder(self.root / key[0] / key[1])
        return found

    # --- jobs, for the command line ---------------------------------------------------------------------------

    def claim(self, namespace: str, name: str) -> None:
        """Become the one that runs this job, and put in order what a killed predecessor left."""
        folder = self.folder(namespace, name)
        if not folder.claim():
            raise ClusterError(
                f"Another process runs {name} in {folder.path}. Wait for it, stop it, or use another --state-dir."
            )
        self._recover((namespace, name), folder)

    def submit(self, manifest: Object) -> Object:
        """Make or change a FineTuneJob, as ``kubectl apply`` does; its status stays."""
        metadata = manifest["metadata"]
        folder = self.folder(metadata["namespace"], metadata["name"])
        with folder.changing():
            old = folder.job
            new: Object = {"uid": str(uuid.uuid4()), "creationTimestamp": _now(), "generation": 0}
            kept: Object = old["metadata"] if old else new
            changed = old is None or old.get("spec") != manifest.get("spec")
            job = {
                **manifest,
                "metadata": {**metadata, **kept, "generation": kept["generation"] + (1 if changed else 0)},
                "status": (old or {}).get("status") or {},
            }
            for part in ("labels", "annotations"):
                if part in metadata:
                    job["metadata"][part] = metadata[part]
            folder.write_job(job)
        return job

    def set_suspended(self, namespace: str, name: str, suspended: bool) -> None:
        """Change ``spec.suspend``; gone already is fine."""
        folder = self.folder(namespace, name)
        with folder.changing():
            job = folder.job
            if job is not None and bool(job["spec"].get("suspend")) != suspended:
                job["spec"]["suspend"] = suspended
                job["metadata"]["generation"] += 1
                folder.write_job(job)

    def forget(self, namespace: str, name: str, *, keep: bool = False) -> None:
        """Take a FineTuneJob away with everything made for it, its logs too; ``keep``: only put all of it aside."""
        key = (namespace, name)
        for life in [life for life in self._lives.values() if life.key == key]:
            self._kill(life)
            self._lives.pop((key, life.pod))
        for gang in [gang for gang in self._gangs.values() if gang.key == key]:
            self._dissolve(gang)
        self._queue = [entry for entry in self._queue if entry[0] != key]
        folder = self._folder(key)
        if keep:
            folder.put_aside()
        else:
            folder.forget()

    def runs(self, namespace: str, name: str) -> bool:
        """A process of this job is alive."""
        return any(life.key == (namespace, name) for life in self._lives.values())

    # --- time ---------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """End a :meth:`wait` that is going on, or the next one. Safe in a signal handler."""
        self._words.put(None)

    def wait(self, timeout: float | None) -> set[Key]:
        """Wait until something happened, at most ``timeout`` seconds; play the cluster's part in it.

        The FineTuneJobs it happened to come back. Ended pods of a Job that goes away are shown for one turn, as
        the tracking finalizer of Kubernetes does, so that their last word is read.
        """
        for key, name in self._leaving:
            self._remove_pod(key, name)
        self._leaving.clear()
        deadlines = [life.kill_at for life in self._lives.values() if life.kill_at is not None]
        limits = [timeout, *(max(0.0, at - time.monotonic()) for at in deadlines)]
        limit = min((t for t in limits if t is not None), default=None)
        if self._changed:
            limit = 0.0
        with contextlib.suppress(Empty):
            word = self._words.get(timeout=limit)
            while True:
                if word is not None:
                    self._ended(*word)
                word = self._words.get_nowait()
        for life in list(self._lives.values()):
            if life.kill_at is not None and time.monotonic() >= life.kill_at:
                life.kill_at = None
                self._kill(life)
        self._admit()
        changed, self._changed = self._changed, set()
        return changed

    def kill(self) -> None:
        """End every process at once, without a word to it."""
        for life in self._lives.values():
            self._kill(life)

    def close(self) -> None:
        """End everything, and give the claims up."""
        self.kill()
        for gang in list(self._gangs.values()):
            self.gpus.give(gang.gpus)
        self._gangs.clear()
        self._lives.clear()
        for folder in self._folders.values():
            folder.release()

    # --- the Cluster protocol -------------------------------------------------------------------------------------

    def finetunejob(self, namespace: str, name: str) -> Object | None:
        """The FineTuneJob, or None where there is none."""
        return self.folder(namespace, name).job

    def children(self, namespace: str, name: str) -> list[Object]:
        """All Jobs, Pods and ConfigMaps of a FineTuneJob."""
        return self.folder(namespace, name).list("Job", "Pod", "ConfigMap")

    def node(self, name: str) -> Object | None:
        """This machine, which is there as long as anybody asks."""
        if name != NODE:
            return None
        conditions = [{"type": "Ready", "status": "True"}]
        return {"kind": "Node", "metadata": {"name": NODE}, "status": {"conditions": conditions}}

    def apply(self, manifest: Object) -> None:
        """Make an object if it is missing. A Job is queued, and started as soon as there is room."""
        metadata = manifest["metadata"]
        key = (metadata["namespace"], metadata["labels"][manifests.LABEL_JOB])
        folder = self._folder(key)
        old = folder.get(manifest["kind"], metadata["name"])
        if old is not None and manifest["kind"] == "Job":
            return
        kept = old["metadata"] if old else {"uid": str(uuid.uuid4()), "creationTimestamp": _now()}
        made = {**manifest, "metadata": {**kept, **metadata}}
        if manifest["kind"] == "Job":
            self._check_room(manifest)
            made["spec"] = {**manifest["spec"], "suspend": True}
            made["status"] = {"active": 0}
            folder.put(made)
            self._queue.append((key, metadata["name"]))
            self._changed.add(key)
            self._admit()
        else:
            folder.put(made)

    def relabel(self, kind: str, namespace: str, name: str, uid: str, labels: Mapping[str, str]) -> None:
        """Nobody on this machine reads labels."""

    def delete(self, kind: str, namespace: str, name: str, uid: str, *, force: bool = False) -> None:
        """Delete an object and what it owns: SIGTERM, the grace period, SIGKILL."""
        for folder in self._in(namespace):
            found = folder.get(kind, name)
            if found is None or found["metadata"]["uid"] != uid:
                continue
            key = (namespace, folder.path.name)
            if kind == "Job":
                self._delete_job(key, found)
            elif kind == "Pod":
                self._delete_pod(key, name, force=force)
            else:
                folder.remove(kind, name)

    def delete_job(self, job: Object) -> None:
        """Take a FineTuneJob away with everything made for it."""
        metadata = job["metadata"]
        if is_same(self.finetunejob(metadata["namespace"], metadata["name"]), job):
            self.forget(metadata["namespace"], metadata["name"])

    def patch_status(self, job: Object, status: Mapping[str, Any]) -> bool:
        """Replace the status of a FineTuneJob."""
        folder = self.folder(job["metadata"]["namespace"], job["metadata"]["name"])
        with folder.changing():
            there = folder.job
            if there is None or not is_same(there, job):
                return False
            folder.write_job({**there, "status": dict(status)})
            return True

    def event(self, job: Object, kind: str, reason: str, message: str) -> None:
        """Record an event and tell the command line of it."""
        metadata = job["metadata"]
        happened = {
            "time": _now(),
            "type": kind,
            "reason": reason,
            "message": message,
            "namespace": metadata["namespace"],
            "name": metadata["name"],
        }
        with contextlib.suppress(OSError):
            self.folder(metadata["namespace"], metadata["name"]).tell(happened)
        self._told(happened)

    def progress(self, pod: Object) -> Object | None:
        """What the pod's own HTTP endpoint says."""
        trainer = next(c for c in pod["spec"]["containers"] if c["name"] == run.TRAINER_CONTAINER)
        port = trainer["ports"][0]["containerPort"]
        try:
            with self._opener.open(f"http://127.0.0.1:{port}/progress", timeout=PROGRESS_TIMEOUT) as answer:
                found = json.load(answer)
        except (OSError, HTTPException, ValueError):  # it may end in the middle of its answer
            return None
        return found if isinstance(found, dict) else None

    def events_of(self, pod: Object) -> list[Object]:
        """None are kept here."""
        return []

    def logs(self, namespace: str, pod: str, container: str, lines: int) -> list[str]:
        """Last lines of a container's log."""
        for folder in self._in(namespace):
            if (path := folder.log(pod, container)).exists():
                return tail(path, lines)
        return []

    def _in(self, namespace: str) -> list[Folder]:
        return [self.folder(namespace, path.parent.name) for path in self.root.glob(f"{namespace}/*/finetunejob.json")]

    # --- the Job controller and the queue -------------------------------------------------------------------------

    def _check_room(self, job: Object) -> None:
        wanted = pods.gpus_wanted(job["spec"]["template"]) * job["spec"]["completions"]
        if wanted > len(self.gpus.names):
            raise ClusterError(no_room(wanted, len(self.gpus.names)))

    def _admit(self) -> None:
        """Start the Jobs there is room for, in the order they came."""
        while self._queue:
            key, name = self._queue[0]
            job = self._folder(key).get("Job", name)
            if job is None or "deletionTimestamp" in job["metadata"]:
                self._queue.pop(0)
                continue
            wanted = pods.gpus_wanted(job["spec"]["template"]) * job["spec"]["completions"]
            if not wanted and sum(1 for gang in self._gangs.values() if not gang.gpus) >= CPU_GANGS:
                return
            taken = self.gpus.take(wanted)
            if taken is None:
                return
            self._queue.pop(0)
            self._start_gang(key, job, taken)

    def _start_gang(self, key: Key, job: Object, gpus: list[str]) -> None:
        count, name = job["spec"]["completions"], job["metadata"]["name"]
        ports = [processes.free_port()]
        for _ in range(count):
            ports.append(processes.free_port(ports))
        gang = _Gang(key, name, gpus, ports[0])
        self._gangs[key, name] = gang
        job["spec"]["suspend"] = False
        job["status"] = {"active": count, "startTime": _now()}
        self._folder(key).put(job)
        each = len(gpus) // count
        for index in range(count):
            self._start_pod(gang, job, index, tuple(gpus[index * each : (index + 1) * each]), ports[1 + index])
        self._changed.add(key)

    def _start_pod(self, gang: _Gang, job: Object, index: int, gpus: tuple[str, ...], port: int) -> None:
        name = f"{gang.job}-{index}"
        pod = pods.new_pod(job, index, name, str(uuid.uuid4()), _now())
        for container in pod["spec"]["containers"]:
            for entry in container.get("ports") or []:
                if entry["containerPort"] == run.HTTP_PORT:
                    entry["containerPort"] = port
        folder, count = self._folder(gang.key), job["spec"]["completions"]
        hosts = {f"{gang.job}-{i}.{pod['spec'].get('subdomain', '')}": "127.0.0.1" for i in range(count)}
        place = pods.Place(
            work=folder.pod(name) / "volumes" / "work",
            mounts=self._mount(gang.key, pod),
            termination=folder.pod(name) / "termination-log",
            ports={run.HTTP_PORT: port, run.MASTER_PORT: gang.master_port},
            hosts=hosts,
            gpus=gpus,
            variables=_machine_variables(count, bool(gpus)),
        )
        folder.put(pod)
        life = _Life(gang.key, name, gang, place)
        self._lives[gang.key, name] = life
        gang.pods.add(name)
        self._start_next(life, pod)

    def _mount(self, key: Key, pod: Object) -> dict[str, Path]:
        """Make the volumes; mount path → folder."""
        folder = self._folder(key)
        place = folder.pod(pod["metadata"]["name"]) / "volumes"
        places: dict[str, Path] = {}
        (place / "work").mkdir(parents=True, exist_ok=True)
        for volume in pod["spec"].get("volumes") or []:
            name = volume["name"]
            if name == "cache":
                places[name] = self._cache
            elif "persistentVolumeClaim" in volume:
                places[name] = self.root / CLAIMS / volume["persistentVolumeClaim"]["claimName"]
            elif "hostPath" in volume:
                places[name] = Path(volume["hostPath"]["path"])
            elif (volume.get("emptyDir") or {}).get("medium") == "Memory":
                continue  # /dev/shm is this machine's own
            else:
                places[name] = place / name
        mounts: dict[str, Path] = {}
        for container in pods.containers(pod):
            for mount in container.get("volumeMounts") or []:
                if mount["name"] in places:
                    mounts[mount["mountPath"]] = places[mount["name"]]
        for path in places.values():
            path.mkdir(parents=True, exist_ok=True)
        claims = {f"file://{at}/": f"file://{to}/" for at, to in mounts.items() if to.parent == self.root / CLAIMS}
        for volume in pod["spec"].get("volumes") or []:
            if "configMap" in volume:
                self._write_config_map(folder, volume["configMap"]["name"], places[volume["name"]], claims)
        return mounts

    def _write_config_map(self, folder: Folder, name: str, place: Path, claims: Mapping[str, str]) -> None:
        found = folder.get("ConfigMap", name)
        if found is None:
            return
        for entry, text in (found.get("data") or {}).items():
            for inside, here in claims.items():
                text = text.replace(inside, here)
            (place / entry).write_text(text)

    def _delete_job(self, key: Key, job: Object) -> None:
        name = job["metadata"]["name"]
        if "deletionTimestamp" not in job["metadata"]:
            job["metadata"]["deletionTimestamp"] = _now()
            self._folder(key).put(job)
        for pod in self._pods_of(key, name):
            self._delete_pod(key, pod["metadata"]["name"])
        self._settle(key, name)

    def _delete_pod(self, key: Key, name: str, *, force: bool = False) -> None:
        folder = self._folder(key)
        pod = folder.get("Pod", name)
        if pod is None:
            return
        life = self._lives.get((key, name))
        if "deletionTimestamp" not in pod["metadata"]:
            grace = float(pod["spec"].get("terminationGracePeriodSeconds", 30))
            until = datetime.now(UTC) + timedelta(seconds=grace)
            pod["metadata"]["deletionTimestamp"] = format_time(until)
            folder.put(pod)
            self._changed.add(key)
            if life is not None and life.process is not None:
                life.ending = True
                life.kill_at = time.monotonic() + grace
                with contextlib.suppress(ProcessLookupError):
                    life.process.send_signal(signal.SIGTERM)
        if force and life is not None:
            self._kill(life)
        if life is None:
            self._remove_pod(key, name)

    def _remove_pod(self, key: Key, name: str) -> None:
        folder = self._folder(key)
        pod = folder.get("Pod", name)
        folder.remove("Pod", name)
        self._changed.add(key)
        if pod is not None:
            self._settle(key, pod["metadata"]["labels"]["job-name"])

    def _settle(self, key: Key, name: str) -> None:
        """What the Job controller makes of its pods: counts, conditions, and the end of the others."""
        folder = self._folder(key)
        job = folder.get("Job", name)
        if job is None:
            return
        found = self._pods_of(key, name)
        alive = [p for p in found if (key, p["metadata"]["name"]) in self._lives]
        if "deletionTimestamp" in job["metadata"]:
            if not found:
                folder.remove("Job", name)
                self._changed.add(key)
            return
        phases = [p["status"]["phase"] for p in found]
        status = {
            **job["status"],
            "active": len(alive),
            "succeeded": phases.count("Succeeded"),
            "failed": phases.count("Failed"),
        }
        kinds = {c["type"] for c in status.get("conditions") or []}
        if phases.count("Succeeded") == job["spec"]["completions"] and "Complete" not in kinds:
            status["completionTime"] = _now()
            status["conditions"] = [_condition("SuccessCriteriaMet", ""), _condition("Complete", "")]
        elif "Failed" in phases and "Failed" not in kinds:
            ended = [] if alive else [_condition("Failed", "BackoffLimitExceeded")]
            status["conditions"] = [_condition("FailureTarget", "BackoffLimitExceeded"), *ended]
        if status != job["status"]:
            folder.put({**job, "status": status})
            self._changed.add(key)
        if "Failed" in phases:
            for pod in alive:
                self._delete_pod(key, pod["metadata"]["name"])

    def _pods_of(self, key: Key, job: str) -> list[Object]:
        return [p for p in self._folder(key).list("Pod") if p["metadata"]["labels"]["job-name"] == job]

    def _dissolve(self, gang: _Gang) -> None:
        if self._gangs.pop((gang.key, gang.job), None) is not None:
            self.gpus.give(gang.gpus)

    # --- the kubelet ------------------------------------------------------------------------------------------------

    def _start_next(self, life: _Life, pod: Object) -> None:
        """Start the container after ``life.container``."""
        names = [c["name"] for c in pods.containers(pod)]
        following = names[names.index(life.container) + 1 :] if life.container else names
        container = next(c for c in pods.containers(pod) if c["name"] == following[0])
        folder = self._folder(life.key)
        log = folder.log(life.pod, container["name"])
        log.parent.mkdir(parents=True, exist_ok=True)
        life.place.termination.write_text("")
        life.container = container["name"]
        mark = {processes.MARK: str(folder.pod(life.pod))}
        life.process = processes.start(
            pods.command(container, life.place),
            {**pods.environment(container, life.place, os.environ), **mark},
            life.place.work,
            log,
        )
        _set_state(pod, container["name"], {"running": {"startedAt": _now()}})
        pod["status"]["phase"] = "Running" if len(following) == 1 else "Pending"
        folder.put(pod)
        self._changed.add(life.key)
        threading.Thread(
            target=self._watch, args=(life.process, life.key, life.pod), daemon=True, name=f"watch {life.pod}"
        ).start()

    def _watch(self, process: "subprocess.Popen[bytes]", key: Key, pod: str) -> None:
        process.wait()
        self._words.put((key, pod))

    def _kill(self, life: _Life) -> None:
        processes.end(str(self._folder(life.key).pod(life.pod)), life.process)

    def _ended(self, key: Key, name: str) -> None:
        """The process of a pod has ended."""
        life = self._lives.get((key, name))
        if life is None or life.process is None or life.process.returncode is None:
            return
        self._kill(life)  # whatever of it is left, should its first process have been killed
        if life.process.stdin is not None:
            life.process.stdin.close()
        folder = self._folder(key)
        pod = folder.get("Pod", name)
        if pod is None:
            self._gone(life)
            return
        code = life.process.returncode
        code = 128 - code if code < 0 else code
        _set_state(pod, life.container, {"terminated": self._terminated(life, pod, code)})
        last = pods.containers(pod)[-1]["name"]
        if code == 0 and life.container != last and not life.ending:
            self._start_next(life, pod)
            return
        pod["status"]["phase"] = "Succeeded" if code == 0 and life.container == last else "Failed"
        folder.put(pod)
        self._gone(life)
        if "deletionTimestamp" in pod["metadata"]:
            self._leaving.append((key, name))
        shutil.rmtree(life.place.work, ignore_errors=True)
        self._settle(key, life.gang.job)
        self._changed.add(key)

    def _gone(self, life: _Life) -> None:
        self._lives.pop((life.key, life.pod), None)
        life.gang.pods.discard(life.pod)
        if not life.gang.pods:
            self._dissolve(life.gang)

    def _terminated(self, life: _Life, pod: Object, code: int) -> Object:
        state = next(s for s in pods.statuses(pod) if s["name"] == life.container)["state"]
        message = ""
        with contextlib.suppress(OSError):
            message = life.place.termination.read_bytes()[: run.TERMINATION_LIMIT].decode(errors="replace")
        if not message and code != 0:
            lines = tail(self._folder(life.key).log(life.pod, life.container), LOG_LINES)
            message = "\n".join(lines)[-LOG_BYTES:]
        return {
            "exitCode": code,
            "reason": "Completed" if code == 0 else "Error",
            "message": message,
            "startedAt": (state.get("running") or {}).get("startedAt", _now()),
            "finishedAt": _now(),
        }

    # --- after a kill -9 --------------------------------------------------------------------------------------------

    def _recover(self, key: Key, folder: Folder) -> None:
        """Nothing of this job runs here. What says it does, was left by a process that was killed."""
        processes.end(str(folder.path / "pods"))
        for pod in folder.list("Pod"):
            if "deletionTimestamp" in pod["metadata"]:
                folder.remove("Pod", pod["metadata"]["name"])
            elif pod["status"]["phase"] in ("Pending", "Running"):
                _lost(pod)
                folder.put(pod)
        for job in folder.list("Job"):
            name, found = job["metadata"]["name"], self._pods_of(key, job["metadata"]["name"])
            if "deletionTimestamp" in job["metadata"] or (not found and not job["spec"].get("suspend")):
                for pod in found:
                    folder.remove("Pod", pod["metadata"]["name"])
                folder.remove("Job", name)
            elif job["spec"].get("suspend"):
                self._queue.append((key, name))
            else:
                self._settle(key, name)


def folder_of(uri: str, root: Path) -> Path | None:
    """Where a file:// or pvc:// URI lies on this machine; None for other storage. ``root``: the state folder."""
    scheme, _, path = uri.partition("://")
    return {"file": Path(path), "pvc": root.absolute() / CLAIMS / path}.get(scheme)


def no_room(wanted: int, there: int) -> str:
    """The mistake of asking for more GPUs than there are, with its remedy."""
    return (
        f"spec.workers: replicas x gpusPerWorker = {wanted} GPUs; accepted on this machine: at most {there} "
        f"({'none was found' if not there else 'CUDA_VISIBLE_DEVICES counts'}). Lower them"
        + ("" if there else ", or run with --cpu (spec.workers.gpusPerWorker: 0)")
        + "."
    )


def _machine_variables(count: int, on_gpu: bool) -> dict[str, str]:
    """Defaults of the processes of a gang of ``count`` pods: they share this machine and its loopback interface."""
    # Models and tokens of the user's own hub cache are found again.
    found = {run.ENV_LOCAL: "true", "HF_HOME": str(Path.home() / ".cache" / "huggingface")}
    loopback = next((n for n in ("lo", "lo0") if Path(f"/sys/class/net/{n}").exists()), "")
    if loopback:
        found |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    if count > 1:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    if not on_gpu:
        # Threads that wait would spin: beside any other load on this machine, a step then takes up to ten times as
        # long (measured).
        found["OMP_WAIT_POLICY"] = "PASSIVE"
    return found


def _now() -> str:
    return format_time(datetime.now(UTC))


def _condition(kind: str, reason: str) -> Object:
    return {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": _now()}


def _set_state(pod: Object, container: str, state: Object) -> None:
    for status in pods.statuses(pod):
        if status["name"] == container:
            status["state"] = state


def _lost(pod: Object) -> None:
    """The status of a pod whose processes went down with ``finetune run``."""
    word = run.Termination(cause=Cause.TERMINATED, message="finetune run was killed; its workers ended with it.")
    name = next((s["name"] for s in pods.statuses(pod) if "running" in s["state"]), run.TRAINER_CONTAINER)
    ended = {"exitCode": 137, "reason": "Error", "message": word.to_message(), "finishedAt": _now()}
    _set_state(pod, name, {"terminated": ended})
    pod["status"]["phase"] = "Failed"
