"""The first losses of many methods under many ZeRO stages, in one gang of processes: ``methods_gang.py PLAN.json``.

No whole jobs: model, method, engine and batches as ``run.py`` makes them, without storage. The plan maps names to
configurations; rank 0 writes name to losses into ``PLAN.json.out``.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

STEPS = 3


def main(path: str) -> None:
    import torch

    from finetune_api.run import TrainerConfig
    from finetune_trainer import data, fetch, model
    from finetune_trainer.engine import Engine, before_loading
    from finetune_trainer.feed import Feed, draw_seed
    from finetune_trainer.methods import METHODS, hooks
    from finetune_trainer.objectives import OBJECTIVES
    from finetune_trainer.schedule import learning_rate
    from finetune_trainer.stopping import Stop
    from finetune_trainer.world import join

    world = join("cpu")
    results: dict[str, Any] = {}
    for name, document in json.loads(Path(path).read_text()).items():
        config = TrainerConfig.model_validate(document)
        fetched = fetch.fetch(config, Path(path).with_name("cache"))
        tokenizer = model.load_tokenizer(fetched.model, config)
        prepared = data.prepare(config, fetched, tokenizer)
        torch.manual_seed(draw_seed(config.training.seed))
        partitioning = before_loading(config, world)
        try:
            base = model.load_model(fetched.model, config, world.device)
            trained = METHODS[config.method.type].prepare(base, config.method, config)
            engine = Engine(
                trained, config, world, OBJECTIVES["sft"], Stop(), hooks(trained, config, config.training.max_steps)
            )
            feed = Feed(
                prepared.train,
                lambda sequences, pad=tokenizer.pad_token_id: data.collate(sequences, pad),
                OBJECTIVES["sft"],
                rank=world.rank,
                size=world.size,
                per_device=config.training.per_device_train_batch_size,
                global_batch=config.global_batch_size,
                first_step=1,
                position=0,
                end=STEPS * config.global_batch_size,
            )
            losses, rate = [], learning_rate(config, config.training.max_steps)
            batch, _ = feed.take()
            weight = engine.agree(None, None, batch).next_weight
            while batch is not None:
                outcome = engine.step(batch, weight, rate(batch.step - 1))
                following, _ = feed.take()
                agreed = engine.agree(outcome, batch, following)
                losses.append(agreed.loss_sum / weight)
                batch, weight = following, agreed.next_weight
            results[name] = losses
        except Exception:  # a process alone: the others wait for it in vain, so it ends the gang
            traceback.print_exc()
            os._exit(1)
        del partitioning, base, trained, engine
        gc.collect()
    if world.first:
        Path(path + ".out").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
