"""YAML files, their mistakes, and the commands that only look."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from finetune_api import kubeyaml
from finetune_operator import __version__
from finetune_operator.cli import files
from finetune_operator.cli.main import main
from tests.unit.local_runs import Bench, job


def finetune(*arguments: str | Path, stdin: str | None = None) -> Result:
    """One command, in this process."""
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin, catch_exceptions=False)


def spec_of(bench: Bench, *changes: str, cpu: bool = False) -> dict[str, Any]:
    documents, _ = files.load([str(bench.file)], changes, cpu=cpu)
    found: dict[str, Any] = documents[0].job["spec"]
    return found


def test_help_names_every_command_and_both_ways_to_run() -> None:
    text = finetune("--help").output
    assert "finetune run FILE" in text and "kubectl apply -f FILE" in text
    for command in ("run", "validate", "plan", "get", "status", "logs", "suspend", "delete", "operator", "version"):
        assert f"\n  {command} " in text
        assert finetune(command, "--help").exit_code == 0


def test_relative_paths_are_those_of_the_file(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write(job(bench.home, data={"train": [{"uri": "file://../rows.jsonl"}, {"uri": "file:///data/x.jsonl"}]}))
    monkeypatch.chdir("/")
    spec = spec_of(bench)
    assert spec["model"]["uri"] == f"file://{bench.home}/model"
    assert [s["uri"] for s in spec["data"]["train"]] == [
        f"file://{bench.home.parent}/rows.jsonl",
        "file:///data/x.jsonl",
    ]


def test_fields_are_changed_by_set(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write(job(bench.home))
    monkeypatch.chdir(bench.home.parent)
    spec = spec_of(
        bench,
        "training.max_steps=20",
        "spec.data.train[0].uri=file://./mine.jsonl",
        "method={type: full}",
        "evaluation.prompts=[a, 'b: c']",
        "tiny:training.learning_rate=1e-3",
    )
    assert spec["training"] == {"max_steps": 20, "learning_rate": 1e-3}
    assert spec["data"]["train"][0]["uri"] == f"file://{bench.home.parent}/mine.jsonl"
    assert spec["method"] == {"type": "full"}
    assert spec["evaluation"]["prompts"] == ["a", "b: c"]


def test_a_change_of_one_job_leaves_the_others(bench: Bench) -> None:
    bench.write(job(bench.home), job(bench.home, "another"))
    documents, _ = files.load([str(bench.file)], ["another:training.max_steps=5"])
    assert [d.spec.training.max_steps for d in documents] == [-1, 5]


def test_cpu_takes_the_gpus_out(bench: Bench) -> None:
    bench.write(job(bench.home, workers={"replicas": 2, "gpusPerWorker": 8}))
    assert spec_of(bench, cpu=True)["workers"] == {"replicas": 2, "gpusPerWorker": 0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.max_steps", "--set training.max_steps: accepted: [JOB:]field=value, e.g. training.max_steps=20."),
        ("data.train[3].uri=x", "--set data.train[3].uri=x: there is no 3 in data.train[3].uri of job tiny."),
        ("training={a", "--set training={a: the value is not YAML"),
        ("trainin.max_steps=3", "spec.trainin"),
        (
            "another:training.max_steps=5",
            "--set another:training.max_steps=5: there is no job another; accepted: tiny.",
        ),
    ],
)
def test_a_change_that_cannot_be_made_is_told(bench: Bench, change: str, said: str) -> None:
    result = finetune("validate", bench.write(job(bench.home)), "--set", change)
    assert result.exit_code == 2
    assert said in result.stderr


def test_every_mistake_of_every_file_is_told_at_once(bench: Bench) -> None:
    bench.write(
        job(bench.home, "first", training={"learning_rate": -1, "max_step": 3}),
        job(bench.home, "second", model={"uri": "nothing"}),
        job(bench.home, "third"),
        job(bench.home, "third"),
    )
    broken = bench.home / "broken.yaml"
    broken.write_text("a: [1,\nb: }")
    result = finetune("validate", bench.file, broken, bench.home / "missing.yaml")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert result.stdout == ""
    told = [line.removeprefix(f"{bench.home}/") for line in lines]
    assert [line[: line.index(": ", 14)] for line in told[:3]] == [
        "job.yaml: first: spec.training.max_step",
        "job.yaml: first: spec.training.learning_rate",
        "job.yaml: second: spec.model.uri",
    ] or {line.split(": ")[2] for line in told[:3]} == {
        "spec.training.max_step",
        "spec.training.learning_rate",
        "spec.model.uri",
    }
    assert any(line.startswith("broken.yaml: line 2, column") for line in told)
    assert any(line == "missing.yaml: cannot be read: No such file or directory." for line in told)
    assert any("third: given 2 times" in line for line in told)
    assert len(lines) == 6


def test_a_file_without_a_job_is_a_mistake(bench: Bench) -> None:
    bench.file.write_text("kind: ConfigMap\n")
    result = finetune("validate", bench.file)
    assert result.exit_code == 2
    assert (
        "no FineTuneJob in it, only ConfigMap; accepted: kind: FineTuneJob of finetune.dev/v1alpha1." in result.stderr
    )
    bench.file.write_text("")
    assert "no FineTuneJob in it; accepted" in finetune("validate", bench.file).stderr


def test_what_is_passed_over_is_told(bench: Bench) -> None:
    result = finetune("validate", bench.write(job(bench.home), {"apiVersion": "v1", "kind": "ConfigMap"}))
    assert result.exit_code == 0
    assert result.stderr == f"# {bench.file}: ConfigMap passed over; only FineTuneJob is read.\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "FinetuneJob"}, 'second: kind: "FinetuneJob" is not accepted; accepted: FineTuneJob'),
        ({"kind": "TrainingJob"}, 'second: kind: "TrainingJob" is not accepted'),
        ({"kind": None}, "second: kind: it is missing"),
        ({"apiVersion": None}, "second: apiVersion: it is missing"),
        ({"apiVersion": "finetune.dev/v1"}, 'second: apiVersion: "finetune.dev/v1" is not accepted'),
        ({"metadata": "nope"}, '(no name): metadata: "nope" is not accepted'),
    ],
    ids=str,
)
def test_a_misspelt_job_is_not_passed_over(bench: Bench, change: dict[str, Any], said: str) -> None:
    result = finetune("validate", bench.write(job(bench.home), {**job(bench.home, "second"), **change}))
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_file_is_read_as_kubectl_reads_it(bench: Bench) -> None:
    metadata = "name: tiny\n  labels: {day: 2026-01-01}\n  annotations: {at: 12:30}"
    text = yaml.safe_dump(job(bench.home)).replace("name: tiny", metadata)
    bench.file.write_text(text + "  training: {max_steps: 0o17, learning_rate: 2e-4, num_train_epochs: 08}\n")
    assert finetune("validate", bench.file).exit_code == 0
    documents, _ = files.load([str(bench.file)])
    read = documents[0].job["metadata"]
    assert (read["labels"], read["annotations"]) == ({"day": "2026-01-01"}, {"at": "12:30"})
    assert (documents[0].spec.training.max_steps, documents[0].spec.training.num_train_epochs) == (15, 8.0)
    bench.file.write_text(
        text + "  data: {train: [{uri: file://./train.jsonl, columns: {x: prompt, y: completion}}]}\n"
    )
    refused = finetune("validate", bench.file)
    assert refused.exit_code == 2 and "the key data stands twice in one map" in refused.stderr
    changed = "data.train[0].columns={x: prompt, y: completion}"
    assert (
        "spec.data.train[0].columns[true]: "
        in finetune("validate", bench.write(job(bench.home)), "--set", changed).stderr
    )


def test_what_is_planned_reads_the_same_again(bench: Bench) -> None:
    env = [{"name": "SWITCH", "value": "y"}, {"name": "MODE", "value": "0o17"}]
    template = {"spec": {"containers": [{"name": "trainer", "env": env}]}}
    bench.write(job(bench.home, workers={"replicas": 1, "gpusPerWorker": 0, "template": template}))
    made = kubeyaml.load(finetune("plan", bench.file).stdout)
    assert all(variable in made[-1]["spec"]["template"]["spec"]["containers"][0]["env"] for variable in env)


def test_a_key_that_stands_twice_is_told_with_its_place(bench: Bench) -> None:
    bench.file.write_text(yaml.safe_dump(job(bench.home)) + "kind: FineTuneJob\n")
    result = finetune("validate", bench.file)
    assert result.exit_code == 2
    assert "column 1 is not YAML: the key kind stands twice in one map." in result.stderr


def test_validate_knows_the_profiles_it_is_given(bench: Bench) -> None:
    bench.write(job(bench.home, profile="nvida"))
    result = finetune("validate", bench.file)
    assert result.exit_code == 0
    assert result.stderr == "# Profile nvida is not checked; --profile-file gives the cluster's profiles.\n"
    profiles = bench.home / "profiles.yaml"
    profiles.write_text("profiles: {nvidia: {}}")
    result = finetune("validate", bench.file, "--profile-file", profiles)
    assert result.exit_code == 2
    assert result.stderr == (
        f'{bench.file}: tiny: spec.profile: "nvida" is not accepted; accepted: one of default, nvidia; '
        "remedy: did you mean nvidia?\n"
    )
    bench.write(job(bench.home, profile="nvidia"))
    assert finetune("validate", bench.file, "--profile-file", profiles).stderr == ""


def test_standard_input_and_lists_are_read(bench: Bench) -> None:
    text = yaml.safe_dump({"kind": "List", "items": [job(bench.home), job(bench.home, "second")]})
    result = finetune("validate", "-", stdin=text)
    assert result.stdout == "-: tiny: valid\n-: second: valid\n"


def test_the_plan_is_what_the_operator_would_make(bench: Bench) -> None:
    bench.write(
        job(bench.home, workers={"replicas": 2, "gpusPerWorker": 8}),
        job(bench.home, "second", model={"uri": "job://tiny"}),
    )
    result = finetune("plan", bench.file)
    assert result.exit_code == 0
    made = list(yaml.safe_load_all(result.stdout))
    assert [m["kind"] for m in made] == ["ConfigMap", "Service", "NetworkPolicy", "Job"] * 2
    trainer = made[3]["spec"]["template"]["spec"]["containers"][0]
    assert trainer["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert "(output of job://tiny)" in made[4]["data"]["config.json"]
    assert "&id" not in result.stdout


def test_profiles_come_from_a_file_and_unknown_ones_are_told(bench: Bench) -> None:
    bench.write(job(bench.home, profile="h100"))
    result = finetune("plan", bench.file)
    assert result.exit_code == 0
    assert "Profile h100 is not known here; the default is used" in result.stderr
    profiles = bench.home / "profiles.yaml"
    profiles.write_text("profiles: {h100: {image: mine}}")
    result = finetune("plan", bench.file, "--profile-file", profiles)
    assert list(yaml.safe_load_all(result.stdout))[3]["spec"]["template"]["spec"]["containers"][0]["image"] == "mine"
    profiles.write_text("profiles: {h100: {imag: mine}}")
    result = finetune("plan", bench.file, "--profile-file", profiles)
    assert result.exit_code == 2
    assert "profiles.h100.imag" in result.stderr


CHART_VALUES = Path(__file__).parents[2] / "charts" / "finetune-operator" / "values.yaml"


def trainer_pod(bench: Bench, values: Path) -> Any:
    result = finetune("plan", bench.file, "--profile-file", values)
    assert (result.exit_code, result.stderr) == (0, "")
    return list(yaml.safe_load_all(result.stdout))[3]["spec"]["template"]["spec"]


def test_profiles_come_from_helm_values_as_the_chart_makes_them(bench: Bench) -> None:
    bench.write(job(bench.home, profile="nvidia"))
    spec = trainer_pod(bench, CHART_VALUES)
    assert spec["containers"][0]["image"] == f"finetune-trainer:{__version__}"
    assert "nvidia.com/gpu" in [toleration["key"] for toleration in spec["tolerations"]]
    values = bench.home / "values.yaml"
    image = {"registry": "mirror/", "tag": "one", "digest": "sha256:1", "pullPolicy": "Always"}
    trainer = {"image": image, "imagePullSecrets": [{"name": "pull"}]}
    own = {"template": {"spec": {"imagePullSecrets": [{"name": "own"}]}}}
    values.write_text(yaml.safe_dump({"trainer": trainer, "profiles": {"cpu": None, "nvidia": own}, "replicas": 3}))
    spec = trainer_pod(bench, values)
    assert spec["containers"][0]["image"] == "mirror/finetune-trainer@sha256:1"
    assert spec["containers"][0]["imagePullPolicy"] == "Always"
    assert spec["imagePullSecrets"] == [{"name": "pull"}, {"name": "own"}]
    bench.write(job(bench.home))
    values.write_text("trainer: {image: {tag: two}}")
    assert trainer_pod(bench, values)["containers"][0]["image"] == "finetune-trainer:two"


@pytest.mark.parametrize("text", ["profile: {h100: {}}", "[]", "replicas: 3"])
def test_a_file_without_profiles_is_refused_with_the_remedy(bench: Bench, text: str) -> None:
    bench.write(job(bench.home))
    values = bench.home / "values.yaml"
    values.write_text(text)
    result = finetune("plan", bench.file, "--profile-file", values)
    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"{values}: there are no profiles in it; accepted: the operator's settings, or Helm"
    )


def test_there_is_nothing_to_show_of_what_was_not_run(bench: Bench) -> None:
    assert finetune("get", "--state-dir", bench.state).output == f"No runs in {bench.state}.\n"
    result = finetune("logs", "tiny", "--state-dir", bench.state)
    assert result.exit_code == 2
    assert result.stderr == f"There is no run tiny in {bench.state}/default; there: none.\n"


def test_version() -> None:
    assert finetune("version").output == f"{__version__}\n"
    assert finetune("--version").output == f"finetune, version {__version__}\n"


def test_summaries_are_not_cut_in_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["--help"], ["data", "--help"]):
        text = CliRunner().invoke(main, arguments, terminal_width=80).output
        assert "..." not in text.partition("Commands:")[2]


def test_mistakes_in_the_operator_s_settings_are_told_without_a_traceback(bench: Bench) -> None:
    settings = bench.home / "settings.yaml"
    settings.write_text("profiles:\n  nvidia: {imag: x, cache: {claimNam: y}}\nlogLevel: loud\nwokers: 3\n")
    result = finetune("operator", "--config", settings)
    assert result.exit_code == 2
    told = dict(line.removeprefix(f"{settings}: ").split(": ", 1) for line in result.stderr.splitlines())
    assert told["profiles.nvidia.imag"].endswith("; remedy: did you mean image?")
    assert told["profiles.nvidia.cache.claimNam"].endswith(
        "one of claimName, sizeLimit; remedy: did you mean claimName?"
    )
    assert told["wokers"].endswith("; remedy: did you mean workers?")
    assert told["logLevel"].startswith('"loud" is not accepted: Input should be')
    settings.write_text("profiles: [")
    assert "cannot be read" in finetune("operator", "--config", settings).stderr
