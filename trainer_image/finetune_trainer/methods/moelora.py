"""MOELoRA (arXiv:2310.18339): LoRA whose rank is split into experts, weighted by a learned gate of the row's task.

y = W·x + alpha / r · Σᵢ ω_ji · Bᵢ·Aᵢ·x with ω_j = softmax(W_T·e_j): one task embedding and one gate for all layers, as
in the paper. It is PEFT's LoRA, with what A puts out multiplied by ω, token by token, so that packed rows of several
tasks go together. After training ω_j is constant, and the experts fold into one plain LoRA per task: ω_j goes into A's
rows. That is what is written, one folder per task, each for plain peft.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.methods import Lora, MoeLora
from finetune_api.run import TrainerConfig
from finetune_trainer.methods import lora
from finetune_trainer.methods.adapters import merged_into
from finetune_trainer.model import load_for_merge, save_model


class TaskGate(nn.Module):
    """The weights of the experts for a task: softmax(W_T·e_j), spread over the ranks of each expert."""

    def __init__(self, method: MoeLora) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(method.tasks), method.task_embedding_dim)
        self.project = nn.Linear(method.task_embedding_dim, method.num_experts, bias=False)
        self.ranks = method.r // method.num_experts
        self.scale: torch.Tensor | None = None
        """Of the pass under way: (B, T, r), or (1, 1, r)."""

    def forward(self, tasks: torch.Tensor) -> torch.Tensor:
        """Numbers of tasks (…) to weights (…, r)."""
        weights = torch.softmax(self.project(self.embedding(tasks)).float(), -1)
        return weights.repeat_interleave(self.ranks, -1)

    def choose(self, model: Any, inputs: Any, options: dict[str, Any]) -> Any:
        """Before the model's forward pass: the weights of its tokens."""
        tasks = options.pop("tasks", None)
        if tasks is None:
            tasks = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self.scale = self(tasks)
        return inputs, options

    def weigh(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """After a layer's A."""
        assert self.scale is not None
        scale = self.scale.to(output.dtype)
        return output * (scale[:, 0] if output.dim() == 2 else scale)  # a pooler's layer sees one vector per row


def prepare(model: PreTrainedModel, method: MoeLora, config: TrainerConfig) -> nn.Module:
    """The model with experts and gate, which alone are trainable.

    Its forward takes ``tasks``, the number of every token's task (B, T); without it (the questions of
    ``evaluation.prompts``) the first task of the list is meant.
    """
    plain = Lora(
        type="lora",
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=method.target_modules,
    )
    adapted: Any = lora.prepare(model, plain, config)
    gate = TaskGate(method).to(model.device)
    adapted.add_module("task_gate", gate)
    # The inner model: peft's own forward does not pass everything on, and generating goes round it.
    adapted.get_base_model().register_forward_pre_hook(gate.choose, with_kwargs=True)
    for name, module in adapted.named_modules():
        if name.endswith(".lora_A.default"):
            module.register_forward_hook(gate.weigh)
    result: nn.Module = adapted
    return result


def save(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    state_dict: dict[str, torch.Tensor] | None,
    config: TrainerConfig,
) -> None:
    """One plain LoRA adapter per task, with the tokenizer: ``directory/TASK`` for ``PeftModel.from_pretrained``."""
    method: Any = config.method
    state = dict(state_dict or {name: p for name, p in model.named_parameters() if p.requires_grad})
    embedding, project = (state.pop(f"task_gate.{name}.weight").float() for name in ("embedding", "project"))
    weights = torch.softmax(embedding @ project.T, -1).repeat_interleave(method.r // method.num_experts, -1)
    for task, weight in zip(method.tasks, weights, strict=True):
        folded = {
            name: (tensor.float() * weight.to(tensor.device)[:, None]).to(tensor.dtype)
            if ".lora_A." in name
            else tensor
            for name, tensor in state.items()
        }
        lora.save(model, tokenizer, directory / task, folded, config)


def merge(model_path: Path, adapter_dir: Path, out_dir: Path, config: TrainerConfig) -> None:
    """One model per task, in ``out_dir/TASK``: the base with that task's adapter merged into it."""
    method: Any = config.method
    for task in method.tasks:
        adapter = adapter_dir / task
        merged = merged_into(
            load_for_merge(model_path, config, adapter), adapter, f"{config.output_uri}/{adapter.name}"
        )
        save_model(merged, AutoTokenizer.from_pretrained(adapter), out_dir / task, config.max_shard_size)
