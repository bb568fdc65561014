"""Adapters made earlier: merged, weighted, taken away again, stacked, and trained on."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the trainer extra")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.compatibility import COMPATIBILITY, CONTINUED
from finetune_api.run import MergeConfig, UseConfig
from finetune_api.spec import ModelSource, Training
from finetune_trainer import earlier, finished, merge
from finetune_trainer.fetch import Fetched
from finetune_trainer.merge import Part
from finetune_trainer.methods import METHODS, load_adapter
from finetune_trainer.model import load_model, load_tokenizer
from finetune_trainer.outcome import RunError
from tests.trainer import tiny
from tests.trainer.methods_cases import CASES, OWN
from tests.trainer.test_resume import figures, interrupted, job, play

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")
IDS = torch.arange(3, 35).reshape(2, 16)
SOURCE = ModelSource(uri="file:///base")
LORAS: dict[str, dict[str, Any]] = {
    "first": {"type": "lora", "r": 4, "lora_alpha": 8},
    "second": {"type": "lora", "r": 2, "lora_alpha": 16, "use_rslora": True},
    "patterned": {"type": "lora", "r": 4, "rank_pattern": {".*mlp.*": 2}, "target_modules": ["q_proj", "up_proj"]},
    "dora": {"type": "lora", "r": 4, "use_dora": True},
    "whole": {"type": "lora", "r": 4, "modules_to_save": ["lm_head"]},
    "vera": {"type": "vera", "r": 8},
    "prompt": {"type": "prompt_tuning", "num_virtual_tokens": 4},
    "adapter": {"type": "adapter", "bottleneck_size": 6},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("earlier")
    tiny.make_model(root / "model")
    tiny.make_rows(root / "train.jsonl", 24)
    tiny.make_rows(root / "held-out.jsonl", 5, seed=1)
    for number, (name, method) in enumerate(LORAS.items()):
        write(root, name, method, seed=number)
    return root


def prepared(root: Path, method: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    config = tiny.make_config(root, method=method, **changes)
    torch.manual_seed(0)
    return config, METHODS[config.method.type].prepare(load_model(root / "model", config, CPU), config.method, config)


def write(root: Path, name: str, method: dict[str, Any], seed: int) -> Any:
    """An adapter in ``root/name`` that is not zero, and the model with it."""
    config, model = prepared(root, method)
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad and not key.endswith("bank.default"):
                p += 0.05 * torch.randn_like(p)
    (root / name).mkdir()
    METHODS[config.method.type].save(model, load_tokenizer(root / "model", config), root / name, None, config)
    return model


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits[:, -IDS.shape[1] :]
    return found


def base(root: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(root / "model")


def far(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def deltas(root: Path, name: str) -> dict[str, torch.Tensor]:
    """B·A times its scaling, by the name of the weight, computed here."""
    from safetensors.torch import load_file

    described = json.loads((root / name / "adapter_config.json").read_text())
    weights, found = load_file(root / name / "adapter_model.safetensors"), {}
    for key, a in weights.items():
        if ".lora_A." in key:
            b = weights[key.replace("lora_A", "lora_B")]
            rank = a.shape[0]
            scaling = described["lora_alpha"] / (rank**0.5 if described["use_rslora"] else rank)
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            found[name] = scaling * b @ a
    return found


def expected(root: Path, **weights: float) -> dict[str, torch.Tensor]:
    """The base's weights plus the weighted sum of adapters."""
    state = base(root).state_dict()
    for name, weight in weights.items():
        for key, delta in deltas(root, name).items():
            state[key] = state[key] + weight * delta
    return state


def parts(root: Path, **weights: float) -> list[Part]:
    return [Part(name, root / name, weight) for name, weight in weights.items()]


def check(model: Any, state: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert max(far(found[name], state[name]) for name in state) <= tolerance


# --- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first", "second", "patterned", "dora", "whole", "vera"])
def test_one_adapter_is_merged_whatever_it_is(root: Path, name: str) -> None:
    merged = merge.merged(root / "model", parts(root, **{name: 1.0}), SOURCE)
    assert far(logits(merged), logits(PeftModel.from_pretrained(base(root), root / name))) <= 1e-5


@pytest.mark.parametrize(
    "weights",
    [{"first": 0.5}, {"first": 0.7, "second": 0.3}, {"first": 1.0, "second": -2.0, "patterned": 0.5}],
)
def test_weights_and_cat_are_an_exact_sum(root: Path, weights: dict[str, float]) -> None:
    check(merge.merged(root / "model", parts(root, **weights), SOURCE), expected(root, **weights))


def test_svd_of_full_rank_is_an_exact_sum(root: Path) -> None:
    weights = {"first": 0.7, "second": 0.3}
    merged = merge.merged(root / "model", parts(root, **weights), SOURCE, combination="svd", rank=6)
    check(merged, expected(root, **weights), 1e-5)


@pytest.mark.parametrize("combination", ["linear", "ties", "dare_linear", "dare_ties", "ties_svd", "magnitude_prune"])
def test_other_combinations_are_those_of_peft(root: Path, combination: str) -> None:
    write_twin = root / "twin"  # of the first one's rank, as these want it
    if not write_twin.exists():
        write(root, "twin", LORAS["first"], seed=77)
    density = None if combination == "linear" else 0.5
    options: dict[str, Any] = {"combination": combination, "density": density, "seed": 5}
    merged = merge.merged(root / "model", parts(root, first=0.6, twin=0.4), SOURCE, **options)
    reference: Any = PeftModel.from_pretrained(base(root), root / "first", adapter_name="a")
    reference.load_adapter(root / "twin", adapter_name="b")
    torch.manual_seed(5)
    reference.add_weighted_adapter(["a", "b"], [0.6, 0.4], "c", combination_type=combination, density=density)
    reference.set_adapter("c")
    assert far(logits(merged), logits(reference)) <= 1e-5
    assert far(logits(merged), logits(base(root))) > 1e-3


def test_only_the_named_modules_change(root: Path) -> None:
    merged = merge.merged(root / "model", parts(root, first=1.0, second=0.5), SOURCE, modules=r"layers\.1\..*mlp")
    wanted, before = expected(root, first=1.0, second=0.5), base(root).state_dict()
    state = {name: wanted[name] if "layers.1.mlp" in name else value for name, value in before.items()}
    check(merged, state)
    for name, value in merged.state_dict().items():
        assert value.equal(before[name]) == (name not in deltas(root, "first") or "layers.1.mlp" not in name), name


def test_a_task_is_taken_away_and_another_one_added(root: Path, tmp_path: Path) -> None:
    """LoRA's switch between tasks: W + B1·A1 - B1·A1 + B2·A2, exact but for the rounding of float32."""
    fused = merge.merged(root / "model", parts(root, first=1.0), SOURCE)
    merge.write(fused, root / "model", tmp_path / "fused", "5GB")
    check(merge.merged(tmp_path / "fused", parts(root, first=-1.0), SOURCE), base(root).state_dict())
    switched = merge.merged(tmp_path / "fused", parts(root, first=-1.0, second=1.0), SOURCE)
    check(switched, expected(root, second=1.0))


def test_peft_fuses_and_unfuses_what_a_run_has_written(root: Path) -> None:
    model: Any = PeftModel.from_pretrained(base(root), root / "first", adapter_name="first")
    model.load_adapter(root / "second", adapter_name="second")
    beside = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        beside[name] = logits(model)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        model.merge_adapter()
        assert far(logits(model), beside[name]) <= 1e-5
        model.unmerge_adapter()
    assert far(logits(model.unload()), logits(base(root))) <= 1e-5


@pytest.mark.parametrize(
    ("weights", "options", "told"),
    [
        ({"dora": 0.5}, {}, "dora is DoRA; only plain LoRA adapters are weighted"),
        ({"whole": 1.0, "first": 1.0}, {}, "whole is LoRA with modules_to_save"),
        ({"vera": 1.0, "first": 1.0}, {}, "vera is VERA; only plain LoRA"),
        ({"prompt": 1.0}, {}, "virtual tokens are no part of any weight"),
        ({"adapter": 1.0}, {}, "type adapter, which is not linear .*load_adapter"),
        ({"first": 1.0}, {"modules": "nothing"}, "'nothing' is found in no name .* such as model.layers.0.self_attn"),
        ({"whole": 1.0}, {"modules": "mlp"}, "--modules does not go with modules_to_save"),
        ({"first": 1.0, "second": 1.0}, {"combination": "linear"}, "first, second cannot be merged"),
    ],
)
def test_what_does_not_go_is_told(root: Path, weights: dict[str, float], options: dict[str, Any], told: str) -> None:
    with pytest.raises(RunError, match=told):
        merge.merged(root / "model", parts(root, **weights), SOURCE, **options)


def test_the_command_writes_a_model_or_an_adapter(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "finetune_operator.cli.main", "merge", "--base", str(root / "model")]
    command += ["--adapter", f"{root}/first=0.7", "--adapter", f"{root}/second=0.3", "--output", str(tmp_path / "out")]
    environ = tiny.environment(root, tiny.make_config(root))
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = f"merged of 0.3 MB in file://{tmp_path}/out\nNext: finetune chat {tmp_path}/out\n"
    assert (done.stdout, done.stderr) == (said, ""), "what libraries tell their developers looks like an error"
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected(root, first=0.7, second=0.3))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["weights"] == [0.7, 0.3]
    assert set(manifest["inputs"]) == {f"file://{root}/{name}" for name in ("model", "first", "second")}

    model = {"uri": f"file://{root}/model", "adapters": [{"uri": f"file://{root}/{n}"} for n in ("first", "second")]}
    config = MergeConfig.model_validate(
        {"model": model, "weights": [0.7, 0.3], "kind": "adapter", "output_uri": f"file://{tmp_path}/one"}
    )
    assert merge.run(config, tmp_path).kind == "adapter"
    one = PeftModel.from_pretrained(base(root), tmp_path / "one")
    assert far(logits(one), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) <= 1e-5
    (tmp_path / "bad.json").write_text(config.model_copy(update={"combination": "linear"}).model_dump_json())
    assert merge.main([str(tmp_path / "bad.json")]) == 64


@pytest.mark.parametrize("place", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("way", ["alone", "weighted"])
def test_an_adapter_on_a_tied_layer_changes_that_layer_only(tmp_path: Path, place: str, way: str) -> None:
    tiny.make_model(tmp_path / "model", tied=True)
    write(tmp_path, "tied", {"type": "lora", "r": 4, "target_modules": ["q_proj", place]}, seed=5)
    beside = logits(PeftModel.from_pretrained(base(tmp_path), tmp_path / "tied"))
    assert far(beside, logits(base(tmp_path))) > 1e-3
    weight = 1.0 if way == "alone" else 0.5
    model = merge.merged(tmp_path / "model", [Part("tied", tmp_path / "tied", weight)], SOURCE)
    merge.write(model, tmp_path / "model", tmp_path / "merged", "5GB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.tie_word_embeddings is False
    if way == "alone":
        assert far(logits(again), beside) <= 1e-5
    assert far(logits(again), logits(model)) <= 1e-6


# --- what does not fit, and who speaks ------------------------------------------------------------------------------

MISFITS = {
    "of a compiled model": lambda weights: {k.replace("model.model", "model._orig_mod.model"): v for k, v in weights},
    "of a deeper model": lambda weights: dict(weights) | {k.replace(".layers.0.", ".layers.7."): v for k, v in weights},
    "with a weight missing": lambda weights: dict(weights[1:]),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_adapter_with_weights_that_have_no_place_or_are_missing_is_refused_wherever_it_is_used(
    root: Path, tmp_path: Path, name: str
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(root / "first", tmp_path / "first")
    file = tmp_path / "first" / "adapter_model.safetensors"
    save_file({k: v.clone() for k, v in MISFITS[name](list(load_file(file).items())).items()}, file)
    part = Part("file:///first", tmp_path / "first")
    for use in (
        lambda: merge.merged(root / "model", [part], SOURCE),
        lambda: merge.merged(root / "model", [replace(part, weight=0.5)], SOURCE),
        lambda: finished.put_on(base(root), part.folder, "file:///model"),
    ):
        with pytest.raises(RunError, match=r"first does not fit LlamaForCausalLM: \d+ of its weights have no place"):
            use()


def test_an_adapter_speaks_by_its_own_template_and_end_token_wherever_it_is_used(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "first", tmp_path / "first")
    taught = load_tokenizer(root / "model", tiny.make_config(root))
    taught.chat_template, taught.eos_token = "{{ messages[0].content }}", taught.convert_ids_to_tokens(5)
    taught.save_pretrained(tmp_path / "first")
    fetched = Fetched(root / "model", [], [], [tmp_path / "first"])

    def check_words(tokenizer: Any) -> None:
        assert (tokenizer.chat_template, tokenizer.eos_token) == (taught.chat_template, taught.eos_token)

    uri = f"file://{tmp_path}/first"
    on = tiny.make_config(root, model={"adapters": [{"uri": uri, "train": True}]})
    check_words(load_tokenizer(fetched.model, on, fetched.adapters))
    below = tiny.make_config(root, model={"adapters": [{"uri": uri}]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
        stack = earlier.stacked(below, fetched).model
    check_words(load_tokenizer(stack, below))
    model = {"uri": f"file://{root}/model", "adapters": [{"uri": uri}]}
    for kind in ("model", "adapter"):
        config = MergeConfig.model_validate(
            {"model": model, "weights": [1.0], "kind": kind, "output_uri": f"file://{tmp_path}/{kind}"}
        )
        merge.run(config, tmp_path)
        check_words(AutoTokenizer.from_pretrained(tmp_path / kind))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id in (5, [5], [2, 5])
    use = UseConfig.model_validate({"model": model})
    assert finished.find(use, tmp_path, [], Training()).words == tmp_path / "first"


# --- trained on -----------------------------------------------------------------------------------------------------

GOES_ON = {
    name: next(case for case in (*CASES.values(), *OWN.values()) if case.method["type"] == name) for name in CONTINUED
}
GOES_ON_NAMES = list(GOES_ON)
NEEDED = ("type", "target_modules")


def fetched(root: Path, *adapters: str) -> Fetched:
    return Fetched(model=root / "model", train=[], eval=[], adapters=[root / name for name in adapters])


def going_on(root: Path, method: dict[str, Any], adapter: str) -> Any:
    model = {"adapters": [{"uri": f"file://{root}/{adapter}", "train": True}]}
    return tiny.make_config(root, method=method, model=model)


@pytest.mark.parametrize("name", GOES_ON_NAMES)
def test_an_adapter_goes_on_as_it_was_with_its_own_parameters(root: Path, name: str) -> None:
    case = GOES_ON[name]
    folder = f"on-{name}"
    model = write(root, folder, case.method, seed=3)
    config = earlier.settled(going_on(root, {"type": name}, folder), fetched(root, folder))
    torch.manual_seed(99)  # nothing that is drawn counts
    again = METHODS[name].prepare(load_model(root / "model", config, CPU), config.method, config)
    assert far(logits(again), logits(model)) > 1e-4
    earlier.begin_with(again, config, root / folder)
    assert far(logits(again), logits(model)) <= 1e-6
    trained = {key for key, p in again.named_parameters() if p.requires_grad}
    if "prefix_projection" in case.method or name in ("mam", "unipelt"):
        return  # what was made by a network is trained on as what it came to
    assert trained == {key for key, p in model.named_parameters() if p.requires_grad}


def test_an_adapter_of_another_model_is_refused(root: Path, tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(
        (root / "model" / "config.json").read_text().replace('"intermediate_size": 128', '"intermediate_size": 96')
    )
    from transformers import AutoConfig

    config = going_on(root, {"type": "lora", "r": 4}, "first")
    small = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    model = METHODS["lora"].prepare(small, config.method, config)
    with pytest.raises(RunError, match=r"first does not fit .* size mismatch"):
        earlier.begin_with(model, config, root / "first")


def test_every_other_method_is_refused_at_admission_with_a_reason() -> None:
    others = set(COMPATIBILITY) - set(CONTINUED)
    whole = {name for name, row in COMPATIBILITY.items() if row.whole_model}
    assert others - whole == {
        *("adalora", "prefix_tuning", "p_tuning", "vblora", "shira", "ln_tuning", "trainable_tokens", "moelora"),
    }


def test_parameters_that_differ_are_told_all_at_once(root: Path) -> None:
    config = going_on(root, {"type": "lora", "r": 8, "lora_alpha": 9, "lora_dropout": 0.1}, "first")
    with pytest.raises(RunError, match=r"method\.r is 8, the adapter's 4; method\.lora_alpha is 9.*, the adapter's 8"):
        earlier.settled(config, fetched(root, "first"))
    settled = earlier.settled(
        going_on(root, {"type": "lora", "r": 4, "lora_dropout": 0.1}, "first"), fetched(root, "first")
    )
    assert (settled.method.r, settled.method.lora_alpha, settled.method.lora_dropout) == (4, 8, 0.1)


@pytest.mark.parametrize(
    ("method", "adapter", "told"), [("ia3", "first", "type LORA, and"), ("lora", "adapter", "type adapter, and")]
)
def test_an_adapter_of_another_method_is_refused(root: Path, method: str, adapter: str, told: str) -> None:
    with pytest.raises(RunError, match=told):
        earlier.settled(going_on(root, {"type": method}, adapter), fetched(root, adapter))


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(root: Path) -> dict[str, dict[str, Any]]:
    def changes(*adapters: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"model": {"adapters": list(adapters)}, "training": {"max_steps": 6}, **more}

    first, second = ({"uri": f"file://{root}/{name}"} for name in ("first", "second"))
    plans = interrupted(root, "both", changes(second, first | {"train": True}, method={"type": "lora"}, merge=True))
    plans.append(job(root, "on/whole", changes(first | {"train": True}, method={"type": "lora"})))
    plans.append(job(root, "stacked/whole", changes(first, second, merge=True)))
    ours = {"type": "adapter", "bottleneck_size": 6}
    return play(root, [*plans, job(root, "ours/whole", {"method": ours, "training": {"max_steps": 6}})], 1)


def test_a_run_from_adapters_continues_exactly(played: dict[str, Any]) -> None:
    whole, again = played["both/whole"], played["both/again"]
    assert whole.get("cause") is None, whole.get("trace")
    assert again["progress"]["resumed_from_step"] == 3
    assert figures(again) == figures(whole)
    assert whole["moved"] == whole["trained"]


def test_the_results_are_of_what_was_there_before(root: Path, played: dict[str, Any]) -> None:
    on, stacked, both = (root / name / "whole" / "output" for name in ("on", "stacked", "both"))
    assert json.loads((on / "adapter_config.json").read_text())["r"] == 4
    assert (
        far(
            logits(PeftModel.from_pretrained(base(root), on)),
            logits(PeftModel.from_pretrained(base(root), root / "first")),
        )
        > 1e-3
    )
    for output, before in ((stacked, {"first": 1.0, "second": 1.0}), (both, {"second": 1.0})):
        below = base(root)
        below.load_state_dict(expected(root, **before))
        adapted = PeftModel.from_pretrained(below, output)
        assert far(logits(AutoModelForCausalLM.from_pretrained(output / "merged")), logits(adapted)) <= 1e-4
    manifest = json.loads((stacked / "manifest.json").read_text())
    assert {f"file://{root}/first", f"file://{root}/second"} <= set(manifest["inputs"])


def test_the_card_says_how_a_result_is_loaded(root: Path, played: dict[str, Any]) -> None:
    def card(name: str) -> str:
        return (root / name / "whole" / "output" / "README.md").read_text()

    assert card("on").startswith('---\nlibrary_name: "peft"\ntags: ["finetune-operator", "lora", "sft"]\n---\n')
    assert "from peft import PeftModel" in card("on") and "merge_and_unload" not in card("on")
    below = [
        f'base = PeftModel.from_pretrained(base, "{root}/{name}").merge_and_unload()' for name in ("first", "second")
    ]
    assert "\n".join(below) in card("stacked"), "in the order in which it was trained over them"
    ours = root / "ours" / "whole" / "output"
    assert "Plain peft cannot read this adapter" in card("ours")
    assert f'base = AutoModelForCausalLM.from_pretrained("{root}/model")\nmodel = load_adapter(base, ".")' in card(
        "ours"
    )
    with pytest.raises((ValueError, KeyError, TypeError)):
        PeftModel.from_pretrained(base(root), ours)
    assert far(logits(load_adapter(base(root), ours)), logits(base(root))) > 1e-3
