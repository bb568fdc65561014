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
OPT = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128}
OPT |= {"word_embed_proj_dim": 64, "max_position_embeddings": 128, "dropout": 0.0}
OPT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = {"vocab_size": 64, "d_model": 64, "max_position_embeddings": 128, "dropout": 0.0}
BART |= {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 128))}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2}
_CALM = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    # As they are published: encoders with the head they were pretrained with.
    "bert": ("BertForMaskedLM", BERT | _QUIET),
    "roberta": ("RobertaForMaskedLM", BERT | _QUIET | {"pad_token_id": 0}),
    "distilbert": ("DistilBertForMaskedLM", DISTILBERT | _CALM),
    "opt": ("OPTForCausalLM", OPT),
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

    names = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"] if family in ("t5", "bart", "roberta", "opt") else SPECIAL
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
    ends = {"eos_token": last} if family in ("t5", "bart", "opt") else {"cls_token": first, "sep_token": last}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=names[0], unk_token=names[3], model_input_names=inputs, **ends
    )


Rows = list[dict[str, Any]]
FILL = ("the", "a", "is", "and", "of", "to", "house", "tree", "thing", "name")
GOOD, BAD = ("red", "green", "blue", "hello", "please"), ("one", "two", "three", "four", "five")
ANIMALS = ("cat", "dog", "bird")


def write_rows(path: Path, rows: Rows) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _mixed(draw: random.Random, words: list[str], least: int, most: int) -> str:
    mixed = words + [draw.choice(FILL) for _ in range(draw.randint(least, most))]
    draw.shuffle(mixed)
    return " ".join(mixed)


def opinions(count: int, seed: int, tasks: tuple[str, ...] = ()) -> Rows:
    """positive where a text has more good words than bad ones, else negative; never as many."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        good = draw.randint(0, 4)
        bad = draw.choice([n for n in range(5) if n != good])
        words = [draw.choice(GOOD) for _ in range(good)] + [draw.choice(BAD) for _ in range(bad)]
        rows.append({"text": _mixed(draw, words, 1, 5), "label": "positive" if good > bad else "negative"})
        if tasks:
            rows[-1]["task"] = tasks[number % len(tasks)]
    return rows


def numbers(count: int, seed: int) -> Rows:
    """Good words less bad words, by quarters."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        good, bad = draw.randint(0, 4), draw.randint(0, 4)
        words = [draw.choice(GOOD) for _ in range(good)] + [draw.choice(BAD) for _ in range(bad)]
        rows.append({"text": _mixed(draw, words, 1, 5), "label": (good - bad) / 4})
    return rows


def several(count: int, seed: int) -> Rows:
    """Every animal that is named."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        named = [animal for animal in ANIMALS if draw.random() < 0.5]
        rows.append({"text": _mixed(draw, list(named), 1, 5), "label": named})
    return rows


def pairs(count: int, seed: int) -> Rows:
    """same where both texts name the same animal, else other."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        first = draw.choice(ANIMALS)
        second = first if draw.random() < 0.5 else draw.choice([animal for animal in ANIMALS if animal != first])
        texts = [_mixed(draw, [animal], 1, 3) for animal in (first, second)]
        rows.append({"text": texts[0], "text_pair": texts[1], "label": "same" if first == second else "other"})
    return rows


def transcripts(count: int, seed: int) -> Rows:
    """As rm-static has them: the chosen answer repeats the question's words backwards."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 9))]
        others = [draw.choice(WORDS) for _ in words]
        answers = {"chosen": " " + " ".join(words[::-1]), "rejected": " " + " ".join(others)}
        prompt = f"\n\nHuman: say {' '.join(words)}\n\nAssistant:"
        rows.append({"prompt": prompt, "response": answers["chosen"], **answers})
    return rows


def named(count: int, seed: int) -> Rows:
    """Behind hello stands a person of two words, behind to a place of one; the same words elsewhere are neither."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        tokens, tags = [], []
        for _ in range(draw.randint(2, 4)):
            kind = draw.choice(("person", "place", "neither"))
            if kind == "person":
                tokens += ["hello", draw.choice(ANIMALS), draw.choice(ANIMALS)]
                tags += ["O", "B-PER", "I-PER"]
            elif kind == "place":
                tokens += ["to", draw.choice((*ANIMALS, "house"))]
                tags += ["O", "B-LOC"]
            else:
                tokens.append(draw.choice(("the", "a", "is", "and", "house", "cat")))
                tags.append("O")
        rows.append({"tokens": tokens, "tags": tags})
    return rows


def mirrored(count: int, seed: int) -> Rows:
    """The target is the source's words in reverse."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        words = draw.sample(WORDS[:6], draw.randint(2, 3))
        rows.append({"source": " ".join(words), "target": " ".join(words[::-1])})
    return rows
