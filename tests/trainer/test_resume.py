"""A run that dies and is run again gives what an uninterrupted one gives, to the last digit.

Whole jobs, in gangs of one and two processes (``harness.py``); one gang runs all its jobs, because imports are most
of the time. A crash here leaves what kill -9 leaves: the storage. ``test_launch.py`` kills for real.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.storage import Store
from tests.trainer import tiny

DROPOUT = {"method": {"type": "lora", "r": 4, "lora_dropout": 0.1}, "training": {"neftune_noise_alpha": 5.0}}
PACKED = {"data": {"packing": True}, "training": {"gradient_checkpointing": True}}
BF16 = {"model": {"dtype": "bfloat16"}, "method": {"type": "full"}}


def full(stage: int, **more: Any) -> dict[str, Any]:
    """Full fine-tuning under a ZeRO stage."""
    return tiny.merge({"method": {"type": "full"}, "deepspeed": {"zero_optimization": {"stage": stage}}}, more)


ALONE: dict[str, dict[str, Any]] = {
    "lora, dropout and noise": DROPOUT,
    "lora, packed and checkpointed": tiny.merge(DROPOUT, PACKED),
    "full, ZeRO-2": full(2),
    "full, ZeRO-3, packed and checkpointed": full(3, **PACKED),
    "full in bf16, no ZeRO": tiny.merge(BF16, {"deepspeed": {"bf16": {"enabled": True}}}),
}
GANG: dict[str, dict[str, Any]] = {
    "lora, dropout and noise": DROPOUT,
    "full, ZeRO-0": full(0),
    "full, ZeRO-1": full(1),
    "full, ZeRO-2": full(2),
    "full, ZeRO-3": full(3),
    "full in bf16, ZeRO-2": tiny.merge(full(2, deepspeed={"bf16": {"enabled": True}}), BF16),
}
CUTS: dict[str, dict[str, Any]] = {
    "passes of 1": {"training": {"per_device_train_batch_size": 1}},
    "passes of 4": {"training": {"per_device_train_batch_size": 4}},
    "ragged passes of 3": {"training": {"per_device_train_batch_size": 3}},
}


def job(root: Path, folder: str, changes: dict[str, Any], **plan: Any) -> dict[str, Any]:
    """A plan whose checkpoints and output go to ``root/folder``."""
    where = {
        "checkpoint_uri": f"file://{root}/{folder}/checkpoints",
        "output_uri": f"file://{root}/{folder}/output",
        "data": {"eval": [{"uri": f"file://{root}/held-out.jsonl"}]},
        "training": {"eval_steps": 4},
    }
    config = tiny.make_config(root, **tiny.merge(where, changes))
    return {"name": folder, "config": config.model_dump(mode="json"), "attempt": 1, "work": str(root / "work")} | plan


def interrupted(root: Path, folder: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """An uninterrupted run; one that crashes after step 5; and its second attempt."""
    return [
        job(root, f"{folder}/whole", changes, name=f"{folder}/whole", weights=True),
        job(root, f"{folder}/broken", changes, name=f"{folder}/crash", crash_after=5),
        job(root, f"{folder}/broken", changes, name=f"{folder}/again", attempt=2),
    ]


def play(root: Path, plans: list[dict[str, Any]], processes: int, **variables: str) -> dict[str, dict[str, Any]]:
    """Run the plans in one gang; results by name."""
    path = root / f"plans-{processes}.json"
    path.write_text(json.dumps(plans))
    environ = tiny.environment(root, tiny.make_config(root)) | variables
    if processes > 1:
        environ |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tiny.free_port())}
    command = [sys.executable, str(Path(__file__).with_name("harness.py")), str(path)]
    gang = []
    for rank in range(processes):
        log = (root / f"log-{processes}-{rank}").open("w")
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        gang.append(subprocess.Popen(command, env=environ | mine, stdout=log, stderr=subprocess.STDOUT))
    for process in gang:
        process.wait(timeout=900)
    output = path.with_name(path.name + ".out")
    assert output.exists(), (root / f"log-{processes}-0").read_text()[-3000:]
    return {result["name"]: result for result in json.loads(output.read_text())}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its data."""
    root = tmp_path_factory.mktemp("resume")
    tiny.make_model(root / "model")
    tiny.make_rows(root / "train.jsonl", 40)
    tiny.make_rows(root / "held-out.jsonl", 7, seed=1)
    return root


@pytest.fixture(scope="module")
def gang(root: Path) -> dict[str, dict[str, Any]]:
    """Everything that two processes do."""
    plans = [plan for name, changes in GANG.items() for plan in interrupted(root, f"gang/{name}", changes)]
    plans += [
        job(root, "shrink", DROPOUT, name="shrink/crash", crash_after=5, trace=str(root / "trace-2")),
        job(root, "shrink-full", full(3), name="shrink-full/crash", crash_after=5),
        job(root, "gang/ragged", {"global_batch_size": 3}, name="gang/ragged"),
    ]
    return play(root, plans, 2)


@pytest.fixture(scope="module")
def alone(root: Path, gang: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything that one process does, some of it after two have left off."""
    plans = [plan for name, changes in ALONE.items() for plan in interrupted(root, f"alone/{name}", changes)]
    plans += [
        job(root, "shrink", DROPOUT, name="shrink/again", attempt=2, trace=str(root / "trace-1")),
        job(root, "shrink-full", full(2), name="shrink-full/again", attempt=2),
        job(root, "unbroken", DROPOUT, name="unbroken", trace=str(root / "trace-0")),
        job(root, "unbroken", DROPOUT, name="unbroken/again", attempt=2),
        job(root, "alone/ragged", {"global_batch_size": 3}, name="alone/ragged"),
        *(job(root, f"cut/{name}", changes, name=f"cut/{name}") for name, changes in CUTS.items()),
        job(root, "stop", DROPOUT, name="stop/first", stop_after=4),
        job(root, "stop", DROPOUT, name="stop/second", attempt=2),
        job(root, "changed", DROPOUT, name="changed/first", crash_after=4),
        job(root, "changed", tiny.merge(DROPOUT, {"training": {"learning_rate": 1e-4}}), name="changed/second"),
        job(root, "changed", DROPOUT | {"resume": "never"}, name="changed/never"),
        job(root, "epochs", {"training": {"max_steps": -1, "num_train_epochs": 0.45, "eval_steps": 0}}, name="epochs"),
        job(root, "wild", full(0), name="wild", poison_after=4),
        job(root, "slow", {"save_steps": 1, "save_total_limit": 9}, name="slow", storage_until=5),
    ]
    return play(root, plans, 1)


def figures(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What must be equal to the last digit."""
    assert "cause" not in result, result.get("trace", "")
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss", "eval_loss/held-out")
    return [tuple(record.get(name) for name in names) for record in result["records"]]


def losses(result: dict[str, Any]) -> list[float]:
    """The loss of every step that this attempt made."""
    assert "cause" not in result, result.get("trace", "")
    return list(result["losses"].values())


@pytest.mark.parametrize("name", ALONE)
def test_one_process_continues_exactly(name: str, alone: dict[str, Any]) -> None:
    again = alone[f"alone/{name}/again"]
    assert again["progress"]["resumed_from_step"] == 3
    assert figures(again) == figures(alone[f"alone/{name}/whole"])
    assert list(again["losses"]) == ["4", "5", "6", "7", "8"]


@pytest.mark.parametrize("name", GANG)
def test_two_processes_continue_exactly(name: str, gang: dict[str, Any]) -> None:
    again = gang[f"gang/{name}/again"]
    assert again["progress"]["resumed_from_step"] == 3
    assert figures(again) == figures(gang[f"gang/{name}/whole"])


@pytest.mark.parametrize("name", ["lora, dropout and noise", "full, ZeRO-2"])
def test_two_processes_learn_what_one_does(name: str, alone: dict[str, Any], gang: dict[str, Any]) -> None:
    one, two = alone[f"alone/{name}/whole"], gang[f"gang/{name}/whole"]
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert two["evaluation"] == pytest.approx(one["evaluation"], rel=1e-5)


def test_all_zero_stages_learn_the_same(gang: dict[str, Any]) -> None:
    reference = losses(gang["gang/full, ZeRO-0/whole"])
    for stage in (1, 2, 3):
        run = gang[f"gang/full, ZeRO-{stage}/whole"]
        assert losses(run) == pytest.approx(reference, rel=1e-5)
        assert run["losing head"], "its logits are never held whole"


def test_the_cut_of_a_batch_does_not_matter(alone: dict[str, Any]) -> None:
    reference = losses(alone["cut/passes of 4"])
    for name in CUTS:
        assert losses(alone[f"cut/{name}"]) == pytest.approx(reference, rel=1e-5)


def test_a_batch_that_does_not_divide_by_the_processes_is_kept(alone: dict[str, Any], gang: dict[str, Any]) -> None:
    assert losses(gang["gang/ragged"]) == pytest.approx(losses(alone["alone/ragged"]), rel=1e-5)
    assert gang["gang/ragged"]["records"][-1]["tokens"] == alone["alone/ragged"]["records"][-1]["tokens"]


def test_one_process_continues_the_stream_of_two(root: Path, alone: dict[str, Any], gang: dict[str, Any]) -> None:
    def rows(folder: str, after: int, until: int) -> dict[int, list[Any]]:
        steps: dict[int, list[Any]] = {}
        for path in sorted((root / folder).glob("*.jsonl")):
            for line in map(json.loads, path.read_text().splitlines()):
                if after < line["step"] <= until:
                    steps.setdefault(line["step"], []).extend(map(tuple, line["rows"]))
        return {step: sorted(seen) for step, seen in steps.items()}

    unbroken = rows("trace-0", 0, 8)
    assert len(unbroken) == 8
    assert all(len(seen) == 4 for seen in unbroken.values())
    assert rows("trace-2", 0, 3) | rows("trace-1", 3, 8) == unbroken
    assert losses(alone["shrink/again"]) == pytest.approx(losses(alone["unbroken"])[3:], rel=1e-4)


def test_zero_3_of_two_is_continued_by_zero_2_of_one(alone: dict[str, Any], gang: dict[str, Any]) -> None:
    again = alone["shrink-full/again"]
    assert again["progress"]["resumed_from_step"] == 3
    assert losses(again) == pytest.approx(losses(gang["gang/full, ZeRO-3/whole"])[3:], rel=1e-5)


def test_a_stop_saves_at_the_step_boundary_and_is_continued_exactly(root: Path, alone: dict[str, Any]) -> None:
    first, second = alone["stop/first"], alone["stop/second"]
    assert first["finished"] is False
    # Asked for while step 4 was told, agreed on with step 5.
    assert first["progress"]["checkpoints"][-1]["step"] == 5
    assert second["progress"]["resumed_from_step"] == 5
    assert figures(second) == figures(alone["unbroken"])


def test_a_finished_run_only_writes_its_result_again(alone: dict[str, Any]) -> None:
    first, again = alone["unbroken"], alone["unbroken/again"]
    assert again["finished"] is True
    assert again["losses"] == {}
    assert again["progress"]["resumed_from_step"] == 8
    assert again["evaluation"] == first["evaluation"]
    assert figures(again) == figures(first)
    assert [output["kind"] for output in again["outputs"]] == ["adapter"]


def test_only_what_the_method_trains_moves(alone: dict[str, Any], gang: dict[str, Any]) -> None:
    for name, result in {**alone, **gang}.items():
        if "moved" in result:
            assert result["moved"] == result["trained"], name
    assert all("lora_" in name for name in alone["alone/lora, dropout and noise/whole"]["trained"])


def test_the_loss_falls(alone: dict[str, Any]) -> None:
    told = losses(alone["alone/full, ZeRO-2/whole"])
    assert sum(told[-3:]) < sum(told[:3]) - 0.3


def test_another_configuration_is_refused_with_every_difference(alone: dict[str, Any]) -> None:
    refused = alone["changed/second"]
    assert refused["cause"] == "CheckpointMismatch"
    assert "training.learning_rate: 0.003 → 0.0001" in refused["message"]
    assert "checkpoint.uri" in refused["message"]


def test_never_refuses_where_checkpoints_are(alone: dict[str, Any]) -> None:
    refused = alone["changed/never"]
    assert refused["cause"] == "CheckpointMismatch"
    assert "checkpoint.resume is never" in refused["message"]


def test_a_part_of_an_epoch_is_trained_to_the_sequence(alone: dict[str, Any]) -> None:
    result = alone["epochs"]
    assert [record["epoch"] for record in result["records"]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.45])
    assert "eval_loss" in result["records"][-1], "always at the end"
    assert sum("eval_loss" in record for record in result["records"]) == 1


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(root: Path, alone: dict[str, Any]) -> None:
    result = alone["wild"]
    assert result["cause"] == "NonFiniteLoss"
    assert "The loss became nan at step 5 (learning rate 0.00225" in result["message"]
    folders = {entry.path.split("/")[0] for entry in Store(f"file://{root}/wild/checkpoints").list()}
    assert folders == {"attempts", "step-3"}


def test_slow_storage_delays_checkpoints_and_not_the_training(alone: dict[str, Any]) -> None:
    result = alone["slow"]
    assert result["finished"] is True
    saved = [info["step"] for info in result["progress"]["checkpoints"]]
    assert saved[0] == 1, "begun at once, finished when the storage let it"
    assert not set(saved) & {2, 3, 4}
    assert saved[-1] == 8


def test_retention_keeps_the_newest(root: Path, alone: dict[str, Any]) -> None:
    store = Store(f"file://{root}/alone/full, ZeRO-2/broken/checkpoints")
    assert sorted({entry.path.split("/")[0] for entry in store.list()}) == ["attempts", "step-3", "step-6", "step-8"]
