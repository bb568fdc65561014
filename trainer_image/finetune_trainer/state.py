"""The trainable state of a run as named fragments, whatever ZeRO stage holds it.

Every trainable parameter has a full name, a shape and three tensors of that shape: the weight (the fp32 master
copy where there is one) and AdamW's two moments. A process holds a range of each, flattened: all of it without
ZeRO, a slice with it. A checkpoint is the set of these ranges, so that any number of processes and any ZeRO stage
can write it and read it. Nothing is gathered: every process reads and writes views of its own memory.

Called by ``checkpoint.py``. Knows DeepSpeed 0.19's optimizers; measured traps are written where they bite.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.causes import Cause
from finetune_trainer.outcome import RunError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A process's range of one trainable parameter."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    stop: int
    """The range [start, stop) of the flattened parameter."""
    tensors: dict[str, torch.Tensor]
    """``weight``, ``exp_avg``, ``exp_avg_sq``, and what the method remembers: flat views of live memory, each of
    stop - start elements."""
    owned: bool = True
    """This process writes it to checkpoints (False: another one holds the same)."""


class TrainableState:
    """Reads and writes the trainable state of a DeepSpeed engine. Nothing here is collective but ``sync``."""

    def __init__(
        self,
        engine: Any,
        rank: int,
        size: int,
        statistics: Callable[[], dict[str, dict[str, torch.Tensor]]] | None = None,
    ) -> None:
        """``statistics``: what the method remembers of each parameter, see ``hooks.py``."""
        self.engine = engine
        self.statistics = statistics
        self.rank = rank
        self.size = size
        self.names = {parameter: name for name, parameter in engine.module.named_parameters()}
        self.outer = engine.optimizer
        kind = type(self.outer).__name__
        self._fragments: Callable[[], Iterator[Fragment]]
        if hasattr(self.outer, "fp32_partitioned_groups_flat"):  # ZeRO-3
            self.inner = self.outer.optimizer
            self._fragments = self._of_stage3
            if getattr(self.outer, "swap_optimizer", False):
                raise RunError(
                    Cause.INVALID_CONFIGURATION,
                    "deepspeed.zero_optimization.offload_optimizer.device: nvme cannot be checkpointed here. "
                    "Accepted: cpu, none.",
                )
        elif hasattr(self.outer, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2
            self.inner = self.outer.optimizer
            self._flat = self.outer.single_partition_of_fp32_groups
            self._fragments = self._of_flat_groups
        elif hasattr(self.outer, "fp32_groups_flat_partition"):  # BF16_Optimizer: ZeRO-1 accumulating in fp32
            self.inner = self.outer.optimizer
            self._flat = self.outer.fp32_groups_flat_partition
            self._fragments = self._of_flat_groups
        elif hasattr(self.outer, "fp32_groups"):  # bf16 section without ZeRO: a master copy beside each weight
            self.inner = self.outer.optimizer
            self._fragments = self._of_masters
        elif isinstance(self.outer, torch.optim.Optimizer):  # no section, no ZeRO
            self.inner = self.outer
            self._fragments = self._of_parameters
        else:
            raise RunError(Cause.INVALID_CONFIGURATION, f"Cannot checkpoint DeepSpeed's optimizer {kind}.")

    def fragments(self) -> list[Fragment]:
        """This process's ranges, in the order of the model's parameters. Moments are made (zero) where AdamW has
        not made them yet."""
        return list(self._fragments())

    def steps_taken(self) -> int:
        """AdamW's step counter."""
        for state in self.inner.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def set_steps_taken(self, step: int) -> None:
        """Set AdamW's step counter, which decides over its bias correction. After ``fragments``."""
        for state in self.inner.state.values():
            if "step" in state and isinstance(state["step"], torch.Tensor):
                state["step"].fill_(float(step))
            else:
                state["step"] = step

    def sync(self) -> None:
        """Carry master weights that were written into the model's own weights. Collective."""
        outer = self.outer
        if hasattr(outer, "fp32_partitioned_groups_flat"):
            # A pass made before (find_head, a reference) has left small weights whole, and gathering would skip them.
            outer.parameter_offload.partition_all_parameters()
            for group in range(len(outer.fp16_groups)):
                outer._reassign_or_swap_out_partitioned_parameters(group)
            if outer.persistent_parameters:
                outer.persistent_parameters[0].all_gather(outer.persistent_parameters)
            outer.invalidate_secondary_tensor()
        elif hasattr(outer, "update_lp_params"):
            outer.update_lp_params()
        elif hasattr(outer, "fp32_groups"):
            for masters, weights in zip(outer.fp32_groups, outer.fp16_groups, strict=True):
                for master, weight in zip(masters, weights, strict=True):
                    weight.data.copy_(master.data)

    # One generator per layout.

    def _of_parameters(self) -> Iterator[Fragment]:
        parameters = [p for p in self.engine.module.parameters() if p.requires_grad]
        yield from self._replicated([(p, p) for p in parameters])

    def _of_masters(self) -> Iterator[Fragment]:
        master_of = {
            weight: master
            for masters, weights in zip(self.outer.fp32_groups, self.outer.fp16_groups, strict=True)
            for master, weight in zip(masters, weights, strict=True)
        }
        order = [p for p in self.engine.module.parameters() if p in master_of]
        yield from self._replicated([(p, master_of[p]) for p in order])

    def _replicated(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[Fragment]:
        load = [0] * self.size
        statistics = self.statistics() if self.statistics is not None else {}
        for parameter, master in pairs:
            # All hold the same; the writing is shared out, the next one to whoever has the least.
            owner = load.index(min(load))
            load[owner] += parameter.numel()
            state = self._state(master)
            remembered = statistics.get(self.names[parameter], {})
            yield Fragment(
                self.names[parameter],
                tuple(parameter.shape),
                0,
                parameter.numel(),
                {
                    WEIGHT: master.data.view(-1),
                    **{key: state[key].view(-1) for key in MOMENTS},
                    **{key: value.view(-1) for key, value in remembered.items()},
                },
                owned=owner == self.rank,
            )

    def _of_flat_groups(self) -> Iterator[Fragment]:
        flat_of = {}
        groups = getattr(self.outer, "bit16_groups", None) or self.outer.bf16_groups
        for flat, group in zip(self._flat, groups, strict=True):
            flat_of.update(dict.fromkeys(group, flat))
        for parameter, name in self.names.items():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None or parameter not in flat_of:  # frozen, or another process's
                continue
            flat = flat_of[parameter]
            here = mapping.hp_fragment_address
            whole = mapping.lp_fragment_address
            state = self._state(flat)
            tensors = {WEIGHT: flat.data.narrow(0, here.start, here.numel)}
            tensors |= {key: state[key].narrow(0, here.start, here.numel) for key in MOMENTS}
            yield Fragment(name, tuple(parameter.shape), whole.start, whole.start + whole.numel, tensors)

    def _of_stage3(self) -> Iterator[Fragment]:
        for parameter, name in self.names.items():
            if not parameter.requires_grad:
                continue
            group, offset, _ = self.outer.grad_position[self.outer.get_param_id(parameter)]
            size = parameter.partition_numel()
            start = size * self.outer._get_param_partition_rank(parameter)
            # The last process's part is padded: DeepSpeed's own safe_set_full_* fails on it.
            count = max(0, min(size, parameter.ds_numel - start))
            if not count:
                continue
            flat = self.outer.fp32_partitioned_groups_flat[group]
            state = self._state(flat)
            tensors = {WEIGHT: flat.data.narrow(0, offset, count)}
            tensors |= {key: state[key].narrow(0, offset, count) for key in MOMENTS}
            yield Fragment(name, tuple(parameter.ds_shape), start, start + count, tensors)

    def _state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """AdamW's state of a tensor, made as AdamW makes it before its first step."""
        state: dict[str, torch.Tensor] = self.inner.state[parameter]
        if "exp_avg" not in state:
            group = self.inner.param_groups[0]
            on_device = bool(group.get("fused") or group.get("capturable"))
            state["step"] = torch.tensor(0.0, device=parameter.device if on_device else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
        return state
