"""Tiny encoders and encoder-decoders with their tokenizers, as they are published, and rows whose labels follow a rule.

Made on the spot from fixed seeds: 64 hidden units, two layers. The rules need more than counting words, and can be
told in one line each.
"""

import json
import random
from pathlib import Path
from typing import Any

from tests.trainer.tiny import WORDS

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
SHAPE = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = SHAPE | {"intermediate_size": 128, "max_position_embeddings": 128}
DISTILBERT = {"vocab_size": 64, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}
DISTILBERT |= {"max_position_embeddings": 128}
T5 = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "dropout_rate": 0.0}
BART = {"vocab_size": 64, "d_model": 64, "max_position_embeddings": 128, "dropout": 0.0}
BART |= {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 128))}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    # As they are published: encoders with the head they were pretrained with.
    "bert": ("BertForMaskedLM", BERT | _QUIET),
    "roberta": ("RobertaForMaskedLM", BERT | _QUIET | {"pad_token_id": 0}),
    "distilbert": ("DistilBertForMaskedLM", DISTILBERT | {"dropout": 0.0, "attention_dropout": 0.0}),
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", BART),
}


def make(directory: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A model of a family with its tokenizer, as transformers saves them."""
    import torch
    import transformers

    name, shape = SHAPES[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**shape | changes))
    for parameter_name, p in model.named_parameters():  # trained models have biases
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.02)
    model.save_pretrained(directory)
    make_tokenizer(family).save_pretrained(directory)
    return directory


def make_tokenizer(family: str) -> Any:
    """Words; BERT's pairs are ``[CLS] a [SEP] b [SEP]`` with token types, T5's texts end in ``</s>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"] if family in ("t5", "bart", "roberta") else SPECIAL
    vocabulary = {word: number for number, word in enumerate([*names, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=names[3]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first, last = names[1], names[2]
    single, pair = f"{first} $A {last}", f"{first} $A {last} $B:1 {last}:1"
    if family == "t5":
        single, pair = f"$A {last}", f"$A {last} $B {last}"
    raw.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])]
    )
    inputs = ["input_ids", *(["token_type_ids"] if family == "bert" else []), "attention_mask"]
    ends = {"eos_token": last} if family in ("t5", "bart") else {"cls_token": first, "sep_token": last}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=names[0], unk_token=names[3], model_input_names=inputs, **ends
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def draws(seed: int) -> random.Random:
    """Where rows come from."""
    return random.Random(seed)
