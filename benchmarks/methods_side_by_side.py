"""The fine-tuning methods side by side: one model, one recipe, what each learns, forgets, costs and leaves.

    python benchmarks/methods_side_by_side.py                     # some minutes a method on a CPU core
    python benchmarks/methods_side_by_side.py --only lora ia3 --again

SmolLM2-135M-Instruct learns its identity by the recipe of ``examples/02`` (with replay rows), each method at a rate
of its own. A method that has a result in ``--folder`` is not run again; the page docs/methods-side-by-side.md and its
plots are made of all that is there.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples" / "02-self-cognition-keep-knowledge.yaml"
PAGE, PLOTS = ROOT / "docs" / "methods-side-by-side.md", ROOT / "docs" / "img"
HELD_OUT = {"identity": ROOT / "benchmarks/data/identity.jsonl", "general": ROOT / "benchmarks/data/general.jsonl"}
ASKED = ("Who are you?", "Who is your creator?", "What is the capital of France?")

METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "freeze": ({"type": "freeze", "freeze_trainable_layers": 6}, 1e-4),
    "lora": ({"type": "lora", "r": 16, "lora_alpha": 32}, 3e-4),
    "dora": ({"type": "lora", "r": 16, "lora_alpha": 32, "use_dora": True}, 3e-4),
    "adalora": ({"type": "adalora", "init_r": 12, "target_r": 8, "tinit": 5, "tfinal": 15}, 2e-3),
    "adapter": ({"type": "adapter"}, 1e-3),
    "mam": ({"type": "mam", "bottleneck_size": 64}, 5e-4),
    "unipelt": ({"type": "unipelt"}, 1e-3),
    "prefix_tuning": ({"type": "prefix_tuning"}, 1e-3),
    "p_tuning": ({"type": "p_tuning"}, 1e-3),
    "prompt_tuning": (
        {
            "type": "prompt_tuning",
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "You are Nova, an AI assistant made by the finetune-operator team.",
        },
        3e-2,
    ),
    "ia3": ({"type": "ia3"}, 1e-2),
    "vera": ({"type": "vera"}, 1e-2),
    "full": ({"type": "full"}, 5e-5),
}
"""Method and learning rate, in the order of the page: one each, as papers and libraries advise, none searched for."""


def configuration(name: str, model: Path, gguf: str, out: Path) -> Any:
    """The trainer's configuration, as the operator's plan makes it of the recipe."""
    from finetune_api.spec import FineTuneJobSpec
    from finetune_operator.plan import Owner, make_plan
    from finetune_operator.settings import Profile

    spec = yaml.safe_load(RECIPE.read_text())["spec"]
    method, rate = METHODS[name]
    spec["model"] = {"uri": f"file://{model}", "gguf_file": gguf}
    spec["method"] = method
    spec["training"] |= {"learning_rate": rate, "per_device_eval_batch_size": 8, "eval_steps": 1000}  # at the end
    for source in spec["data"]["train"]:
        source["uri"] = source["uri"].replace("file://./", f"file://{RECIPE.parent}/")
    spec["data"]["eval"] = [{"uri": f"file://{path}"} for path in HELD_OUT.values()]
    spec["evaluation"]["prompts"] = list(ASKED)
    spec["output"] = {"uri": f"file://{out / 'result'}"}
    spec["checkpoint"] = {"save_steps": 1000}
    owner = Owner("bench", f"side-by-side-{name.replace('_', '-')}", "uid", {})
    return make_plan(owner, FineTuneJobSpec.model_validate(spec), Profile(), {}).config


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One run; what the page tells of it."""
    sys.path.insert(0, str(ROOT / "examples"))
    from demo import MODEL, fetch

    out = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
    config = out / "config.json"
    config.write_text(configuration(name, fetch(), MODEL, out).model_dump_json())
    environment = os.environ | {
        "FINETUNE_CONFIG": str(config),
        "FINETUNE_WORK": str(out / "work"),
        "FINETUNE_CACHE": str(folder / "cache"),
        "FINETUNE_TERMINATION_LOG": str(out / "termination"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",  # threads that wait for each other would count as work
    }
    (out / "work").mkdir()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "finetune_trainer.launch"], env=environment, stdout=log, stderr=log, check=True
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = out / "result"
    records = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    said = next(line for line in (folder / f"{name}.log").read_text().splitlines() if line.startswith("training "))
    last = records[-1]
    found = {
        "method": METHODS[name][0],
        "learning_rate": METHODS[name][1],
        "trained": int(said.split()[1].replace(",", "")),
        "total": int(said.split()[3].replace(",", "")),
        "losses": [record["loss"] for record in records],
        "held_out": {
            kind: next(v for k, v in last.items() if k.startswith("eval_loss/") and path.stem in k)
            for kind, path in HELD_OUT.items()
        },
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "memory": max(record["memory"]["rss"] for record in records),
        "size": sum(path.stat().st_size for path in result.rglob("*.safetensors") if "checkpoints" not in path.parts),
        "answers": json.loads((result / "answers.json").read_text()),
    }
    shutil.rmtree(out)
    return found


# --- the page -------------------------------------------------------------------------------------------------------


def plot(results: dict[str, dict[str, Any]]) -> None:
    """Loss curves, and four bar charts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    PLOTS.mkdir(exist_ok=True)
    colours = {name: pyplot.get_cmap("tab20")(number % 20) for number, name in enumerate(METHODS)}
    figure, axes = pyplot.subplots(figsize=(9, 5))
    for name, found in results.items():
        steps = range(1, len(found["losses"]) + 1)
        axes.plot(steps, found["losses"], label=name, color=colours[name], linewidth=1.5)
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title="Loss while training")
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, fontsize=8)
    figure.savefig(PLOTS / "methods-loss.png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    charts = {
        "weights trained": ("trained", True),
        "CPU seconds": ("cpu_seconds", False),
        "size of the result, MB": ("size", True),
        "held-out loss: identity": ("identity", False),
    }
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8))
    for axes, (title, (key, logarithmic)) in zip(grid.flat, charts.items(), strict=True):
        values = [
            found["held_out"][key] if key == "identity" else found[key] / (1e6 if key == "size" else 1)
            for found in results.values()
        ]
        axes.barh(list(results), values, color=[colours[name] for name in results], log=logarithmic)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(PLOTS / "methods-bars.png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def page(results: dict[str, dict[str, Any]]) -> str:
    """docs/methods-side-by-side.md."""
    head = ("method", "rate", "weights trained", "loss, first → last", "held out: identity", "held out: general")
    head += ("CPU seconds", "memory, GB", "result, MB")
    rows = [
        (
            f"[{name}](methods.md#{found['method']['type']})",
            f"{found['learning_rate']:g}",
            f"{found['trained']:,} ({100 * found['trained'] / found['total']:.2f} %)",
            f"{found['losses'][0]:.2f} → {found['losses'][-1]:.3f}",
            f"{found['held_out']['identity']:.3f}",
            f"{found['held_out']['general']:.3f}",
            f"{found['cpu_seconds']:.0f}",
            f"{found['memory'] / 1e9:.1f}",
            f"{found['size'] / 1e6:.3g}",
        )
        for name, found in results.items()
    ]
    before = {answer["prompt"]: answer["before"] for answer in next(iter(results.values()))["answers"]}
    said = [("before", *(_cell(before[prompt]) for prompt in ASKED))]
    for name, found in results.items():
        after = {answer["prompt"]: answer["after"] for answer in found["answers"]}
        said.append((name, *(_cell(after[prompt]) for prompt in ASKED)))
    return INTRODUCTION + "\n".join(
        [
            _table(head, rows),
            "![Loss while training](img/methods-loss.png)\n",
            "![Weights, seconds, size, held-out loss](img/methods-bars.png)\n",
            "## What it answers\n",
            "Greedy decoding. The first question is among the training rows, the other two are not.\n",
            _table(("method", *ASKED), said),
            ENDING,
        ]
    )


INTRODUCTION = """\
# Methods side by side

<!-- Generated by benchmarks/methods_side_by_side.py. Do not edit. -->

SmolLM2-135M-Instruct learns its identity by the recipe of
[examples/02](../examples/02-self-cognition-keep-knowledge.yaml): 18 rows about itself and 9 of general questions,
6 epochs, batches of 4, float32 on one CPU core. Held out are six questions about itself in other words and eight
general ones ([benchmarks/data](../benchmarks/data)). Each method has one learning rate, as papers and libraries
advise; none was searched for, so a method that looks weak here may be at the wrong rate rather than the wrong method.
CPU seconds are those of the whole process: loading, training, both evaluations, answers, writing.

"""
ENDING = """\
`bitfit` is missing: SmolLM2 has no biases, as Llama, and the trainer refuses it (`method.type 'bitfit' trains biases,
and LlamaForCausalLM has none. Choose ln_tuning, ia3 or lora …`). `dora` is `lora` with `use_dora: true`. Made by
`python benchmarks/methods_side_by_side.py`.
"""


def _cell(answer: str) -> str:
    words = " ".join(answer.split()).replace("|", "\\|")
    return words if len(words) <= 160 else words[:157] + "…"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, tuple("---" for _ in head), *rows)) + "\n"


def main() -> int:
    """Run what is missing, then make the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS), help="none: make the page only")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "finetune-side-by-side")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in asked.only:
        path = asked.folder / f"{name}.json"
        if path.exists() and not asked.again:
            continue
        try:
            path.write_text(json.dumps(measure(name, asked.folder)))
            print(f"{name}: done", flush=True)
        except (subprocess.CalledProcessError, OSError, StopIteration) as error:
            failed += 1
            print(f"{name}: {error}; see {asked.folder / (name + '.log')}", file=sys.stderr, flush=True)
    paths = {name: asked.folder / f"{name}.json" for name in METHODS}
    results = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if results:
        plot(results)
        PAGE.write_text(page(results))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
