"""What is told of made data: ``report.html`` and the card. Pure; the looks are those of ``report.py``."""

import html
import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune_api.run import TrainerConfig
from finetune_api.stages import STAGES
from finetune_trainer import report

if TYPE_CHECKING:
    from finetune_trainer.making import Made

_OUTCOMES = (
    ("decided", "Decided: the same answer was better in both orders. A row of the output"),
    ("tie", "Tie: neither was better, in both orders"),
    ("split", "Split: the verdicts of the two orders differ, which counts as a tie"),
    ("same", "Not asked: both answers are the same"),
    ("empty", "Not asked: an answer is empty"),
    ("unreadable", "No verdict: it could not be read"),
    ("refused", "No verdict: the judge did not take the question"),
)
EXAMPLES = 8


def outcomes(counts: Counter[str]) -> str:
    """A table of what the comparisons came to."""
    whole = max(1, sum(counts.values()))
    return report.table(
        ("Comparisons", "Number", "Share"),
        [(words, f"{counts[name]:,}", f"{counts[name] / whole:.1%}") for name, words in _OUTCOMES if counts[name]],
    )


def written(answers: int, cut: int, too_long: int, limit: int) -> str:
    """How many answers were drawn, and what is the matter with some."""
    told = f"{answers:,} answers; {cut:,} of them were cut at max_new_tokens ({limit:,})."
    if too_long:
        told += f" {too_long:,} prompts were left out: with an answer they do not fit into data.max_length."
    return f"<p>{html.escape(told)}</p>"


def examples(compared: Sequence[dict[str, Any]]) -> str:
    """Decided and undecided comparisons, with the judge's words."""
    decided = [one for one in compared if one["outcome"] == "decided"]
    others = [one for one in compared if one["outcome"] != "decided"]
    shown = [*decided[:EXAMPLES], *others[: EXAMPLES // 2]]
    articles = "".join(_example(one) for one in shown)
    return f"<div class=answers>{articles}</div><p class=note>All of them: comparisons.jsonl.</p>"


def _example(one: dict[str, Any]) -> str:
    better = {("A", "B"): 0, ("B", "A"): 1}.get(tuple(one["verdicts"]))
    columns = "".join(
        f"<div{' class=after' if place == better else ''}><h4>{'Chosen' if place == better else 'Answer'}</h4>"
        f"<p>{html.escape(text) or '<i>(nothing)</i>'}</p></div>"
        for place, text in enumerate(one["answers"])
    )
    words = html.escape(one.get("refused") or one["words"][0])
    return (
        f"<article><h3>{html.escape(str(one['prompt'][-1]['content']))}</h3><div class=pair>{columns}</div>"
        f"<details><summary>{html.escape(one['outcome'])}: {html.escape(' / '.join(one['verdicts']))}</summary>"
        f"<p>{words}</p></details></article>"
    )


def sources(told: dict[str, dict[str, Any]]) -> str:
    """Where the prompts are from."""
    names = ("format", "rows", "unused", "repeated", "bad_rows")
    rows = [(uri, *(str(counts.get(name, "")) for name in names)) for uri, counts in told.items()]
    return report.table(("From", *(name.replace("_", " ").capitalize() for name in names)), rows)


def page(
    config: TrainerConfig, made: "Made", attempts: list[dict[str, Any]], versions: dict[str, str], seconds: float
) -> str:
    """The whole page."""
    tiles = [*made.tiles, ("Time", report.duration(seconds)), ("Restarts", str(max(0, len(attempts) - 1)))]
    document = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    sections = [
        *made.sections,
        ("What happened", report.attempts_table(attempts)),
        (
            "Configuration",
            f"<details><summary>All values, defaults resolved</summary><pre>{html.escape(document)}</pre></details>"
            f"<p class=note>{html.escape(used)}</p>",
        ),
    ]
    return report.document(
        f"{config.namespace}/{config.name}",
        "Report of made data",
        f"{config.stage.upper()}: {STAGES[config.stage].told}. The answers are of {config.model.uri}.",
        tiles,
        sections,
    )


def card(config: TrainerConfig, file: str, rows: int) -> str:
    """README.md of the output."""
    judge = config.rlaif.judge if config.rlaif else None
    by = "" if judge is None else f", compared by {judge.model or judge.uri}"
    return (
        f"# {config.name}\n\n{rows:,} rows in `{file}`, made by stage {config.stage}: "
        f"{STAGES[config.stage].told}.\n\nAnswers of {config.model.uri}{by}. A row is `prompt`, `chosen`, `rejected`, "
        "each a list of messages: format `preference` here, a conversational preference data set in TRL. "
        f"In the same namespace: `data: {{train: [{{uri: job://{config.name}}}]}}` with stage reward, dpo or orpo.\n\n"
        "`comparisons.jsonl` holds every comparison with both verdicts, `report.html` what it came to.\n"
    )
