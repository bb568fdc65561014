"""Two GPUs of one host, through NCCL: the same losses as one GPU, resumed on another number, the same results.

Whole jobs in gangs of one and two processes, as in ``tests/trainer/test_resume.py``. In fp32 the sums differ by their
order only; in bf16 weights and activations are rounded, and losses agree to about one part in a hundred.
"""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the trainer extra")
from safetensors.torch import load_file  # noqa: E402

from tests.trainer import tiny  # noqa: E402
from tests.trainer.test_resume import job, play  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

LORA = {"type": "lora", "r": 4, "lora_alpha": 8}
FP32 = {"model": {"dtype": "float32"}}
BF16 = {"model": {"dtype": "bfloat16"}}


def case(method: dict[str, Any], stage: int, precision: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Changes of a configuration, as the plan would make them."""
    whole = method["type"] == "full"
    deepspeed: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if precision is BF16 and (whole or stage > 0):
        deepspeed["bf16"] = {"enabled": True}
    given = {"accelerator": "gpu", "method": method, "deepspeed": deepspeed, "data": {"packing": True}}
    return tiny.merge(tiny.merge(given, precision), more)


CASES = {
    "lora, ZeRO-0": case(LORA, 0, FP32),
    "lora, ZeRO-2": case(LORA, 2, FP32),
    "lora, ZeRO-3": case(LORA, 3, FP32),
    "full, ZeRO-2": case({"type": "full"}, 2, FP32),
    "full, ZeRO-3": case({"type": "full"}, 3, FP32),
    "lora in bf16, ZeRO-0": case(LORA, 0, BF16),
    "qlora in bf16, ZeRO-2": case({**LORA, "type": "qlora"}, 2, BF16),
    "full in bf16, ZeRO-2": case({"type": "full"}, 2, BF16),
    "full in bf16, ZeRO-3": case({"type": "full"}, 3, BF16),
}
MOVED = {"2 to 1": (2, 1), "1 to 2": (1, 2)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs: every case on one and on two GPUs, and two that crash on one number and go on with another."""
    root = tmp_path_factory.mktemp("gpus")
    tiny.make_model(root / "model")
    tiny.make_rows(root / "train.jsonl", 200)
    tiny.make_rows(root / "held-out.jsonl", 7, seed=1)
    found: dict[str, Any] = {"root": root}

    def plans(size: int, attempt: int) -> list[dict[str, Any]]:
        made = []
        if attempt == 1:
            made += [job(root, f"{size}/{name}", changes, name=name) for name, changes in CASES.items()]
        for name, sizes in MOVED.items():
            if sizes[attempt - 1] == size:
                crash = {"crash_after": 5} if attempt == 1 else {}
                trace = str(root / f"trace {name} {attempt}")
                made.append(job(root, name, CASES["full, ZeRO-3"], name=name, attempt=attempt, trace=trace, **crash))
        return made

    environ = {"DS_ACCELERATOR": "cuda", "FINETUNE_COMPILE": "0"}  # half a minute for each run
    for attempt in (1, 2):
        for size in (1, 2):
            found[f"{size}/{attempt}"] = play(root, plans(size, attempt), size, **environ)
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_gpus_train_as_one_does(runs: dict[str, Any], name: str) -> None:
    one, two = runs["1/1"][name], runs["2/1"][name]
    assert one.get("finished") and two.get("finished"), (one.get("trace"), two.get("trace"))
    losses = [[float(value) for value in run["losses"].values()] for run in (one, two)]
    tolerance = 2e-2 if "bf16" in name else 1e-4
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert losses[0][-1] < losses[0][0] - 0.02, "it learns"
    file = "model.safetensors" if name.startswith("full") else "adapter_model.safetensors"
    left, right = (load_file(runs["root"] / size / name / "output" / file) for size in "12")
    assert left.keys() == right.keys()
    assert all(left[key].shape == right[key].shape for key in left)
    if "bf16" not in name:
        assert max(float((left[key] - right[key]).abs().max()) for key in left) < 1e-3


@pytest.mark.parametrize("name", MOVED)
def test_another_number_of_gpus_goes_on_with_the_same_rows(runs: dict[str, Any], name: str) -> None:
    before, after = (runs[f"{size}/{attempt}"][name] for attempt, size in enumerate(MOVED[name], 1))
    assert before["crashed"]
    assert after.get("finished"), after.get("trace")
    whole = runs["1/1"]["full, ZeRO-3"]["losses"]
    joined = before["losses"] | after["losses"]
    assert list(joined.values()) == pytest.approx(list(whole.values()), rel=1e-4)
    first, second = (rows_of(runs["root"] / f"trace {name} {attempt}") for attempt in (1, 2))
    both = first.keys() & second.keys()
    assert both, "the crash cost steps that were not saved"
    assert {step: first[step] for step in both} == {step: second[step] for step in both}
    assert sorted(first | second) == list(range(1, 9))


def rows_of(folder: Path) -> dict[int, list[Any]]:
    """The rows of every step, over all processes."""
    found: dict[int, list[Any]] = {}
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            told = json.loads(line)
            found[told["step"]] = sorted([*found.get(told["step"], []), *told["rows"]])
    return found
