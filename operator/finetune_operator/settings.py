"""How this installation of the operator is configured: one YAML file, written by the Helm chart.

Read once at start by the edges; ``Profile`` is also read by ``plan.py``. Nothing here is per job.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from finetune_api import kubeyaml
from finetune_api.base import Duration, KubeModel


class Cache(KubeModel):
    """Where fetched models and data are kept."""

    claim_name: str = ""
    """A ReadWriteMany PersistentVolumeClaim of the job's namespace, shared by all its jobs.
    Empty: an emptyDir of each pod."""
    size_limit: str = ""
    """Limit of the emptyDir, e.g. 200Gi. Empty: none."""


class Profile(KubeModel):
    """Platform defaults a job picks with ``spec.profile``."""

    image: str = "finetune-trainer:latest"
    """Trainer image."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the image is pulled."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the extended resource a GPU is. Empty: none is asked for; GPUs come by `resourceClaims` in the template
    (dynamic resource allocation)."""
    gang_scheduling: Literal["", "kubernetes", "kueue", "coscheduling", "volcano"] = ""
    """What gives all workers of a job their nodes at once, or none of them; see [Gang scheduling](#gang-scheduling).
    Empty: nobody does, and a job that got only some of its nodes gives them back after `recovery.pendingTimeout`."""
    queue: str = "default"
    """With `gangScheduling: kueue` or `volcano`: the queue of the jobs that name none."""
    cache: Cache = Cache()
    """Where fetched models and data are kept."""
    credentials_secret: str = ""
    """Secret with storage credentials, used where a job names none."""
    env: dict[str, str] = {}
    """Environment variables of every pod (NCCL and RDMA settings, HF_ENDPOINT …)."""
    template: dict[str, Any] = {}
    """Pod template fields merged over the operator's and under the job's own (tolerations, nodeSelector …)."""
    shm_size: str = "16Gi"
    """Limit of /dev/shm, which NCCL and data loading use."""
    network_policy: bool = True
    """Make a NetworkPolicy per job: only its own pods, and scrapers of the metrics port, reach its workers."""
    termination_grace_period: Duration = "60s"
    """Time for the checkpoint that is saved on SIGTERM."""
    price_per_gpu_hour: float | None = None
    """For the cost figures in metrics and dashboards, in any currency."""


class LeaderElection(KubeModel):
    """The Lease that makes one replica the active one."""

    enabled: bool = True
    lease_name: str = "finetune-operator"
    namespace: str = ""
    """Empty: the operator's own namespace."""
    lease_duration: Duration = "15s"
    renew_deadline: Duration = "10s"
    retry_period: Duration = "2s"


class Settings(KubeModel):
    """The whole file."""

    namespaces: list[str] = []
    """Namespaces to watch. Empty: all of them."""
    profiles: dict[str, Profile] = Field(default_factory=lambda: {"default": Profile()})
    """Profiles by name."""
    leader_election: LeaderElection = LeaderElection()
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    http_port: int = 8080
    """Port of /metrics, /healthz and /readyz."""
    workers: int = 8
    """Jobs reconciled at the same time."""
    progress_interval: Duration = "5s"
    """How often a running job is asked for its progress."""
    resync_interval: Duration = "5m"
    """How often every job is looked at without cause."""
    progress_through: Literal["pod", "apiserver"] = "pod"
    """How the operator reaches a worker's progress: its pod address, or the API server's pod proxy."""


def load(path: Path | None) -> Settings:
    """Settings from a YAML file; the defaults where no path is given. Raises pydantic's ValidationError."""
    return Settings.model_validate(read(path) or {}) if path else Settings()


def read(path: Path) -> Any:
    """What stands in a YAML file, as Helm and kubectl read it; None where nothing does."""
    return next(iter(kubeyaml.load(path.read_text(encoding="utf-8"))), None)
