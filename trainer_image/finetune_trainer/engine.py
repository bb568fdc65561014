"""The training step over a DeepSpeed engine: one path for one CPU process and for many GPUs, ZeRO 0 to 3.

DeepSpeed partitions, reduces and updates. What it would average is undone here: the loss of a step is the sum over
the whole global batch divided by its weight (the label tokens) in the whole global batch, however the batch is cut into
processes and forward passes. Every random draw of a pass is seeded by (seed, step, slot).

Called by ``run.py``. ``checkpoint.py`` and ``saving.py`` see the engine through ``state.py``.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from finetune_api.causes import Cause
from finetune_api.run import TrainerConfig
from finetune_trainer import scores
from finetune_trainer.data import Item, Stream
from finetune_trainer.feed import Slot, StepBatch, draw_seed
from finetune_trainer.hooks import NOTHING, Hooks
from finetune_trainer.logbook import mean_loss
from finetune_trainer.noise import Noise
from finetune_trainer.objectives import Objective, Sums
from finetune_trainer.objectives.head import find_head
from finetune_trainer.outcome import RunError
from finetune_trainer.stopping import Stop
from finetune_trainer.world import ENV_COMPILE, World
from finetune_trainer.zero import deepspeed_config, forget_dry_run, is_plain, passes, zero_stage


@dataclass(frozen=True)
class Agreed:
    """What all processes know after a step."""

    loss_sums: list[float]
    """The terms of the loss, summed over the global batch."""
    tokens: int
    pairs: int
    next_weights: list[float]
    """Of the next global batch, see ``StepBatch.weights``."""
    sums: list[float]
    """What the objective tells of the step: its ``Sums``, flattened (:meth:`Engine.figures` reads them)."""
    stop: bool
    """Some process was asked to stop."""
    fatal: bool
    """Some process cannot go on; it says why itself."""
    saving: bool
    """Some process still writes its part of the last checkpoint."""


@dataclass(frozen=True)
class StepOutcome:
    """One process's view of a step, still on the device."""

    loss_sums: torch.Tensor
    """float64 (K,): this process's sums of the terms of the loss."""
    weights: list[float]
    """Over what each term is a mean, in the whole global batch."""
    sums: torch.Tensor
    """float64: this process's flattened sums of what the objective tells."""
    grad_norm: torch.Tensor | float
    """L2 norm of the whole gradient before clipping."""
    applied: bool
    """False: DeepSpeed found the gradient not finite and left the weights alone."""


class Engine:
    """A DeepSpeed engine and the step we make with it."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrainerConfig,
        world: World,
        objective: Objective,
        stop: Stop,
        hooks: Hooks = NOTHING,
        switched_off: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
        *,
        learns: bool = True,
    ) -> None:
        """``switched_off``: inside it the model is the one the training started from; None where there is no such.

        ``learns``: false where the model is only looked at (:meth:`evaluate`); nothing of it need be trainable then.
        """
        self.config = config
        self.world = world
        self.objective = objective
        self.stop = stop
        self.hooks = hooks
        self.switched_off = switched_off
        self.zero_stage = zero_stage(config)
        self.plain = is_plain(config)
        """No ZeRO and no precision section: the optimizer is ours, so are the gradient's norm and clipping."""
        self.passes = passes(config, world)
        """Forward passes per process and step; ragged batches are filled with stand-ins."""
        mixed = self._autocast_dtype(model)
        self._autocast = mixed if self.plain else None
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.module: Any = model
        if learns:
            self._take_up(model)
        # After DeepSpeed has hung on to the model: under ZeRO-3 its hooks bring a layer's weights together.
        with torch.autocast(world.device.type, dtype=mixed, enabled=mixed is not None):
            self.head = find_head(self.module)
        self._number = 0
        self._told: dict[str, tuple[int, ...]] = {}
        """Names and shapes of the objective's sums, known after the first pass."""
        self.confusion: dict[str, list[list[int]]] = {}
        """Of the last evaluation, by source ("" for all): how often label i was taken for j."""
        self._noise = Noise(self.module, config, world) if config.training.neftune_noise_alpha else None
        self.compiled = compile_layers(self.module, world.device, self.zero_stage) if learns else 0

    def _take_up(self, model: torch.nn.Module) -> None:
        """DeepSpeed's engine and the optimizer."""
        if not self.trainable:
            raise RunError(Cause.INVALID_CONFIGURATION, "The method leaves no parameter to train.")
        import deepspeed

        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self._adamw(model),
            config=deepspeed_config(self.config, self.world),
            dist_init_required=False,
        )
        self.module = self.engine.module
        forget_dry_run(self.optimizer)
        if self.plain and self.world.size == 1:
            self.engine.enable_backward_allreduce = False  # it would flatten and copy every gradient
        if self.hooks.after_update is not None:
            after = self.hooks.after_update
            # Called by the optimizer itself: DeepSpeed clears the gradients right after it.
            self.optimizer.register_step_post_hook(lambda *_: after(self._number))

    def _adamw(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        training = self.config.training
        ratio_of = self.hooks.learning_rate_ratio or (lambda name: 1.0)
        members: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                matrix = len(getattr(p, "ds_shape", p.shape)) >= 2  # not a bias, not a norm
                members.setdefault((ratio_of(name), training.weight_decay if matrix else 0.0), []).append(p)
        groups = [
            {"params": parameters, "weight_decay": decay, "lr_ratio": ratio}
            for (ratio, decay), parameters in sorted(members.items(), key=lambda item: (item[0][0], -item[0][1]))
        ]
        return torch.optim.AdamW(
            groups,
            lr=0.0,  # until the first step: see forget_dry_run
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            fused=True,
        )

    def _autocast_dtype(self, model: torch.nn.Module) -> torch.dtype | None:
        """bf16 where fp32 adapters stand in a bf16 model: their products run on tensor cores, their sums in fp32."""
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
        trained = {p.dtype for p in model.parameters() if p.requires_grad} or frozen
        return torch.bfloat16 if torch.bfloat16 in frozen and torch.float32 in trained else None

    # The step

    def step(self, batch: StepBatch, weights: list[float], learning_rate: float) -> StepOutcome:
        """Forward and backward over this process's slots, then the update.

        ``weights``: of the whole global batch, over all processes.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]
        self._number = batch.step
        self.module.train()
        # DeepSpeed averages gradients over the processes; the loss is a sum over all of them.
        scales = [self.world.size / max(weight, 1) for weight in weights]
        total = torch.zeros(len(weights), dtype=torch.float64, device=self.world.device)
        told: torch.Tensor | None = None
        ready: Iterable[dict[str, Any]] = (self._ready(slot.batch) for slot in batch.slots)
        if self.objective.before is not None:
            ready = self._with_before(list(ready), [slot.stand_in for slot in batch.slots])
        for number, (slot, inputs) in enumerate(zip(batch.slots, ready, strict=True)):
            self.engine.set_gradient_accumulation_boundary(number + 1 == len(batch.slots))
            self._seed(batch.step, slot, inputs)
            terms, sums = self._loss_sums(inputs)
            if slot.stand_in:
                terms = terms * 0.0
            whole = sum(term * scale for term, scale in zip(terms.unbind(), scales, strict=True))
            if self.hooks.extra_loss is not None:  # a share in each pass, and the same on all processes
                whole = whole + self.hooks.extra_loss() / len(batch.slots)
            self.engine.backward(whole, scale_wrt_gas=False)
            total += terms.detach().double()
            flat = self.flattened(sums) * (0.0 if slot.stand_in else 1.0)
            told = flat if told is None else told + flat
            self.stop.beat()
        norm: torch.Tensor | float
        if self.plain:
            norm = self._clip()
        self.engine.step()
        if not self.plain:
            norm = self.engine.get_global_grad_norm()
            norm = math.inf if norm is None else norm
        assert told is not None
        return StepOutcome(total, weights, told, norm, bool(self.engine.was_step_applied()))

    def _call(self, function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """A function of the objective on (model, batch, output layer), in the precision of the run."""
        if not self.plain:
            return function(self.engine, inputs, self.head)
        # DeepSpeed's forward would switch autocast off; without ZeRO it does nothing else that is needed here.
        with self.autocast():
            return function(self.module, inputs, self.head)

    def _loss_sums(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, Sums]:
        terms, sums = self._call(self.objective.loss_sums, inputs)
        return terms, sums

    def ask(self, function: Callable[..., Any], batch: dict[str, Any], *, reference: bool = False) -> Any:
        """What a function of (model, batch, output layer) gives, without a graph or a draw; ``reference``: of the model
        as it was before training, where it can be had by switching the method off."""
        off = self.switched_off if reference else contextlib.nullcontext
        assert off is not None
        with self._looking(), off():
            return self._call(function, move(batch, self.world.device))

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Inside, the model may be asked: passes leave no graph and draw nothing, in the precision of the run."""
        with self._looking(), self.autocast():
            yield

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Inside, passes leave no graph and draw nothing (no dropout)."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(training)

    def _ready(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A prepared batch on the device, with what the reference says of it."""
        inputs = move(batch, self.world.device)
        if self.objective.reference is not None and "reference" not in inputs:
            assert self.switched_off is not None
            with self._looking(), self.switched_off():
                inputs["reference"] = self._call(self.objective.reference, inputs)
        return inputs

    def _with_before(self, ready: list[dict[str, Any]], stand_ins: list[bool]) -> list[dict[str, Any]]:
        """The batches, each with the objective's ``before`` summed over all of them, on all processes."""
        assert self.objective.before is not None
        total: torch.Tensor | None = None
        with self._looking():
            for inputs, stand_in in zip(ready, stand_ins, strict=True):
                part = self._call(self.objective.before, inputs) * (0.0 if stand_in else 1.0)
                total = part if total is None else total + part
        assert total is not None
        if self.world.size > 1:
            dist.all_reduce(total)
        return [inputs | {"before": total} for inputs in ready]

    @property
    def needs_references(self) -> bool:
        """What the reference says must be known before training: it cannot be asked later, or is not to be."""
        if self.objective.reference is None:
            return False
        return self.objective.precompute or self.switched_off is None

    def references(
        self, stream: Stream, collate: Callable[[list[Item]], dict[str, Any]], used: list[np.ndarray] | None = None
    ) -> None:
        """Have the model say of every row (``used``: of these, by source) what the objective's ``reference`` asks, and
        add it to the stream. To be called while the model is the one the training starts from. Collective.

        What a pass holds does not depend on the number of processes: they give the same numbers in any number.
        """
        assert self.objective.reference is not None
        per_device = self.config.training.per_device_eval_batch_size
        found: list[np.ndarray] = []
        with self._looking():
            for source, rows in enumerate(stream.rows):
                alone = Stream([rows], [1.0], 0, False, stream.max_length, shuffle=False)
                wanted = np.arange(len(rows)) if used is None else used[source]
                values = torch.zeros(len(rows), rows.parts, dtype=torch.float32, device=self.world.device)
                for places, stand_in in self.shared_out(len(wanted), per_device):
                    numbers = [int(wanted[place]) for place in places]
                    batch = self.objective.prepare(collate([alone.item(0, number) for number in numbers]))
                    said = self._call(self.objective.reference, move(batch, self.world.device))
                    if not stand_in:
                        values[numbers] = said.float()
                    self.stop.beat()
                if self.world.size > 1:
                    dist.all_reduce(values)
                found.append(values.cpu().numpy())
        stream.add_numbers("reference", found)

    def shared_out(self, count: int, per_device: int) -> Iterator[tuple[range, bool]]:
        """This process's slots of ``count`` places, and whether each is only there to keep the others company."""
        slots = -(-count // per_device)
        for turn in range(-(-slots // self.world.size)):
            number = turn * self.world.size + self.world.rank
            first = number * per_device
            mine = number < slots
            yield (range(first, min(first + per_device, count)) if mine else range(1)), not mine

    def flattened(self, sums: Sums) -> torch.Tensor:
        """Sums as one tensor, as ``agree`` adds them up; :meth:`figures` reads such."""
        self._told = {name: tuple(value.shape) for name, value in sums.items()}
        if not sums:
            return torch.zeros(0, dtype=torch.float64, device=self.world.device)
        device = self.world.device  # what is counted on the host is there
        return torch.cat([value.detach().to(device, torch.float64).reshape(-1) for value in sums.values()])

    def figures(self, flat: list[float]) -> dict[str, float]:
        """What the objective tells, of sums over whole steps."""
        return self.objective.figures(self.unflattened(flat))

    def unflattened(self, flat: list[float]) -> Sums:
        """The sums that were last flattened, of numbers."""
        sums: Sums = {}
        begin = 0
        for name, shape in self._told.items():
            size = math.prod(shape)
            sums[name] = torch.tensor(flat[begin : begin + size], dtype=torch.float64).reshape(shape)
            begin += size
        return sums

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of a forward pass."""
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=self._autocast)

    def _clip(self) -> torch.Tensor:
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if (limit := self.config.training.max_grad_norm) > 0:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, limit, norm, foreach=True)
        return norm

    def _seed(self, step: int, slot: Slot, inputs: dict[str, Any]) -> None:
        """Everything that draws in this pass (dropout, noise) draws by (seed, step, slot)."""
        import random

        seed = draw_seed(self.config.training.seed, step, slot.number)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        if self._noise is not None:
            self._noise.prepare(draw_seed(seed, 1), inputs)

    def agree(
        self,
        outcome: StepOutcome | None,
        batch: StepBatch | None,
        following: StepBatch | None,
        *,
        fatal: bool = False,
        saving: bool = False,
    ) -> Agreed:
        """The one small reduction of a step: loss, counts, the next batch's weight, and whether to go on.

        Collective. ``batch`` is the one just done, ``following`` the next one.
        """
        terms = self.objective.terms
        device = self.world.device
        counts = torch.tensor(
            [
                batch.tokens if batch else 0,
                batch.pairs if batch else 0,
                self.stop.requested,
                fatal,
                saving,
                *(following.weights if following else [0.0] * terms),
            ],
            dtype=torch.float64,
        )
        losses = outcome.loss_sums if outcome is not None else torch.zeros(terms, dtype=torch.float64, device=device)
        parts = [counts.to(device), losses]
        if outcome is not None:
            parts.append(outcome.sums)
        words = torch.cat(parts)
        if self.world.size > 1:
            dist.all_reduce(words)
        tokens, pairs, stop, gone, busy, *values = words.tolist()
        return Agreed(
            loss_sums=values[terms : 2 * terms],
            tokens=int(tokens),
            pairs=int(pairs),
            next_weights=values[:terms],
            sums=values[2 * terms :],
            stop=stop > 0,
            fatal=gone > 0,
            saving=busy > 0,
        )

    def check_finite(self, step: int, loss: float, norm: float, applied: bool, learning_rate: float) -> None:
        """Raise RunError(NON_FINITE_LOSS) where a step went wrong. All processes see the same numbers."""
        if math.isfinite(loss) and math.isfinite(norm) and applied:
            return
        what = f"The loss became {loss}" if not math.isfinite(loss) else f"The gradient's norm became {norm}"
        raise RunError(
            Cause.NON_FINITE_LOSS,
            f"{what} at step {step} (learning rate {learning_rate:g}, loss {loss:g}, gradient norm {norm:g}). "
            "Nothing was saved after it. Lower training.learning_rate, add training.warmup_steps, set "
            "training.max_grad_norm: 1.0, or look for damaged rows in the data.",
        )

    # Evaluation

    def evaluate(self, sources: dict[str, Stream], collate: Callable[[list[Item]], dict[str, Any]]) -> dict[str, float]:
        """Loss, perplexity (of language models) and what the objective tells: ``loss`` … over all sources and, per
        source, ``loss/NAME`` ….

        Weighted as in training (by tokens, by pairs), over all processes. Collective; every process makes equally
        many passes.
        """
        terms = self.objective.terms
        with self._looking():
            found = [self._evaluate(stream, collate) for stream in sources.values()]
        if not found:
            return {}
        values = torch.stack([total for total, _ in found])
        if self.world.size > 1:
            dist.all_reduce(values)
        figures: dict[str, float] = {}
        named = [("", values.sum(0)), *((f"/{name}", row) for name, row in zip(sources, values, strict=True))]
        if (of_rows := self.objective.of_rows) is not None:
            rows = [self._from_all(part) for _, part in found]
            for name, part in zip(("", *(f"/{name}" for name in sources)), (torch.cat(rows), *rows), strict=True):
                figures |= {f"{key}{name}": value for key, value in of_rows(part.cpu().numpy()).items()}
        for name, row in named:
            sums, weights, told = row.tolist()[:terms], row.tolist()[terms : 2 * terms], row.tolist()[2 * terms :]
            if not any(weights):
                continue
            loss = mean_loss(sums, weights)
            figures[f"loss{name}"] = loss
            if self.objective.per_token:
                figures[f"perplexity{name}"] = scores.perplexity(loss)
            figures |= {f"{key}{name}": value for key, value in self.figures(told).items()}
            if self.objective.labels:
                self.confusion[name.removeprefix("/")] = self.unflattened(told)["confusion"].long().tolist()
        return figures

    def _evaluate(
        self, stream: Stream, collate: Callable[[list[Item]], dict[str, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's share of a source: the terms of the loss, their weights, and what the objective tells; and
        what it tells of every row."""
        total: torch.Tensor | None = None
        rows = [torch.zeros(0, device=self.world.device)]
        shared = self._before_all(stream, collate) if self.objective.before is not None else {}
        for batch, stand_in in self._eval_batches(stream, collate):
            weights = torch.tensor(self.objective.weights(batch), dtype=torch.float64, device=self.world.device)
            terms, sums = self._loss_sums(self._ready(self.objective.prepare(batch)) | shared)
            if "rows" in sums:
                rows += [] if stand_in else [sums["rows"]]
                del sums["rows"]
            row = torch.cat([terms.double(), weights, self.flattened(sums)]) * (0.0 if stand_in else 1.0)
            total = row if total is None else total + row
            self.stop.beat()
        assert total is not None
        return total, torch.cat(rows[1:] or rows)

    def _from_all(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, c) of each process as one (N, c), on all of them. Collective."""
        if self.world.size == 1:
            return rows
        shape = torch.zeros(self.world.size, 2, dtype=torch.long, device=rows.device)
        shape[self.world.rank] = torch.tensor([len(rows), rows.shape[-1] if len(rows) else 0])
        dist.all_reduce(shape)
        padded = torch.zeros(*shape.amax(0).tolist(), device=rows.device)
        padded[: len(rows)] = rows.reshape(len(rows), padded.shape[1])
        parts = [torch.zeros_like(padded) for _ in range(self.world.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, shape[:, 0].tolist(), strict=True)])

    def _eval_batches(
        self, stream: Stream, collate: Callable[[list[Item]], dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], bool]]:
        """Collated batches, and whether each is only there to keep the other processes company."""
        for places, stand_in in self.shared_out(stream.items(0), self.config.training.per_device_eval_batch_size):
            yield collate([stream.item(0, index) for index in places]), stand_in

    def _before_all(self, stream: Stream, collate: Callable[[list[Item]], dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The objective's ``before`` over a whole source."""
        assert self.objective.before is not None
        total: torch.Tensor | None = None
        for batch, stand_in in self._eval_batches(stream, collate):
            inputs = self._ready(self.objective.prepare(batch))
            part = self._call(self.objective.before, inputs) * (0.0 if stand_in else 1.0)
            total = part if total is None else total + part
            self.stop.beat()
        assert total is not None
        if self.world.size > 1:
            dist.all_reduce(total)
        return {"before": total}

    # The result

    def weights(self, only_trainable: bool) -> dict[str, torch.Tensor] | None:
        """Under ZeRO-3 the gathered weights in host memory on rank 0 ({} elsewhere); None where the model itself
        holds them. Collective."""
        if self.zero_stage < 3:
            return None
        import deepspeed

        gathered: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if only_trainable and not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.world.first:
                    gathered[name] = parameter.detach().cpu().clone()
            self.stop.beat()
        if self.world.first and not only_trainable:
            persistent = self.module.state_dict().keys() - gathered.keys()
            buffers = {name: buffer for name, buffer in self.module.named_buffers() if name in persistent}
            gathered |= {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
        return gathered


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch's tensors on a device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def compile_layers(module: torch.nn.Module, device: torch.device, zero_stage: int) -> int:
    """Compile the decoder layers in place; how many.

    On a GPU it makes LoRA of an 8B model half as fast again, for 20 s at the start (measured; rows of many lengths are
    compiled twice, once for all lengths). Not under ZeRO-3, whose hooks break compiled layers. ``FINETUNE_COMPILE``
    (0, 1) overrides.
    """
    choice = os.environ.get(ENV_COMPILE, "auto")
    if choice == "0" or (choice != "1" and (device.type != "cuda" or zero_stage == 3)):
        return 0
    count = 0
    for layer in decoder_layers(module):
        layer.compile()
        count += 1
    return count


def decoder_layers(module: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """The repeated blocks of a transformers model."""
    names: set[str] = set()
    for part in module.modules():
        names |= set(getattr(part, "_no_split_modules", None) or ())
    return [part for part in module.modules() if type(part).__name__ in names]
