"""What one pass knows, and what it leads to: the two ends of :func:`~finetune_operator.decide.decide`.

Facts are gathered, and decisions carried out, by ``reconcile.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from finetune_api.mistakes import Mistake
from finetune_api.run import Progress
from finetune_api.spec import FineTuneJobSpec, ModelSource
from finetune_api.status import FineTuneJobStatus
from finetune_operator.observe import News, Observed
from finetune_operator.plan import Plan


@dataclass(frozen=True)
class Inputs:
    """The ``job://`` inputs of a job."""

    resolved: Mapping[str, str] = field(default_factory=dict)
    """URI as written → URI of the output."""
    model: ModelSource | None = None
    """Where the output named by ``model.uri`` is an adapter: the model it belongs to, with it on top."""
    waiting: str = ""
    """What is waited for, for people; empty when all is there."""
    failed: bool = False
    """The awaited job has failed."""


@dataclass(frozen=True)
class Facts:
    """Everything one pass knows."""

    now: datetime
    generation: int | None
    spec: FineTuneJobSpec | None
    mistakes: tuple[Mistake, ...]
    profile_problem: str
    """Why the profile cannot be used; empty when it can."""
    plan: Plan | None
    """None where it cannot be made (mistakes, or inputs that are not there yet)."""
    inputs: Inputs
    status: FineTuneJobStatus
    observed: Observed
    progress: Progress | None
    dead_nodes: frozenset[str]
    logs: Mapping[str, list[str]]
    """Last log lines by pod, of pods that failed."""
    news: Mapping[str, News]
    """The last thing told of a pod in its events, by pod, of some that have not started for a while."""
    poll: float
    """Seconds between two looks at a running job."""


@dataclass(frozen=True)
class Delete:
    """An object to take away."""

    kind: str
    name: str
    uid: str
    force: bool = False


@dataclass(frozen=True)
class Relabel:
    """Labels to put on the Job of the current attempt."""

    name: str
    uid: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Decision:
    """What one pass leads to."""

    status: FineTuneJobStatus
    create_attempt: int | None = None
    """Make the Job of this attempt (and what it needs), before the status is written."""
    without_attempt: FineTuneJobStatus | None = None
    """The status where that is refused."""
    excluded_nodes: tuple[str, ...] = ()
    read_attempt: int | None = None
    """Make the Job that reads what this attempt wrote, before the status is written."""
    delete: tuple[Delete, ...] = ()
    """After the status is written."""
    delete_job: bool = False
    """The FineTuneJob itself is to go (TTL)."""
    relabel: Relabel | None = None
    """Last of all, so that whoever refuses it holds up nothing else."""
    requeue: float | None = None
    """Look again after this many seconds; None: when something happens."""
