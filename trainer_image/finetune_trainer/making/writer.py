"""A model on this process's device that writes answers, several to each prompt, drawn at random by a seed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

from finetune_api.causes import Cause
from finetune_api.run import TrainerConfig
from finetune_trainer import model as loading
from finetune_trainer.data.records import Message
from finetune_trainer.generate import end_tokens
from finetune_trainer.outcome import RunError


def rendered(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The tokens of a prompt, up to where the answer begins. RunError(INVALID_DATA) where the template refuses it."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja's own, and whatever a template raises by raise_exception
        roles = ", ".join(str(message["role"]) for message in messages)
        raise RunError(
            Cause.INVALID_DATA,
            f"the chat template refuses a prompt ({roles}): {error}. Give another data.chat_template.",
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def load(path: Path, config: TrainerConfig, device: torch.device) -> Any:
    """A language model that is only used, on ``device``."""
    found = loading.load_model(path, config, device)
    found.eval()
    found.requires_grad_(False)
    return found


class _Alive(StoppingCriteria):
    """Stops nothing: tells of every token that the process goes on."""

    def __init__(self, alive: Callable[[], None]) -> None:
        self.alive = alive

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **options: Any) -> Any:
        self.alive()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Writer:
    """The model and its tokenizer."""

    def __init__(
        self, path: Path, config: TrainerConfig, device: torch.device, tokenizer: Any, alive: Callable[[], None]
    ) -> None:
        """``alive`` is called at every token."""
        self.alive = _Alive(alive)
        self.model = load(path, config, device)
        self.tokenizer = tokenizer
        self.device = device
        self.ends = end_tokens(self.model, tokenizer)

    @torch.no_grad()
    def write(
        self, prompts: list[list[int]], count: int, seed: int, *, max_new_tokens: int, **sampling: Any
    ) -> list[list[tuple[str, bool]]]:
        """``count`` answers to each prompt (its tokens), and whether each came to its own end. The same for the same
        arguments."""
        width = max(len(ids) for ids in prompts)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(prompts), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        torch.manual_seed(seed)
        try:
            with torch.compiler.set_stance("force_eager"):
                output = self.model.generate(
                    input_ids=ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    do_sample=True,
                    num_return_sequences=count,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=self.ends or None,
                    pad_token_id=pad,
                    use_cache=True,
                    stopping_criteria=[self.alive],
                    **sampling,
                )
        except torch.OutOfMemoryError as error:
            raise RunError(
                Cause.OUT_OF_GPU_MEMORY,
                f"The GPU's memory is full while answering {len(prompts)} prompts {count} times each. Lower "
                "rlaif.generation_batch_size, num_generations or max_new_tokens.",
            ) from error
        answers = []
        for row in output[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in self.ends), None)
            said = self.tokenizer.decode(row[:end], skip_special_tokens=True).strip()
            answers.append((str(said), end is not None))
        return [answers[first : first + count] for first in range(0, len(answers), count)]
