"""The output layer of a language model and its loss, without ever holding all logits.

The logits of a batch are by far its largest tensor (8,192 tokens x 128,256 words in fp32: 4 GiB, and as much again
for their gradient). So the output layer gives losses instead: only the positions that carry a label go on, and
they pass the layer and cross-entropy in chunks: with a frozen layer each chunk's gradient is made at once
(the idea of liger-kernel's fused linear cross-entropy), else the chunk is computed again in the backward pass.

Some models do more to their logits than the output layer does (caps, scales). Whether that is so is tried on the
model at hand (:func:`find_head`). Called by ``engine.py`` (find) and the objectives (use).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**26
"""Logits held at once: 256 MiB in fp32."""


@dataclass(frozen=True)
class Head:
    """A model's output layer, proven to be the last thing between its hidden states and its logits."""

    module: Any
    frozen_weight: bool
    """A plain linear layer without bias that is not trained."""

    @contextmanager
    def losing(self, width: int, places: torch.Tensor, targets: torch.Tensor) -> Iterator[None]:
        """Inside, the model returns in place of its logits, fp32 (1, N, 1): the cross-entropy of ``targets`` (N,) at
        ``places`` (N,) of its flattened (B x ``width``) outputs; of a negative target 0.
        """
        with self.giving(width, places, lambda rows: self.losses(rows, targets).unsqueeze(-1)):
            yield

    @contextmanager
    def giving(self, width: int, places: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Inside, the model returns in place of its logits (1, N, k): what ``make`` makes (N, k) of the last hidden
        states (N, width of the model) at ``places`` (N,) of its flattened (B x ``width``) outputs.

        It is computed where the model calls the layer: there ZeRO-3 has its weight at hand.
        """

        def forward(hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            # Prompt methods put virtual tokens before the sequence; nothing is learned there.
            rows = hidden[..., -width:, :].reshape(-1, hidden.shape[-1])[places]
            return make(rows).unsqueeze(0)

        self.module.forward = forward
        try:
            yield
        finally:
            del self.module.forward

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """fp32 (N,): the cross-entropy of N positions; of a negative target 0.

        ``hidden`` (N, width), ``targets`` (N,).
        """
        if self.frozen_weight:
            return _FrozenLinearLoss.apply(hidden, self.module.weight, targets)
        size = _chunk(self.module)
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(self._chunk_losses, part, wanted, use_reentrant=False) for part, wanted in parts])

    def log_probs(self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        """fp32 (N, 2): the log-probability of each target at a temperature, and the entropy there, which has no
        graph."""
        size = _chunk(self.module)

        def part(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return log_probs(type(self.module).forward(self.module, rows), wanted, temperature)

        parts = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(part, rows, wanted, use_reentrant=False) for rows, wanted in parts])

    def _chunk_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = type(self.module).forward(self.module, hidden)
        return cross_entropy(logits.float(), targets, reduction="none")


class _FrozenLinearLoss(torch.autograd.Function):
    """Cross-entropy through a frozen linear layer; the gradient of the hidden states is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], size):
                part, wanted = hidden[start : start + size], targets[start : start + size]
                logits = linear(part.to(weight.dtype), weight).float()
                losses[start : start + size] = cross_entropy(logits, wanted, reduction="none")
                if gradient is not None:
                    share = torch.softmax(logits, -1)
                    share[torch.arange(share.shape[0], device=share.device), wanted.clamp(min=0)] -= 1.0
                    share *= (wanted >= 0).unsqueeze(-1)
                    gradient[start : start + size] = (share.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype).unsqueeze(-1), None, None


def log_probs(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """fp32 (N, 2) of (N, words): the log-probability of each target at a temperature, and the entropy there, which has
    no graph."""
    logs = torch.log_softmax(logits.float() / temperature, -1)
    found = logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(logs.exp() * logs).nan_to_num().sum(-1)
    return torch.stack([found, entropy], -1)


def _chunk(module: Any) -> int:
    words = getattr(module, "out_features", None) or getattr(getattr(module, "weight", None), "shape", (2**17,))[0]
    return max(1, CHUNK_ELEMENTS // int(words))


@torch.no_grad()
def find_head(model: Any) -> Head | None:
    """The model's output layer, where nothing comes after it: what it returns are the model's logits, untouched.

    None where that is not so (Gemma 2 caps its logits, Granite scales them, BART adds a number for each word), or where
    there is none. Two forward passes of a few tokens, in which the layer returns large marked numbers (a cap would hide
    behind small ones): one for every word, and one for every token, as :meth:`Head.losing` does. Collective under
    ZeRO-3.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if module is None or "forward" in vars(module):
        return None
    marked: list[torch.Tensor] = []
    width: int | None = None

    def mark(hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        words = type(module).forward(module, hidden, *arguments, **options)[..., :width]
        marked.append(torch.linspace(-500, 500, words.numel(), device=words.device).reshape(words.shape).to(words))
        return marked[-1]

    was_training = model.training
    model.eval()
    module.forward = mark
    try:
        embeddings = base.get_input_embeddings().weight
        words = int(getattr(embeddings, "ds_shape", embeddings.shape)[0])  # ds_shape: partitioned by ZeRO-3
        ids = (torch.arange(16, device=next(model.parameters()).device) * 7919 % words)[None]
        decoder = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
        told = []
        for each in (None, 1):
            width = each
            told.append(model(input_ids=ids, **decoder, use_cache=False).logits)
    finally:
        del module.forward
        model.train(was_training)
    if len(marked) != len(told) or not all(map(torch.equal, told, marked)):
        return None
    frozen = False
    if type(module) is torch.nn.Linear and module.bias is None:
        frozen = module.weight.is_floating_point() and not module.weight.requires_grad
    return Head(module, frozen)
