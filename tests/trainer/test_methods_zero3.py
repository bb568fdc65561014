"""Methods over a model that ZeRO-3 has partitioned: trained, gathered, saved and merged like any other.

In a process of its own, because DeepSpeed and its process group cannot be undone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.tiny import ROOT, free_port

SCRIPT = """
import json, os, sys
from pathlib import Path

root, device = Path(sys.argv[1]), sys.argv[2]
import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("nccl" if device == "cuda" else "gloo")
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from finetune_trainer.methods import METHODS
from finetune_trainer.model import load_model, load_tokenizer, parameter_counts, without_zero3
from tests.trainer.tiny import make_config, make_model

settings = {
    "train_micro_batch_size_per_gpu": 1,
    "train_batch_size": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}
make_model(root / "model", tied=True)
ids = torch.arange(3, 35, device=device).reshape(2, 16)
found = {}
for kind in ("full", "lora"):
    for checkpointing in (False, True):
        alive = HfDeepSpeedConfig(settings)
        config = make_config(root, method={"type": kind}, training={"gradient_checkpointing": checkpointing})
        torch.manual_seed(0)
        model = load_model(root / "model", config, torch.device(device))
        partitioned = all(parameter.numel() == 0 for parameter in model.parameters())
        trained = METHODS[kind].prepare(model, config.method, config)
        counts = parameter_counts(trained)
        engine, *_ = deepspeed.initialize(model=trained, config=settings)
        losses = []
        for _ in range(4):
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        weights = {}
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter]):
                    weights[name] = parameter.detach().clone().cpu()
        out = root / f"{kind}-{checkpointing}"
        METHODS[kind].save(trained, load_tokenizer(root / "model", config), out, weights, config)
        if kind == "lora":
            METHODS[kind].merge(root / "model", out, root / f"merged-{checkpointing}", config)
            out = root / f"merged-{checkpointing}"
        engine.eval()
        with torch.no_grad():
            expected = engine(input_ids=ids, use_cache=False).logits.cpu()
            with without_zero3():
                got = AutoModelForCausalLM.from_pretrained(out).eval()(input_ids=ids.cpu()).logits
        found[f"{kind}-{checkpointing}"] = {
            "partitioned": partitioned,
            "counts": counts,
            "losses": losses,
            "difference": (got - expected).abs().max().item(),
        }
        del engine, trained, model, alive
(root / "found.json").write_text(json.dumps(found))
"""


def run(root: Path, device: str) -> dict:
    pytest.importorskip("deepspeed", reason="needs the trainer extra")
    port = free_port()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*(str(ROOT / part) for part in ("", "crds", "trainer_image")), *sys.path[1:]]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), device], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads((root / "found.json").read_text())


def check(found: dict, tolerance: float) -> None:
    total = 82_240 - 64 * 64  # the output layer is the embedding
    adapters = 16 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3) * 2
    for name, result in found.items():
        assert result["partitioned"], name
        assert result["counts"] == ([total, total] if name.startswith("full") else [adapters, total + adapters])
        assert result["difference"] <= tolerance, name
        assert result["losses"][-1] < result["losses"][0]
    for kind in ("full", "lora"):
        assert found[f"{kind}-False"]["losses"] == pytest.approx(found[f"{kind}-True"]["losses"], abs=1e-5)


def test_on_the_cpu(tmp_path):
    check(run(tmp_path, "cpu"), 1e-5)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("needs a GPU")
    check(run(tmp_path, "cuda"), 1e-3)
