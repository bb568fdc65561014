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
"""The first one has a learning rate of 0, where a run warms up."""


def main(path: str) -> None:
    import torch

    from finetune_api.run import TrainerConfig
    from finetune_trainer import data, fetch, model
    from finetune_trainer.engine import Engine
    from finetune_trainer.feed import Feed, draw_seed
    from finetune_trainer.logbook import mean_loss
    from finetune_trainer.methods import METHODS, hooks
    from finetune_trainer.objectives import objective
    from finetune_trainer.schedule import learning_rate
    from finetune_trainer.stopping import Stop
    from finetune_trainer.world import join
    from finetune_trainer.zero import before_loading

    world = join("cpu")
    results: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    for name, document in json.loads(Path(path).read_text()).items():
        config = TrainerConfig.model_validate(document)
        if config.model.uri not in inputs:
            fetched = fetch.fetch(config, Path(path).with_name("cache"))
            tokenizer = model.load_tokenizer(fetched.model, config)
            inputs[config.model.uri] = fetched, tokenizer, data.prepare(config, fetched, tokenizer)
        fetched, tokenizer, prepared = inputs[config.model.uri]
        torch.manual_seed(draw_seed(config.training.seed))
        partitioning = before_loading(config, world)
        try:
            base = model.load_model(fetched.model, config, world.device)
            trained = METHODS[config.method.type].prepare(base, config.method, config)
            engine = Engine(
                trained, config, world, objective(config), Stop(), hooks(trained, config, config.training.max_steps)
            )
            feed = Feed(
                prepared.train,
                lambda items, pad=tokenizer.pad_token_id: data.collate(items, pad),
                objective(config),
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
            weights = engine.agree(None, None, batch).next_weights
            while batch is not None:
                outcome = engine.step(batch, weights, rate(batch.step - 1))
                following, _ = feed.take()
                agreed = engine.agree(outcome, batch, following)
                losses.append(mean_loss(agreed.loss_sums, weights))
                batch, weights = following, agreed.next_weights
            results[name] = losses
        except Exception:  # a process alone: the others wait for it in vain, so it ends the gang
            traceback.print_exc()
            os._exit(1)
        del partitioning, base, trained, engine
        if len(results) % 8 == 1:
            gc.collect()
        if len(results) == 1:
            gc.freeze()  # the libraries: to look through them takes half a second each time
    if world.first:
        Path(path + ".out").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
