"""The two Grafana dashboards, written as what they show; ``generate.py`` makes the JSON files of them.

A panel is one call: its title, its queries, its unit. The layout is a list of rows, each as wide as Grafana's 24
columns. Queries use ``$datasource``, ``$cluster``, ``$namespace`` and (in the dashboard of one job) ``$finetunejob``.
"""

from collections.abc import Iterable
from typing import Any

Json = dict[str, Any]

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GREEN, YELLOW, ORANGE, RED, BLUE, GREY, PURPLE = "green", "yellow", "orange", "red", "blue", "text", "purple"

STATE_COLOURS = {
    "Pending": GREY,
    "Invalid": ORANGE,
    "Waiting": GREY,
    "Queued": GREY,
    "Starting": BLUE,
    "Running": GREEN,
    "Restarting": YELLOW,
    "Finishing": GREEN,
    "Suspending": PURPLE,
    "Suspended": PURPLE,
    "Succeeded": "dark-green",
    "Failed": RED,
}
STATES = list(STATE_COLOURS)

# --- pieces ----------------------------------------------------------------------------------------------------


def query(expr: str, legend: str = "", **more: Any) -> Json:
    """One query. ``legend`` names its series; ``instant=True`` asks for the present only."""
    instant = bool(more.pop("instant", False))
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expr,
        "instant": instant,
        "range": not instant,
        "legendFormat": legend or "__auto",
        **more,
    }


def steps(*pairs: tuple[float | None, str]) -> Json:
    """Thresholds: ``(None, green), (60, red)``."""
    return {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in pairs]}


PLAIN = steps((None, GREEN))


def override(name: str, **properties: Any) -> Json:
    """Settings of one field, by its name; keys have ``__`` for a dot."""
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": key.replace("__", "."), "value": value} for key, value in properties.items()],
    }


def panel(kind: str, title: str, targets: Iterable[Json], *, width: int, height: int = 8, **more: Any) -> Json:
    """A panel of any kind; the helpers below are what is used."""
    defaults: Json = {"unit": more.pop("unit", "none"), "thresholds": more.pop("thresholds", PLAIN)}
    for key in ("decimals", "min", "max", "noValue", "mappings", "custom", "color", "links"):
        if key in more:
            defaults[key] = more.pop(key)
    return {
        "type": kind,
        "title": title,
        "description": more.pop("about", ""),
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": height},
        "targets": [{**target, "refId": chr(ord("A") + number)} for number, target in enumerate(targets)],
        "fieldConfig": {"defaults": defaults, "overrides": more.pop("overrides", [])},
        **more,
    }


def stat(title: str, expr: str, *, width: int = 3, height: int = 4, graph: bool = False, **more: Any) -> Json:
    """One figure."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": more.pop("colour_mode", "value"),
        "graphMode": "area" if graph else "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": more.pop("text_mode", "auto"),
        "wideLayout": True,
    }
    target = query(expr, more.pop("legend", ""), instant=not graph)
    return panel("stat", title, [target], width=width, height=height, options=options, **more)


def graph(title: str, targets: Iterable[Json], *, width: int = 8, stacked: bool = False, **more: Any) -> Json:
    """Curves over time, with a legend that is a table."""
    custom: Json = {
        "drawStyle": more.pop("style", "line"),
        "lineWidth": 1,
        "fillOpacity": 40 if stacked else more.pop("fill", 8),
        "gradientMode": "none",
        "lineInterpolation": "linear",
        "showPoints": "auto",
        "pointSize": 4,
        "spanNulls": more.pop("span_nulls", 120000),
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "axisPlacement": "auto",
        "axisBorderShow": False,
        "scaleDistribution": more.pop("scale", {"type": "linear"}),
        "thresholdsStyle": {"mode": more.pop("threshold_style", "off")},
    }
    options = {
        "legend": {
            "displayMode": "table" if more.pop("legend_table", True) else "list",
            "placement": "bottom",
            "showLegend": True,
            "calcs": more.pop("calcs", ["lastNotNull"]),
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    colour = {"mode": "palette-classic"}
    return panel("timeseries", title, targets, width=width, custom=custom, color=colour, options=options, **more)


def row(title: str) -> Json:
    """A heading."""
    return {"type": "row", "title": title, "collapsed": False, "gridPos": {"w": 24, "h": 1}, "panels": []}


def variable(name: str, label: str, values_of: str, **more: Any) -> Json:
    """A choice whose values Prometheus knows."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "query": {"query": values_of, "refId": "PrometheusVariableQueryEditor-VariableQuery", "qryType": 1},
        "definition": values_of,
        "refresh": 2,
        "sort": 1,
        "hide": 0,
        "regex": "",
        "options": [],
        "current": {},
        "includeAll": False,
        "multi": False,
        **more,
    }


SOURCE = {
    "type": "datasource",
    "name": "datasource",
    "label": "Data source",
    "query": "prometheus",
    "refresh": 1,
    "hide": 0,
    "regex": "",
    "options": [],
    "current": {},
    "includeAll": False,
    "multi": False,
}
ALL = {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}}


def dashboard(uid: str, title: str, about: str, variables: list[Json], panels: list[Json], **more: Any) -> Json:
    """The whole file. Panels are laid out in the order given, from left to right and downwards."""
    return {
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["finetune-operator", "kubernetes", "llm"],
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": more.pop("since", "now-6h"), "to": "now"},
        "timezone": "browser",
        "fiscalYearStartMonth": 0,
        "weekStart": "",
        "preload": False,
        "timepicker": {},
        "templating": {"list": [SOURCE, *variables]},
        "annotations": {"list": [_BUILT_IN, *more.pop("annotations", [])]},
        "links": more.pop("links", []),
        "panels": _laid_out(panels),
    }


_BUILT_IN = {
    "builtIn": 1,
    "datasource": {"type": "grafana", "uid": "-- Grafana --"},
    "enable": True,
    "hide": True,
    "iconColor": "rgba(0, 211, 255, 1)",
    "name": "Annotations & Alerts",
    "type": "dashboard",
}


def _laid_out(panels: list[Json]) -> list[Json]:
    x = y = tallest = 0
    placed = []
    for number, one in enumerate(panels, start=1):
        width, height = one["gridPos"]["w"], one["gridPos"]["h"]
        if x + width > 24:
            x, y, tallest = 0, y + tallest, 0
        placed.append({"id": number, **one, "gridPos": {"x": x, "y": y, "w": width, "h": height}})
        x, tallest = x + width, max(tallest, height)
    return placed


# --- the fleet -------------------------------------------------------------------------------------------------

CLUSTER = variable("cluster", "Cluster", "label_values(finetune_operator_info, cluster)", **ALL)
"""Where one Prometheus knows several clusters, by the label ``cluster``. Without it, All is the only choice and finds
what has no such label."""
IN = '{cluster=~"$cluster"}'
NS = 'cluster=~"$cluster", namespace=~"$namespace"'
KEY = "cluster, namespace, finetunejob"


def per_job(metric: str) -> str:
    """One value a job, whichever replica tells it."""
    return f"max by ({KEY}) ({metric}{{{NS}}})"


STATE_MAPPING = [
    {
        "type": "value",
        "options": {
            state: {"index": index, "text": state, "color": colour}
            for index, (state, colour) in enumerate(STATE_COLOURS.items())
        },
    }
]

JOB_LINK = {
    "title": "Open ${__data.fields.finetunejob}",
    "url": (
        "/d/finetune-job?var-datasource=${datasource}&${cluster:queryparam}&var-namespace=${__data.fields.namespace}"
        "&var-finetunejob=${__data.fields.finetunejob}&${__url_time_range}"
    ),
}

_COLUMNS: list[tuple[str, str, Json]] = [
    # name of the column, query, settings
    (
        "Progress",
        per_job("finetune_job_progress_ratio"),
        {
            "unit": "percentunit",
            "min": 0,
            "max": 1,
            "custom__cellOptions": {"type": "gauge", "mode": "basic"},
            "custom__width": 160,
            "color": {"mode": "fixed", "fixedColor": GREEN},
        },
    ),
    ("Loss", per_job("finetune_job_loss"), {"decimals": 4}),
    ("Tokens/s", f"sum by ({KEY}) (finetune_train_tokens_per_second{{{NS}}})", {"unit": "short", "decimals": 0}),
    ("ETA", per_job("finetune_job_eta_seconds"), {"unit": "s", "decimals": 0}),
    (
        "Checkpoint age",
        f"time() - {per_job('finetune_job_checkpoint_timestamp_seconds')}",
        {
            "unit": "s",
            "decimals": 0,
            "custom__cellOptions": {"type": "color-text"},
            "thresholds": steps((None, GREEN), (1800, YELLOW), (3600, RED)),
        },
    ),
    (
        "Restarts",
        per_job("finetune_job_restarts"),
        {"custom__cellOptions": {"type": "color-text"}, "thresholds": steps((None, GREEN), (1, YELLOW), (3, RED))},
    ),
    ("GPUs held", per_job("finetune_job_gpus"), {}),
    ("GPUs wanted", per_job("finetune_job_gpus_wanted"), {}),
    ("Cost/h", per_job("finetune_job_cost_per_hour"), {"unit": "currencyUSD", "decimals": 2}),
]


def jobs_table() -> Json:
    """All jobs, one line each."""
    targets = [
        query(f"max by ({KEY}, state) (finetune_job_state{{{NS}}})", instant=True, format="table"),
        query(
            f"max by ({KEY}, stage, method, model, profile) (finetune_job_info{{{NS}}})", instant=True, format="table"
        ),
        *(query(expr, instant=True, format="table") for _, expr, _ in _COLUMNS),
    ]
    letters = [chr(ord("C") + number) for number in range(len(_COLUMNS))]
    order = [
        "cluster",
        "namespace",
        "finetunejob",
        "state",
        *(f"Value #{x}" for x in letters),
        "method",
        "stage",
        "model",
        "profile",
    ]
    transformations = [
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {
                "excludeByName": {"Time": True, "Value #A": True, "Value #B": True},
                "indexByName": {name: index for index, name in enumerate(order)},
                "renameByName": {f"Value #{x}": name for x, (name, _, _) in zip(letters, _COLUMNS, strict=True)},
            },
        },
    ]
    overrides = [
        override("state", custom__cellOptions={"type": "color-text"}, mappings=STATE_MAPPING, custom__width=100),
        override("finetunejob", links=[JOB_LINK]),
        *(override(name, **settings) for name, _, settings in _COLUMNS),
    ]
    return panel(
        "table",
        "Jobs",
        targets,
        width=24,
        height=12,
        about="Every FineTuneJob that exists. Click a name for its own dashboard.",
        transformations=transformations,
        overrides=overrides,
        custom={"align": "auto", "filterable": True, "cellOptions": {"type": "auto"}},
        options={"showHeader": True, "cellHeight": "sm", "sortBy": [{"displayName": "state", "desc": False}]},
    )


FAILURES = (
    "last_over_time(finetune_job_attempt_failures_total{{{0}}}[$__range])"
    " - (finetune_job_attempt_failures_total{{{0}}} offset $__range"
    " or 0 * last_over_time(finetune_job_attempt_failures_total{{{0}}}[$__range]))"
)
"""Failures within the range. The counter of a cause begins with its first failure, which increase() would miss."""


def fleet() -> Json:
    """What runs, what it costs, what fails."""
    jobs = f"finetune_jobs{{{NS}}}"
    passes = f"sum by (le) (rate(finetune_operator_reconcile_seconds_bucket{IN}[$__rate_interval]))"
    cost = f"max by ({KEY}) (finetune_job_cost_per_hour{{{NS}}})"
    return dashboard(
        "finetune-fleet",
        "Fine-tuning / Fleet",
        "All FineTuneJobs: what runs, how fast, what it costs, what fails; and the operator itself.",
        [
            CLUSTER,
            variable("namespace", "Namespace", 'label_values(finetune_jobs{cluster=~"$cluster"}, namespace)', **ALL),
        ],
        [
            stat("Running", f'sum(max by (cluster, namespace, state) ({jobs[:-1]}, state="Running"}})) or vector(0)'),
            stat(
                "Waiting for pods or inputs",
                f"sum(max by (cluster, namespace, state) ({jobs[:-1]}, "
                'state=~"Pending|Waiting|Queued|Starting"})) or vector(0)',
                thresholds=steps((None, BLUE)),
            ),
            stat(
                "Restarting",
                f'sum(max by (cluster, namespace, state) ({jobs[:-1]}, state="Restarting"}})) or vector(0)',
                thresholds=steps((None, GREEN), (1, YELLOW)),
            ),
            stat(
                "Failed or invalid",
                f'sum(max by (cluster, namespace, state) ({jobs[:-1]}, state=~"Failed|Invalid"}})) or vector(0)',
                thresholds=steps((None, GREEN), (1, RED)),
            ),
            stat(
                "GPUs held",
                f"sum({per_job('finetune_job_gpus')}) or vector(0)",
                graph=True,
                about="Of pods that have a node.",
            ),
            stat(
                "Useful tokens/s",
                f"sum(finetune_train_tokens_per_second{{{NS}}}) or vector(0)",
                graph=True,
                unit="short",
            ),
            stat(
                "Cost per hour",
                f"sum({cost}) or vector(0)",
                graph=True,
                unit="currencyUSD",
                decimals=2,
                about="GPUs held times profiles.*.pricePerGpuHour; jobs of profiles without a price count nothing.",
            ),
            stat(
                "Mean MFU",
                f"avg(finetune_train_mfu_ratio{{{NS}}})",
                graph=True,
                unit="percentunit",
                decimals=0,
                noValue="–",
                about="Model FLOPs utilisation of the jobs that run now.",
            ),
            jobs_table(),
            row("Over time"),
            graph(
                "Jobs by state",
                [query(f"sum by (state) (max by (cluster, namespace, state) ({jobs}))", "{{state}}")],
                stacked=True,
                overrides=[override(s, color={"mode": "fixed", "fixedColor": c}) for s, c in STATE_COLOURS.items()],
            ),
            graph(
                "GPUs held by namespace",
                [
                    query(f"sum by (namespace) ({per_job('finetune_job_gpus')})", "{{namespace}}"),
                    query(f"sum({per_job('finetune_job_gpus_wanted')})", "wanted by all"),
                ],
                stacked=True,
                min=0,
                about="The line is what all jobs that are to run ask for: what lies below it waits for GPUs.",
                overrides=[
                    override(
                        "wanted by all",
                        custom__stacking={"mode": "none"},
                        custom__fillOpacity=0,
                        color={"mode": "fixed", "fixedColor": GREY},
                    )
                ],
            ),
            graph(
                "Cost per hour by namespace",
                [query(f"sum by (namespace) ({cost})", "{{namespace}}")],
                stacked=True,
                unit="currencyUSD",
                min=0,
            ),
            graph(
                "Useful tokens/s by job",
                [query(f"sum by ({KEY}) (finetune_train_tokens_per_second{{{NS}}})", "{{namespace}}/{{finetunejob}}")],
                stacked=True,
                unit="short",
                min=0,
                calcs=["lastNotNull", "mean"],
            ),
            graph(
                "MFU by job",
                [query(f"avg by ({KEY}) (finetune_train_mfu_ratio{{{NS}}})", "{{namespace}}/{{finetunejob}}")],
                unit="percentunit",
                min=0,
                max=1,
                calcs=["lastNotNull", "mean"],
                about="A job far below its peers waits for something: data, the network, a slow node.",
            ),
            graph(
                "Time waiting for data",
                [
                    query(
                        f"max by ({KEY}) (rate(finetune_train_data_wait_seconds_total{{{NS}}}[$__rate_interval]))",
                        "{{namespace}}/{{finetunejob}}",
                    )
                ],
                unit="percentunit",
                min=0,
                max=1,
                calcs=["lastNotNull", "mean"],
            ),
            row("Failures"),
            panel(
                "barchart",
                "Failed attempts by cause",
                [
                    query(
                        f"sort_desc(sum by (cause) ({FAILURES.format(NS)}) > 0)",
                        "{{cause}}",
                        instant=True,
                        format="table",
                    )
                ],
                width=8,
                about="Within the time range. What a cause means: docs/api.md.",
                options={
                    "orientation": "horizontal",
                    "xField": "cause",
                    "showValue": "always",
                    "stacking": "none",
                    "legend": {"showLegend": False, "displayMode": "list", "placement": "bottom"},
                    "tooltip": {"mode": "single", "sort": "none"},
                    "barWidth": 0.8,
                    "groupWidth": 0.7,
                },
                transformations=[{"id": "organize", "options": {"excludeByName": {"Time": True}}}],
                color={"mode": "fixed", "fixedColor": ORANGE},
            ),
            graph(
                "Restarts by job",
                [query(f"{per_job('finetune_job_restarts')} > 0", "{{namespace}}/{{finetunejob}}")],
                width=8,
                min=0,
                decimals=0,
            ),
            graph(
                "Checkpoint age by job",
                [
                    query(
                        f"(time() - {per_job('finetune_job_checkpoint_timestamp_seconds')}) and on ({KEY}) "
                        f'max by ({KEY}) (finetune_job_state{{{NS}, state="Running"}})',
                        "{{namespace}}/{{finetunejob}}",
                    )
                ],
                width=8,
                unit="s",
                min=0,
                calcs=["lastNotNull", "max"],
                about="Of running jobs: the work that a failure would cost now.",
                thresholds=steps((None, GREEN), (3600, RED)),
                threshold_style="dashed",
            ),
            row("Operator"),
            stat(
                "Active replicas",
                f"sum by (cluster) (finetune_operator_leader{IN})",
                noValue="none",
                thresholds=steps((None, RED), (1, GREEN), (2, RED)),
            ),
            stat(
                "Replicas",
                f"count by (cluster) (finetune_operator_info{IN})",
                noValue="none",
                thresholds=steps((None, RED), (1, YELLOW), (2, GREEN)),
            ),
            stat(
                "Version",
                f"max by (version) (finetune_operator_info{IN})",
                legend="{{version}}",
                text_mode="name",
                noValue="none",
                width=2,
            ),
            graph(
                "Passes per second",
                [
                    query(
                        f"sum by (result) (rate(finetune_operator_reconcile_seconds_count{IN}[$__rate_interval]))",
                        "{{result}}",
                    )
                ],
                width=8,
                height=7,
                unit="ops",
                min=0,
                overrides=[override("error", color={"mode": "fixed", "fixedColor": RED})],
            ),
            graph(
                "Duration of a pass",
                [
                    query(
                        f"histogram_quantile(0.5, {passes})",
                        "median",
                    ),
                    query(
                        f"histogram_quantile(0.99, {passes})",
                        "99 %",
                    ),
                ],
                width=8,
                height=7,
                unit="s",
                min=0,
            ),
            graph(
                "Queue and errors",
                [
                    query(f"max(finetune_operator_queue_depth{IN})", "waiting jobs"),
                    query(f"sum(increase(finetune_operator_reconcile_errors_total{IN}[$__rate_interval]))", "errors"),
                ],
                width=8,
                height=7,
                min=0,
            ),
        ],
    )


# --- one job ---------------------------------------------------------------------------------------------------

ONE = f'{NS}, finetunejob=~"$finetunejob"'


def of_job(metric: str) -> str:
    """The job's value, whichever replica or attempt tells it."""
    return f"max({metric}{{{ONE}}})"


def job() -> Json:
    """How one run goes: does it learn, how fast, is it safe, what happened to it."""
    operator, train = of_job, of_job
    bucket = f"sum by (le) (rate(finetune_train_step_seconds_bucket{{{ONE}}}[$__rate_interval]))"
    return dashboard(
        "finetune-job",
        "Fine-tuning / Job",
        "One FineTuneJob: does it learn, how fast, how much would a failure cost, what happened to it.",
        [
            CLUSTER,
            variable("namespace", "Namespace", 'label_values(finetune_job_info{cluster=~"$cluster"}, namespace)'),
            variable("finetunejob", "Job", f"label_values(finetune_job_info{{{NS}}}, finetunejob)"),
        ],
        [
            stat(
                "State",
                f"max by (state) (finetune_job_state{{{ONE}}})",
                legend="{{state}}",
                text_mode="name",
                width=3,
                noValue="gone",
                overrides=[override(s, color={"mode": "fixed", "fixedColor": c}) for s, c in STATE_COLOURS.items()],
            ),
            panel(
                "gauge",
                "Progress",
                [query(operator("finetune_job_progress_ratio"), instant=True)],
                width=3,
                height=4,
                unit="percentunit",
                min=0,
                max=1,
                noValue="–",
                thresholds=steps((None, BLUE), (1, GREEN)),
                options={
                    "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                    "showThresholdLabels": False,
                    "showThresholdMarkers": False,
                    "orientation": "auto",
                },
            ),
            stat(
                "Time to the end",
                operator("finetune_job_eta_seconds"),
                unit="s",
                decimals=0,
                noValue="–",
                thresholds=steps((None, BLUE)),
            ),
            stat(
                "Loss",
                f"avg(finetune_train_loss{{{ONE}}}) or {operator('finetune_job_loss')}",
                graph=True,
                decimals=4,
                noValue="–",
            ),
            stat("Tokens/s", f"sum(finetune_train_tokens_per_second{{{ONE}}})", graph=True, unit="short", noValue="–"),
            stat(
                "Checkpoint age",
                f"time() - {operator('finetune_job_checkpoint_timestamp_seconds')}",
                unit="s",
                decimals=0,
                noValue="none",
                thresholds=steps((None, GREEN), (1800, YELLOW), (3600, RED)),
                about="What a failure would cost now.",
            ),
            stat(
                "Restarts",
                operator("finetune_job_restarts"),
                width=2,
                noValue="–",
                thresholds=steps((None, GREEN), (1, YELLOW), (3, RED)),
            ),
            stat("GPUs held", operator("finetune_job_gpus"), width=2, noValue="–", thresholds=steps((None, BLUE))),
            stat(
                "Cost/h",
                operator("finetune_job_cost_per_hour"),
                width=2,
                unit="currencyUSD",
                decimals=2,
                noValue="–",
                thresholds=steps((None, BLUE)),
            ),
            panel(
                "state-timeline",
                "State",
                [query(f"max by (state) (finetune_job_state{{{ONE}}})", "{{state}}")],
                width=12,
                height=6,
                about="What the job was in when. Gaps: no operator was scraped.",
                custom={"fillOpacity": 80, "lineWidth": 0, "spanNulls": False},
                mappings=[{"type": "value", "options": {"1": {"text": " ", "index": 0}}}],
                options={
                    "mergeValues": True,
                    "showValue": "never",
                    "rowHeight": 0.9,
                    "alignValue": "left",
                    "legend": {"showLegend": False, "displayMode": "list", "placement": "bottom"},
                    "tooltip": {"mode": "single", "sort": "none"},
                },
                overrides=[override(s, color={"mode": "fixed", "fixedColor": c}) for s, c in STATE_COLOURS.items()],
            ),
            panel(
                "table",
                "What it is",
                [
                    query(
                        f"max by (stage, method, model, profile) (finetune_job_info{{{ONE}}})",
                        instant=True,
                        format="table",
                    ),
                    query(f"max by (world_size) (finetune_train_info{{{ONE}}})", instant=True, format="table"),
                ],
                width=6,
                height=6,
                custom={"align": "left", "cellOptions": {"type": "auto", "wrapText": True}},
                options={"showHeader": True, "cellHeight": "sm"},
                transformations=[
                    {
                        "id": "organize",
                        "options": {"excludeByName": {"Time": True, "Value": True, "Value #A": True, "Value #B": True}},
                    },
                    {"id": "concatenate", "options": {"frameNameMode": "drop"}},
                    {"id": "reduce", "options": {"reducers": ["firstNotNull"], "mode": "seriesToRows"}},
                    {"id": "organize", "options": {"renameByName": {"Field": "What", "First *": "Value"}}},
                ],
            ),
            panel(
                "barchart",
                "Failed attempts by cause",
                [
                    query(
                        f"sort_desc(sum by (cause) ({FAILURES.format(ONE)}) > 0)",
                        "{{cause}}",
                        instant=True,
                        format="table",
                    )
                ],
                width=6,
                height=6,
                noValue="none",
                about="Within the time range. status.attempts has exit codes, nodes and log lines.",
                options={
                    "orientation": "horizontal",
                    "xField": "cause",
                    "showValue": "always",
                    "stacking": "none",
                    "legend": {"showLegend": False, "displayMode": "list", "placement": "bottom"},
                    "tooltip": {"mode": "single", "sort": "none"},
                    "barWidth": 0.8,
                    "groupWidth": 0.7,
                },
                transformations=[{"id": "organize", "options": {"excludeByName": {"Time": True}}}],
                color={"mode": "fixed", "fixedColor": ORANGE},
            ),
            row("Does it learn?"),
            graph(
                "Loss",
                [
                    query(f"avg(finetune_train_loss{{{ONE}}})", "training"),
                    query(f"avg(avg_over_time(finetune_train_loss{{{ONE}}}[10m]))", "training, mean of 10 min"),
                    query(f"avg by (source) (finetune_eval_loss{{{ONE}}})", "evaluation {{source}}"),
                ],
                width=12,
                height=9,
                decimals=4,
                calcs=["lastNotNull", "min"],
                span_nulls=3600000,
            ),
            graph(
                "Perplexity of the evaluation",
                [query(f"avg by (source) (finetune_eval_perplexity{{{ONE}}})", "{{source}}")],
                width=6,
                height=9,
                calcs=["lastNotNull", "min"],
                span_nulls=3600000,
                scale={"type": "log", "log": 2},
            ),
            graph(
                "Gradient norm",
                [query(f"avg(finetune_train_grad_norm{{{ONE}}})", "before clipping")],
                width=6,
                height=9,
                min=0,
                calcs=["lastNotNull", "max"],
                about="Jumps come before a loss that diverges.",
            ),
            graph(
                "Learning rate",
                [query(f"avg(finetune_train_learning_rate{{{ONE}}})", "learning rate")],
                width=8,
                min=0,
                unit="sci",
            ),
            graph(
                "Steps",
                [
                    query(f"{train('finetune_train_step')} or {operator('finetune_job_step')}", "done"),
                    query(f"{train('finetune_train_max_steps')} or {operator('finetune_job_max_steps')}", "in all"),
                ],
                width=8,
                min=0,
                about="Falls back to the last checkpoint when the run is restarted.",
            ),
            graph(
                "Epoch and tokens",
                [
                    query(train("finetune_train_epoch"), "epoch"),
                    query(f"max(finetune_train_tokens_total{{{ONE}}})", "useful tokens"),
                ],
                width=8,
                min=0,
                unit="short",
                overrides=[override("useful tokens", custom__axisPlacement="right")],
            ),
            graph(
                "The stage's own figures",
                [
                    query(f"avg by (figure) (finetune_train_figure{{{ONE}}})", "{{figure}}, training"),
                    query(f"avg by (figure, source) (finetune_eval_figure{{{ONE}}})", "{{figure}}, {{source}}"),
                ],
                width=12,
                decimals=4,
                span_nulls=3600000,
                about="Of stages that tell any: accuracy, margins, rewards, F1 …",
            ),
            graph(
                "The method's own numbers",
                [query(f"avg by (figure) (finetune_train_method{{{ONE}}})", "{{figure}}")],
                width=12,
                about="Of methods that tell any, such as the ranks of AdaLoRA.",
            ),
            row("How fast?"),
            graph(
                "Useful tokens/s",
                [query(f"sum(finetune_train_tokens_per_second{{{ONE}}})", "all workers")],
                width=8,
                unit="short",
                min=0,
                calcs=["lastNotNull", "mean", "max"],
            ),
            graph(
                "Model FLOPs utilisation",
                [query(f"avg(finetune_train_mfu_ratio{{{ONE}}})", "MFU")],
                width=8,
                unit="percentunit",
                min=0,
                max=1,
                calcs=["lastNotNull", "mean"],
            ),
            graph(
                "Step time",
                [
                    query(f"histogram_quantile(0.5, {bucket})", "median"),
                    query(f"histogram_quantile(0.9, {bucket})", "90 %"),
                    query(f"histogram_quantile(0.99, {bucket})", "99 %"),
                ],
                width=8,
                unit="s",
                min=0,
                about="A wide gap between median and 99 %: some steps wait for something.",
            ),
            graph(
                "Time waiting for data",
                [query(f"max(rate(finetune_train_data_wait_seconds_total{{{ONE}}}[$__rate_interval]))", "share")],
                width=8,
                unit="percentunit",
                min=0,
                max=1,
                thresholds=steps((None, GREEN), (0.3, RED)),
                threshold_style="dashed",
            ),
            graph(
                "Memory of rank 0",
                [query(f"max by (kind) (finetune_train_memory_bytes{{{ONE}}})", "{{kind}}")],
                width=8,
                unit="bytes",
                min=0,
                calcs=["lastNotNull", "max"],
                about="allocated, peak and reserved: of the GPU. rss: of the process.",
            ),
            graph(
                "Heartbeat age per rank",
                [query(f"max by (rank) (finetune_train_heartbeat_age_seconds{{{ONE}}})", "rank {{rank}}")],
                width=8,
                unit="s",
                min=0,
                calcs=["lastNotNull", "max"],
                about="A rank that grows alone is the one that hangs; the others wait for it.",
            ),
            row("Is it safe?"),
            graph(
                "Checkpoint age",
                [query(f"time() - {operator('finetune_job_checkpoint_timestamp_seconds')}", "age")],
                width=6,
                unit="s",
                min=0,
                calcs=["lastNotNull", "max"],
                fill=20,
                thresholds=steps((None, GREEN), (3600, RED)),
                threshold_style="dashed",
            ),
            graph(
                "Time of a save",
                [query(train("finetune_train_checkpoint_seconds"), "seconds")],
                width=6,
                unit="s",
                min=0,
                about="Training goes on meanwhile.",
            ),
            graph(
                "Size of a checkpoint",
                [query(train("finetune_train_checkpoint_bytes"), "bytes")],
                width=6,
                unit="bytes",
                min=0,
            ),
            graph(
                "Restarts and failed saves",
                [
                    query(operator("finetune_job_restarts"), "restarts"),
                    query(
                        f"sum(increase(finetune_train_checkpoint_failures_total{{{ONE}}}[$__rate_interval]))",
                        "failed saves",
                    ),
                ],
                width=6,
                min=0,
                decimals=0,
                overrides=[
                    override("failed saves", custom__drawStyle="bars", color={"mode": "fixed", "fixedColor": RED})
                ],
            ),
        ],
        annotations=[
            {
                "name": "Restarts",
                "datasource": DATASOURCE,
                "enable": True,
                "hide": False,
                "iconColor": ORANGE,
                "expr": f"changes({of_job('finetune_job_restarts').removeprefix('max(').removesuffix(')')}[1m]) > 0",
                "step": "60s",
                "titleFormat": "Restarted",
                "useValueForTime": False,
            },
            {
                "name": "Checkpoints",
                "datasource": DATASOURCE,
                "enable": False,
                "hide": False,
                "iconColor": BLUE,
                "expr": f"max(finetune_job_checkpoint_timestamp_seconds{{{ONE}}}) * 1000",
                "step": "60s",
                "titleFormat": "Checkpoint",
                "useValueForTime": True,
            },
        ],
        links=[
            {
                "type": "link",
                "title": "Fleet",
                "url": "/d/finetune-fleet?${datasource:queryparam}&${cluster:queryparam}&${__url_time_range}",
                "icon": "arrow-left",
                "asDropdown": False,
                "targetBlank": False,
                "includeVars": False,
                "keepTime": False,
                "tags": [],
                "tooltip": "All jobs",
            }
        ],
    )


DASHBOARDS = {"fleet": fleet(), "job": job()}
