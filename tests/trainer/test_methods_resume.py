"""Every method in whole runs: continued after a crash to the last digit, and the same under every ZeRO stage it claims.

As in ``test_resume.py`` all runs of a gang are made in one start.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api.compatibility import COMPATIBILITY
from tests.trainer import tiny
from tests.trainer.facts import seen
from tests.trainer.methods_cases import CASES, OWN, make_gpt2
from tests.trainer.test_resume import figures, play

pytestmark = pytest.mark.trainer

ONLY_HERE: dict[str, dict[str, Any]] = {
    "bitfit": {"type": "bitfit"},
    # Step 3, from which runs go on, lies in the allocation of the one ...
    "adalora with dropout": {
        "type": "adalora",
        "init_r": 4,
        "target_r": 2,
        "tinit": 1,
        "tfinal": 2,
        "lora_dropout": 0.1,
    },
    # ... and in the end of the other, where only the pattern of ranks counts.
    "adalora at its end": {"type": "adalora", "init_r": 4, "target_r": 2, "tfinal": 3},
}
METHODS = {name: case.method for name, case in CASES.items()} | ONLY_HERE
ONLY_IN_GANGS = {name: case.method for name, case in OWN.items()}
"""Whole runs of these are in ``test_resume.py`` and ``test_methods_own.py``."""
STEPS = 6
SAVED = 3
TYPES = {method["type"]: name for name, method in reversed(METHODS.items())}
"""One case of each type."""


def config_of(root: Path, method: str, folder: str, stage: int = 0, dtype: str = "float32") -> dict[str, Any]:
    model = "gpt2" if method == "bitfit" else "llama"
    threshold = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    # As the operator's plan has it.
    section = dtype == "bfloat16" and (
        stage > 0 or COMPATIBILITY[(METHODS | ONLY_IN_GANGS)[method]["type"]].whole_model
    )
    config = tiny.make_config(
        root,
        model={"uri": f"file://{root}/{model}", "dtype": dtype},
        method=(METHODS | ONLY_IN_GANGS)[method],
        training={"max_steps": STEPS},
        deepspeed={
            "zero_optimization": {"stage": stage, **threshold},
            **({"bf16": {"enabled": True}} if section else {}),
        },
        save_steps=SAVED,
        checkpoint_uri=f"file://{root}/{method}/checkpoints",
        output_uri=f"file://{root}/{folder}/output",
    )
    return config.model_dump(mode="json")


def interrupted(root: Path, name: str) -> list[dict[str, Any]]:
    """An uninterrupted run, and one that goes on from its middle: what was saved later is lost."""
    work = str(root / "work")
    return [
        {"name": f"{name}/whole", "config": config_of(root, name, f"{name}/whole"), "attempt": 1, "work": work}
        | {"weights": True},
        {"name": f"{name}/again", "config": config_of(root, name, f"{name}/again"), "attempt": 2, "work": work}
        | {"lose": STEPS},
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models and their data."""
    root = tmp_path_factory.mktemp("methods-resume")
    tiny.make_model(root / "llama")
    make_gpt2(root / "gpt2")
    tiny.make_rows(root / "train.jsonl", 24, tasks=("first", "second"))
    return root


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, dict[str, Any]]:
    """Every method in one process."""
    return play(root, [plan for name in METHODS for plan in interrupted(root, name)], 1)


@pytest.fixture(scope="module")
def gang(root: Path) -> dict[str, list[float]]:
    """The first losses of every type in two processes: by "type/stage" under all stages of the table, and by
    "type/stage/bfloat16" under the highest one; LoRA+ too, whose rates differ."""
    plan = {}
    for kind, name in TYPES.items():
        stages = COMPATIBILITY[kind].zero_stages
        plan |= {f"{kind}/{stage}": config_of(root, name, "none", stage) for stage in stages}
        plan[f"{kind}/{stages[-1]}/bfloat16"] = config_of(root, name, "none", stages[-1], "bfloat16")
    plan |= {f"{n}/{stage}": config_of(root, n, "none", stage) for n in OWN for stage in COMPATIBILITY[n].zero_stages}
    plan["ln_tuning/0/bfloat16"] = config_of(root, "ln_tuning", "none", 0, "bfloat16")  # float32 norms between
    plan |= {f"lora+/{stage}": config_of(root, "lora+", "none", stage) for stage in (2, 3)}
    path = root / "gang.json"
    # ZeRO-3 last: it leaves a torch.nn.functional.linear behind that knows no autocast.
    path.write_text(json.dumps(dict(sorted(plan.items(), key=lambda item: "/3" in item[0]))))
    environ = tiny.environment(root, tiny.make_config(root))
    environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tiny.free_port())}
    command = [sys.executable, str(Path(__file__).with_name("methods_gang.py")), str(path)]
    processes = []
    for rank in ("0", "1"):
        log = (root / f"gang-{rank}.log").open("w")
        mine = {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(subprocess.Popen(command, env=environ | mine, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait(timeout=900) for process in processes]
    assert codes == [0, 0], (root / "gang-0.log").read_text()[-3000:]
    told: dict[str, list[float]] = json.loads(path.with_name(path.name + ".out").read_text())
    return told


@pytest.mark.parametrize("name", METHODS)
def test_a_run_continues_exactly(name: str, root: Path, alone: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import load_file

    whole, again = alone[f"{name}/whole"], alone[f"{name}/again"]
    assert again.get("progress", {}).get("resumed_from_step") == SAVED, again.get("trace")
    assert figures(again) == figures(whole)
    assert [record.get("rank_total") for record in again["records"]] == [r.get("rank_total") for r in whole["records"]]
    results = [
        {path.name: load_file(path) for path in (root / name / kind / "output").glob("*.safetensors")}
        for kind in ("whole", "again")
    ]
    assert results[0].keys() == results[1].keys() != set()
    for file, tensors in results[0].items():
        assert tensors.keys() == results[1][file].keys()
        assert all(torch.equal(value, results[1][file][key]) for key, value in tensors.items())


@pytest.mark.parametrize("name", METHODS)
def test_only_what_is_trained_moves(name: str, alone: dict[str, Any]) -> None:
    result = alone[f"{name}/whole"]
    assert set(result["moved"]) <= set(result["trained"])
    still = set(result["trained"]) - set(result["moved"])
    assert all("lora_E" in parameter for parameter in still), "AdaLoRA's E begins with 0; a rank taken at once stays so"


@pytest.mark.parametrize("kind", TYPES)
def test_two_processes_learn_the_same_under_every_stage(kind: str, alone: dict[str, Any], gang: dict[str, Any]) -> None:
    reference = list(alone[f"{TYPES[kind]}/whole"]["losses"].values())
    for stage in COMPATIBILITY[kind].zero_stages:
        told = gang[f"{kind}/{stage}"]
        assert told == pytest.approx(reference[: len(told)], rel=2e-5), f"ZeRO-{stage}"
    seen(kind, processes=2, zero=list(COMPATIBILITY[kind].zero_stages))


@pytest.mark.parametrize("kind", OWN)
def test_two_processes_learn_the_same_under_every_stage_here_too(kind: str, gang: dict[str, Any]) -> None:
    for stage in COMPATIBILITY[kind].zero_stages:
        assert gang[f"{kind}/{stage}"] == pytest.approx(gang[f"{kind}/0"], rel=2e-5), f"ZeRO-{stage}"
    seen(kind, processes=2, zero=list(COMPATIBILITY[kind].zero_stages))


@pytest.mark.parametrize("kind", TYPES)
def test_bfloat16_learns_nearly_the_same(kind: str, alone: dict[str, Any], gang: dict[str, Any]) -> None:
    reference = list(alone[f"{TYPES[kind]}/whole"]["losses"].values())
    stages = COMPATIBILITY[kind].zero_stages
    for stage in (0, stages[-1]) if kind == "ln_tuning" else stages[-1:]:
        told = gang[f"{kind}/{stage}/bfloat16"]
        assert told == pytest.approx(reference[: len(told)], abs=0.02), f"ZeRO-{stage}"


def test_lora_plus_learns_the_same_over_zero(alone: dict[str, Any], gang: dict[str, Any]) -> None:
    reference = list(alone["lora+/whole"]["losses"].values())
    for stage in (2, 3):
        told = gang[f"lora+/{stage}"]
        assert told == pytest.approx(reference[: len(told)], rel=2e-5)


def test_two_processes_continue_adalora_exactly(root: Path) -> None:
    """Its memory is in the checkpoint, written by whichever process has the least to write."""
    (root / "two").mkdir()
    for name in ("llama", "train.jsonl"):
        (root / "two" / name).symlink_to(root / name)
    gang = play(root / "two", interrupted(root / "two", "adalora with dropout"), 2)
    assert figures(gang["adalora with dropout/again"]) == figures(gang["adalora with dropout/whole"])


def test_ranks_fall_to_the_target_and_are_told(alone: dict[str, Any], root: Path) -> None:
    told = [record["rank_mean"] for record in alone["adalora/whole"]["records"]]
    assert told[0] == 4.0, "tinit: nothing is taken"
    assert told == sorted(told, reverse=True)
    assert told[-3:] == [2.0, 2.0, 2.0], "target_r, and then tfinal steps"
    assert told[1] > 2.0
    written = json.loads((root / "adalora" / "whole" / "output" / "adapter_config.json").read_text())
    assert sum(sum(pattern) for pattern in written["rank_pattern"].values()) == 2 * 14
    assert written["total_step"] == STEPS
