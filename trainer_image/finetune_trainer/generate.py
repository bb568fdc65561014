"""The words a model writes, drawing nothing at random, and where it ends.

Asked by ``samples.py``, ``objectives/seq2seq.py``, ``rollout.py``, ``making/writer.py`` and ``chat.py``.
"""

from typing import Any

import torch
import torch.distributed as dist


@torch.no_grad()
def written(model: Any, tokenizer: Any, inputs: dict[str, Any], together: bool, **options: Any) -> torch.Tensor:
    """Token numbers (B, T) that the model writes, drawing nothing at random. ``together``: every process holds a part
    of every weight."""
    # Every token has another length of the cache: compiled layers would be compiled anew for each.
    with torch.compiler.set_stance("force_eager"):
        output: torch.Tensor = model.generate(
            **inputs,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=end_tokens(model, tokenizer) or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            synced_gpus=together and dist.is_initialized() and dist.get_world_size() > 1,
            **options,
        )
    return output


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's own, and the tokenizer's, which the chat template may have chosen."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({int(token) for token in known if token is not None})
