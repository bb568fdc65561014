"""Whole runs on this machine: the real loop, real processes, a trainer that only pretends."""

from pathlib import Path
from typing import Any

import pytest

from finetune_api.causes import Cause
from finetune_operator.cli.files import RefusedError
from finetune_operator.cli.fresh import Choice
from finetune_operator.cluster import Object, processes, store
from tests.unit.local_runs import Bench, Watch, job, step


def test_two_workers_succeed(bench: Bench) -> None:
    bench.write(job(bench.home, workers={"replicas": 2, "gpusPerWorker": 0}))
    watch = Watch()
    status = bench.run(watch)
    assert status.state == "Succeeded"
    assert watch.states()[-2:] == ["Running", "Succeeded"]
    assert status.progress and (status.progress.step, status.progress.percent) == (6, "100 %")
    assert [o.uri for o in status.outputs] == [f"file://{bench.output}"]
    assert status.restarts == 0 and [a.cause for a in status.attempts] == ["Succeeded"]
    first, second = bench.started(worker=0), bench.started(worker=1)
    assert [s["options"]["node_rank"] for s in (first, second)] == [0, 1]
    assert first["options"]["nnodes"] == 2
    assert first["options"]["master_addr"] == "127.0.0.1"
    ports = {s["environment"]["FINETUNE_HTTP_PORT"] for s in (first, second)} | {str(first["options"]["master_port"])}
    assert len(ports) == 3 and "29500" not in ports and "9400" not in ports
    assert first["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert first["environment"]["FINETUNE_CACHE"] == str(bench.home / "cache")
    assert first["environment"]["JOB_COMPLETION_INDEX"] == "0"
    assert first["folder"] == first["environment"]["FINETUNE_WORK"]
    assert not bench.left()


def test_a_worker_that_fails_is_restarted_from_the_newest_checkpoint(bench: Bench) -> None:
    bench.write(job(bench.home, workers={"replicas": 2, "gpusPerWorker": 0}))
    bench.script(steps=12, hold_at=8, exit_at=8, worker=1)
    status = bench.run()
    assert status.state == "Succeeded"
    first, second = status.attempts
    assert (first.cause, first.exit_code, first.pod, first.counted) == (Cause.TRAINER_ERROR, 1, "tiny-a1-1", True)
    assert "Traceback: worker 1 fails on request" in first.log
    assert second.cause == "Succeeded" and second.resumed_from_step == 8
    assert status.counted_restarts == 1


def test_a_worker_killed_by_the_system_is_restarted(bench: Bench) -> None:
    bench.write(job(bench.home, workers={"replicas": 2, "gpusPerWorker": 0}))
    bench.script(hold_at=3)
    status = bench.run(Watch(step(3), lambda: bench.kill_worker("tiny-a1-1")))
    assert status.state == "Succeeded"
    assert (status.attempts[0].cause, status.attempts[0].exit_code) == (Cause.KILLED, 137)
    assert status.attempts[0].pod == "tiny-a1-1"


def test_a_killed_container_takes_all_its_processes_along(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.script(hold_at=2)
    pods = bench.state / "default" / "tiny" / "pods"
    before: list[int] = []

    def kill_the_first_process() -> None:
        import os
        import signal

        before.extend(processes.alive(str(pods / "tiny-a1-0")))
        os.kill(min(before), signal.SIGKILL)

    status = bench.run(Watch(step(2), kill_the_first_process))
    assert len(before) == 3  # first process, trainer, and the rank in a session of its own
    assert (status.state, status.attempts[0].cause) == ("Succeeded", Cause.KILLED)
    assert not set(before) & set(bench.left())


def test_a_worker_that_hangs_is_restarted(bench: Bench) -> None:
    bench.write(job(bench.home, recovery={"hangTimeout": "60s"}))
    bench.script(hang_at=3)

    class Clock(Watch):
        def show(self, key, status):  # type: ignore[no-untyped-def]
            from datetime import timedelta

            super().show(key, status)
            bench.offset = timedelta(seconds=90 if step(3)(status) else 0)

    # It hears no SIGTERM either: the grace period ends it.
    status = bench.run(Clock(), grace="1s")
    assert status.state == "Succeeded"
    assert status.attempts[0].cause == Cause.STALLED
    assert "recovery.hangTimeout is 60 s" in status.attempts[0].message


def test_restarts_are_limited(bench: Bench) -> None:
    bench.write(job(bench.home, recovery={"maxRestarts": 1}))
    bench.script(exit_at=4, every=True)
    status = bench.run()
    assert (status.state, len(status.attempts)) == ("Failed", 2)


def test_a_mistake_of_the_user_is_not_tried_again(bench: Bench) -> None:
    bench.write(job(bench.home, model={"uri": "file://./nothing"}))
    status = bench.run()
    assert (status.state, len(status.attempts)) == ("Failed", 1)
    attempt = status.attempts[0]
    assert (attempt.cause, attempt.exit_code) == (Cause.MODEL_NOT_FOUND, 64)
    assert attempt.message == f"There is no file://{bench.home}/nothing."
    assert any("fetching" in line for line in attempt.log)


def test_suspended_and_resumed(bench: Bench) -> None:
    bench.write(job(bench.home, workers={"replicas": 2, "gpusPerWorker": 0}))
    bench.script(hold_at=3)
    cluster = bench.cluster()
    watch = Watch(step(3), lambda: cluster.set_suspended("default", "tiny", True))
    status = bench.run(watch, cluster=cluster)
    assert status.state == "Suspended"
    assert watch.states()[-2:] == ["Suspending", "Suspended"]
    assert not bench.left()
    stopped_at = status.checkpoints[-1].step
    saved = [int(path.name.removeprefix("step-")) for path in (bench.output / "checkpoints").iterdir()]
    assert stopped_at == max(saved) == 3
    status = bench.run()
    assert status.state == "Succeeded"
    assert [a.cause for a in status.attempts] == ["Suspended", "Succeeded"]
    assert status.attempts[1].resumed_from_step == stopped_at
    assert status.restarts == 0


def test_an_interruption_saves_and_a_second_one_does_not_wait(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.script(hold_at=3, deaf=True)
    watch = Watch(step(3))
    runner = bench.runner(watch, grace="60s")

    class Twice(Watch):
        def show(self, key, status):  # type: ignore[no-untyped-def]
            if (step(3)(status) and runner.interruptions == 0) or status.state == "Suspending":
                runner.interrupt()

    runner.view = Twice()
    runner.run()
    assert runner.interruptions == 2
    assert not bench.left()
    runner.cluster.close()
    bench.script(steps=10)
    status = bench.run()
    assert status.state == "Succeeded"
    assert (status.attempts[-1].resumed_from_step or 0) >= 2


def test_a_worker_deaf_to_sigterm_is_killed_after_the_grace_period(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.script(hold_at=1, deaf=True)
    cluster = bench.cluster()
    status = bench.run(
        Watch(step(1), lambda: cluster.set_suspended("default", "tiny", True)), cluster=cluster, grace="1s"
    )
    assert status.state == "Suspended"
    assert not bench.left()


def test_a_chain_runs_in_the_order_of_its_inputs(bench: Bench) -> None:
    second = job(bench.home, "second", model={"uri": "job://tiny"})
    bench.write(second, job(bench.home))
    watch = Watch()
    bench.run(watch)
    assert watch.states("second")[0] == "Waiting"
    assert watch.states("second")[-1] == "Succeeded"
    done = [name for name, status in watch.seen if status.state == "Succeeded"]
    assert done.index("tiny") < done.index("second")


def test_a_chain_ends_with_its_input(bench: Bench) -> None:
    second = job(bench.home, "second", model={"uri": "job://tiny"})
    bench.write(second, job(bench.home, model={"uri": "file://./nothing"}))
    watch = Watch()
    assert bench.run(watch).state == "Failed"
    assert watch.states("second") == ["Waiting"]


def test_an_input_that_nobody_makes_is_refused(bench: Bench) -> None:
    bench.write(job(bench.home, model={"uri": "job://base"}))
    with pytest.raises(RefusedError, match="base was not run here; accepted: a job that has succeeded"):
        bench.runner()


def test_jobs_without_gpus_run_one_after_the_other(bench: Bench) -> None:
    bench.write(job(bench.home), job(bench.home, "second"))
    bench.script(steps=4)
    watch = Watch()
    bench.run(watch)
    messages = [c.message for name, s in watch.seen if name == "second" for c in s.conditions if c.reason == "Queued"]
    assert "The queue holds Job second-a1 back" in messages[0]
    both = [{name for name, s in watch.seen[:at] if s.state == "Succeeded"} for at in range(len(watch.seen))]
    first_step = next(at for at, (name, s) in enumerate(watch.seen) if name == "second" and s.state == "Running")
    assert "tiny" in both[first_step]


def test_gpus_are_shared_out(bench: Bench) -> None:
    bench.write(
        job(bench.home, workers={"replicas": 2, "gpusPerWorker": 1}),
        job(bench.home, "second", workers={"replicas": 1, "gpusPerWorker": 2}),
    )
    cluster = bench.cluster(("0", "1", "2", "3"))
    bench.run(cluster=cluster)
    assert bench.status(cluster, "second").state == "Succeeded"
    taken = [bench.started(worker=index)["environment"]["CUDA_VISIBLE_DEVICES"] for index in (0, 1)]
    assert taken == ["0", "1"]
    assert cluster.gpus.take(4) == ["0", "1", "2", "3"]


def test_more_gpus_than_there_are_is_refused(bench: Bench) -> None:
    bench.write(job(bench.home, workers={"replicas": 2, "gpusPerWorker": 8}))
    with pytest.raises(RefusedError) as refused:
        bench.runner()
    assert refused.value.mistakes == [
        f"{bench.file}: tiny: spec.workers: replicas x gpusPerWorker = 16 GPUs; accepted on this machine: at most 0 "
        "(none was found). Lower them, or run with --cpu (spec.workers.gpusPerWorker: 0)."
    ]


def test_a_claim_on_this_machine_is_a_folder(bench: Bench) -> None:
    bench.write(job(bench.home, output={"uri": "pvc://models/tiny"}))
    status = bench.run()
    place = bench.state / "claims" / "models" / "tiny"
    assert status.outputs[0].uri == f"file://{place}"
    assert (place / "report.html").exists()


def test_a_finished_job_is_not_run_again_unless_asked(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.run()
    watch = Watch()
    assert bench.run(watch).state == "Succeeded"
    assert watch.said == [
        "tiny has already succeeded; its rows are not looked at again. To learn rows that were added or changed, add "
        "--fresh: it trains from the start, and keeps what there is. With more epochs, --set checkpoint.resume=always "
        "trains it on; few are too few, at the end of its schedule."
    ]
    assert bench.status(bench.cluster()).attempts[-1].number == 1
    bench.write(job(bench.home, training={"learning_rate": 0.5}))
    with pytest.raises(RefusedError, match=r"has already succeeded with another configuration: .*0\.5"):
        bench.runner()
    status = bench.run(fresh=Choice.KEEP)
    assert status.state == "Succeeded" and status.attempts[-1].resumed_from_step is None


def test_a_finished_job_trains_on_with_more_rows_or_epochs_where_that_is_asked_for(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.run()
    longer: dict[str, Any] = {"training": {"num_train_epochs": 5}}
    bench.write(job(bench.home, **longer))
    with pytest.raises(RefusedError, match=r"train on from its newest checkpoint .*checkpoint\.resume=always"):
        bench.runner()
    bench.script(steps=9)
    longer["checkpoint"] = {"save_steps": 2, "resume": "always"}
    bench.write(job(bench.home, **longer))
    watch = Watch()
    status = bench.run(watch)
    assert status.state == "Succeeded" and status.attempts[0].resumed_from_step == 6
    assert watch.said[0].startswith("tiny: goes on from its newest checkpoint with spec.checkpoint.resume:")
    assert "num_train_epochs" in watch.said[0]
    bench.run(watch)
    assert watch.said[-1].startswith("tiny has already succeeded"), "the same again is no change"
    bench.write(job(bench.home, method={"type": "lora", "r": 3}, **longer))
    with pytest.raises(RefusedError) as refused:
        bench.runner()
    [mistake] = refused.value.mistakes
    assert "spec.method" in mistake and "always" not in mistake, "another method is another model"


def test_what_counts_from_the_next_attempt_on_is_said(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.script(hold_at=1)
    cluster = bench.cluster()
    bench.run(Watch(step(1), lambda: cluster.set_suspended("default", "tiny", True)), cluster=cluster)
    bench.write(job(bench.home, checkpoint={"save_steps": 3}, workers={"replicas": 2, "gpusPerWorker": 0}))
    watch = Watch()
    bench.run(watch)
    assert watch.said[0] == (
        "tiny: from this attempt on, spec.checkpoint.save_steps: 2 → 3; spec.workers.replicas: 1 → 2"
    )


def test_beginning_anew_says_what_there_is_and_keeps_it_beside(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.run()
    (bench.output / "notes.txt").write_text("the user's own")
    (bench.output / "unfinished").mkdir()
    (bench.output / "unfinished" / "report.html").write_text("of the earlier run")
    bench.script(steps=5, exit_at=1, hold_at=2, held=2)
    beside: list[list[str]] = []

    def look() -> None:
        beside.append(sorted(path.name for path in bench.output.iterdir()))
        bench.script(steps=5)

    watch = Watch(step(2, attempt=2), look)
    assert bench.run(watch, fresh=Choice.KEEP).attempts[0].resumed_from_step is None
    earlier = bench.home / "out.earlier-1"
    left = (
        f"tiny: an earlier run left 3 checkpoints (0B) in {bench.output}/checkpoints and a result with its report "
        f"(202B) in {bench.output}."
    )
    assert watch.said[:2] == [left, f"{left} It is now in {earlier}."]
    assert "report.html" not in beside[0] and "notes.txt" in beside[0], "the old report beside the new run"
    assert sorted(path.name for path in earlier.iterdir()) == [
        *("answers.json", "checkpoints", "manifest.json", "model.safetensors", "report.html", "unfinished"),
    ]
    assert sorted(path.name for path in (earlier / "checkpoints").iterdir()) == ["step-2", "step-4", "step-6"]
    assert (bench.state / "default" / "tiny" / "earlier" / "1" / "logs" / "tiny-a1-0" / "trainer.log").exists()
    assert bench.run(fresh=Choice.KEEP).state == "Succeeded"
    assert (bench.home / "out.earlier-2" / "report.html").exists()


def test_beginning_anew_deletes_where_that_was_chosen_and_nothing_where_it_was_not(bench: Bench) -> None:
    bench.write(job(bench.home, checkpoint={"save_steps": 2, "uri": "file://./states"}))
    bench.run()
    (bench.home / "states" / "tiny" / "notes.txt").write_text("the user's own")
    before = sorted(bench.home.rglob("*"))
    with pytest.raises(RefusedError, match="Nothing was changed"):
        bench.runner(fresh=Choice.CANCEL)
    assert sorted(bench.home.rglob("*")) == before
    bench.runner(fresh=Choice.DELETE).cluster.close()
    assert [path.name for path in (bench.home / "states" / "tiny").iterdir()] == ["notes.txt"]
    assert {path.suffix for path in bench.output.iterdir()} == {".json"}, "only how the fake was started"
    assert not list(bench.home.glob("*.earlier*"))


def test_the_result_of_another_run_is_not_written_over(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.run()
    bench.write(job(bench.home, "second", output={"uri": "file://./out"}))
    with pytest.raises(RefusedError, match=r"second: spec\.output\.uri: a finished result lies in .*/out"):
        bench.runner()
    bench.runner(fresh=Choice.KEEP).cluster.close()
    assert (bench.home / "out.earlier-1" / "model.safetensors").read_text() == "after 6 steps"


def test_a_failed_job_starts_anew_and_may_be_changed(bench: Bench) -> None:
    bench.write(job(bench.home, model={"uri": "file://./nothing"}))
    assert bench.run().state == "Failed"
    bench.write(job(bench.home))
    status = bench.run()
    assert (status.state, len(status.attempts)) == ("Succeeded", 1)
    assert (bench.state / "default" / "tiny" / "earlier" / "1" / "logs" / "tiny-a1-0" / "fetch.log").exists()


def test_a_job_that_has_begun_keeps_its_configuration(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.script(hold_at=1)
    cluster = bench.cluster()
    bench.run(Watch(step(1), lambda: cluster.set_suspended("default", "tiny", True)), cluster=cluster)
    bench.write(job(bench.home, data={"train": [{"uri": "file://./other.jsonl"}]}))
    with pytest.raises(RefusedError, match=r"has begun with another configuration: spec\.data\.train"):
        bench.runner()


class KilledError(BaseException):
    """kill -9."""


@pytest.mark.parametrize("writes", [1, 2, 3, 5, 6, 7, 8, 9, 11, 15])
def test_a_kill_at_any_write_leaves_what_the_same_command_can_go_on_with(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    bench.write(job(bench.home, workers={"replicas": 2, "gpusPerWorker": 0}))
    bench.script(steps=4)
    written = 0
    real = store.write_json

    def write(path: Path, value: Object) -> None:
        nonlocal written
        written += 1
        if written == writes:
            raise KilledError
        real(path, value)

    monkeypatch.setattr(store, "write_json", write)
    with pytest.raises(KilledError):
        bench.run()
    bench.opened[0].close()  # what the kernel does: the processes go, the claim goes
    status = bench.run()
    assert status.state == "Succeeded"
    assert [a.cause for a in status.attempts] in (["Succeeded"], ["Terminated", "Succeeded"])
    assert not bench.left()


def test_one_runs_a_job_at_a_time(bench: Bench) -> None:
    bench.write(job(bench.home))
    bench.runner()
    with pytest.raises(RefusedError, match="Another process runs tiny"):
        bench.runner()
