"""Loads and saves the model and its tokenizer; knows every trap of the libraries on that way.

Called by ``run.py`` and by ``methods/``. Attention, number format and quantisation are decided here and nowhere
else. Under ZeRO-3 ``engine.py`` has created ``HfDeepSpeedConfig`` before :func:`load_model` is called;
transformers then partitions the weights while it reads them, and nothing here touches a weight after that.
"""

import errno
import json
import logging
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations import is_deepspeed_zero3_enabled

from finetune_api.causes import Cause
from finetune_api.methods import Qlora
from finetune_api.run import TrainerConfig
from finetune_trainer.adapter_files import has_tokenizer, tokenizer_folder
from finetune_trainer.fetching.wanted import no_safetensors
from finetune_trainer.generate import end_tokens
from finetune_trainer.gguf import converted
from finetune_trainer.outcome import RunError
from finetune_trainer.templates import use_template

if TYPE_CHECKING:
    from finetune_trainer.data.labels import Labels

log = logging.getLogger(__name__)

ATTENTION = "sdpa"
"""Isolates packed rows by their position_ids (``assert_packing_isolated`` proves it for the model at hand)."""


def dtype_of(config: TrainerConfig, device: torch.device) -> torch.dtype:
    """Number format of weights and computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.model.dtype]


@dataclass(frozen=True)
class Kind:
    """What kind of model a stage trains."""

    auto: str
    """The class of transformers that loads it."""
    task: str
    """PEFT's ``task_type``."""
    words: str
    """As it is called in messages."""
    new_head: bool = False
    """Published models have no such head: where it is missing it begins with random weights, and it is trained and
    saved with every method."""
    outputs: int | None = None
    """How many numbers the head gives, where the labels do not say."""
    talks: bool = False
    """Its rows are conversations, written by a chat template."""


LANGUAGE_MODEL = Kind("AutoModelForCausalLM", "CAUSAL_LM", "causal language model", talks=True)
KINDS: dict[str, Kind] = {
    "sequence_classification": Kind(
        "AutoModelForSequenceClassification", "SEQ_CLS", "model for sequence classification", new_head=True
    ),
    "token_classification": Kind(
        "AutoModelForTokenClassification", "TOKEN_CLS", "model for token classification", new_head=True
    ),
    "reward": Kind(
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        "model for sequence classification",
        new_head=True,
        outputs=1,
        talks=True,
    ),
    "seq2seq": Kind("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "encoder-decoder"),
}
"""By stage; all others train a causal language model."""
HEADS = ("classifier", "pre_classifier", "classification_head", "score", "pooler")
"""What the modules that make a classifier are called: they are trained whole, so never quantised."""


def kind_of(stage: str) -> Kind:
    """What kind of model a stage trains."""
    return KINDS.get(stage, LANGUAGE_MODEL)


# --- tokenizer --------------------------------------------------------------------------------------------------


def load_tokenizer(path: Path, config: TrainerConfig, adapters: Iterable[Path] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of the model in ``path`` with ``adapters`` on top (``adapter_files.tokenizer_folder``), with the
    chat template of the configuration where it gives one.

    A tokenizer without a padding token pads with its end token: what is learned is decided by labels, which
    padding never has, so the end of an answer is still learned and no embedding is added.
    RunError(MODEL_NOT_FOUND) where there is no tokenizer.
    """
    with _explained(f"the tokenizer of {config.model.uri}"):
        path = _readable(path, config)
        words = tokenizer_folder(path, adapters)
        if words == path and not has_tokenizer(path) and (files := sorted(path.glob("*.gguf"))):
            raise no_safetensors(config.model.uri, [file.name for file in files])
        tokenizer = AutoTokenizer.from_pretrained(
            words, local_files_only=True, trust_remote_code=config.model.trust_remote_code
        )
        if config.stage == "token_classification" and not getattr(tokenizer, "add_prefix_space", True):
            # GPT-2's and RoBERTa's take words one by one only so.
            tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True, add_prefix_space=True)
    if kind_of(config.stage).talks:
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


LEARNED_POSITIONS = (
    *("albert", "bart", "bert", "biogpt", "camembert", "distilbert", "electra", "gpt2", "gpt_bigcode", "gpt_neo"),
    *("marian", "mbart", "mpnet", "openai-gpt", "opt", "pegasus", "roberta", "xlm-roberta"),
)
"""Model types with a table of positions: a longer row has no entry in it. Others compute any position."""
_BEHIND_PADDING = ("camembert", "mpnet", "roberta", "xlm-roberta")
"""Of these the first position stands behind that of the padding token."""


def most_positions(path: Path) -> int | None:
    """The longest row, in tokens, that a model has positions for; None where it takes any, or does not say."""
    try:
        config = json.loads((path / "config.json").read_text())
        kind = config["model_type"]
        if kind not in LEARNED_POSITIONS:
            return None
        length = int(config.get("max_position_embeddings") or config["n_positions"])
        return length - (int(config.get("pad_token_id", 1)) + 1 if kind in _BEHIND_PADDING else 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- model ------------------------------------------------------------------------------------------------------


def load_model(
    path: Path, config: TrainerConfig, device: torch.device, labels: "Labels | None" = None
) -> PreTrainedModel:
    """The stage's kind of model on ``device`` (partitioned under ZeRO-3), in training mode, all weights as they were
    published. A classifier's head for ``labels`` may be new: it is drawn by torch's generator (:func:`head_of`).

    Only safetensors and GGUF are read. ``qlora``: linear layers in 4 bits. With ``data.packing`` it is proven
    that packed rows do not see each other. RunError: MODEL_NOT_FOUND, INVALID_CONFIGURATION.
    """
    qlora = config.method if isinstance(config.method, Qlora) else None
    described: dict[str, Any] = {}
    if (outputs := kind_of(config.stage).outputs) is not None:
        described["num_labels"] = outputs
    if labels is not None:
        described["id2label"] = dict(enumerate(labels.names))
        described["label2id"] = {name: place for place, name in enumerate(labels.names)}
        if labels.problem_type:
            described["problem_type"] = labels.problem_type
    model = _load(path, config, device, dtype_of(config, device), qlora, described)
    # A cache would switch off the detection of packed rows, and is of no use in training. save_model restores it.
    if hasattr(model.config, "use_cache"):
        model._published_use_cache = model.config.use_cache
        model.config.use_cache = False
    model.train()
    if config.data.packing and not is_deepspeed_zero3_enabled():
        assert_packing_isolated(model)
    return model


def load_finished(path: Path, config: TrainerConfig, device: torch.device, described_by: Path) -> PreTrainedModel:
    """A model to be used, whole on ``device``; a classifier has the labels that ``config.json`` in ``described_by``
    names."""
    described: dict[str, Any] = {}
    if kind_of(config.stage).new_head and (described_by / "config.json").is_file():
        described = {"config": AutoConfig.from_pretrained(described_by, local_files_only=True)}
    model = _load(path, config, device, dtype_of(config, device), None, described)
    model.eval()
    model.requires_grad_(False)
    return model


def load_for_merge(path: Path, config: TrainerConfig, adapter: Path) -> PreTrainedModel:
    """A second, plain copy of the base model on the CPU, with the labels of the saved ``adapter``: never quantised,
    never partitioned, for ``merge``."""
    described: dict[str, Any] = {}
    if kind_of(config.stage).new_head:
        described = {"config": AutoConfig.from_pretrained(adapter, local_files_only=True)}
    with without_zero3():
        return _load(path, config, torch.device("cpu"), _published_dtype(config), None, described)


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
    path: Path,
    config: TrainerConfig,
    device: torch.device,
    dtype: torch.dtype,
    qlora: Qlora | None,
    described: dict[str, Any],
) -> PreTrainedModel:
    """``described``: further arguments of ``from_pretrained``, which say what the model's head is for."""
    _check_folder(path, config)
    kind = kind_of(config.stage)
    options: dict[str, Any] = described | {
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
            llm_int8_skip_modules=[f".*{name}" for name in HEADS] if kind.new_head else None,
        )
    if kind.new_head:  # a head for other labels is replaced
        options["ignore_mismatched_sizes"] = True
    with _explained(f"the model {config.model.uri}", kind):
        path = _readable(path, config)
        _stretch(path, config, options)
        try:
            model, info = _from_pretrained(path, kind, options)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            log.warning("%s has no %s attention; eager attention is used", config.model.uri, ATTENTION)
            model, info = _from_pretrained(path, kind, options | {"attn_implementation": "eager"})
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    outside = _head_modules(model) if kind.new_head else []
    lacking = [name for name in missing if not (kind.new_head and _may_be_new(name, outside))]
    if lacking:
        # transformers would go on with random numbers in their place.
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"the files of {config.model.uri} lack {len(lacking)} weights of {type(model).__name__}, e.g. "
            f"{lacking[0]}: it is incomplete, or another kind of model. Name a {kind.words} in spec.model.uri.",
        )
    if kind.new_head:
        new = sorted({name.rpartition(".")[0] for name in missing})
        model._finetune_head = list(dict.fromkeys([*outside, *new]))  # type: ignore[assignment]
        if new:
            log.info("new, with random weights: %s", ", ".join(new))
        if model.config.pad_token_id is None:  # decoders look for the last token that is not padding
            model.config.pad_token_id = load_tokenizer(path, config).pad_token_id
    if qlora is not None:
        _guard_4bit(model)
    return model


def _stretch(path: Path, config: TrainerConfig, options: dict[str, Any]) -> None:
    """Add ``model.rope_parameters`` to what the model is loaded with, by the names of transformers.

    RunError(INVALID_CONFIGURATION) where the model has no rotary positions, or several kinds of them.
    """
    wanted = config.model.rope_parameters
    if wanted.rope_type == "default":
        return
    remote = config.model.trust_remote_code
    given = options.get("config") or AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=remote)
    own, length = getattr(given, "rope_parameters", None), getattr(given, "max_position_embeddings", None)
    if not own or not length or any(isinstance(value, dict) for value in own.values()):
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{config.model.uri} ({given.model_type}) has no rotary positions, or several kinds of them: spec.model."
            "rope_parameters cannot stretch them. Remove it, or choose another model.",
        )
    changed: dict[str, Any] = {"rope_type": wanted.rope_type, "factor": wanted.factor}
    changed |= {key: own[key] for key in ("rope_theta", "partial_rotary_factor") if key in own}
    original = int(own.get("original_max_position_embeddings") or length)
    if wanted.rope_type in ("yarn", "llama3"):
        changed["original_max_position_embeddings"] = original
    if wanted.rope_type == "llama3":  # of Llama 3.1
        changed |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    # The dynamic kind takes the model's own length as the one from which it stretches.
    longest = length if wanted.rope_type == "dynamic" else max(length, round(original * wanted.factor))
    if "config" in options:
        given.rope_parameters, given.max_position_embeddings = changed, longest
    else:
        options |= {"rope_parameters": changed, "max_position_embeddings": longest}
    log.info("positions are stretched: %s %g, up to %d tokens", wanted.rope_type, wanted.factor, longest)


def _from_pretrained(path: Path, kind: Kind, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    verbosity = transformers.logging.get_verbosity()
    if kind.new_head:  # its report of what is missing or not used is read here
        transformers.logging.set_verbosity_error()
    try:
        found: Any = getattr(transformers, kind.auto).from_pretrained(path, output_loading_info=True, **options)
    finally:
        transformers.logging.set_verbosity(verbosity)
    model, info = found
    return model, info


def _head_modules(model: PreTrainedModel) -> list[str]:
    """The modules beside the transformer: classifier, score, pre_classifier …"""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def _may_be_new(name: str, outside: list[str]) -> bool:
    """A weight of the head, or of the pooler below it, which models trained on words alone do not have."""
    return name.partition(".")[0] in outside or ".pooler." in name


def head_of(model: Any) -> list[str]:
    """The names of the modules that make a loaded model a classifier: trained and saved with every method.

    Of DistilBERT ``pre_classifier`` and ``classifier``; of BERT ``classifier``, and the pooler where it was not
    published. Empty for language models.
    """
    return list(getattr(model, "_finetune_head", []))


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


def _line(text: str) -> str:
    """A message of several lines as one, shortened where it is long."""
    return textwrap.shorten(text, 400, placeholder=" …")


@contextmanager
def _explained(what: str, kind: Kind = LANGUAGE_MODEL) -> Iterator[None]:
    """Turn what transformers raises while loading into the mistake of the user it means, where it means one."""
    try:
        yield
    except (RunError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        text = str(error)
        line = _line(text) or type(error).__name__
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
        elif "backend tokenizer" in text:
            message = (
                f"{what} cannot be read: no file of one that transformers {transformers.__version__} knows lies in it "
                "(tokenizer.json; or tokenizer.model, or vocab.json with merges.txt). Copy those of the model that it "
                "was made from beside its weights."
            )
        elif isinstance(error, json.JSONDecodeError) or "EOF while parsing" in text:
            message = f"{what} cannot be read: one of its JSON files is cut off or damaged ({line}). Copy it again."
        elif "Unrecognized configuration class" in text:
            message = f"{what} is no {kind.words} ({line}). Name one that transformers' {kind.auto} loads."
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
        length, vocabulary = 6, int(model.config.get_text_config().vocab_size)
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
    use_cache = getattr(model.config, "use_cache", None)
    if use_cache is not None:
        model.config.use_cache = getattr(model, "_published_use_cache", use_cache)
    try:
        _mend_generation_config(model, tokenizer)
        model.save_pretrained(directory, state_dict=state_dict, max_shard_size=size_in_bytes(max_shard_size))
    finally:
        if use_cache is not None:
            model.config.use_cache = use_cache
    tokenizer.save_pretrained(directory)


def size_in_bytes(size: str) -> int:
    """``"5GB"`` → 5,000,000,000; ``"5GiB"`` → 5,368,709,120."""
    match = re.fullmatch(r"([0-9.]+)(MB|GB|MiB|GiB)", size)
    if match is None:
        raise RunError(Cause.INVALID_CONFIGURATION, f"{size!r} is no size; accepted: e.g. 500MB, 5GB, 5GiB")
    unit = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}[match[2]]
    return int(float(match[1]) * unit)


def _mend_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whoever loads the model gets answers that end where it was taught to end them.

    Many published models give a temperature without do_sample; transformers refuses to save those once they
    were touched, at the very end of a run.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    ends = end_tokens(model, tokenizer)
    if ends:
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    if tokenizer.pad_token_id is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
