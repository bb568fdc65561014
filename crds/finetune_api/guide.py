"""What a user reads about each method: when to choose it, its limits, and why it is refused where it is.

What a method is, stands in its class (``methods.py``); what it goes with, in ``compatibility.py``; the figures, in
``method_facts.json``, which the trainer's tests write and check. ``method_pages.py`` puts them together.
"""

from dataclasses import dataclass, field
from typing import Literal

Refused = Literal["ZeRO", "packing", "gradient checkpointing", "merge"]
"""What a row of ``compatibility.py`` can exclude (4-bit models go with qlora alone, and that is told once)."""


@dataclass(frozen=True)
class Guide:
    """Words on one method."""

    paper: str
    """Authors and title; the number stands in the class."""
    when: str
    limits: str
    why: dict[Refused, str] = field(default_factory=dict)
    """Why it is refused, for everything that its row excludes."""


_WHOLE = "The result is a whole model already."
_NO_WEIGHT = "Virtual tokens are no part of any weight."
_NOT_LINEAR = "It is not linear in its input, so there is nothing to fold into weights."
_ROWS = "Virtual tokens stand before one row; packed rows share a sequence."
_CACHE = "The prefix is a cache of keys and values, which recomputing a layer drops."
_ZERO_PROMPT = "They train equally under ZeRO-3, but PEFT makes what it writes of weights that are cut up then."
_ZERO_PEFT = "ZeRO-3 breaks some of PEFT's methods and would write others without the random matrices they keep."
_ZERO_BF16 = "It holds float32 constants beside its weights; DeepSpeed's bf16 section turns only one of the two round."

_TOKENS: dict[Refused, str] = {"ZeRO": _ZERO_PROMPT, "packing": _ROWS, "merge": _NO_WEIGHT}
_PREFIX: dict[Refused, str] = {**_TOKENS, "gradient checkpointing": _CACHE}
_PEFT: dict[Refused, str] = {"ZeRO": _ZERO_PEFT}

NO_CONV1D = "Not for GPT-2, whose layers are of another kind (Conv1D)."

GUIDES: dict[str, Guide] = {
    "full": Guide(
        paper="",
        when="Much data, a new language or domain, and memory for 16 bytes per weight (ZeRO shares them out).",
        limits="Forgets most; the result is as large as the model.",
        why={"merge": _WHOLE},
    ),
    "freeze": Guide(
        paper="LLaMA-Factory, freeze tuning",
        when="As full, with less memory: the last layers adapt, the first ones keep what they know.",
        limits="Which layers matter is a guess; the result is a whole model.",
        why={"merge": _WHOLE},
    ),
    "bitfit": Guide(
        paper="Ben Zaken, Ravfogel, Goldberg: BitFit, simple parameter-efficient fine-tuning",
        when="Small data on models with biases (BERT, GPT-2, OPT): a thousandth of the weights, no slower inference.",
        limits="Llama, Mistral, Qwen3 and T5 have no biases and are refused (Qwen2 has those of query, key, value).",
        why={"merge": _WHOLE},
    ),
    "lora": Guide(
        paper="Hu et al.: LoRA, low-rank adaptation of large language models",
        when="First choice: nearly as good as full, goes with everything, merges without a trace.",
        limits="The rank limits how much can be learned; use_dora is slower.",
    ),
    "qlora": Guide(
        paper="Dettmers et al.: QLoRA, efficient finetuning of quantized LLMs",
        when="The model does not fit in 16 bits: a 33B model trains on a GPU of 24 GB.",
        limits="Some speed and a little quality; merged into a fresh 16-bit model, which differs from the 4-bit one.",
        why={"ZeRO": "DeepSpeed cannot partition packed 4-bit weights."},
    ),
    "adalora": Guide(
        paper="Zhang et al.: AdaLoRA, adaptive budget allocation for parameter-efficient fine-tuning",
        when="The same quality with fewer weights, where layers need different ranks; ranks stand in the report.",
        limits="The run's length must be known; half the speed of LoRA; wants about five times LoRA's learning rate.",
        why={"ZeRO": "Ranks are given anew right after the update, from whole gradients beside whole weights."},
    ),
    "prefix_tuning": Guide(
        paper="Li, Liang: Prefix-tuning, optimizing continuous prompts for generation",
        when="Many tasks beside one frozen model, steering its style or format rather than teaching facts.",
        limits="The projection is large while training; the prefix takes room in the cache; needs a high rate. Not for "
        "DistilBERT, which takes no keys and values from outside (mam and unipelt bring their own).",
        why=_PREFIX,
    ),
    "prompt_tuning": Guide(
        paper="Lester, Al-Rfou, Constant: The power of scale for parameter-efficient prompt tuning",
        when="Very large models and a few kilobytes per task; begin from a text (TEXT) where data is small.",
        limits="Weak below some billion weights; slow to learn: rates of 0.01 to 0.3. As a classifier with encoders "
        "only.",
        why=_TOKENS,
    ),
    "p_tuning": Guide(
        paper="Liu et al.: GPT understands, too",
        when="As prompt tuning, learning more steadily through a small network (LSTM as in the paper, or MLP).",
        limits="The network is in the checkpoints only: the result cannot be trained on with it. As a classifier with "
        "encoders only.",
        why=_TOKENS,
    ),
    "p_tuning_v2": Guide(
        paper="Liu et al.: P-Tuning v2, prompt tuning can be comparable to fine-tuning",
        when="Understanding tasks (classes, labels) where prompt tuning is too weak: every layer has its own prompt.",
        limits="Needs a high rate; the length of the prompt must be tried per task. Not for DistilBERT, as "
        "prefix_tuning.",
        why=_PREFIX,
    ),
    "ia3": Guide(
        paper="Liu et al.: Few-shot parameter-efficient fine-tuning is better than in-context learning",
        when="A handful of examples, and adapters of some hundred kilobytes.",
        limits="Only scales what is there; needs rates of about 0.01.",
        why=_PEFT,
    ),
    "vera": Guide(
        paper="Kopiczko, Blankevoort, Asano: VeRA, vector-based random matrix adaptation",
        when="A tenth of LoRA's size or less, where thousands of adapters are kept.",
        limits="Needs a higher rate than LoRA; computes as much as LoRA of rank r.",
        why={"ZeRO": _ZERO_BF16},
    ),
    "loha": Guide(
        paper="Hyeon-Woo, Ye-Bin, Oh: FedPara, low-rank Hadamard product",
        when="Updates of rank r² for the price of two LoRAs of rank r; common for diffusion models.",
        limits=f"Builds the whole update in every pass: slower than LoRA. {NO_CONV1D}",
        why=_PEFT,
    ),
    "lokr": Guide(
        paper="Edalati et al.: KronA; Yeh et al.: LyCORIS",
        when="Smaller files than LoRA, of high rank, where speed matters less.",
        limits=f"Builds the whole update in every pass. {NO_CONV1D}",
        why=_PEFT,
    ),
    "oft": Guide(
        paper="Qiu et al.: Controlling text-to-image diffusion by orthogonal finetuning; Qiu et al.: OFTv2",
        when="Keeping what the model knows: angles between neurons stay as they are.",
        limits=f"Slower than LoRA; the larger the blocks, the more is trained. {NO_CONV1D}",
        why=_PEFT,
    ),
    "boft": Guide(
        paper="Liu et al.: Parameter-efficient orthogonal finetuning via butterfly factorization",
        when="As OFT with fewer weights for large blocks.",
        limits=f"The slowest here; block sizes must divide the layers' widths. {NO_CONV1D}",
        why=_PEFT,
    ),
    "fourierft": Guide(
        paper="Gao et al.: Parameter-efficient fine-tuning with discrete Fourier transform",
        when="The smallest files for a weight update: a thousand numbers per layer.",
        limits="Transforms every pass; the update begins at random, not at zero.",
        why=_PEFT,
    ),
    "waveft": Guide(
        paper="Bilican et al.: Exploring sparsity for parameter-efficient fine-tuning using wavelets",
        when="As FourierFT, beginning as the model was.",
        limits="Transforms every pass; young, little tried on language models.",
        why=_PEFT,
    ),
    "hra": Guide(
        paper="Yuan, Liu, Xu: Bridging the gap between low-rank and orthogonal adaptation",
        when="Between LoRA and OFT: turns the weights, with as few numbers as LoRA's A.",
        limits=f"Reflections are applied one after the other. {NO_CONV1D}",
        why=_PEFT,
    ),
    "randlora": Guide(
        paper="Albert et al.: RandLoRA, full-rank parameter-efficient fine-tuning of large models",
        when="LoRA's rank limits you: updates of full rank at the same number of trained weights.",
        limits="Builds the whole update in every pass; random matrices take memory.",
        why=_PEFT,
    ),
    "vblora": Guide(
        paper="Li, Han, Ji: VB-LoRA, extreme parameter efficient fine-tuning with vector banks",
        when="Very small files: one bank of vectors for all layers.",
        limits="Logits over the bank are trained beside it, more than is stored; widths must be divisible.",
        why=_PEFT,
    ),
    "shira": Guide(
        paper="Bhardwaj et al.: Sparse high rank adapters",
        when="Switching adapters fast: about a hundredth of the weights is changed, the rest untouched.",
        limits=f"Which weights is drawn at random from training.seed. {NO_CONV1D}",
        why=_PEFT,
    ),
    "c3a": Guide(
        paper="Chen et al.: Parameter-efficient fine-tuning via circular convolution",
        when="Updates of high rank with few weights, computed by FFT.",
        limits=f"Begins at random, not at zero; block_size must divide the layers' widths. {NO_CONV1D}",
        why=_PEFT,
    ),
    "miss": Guide(
        paper="Kang, Yin: MiSS, matrix shard sharing (once Bone)",
        when="LoRA's use with one matrix per layer: quick to converge, simple to serve.",
        limits=f"Young, not served by vLLM: merge it. {NO_CONV1D}",
        why=_PEFT,
    ),
    "road": Guide(
        paper="Liao, Monz: 3-in-1, 2D rotary adaptation for efficient finetuning, batching and composability",
        when="Serving many adapters in one batch: an elementwise product per layer.",
        limits=f"Few weights; group_size must divide the layers' widths. {NO_CONV1D}",
        why=_PEFT,
    ),
    "delora": Guide(
        paper="Bini, Girrbach, Akata: Decoupling angles and strength in low-rank adaptation",
        when="LoRA that stays stable at high rates and long runs: the strength of the update is bounded.",
        limits=f"Slower than LoRA. {NO_CONV1D}",
        why={"ZeRO": _ZERO_BF16},
    ),
    "gralora": Guide(
        paper="Jung et al.: GraLoRA, granular low-rank adaptation",
        when="Large ranks (64 and more), where LoRA overfits to few channels.",
        limits="gralora_k must divide rank and widths.",
        why=_PEFT,
    ),
    "hira": Guide(
        paper="Huang et al.: HiRA, parameter-efficient Hadamard high-rank adaptation (ICLR 2025)",
        when="Harder tasks (reasoning), where LoRA's rank limits: the update is of the weight's own rank.",
        limits="The update scales with the weight: where that is zero, nothing is learned.",
        why=_PEFT,
    ),
    "ln_tuning": Guide(
        paper="Zhao et al.: Tuning LayerNorm in attention",
        when="Adapting to a new domain or modality with the fewest weights and no slower inference.",
        limits="Shifts what is there, learns little that is new.",
        why=_PEFT,
    ),
    "trainable_tokens": Guide(
        paper="PEFT, trainable tokens",
        when="New or reserved tokens (roles, tools) whose embeddings must learn their meaning.",
        limits="Nothing else learns, so no classifier's head; the tokens must exist in the vocabulary.",
        why=_PEFT,
    ),
    "adapter": Guide(
        paper="Houlsby et al.: Parameter-efficient transfer learning for NLP; Pfeiffer et al.; He et al.",
        when="Classic for BERT and T5, many tasks in turn; parallel is the strongest variant for long training.",
        limits="Adds layers to inference; read by finetune_trainer.methods.load_adapter, not by peft; known "
        "architectures only.",
        why={"merge": _NOT_LINEAR},
    ),
    "mam": Guide(
        paper="He et al.: Towards a unified view of parameter-efficient transfer learning",
        when="Strong on summarisation and translation with a few hundredths of the weights.",
        limits="As adapter, and scaled-dot-product attention.",
        why={"merge": _NOT_LINEAR},
    ),
    "unipelt": Guide(
        paper="Mao et al.: UniPELT, a unified framework for parameter-efficient language model tuning",
        when="Small data, and you do not know which method suits: gates learn it, and the report shows them.",
        limits="As adapter and mam; slower than each part. Gates are per token, not the mean of a sequence.",
        why={"merge": _NOT_LINEAR},
    ),
    "moelora": Guide(
        paper="Liu et al.: When MOE meets LLMs, parameter efficient fine-tuning for multi-task medical applications",
        when="Several tasks in one run that help and disturb each other; one plain LoRA per task comes out.",
        limits="Tasks are named beforehand; a row without its task is refused. A classifier's head is shared by all "
        "tasks.",
    ),
}
