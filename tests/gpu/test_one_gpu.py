"""One GPU: every stage begins with the losses it has on the CPU, and what is rewarded is learned.

Whole jobs, those of a device in one start, as in ``tests/trainer/test_stages.py``. In fp32 the two devices sum in
another order only; answers are drawn, so runs with rollouts are asked for what they have learned instead.
"""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the trainer extra")

from tests.trainer import test_rollouts as rollouts  # noqa: E402
from tests.trainer import test_stages as stages  # noqa: E402
from tests.trainer import tiny  # noqa: E402
from tests.trainer.test_resume import play  # noqa: E402
from tests.trainer.test_stages import said  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = {"accelerator": "gpu"}
BF16: dict[str, Any] = {"model": {"dtype": "bfloat16"}}
SAME = ("pretrain", "dpo", "dpo, full", "dpo, prefix", "kto", "kto, full", "orpo")
DRAWN = ("reward", "reward, full")
"""The head is drawn on the device, where the same seed draws other numbers."""
JUDGED = tuple(rollouts.RUNS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All runs, by device."""
    root = stages.make_rows_of_every_kind(tmp_path_factory.mktemp("gpu"))
    tiny.make_rows(root / "held-out.jsonl", 7, seed=1)
    (root / "rewards.py").write_text(rollouts.REWARDS)
    found: dict[str, dict[str, Any]] = {}
    for device, changes in (("cpu", {}), ("gpu", GPU)):
        plans = []
        for name in (*SAME, *DRAWN):
            stage, own = stages.RUNS[name]
            plans.append(stages.job(root, f"{device}/{name}", (stage, tiny.merge(own, changes)), name=name))
        if device == "gpu":
            for name in JUDGED:
                stage, own = rollouts.RUNS[name]
                more = tiny.merge(changes, BF16 | {"deepspeed": {"bf16": {"enabled": True}}} if "full" in name else {})
                plans.append(rollouts.job(root, f"{device}/{name}", (stage, tiny.merge(own, more)), name=name))
            plans += [rollouts.learning(root, stage, **GPU) for stage in rollouts.LEARNERS]
        found[device] = play(root, plans, 1, DS_ACCELERATOR={"cpu": "cpu", "gpu": "cuda"}[device], FINETUNE_COMPILE="0")
    return found


@pytest.mark.parametrize("name", SAME)
def test_a_stage_learns_as_on_the_cpu(runs: dict[str, dict[str, Any]], name: str) -> None:
    cpu, gpu = (runs[device][name] for device in ("cpu", "gpu"))
    assert cpu.get("finished") and gpu.get("finished"), gpu.get("trace")
    assert list(gpu["losses"].values()) == pytest.approx(list(cpu["losses"].values()), rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("name", DRAWN)
def test_a_run_whose_head_is_drawn_comes_to_its_end(runs: dict[str, dict[str, Any]], name: str) -> None:
    cpu, gpu = (runs[device][name] for device in ("cpu", "gpu"))
    assert cpu.get("finished") and gpu.get("finished"), gpu.get("trace")
    assert len(gpu["losses"]) == len(cpu["losses"])
    assert all(0.1 < loss < 2.5 for loss in gpu["losses"].values())  # around ln 2, with the centring on top


@pytest.mark.parametrize("name", JUDGED)
def test_a_run_with_rollouts_comes_to_its_end(runs: dict[str, dict[str, Any]], name: str) -> None:
    found = runs["gpu"][name]
    assert found.get("finished"), found.get("trace")
    records = said(found)
    assert len(records) == rollouts.STEPS
    if name in ("ppo", "ppo, full"):
        # The policy begins as its reference; in bf16 both are rounded, each by its own batch.
        assert abs(records[0]["kl"]) < (5e-2 if "full" in name else 1e-4)


@pytest.mark.parametrize("stage", rollouts.LEARNERS)
def test_a_reward_is_learned(runs: dict[str, dict[str, Any]], stage: str) -> None:
    found = runs["gpu"][f"{stage} learns"]
    assert found.get("finished"), found.get("trace")
    rewards = [record["reward"] for record in said(found)]
    assert rewards[0] < 0.1
    assert max(rewards) > 0.9 and sum(rewards[-5:]) / 5 > 0.9
