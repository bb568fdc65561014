"""Which files of a source are wanted: of a model, an adapter, rows. Pure but for :func:`local_files`.

Chosen by ``fetch.py`` and ``hub.py`` among the names that a source lists; ``data`` asks which files hold rows.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from finetune_api.causes import Cause
from finetune_api.spec import AdapterSource, DataSource, ModelSource
from finetune_trainer.adapter_files import CONFIG, WEIGHTS
from finetune_trainer.outcome import RunError

DATA_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_COLUMNS = (".parquet", ".arrow")  # compressed inside
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what datasets writes beside
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_MODEL_PARTS = (
    "*.json",  # configuration, tokenizer, index of the shards
    "*.jinja",  # chat template
    "*.model",  # sentencepiece
    "*.tiktoken",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map*",
)

_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json")

Names = dict[str, int]
"""File names relative to the source, with their sizes in bytes (-1 where unknown)."""
Select = Callable[[Names, Callable[[str], bytes]], list[str]]
"""Picks the wanted names; may read small files by name."""


def model_files(model: ModelSource) -> Select:
    """Configuration, tokenizer and weights, in safetensors or the one GGUF file. RunError where they are not there."""

    def select(names: Names, read: Callable[[str], bytes]) -> list[str]:
        top = [name for name in names if "/" not in name]
        patterns = (*_MODEL_PARTS, *(("*.py",) if model.trust_remote_code else ()))
        parts = [name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        if model.gguf_file:
            if model.gguf_file not in names:
                raise RunError(
                    Cause.MODEL_NOT_FOUND,
                    f"{model.uri} holds no file {model.gguf_file!r} (spec.model.gguf_file); its GGUF files: "
                    f"{some(name for name in names if name.endswith('.gguf'))}",
                )
            return sorted({*parts, model.gguf_file})
        index = "model.safetensors.index.json"
        if index in names:
            weights = sorted(set(json.loads(read(index))["weight_map"].values()))
            missing = [name for name in weights if name not in names]
            if missing:
                raise RunError(
                    Cause.MODEL_NOT_FOUND,
                    f"{model.uri} is incomplete: {index} names {some(missing)}, which are not there",
                )
        elif "model.safetensors" in names:
            weights = ["model.safetensors"]
        else:
            weights = [name for name in top if name.endswith(".safetensors")]
        if not weights:
            raise no_safetensors(model.uri, top)
        return sorted({*parts, *weights})

    return select


def _of_tokenizer(name: str) -> bool:
    patterns = (*_MODEL_PARTS[1:], *_TOKENIZER_JSON)
    return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def tokenizer_files(names: Names, read: Callable[[str], bytes]) -> list[str]:
    """Of a model everything but its weights."""
    del read
    return sorted(n for n in names if "/" not in n and any(fnmatch.fnmatch(n, pattern) for pattern in _MODEL_PARTS))


def no_safetensors(uri: str, names: Iterable[str]) -> RunError:
    """The error for a model folder that holds no safetensors file. ``names``: what it holds."""
    names = list(names)
    pickled = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in _PICKLED)]
    gguf = [name for name in names if name.endswith(".gguf")]
    if pickled:
        return RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri} holds its weights only as {some(pickled)}. Only safetensors are accepted: the others can "
            "run code when they are read. Convert once with transformers: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…), and name the result in spec.model.uri.",
        )
    if gguf:
        return RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri} holds GGUF files: name one in spec.model.gguf_file, or by --gguf-file ({some(gguf)})",
        )
    return RunError(
        Cause.MODEL_NOT_FOUND,
        f"{uri} holds no model: no *.safetensors file among {some(names)}. "
        "spec.model.uri must name the folder that holds config.json.",
    )


def adapter_files(adapter: AdapterSource) -> Select:
    """Configuration and weights as PEFT writes them, and a tokenizer. RunError where the first two are not there."""

    def select(names: Names, read: Callable[[str], bytes]) -> list[str]:
        del read
        needed = [CONFIG, WEIGHTS]
        if missing := [name for name in needed if name not in names]:
            pickled = " (adapter_model.bin is not read: it can run code)" if "adapter_model.bin" in names else ""
            raise RunError(
                Cause.MODEL_NOT_FOUND,
                f"{adapter.uri} holds no adapter: {' and '.join(missing)} not among {some(names)}{pickled}. "
                "spec.model.adapters must name folders that PEFT or a run has written.",
            )
        # A classifier's configuration has its labels.
        more = (name for name in names if name == "config.json" or _of_tokenizer(name))
        return sorted({*needed, *more})

    return select


def reward_files(source: AdapterSource) -> Select:
    """Of a whole model or of an adapter, whose tokenizer and head's configuration are wanted, too."""

    def select(names: Names, read: Callable[[str], bytes]) -> list[str]:
        if CONFIG not in names:
            return model_files(ModelSource(uri=source.uri, revision=source.revision))(names, read)
        return adapter_files(source)(names, read)

    return select


def row_files(source: DataSource) -> Select:
    """The files that hold rows. RunError where there are none."""

    def select(names: Names, read: Callable[[str], bytes]) -> list[str]:
        del read
        _, pattern = split_pattern(source.uri)
        chosen = data_files(names, pattern)
        if source.uri.startswith("hf://"):  # says which file belongs to which split
            chosen += [name for name in names if name == "README.md"]
        if not chosen:
            raise RunError(
                Cause.DATA_NOT_FOUND,
                f"{source.uri} holds no data: no file that ends in {', '.join(DATA_KINDS)} among {some(names)}",
            )
        return sorted(chosen)

    return select


def data_kind(name: str) -> str:
    """The ending that tells how a file is read, without that of its compression; "" where it is no data file."""
    path = PurePosixPath(name)
    packed = path.suffix in _PACKED
    ending = PurePosixPath(path.stem).suffix if packed else path.suffix
    return ending if ending in DATA_KINDS and not (packed and ending in _COLUMNS) else ""


def data_files(names: Iterable[str], pattern: str = "") -> list[str]:
    """The data files among names relative to a folder, sorted: those ``pattern`` matches, or all.

    Hidden ones are none. Of all, texts count only where there is nothing else: they tend to be licences and notes.
    """
    chosen = sorted(name for name in names if data_kind(name) and not any(p.startswith(".") for p in name.split("/")))
    if pattern:
        wanted = _glob(pattern)
        return [name for name in chosen if wanted.fullmatch(name)]
    chosen = [name for name in chosen if PurePosixPath(name).name not in _NO_ROWS]
    return [name for name in chosen if data_kind(name) != ".txt"] or chosen


def split_pattern(uri: str) -> tuple[str, str]:
    """``s3://b/rows/*.jsonl`` → (``s3://b/rows``, ``*.jsonl``); without a pattern the URI and ""."""
    parts = uri.split("/")
    first = next((number for number, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _glob(pattern: str) -> re.Pattern[str]:
    """As a shell's: * and ? stop at /, ** does not, [a-z] is one of these."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            meaning.get(piece) or (piece.replace("[!", "[^") if piece.startswith("[") else re.escape(piece))
            for piece in pieces
        )
    )


def local_files(path: Path) -> list[Path]:
    """The data files that a file's, a folder's or a pattern's path means."""
    if path.is_file():
        return [path]
    root, pattern = (str(path), "") if path.is_dir() else split_pattern(str(path))
    names = (str(file.relative_to(root)) for file in Path(root).rglob("*") if file.is_file())
    return [Path(root, name) for name in data_files(names, pattern)]


def some(names: Iterable[str], most: int = 5) -> str:
    """``a, b, c and 4 more`` for messages."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
