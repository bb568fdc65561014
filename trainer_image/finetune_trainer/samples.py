"""What the model answers, before and after training: greedy decoding of ``evaluation.prompts``.

Called by ``run.py``. Without ZeRO-3 the prompts are shared out over the processes; with it every process takes part in
every answer, because each holds a part of every weight.
"""

from typing import Any

from finetune_trainer.engine import Engine
from finetune_trainer.generate import written
from finetune_trainer.world import World


def answers(engine: Engine, tokenizer: Any, prompts: list[str], max_new_tokens: int, world: World) -> list[str]:
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


def _answer(engine: Engine, tokenizer: Any, prompt: str, max_new_tokens: int, together: bool) -> str:
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
