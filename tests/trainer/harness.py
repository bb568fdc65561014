"""Many small runs of the trainer in one process (or in one gang of processes): imports are most of a test's time.

``python harness.py PLAN.json`` in each process of a gang; the plan is a list of runs. A run is a whole ``Job`` as
``run.py`` makes it, with a crash where the plan says so: an exception that nothing catches, after which only what
is in the storage is left, as after kill -9. Results go to ``PLAN.json.out`` (rank 0).
"""

import gc
import json
import os
import shutil
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from finetune_api.run import ENV_ATTEMPT, ENV_WORK, TrainerConfig
from finetune_trainer.faults import diagnose
from finetune_trainer.run import ENV_TRACE, Job
from finetune_trainer.stopping import Stop
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.world import rank


class CrashError(Exception):
    """The planned end of a run."""


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """One run.

    Keys of a plan: name, config, attempt, work, and optionally crash_after, stop_after, poison_after (its weights
    become NaN), storage_until (no upload ends before it) and lose (its checkpoint is gone before the run begins), all
    steps; trace (a folder); weights (tell which moved).
    """
    os.environ[ENV_ATTEMPT] = str(plan["attempt"])
    os.environ[ENV_WORK] = plan["work"]
    os.environ.pop(ENV_TRACE, None)
    if "trace" in plan:
        Path(plan["trace"]).mkdir(parents=True, exist_ok=True)
        os.environ[ENV_TRACE] = plan["trace"]
    config = TrainerConfig.model_validate(plan["config"])
    if "lose" in plan and rank() == 0:
        shutil.rmtree(Path(config.checkpoint_uri.removeprefix("file://")) / f"step-{plan['lose']}")
    stop = Stop()
    job = Job(config, Telemetry(config, serve=False), stop)
    said = job._stepped
    gate = threading.Event()
    losses: dict[str, float] = {}

    def stepped(*arguments: Any) -> None:
        said(*arguments)
        losses[str(job.step)] = job.loss or 0.0
        if job.step == plan.get("storage_until"):
            gate.set()
        if job.step == plan.get("crash_after"):
            job.saver.wait()
            raise CrashError
        if job.step == plan.get("poison_after"):
            job.engine.trainable[0].data.fill_(float("nan"))
        if job.step == plan.get("stop_after"):
            stop.request()

    job._stepped = stepped  # type: ignore[method-assign]
    result: dict[str, Any] = {"name": plan["name"], "losses": losses}
    try:
        job.load()
        job.prepare()
        if "storage_until" in plan:
            upload = job.saver._upload
            job.saver._upload = lambda snapshot: gate.wait(60) and upload(snapshot)  # type: ignore[method-assign,return-value]
        result["trained"] = sorted(name for name, p in job.engine.module.named_parameters() if p.requires_grad)
        result["losing head"] = job.engine.head is not None
        before = whole_weights(job) if plan.get("weights") else {}
        result["finished"] = job.train()
        if plan.get("weights"):
            after = whole_weights(job)
            result["moved"] = sorted(name for name in after if not after[name].equal(before[name]))
        if result["finished"]:
            job.finish()
        else:
            job.leave_stopped()
    except CrashError:
        result["crashed"] = True
    except Exception as error:
        cause, message = diagnose(error)
        result |= {"cause": cause.value, "message": message, "trace": traceback.format_exc()}
    result |= {
        "progress": job.telemetry.progress().model_dump(mode="json"),
        "evaluation": job.tally.evaluation,
        "records": job.history.records() if hasattr(job, "history") else [],
        "outputs": [output.model_dump() for output in job.outputs],
    }
    if hasattr(job, "pulse"):
        job.pulse.close()
    job.partitioning = None  # transformers would go on to partition the next run's model
    return result


def whole_weights(job: Job) -> dict[str, Any]:
    """All weights as the model computes with them, by name."""
    import deepspeed

    found = {}
    for name, parameter in job.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else _nothing():
            found[name] = parameter.detach().clone()
    return found


class _nothing:  # noqa: N801
    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


def main(path: str) -> None:
    """All runs of a plan, one after the other."""
    from finetune_trainer import report

    report.write_plot = lambda page, path: None  # half a second each; test_report.py looks at one
    results = []
    for plan in json.loads(Path(path).read_text()):
        print(f"=== {plan['name']}", flush=True)
        results.append(run(plan))
        gc.collect()
        if len(results) == 1:
            gc.freeze()  # the libraries: to look through them after every run takes half a second each time
    if rank() == 0:
        Path(path + ".out").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
