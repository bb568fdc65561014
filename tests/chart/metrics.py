"""Every metric that operator and trainer tell, with its labels, and a sample fleet told in them.

Rules and dashboards may use these names only; ``test_metrics.py`` compares them with what the code registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

JOB = ("namespace", "finetunejob")

OPERATOR: dict[str, tuple[str, ...]] = {
    "finetune_jobs": ("namespace", "state"),
    "finetune_job_info": (*JOB, "stage", "method", "model", "profile"),
    "finetune_job_state": (*JOB, "state"),
    "finetune_job_progress_ratio": JOB,
    "finetune_job_step": JOB,
    "finetune_job_max_steps": JOB,
    "finetune_job_loss": JOB,
    "finetune_job_eta_seconds": JOB,
    "finetune_job_restarts": JOB,
    "finetune_job_max_restarts": JOB,
    "finetune_job_checkpoint_timestamp_seconds": JOB,
    "finetune_job_last_step_timestamp_seconds": JOB,
    "finetune_job_start_timestamp_seconds": JOB,
    "finetune_job_running_timestamp_seconds": JOB,
    "finetune_job_completion_timestamp_seconds": JOB,
    "finetune_job_unhealthy_since_timestamp_seconds": (*JOB, "reason"),
    "finetune_job_gpus": JOB,
    "finetune_job_gpus_wanted": JOB,
    "finetune_job_cost_per_hour": JOB,
    "finetune_job_attempt_failures_total": (*JOB, "cause"),
    "finetune_operator_reconcile_seconds_bucket": ("result", "le"),
    "finetune_operator_reconcile_seconds_count": ("result",),
    "finetune_operator_reconcile_seconds_sum": ("result",),
    "finetune_operator_reconcile_errors_total": (),
    "finetune_operator_queue_depth": (),
    "finetune_operator_leader": (),
    "finetune_operator_info": ("version",),
}
_RUN = ("finetunejob",)
TRAINER: dict[str, tuple[str, ...]] = {
    "finetune_train_loss": _RUN,
    "finetune_train_learning_rate": _RUN,
    "finetune_train_grad_norm": _RUN,
    "finetune_train_step": _RUN,
    "finetune_train_max_steps": _RUN,
    "finetune_train_epoch": _RUN,
    "finetune_train_tokens_total": _RUN,
    "finetune_train_tokens_per_second": _RUN,
    "finetune_train_mfu_ratio": _RUN,
    "finetune_train_step_seconds_bucket": (*_RUN, "le"),
    "finetune_train_step_seconds_count": _RUN,
    "finetune_train_step_seconds_sum": _RUN,
    "finetune_train_data_wait_seconds_total": _RUN,
    "finetune_train_memory_bytes": (*_RUN, "kind"),
    "finetune_train_checkpoint_seconds": _RUN,
    "finetune_train_checkpoint_last_timestamp_seconds": _RUN,
    "finetune_train_checkpoint_failures_total": _RUN,
    "finetune_train_checkpoint_bytes": _RUN,
    "finetune_train_method": (*_RUN, "figure"),
    "finetune_train_figure": (*_RUN, "figure"),
    "finetune_eval_loss": (*_RUN, "source"),
    "finetune_eval_perplexity": (*_RUN, "source"),
    "finetune_eval_figure": (*_RUN, "figure", "source"),
    "finetune_train_heartbeat_age_seconds": (*_RUN, "rank"),
    "finetune_train_info": (*_RUN, "stage", "method", "model", "world_size"),
}
KNOWN = {**OPERATOR, **TRAINER}

Labels = dict[str, str]
Sample = tuple[str, Labels, float]

STEP = 15
"""Seconds between two scrapes."""


def fleet(since: int, now: int) -> Iterator[tuple[int, Sample]]:
    """Two hours of a small fleet as (time, sample): one job that runs and was restarted once, one that failed, one
    that waits, told by two operator replicas of which one leads. The same of another cluster, ``east``."""
    for moment in range(since, now + 1, STEP):
        age = moment - since
        for name, labels, value in (*_operator(since, age), *_trainer(since, age)):
            yield moment, (name, labels, value)
            yield moment, (name, {**labels, "cluster": "east"}, value)


def _operator(since: int, age: int) -> Iterator[Sample]:
    own = {"job": "finetune-operator", "namespace": "finetune-system"}
    for pod, leads in (("a", True), ("b", False)):
        at = {**own, "instance": f"10.0.0.{ord(pod)}:8080", "pod": f"finetune-operator-{pod}"}
        yield "finetune_operator_info", {**at, "version": "0.1.0"}, 1
        yield "finetune_operator_leader", at, float(leads)
        yield "finetune_operator_queue_depth", at, float(leads) * (age // STEP % 3)
        yield "finetune_operator_reconcile_errors_total", at, float(leads) * (age // 600)
        for result, weight in (("ok", 10), ("error", 1)):
            count = float(leads) * (age // STEP) * weight
            for limit, share in (("0.01", 0.5), ("0.1", 0.9), ("1.0", 1.0), ("+Inf", 1.0)):
                yield "finetune_operator_reconcile_seconds_bucket", {**at, "result": result, "le": limit}, count * share
            yield "finetune_operator_reconcile_seconds_count", {**at, "result": result}, count
            yield "finetune_operator_reconcile_seconds_sum", {**at, "result": result}, count * 0.02
    leader = {"job": "finetune-operator", "instance": "10.0.0.97:8080", "pod": "finetune-operator-a"}
    jobs = {
        "chat": "Restarting" if 3600 <= age < 3720 else "Running",
        "broken": "Running" if age < 1800 else "Failed",
        "later": "Waiting",
    }
    for name, state in jobs.items():
        job = {**leader, "namespace": "team-a", "finetunejob": name}
        about = {"stage": "sft", "method": "lora", "model": "hf://org/model", "profile": "default"}
        yield "finetune_jobs", {**leader, "namespace": "team-a", "state": state}, 1
        yield "finetune_job_info", {**job, **about}, 1
        yield "finetune_job_state", {**job, "state": state}, 1
        yield "finetune_job_max_restarts", job, 10
        yield "finetune_job_gpus", job, 16.0 * (state == "Running")
        yield "finetune_job_gpus_wanted", job, 16.0 * (state in ("Running", "Restarting"))
        yield "finetune_job_cost_per_hour", job, 40.0 * (state == "Running")
        if state == "Running":
            yield "finetune_job_running_timestamp_seconds", job, since + (3720 if name == "chat" and age > 3720 else 0)
        if state == "Failed":
            yield "finetune_job_completion_timestamp_seconds", job, since + 1800
        yield "finetune_job_restarts", job, float(name == "chat" and age >= 3600)
        if name == "later":
            continue
        yield "finetune_job_start_timestamp_seconds", job, since
        yield "finetune_job_progress_ratio", job, age / 10000
        yield "finetune_job_step", job, age // 10
        yield "finetune_job_max_steps", job, 1000
        yield "finetune_job_loss", job, 3.0 - age / 5000
        yield "finetune_job_last_step_timestamp_seconds", job, since + age
        yield "finetune_job_checkpoint_timestamp_seconds", job, since + age // 900 * 900
        if name == "chat":
            yield "finetune_job_eta_seconds", job, 10000 - age
        failed_after = {"chat": 3600, "broken": 1800}[name]
        if age >= failed_after:
            cause = {"chat": "NodeLost", "broken": "OutOfGPUMemory"}[name]
            yield "finetune_job_attempt_failures_total", {**job, "cause": cause}, 1


def _trainer(since: int, age: int) -> Iterator[Sample]:
    attempt = 2 if age >= 3720 else 1
    if 3600 <= age < 3720:
        return
    run = {
        "job": "finetune-operator-workers",
        "namespace": "team-a",
        "finetunejob": "chat",
        "pod": f"chat-a{attempt}-0",
        "attempt": str(attempt),
        "instance": f"10.0.1.{attempt}:9400",
    }
    ran = age if attempt == 1 else age - 3720
    figures = {
        "loss": 3.0 - age / 5000,
        "learning_rate": 1e-3 * (1 - age / 10000),
        "grad_norm": 1.5 + math.sin(age / 300),
        "step": age // 10,
        "max_steps": 1000,
        "epoch": age / 3000,
        "tokens_total": ran * 20000,
        "tokens_per_second": 20000 + 500 * math.sin(age / 200),
        "mfu_ratio": 0.58,
        "data_wait_seconds_total": ran * 0.02,
        "checkpoint_seconds": 12,
        "checkpoint_last_timestamp_seconds": since + age // 900 * 900,
        "checkpoint_failures_total": 0,
        "checkpoint_bytes": 2e8,
    }
    for name, value in figures.items():
        yield f"finetune_train_{name}", run, value
    about = {"stage": "sft", "method": "lora", "model": "hf://org/model", "world_size": "16"}
    yield "finetune_train_info", {**run, **about}, 1
    for kind, gib in (("allocated", 40), ("peak", 53), ("reserved", 60), ("rss", 9)):
        yield "finetune_train_memory_bytes", {**run, "kind": kind}, gib * 2**30
    for rank in range(4):
        yield "finetune_train_heartbeat_age_seconds", {**run, "rank": str(rank)}, (age + rank) % 10
    steps = ran // 10
    for limit, share in (("1.0", 0.0), ("10.0", 0.8), ("30.0", 0.99), ("+Inf", 1.0)):
        yield "finetune_train_step_seconds_bucket", {**run, "le": limit}, steps * share
    yield "finetune_train_step_seconds_count", run, steps
    yield "finetune_train_step_seconds_sum", run, ran
    yield "finetune_train_method", {**run, "figure": "rank_mean"}, 8
    yield "finetune_train_figure", {**run, "figure": "accuracy"}, 0.7
    for source in ("all", "heldout"):
        yield "finetune_eval_loss", {**run, "source": source}, 3.1 - age / 6000
        yield "finetune_eval_perplexity", {**run, "source": source}, math.exp(3.1 - age / 6000)
        yield "finetune_eval_figure", {**run, "figure": "accuracy", "source": source}, 0.7


def openmetrics(since: int, now: int) -> str:
    """The fleet as the text that ``promtool tsdb create-blocks-from openmetrics`` reads."""
    series: dict[str, dict[str, list[str]]] = {}
    for moment, (name, labels, value) in fleet(since, now):
        text = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        series.setdefault(name, {}).setdefault(text, []).append(f"{value:g} {moment}")
    lines = []
    for name, by_labels in series.items():
        lines.append(f"# TYPE {name} unknown")
        for labels_text, values in by_labels.items():
            lines += [f"{name}{{{labels_text}}} {value}" for value in values]
    return "\n".join([*lines, "# EOF", ""])
