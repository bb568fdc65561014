"""``finetune evaluate``: the figures of a finished model on given rows.

``python -m finetune_trainer.evaluate CONFIG``, a process of its own that reads an ``EvaluateConfig``. The rows are
prepared, and the figures made, by what does it during a run.
"""

import json
import sys
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_api.run import EvaluateConfig
from finetune_api.spec import Evaluation, Training
from finetune_api.stages import LANGUAGE
from finetune_trainer.command import carried_out
from finetune_trainer.outcome import RunError

Figures = dict[str, float]


def evaluate(wanted: EvaluateConfig, cache: Path) -> tuple[dict[str, Figures], dict[str, dict[str, Any]]]:
    """Figures by name (``loss``, ``loss/SOURCE`` …) of the ``model``, and with ``compare`` of its ``base``; and what
    became of the rows. RunError."""
    from finetune_trainer import data, finished, model
    from finetune_trainer.engine import Engine
    from finetune_trainer.fetch import fetch_data
    from finetune_trainer.objectives import objective
    from finetune_trainer.stopping import Stop
    from finetune_trainer.world import join

    training = Training(per_device_eval_batch_size=wanted.batch_size)
    found = finished.find(wanted, cache, wanted.data, training, wanted.max_length)
    config = found.config.model_copy(
        update={"data": found.config.data.model_copy(update={"max_bad_rows": wanted.max_bad_rows})}
    )
    if wanted.perplexity_positions:
        if config.stage not in LANGUAGE:
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"--perplexity-position is for running texts and answers, and {wanted.model.uri} is of stage "
                f"{config.stage}: add {' or '.join(f'--stage {stage}' for stage in LANGUAGE)}.",
            )
        below = sorted({position for position in wanted.perplexity_positions if position < wanted.max_length})
        config = config.model_copy(update={"evaluation": Evaluation(perplexity_positions=below)})
    if config.stage == "seq2seq" and wanted.seq2seq is not None:
        config = config.model_copy(update={"seq2seq": wanted.seq2seq})
    fetched = fetch_data(config, cache, found.fetched)
    world = join(config.accelerator)
    tokenizer = model.load_tokenizer(found.words, config)
    prepared = data.prepare(config, fetched, tokenizer)
    tuned, off = finished.load(found, world)
    chosen = objective(config, tokenizer, prepared.labels)
    if off is None and (chosen.reference is not None or wanted.compare):
        what = f"stage {config.stage} compares it" if chosen.reference is not None else "--compare compares it"
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{wanted.model.uri} is a whole model, and {what} with the one it was made of. Name the adapter "
            "(its folder, or --adapter), or choose another --stage.",
        )
    engine = Engine(tuned, config, world, chosen, Stop(), switched_off=off, learns=False)

    def collate(items: list[Any]) -> dict[str, Any]:
        return chosen.collate(items, tokenizer.pad_token_id)

    figures = {"model": engine.evaluate(prepared.eval, collate)}
    if wanted.compare and off is not None:
        with off():
            figures["base"] = engine.evaluate(prepared.eval, collate)
    return figures, {name: counts for name, counts in prepared.report.items() if name.startswith("eval/")}


def table(figures: dict[str, Figures], rows: dict[str, dict[str, Any]]) -> str:
    """The figures for people: a line per source (and for all of them), base and model side by side."""
    kinds = list(dict.fromkeys(name.partition("/")[0] for name in figures["model"]))
    sources = [name.removeprefix("eval/") for name in rows]
    places = [*sources, *([""] if len(sources) > 1 else [])]
    order = [which for which in ("base", "model") if which in figures]
    head = ["source", "rows", "tokens"]
    head += [f"{kind} ({which})" if len(order) > 1 else kind for kind in kinds for which in order]
    lines = [head]
    for source in places:
        counted = [rows[f"eval/{source}"]] if source else list(rows.values())
        line = [source or "all", *(f"{sum(counts[name] for counts in counted):,}" for name in ("rows", "tokens"))]
        for kind in kinds:
            for which in order:
                value = figures[which].get(f"{kind}/{source}" if source else kind)
                if value is None and not source:
                    value = figures[which].get(kind)
                line.append("" if value is None else f"{value:.4f}")
        lines.append(line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(both))
        for both in (list(zip(line, widths, strict=True)) for line in lines)
    )


def main(arguments: list[str]) -> int:
    """The command; its exit code."""

    def work(cache: Path) -> None:
        wanted = EvaluateConfig.model_validate_json(Path(arguments[0]).read_bytes())
        figures, rows = evaluate(wanted, cache)
        if wanted.as_json:
            print(json.dumps({**figures, "data": rows}, ensure_ascii=False, indent=1))
            return
        for name, counts in rows.items():
            left_out = [
                f"{counts[key]} {words}" for key, words in (("dropped", "dropped"), ("bad_rows", "bad")) if counts[key]
            ]
            if left_out:
                print(f"{name.removeprefix('eval/')}: rows left out: {', '.join(left_out)}", file=sys.stderr)
        print(table(figures, rows))

    return carried_out("evaluating", work)


if __name__ == "__main__":
    from finetune_trainer.stopping import leave

    leave(main(sys.argv[1:]))  # threads of gloo are not waited for
