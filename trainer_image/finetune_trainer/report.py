"""The report of a run: ``loss.png`` and one self-contained ``report.html``.

Called by ``run.py``, through ``publishing.py`` while the run goes on, is stopped or fails. Pure but for the
file it writes: everything shown is handed in as :class:`Report`. No
asset is loaded from anywhere; the page is readable without scripts, in light and dark, and on paper.
"""

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.causes import Cause
from finetune_api.health import sentences
from finetune_api.run import Answer, CheckpointInfo, OutputInfo, TrainerConfig

Points = Sequence[tuple[float, float]]
SHOWN_LABELS = 30
"""A larger confusion matrix is not shown."""


@dataclass
class Report:
    """Everything that is told about a run."""

    config: TrainerConfig
    records: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    cause: Cause | None = Cause.SUCCEEDED
    """How this attempt ended; None: it runs."""
    message: str = ""
    """What is said of that."""
    step: int = 0
    max_steps: int = 0
    written: str = ""
    """When, where the run has not ended."""
    evaluation: dict[str, float] = field(default_factory=dict)
    labels: Sequence[str] = ()
    """Of a classifier."""
    confusion: list[list[int]] = field(default_factory=list)
    """Of the last evaluation: how often label i was taken for j."""
    answers: list[Answer] = field(default_factory=list)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the data preparation reports, by source: uri, rows, tokens …"""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """One per start of the run: attempt, time, host, resumed_from, cause, message, step …"""
    checkpoints: list[CheckpointInfo] = field(default_factory=list)
    skipped: list[CheckpointInfo] = field(default_factory=list)
    checkpoint_failures: int = 0
    outputs: list[OutputInfo] = field(default_factory=list)
    unhealthy: dict[str, str] = field(default_factory=dict)
    """What makes the result doubtful: reasons, each with a figure (``finetune_api/health.py``)."""
    trainable_parameters: int = 0
    total_parameters: int = 0
    world_size: int = 1
    device: str = ""
    seconds: float = 0.0
    """In training steps, over all attempts as far as their checkpoints tell."""
    versions: dict[str, str] = field(default_factory=dict)


def curve(records: Iterable[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of a figure, where it is finite."""
    return [
        (float(record["step"]), float(record[name]))
        for record in records
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    ]


def write_plot(report: Report, path: Path) -> None:
    """``loss.png``: loss, evaluation loss and learning rate over the steps."""
    from matplotlib.figure import Figure  # not pyplot, which belongs to the main thread

    loss, held_out = curve(report.records, "loss"), curve(report.records, "eval_loss")
    rate = curve(report.records, "learning_rate")
    figure = Figure(figsize=(9, 6), layout="constrained", dpi=120)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    marker = {"marker": "o", "markersize": 3} if len(loss) < 3 else {}
    if len(loss) > 40:
        top.plot(*zip(*loss, strict=True), color="#9db8e8", linewidth=0.8, label="loss")
        top.plot(*zip(*smooth(loss), strict=True), color="#1f5fbf", linewidth=1.8, label="loss, smoothed")
    elif loss:
        top.plot(*zip(*loss, strict=True), color="#1f5fbf", linewidth=1.8, label="loss", **marker)
    if held_out:
        top.plot(
            *zip(*held_out, strict=True),
            color="#d1642e",
            linewidth=1.8,
            marker="o",
            markersize=4,
            label="evaluation loss",
        )
    top.set_ylabel("loss (nats per token)")
    top.set_title(f"{report.config.namespace}/{report.config.name}{_state(report)}", loc="left")
    if loss or held_out:
        top.legend(frameon=False)
    if rate:
        bottom.plot(*zip(*rate, strict=True), color="#4a8f5c", linewidth=1.5, **marker)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def smooth(points: Points, share: float = 0.04) -> list[tuple[float, float]]:
    """The mean over a window of about ``share`` of the points around each one: no lag, narrower at both ends."""
    reach = max(1, round(share * len(points) / 2))
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        result.append((x, (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)))
    return result


def write_page(report: Report, path: Path) -> None:
    """``report.html``."""
    path.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The page as text."""
    config = report.config
    last = report.records[-1] if report.records else {}
    sections = [
        _section("Curves", _curves(report)),
        _section("Answers before and after", _answers(report.answers)) if report.answers else "",
        _section("Evaluation", _evaluation(report)) if report.evaluation else "",
        _section("Gates", _gates(last)) if any("gate_" in name for name in last) else "",
        _section("Throughput", _throughput(report)),
        _section("What happened", attempts_table(report.attempts)),
        _section("Checkpoints", _checkpoints(report)),
        _section("Data", _data(report.data)) if report.data else "",
        _section("Result", _outputs(report)) if report.outputs else "",
        _section("Configuration", _configuration(report)),
    ]
    title = f"{config.namespace}/{config.name}"
    return _page(title, "Fine-tuning report", _lead(report), _tiles(report), sections, _banners(report))


def document(
    title: str, kind: str, lead: str, tiles: Sequence[tuple[str, str]], sections: Sequence[tuple[str, str]]
) -> str:
    """A page of another kind of run; ``sections``: title and HTML of each."""
    return _page(title, kind, lead, _tiled(tiles), [_section(*section) for section in sections])


def _page(title: str, kind: str, lead: str, tiles: str, sections: Iterable[str], banners: str = "") -> str:
    title = html.escape(title)
    body = "\n".join(section for section in sections if section)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><main>\n<header><p class=kind>{html.escape(kind)}</p><h1>{title}</h1>"
        f"{banners}<p class=lead>{html.escape(lead)}</p>{tiles}</header>\n{body}\n</main></body></html>\n"
    )


_STOPPED = (Cause.TERMINATED, Cause.SUSPENDED)
"""Ends that somebody asked for."""


def _state(report: Report) -> str:
    if report.cause is Cause.SUCCEEDED:
        return ""
    at = f" at step {report.step} of {report.max_steps}"
    if report.cause is None:
        return f", running{at}"
    return (", stopped" if report.cause in _STOPPED else f", failed ({report.cause})") + at


def _banners(report: Report) -> str:
    """What must be known before anything else: that there is no result (yet), or that it is doubtful."""
    told = []
    where = f"Step {report.step} of {report.max_steps}"
    newest = report.checkpoints[-1] if report.checkpoints else None
    kept = f" The newest checkpoint is that of step {newest.step}, in {newest.uri}." if newest else ""
    if report.cause is None:
        told.append(("", "Still running.", f"{where} when this was written ({report.written}).{kept}"))
    elif report.cause in _STOPPED:
        told.append(("", "Stopped, not finished.", f"{where}. {report.message}{kept} The run goes on from there."))
    elif report.cause is not Cause.SUCCEEDED:
        text = f"{where}. {report.message}{kept or ' No checkpoint is kept.'} No result was written by this attempt."
        told.append(("bad", f"Failed: {report.cause}.", text))
    told += [("bad", "Doubtful.", text) for text in sentences(report.unhealthy)]
    return "".join(
        f'<p class="banner {kind}"><b>{html.escape(head)}</b> {html.escape(text)}</p>' for kind, head, text in told
    )


def _lead(report: Report) -> str:
    config = report.config
    epochs = report.records[-1].get("epoch", 0.0) if report.records else 0.0
    return (
        f"{config.stage.upper()} of {config.model.uri} by {config.method.type}, "
        f"{number(report.trainable_parameters)} of {number(report.total_parameters)} parameters trained, "
        f"{epochs:.3g} epochs on {report.world_size} × {report.device or 'CPU'}."
    )


def _tiles(report: Report) -> str:
    loss = curve(report.records, "loss")
    tiles = []
    if loss:
        tiles.append(("Loss", f"{loss[0][1]:.3f} → {loss[-1][1]:.3f}"))
        tiles.append(("Steps", f"{int(loss[-1][0]):,}"))
    if "loss" in report.evaluation:
        tiles.append(("Evaluation loss", f"{report.evaluation['loss']:.3f}"))
    for kind in ("accuracy", "f1", "spearman", "rougeL"):
        if kind in report.evaluation:
            tiles.append((_title(kind), f"{report.evaluation[kind]:.3f}"))
    if rates := [value for _, value in curve(report.records, "tokens_per_second")]:
        tiles.append(("Tokens per second", number(_median(rates))))
    if shares := [value for _, value in curve(report.records, "mfu")]:
        tiles.append(("MFU", f"{_median(shares):.1%}"))
    if report.seconds:
        tiles.append(("Training time", duration(report.seconds)))
    ends = [attempt.get("cause") in _STOPPED for attempt in report.attempts[:-1]]
    tiles.append(("Restarts", str(ends.count(False))))
    if any(ends):
        tiles.append(("Stopped and continued", str(ends.count(True))))
    return _tiled(tiles)


def _tiled(tiles: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in tiles)
    return f"<dl class=tiles>{cells}</dl>"


def _curves(report: Report) -> str:
    loss = curve(report.records, "loss")
    resumes = [float(attempt["resumed_from"]) for attempt in report.attempts if attempt.get("resumed_from") is not None]
    lines = [("loss", "a", smooth(loss) if len(loss) > 40 else loss)]
    if len(loss) > 40:
        lines.insert(0, ("", "a faint", loss))
    if held_out := curve(report.records, "eval_loss"):
        lines.append(("evaluation loss", "b", held_out))
    charts = [chart("Loss", lines, marks=resumes)]
    charts.append(chart("Learning rate", [("", "c", curve(report.records, "learning_rate"))]))
    charts.append(chart("Gradient norm", [("", "d", curve(report.records, "grad_norm"))]))
    charts.append(chart("Tokens per second", [("", "c", curve(report.records, "tokens_per_second"))]))
    note = "<p class=note>Dotted lines: the run went on here from a checkpoint.</p>" if resumes else ""
    return f"<div class=charts>{''.join(charts)}</div>{note}"


def chart(title: str, lines: Sequence[tuple[str, str, Points]], marks: Sequence[float] = ()) -> str:
    """An SVG line chart. ``lines``: (label, CSS class, points); ``marks``: steps with a dotted line."""
    points = [point for _, _, line in lines for point in line]
    if not points:
        return ""
    width, height, left, right, top, bottom = 400, 190, 50, 12, 10, 24
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, x1 = min(xs), max(xs)
    y0, y1 = min(ys), max(ys)
    x1 = x1 if x1 > x0 else x0 + 1
    margin = (y1 - y0) * 0.05 or abs(y1) * 0.05 or 1.0
    y0, y1 = y0 - margin if y0 < 0 or y0 > margin else 0.0, y1 + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom),
        )

    parts = []
    for tick in ticks(y0, y1):
        _, y = place(x0, tick)
        parts.append(f"<line class=grid x1={left} x2={width - right} y1={y:.1f} y2={y:.1f} />")
        parts.append(f"<text x={left - 6} y={y + 4:.1f} text-anchor=end>{number(tick)}</text>")
    for tick in ticks(x0, x1):
        x, _ = place(tick, y0)
        parts.append(f"<text x={x:.1f} y={height - 8} text-anchor=middle>{number(tick)}</text>")
    for mark in marks:
        if x0 <= mark <= x1:
            x, _ = place(mark, y0)
            parts.append(f"<line class=mark x1={x:.1f} x2={x:.1f} y1={top} y2={height - bottom} />")
    for _, name, line in lines:
        places = [place(x, y) for x, y in _thin(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line {name}" points="{path}" />')
        if len(places) <= 30 and "faint" not in name:
            parts += [f'<circle class="dot {name}" cx={x:.1f} cy={y:.1f} r=2.5 />' for x, y in places]
    legend = "".join(f'<span class="key {name}">{html.escape(label)}</span>' for label, name, _ in lines if label)
    drawing = "".join(parts)
    return (
        f"<figure><figcaption>{html.escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{html.escape(title)}">{drawing}</svg></figure>'
    )


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers between two values."""
    raw = (high - low) / wanted
    scale = 10 ** math.floor(math.log10(raw))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _thin(points: Points, most: int = 1500) -> list[tuple[float, float]]:
    stride = max(1, len(points) // most)
    return [*points[::stride], *([points[-1]] if (len(points) - 1) % stride else [])] if points else []


def _answers(answers: list[Answer]) -> str:
    rows = "".join(
        f"<article><h3>{html.escape(answer.prompt)}</h3><div class=pair><div><h4>Before</h4>"
        f"<p>{html.escape(answer.before) or '<i>(nothing)</i>'}</p></div><div class=after><h4>After</h4>"
        f"<p>{html.escape(answer.after) or '<i>(nothing)</i>'}</p></div></div></article>"
        for answer in answers
    )
    return f"<div class=answers>{rows}</div><p class=note>Greedy decoding, one conversation each.</p>"


def _evaluation(report: Report) -> str:
    """Every figure of every source; what a classifier tells of many types, and the perplexity by position, below."""
    figures = report.evaluation
    names = sorted({name.partition("/")[2] for name in figures})
    kinds = list(dict.fromkeys(name.partition("/")[0] for name in figures))
    apart = {"Perplexity by position, up to token": "perplexity_to_"} | ({"F1": "f1_"} if len(kinds) > 9 else {})
    wide = [kind for kind in kinds if not kind.startswith(tuple(apart.values()))]
    rows = [(name or "all", *(_figure(figures, kind, name) for kind in wide)) for name in names]
    text = table(("Source", *(_title(kind) for kind in wide)), rows)
    for title, prefix in apart.items():
        if narrow := [kind for kind in kinds if kind.startswith(prefix)]:
            lines = [(kind.removeprefix(prefix), *(_figure(figures, kind, name) for name in names)) for kind in narrow]
            text += f"<h3>{title}</h3>" + table(("", *(name or "all" for name in names)), lines)
    return text + (_confusion(report.labels, report.confusion) if report.confusion else "")


def _title(kind: str) -> str:
    if kind.startswith("rouge"):
        return f"ROUGE-{kind.removeprefix('rouge')}"
    return {"mcc": "MCC", "mse": "MSE", "mae": "MAE", "bleu": "BLEU"}.get(kind, kind.replace("_", " ").capitalize())


def _figure(figures: dict[str, float], kind: str, source: str) -> str:
    value = figures.get(f"{kind}/{source}" if source else kind)
    return "" if value is None else f"{value:.4f}"


def _confusion(labels: Sequence[str], matrix: list[list[int]]) -> str:
    """How often the label of a row was taken for that of a column, the darker the more of its row; beyond
    ``SHOWN_LABELS`` labels the commonest mistakes instead."""
    if len(labels) > SHOWN_LABELS:
        mistakes = [
            (n, labels[i], labels[j]) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j
        ]
        rows = [(wanted, given, f"{count:,}") for count, wanted, given in sorted(mistakes, reverse=True)[:SHOWN_LABELS]]
        return "<h3>Commonest mistakes</h3>" + table(("Label", "Taken for", "Times"), rows)
    head = "".join(f"<th class=n>{html.escape(label)}</th>" for label in labels)
    lines = []
    for label, counts in zip(labels, matrix, strict=True):
        shares = [count / max(sum(counts), 1) for count in counts]
        cells = "".join(
            f'<td class=n style="background:color-mix(in srgb,var(--a) {share:.0%},transparent)">{count:,}</td>'
            for count, share in zip(counts, shares, strict=True)
        )
        lines.append(f"<tr><th>{html.escape(label)}</th>{cells}</tr>")
    return (
        "<h3>Confusion matrix</h3><p class=note>Rows: the right label; columns: the predicted one; all sources.</p>"
        f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _gates(record: dict[str, Any]) -> str:
    """How much each part of UniPELT counted at the end, 0 to 1."""
    kinds = [name for name in record if name.startswith("gate_") and "/" not in name]
    layers = sorted({int(name.partition("/")[2]) for name in record if name.startswith("gate_") and "/" in name})
    rows = [("all", *(f"{record[kind]:.3f}" for kind in kinds))]
    rows += [(str(layer), *(f"{record[f'{kind}/{layer}']:.3f}" for kind in kinds)) for layer in layers]
    return table(("Layer", *(kind.removeprefix("gate_") for kind in kinds)), rows)


def _throughput(report: Report) -> str:
    rows = []
    for label, name, form in (
        ("Tokens per second (useful, all processes)", "tokens_per_second", number),
        ("Step, seconds", "step_seconds", lambda value: f"{value:.3g}"),
        ("Waiting for data, seconds per step", "data_wait_seconds", lambda value: f"{value:.3g}"),
        ("MFU", "mfu", lambda value: f"{value:.1%}"),
    ):
        if values := sorted(value for _, value in curve(report.records, name)):
            rows.append((label, form(_median(values)), form(values[0]), form(values[-1])))
    for kind, label in (("peak", "GPU memory, peak"), ("rss", "Host memory")):
        sizes = [r["memory"][kind] for r in report.records if kind in r.get("memory", {})]
        if sizes:
            rows.append((label, size(_median(sizes)), size(min(sizes)), size(max(sizes))))
    return table(("", "Median", "Least", "Most"), rows) if rows else "<p>No step was logged.</p>"


def attempts_table(attempts: Sequence[dict[str, Any]]) -> str:
    """Every start of a run: where it went on, and how it ended."""
    rows = []
    for attempt in attempts:
        start = attempt.get("resumed_from")
        began = f"from the checkpoint of step {start}" if start else "from the beginning"
        if attempt.get("skipped"):
            began += "; passed over " + ", ".join(
                f"step {skipped['step']} ({skipped['problem']})" for skipped in attempt["skipped"]
            )
        silent = "runs" if attempt is attempts[-1] else "without a word: it was killed, or its node was lost"
        cause = attempt.get("cause", silent)
        end = f"{cause}: {attempt['message']}" if attempt.get("message") else cause
        rows.append(
            (str(attempt.get("attempt", "")), attempt.get("time", ""), str(attempt.get("world_size", "")), began, end)
        )
    return table(("Attempt", "Started", "Processes", "Went on", "Ended"), rows)


def _checkpoints(report: Report) -> str:
    rows = [(str(c.step), c.time, size(c.size), c.uri, c.digest[:19]) for c in report.checkpoints]
    text = table(("Step", "Completed", "Size", "Where", "Digest"), rows) if rows else "<p>None is kept.</p>"
    if report.skipped:
        skipped = [(str(c.step), c.problem, c.uri) for c in report.skipped]
        text += "<h3>Passed over as broken</h3>" + table(("Step", "Problem", "Where"), skipped)
    if report.checkpoint_failures:
        text += f"<p>{report.checkpoint_failures} saves failed in this attempt; the training went on.</p>"
    return text


def _data(data: dict[str, dict[str, Any]]) -> str:
    """What the preparation counted, and the first bad rows."""
    listed = dict.fromkeys(name for counts in data.values() for name in counts)
    columns = [n for n in listed if n not in ("uri", "bad_examples") and any(counts.get(n) for counts in data.values())]
    rows = [
        (source, counts.get("uri", ""), *(_cell(counts.get(name)) for name in columns))
        for source, counts in data.items()
    ]
    made = table(("Source", "From", *(name.replace("_", " ").capitalize() for name in columns)), rows)
    bad = [(source, place) for source, counts in data.items() for place in counts.get("bad_examples", [])]
    return made + ("<h3>Bad rows, left out</h3>" + table(("Source", "First of them"), bad) if bad else "")


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _outputs(report: Report) -> str:
    """The folder that this report is a part of has no digest yet."""
    rows = [(o.kind, o.uri, size(o.size), o.digest[:19] or "in manifest.json") for o in report.outputs]
    return table(("What", "Where", "Size", "Digest"), rows) + "<p class=note>README.md says how it is loaded.</p>"


def _configuration(report: Report) -> str:
    document = json.dumps(report.config.model_dump(mode="json", exclude_defaults=False), indent=2, ensure_ascii=False)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"<details><summary>All values, defaults resolved</summary><pre>{html.escape(document)}</pre></details>"
        f"<p class=note>{html.escape(versions)}</p>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of escaped texts; columns of numbers are set right."""
    rows = [[str(cell) for cell in row] for row in rows]
    numeric = [
        i > 0 and bool(rows) and all(row[i][:1].isdigit() and len(row[i]) < 14 for row in rows)
        for i in range(len(head))
    ]
    mark = [" class=n" if right else "" for right in numeric]
    top = "".join(f"<th{mark[i]}>{html.escape(cell)}</th>" for i, cell in enumerate(head))
    names = [f'"{html.escape(cell)}"' for cell in head]  # on a narrow screen each cell says what it is
    lines = "".join(
        "<tr>"
        + "".join(f"<td{mark[i]} data-of={names[i]}>{html.escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table class=rows><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def number(value: float) -> str:
    """A number for people: 1.35 M, 12,400, 0.0002."""
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes for people."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """1 h 05 min, 3 min 20 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6675;--paper:#fff;--card:#f5f7fa;--line:#dfe4ea;
--a:#1f5fbf;--b:#d1642e;--c:#3d8b57;--d:#7a55b3}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa6b5;--paper:#12161c;--card:#1b212a;--line:#2c3541;
--a:#6ea2f2;--b:#ef9161;--c:#74c08d;--d:#b394e6}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:36px 24px 80px}
.kind{margin:0;color:var(--soft);text-transform:uppercase;letter-spacing:.08em;font-size:12px}
h1{margin:2px 0 6px;font-size:30px;letter-spacing:-.01em}.lead{color:var(--soft);margin:0 0 20px;max-width:80ch}
h2{font-size:19px;margin:44px 0 14px;padding-bottom:6px;border-bottom:1px solid var(--line)}
h3{font-size:15px;margin:18px 0 8px}h4{margin:0 0 4px;font-size:12px;color:var(--soft);font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;margin:0}
.tiles div{background:var(--card);border-radius:10px;padding:12px 14px}
dt{color:var(--soft);font-size:12px}dd{margin:2px 0 0;font-size:17px;white-space:nowrap;
font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:14px}
figure{margin:0;background:var(--card);border-radius:10px;padding:12px 14px}
figcaption{font-size:13px;color:var(--soft);margin-bottom:6px}svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:9px}.grid{stroke:var(--line)}.mark{stroke:var(--soft);stroke-dasharray:2 4}
.line{fill:none;stroke:currentColor;stroke-width:1.5;stroke-linejoin:round}.dot{fill:currentColor}
.a{color:var(--a)}.b{color:var(--b)}.c{color:var(--c)}.d{color:var(--d)}.faint{opacity:.3;stroke-width:1}
.key{margin-left:14px}.key:before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;
background:currentColor;margin-right:5px;vertical-align:middle}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:7px 12px 7px 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}th{color:var(--soft);font-weight:600;font-size:12px;white-space:nowrap}
.n{text-align:right;padding-right:24px;font-variant-numeric:tabular-nums;white-space:nowrap}
.answers{display:grid;gap:14px}.answers article{background:var(--card);border-radius:10px;padding:14px 16px}
.answers h3{margin:0 0 10px}.pair{display:grid;grid-template-columns:1fr 1fr;gap:18px}
.pair p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}.after h4{color:var(--a)}
.banner{margin:0 0 12px;padding:10px 14px;border-left:4px solid var(--a);background:var(--card);border-radius:6px;
max-width:110ch;overflow-wrap:anywhere}.banner.bad{border-color:var(--b)}
@media(max-width:640px){main{padding:22px 14px 60px}h1{font-size:24px;overflow-wrap:anywhere}
.pair{grid-template-columns:1fr}svg text{font-size:13px}figure{padding:10px 6px}
.rows thead{display:none}.rows,.rows tbody,.rows tr,.rows td{display:block;text-align:left}
.rows tr{padding:8px 0;border-bottom:1px solid var(--line)}
.rows td{display:grid;grid-template-columns:38% 1fr;gap:10px;padding:3px 0;border:0;white-space:normal}
.rows td:before{content:attr(data-of);color:var(--soft);font-size:12px;overflow-wrap:anywhere}
.rows td:empty{display:none}.rows td[data-of=""]{display:block;font-weight:600}}
pre{background:var(--card);padding:14px;border-radius:10px;overflow:auto;font-size:12.5px}
.note{color:var(--soft);font-size:13px}summary{cursor:pointer}
@media print{main{padding:0;max-width:none}section{break-inside:avoid}}
"""
