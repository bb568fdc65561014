"""Runs of the local cluster with a trainer that only pretends (``fake_trainer``)."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from finetune_api.base import seconds
from finetune_api.kubeyaml import Dumper
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cli import files
from finetune_operator.cli.fresh import Choice
from finetune_operator.cli.run import Runner, prepare, status_of
from finetune_operator.cluster import processes
from finetune_operator.cluster.gpus import Gpus
from finetune_operator.cluster.local import Key, LocalCluster
from finetune_operator.settings import Profile, Settings
from tests import PATIENCE

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join(
    str(path) for path in (Path(__file__).parent / "fake_trainer", ROOT / "crds", ROOT / "operator")
)


@dataclass
class Watch:
    """Sees every status, and acts once when what it waits for has come."""

    when: Callable[[FineTuneJobStatus], bool] = lambda status: False
    act: Callable[[], None] = lambda: None
    seen: list[tuple[str, FineTuneJobStatus]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    acted: bool = False

    def show(self, key: Key, status: FineTuneJobStatus) -> None:
        """Part of View."""
        self.seen.append((key[1], status))
        if not self.acted and self.when(status):
            self.acted = True
            self.act()

    def say(self, text: str) -> None:
        """Part of View."""
        self.said.append(text)

    def states(self, name: str = "tiny") -> list[str]:
        """The states in their order, each once."""
        found = [status.state for job, status in self.seen if job == name]
        return [state for at, state in enumerate(found) if at == 0 or found[at - 1] != state]


def step(number: int, attempt: int = 1) -> Callable[[FineTuneJobStatus], bool]:
    """The attempt has finished that many steps."""

    def reached(status: FineTuneJobStatus) -> bool:
        return len(status.attempts) == attempt and status.attempts[-1].last_step >= number

    return reached


@dataclass
class Bench:
    """A folder with a model, rows, a file with jobs and a state folder."""

    home: Path
    offset: timedelta = timedelta()
    """How far the clock of the loop is ahead."""
    opened: list[LocalCluster] = field(default_factory=list)

    @property
    def state(self) -> Path:
        """The state folder."""
        return self.home / "state"

    @property
    def output(self) -> Path:
        """Where the job tiny writes."""
        return self.home / "out"

    @property
    def file(self) -> Path:
        """The file with the jobs."""
        return self.home / "job.yaml"

    def script(self, **script: Any) -> None:
        """What the pretended trainer does; what it is held at, it goes on from when that is something else."""
        unfinished = self.home / "script.new"
        unfinished.write_text(json.dumps(script))
        unfinished.rename(self.home / "script.json")

    def write(self, *jobs: dict[str, Any]) -> Path:
        """The file with these jobs."""
        self.file.write_text(yaml.dump_all(jobs, Dumper=Dumper))
        return self.file

    def cluster(self, gpus: tuple[str, ...] = ()) -> LocalCluster:
        """This machine."""
        made = LocalCluster(self.state, gpus=Gpus(gpus, self.home / "gpus"), cache=self.home / "cache")
        self.opened.append(made)
        return made

    def now(self) -> datetime:
        """The loop's clock."""
        return datetime.now(UTC) + self.offset

    def runner(
        self,
        watch: Watch | None = None,
        cluster: LocalCluster | None = None,
        grace: str = "20s",
        fresh: Choice | None = None,
    ) -> Runner:
        """A runner of the file, as ``finetune run`` makes it; ``fresh``: what is answered with --fresh."""
        assert seconds(grace)
        documents, _ = files.load([str(self.file)])
        cluster, watch = cluster or self.cluster(), watch or Watch()
        settings = Settings(profiles={"default": Profile(termination_grace_period=grace)}, progress_interval="100ms")
        keys = prepare(
            cluster, documents, watch.say, (lambda told: watch.said.append(told) or fresh) if fresh else None
        )
        return Runner(cluster, settings, keys, watch, self.now)

    def run(self, watch: Watch | None = None, **options: Any) -> FineTuneJobStatus:
        """To the end; the status of the job tiny."""
        runner = self.runner(watch, **options)
        runner.run()
        status = self.status(runner.cluster)
        runner.cluster.close()
        return status

    def status(self, cluster: LocalCluster, name: str = "tiny") -> FineTuneJobStatus:
        """The status of a job."""
        return status_of(cluster.finetunejob("default", name))

    def started(self, attempt: int = 1, worker: int = 0) -> dict[str, Any]:
        """How a worker was started."""
        found: dict[str, Any] = json.loads((self.output / f"started-{attempt}-{worker}.json").read_text())
        return found

    def left(self) -> list[int]:
        """Processes of pods that are alive."""
        return processes.alive(str(self.state.absolute()))

    def kill_worker(self, pod: str) -> None:
        """kill -9 of the training process of a pod, once there is one."""
        folder = str(self.state / "default" / "tiny" / "pods" / pod)
        deadline = time.monotonic() + PATIENCE
        while not (found := [pid for pid in processes.alive(folder) if is_trainer(pid)]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(found[0], signal.SIGKILL)


def is_trainer(pid: int) -> bool:
    """Whether it is the process of a pod that trains."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"finetune_trainer.launch" in command and b"processes.py" not in command


def job(home: Path, name: str = "tiny", **spec: Any) -> dict[str, Any]:
    """A job on the CPU, with what is given laid over it."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "file://./model"},
            "data": {"train": [{"uri": "file://./train.jsonl"}]},
            "output": {"uri": "file://./out" if name == "tiny" else f"file://./out-{name}"},
            "workers": {"replicas": 1, "gpusPerWorker": 0},
            "checkpoint": {"save_steps": 2},
            "evaluation": {"prompts": ["Who are you?"]},
            **spec,
        },
    }
