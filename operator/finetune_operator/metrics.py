"""The operator's own Prometheus metrics. Called by ``handlers.py``; names are API (dashboards, alerts).

Figures of jobs are read from their statuses when Prometheus asks: nothing has to be taken back when a job goes.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_api.conditions import Condition, State
from finetune_operator import __version__
from finetune_operator.settings import Settings

Object = Mapping[str, Any]
_JOB = ["namespace", "finetunejob"]


class OperatorMetrics:
    """All metrics of this process, in a registry of their own."""

    def __init__(self, jobs: Callable[[], Iterable[Object]], settings: Settings) -> None:
        self.registry = CollectorRegistry()
        self.reconcile_seconds = Histogram(
            "finetune_operator_reconcile_seconds",
            "Duration of one pass over one job, by how it ended.",
            ["result"],
            registry=self.registry,
        )
        self.reconcile_errors = Counter(
            "finetune_operator_reconcile_errors", "Passes that failed.", registry=self.registry
        )
        self.queue_depth = Gauge(
            "finetune_operator_queue_depth", "Jobs that wait to be looked at.", registry=self.registry
        )
        self.leader = Gauge(
            "finetune_operator_leader", "1 where this replica is the active one.", registry=self.registry
        )
        self.attempt_failures = Counter(
            "finetune_job_attempt_failures",
            "Attempts that ended otherwise than well, by cause, since this replica started.",
            [*_JOB, "cause"],
            registry=self.registry,
        )
        info = Info("finetune_operator", "The operator.", registry=self.registry)
        info.info({"version": __version__})
        for result in ("ok", "error"):
            self.reconcile_seconds.labels(result)
        self.registry.register(_Jobs(jobs, settings, lambda: self.leader._value.get() == 1))


class _Jobs(Collector):
    """Figures of every job, from its spec and status. Only the leader tells them: they would count twice."""

    def __init__(self, jobs: Callable[[], Iterable[Object]], settings: Settings, leading: Callable[[], bool]) -> None:
        self._jobs, self._settings, self._leading = jobs, settings, leading

    def collect(self) -> Iterator[Metric]:
        jobs = list(self._jobs()) if self._leading() else []
        yield _by_state(jobs)
        info = GaugeMetricFamily(
            "finetune_job_info", "What a job is.", labels=[*_JOB, "stage", "method", "model", "profile"]
        )
        state = GaugeMetricFamily("finetune_job_state", "1 for the state a job is in.", labels=[*_JOB, "state"])
        doubtful = GaugeMetricFamily(
            "finetune_job_unhealthy_since_timestamp_seconds",
            "Since when the condition Healthy is False, with its reason.",
            labels=[*_JOB, "reason"],
        )
        gauges = {name: GaugeMetricFamily(f"finetune_job_{name}", text, labels=_JOB) for name, text in _GAUGES.items()}
        for job in jobs:
            spec, key = job.get("spec") or {}, [job["metadata"]["namespace"], job["metadata"]["name"]]
            method = (spec.get("method") or {}).get("type", "lora")
            model = (spec.get("model") or {}).get("uri", "")
            info.add_metric([*key, spec.get("stage", "sft"), method, model, spec.get("profile", "default")], 1)
            state.add_metric([*key, (job.get("status") or {}).get("state") or State.PENDING], 1)
            for found in (job.get("status") or {}).get("conditions") or []:
                if found["type"] == Condition.HEALTHY and found["status"] == "False":
                    doubtful.add_metric([*key, found["reason"]], _timestamp(found["lastTransitionTime"]) or 0)
            for name, value in figures(job, self._settings).items():
                if value is not None:
                    gauges[name].add_metric(key, value)
        yield info
        yield state
        yield doubtful
        yield from gauges.values()


_GAUGES = {
    "progress_ratio": "Share of the steps that is done, 0 to 1.",
    "step": "Optimizer steps finished.",
    "max_steps": "Optimizer steps in all.",
    "loss": "Loss of the last logged step.",
    "restarts": "Restarts so far, for whatever cause.",
    "max_restarts": "recovery.maxRestarts.",
    "checkpoint_timestamp_seconds": "When the newest checkpoint was completed.",
    "last_step_timestamp_seconds": "When the last step ended.",
    "start_timestamp_seconds": "When the first attempt was made.",
    "running_timestamp_seconds": "Since when all workers of the current attempt run; none while they do not.",
    "completion_timestamp_seconds": "When the job succeeded or failed for good.",
    "eta_seconds": "Time to the end, at the speed of the last steps.",
    "gpus": "GPUs the job holds now: of pods that have a node and have not ended.",
    "gpus_wanted": "GPUs that all workers of a job that is to run ask for, held or not.",
    "cost_per_hour": "What the GPUs it holds cost per hour, at the profile's price.",
}


def _by_state(jobs: Iterable[Object]) -> Metric:
    family = GaugeMetricFamily("finetune_jobs", "Jobs by state.", labels=["namespace", "state"])
    tally = Tally(
        (job["metadata"]["namespace"], (job.get("status") or {}).get("state") or str(State.PENDING)) for job in jobs
    )
    for (namespace, name), count in sorted(tally.items()):
        family.add_metric([namespace, name], count)
    return family


def figures(job: Object, settings: Settings) -> dict[str, float | None]:
    """Values of the per-job gauges, None where there is nothing to tell."""
    spec, status = job.get("spec") or {}, job.get("status") or {}
    progress, gpus = status.get("progress") or {}, status.get("gpus") or {}
    step, most = progress.get("step"), progress.get("maxSteps")
    held = float(gpus.get("held", 0))
    profile = settings.profiles.get(spec.get("profile", "default"))
    price = profile.price_per_gpu_hour if profile else None
    return {
        "progress_ratio": step / most if step is not None and most else None,
        "step": step,
        "max_steps": most,
        "loss": float(progress["loss"]) if progress.get("loss") else None,
        "restarts": status.get("restarts", 0),
        "max_restarts": (spec.get("recovery") or {}).get("maxRestarts", 10),
        "checkpoint_timestamp_seconds": _timestamp(status.get("lastCheckpointTime")),
        "last_step_timestamp_seconds": _timestamp(progress.get("lastStepTime")),
        "start_timestamp_seconds": _timestamp(status.get("startTime")),
        "running_timestamp_seconds": _timestamp(_running_since(status)),
        "completion_timestamp_seconds": _timestamp(status.get("completionTime")),
        "eta_seconds": _seconds(progress.get("eta")),
        "gpus": held,
        "gpus_wanted": float(gpus.get("wanted", 0)),
        "cost_per_hour": held * price if price is not None else None,
    }


def _running_since(status: Object) -> str | None:
    """What is measured from when an attempt ran begins anew with each: after a suspension or a queue, too."""
    ready: Object = next((c for c in status.get("conditions") or [] if c["type"] == Condition.PODS_READY), {})
    return ready.get("lastTransitionTime") if ready.get("status") == "True" else None


def _timestamp(text: str | None) -> float | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() if text else None


def _seconds(text: str | None) -> float | None:
    """``1h12m`` → 4320.0."""
    if not text:
        return None
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    total, number = 0.0, ""
    for char in text:
        if char in units:
            total += float(number) * units[char]
            number = ""
        else:
            number += char
    return total
