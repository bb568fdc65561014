"""What the model answers, before and after: greedy decoding of ``evaluation.prompts``.

Called by ``run.py``; ``objectives/seq2seq.py``, ``rollout.py``, ``making/writer.py`` and ``chat.py`` ask
:func:`written` or :func:`end_tokens`. Without ZeRO-3 the prompts are shared out over the processes; with it every
process takes part in every answer, because each holds a part of every weight.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from finetune_trainer.world import World

if TYPE_CHECKING:
    from finetune_trainer.engine import Engine


def answers(engine: "Engine", tokenizer: Any, prompts: list[str], max_new_tokens: int, world: World) -> list[str]:
    """One answer per prompt, on every process. Draws nothing at random. Collective."""
    together = engine.zero_stage == 3
    mine: dict[int, str] = {}
    engine.module.eval()
    try:
        for number, prompt in enumerate(prompts):
            if together or number % world.size == world.rank:
                mine[number] = _answer(engine, tokenizer, prompt, max_new_tokens, together)
                engine.stop.beat()
    finally:
        engine.module.train()
    collected: dict[str, str] = {}
    for part in world.gather("answers", {str(number): text for number, text in mine.items()}):
        collected |= part
    return [collected[str(number)] for number in range(len(prompts))]


def _answer(engine: "Engine", tokenizer: Any, prompt: str, max_new_tokens: int, together: bool) -> str:
    seq2seq = engine.config.seq2seq
    if engine.config.stage == "seq2seq":
        inputs = tokenizer((seq2seq.source_prefix if seq2seq else "") + prompt, return_tensors="pt")
    elif getattr(tokenizer, "chat_template", None):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {
        key: value.to(engine.world.device) for key, value in inputs.items() if key in ("input_ids", "attention_mask")
    }
    with engine.autocast():
        output = written(engine.module, tokenizer, inputs, together, max_new_tokens=max_new_tokens)
    new = output[0] if engine.module.config.is_encoder_decoder else output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


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
