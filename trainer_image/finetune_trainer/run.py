"""One process of a training run: load, prepare, train, save, report.

``python -m finetune_trainer.run`` (or ``launch``, which starts one per GPU). Everything comes from the
configuration that ``$FINETUNE_CONFIG`` names; every ending leaves a termination message and an exit code that say
what happened. The heavy imports wait until progress is served.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.causes import Cause
from finetune_api.compatibility import COMPATIBILITY
from finetune_api.health import sentences
from finetune_api.run import (
    ENV_CONFIG,
    ENV_SAVE_STEPS,
    ENV_SAVE_TOTAL_LIMIT,
    EXIT_STOPPED,
    Answer,
    OutputInfo,
    Termination,
    TrainerConfig,
)
from finetune_api.stages import STAGES
from finetune_trainer.attempt import Attempt, device_name, failed, versions
from finetune_trainer.best import exhausted, judge, watched
from finetune_trainer.faults import ECHOES, last_word
from finetune_trainer.health import Course, Evidence, symptoms
from finetune_trainer.logbook import Logbook, Step, Tally, for_people, mean_loss
from finetune_trainer.outcome import RunError
from finetune_trainer.profiling import Profile
from finetune_trainer.stopping import Stop, leave
from finetune_trainer.telemetry import History, Telemetry, now
from finetune_trainer.world import local_rank, rank

if TYPE_CHECKING:
    from finetune_trainer.publishing import Publisher

LAST_REPORT = 15.0
"""Seconds that a run which ends without a result takes at most to tell so in its report."""
ENV_TRACE = "FINETUNE_TRACE"
"""A folder: each process writes the data rows of every step there (for tests)."""


def main() -> int:
    """Run this process to its end; never returns from a failure of its own making."""
    stop = Stop()
    stop.install()  # before any thread: they inherit the blocked signal
    job: Attempt | None = None
    try:
        config = read_config()
        job = kind_of_run(config)(config, Telemetry(config, serve=rank() == 0), stop)
        stop.on_leave = job.stopped
        code = job.run()
    except BaseException as error:
        code = failed(error, job)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Not sys.exit: threads of NCCL, gloo and the store may be waiting for peers that have ended.
    leave(code)
    return code


def kind_of_run(config: TrainerConfig) -> type[Attempt]:
    """A training, or the making of data."""
    if not STAGES[config.stage].makes:
        return Job
    from finetune_trainer.making import Making

    return Making


def read_config() -> TrainerConfig:
    """The configuration. RunError(INVALID_CONFIGURATION) where it is not there or not valid."""
    path = os.environ.get(ENV_CONFIG, "")
    try:
        return TrainerConfig.model_validate_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"${ENV_CONFIG} must name the run's configuration, a JSON file. It is {path or 'not set'}: {error}",
        ) from error


class Job(Attempt):
    """One attempt at a training, in one process."""

    def __init__(self, config: TrainerConfig, telemetry: Telemetry, stop: Stop) -> None:
        super().__init__(config, telemetry, stop)
        self.result_step = 0
        self.course = Course()
        self.ending: Termination | None = None
        self.publisher: Publisher | None = None
        self.improved = self.exhausted = False
        self.parts: Any = None
        self.rollouts: Any = None
        self.save_steps = int(os.environ.get(ENV_SAVE_STEPS) or config.save_steps)
        self.save_total_limit = int(os.environ.get(ENV_SAVE_TOTAL_LIMIT) or config.save_total_limit)

    def run(self) -> int:
        """Load, prepare, train, save, report. The exit code."""
        self.load()
        self.prepare()
        if not self.train():
            return self.leave_stopped()
        self.finish()
        return 0

    # Load

    def refuse(self) -> None:
        """Where its checkpoints are of another configuration, or of other rows."""
        from finetune_trainer import earlier
        from finetune_trainer.checkpoint import refuse_changes
        from finetune_trainer.storage import Store

        config = earlier.settled(self.config, self.fetched)
        refuse_changes(Store(config.checkpoint_uri), config, self._inputs())

    def load(self) -> None:
        """The processes meet; model and data come to this node; rows become sequences."""
        self.meet()
        from finetune_trainer import data, model
        from finetune_trainer.objectives import objective

        config = self.config
        self.tokenizer = model.load_tokenizer(self.fetched.model, config, self.fetched.adapters)
        self._phase("preparing", "preparing the data")
        self.prepared = self.world.in_turn("data", lambda: data.prepare(config, self.fetched, self.tokenizer))
        self.telemetry.update(formats={name: counts["format"] for name, counts in self.prepared.report.items()})
        self.objective = objective(config, self.tokenizer, self.prepared.labels)
        self.collate: Callable[[list[Any]], dict[str, Any]] = lambda items: self.objective.collate(
            items, self._pad_token_id()
        )

    def _pad_token_id(self) -> int:
        token = self.tokenizer.pad_token_id
        return int(token if token is not None else self.tokenizer.eos_token_id or 0)

    # Prepare

    def prepare(self) -> None:
        """The model, the method's trainable part, DeepSpeed's engine, and the newest checkpoint in it."""
        import torch

        from finetune_trainer import earlier, model
        from finetune_trainer.checkpoint import resume
        from finetune_trainer.engine import Engine
        from finetune_trainer.feed import draw_seed
        from finetune_trainer.flops import model_cost
        from finetune_trainer.methods import METHODS, hooks, switched_off
        from finetune_trainer.publishing import Publisher
        from finetune_trainer.saving import Saver
        from finetune_trainer.schedule import learning_rate, sequences_wanted, steps_for
        from finetune_trainer.state import TrainableState
        from finetune_trainer.zero import before_loading

        config, world = self.config, self.world
        stream = self.prepared.train
        self.wanted = sequences_wanted(config, stream.items)
        self.max_steps = steps_for(config, self.wanted)
        self.rate = learning_rate(config, self.max_steps)
        self.telemetry.update(max_steps=self.max_steps)
        self.telemetry.metrics.max_steps.set(self.max_steps)
        self._phase("loading", f"loading {config.model.uri}")
        torch.manual_seed(draw_seed(config.training.seed))  # what the method draws is the same on every process
        self.partitioning = before_loading(config, world)
        base = model.load_model(self.fetched.model, config, world.device, self.prepared.labels)
        trained = METHODS[config.method.type].prepare(base, config.method, config)
        if adapter := earlier.trained_on(config, self.fetched):
            earlier.begin_with(trained, config, adapter)
        self.vocabulary = getattr(base.config.get_text_config(), "vocab_size", None)
        self.trainable, self.total = model.parameter_counts(trained)
        self.telemetry.update(trainable_parameters=self.trainable, total_parameters=self.total)
        added = hooks(trained, config, self.max_steps)
        off = switched_off(trained, config)
        self._furnish(trained, off is not None)
        self.engine = Engine(trained, config, world, self.objective, self.stop, added, off)
        if self.engine.needs_references:
            self._references()
        self.state = TrainableState(self.engine.engine, world.rank, world.size, added.statistics)
        self._say_layout()

        self.inputs = self._inputs()
        self.resumed = resume(self.checkpoints, config, world, self.state, self.fence, self.inputs, self.work)
        self.step = self.resumed.step
        self.last_checkpoint = self.resumed.info
        self.kept = self.resumed.kept
        self.history = History(self.work / f"metrics-{world.rank}.jsonl")
        if world.first:
            self.history.restore(self.resumed.metrics, self.step)
            self.tally = Tally.of(self.resumed.run)
            lines = self.history.records()
            self.loss = next((line["loss"] for line in reversed(lines) if "loss" in line), None)
            for line in lines:
                self.course.add(line)
            self._say_resumed()
        self._begin_rollouts()
        self.log = Logbook(
            self.telemetry,
            self.tally,
            max_steps=self.max_steps,
            cost=model_cost(base, self.total, trains_all=config.method.type == "full"),
            peak=_peak(world),
            device=world.device,
            figures=self.engine.figures,
        )
        self.saver = Saver(
            self.checkpoints,
            config,
            world,
            self.state,
            fence=self.fence,
            inputs=self.inputs,
            work=self.work,
            limit=self.save_total_limit,
            kept=self.resumed.kept,
            leftovers=[skipped.step for skipped in self.resumed.skipped],
            on_saved=self._saved,
        )
        if config.training.load_best_model_at_end:
            self.saver.best = self.tally.best.step
        if world.first:
            self.publisher = Publisher(config.output_uri, self.work / "published", self.fence, self._draw)

    def _furnish(self, trained: Any, can_switch_off: bool) -> None:
        """What stands beside the policy, where the stage learns from what the model writes."""
        if not STAGES[self.config.stage].rollouts:
            return
        from dataclasses import replace

        from finetune_trainer import earlier, rewards, rollout

        # Switched off, an adapter that is trained on would leave the model it was made for.
        can_switch_off &= earlier.trained_on(self.config, self.fetched) is None
        self._phase("loading", "loading what judges the answers")
        self.parts = rollout.furnish(
            self.config,
            trained,
            can_switch_off,
            lambda: rewards.load(self.config, self.fetched, self.tokenizer, trained, self.world.device),
        )
        told = rollout.figures(self.parts.judges.names, self.objective.figures)
        self.objective = replace(self.objective, figures=told)

    def _begin_rollouts(self) -> None:
        if not STAGES[self.config.stage].rollouts:
            return
        from finetune_trainer.rollout import Rollouts

        kl_coef = self.world.share("kl_coef", self.tally.kl_coef)
        self.rollouts = Rollouts(self.engine, self.tokenizer, self.config, self.parts, kl_coef)

    def _references(self) -> None:
        """While the model is the one it starts from, also where the run goes on from a checkpoint. Collective."""
        self._phase("preparing", "asking the reference")
        for stream, used in [
            (self.prepared.train, self.prepared.train.used(self.wanted)),
            *((stream, None) for stream in self.prepared.eval.values()),
        ]:
            self.engine.references(stream, self.collate, used)

    def _inputs(self) -> dict[str, str]:
        """Digests of what the result depends on; held-out rows do not change it."""
        model = self.config.model
        wanted = {model.uri, *(adapter.uri for adapter in model.adapters), *(s.uri for s in self.config.data.train)}
        if (judged := self.config.rollout) is not None:
            wanted |= {judged.reward_model.uri} if judged.reward_model else set()
            wanted |= {function.uri for function in judged.reward_funcs if function.uri}
        return {
            uri: digest
            for uri, digest in self.fetched.digests.items()
            if any(uri == name or uri.startswith(f"{name}@") for name in wanted)
        }

    def _say_layout(self) -> None:
        per_turn = self.config.training.per_device_train_batch_size * self.world.size
        if self.config.global_batch_size % per_turn:
            self._print(
                f"the global batch of {self.config.global_batch_size} sequences is not a multiple of "
                f"{per_turn} (per_device_train_batch_size x {self.world.size} processes): it is kept, and "
                f"{self.engine.passes * per_turn - self.config.global_batch_size} places of each step stay empty"
            )
        self._print(
            f"training {self.trainable:,} of {self.total:,} parameters on {self.world.size} process(es), "
            f"ZeRO-{self.engine.zero_stage}, {self.max_steps} steps of {self.config.global_batch_size} sequences "
            f"({self.engine.passes} passes per process)"
            + (f", {self.engine.compiled} layers compiled" if self.engine.compiled else "")
        )

    def _say_resumed(self) -> None:
        resumed = self.resumed
        for skipped in resumed.skipped:
            self._print(f"passed over {skipped.uri}: {skipped.problem}")
        if resumed.info is not None:
            self._print(f"continuing from {resumed.info.uri} (written by attempt {resumed.attempt})")
        if resumed.changed:
            self._print(
                f"it was made with other rows or another configuration, then → now: {'; '.join(resumed.changed[:12])}; "
                f"{max(0, self.max_steps - resumed.step)} steps are left"
            )
        self.telemetry.update(
            resumed_from_step=resumed.step if resumed.info else None,
            checkpoints=resumed.kept,
            skipped_checkpoints=resumed.skipped,
            step=resumed.step,
            evaluation=self.tally.evaluation,
        )
        if resumed.info is not None:
            self.telemetry.metrics.step.set(resumed.step)
            self.telemetry.metrics.checkpoint_time.set(datetime.fromisoformat(resumed.info.time).timestamp())
            self.telemetry.metrics.checkpoint_bytes.set(resumed.info.size)
        if self.fence is not None:
            facts = {
                "resumed_from": resumed.step if resumed.info else None,
                "world_size": self.world.size,
                "skipped": [{"step": s.step, "problem": s.problem} for s in resumed.skipped],
            }
            with suppress(RunError):  # for the report only
                self.fence.note("began", facts)

    # Train

    def train(self) -> bool:
        """The steps. False: stopped on request, saved."""
        world, engine = self.world, self.engine
        self._judge()
        self._answer_before()
        self._evaluate_before()
        self._phase("training", f"training from step {self.step} to {self.max_steps}")
        self.exhausted = self.world.share("exhausted", exhausted(self.tally.best, self.config.training))
        feed = self._feed()
        self.position = self.resumed.position
        trace, profile = self._trace(), Profile(world.first and world.device.type == "cuda")
        batch, waited = feed.take()
        agreed = engine.agree(None, None, batch)
        save_due = False
        self.stop.beat(stepping=True)
        while batch is not None:
            if agreed.stop:
                feed.close()
                return False
            began = time.monotonic()
            weights, rate = agreed.next_weights, self.rate(batch.step - 1)
            if self.rollouts is None:
                outcome = engine.step(batch, weights, rate)
            else:
                outcome, batch = self.rollouts.step(batch, rate)
                weights, self.tally.kl_coef = outcome.weights, self.rollouts.kl_coef
            following, waits = feed.take()
            agreed = engine.agree(outcome, batch, following, fatal=self.saver.fatal is not None, saving=self.saver.busy)
            loss, norm = mean_loss(agreed.loss_sums, weights), float(outcome.grad_norm)
            engine.check_finite(batch.step, loss, norm, outcome.applied, rate)
            if agreed.fatal:
                raise self.saver.fatal or RunError(
                    Cause.COMMUNICATION_ERROR, "Another process of the run cannot go on; its own message tells why."
                )
            self.step, self.position, self.loss = batch.step, batch.position, loss
            trace(batch)
            step = Step(
                number=batch.step,
                epoch=batch.epoch,
                loss_sums=agreed.loss_sums,
                weights=weights,
                sums=agreed.sums,
                tokens=agreed.tokens,
                pairs=agreed.pairs,
                learning_rate=rate,
                grad_norm=norm,
                seconds=time.monotonic() - began,
                waited=waited,
            )
            self._stepped(step)
            if sums := profile.stepped():
                parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.4f} s" for name, seconds in sums.items())
                self._print(f"a step on this GPU: {parts}")
            last = following is None
            self._log_if_due(step, batch.ends_epoch, last=last)
            save_due |= self.step % self.save_steps == 0
            # Storage that is slow, or away for an hour, delays checkpoints and not the training.
            if last or self.improved or self.exhausted or (save_due and not agreed.saving):
                self._save()
                save_due = False
            self.improved = False
            if self.exhausted:
                feed.close()
                break
            batch, waited = following, waits
        self.stop.beat(stepping=False)
        with self.stop.never_leave():  # the last save is finished also where a stop is asked for now
            if self.world.share("evaluate", bool(self.prepared.eval) and self.tally.evaluated_step != self.step):
                self._evaluate()  # a run that was stopped between its last step and its end
            self.saver.wait()
        return True

    def _feed(self) -> Any:
        from finetune_trainer.feed import Feed

        config, collate, objective = self.config, self.collate, self.objective
        per_device = config.training.per_device_train_batch_size
        if self.rollouts is not None:
            from finetune_trainer import rollout

            collate, objective = rollout.prompts, rollout.reading(objective.terms)
            per_device = rollout.prompts_at_once(config)
        return Feed(
            self.prepared.train,
            collate,
            objective,
            rank=self.world.rank,
            size=self.world.size,
            per_device=per_device,
            global_batch=config.global_batch_size,
            first_step=self.step + 1,
            position=self.resumed.position,
            end=self.resumed.position if self.exhausted else self.wanted,
            pin=self.world.device.type == "cuda",
        )

    def _stepped(self, step: Step) -> None:
        self.log.note(step)
        self.stop.beat()

    def _log_if_due(self, step: Step, ends_epoch: bool, *, last: bool) -> None:
        training = self.config.training
        evaluate = bool(self.prepared.eval) and (
            last or (self.step % training.eval_steps == 0 if training.eval_steps else ends_epoch)
        )
        if not (evaluate or last or self.step % training.logging_steps == 0):
            return
        line = self.log.line(step)
        if self.engine.hooks.figures is not None:
            line |= self.log.method(self.engine.hooks.figures())
        if evaluate:
            line |= self._evaluate()
        self._tell(line)

    def _evaluate_before(self) -> None:
        """What the training begins from, as the line of step 0. Collective."""
        if not self.step and self.config.training.eval_on_start:
            self._tell({"step": 0, "epoch": 0.0, **self._evaluate(), "time": now()})

    def _tell(self, line: dict[str, Any]) -> None:
        if self.world.first:
            self.history.add(line)
            self.course.add(line)
            self._print(for_people(line, self.max_steps))
            self._judge()
            if self.course.count == 1:
                self._publish()

    def _judge(self, answers: Sequence[Answer] = (), *, done: bool = False) -> None:
        """Whether the figures so far speak for the result; what does not is told once, and to the operator."""
        if not self.world.first:
            return
        evidence = Evidence(
            self.config,
            self.course,
            self.max_steps,
            self.prepared.report,
            vocabulary=self.vocabulary,
            answers=answers,
            taught=lambda answer: self.prepared.train.holds(self._tokens(answer)),
            done=done,
        )
        before, self.unhealthy = self.unhealthy or {}, symptoms(evidence)
        for text in sentences({reason: told for reason, told in self.unhealthy.items() if reason not in before}):
            self._print(f"doubtful: {text}")
        self.telemetry.update(unhealthy=self.unhealthy)

    def _tokens(self, text: str) -> list[int]:
        """A text's tokens but the first one, which depends on what stands before it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])[1:]

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate now; the figures as they stand in metrics.jsonl. Collective."""
        from finetune_trainer.report import SHOWN_LABELS

        if not self.prepared.eval:
            return {}
        before = self.telemetry.progress().phase
        self._phase("evaluating")
        if self.rollouts is None:
            figures = self.engine.evaluate(self.prepared.eval, self.collate)
        else:
            figures = self.rollouts.evaluate(self.prepared.eval)
        told: dict[str, Any] = self.log.evaluated(self.step, figures)
        if self.engine.confusion:
            self.tally.confusion = self.engine.confusion[""]
            if len(self.objective.labels) <= SHOWN_LABELS:
                told["eval_confusion"] = self.tally.confusion
        self._compare(figures)
        self._phase(before)
        return told

    def _compare(self, figures: dict[str, float]) -> None:
        """Whether this evaluation is the best one, and whether to go on. Collective."""
        training = self.config.training
        if not watched(training) or not self.step:  # of what the training begins from, nothing is saved
            return
        found = judge(self.tally.best, training, self.step, figures)
        # Rank 0 alone remembers earlier attempts.
        step, waited = self.world.share("best", [found.step, found.waited])
        self.tally.best = replace(found, step=step, waited=waited)
        self.improved, self.exhausted = step == self.step, exhausted(self.tally.best, training)
        if self.improved and training.load_best_model_at_end:
            self.saver.best = self.step
        if self.exhausted:
            self._print(
                f"stopping early: {training.metric_for_best_model} was best at step {step}, {waited} evaluations ago"
            )

    def _take_best(self) -> None:
        """The weights of the best evaluation, where the result is to be those. Collective."""
        from finetune_trainer.checkpoint import take

        best = self.tally.best
        if not self.config.training.load_best_model_at_end or best.step in (0, self.step):
            return
        problem = take(self.checkpoints, best.step, self.world, self.state, self.work)
        if problem:
            self._print(
                f"step {best.step} was best, but its checkpoint cannot be read ({problem}): taking the last one"
            )
            return
        self.result_step = best.step
        self.tally.evaluation = best.evaluation or self.tally.evaluation
        self._print(f"the result is the model of step {best.step}, the best evaluation")

    def _answer_before(self) -> None:
        """The answers of the untrained model; a resumed run has them from its checkpoint. Collective."""
        from finetune_trainer.samples import answers

        wanted = self.config.evaluation
        missing = self.world.share("prompts", [p for p in wanted.prompts if p not in self.tally.before])
        if not missing or self.step:
            return
        self._phase("evaluating", "asking the model before training")
        said = answers(self.engine, self.tokenizer, missing, wanted.max_new_tokens, self.world)
        self.tally.before |= dict(zip(missing, said, strict=True))

    def _trace(self) -> Callable[[Any], None]:
        folder = os.environ.get(ENV_TRACE)
        if not folder:
            return lambda batch: None
        path = Path(folder) / f"rows-{self.world.size}-{self.world.rank}.jsonl"

        def write(batch: Any) -> None:
            with path.open("a") as file:
                file.write(json.dumps({"step": batch.step, "rows": batch.rows}) + "\n")

        return write

    # Save

    def _documents(self) -> dict[str, bytes]:
        from finetune_trainer.checkpoint import METRICS, RUN

        if not self.world.first:
            return {}
        return {METRICS: self.history.content(), RUN: self.tally.document()}

    def _save(self) -> None:
        with self.stop.never_leave():  # copying a large state takes longer than any step
            self.saver.save(self.step, self.position, self._documents())

    def _saved(self, saved: Any) -> None:
        """From the saving thread, on rank 0."""
        metrics = self.telemetry.metrics
        if saved.info is not None:
            self.last_checkpoint = saved.info
            metrics.checkpoint_seconds.set(saved.seconds)
            metrics.checkpoint_time.set(time.time())
            metrics.checkpoint_bytes.set(saved.info.size)
            self._print(f"saved {saved.info.uri} ({saved.info.size / 2**20:.1f} MiB in {saved.seconds:.1f} s)")
        else:
            metrics.checkpoint_failures.inc()
            self._print(f"step {saved.step} could not be saved, training goes on: {saved.problem}")
        self.kept = list(self.saver.kept)
        self.telemetry.checkpoints(self.kept, self.saver.failures)
        self._publish()

    def leave_stopped(self) -> int:
        """All processes agreed to stop: save what was done since the last save, and leave."""
        with self.stop.never_leave():
            self._phase("saving", f"stopping: saving step {self.step}")
            if self.step and self.saver.saved_step != self.step:
                self.saver.save(self.step, self.position, self._documents())
            self.saver.wait(hurry=True)
            # The first one to leave ends the pod's others, 30 s later: nobody leaves before the last upload is done.
            self.world.barrier("saved")
            kept = self.saver.saved_step == self.step or not self.world.first
            message = f"Stopped on request after step {self.step}" + (
                ", which is saved." if kept else f"; it could not be saved: {self.saver.last_problem}"
            )
            if local_rank() == 0:  # one word per pod; rank 0's knows the checkpoint
                self._leave_word(self.word(Cause.TERMINATED, message))
        return EXIT_STOPPED

    # Report

    def finish(self) -> None:
        """The answers after, the result and the report, and the last word."""
        self._phase("exporting", "writing the result")
        self.result_step = self.step
        self._take_best()
        answers = self._answers()
        self._judge(answers, done=True)
        if self.rollouts is not None:
            self.parts.detach()
        weights = self.engine.weights(only_trainable=not self._whole_model)
        if self.world.first:
            self._export(weights, answers)
        self._phase("done", f"done after {self.step} steps")
        if local_rank() == 0:
            what = f" The result is that of step {self.result_step}." if self.result_step != self.step else ""
            self._leave_word(self.word(Cause.SUCCEEDED, f"Trained {self.step} steps.{what}"))
        self.pulse.close()

    def _answers(self) -> list[Answer]:
        from finetune_trainer.samples import answers

        wanted = self.config.evaluation
        if not wanted.prompts:
            return []
        after = answers(self.engine, self.tokenizer, wanted.prompts, wanted.max_new_tokens, self.world)
        return [
            Answer(prompt=prompt, before=self.tally.before.get(prompt, ""), after=text)
            for prompt, text in zip(wanted.prompts, after, strict=True)
        ]

    def _publish(self) -> None:
        if self.publisher is not None:
            self.publisher.renew()

    def end_attempt(self, word: Termination) -> None:
        """Also in the report, where there is no result to be told of."""
        super().end_attempt(word)
        if self.publisher is not None and word.cause is not Cause.SUCCEEDED:
            # What another process of this pod died of, this one only heard the echo of.
            first = last_word() if word.cause in ECHOES else None
            self.ending = first if first is not None and first.cause not in ECHOES else word
            self.publisher.end(LAST_REPORT)

    def _export(self, weights: dict[str, Any] | None, answers: list[Answer]) -> None:
        from finetune_trainer import export

        assert self.publisher is not None
        self.publisher.close()
        config = self.config
        folder = self.work / "output"
        kind = "model" if self._whole_model else "adapter"
        export.write_weights(self.engine.module, self.tokenizer, weights, config, folder, self.unhealthy or {})
        facts = {
            "namespace": config.namespace,
            "name": config.name,
            "step": self.result_step,
            "stage": config.stage,
            "base_model": config.model.uri,
            "base": config.model.model_dump(mode="json"),
            "inputs": self.inputs,
            "evaluation": self.tally.evaluation,
        }
        if config.merge and kind == "adapter":
            self._phase("exporting", "merging the adapter into the model")
            merged = self.work / "merged"
            export.merge(config, self.fetched.model, folder, merged, self.unhealthy or {})
            self.outputs.append(export.upload(merged, f"{config.output_uri.rstrip('/')}/merged", "merged", facts))
        self.stop.beat()
        said = json.dumps([answer.model_dump() for answer in answers], ensure_ascii=False, indent=1)
        (folder / "answers.json").write_text(said, encoding="utf-8")
        weigh = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        here = OutputInfo(uri=config.output_uri, kind=kind, size=weigh)
        self._draw(folder, Cause.SUCCEEDED, answers, [here, *self.outputs])
        self.outputs.insert(0, export.upload(folder, config.output_uri, kind, facts))
        with suppress(RunError):
            self.publisher.clear()

    def _draw(
        self,
        folder: Path,
        cause: Cause | None = None,
        answers: Sequence[Answer] = (),
        outputs: Sequence[OutputInfo] = (),
    ) -> None:
        """Metrics, plot and report as the run stands now. ``cause``: how it has ended, where it has."""
        from finetune_trainer import report

        cause, message = (self.ending.cause, self.ending.message) if self.ending else (cause, "")
        page = report.Report(
            config=self.config,
            records=self.history.records(),
            cause=cause,
            message=message,
            step=self.step,
            max_steps=self.max_steps,
            written=now(),
            evaluation=self.tally.evaluation,
            labels=self.objective.labels,
            confusion=self.tally.confusion,
            answers=list(answers),
            data=self.prepared.report,
            attempts=self._attempts(cause, message),
            unhealthy=self.unhealthy or {},
            checkpoints=list(self.kept),
            skipped=self.resumed.skipped,
            checkpoint_failures=self.saver.failures,
            outputs=list(outputs),
            trainable_parameters=self.trainable,
            total_parameters=self.total,
            world_size=self.world.size,
            device=device_name(self.world.device),
            seconds=self.tally.seconds,
            versions=versions(),
        )
        (folder / "metrics.jsonl").write_bytes(self.history.content())
        try:
            report.write_plot(page, folder / "loss.png")
            report.write_page(page, folder / "report.html")
        except Exception as error:  # a result without its report is still the result
            traceback.print_exception(error)

    @property
    def _whole_model(self) -> bool:
        """The result is a model, not an adapter."""
        return COMPATIBILITY[self.config.method.type].whole_model


def _peak(world: Any) -> float | None:
    """FLOP/s of all GPUs of the run together, as far as they are known."""
    from finetune_trainer.flops import peak_flops

    if world.device.type != "cuda":
        return None
    one = peak_flops(device_name(world.device))
    return one and one * world.size


if __name__ == "__main__":
    sys.exit(main())
