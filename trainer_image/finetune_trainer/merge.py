"""Merges adapters: ``finetune merge``, and the frozen ones of ``model.adapters``.

``python -m finetune_trainer.merge CONFIG``, a process of its own that reads a ``MergeConfig``. One adapter of any kind
that PEFT merges is added as it is; several, or one with a weight, are LoRAs and combined by PEFT's
``add_weighted_adapter`` first. With ``modules`` only layers whose names match are changed. All on the CPU.
"""

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoTokenizer

from finetune_api.causes import Cause
from finetune_api.run import MergeConfig, OutputInfo
from finetune_api.spec import ModelSource
from finetune_trainer.adapter_files import described, tokenizer_folder
from finetune_trainer.card import merged_card
from finetune_trainer.command import carried_out
from finetune_trainer.export import upload
from finetune_trainer.fetch import fetch_model
from finetune_trainer.gguf import converted
from finetune_trainer.methods.adapters import merged_into, put_beside
from finetune_trainer.model import KINDS, LANGUAGE_MODEL, Kind, save_model
from finetune_trainer.outcome import RunError

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Combinations that keep ``density`` of the values (each also with ``_svd``)."""


@dataclass(frozen=True)
class Part:
    """An adapter on this node."""

    uri: str
    folder: Path
    weight: float = 1.0


def merged(
    model_path: Path,
    adapters: list[Part],
    source: ModelSource,
    *,
    base: Any = None,
    dtype: str = "auto",
    combination: str = "cat",
    density: float | None = None,
    rank: int | None = None,
    modules: str = "",
    seed: int = 42,
) -> Any:
    """The model with the adapters merged into it. ``base``: the model where it is loaded already.

    RunError(INVALID_CONFIGURATION) where they do not fit it, or each other.
    """
    for part in adapters:
        _check(part, weighted=len(adapters) > 1 or part.weight != 1)
    model = load(model_path, source, dtype, adapters[0]) if base is None else base
    with _explained(adapters):
        if len(adapters) == 1 and adapters[0].weight == 1 and not modules:
            return merged_into(model, adapters[0].folder, adapters[0].uri)
        adapted = combined(model, adapters, combination, density, rank, seed)
        if not modules:
            return adapted.merge_and_unload(safe_merge=True)
        return _merged_where(adapted, modules)


def _merged_where(adapted: PeftModel, modules: str) -> Any:
    """The base model, changed in the layers whose names match."""
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in adapted.named_modules()
        if isinstance(layer, BaseTunerLayer) and layer is not adapted.base_model
    }
    chosen = [layer for name, layer in layers.items() if re.search(modules, name)]
    if not chosen or adapted.active_peft_config.modules_to_save:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            "--modules does not go with modules_to_save: what was trained whole is merged whole."
            if chosen
            else f"--modules {modules!r} is found in no name of a layer with an adapter, such as {next(iter(layers))}.",
        )
    for layer in chosen:
        layer.merge(safe_merge=True)
    return adapted.unload()


def combined(
    model: Any, adapters: list[Part], combination: str, density: float | None, rank: int | None, seed: int
) -> PeftModel:
    """The model with one active adapter: the only one, or what several come to."""
    names = [f"part{number}" for number in range(len(adapters))]
    adapted = model
    for name, part in zip(names, adapters, strict=True):
        adapted = put_beside(adapted, part.folder, part.uri, name)
    if len(adapters) == 1 and adapters[0].weight == 1:
        return adapted
    for name in names:  # PEFT would scale what it combines by the first one's rule, and has it scaled already
        taken: Any = adapted.peft_config[name]
        taken.use_rslora = False
    options = {"density": density} if density is not None else {}
    options |= {"svd_rank": rank} if rank is not None else {}
    torch.manual_seed(seed)  # the dare combinations drop values at random
    adapted.add_weighted_adapter(
        names, [part.weight for part in adapters], "combined", combination_type=combination, **options
    )
    adapted.set_adapter("combined")
    for name in names:
        adapted.delete_adapter(name)
    return adapted


def _check(part: Part, *, weighted: bool) -> None:
    written = described(part.folder, part.uri)
    if "finetune_method" in written:
        kind = written["finetune_method"]["type"]
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{part.uri} is an adapter of type {kind}, which is not linear in its input and cannot be merged. Load it "
            "beside the model: finetune_trainer.methods.load_adapter.",
        )
    config = PeftConfig.from_pretrained(str(part.folder))
    if config.is_prompt_learning:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{part.uri} is {config.peft_type.value}: virtual tokens are no part of any weight and cannot be merged.",
        )
    if weighted and (config.peft_type != "LORA" or getattr(config, "use_dora", False) or config.modules_to_save):
        what = "DoRA" if getattr(config, "use_dora", False) else config.peft_type.value
        what = "LoRA with modules_to_save" if getattr(config, "modules_to_save", None) else what
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{part.uri} is {what}; only plain LoRA adapters are weighted or combined. Merge it alone, with weight 1.",
        )


class _explained:  # noqa: N801
    """What PEFT raises about adapters that do not fit, as a mistake of the user."""

    def __init__(self, adapters: list[Part]) -> None:
        self.names = ", ".join(part.uri for part in adapters)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | RuntimeError | KeyError | NotImplementedError):
            line = str(error).strip().splitlines()[0] if str(error).strip() else kind.__name__
            raise RunError(
                Cause.INVALID_CONFIGURATION, f"{self.names} cannot be merged into the model so: {line}"
            ) from error


def ordinary(path: Path, source: ModelSource, dtype: str) -> Path:
    """The folder to load model and tokenizer from: of a GGUF file a converted copy, as a run makes it; auto: in
    bfloat16, which holds what such files hold."""
    if not source.gguf_file:
        return path
    return converted(path, source.gguf_file, torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))


def load(path: Path, source: ModelSource, dtype: str, adapter: Part) -> Any:
    """The model, of the kind that the adapter was trained for, on the CPU; auto: in the format it was published in."""
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=source.trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{source.uri} is quantised; what is merged into it would be rounded away. Name the unquantised model.",
        )
    kind = kind_for(adapter)
    if kind.new_head and (adapter.folder / "config.json").is_file():  # it knows the labels
        config = AutoConfig.from_pretrained(adapter.folder, local_files_only=True)
    return getattr(transformers, kind.auto).from_pretrained(
        path,
        config=config,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=source.trust_remote_code,
    )


def kind_for(adapter: Part) -> Kind:
    """What kind of model an adapter was trained for."""
    task = described(adapter.folder, adapter.uri).get("task_type")
    return next((kind for kind in KINDS.values() if kind.task == task), LANGUAGE_MODEL)


def write(model: Any, words: Path, directory: Path, max_shard_size: str) -> None:
    """The model, and the tokenizer of the folder ``words``, into ``directory``."""
    # Every node merges into its own cache, but transformers saves on the first process of all only.
    object.__setattr__(model, "should_save_on_this_rank", lambda *_: True)
    save_model(model, AutoTokenizer.from_pretrained(words, local_files_only=True), directory, max_shard_size)


def run(config: MergeConfig, cache: Path) -> OutputInfo:
    """Fetch, merge, write."""
    digests: dict[str, str] = {}
    model_path, folders = fetch_model(config.model, cache, digests)
    model_path = ordinary(model_path, config.model, config.dtype)
    words = tokenizer_folder(model_path, folders)
    parts = [
        Part(source.uri, folder, weight)
        for source, folder, weight in zip(config.model.adapters, folders, config.weights, strict=True)
    ]
    facts = {"base_model": config.model.uri, "inputs": digests, "weights": config.weights}
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        if config.kind == "model":
            model = merged(
                model_path,
                parts,
                config.model,
                dtype=config.dtype,
                combination=config.combination,
                density=config.density,
                rank=config.rank,
                modules=config.modules,
                seed=config.seed,
            )
            write(model, words, Path(scratch), config.max_shard_size)
            (Path(scratch) / "README.md").write_text(merged_card(config, kind_for(parts[0])), encoding="utf-8")
            return upload(Path(scratch), config.output_uri, "merged", facts)
        for part in parts:
            _check(part, weighted=True)
        with _explained(parts):
            base = load(model_path, config.model, config.dtype, parts[0])
            adapted = combined(base, parts, config.combination, config.density, config.rank, config.seed)
        name = str(adapted.active_adapter)
        folder = Path(scratch)
        adapted.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        if (folder / name).is_dir():  # PEFT puts every adapter but "default" into a folder of its name
            for path in (folder / name).iterdir():
                path.rename(folder / path.name)
            (folder / name).rmdir()
        AutoTokenizer.from_pretrained(words, local_files_only=True).save_pretrained(folder)
        (folder / "README.md").write_text(merged_card(config, kind_for(parts[0])), encoding="utf-8")
        return upload(folder, config.output_uri, "adapter", facts)


def main(arguments: list[str]) -> int:
    """The command; its exit code."""

    def work(cache: Path) -> None:
        output = run(MergeConfig.model_validate_json(Path(arguments[0]).read_bytes()), cache)
        print(f"{output.kind} of {output.size / 1e6:,.1f} MB in {output.uri}")

    return carried_out("merging", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
