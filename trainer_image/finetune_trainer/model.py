"""Loads and saves the model and its tokenizer; knows every trap of the libraries on that way.

Called by ``run.py`` and by ``methods/``. Attention, number format and quantisation are decided here and nowhere
else. Under ZeRO-3 ``engine.py`` has created ``HfDeepSpeedConfig`` before :func:`load_model` is called;
transformers then partitions the weights while it reads them, and nothing here touches a weight after that.
"""

import errno
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations import is_deepspeed_zero3_enabled

from finetune_api.causes import Cause
from finetune_api.methods import Qlora
from finetune_api.run import TrainerConfig
from finetune_trainer.fetch import no_safetensors
from finetune_trainer.gguf import converted
from finetune_trainer.outcome import RunError
from finetune_trainer.templates import use_template

log = logging.getLogger(__name__)

ATTENTION = "sdpa"
"""Isolates packed rows by their position_ids (``assert_packing_isolated`` proves it for the model at hand)."""


def dtype_of(config: TrainerConfig, device: torch.device) -> torch.dtype:
    """Number format of weights and computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.model.dtype]


# --- tokenizer --------------------------------------------------------------------------------------------------


def load_tokenizer(path: Path, config: TrainerConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template of the configuration where it gives one.

    A tokenizer without a padding token pads with its end token: what is learned is decided by labels, which
    padding never has, so the end of an answer is still learned and no embedding is added.
    RunError(MODEL_NOT_FOUND) where there is no tokenizer.
    """
    with _explained(f"the tokenizer of {config.model.uri}"):
        path = _readable(path, config)
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=config.model.trust_remote_code
        )
    use_template(tokenizer, config.data.chat_template)
    rows = vocabulary_rows(path)
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        stand_in = tokenizer.eos_token or tokenizer.unk_token
        if stand_in is None:
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"the tokenizer of {config.model.uri} has neither a padding nor an end token; add eos_token to its "
                "tokenizer_config.json",
            )
        log.info("the tokenizer has no usable padding token; padding with %r", stand_in)
        tokenizer.pad_token = stand_in
    tokenizer.padding_side = "right"
    return tokenizer


def vocabulary_rows(path: Path) -> int | None:
    """Rows of the embedding by the model's config.json; None where that does not say."""
    try:
        config = json.loads((path / "config.json").read_text())
        return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- model ------------------------------------------------------------------------------------------------------


def load_model(path: Path, config: TrainerConfig, device: torch.device) -> PreTrainedModel:
    """The model on ``device`` (partitioned under ZeRO-3), in training mode, all weights as they were published.

    Only safetensors and GGUF are read. ``qlora``: linear layers in 4 bits. With ``data.packing`` it is proven
    that packed rows do not see each other. RunError: MODEL_NOT_FOUND, INVALID_CONFIGURATION.
    """
    qlora = config.method if isinstance(config.method, Qlora) else None
    model = _load(path, config, device, dtype_of(config, device), qlora)
    # A cache would switch off the detection of packed rows, and is of no use in training. save_model restores it.
    model._published_use_cache = getattr(model.config, "use_cache", True)  # type: ignore[assignment]
    model.config.use_cache = False
    model.train()
    if config.data.packing and not is_deepspeed_zero3_enabled():
        assert_packing_isolated(model)
    return model


def load_for_merge(path: Path, config: TrainerConfig) -> PreTrainedModel:
    """A second, plain copy of the base model on the CPU: never quantised, never partitioned, for ``merge``."""
    with without_zero3():
        return _load(path, config, torch.device("cpu"), _published_dtype(config), None)


def _published_dtype(config: TrainerConfig) -> torch.dtype:
    """The number format of the run, asked on the CPU: there ``auto`` would mean float32."""
    return dtype_of(config, torch.device("cuda" if config.accelerator == "gpu" else "cpu"))


def _readable(path: Path, config: TrainerConfig) -> Path:
    """The folder to read model and tokenizer from."""
    if not config.model.gguf_file or not (path / config.model.gguf_file).is_file():
        return path
    with without_zero3():
        return converted(path, config.model.gguf_file, _published_dtype(config))


@contextmanager
def without_zero3() -> Iterator[None]:
    """Inside, transformers loads models whole although this process trains with ZeRO-3."""
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = kept


def _load(
    path: Path, config: TrainerConfig, device: torch.device, dtype: torch.dtype, qlora: Qlora | None
) -> PreTrainedModel:
    _check_folder(path, config)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": ATTENTION,
        "use_safetensors": True,
        "local_files_only": True,
        "trust_remote_code": config.model.trust_remote_code,
    }
    if not is_deepspeed_zero3_enabled():
        options["device_map"] = {"": device}
    if qlora is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=qlora.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=qlora.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    with _explained(f"the model {config.model.uri}"):
        path = _readable(path, config)
        try:
            model, info = _from_pretrained(path, options)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            log.warning("%s has no %s attention; eager attention is used", config.model.uri, ATTENTION)
            model, info = _from_pretrained(path, options | {"attn_implementation": "eager"})
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"the files of {config.model.uri} lack {len(missing)} weights of {type(model).__name__}, e.g. "
            f"{missing[0]}: it is incomplete, or not a language model. Name a causal language model in spec.model.uri.",
        )
    if qlora is not None:
        _guard_4bit(model)
    return model


def _from_pretrained(path: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    found: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    model, info = found
    return model, info


def _guard_4bit(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks weights in an evaluation's forward pass, after which
    merging and saving them gives garbage."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_folder(path: Path, config: TrainerConfig) -> None:
    """Refuse what must not be read, before a library tries."""
    uri = config.model.uri
    names = [file.name for file in path.iterdir()] if path.is_dir() else []
    if config.model.gguf_file:
        if config.model.gguf_file not in names:
            raise RunError(Cause.MODEL_NOT_FOUND, f"{uri} holds no file {config.model.gguf_file!r}")
        return
    if not any(name.endswith(".safetensors") for name in names):
        raise no_safetensors(uri, names)
    if "config.json" not in names:
        raise RunError(Cause.MODEL_NOT_FOUND, f"{uri} holds no config.json; spec.model.uri must name a model's folder")
    try:
        described = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise RunError(Cause.INVALID_CONFIGURATION, f"{uri}: config.json is no JSON: {error}") from error
    quantization = described.get("quantization_config") or {}
    if quantization:
        kind = quantization.get("quant_method", "an unknown method")
        four_bit = kind == "bitsandbytes" and quantization.get("load_in_4bit")
        if not (four_bit and isinstance(config.method, Qlora)):
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"{uri} is already quantised ({kind}); such weights are trained only as bitsandbytes 4-bit with "
                "method.type: qlora. Name the unquantised model.",
            )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what transformers raises while loading into the mistake of the user it means, where it means one."""
    try:
        yield
    except (RunError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        text = str(error)
        line = text.strip().splitlines()[0][:400] if text.strip() else type(error).__name__
        if "trust_remote_code" in text or "custom code" in text:
            message = (
                f"{what} brings Python code of its own, which is not run unless you ask for it. Read that code, then "
                "set spec.model.trust_remote_code: true, or use a model that transformers knows."
            )
        elif "does not recognize this architecture" in text or "Unrecognized model" in text:
            message = (
                f"{what}: its model_type is not known to transformers {transformers.__version__}. {line} Use an image "
                "with a newer transformers, or another model."
            )
        elif "Unrecognized configuration class" in text:
            message = (
                f"{what} is no causal language model ({line}). Name one that transformers' AutoModelForCausalLM loads."
            )
        elif type(error).__name__ == "SafetensorError" or "size mismatch" in text:
            message = f"{what} cannot be read: {line}. Its files are damaged or do not belong together."
        elif isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise RunError(
                Cause.STORAGE_UNAVAILABLE, f"{what} cannot be read: {line}. Check the mount or the cache's disk."
            ) from error
        elif isinstance(error, OSError | ValueError | KeyError):
            message = f"{what} cannot be loaded: {type(error).__name__}: {line}"
        else:
            raise
        raise RunError(Cause.INVALID_CONFIGURATION, message) from error


# --- training aids ----------------------------------------------------------------------------------------------


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the activations of every decoder layer in the backward pass.

    By the non-reentrant kind: it needs no input that requires gradients (a frozen embedding gives none), and it goes
    with ZeRO-3 since transformers keeps a layer's own hooks outside (tested).
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@torch.no_grad()
def assert_packing_isolated(model: PreTrainedModel) -> None:
    """RunError(INVALID_CONFIGURATION) unless rows packed into one sequence do not see each other.

    Tried on the model itself: the logits of a second row must stay what they are when the first one changes, and
    must be those it has in first place. Three forward passes of a few tokens, all of one shape: another shape takes
    other kernels, and 32 layers of 4-bit weights make 6 % of their rounding.
    """
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        length, vocabulary = 6, int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        rows = torch.arange(3 * length, device=device).reshape(3, length) * 7919 % vocabulary
        positions = torch.arange(length, device=device)

        def logits(*documents: torch.Tensor) -> torch.Tensor:
            out = model(
                input_ids=torch.cat(documents)[None],
                position_ids=positions.repeat(len(documents))[None],
                use_cache=False,
            )
            return out.logits[0].float()

        in_front = logits(rows[2], rows[0])[:length]
        after_first, after_other = logits(rows[0], rows[2])[length:], logits(rows[1], rows[2])[length:]
    finally:
        model.train(was_training)
    scale = in_front.abs().mean().clamp_min(1e-6)
    seen = float((after_first - after_other).abs().mean() / scale)
    moved = float((after_first - in_front).abs().mean() / scale)
    if seen > 1e-3 or moved > 5e-2:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"data.packing does not work with {type(model).__name__}: rows packed together change each other's result "
            f"(by {max(seen, moved):.1%}). Set data.packing: false.",
        )


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers of weights; 4-bit and ZeRO-3-partitioned ones count as what they stand for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = _logical_size(parameter)
        total += count
        if parameter.requires_grad:
            trainable += count
    return trainable, total


def _logical_size(parameter: nn.Parameter) -> int:
    if hasattr(parameter, "ds_numel"):  # partitioned: the tensor itself is empty
        return int(parameter.ds_numel)
    state = getattr(parameter, "quant_state", None)
    if state is not None:  # bitsandbytes: two weights in a byte
        return int(torch.Size(state.shape).numel())
    return parameter.numel()


# --- saving -----------------------------------------------------------------------------------------------------


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    max_shard_size: str,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write model and tokenizer as transformers reads them, in safetensors files of at most ``max_shard_size``.

    ``state_dict``: the weights, where the model does not hold them itself (gathered under ZeRO-3).
    """
    use_cache = model.config.use_cache
    model.config.use_cache = getattr(model, "_published_use_cache", use_cache)
    try:
        _mend_generation_config(model)
        model.save_pretrained(directory, state_dict=state_dict, max_shard_size=size_in_bytes(max_shard_size))
    finally:
        model.config.use_cache = use_cache
    tokenizer.save_pretrained(directory)


def size_in_bytes(size: str) -> int:
    """``"5GB"`` → 5,000,000,000; ``"5GiB"`` → 5,368,709,120."""
    match = re.fullmatch(r"([0-9.]+)(MB|GB|MiB|GiB)", size)
    if match is None:
        raise RunError(Cause.INVALID_CONFIGURATION, f"{size!r} is no size; accepted: e.g. 500MB, 5GB, 5GiB")
    unit = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}[match[2]]
    return int(float(match[1]) * unit)


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Many published models give a temperature without do_sample; transformers refuses to save those once they
    were touched, at the very end of a run."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
