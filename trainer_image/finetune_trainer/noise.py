"""NEFTune: noise on the embeddings while training. Called by ``engine.py``."""

from typing import Any

import torch

from finetune_api.run import TrainerConfig
from finetune_trainer.world import World


class Noise:
    """NEFTune (arXiv:2310.05914): uniform noise on the input embeddings, of alpha / sqrt(length x width).

    Length is that of the token's own document, so that neither padding nor packing changes the amount.
    """

    def __init__(self, module: Any, config: TrainerConfig, world: World) -> None:
        self.alpha = config.training.neftune_noise_alpha
        self.generator = torch.Generator(world.device)
        self.lengths: torch.Tensor | None = None
        module.get_input_embeddings().register_forward_hook(self._add)

    def prepare(self, seed: int, batch: dict[str, Any]) -> None:
        """The next forward pass draws by this seed, for this batch."""
        self.generator.manual_seed(seed)
        self.lengths = document_lengths(batch)

    def _add(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if self.lengths is None or not module.training or output.shape[1] != self.lengths.shape[1]:
            return None
        lengths, self.lengths = self.lengths[: output.shape[0]], None  # once per pass
        noise = torch.empty_like(output).uniform_(-1.0, 1.0, generator=self.generator)
        amount = self.alpha / torch.sqrt(lengths * output.shape[-1])
        return output + noise * amount.unsqueeze(-1).to(output.dtype)


def document_lengths(batch: dict[str, Any]) -> torch.Tensor:
    """(B, T) fp32: for every token the length of the document it belongs to, padding excluded."""
    ids = batch["input_ids"]
    rows, width = ids.shape
    positions = batch.get("position_ids")
    mask = batch.get("attention_mask")
    counted = torch.ones(ids.shape, device=ids.device) if mask is None else mask.to(torch.float32)
    starts = torch.zeros_like(ids, dtype=torch.bool) if positions is None else positions == 0
    starts = starts.clone()
    starts[:, 0] = True
    document = starts.cumsum(-1) - 1 + width * torch.arange(rows, device=ids.device).unsqueeze(-1)
    counts = torch.zeros(rows * width, device=ids.device).scatter_add_(0, document.reshape(-1), counted.reshape(-1))
    return counts[document].clamp(min=1.0)
