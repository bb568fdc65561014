"""``finetune``: the commands and their options. Each one is thin; the work is in the modules beside this one.

Exit codes: 0 succeeded, 1 failed, 2 what was given has mistakes, 130 interrupted.
"""

import contextlib
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, get_args

import click
import yaml
from rich.console import Console
from rich.table import Table

from finetune_api.causes import Cause
from finetune_api.conditions import Condition, State
from finetune_api.kubeyaml import Dumper
from finetune_api.run import FETCH_CONTAINER, TRAINER_CONTAINER, ChatConfig, Combination, EvaluateConfig
from finetune_api.status import FineTuneJobStatus
from finetune_operator import __version__, manifests
from finetune_operator.cli import files, results, use
from finetune_operator.cli import merge as merging
from finetune_operator.cli import methods as method_table
from finetune_operator.cli.display import Plain, Terminal
from finetune_operator.cli.files import Document, RefusedError
from finetune_operator.cli.fresh import Choice
from finetune_operator.cli.preview import job_for
from finetune_operator.cli.preview import preview as show
from finetune_operator.cli.run import Runner, needs, needs_trainer, prepare, status_of
from finetune_operator.cluster import Object
from finetune_operator.cluster.local import Key, LocalCluster
from finetune_operator.cluster.store import Folder, folders, tail
from finetune_operator.observe import parse_time
from finetune_operator.plan import Owner, make_plan, waited_for
from finetune_operator.status import condition, duration

FAILED, MISTAKES, INTERRUPTED = 1, 2, 130

F = TypeVar("F", bound=Callable[..., Any])


class _Destroying(click.Option):
    """An option that may take away what a run has made: nobody is led to it by a guess."""


class _Main(click.Group):
    """Prints mistakes one per line, and nothing else of an exception that is meant for the user."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            known = {name: option for option in error.ctx.command.params for name in option.opts} if error.ctx else {}
            meant = [name for name in error.possibilities or () if not isinstance(known.get(name), _Destroying)]
            raise click.NoSuchOption(error.option_name, error.message, meant, error.ctx) from error
        except click.NoSuchCommand as error:
            meant = [name for name in error.possibilities or () if name != "delete"]
            raise click.NoSuchCommand(error.command_name, error.message, meant, error.ctx) from error
        except RefusedError as refused:
            for mistake in refused.mistakes:
                click.echo(mistake, err=True)
            ctx.exit(MISTAKES)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="finetune")
def main() -> None:
    """Fine-tune language models: one file says what, on which data, and where the result goes.

    On this machine, without Kubernetes:   finetune run FILE

    On a cluster with the operator:        kubectl apply -f FILE

    The file is the same. get, status, logs, suspend and delete are about runs of this machine.
    """


_files = click.argument("files", nargs=-1, required=True, metavar="FILE...")
_set = click.option(
    "--set", "changes", multiple=True, metavar="[JOB:]FIELD=VALUE",
    help="Change a field of the spec, e.g. training.max_steps=20 or data.train[0].uri=file://./mine.jsonl.",
)  # fmt: skip
_cpu = click.option("--cpu", is_flag=True, help="Train on the CPU: spec.workers.gpusPerWorker is taken as 0.")
_state_dir = click.option(
    "--state-dir", type=click.Path(path_type=Path, file_okay=False), default=Path(".finetune"), show_default=True,
    envvar="FINETUNE_STATE_DIR", help="Folder for state and logs of local runs.",
)  # fmt: skip
_namespace = click.option("-n", "--namespace", default="default", show_default=True, help="Namespace of the job.")
_profiles = click.option(
    "--profile-file", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Profiles that spec.profile may name: a file as for finetune operator --config, or the chart's values.",
)  # fmt: skip


# --- running --------------------------------------------------------------------------------------------------


@main.command()
@_files
@_set
@_cpu
@_state_dir
@_profiles
@click.option(
    "--fresh", is_flag=True, cls=_Destroying,
    help="Begin at step 0. What earlier runs of these jobs left here is moved aside; a terminal is asked.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint, as is done in any case.")
@click.option("--plain", is_flag=True, help="Plain lines, also in a terminal.")
def run(
    files: tuple[str, ...],
    changes: tuple[str, ...],
    cpu: bool,
    state_dir: Path,
    profile_file: Path | None,
    fresh: bool,
    resume: bool,
    plain: bool,
) -> None:
    """Train what FILE says on this machine, and wait for it.

    Pods are processes, storage may be file://, and everything else is as on a cluster: workers that fail are restarted
    from the newest checkpoint, and job:// inputs are trained first. Paths like file://./data.jsonl are relative to
    the file they stand in. Storage credentials are taken from your environment (AWS_ACCESS_KEY_ID, HF_TOKEN ...).

    Ctrl-C saves a checkpoint and stops; the same command (without --fresh) goes on from there. Ctrl-C twice stops at
    once.
    """
    if fresh and resume:
        raise RefusedError(["--fresh begins at step 0, --resume goes on: accepted is one."])
    documents, notes = _load(files, changes, cpu)
    settings, more = _settings(profile_file, documents)
    needs_trainer()
    console = Console(highlight=False, soft_wrap=True)
    view = Terminal(console) if console.is_terminal and not plain else Plain(click.echo)
    cluster = LocalCluster(state_dir, told=view.told)
    try:
        for note in [*notes, *more]:
            view.say(note)
        runner = Runner(cluster, settings, prepare(cluster, documents, view.say, _what_to_do if fresh else None), view)
        with view, _stopping(runner, view.say):
            runner.run()
    except OSError as error:
        raise RefusedError([f"{error.filename or state_dir}: {error.strerror or error}."]) from error
    finally:
        cluster.close()
    sys.exit(_outcome(documents, cluster, bool(runner.interruptions), fresh))


def _what_to_do(left: str) -> Choice:
    """Ask at a terminal what becomes of an earlier run; elsewhere it is kept."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return Choice.KEEP
    click.echo(left, err=True)
    choices = click.Choice([str(choice) for choice in Choice])
    question = "Keep it in a folder beside, delete it, or cancel?"
    return Choice(click.prompt(question, type=choices, default=str(Choice.KEEP), err=True))


@contextlib.contextmanager
def _stopping(runner: Runner, say: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal ask the runner to stop."""

    def stop(number: int, frame: FrameType | None) -> None:
        if runner.interruptions == 0:
            say("Stopping: checkpoints are saved first. Once more stops at once, without them.")
        runner.interrupt()

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(documents: Sequence[Document], cluster: LocalCluster, interrupted: bool, fresh: bool) -> int:
    """Tell what came of every job; the exit code."""
    same = "The same command without --fresh" if fresh else "The same command"
    states, causes = [], []
    for document in documents:
        folder = cluster.folder(*document.key)
        status = status_of(folder.job)
        states.append(status.state)
        causes += [attempt.cause for attempt in status.attempts[-1:]]
        resting = status.state == State.SUSPENDED and not document.spec.suspend
        if resting or (interrupted and status.state not in (State.SUCCEEDED, State.FAILED)):
            click.echo(results.stopped(document.key[1], document.spec, status))
        else:
            results.tell(document.key[1], document.spec, status, folder, click.echo)
            _why_not(status)
    if all(state == State.SUCCEEDED for state in states):
        return 0
    if interrupted or State.SUSPENDED in states:
        click.echo(f"{same} goes on from there.")
    if interrupted:
        return INTERRUPTED
    if State.FAILED in states:
        click.echo(f"\n{same}, when the cause is mended, tries again from the newest checkpoint.")
        if Cause.CHECKPOINT_MISMATCH in causes:
            click.echo("To train on from it with what has changed, add: --set checkpoint.resume=always")
    return FAILED


_EXPLAINED_BY = {
    State.WAITING: Condition.INPUTS_READY,
    State.SUSPENDED: Condition.SUSPENDED,
    State.INVALID: Condition.ACCEPTED,
}


def _why_not(status: FineTuneJobStatus) -> None:
    """Why a job that is neither done nor failed does not run."""
    kind = _EXPLAINED_BY.get(State(status.state or State.PENDING))
    found = condition(status, kind) if kind else None
    if found is not None:
        click.echo(f"  {found.message}")


# --- looking at files -----------------------------------------------------------------------------------------


@main.command(short_help="Check FILE as the operator would: every mistake at once.")
@_files
@_set
@_cpu
@_profiles
def validate(files: tuple[str, ...], changes: tuple[str, ...], cpu: bool, profile_file: Path | None) -> None:
    """Check FILE as the operator would: every mistake at once, one per line. Exit code 2 where there is one.

    Nothing is fetched and no cluster is asked: whether models, data, Secrets and claims are there shows when the job
    runs. Unlike a cluster, finetune also takes file://./PATH.
    """
    documents, notes = _load(files, changes, cpu)
    for note in [*notes, *_checked(profile_file, documents)]:
        click.echo(f"# {note}", err=True)
    for document in documents:
        click.echo(f"{document.source}: {document.key[1]}: valid")


@main.command(short_help="Print the Kubernetes objects the operator would make.")
@_files
@_set
@_cpu
@_profiles
def plan(files: tuple[str, ...], changes: tuple[str, ...], cpu: bool, profile_file: Path | None) -> None:
    """Print, as YAML, the objects the operator would make for FILE, with every default resolved."""
    documents, notes = _load(files, changes, cpu)
    settings, more = _settings(profile_file, documents)
    for note in [*notes, *more]:
        click.echo(f"# {note}", err=True)
    made: list[Object] = []
    for document in documents:
        namespace, name = document.key
        metadata = document.job["metadata"]
        given = (metadata.get("labels") or {}, metadata.get("annotations") or {})
        owner = Owner(namespace, name, "00000000-0000-0000-0000-000000000000", *given)
        inputs = {uri: f"(output of {uri})" for uri in waited_for(document.spec)}
        found = make_plan(owner, document.spec, settings.profiles[document.spec.profile], inputs)
        made += [manifests.config_map(found), manifests.service(found)]
        made += [manifests.network_policy(found)] if found.profile.network_policy else []
        made += manifests.pod_groups(found)
        made.append(manifests.job(found, 1))
    click.echo(yaml.dump_all(made, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120), nl=False)


@main.command(short_help="List the fine-tuning methods, or tell all about one.")
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the fine-tuning methods: their size, and what they go with. With NAME: all about one of them."""
    if name is None:
        table, reasons = method_table.table()
        Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
        for reason in reasons:
            click.echo(reason)
        click.echo("finetune methods NAME says what a method is, when to choose it, and its parameters.")
        return
    for line, indent in method_table.page(name):
        click.echo(click.wrap_text(line.lstrip(), 100, line[: len(line) - len(line.lstrip())], " " * indent))


@main.command(name="merge", short_help="Merge adapters into their model, or into one adapter.")
@click.option("--base", required=True, metavar="URI", help="The model the adapters were trained on.")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit of an hf:// base.")
@click.option("--gguf-file", default="", metavar="NAME", help="Of a base in GGUF; or name the file in --base.")
@click.option(
    "--adapter", "adapters", multiple=True, required=True, metavar="URI[=WEIGHT]",
    help="An adapter; several are added up by their weights (LoRA only). A negative weight takes it away.",
)  # fmt: skip
@click.option("--output", required=True, metavar="URI", help="Folder of the result.")
@click.option(
    "--as", "kind", type=click.Choice(["model", "adapter"]), default="model", show_default=True,
    help="Write a whole model, or one adapter that stands for all.",
)  # fmt: skip
@click.option(
    "--combination", type=click.Choice(get_args(Combination)), default="cat", show_default=True,
    help="How several become one (PEFT's add_weighted_adapter): cat and svd (of full rank) are exact sums.",
)  # fmt: skip
@click.option("--density", type=click.FloatRange(0, 1, min_open=True), help="Share of the values that ties, dare keep.")
@click.option("--rank", type=click.IntRange(1), help="Rank of the result, with svd. Default: the largest of them.")
@click.option("--modules", default="", metavar="REGEX", help="Change only layers in whose name this is found.")
@click.option(
    "--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto", show_default=True,
    help="Number format to compute in and to write; auto: that of the base.",
)  # fmt: skip
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest safetensors file.")
@click.option("--seed", type=int, default=42, show_default=True, help="Of the dare combinations.")
def merge_(
    base: str,
    revision: str,
    adapters: tuple[str, ...],
    output: str,
    gguf_file: str,
    **options: str | float | int | None,
) -> None:
    """Merge adapters into the model they were trained on, or into one adapter.

    \b
    finetune merge --base hf://ORG/NAME --adapter s3://team/a --output ./merged
    finetune merge --base ./base --adapter ./a=0.7 --adapter ./b=0.3 --combination ties --density 0.5 --output ./ab
    finetune merge --base ./model-with-a --adapter ./a=-1 --adapter ./b --output ./model-with-b
    finetune merge --base hf://ORG/NAME --adapter ./a --modules 'layers\\.(2[0-9])\\.' --output ./last-layers

    URIs are hf:// s3:// gs:// az:// file://, or a path of this machine. It is done on the CPU, in memory for the whole
    model. Exit code 64 where what was given does not fit together.
    """
    config = merging.configuration(base, revision, adapters, output, gguf_file, **options)
    needs_trainer()
    code = merging.run(config)
    if code == 0:
        click.echo(f"Next: finetune chat {output}")
    sys.exit(code)


def _of_a_model(command: F) -> F:
    """The options that say which finished model, for what uses one."""
    for option in reversed(
        (
            click.argument("model"),
            click.option(
                "--adapter", "adapters", multiple=True, metavar="URI",
                help="On top of MODEL; several in the order they were trained.",
            ),
            click.option("--base", default="", metavar="URI", help="The model below, where MODEL does not say."),
            click.option("--revision", default="", help="Branch, tag or commit of an hf:// model."),
            click.option("--gguf-file", default="", metavar="NAME", help="Of a model in GGUF."),
            click.option("--chat-template", default="", help="Name or Jinja text; default: the tokenizer's own."),
            click.option("--compare", is_flag=True, help="Beside it, the same without its (last) adapter."),
            click.option("--cpu", is_flag=True, help="Use no GPU."),
            _namespace,
            _state_dir,
        )
    ):  # fmt: skip
        command = option(command)
    return command


@main.command(short_help="Tell the loss and other figures of a finished model.")
@_of_a_model
@click.option("--data", "rows", multiple=True, required=True, metavar="URI", help="Rows, as spec.data.eval names them.")
@click.option("--format", "form", default="auto", show_default=True, help="Of the rows.")
@click.option("--column", "columns", multiple=True, metavar="THEIRS=OURS", help="A column with another name.")
@click.option("--split", default="train", show_default=True, help="Of a data set of the hub.")
@click.option("--stage", help="What the rows are for. Default: the stage MODEL was trained by, else sft.")
@click.option("--max-length", type=click.IntRange(16), default=2048, show_default=True, help="Longest row in tokens.")
@click.option("--max-bad-rows", type=click.IntRange(0), default=0, show_default=True, help="That may be left out.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Rows of a forward pass.")
@click.option(
    "--perplexity-position",
    "perplexity_positions",
    multiple=True,
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Tell the perplexity up to here by itself, too; several: of each stretch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    model: str, adapters: tuple[str, ...], base: str, revision: str, gguf_file: str, cpu: bool, namespace: str,
    state_dir: Path, rows: tuple[str, ...], form: str, columns: tuple[str, ...], split: str, **options: object,
) -> None:  # fmt: skip
    """Tell the figures of a finished model on given rows: loss, perplexity, and what its stage tells.

    \b
    finetune evaluate ./out/self-cognition --data ./heldout.jsonl --compare
    finetune evaluate hf://ORG/NAME --adapter s3://team/models/x --data s3://team/a.jsonl --data s3://team/b.jsonl
    finetune evaluate job://classifier --data ./test.csv --column review=text --column stars=label

    MODEL is a whole model, or an adapter's folder (what a run has written says its base): hf:// s3:// gs:// az://
    file://, a path, or job://NAME for a run of this machine.
    """
    renamed = dict(column.partition("=")[::2] for column in columns)
    sources: list[dict[str, Any]] = [{"uri": one, "format": form, "columns": renamed} for one in rows]
    sources = [one | ({"split": split} if one["uri"].startswith("hf://") else {}) for one in sources]
    config = use.configuration(
        EvaluateConfig, model, adapters, base, revision, gguf_file, (state_dir, namespace),
        data=sources, accelerator="cpu" if cpu else "auto", **options,
    )  # fmt: skip
    needs_trainer()
    sys.exit(use.run(config))


@main.command()
@_of_a_model
@click.option("--system", default="", help="System prompt.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0: the most probable words."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0: from all tokens.")
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=int, help="To have the same answers again.")
def chat(
    model: str, adapters: tuple[str, ...], base: str, revision: str, gguf_file: str, cpu: bool, namespace: str,
    state_dir: Path, **options: object,
) -> None:  # fmt: skip
    """Talk with a finished model: a whole one, or an adapter. With --compare the model without its adapter answers
    beside it.

    \b
    finetune chat ./out/self-cognition --compare
    finetune chat hf://ORG/NAME --adapter s3://team/models/x --temperature 0
    printf 'Who are you?\\nAnd who made you?\\n' | finetune chat job://self-cognition

    Not in a terminal, every line of standard input is what the user says next. MODEL is as for finetune evaluate.
    """
    config = use.configuration(
        ChatConfig, model, adapters, base, revision, gguf_file, (state_dir, namespace),
        accelerator="cpu" if cpu else "auto", **options,
    )  # fmt: skip
    needs_trainer()
    sys.exit(use.run(config))


@main.group()
def data() -> None:
    """Look at training data."""


@data.command(short_help="Show what the job in FILE would learn, before it does.")
@_files
@_set
@click.option("--rows", type=click.IntRange(0), default=3, show_default=True, help="Rows shown of every source.")
@click.option("--model", default="", metavar="URI", help="Whose tokenizer to use, where FILE is rows and no job.")
@click.option("--stage", default="sft", show_default=True, help="What is to be learned, where FILE is rows.")
def preview(files: tuple[str, ...], changes: tuple[str, ...], rows: int, model: str, stage: str) -> None:
    """Show what the job in FILE would learn, before it does: rows as the model sees them, what is not learned dimmed,
    how long they are, what is cut, dropped or refused, and how much an epoch is.

    FILE is a job, or a file of rows (any that spec.data.train takes; then name a --model). Nothing is trained; weights
    are not fetched. The tokens stay in the cache for the run.
    """
    needs_trainer()
    with tempfile.TemporaryDirectory() as folder:
        paths: list[str] = []
        for number, path in enumerate(files):
            job = Path(folder) / f"{number}.yaml"
            if path != "-" and Path(path).suffix not in (".yaml", ".yml"):
                job.write_text(job_for(path, model, stage))
                path = str(job)
            paths.append(path)
        documents, _ = _load(paths, changes, False)
    color = sys.stdout.isatty()
    codes = []
    for document in documents:
        if len(documents) > 1:
            click.echo(f"--- {document.key[1]}")
        codes.append(show(document, documents, rows, color))
    if not any(codes) and list(files) == paths:
        changed = [f"--set {shlex.quote(change)}" for change in changes]
        click.echo(f"\nNext: finetune run {' '.join([*files, *changed])}")
    sys.exit(max(codes, default=0))


def _load(paths: Sequence[str], changes: Sequence[str], cpu: bool) -> tuple[list[Document], list[str]]:
    return files.load(paths, changes, cpu=cpu)


def _settings(path: Path | None, documents: Sequence[Document]) -> tuple[files.Settings, list[str]]:
    return files.settings(path, documents)


def _checked(path: Path | None, documents: Sequence[Document]) -> list[str]:
    return files.check_profiles(path, documents)


# --- runs of this machine -------------------------------------------------------------------------------------


@main.command()
@_state_dir
def get(state_dir: Path) -> None:
    """List the runs of this machine."""
    found = folders(state_dir)
    if not found:
        click.echo(f"No runs in {state_dir}.")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("NAME", "STATE", "PROGRESS", "STEP", "LOSS", "ETA", "CHECKPOINT", "RESTARTS", "AGE"):
        table.add_column(title, no_wrap=True)
    for folder in found:
        table.add_row(*_row(folder))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _row(folder: Folder) -> list[str]:
    job = folder.job or {}
    status, shown = status_of(job), status_of(job).progress
    return [
        folder.path.name,
        status.state,
        shown.percent if shown else "",
        f"{shown.step}/{shown.max_steps}" if shown and shown.max_steps else "",
        shown.loss if shown else "",
        shown.eta if shown else "",
        _age(status.last_checkpoint_time),
        str(status.restarts),
        _age(job.get("metadata", {}).get("creationTimestamp")),
    ]


def _age(moment: str | None) -> str:
    began = parse_time(moment)
    return duration((datetime.now(UTC) - began).total_seconds()) if began else ""


@main.command()
@click.argument("name")
@_namespace
@_state_dir
def status(name: str, namespace: str, state_dir: Path) -> None:
    """Print the whole status of a run of this machine, as YAML."""
    job = _found(state_dir, namespace, name).job or {}
    click.echo(yaml.dump(job.get("status") or {}, Dumper=Dumper, sort_keys=False, allow_unicode=True), nl=False)


@main.command()
@click.argument("name")
@_namespace
@_state_dir
@click.option("--attempt", type=int, help="Of this attempt; default: the newest.")
@click.option("--worker", type=int, default=0, show_default=True, help="Of the worker with this number.")
@click.option("--lines", type=int, default=1000, show_default=True, help="That many, from the end.")
@click.option("-f", "--follow", is_flag=True, help="Go on as they come, until the worker has ended.")
def logs(
    name: str, namespace: str, state_dir: Path, attempt: int | None, worker: int, lines: int, follow: bool
) -> None:
    """Print the logs of a worker of this machine."""
    folder = _found(state_dir, namespace, name)
    attempts = status_of(folder.job).attempts
    number = attempt or (attempts[-1].number if attempts else 1)
    pod = f"{manifests.job_name(name, number)}-{worker}"
    paths = [folder.log(pod, container) for container in (FETCH_CONTAINER, TRAINER_CONTAINER)]
    if not any(path.exists() for path in paths):
        raise RefusedError([f"There is no log of worker {worker} in attempt {number} of {name} ({paths[1]})."])
    for path in paths:
        for line in tail(path, lines, limit=1 << 26):
            click.echo(line)
    if follow:
        _follow(folder, pod, paths[1])


def _follow(folder: Folder, pod: str, path: Path) -> None:
    place = path.stat().st_size if path.exists() else 0
    while True:
        # Looked at before reading: what is written before the end is read.
        alive = ((folder.get("Pod", pod) or {}).get("status") or {}).get("phase") in ("Pending", "Running")
        if path.exists():
            with path.open("rb") as file:
                file.seek(place)
                text = file.read()
            place += len(text)
            click.echo(text.decode(errors="replace"), nl=False)
        if not alive:
            return
        time.sleep(0.3)


@main.command(short_help="Ask a run of this machine to save a checkpoint and stop.")
@click.argument("name")
@_namespace
@_state_dir
def suspend(name: str, namespace: str, state_dir: Path) -> None:
    """Ask a run of this machine to save a checkpoint and stop; finetune run goes on with it."""
    folder = _found(state_dir, namespace, name)
    state = status_of(folder.job).state
    if state in (State.SUCCEEDED, State.FAILED, State.INVALID):
        click.echo(f"{name} has ended ({state}): there is nothing to stop.")
    elif folder.claim():
        folder.release()
        click.echo(f"{name} is not running: there is nothing to stop. finetune run goes on with it.")
    else:
        LocalCluster(state_dir).set_suspended(*_key(folder), True)
        click.echo(f"{name} is asked to save a checkpoint and stop.")


@main.command()
@click.argument("name")
@_namespace
@_state_dir
def delete(name: str, namespace: str, state_dir: Path) -> None:
    """Forget a run of this machine: its state and logs. Outputs and checkpoints stay where they are."""
    folder = _found(state_dir, namespace, name)
    if not folder.claim():
        raise RefusedError([f"{name} is running. Stop it first: finetune suspend {name}"])
    shutil.rmtree(folder.path)
    click.echo(f"{name} is forgotten.")


def _found(state_dir: Path, namespace: str, name: str) -> Folder:
    folder = Folder(state_dir / namespace / name)
    if folder.job is None:
        known = ", ".join(f.path.name for f in folders(state_dir)) or "none"
        raise RefusedError([f"There is no run {name} in {state_dir}/{namespace}; there: {known}."])
    return folder


def _key(folder: Folder) -> Key:
    return folder.path.parent.name, folder.path.name


# --- the rest -------------------------------------------------------------------------------------------------


@main.command(short_help="Run the operator, against a cluster.")
@click.option(
    "--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The operator's settings, YAML."
)
def operator(config: Path | None) -> None:
    """Run the operator against the cluster of this pod or of KUBECONFIG."""
    needs("operator", "kopf", "kubernetes", "prometheus_client")
    from finetune_operator import handlers

    handlers.main(files.operator_settings(config))


@main.command(short_help="Print the version.")
def version() -> None:
    """Print the version."""
    click.echo(__version__)


if __name__ == "__main__":
    main()
