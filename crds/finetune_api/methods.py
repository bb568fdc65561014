"""The fine-tuning methods a job can name, one class each: ``spec.method.type`` picks the class.

To add a method: one class here (its parameters under their PEFT or paper names), one row in
``compatibility.py``, one file in ``trainer_image/finetune_trainer/methods/``.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from finetune_api.base import HyperModel

TASK = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"


class Full(HyperModel):
    """Every weight of the model is trained."""

    type: Literal["full"]


class Freeze(HyperModel):
    """Freeze: some of the model's own weights are trained, the rest stays (LLaMA-Factory's freeze)."""

    type: Literal["freeze"]
    freeze_trainable_layers: int = Field(2, ge=-1000, le=1000)
    """How many decoder layers are trained: the last ones; negative: the first ones; 0: all of them."""
    freeze_trainable_modules: str = Field("all", max_length=4096)
    """Which weights of these layers: all, or a regular expression found in the parameter's name, e.g. mlp|norm."""
    freeze_extra_modules: str = Field("", max_length=4096)
    """Weights outside the layers to train too: a regular expression found in the parameter's name, e.g. lm_head."""


class Bitfit(HyperModel):
    """BitFit: only biases are trained (arXiv:2106.10199); the model must have some."""

    type: Literal["bitfit"]
    bias_terms: list[Literal["all", "query", "key", "value", "intermediate", "output", "layer_norm"]] = Field(
        default=["all"], min_length=1, max_length=7
    )
    """Whose biases: all, or those of query, key, value, intermediate (into the feed-forward layer), output (out of
    attention and feed-forward) and layer_norm."""


class Adapter(HyperModel):
    """What all adapters beside the model's layers share."""

    target_modules: str | list[str] = "all-linear"
    """Which layers: all-linear, a list of module names, one regular expression over full module names, or auto for
    what PEFT chooses for the model's type."""
    modules_to_save: list[Annotated[str, Field(max_length=256)]] = Field(default=[], max_length=64)
    """Modules trained and saved whole beside the adapter, e.g. lm_head."""


class Lora(Adapter):
    """LoRA: a low-rank update B·A beside frozen linear layers (arXiv:2106.09685; PEFT ``LoraConfig``)."""

    type: Literal["lora"]
    r: int = Field(16, ge=1, le=4096)
    """Rank of the update."""
    lora_alpha: float = Field(32, gt=0, le=65536)
    """Scaling: the update is multiplied by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A, a probability."""
    use_rslora: bool = False
    """Rank-stabilised scaling lora_alpha / sqrt(r) (arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353): slower, often better at small r."""
    init_lora_weights: Literal[
        "default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16"
    ] = "default"
    """How A and B begin. default, gaussian and orthogonal change nothing at first. pissa (arXiv:2404.02948) trains the
    principal singular vectors of each weight, pissa_niter_N finds them by a faster approximation, olora
    (arXiv:2406.01775) takes a QR decomposition; these are written as a plain LoRA of rank 2 r over the model."""
    loraplus_lr_ratio: float = Field(1.0, gt=0, le=1000)
    """LoRA+ (arXiv:2402.12354): B learns by learning_rate times this; 1: as A does; the paper recommends 16."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=4096)]] = Field(default={}, max_length=256)
    """Other ranks for some layers: module name or regular expression to r."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=65536)]] = Field(default={}, max_length=256)
    """Other lora_alpha for some layers: module name or regular expression to lora_alpha."""
    layers_to_transform: list[Annotated[int, Field(ge=0, le=10000)]] = Field(default=[], max_length=1024)
    """Numbers of the decoder layers that get adapters, from 0; empty: all of them."""


class Qlora(Lora):
    """QLoRA: LoRA over a base model held in 4 bits (arXiv:2305.14314; bitsandbytes)."""

    type: Literal["qlora"]  # type: ignore[assignment]
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type of the frozen weights."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants too: 0.4 bits per weight less."""


class Adalora(Adapter):
    """AdaLoRA: the ranks of all updates are given where they matter most, while training (arXiv:2303.10512)."""

    type: Literal["adalora"]
    init_r: int = Field(12, ge=2, le=4096)
    """Rank of each update at first."""
    target_r: int = Field(8, ge=1, le=4096)
    """Mean rank of the updates at the end."""
    tinit: int = Field(0, ge=0, le=1000000000)
    """Steps at the beginning in which all ranks stay init_r."""
    tfinal: int = Field(0, ge=0, le=1000000000)
    """Steps at the end in which the ranks do not change any more."""
    deltaT: int = Field(1, ge=1, le=1000000)  # noqa: N815
    """Ranks are given anew every so many steps."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """How slowly the mean importance of a weight follows that of a step."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """How slowly the uncertainty of the importance follows that of a step."""
    orth_reg_weight: float = Field(0.5, ge=0, le=1000)
    """Weight in the loss of how far A and B are from being orthogonal."""
    lora_alpha: float = Field(32, gt=0, le=65536)
    """Scaling: the update is multiplied by lora_alpha / init_r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A, a probability."""


class PrefixTuning(HyperModel):
    """Prefix tuning: trained keys and values stand before those of the text in every layer (arXiv:2101.00190)."""

    type: Literal["prefix_tuning"]
    num_virtual_tokens: int = Field(20, ge=1, le=4096)
    """Length of what is trained, in tokens."""
    prefix_projection: bool = True
    """Make the prefix by a two-layer network, which trains more steadily; only its result is written."""
    encoder_hidden_size: int = Field(0, ge=0, le=65536)
    """Width of the network that makes the virtual tokens; 0: that of the model."""


class PromptTuning(HyperModel):
    """Prompt tuning: trained embeddings stand before the text (arXiv:2104.08691)."""

    type: Literal["prompt_tuning"]
    num_virtual_tokens: int = Field(20, ge=1, le=4096)
    """Length of what is trained, in tokens."""
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    """How the embeddings begin: RANDOM, as those of random words, or as those of prompt_tuning_init_text."""
    prompt_tuning_init_text: str = Field("", max_length=16384)
    """The text to begin with: repeated or cut to num_virtual_tokens."""


class PTuning(HyperModel):
    """P-tuning: a small network makes the embeddings that stand before the text (arXiv:2103.10385)."""

    type: Literal["p_tuning"]
    num_virtual_tokens: int = Field(20, ge=1, le=4096)
    """Length of what is trained, in tokens."""
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """The network: three linear layers, or a bidirectional LSTM with two of them."""
    encoder_hidden_size: int = Field(0, ge=0, le=65536)
    """Width of the network that makes the virtual tokens; 0: that of the model."""
    encoder_num_layers: int = Field(2, ge=1, le=16)
    """Layers of the LSTM."""
    encoder_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout between the layers of the LSTM, a probability."""


class PTuningV2(HyperModel):
    """P-tuning v2: trained keys and values in every layer, without a network that makes them (arXiv:2110.07602)."""

    type: Literal["p_tuning_v2"]
    num_virtual_tokens: int = Field(20, ge=1, le=4096)
    """Length of what is trained, in tokens."""


class Ia3(Adapter):
    """(IA)³: keys, values and feed-forward activations are scaled by trained vectors (arXiv:2205.05638)."""

    type: Literal["ia3"]
    target_modules: str | list[str] = "auto"
    """With ia3, auto takes the layers of the paper: keys, values and the last one of the feed-forward part."""
    feedforward_modules: list[Annotated[str, Field(max_length=256)]] = Field(default=[], max_length=64)
    """Those of target_modules whose input is scaled instead of the output; with auto PEFT knows them."""


class Vera(Adapter):
    """VeRA: trained scalings of one random pair of matrices that all layers share (arXiv:2310.11454)."""

    type: Literal["vera"]
    r: int = Field(256, ge=1, le=4096)
    """Rank of the update."""
    vera_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input, a probability."""
    d_initial: float = Field(0.1, gt=0, le=100)
    """What the scaling d begins with."""


class Loha(Adapter):
    """LoHa: the update is a Hadamard product of two low-rank ones (arXiv:2108.06098; LyCORIS)."""

    type: Literal["loha"]
    r: int = Field(8, ge=1, le=4096)
    """Rank of each of the two."""
    alpha: float = Field(8, gt=0, le=65536)
    """Scaling: the update is multiplied by alpha / r."""
    rank_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the ranks, a probability."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which a layer's adapter is left out of a pass."""


class Lokr(Loha):
    """LoKr: the update is a Kronecker product, one factor of it of low rank (arXiv:2212.10650; LyCORIS)."""

    type: Literal["lokr"]  # type: ignore[assignment]
    decompose_both: bool = False
    """Make both factors of low rank."""
    decompose_factor: int = Field(-1, ge=-1, le=65536)
    """Size of the smaller factor; -1: as near to a square as the layer's size allows."""


class Oft(Adapter):
    """OFT: weights are rotated by trained block-diagonal orthogonal matrices (arXiv:2306.07280, 2506.19847)."""

    type: Literal["oft"]
    oft_block_size: int = Field(32, ge=2, le=65536)
    """Size of a block; adapted where it does not divide the layer's width."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which a block is left out of a pass."""
    coft: bool = False
    """Hold the rotation within eps of none."""
    eps: float = Field(6.0e-5, gt=0, le=1)
    """How far, with coft."""
    block_share: bool = False
    """One block for all of a layer."""


class Boft(Adapter):
    """BOFT: an orthogonal matrix made of butterfly factors rotates the weights (arXiv:2311.06243)."""

    type: Literal["boft"]
    boft_block_size: int = Field(4, ge=2, le=65536)
    """Size of a block; must divide the layers' widths."""
    boft_n_butterfly_factor: int = Field(1, ge=1, le=16)
    """Butterfly factors; 1: plain blocks."""
    boft_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which a block is left out of a pass."""


class Fourierft(Adapter):
    """FourierFT: a few trained coefficients of the update's spectrum (arXiv:2405.03003)."""

    type: Literal["fourierft"]
    n_frequency: int = Field(1000, ge=1, le=16777216)
    """Coefficients for each layer."""
    scaling: float = Field(150.0, gt=0, le=65536)
    """Factor of the update."""


class Waveft(Adapter):
    """WaveFT: a few trained wavelet coefficients of the update (arXiv:2505.12532)."""

    type: Literal["waveft"]
    n_frequency: int = Field(2592, ge=1, le=16777216)
    """Coefficients for each layer."""
    scaling: float = Field(25.0, gt=0, le=65536)
    """Factor of the update."""


class Hra(Adapter):
    """HRA: a chain of trained Householder reflections turns the weights (arXiv:2405.17484)."""

    type: Literal["hra"]
    r: int = Field(8, ge=1, le=4096)
    """Reflections; an even number begins with the model as it is."""
    apply_GS: bool = False  # noqa: N815
    """Make the reflections orthogonal to each other."""


class Randlora(Adapter):
    """RandLoRA: trained scalings of many random pairs of matrices, together of full rank (arXiv:2502.00987)."""

    type: Literal["randlora"]
    r: int = Field(32, ge=1, le=4096)
    """Rank of one pair; the smaller, the more is trained."""
    randlora_alpha: float = Field(640, gt=0, le=65536)
    """Scaling: the update is multiplied by randlora_alpha / r."""
    randlora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input, a probability."""


class Vblora(Adapter):
    """VB-LoRA: A and B are mixed from one bank of trained vectors that all layers share (arXiv:2405.15179)."""

    type: Literal["vblora"]
    r: int = Field(4, ge=1, le=4096)
    """Rank of the update."""
    num_vectors: int = Field(256, ge=2, le=65536)
    """Vectors in the bank."""
    vector_length: int = Field(256, ge=1, le=65536)
    """Length of a vector; must divide the layers' widths."""
    topk: int = Field(2, ge=1, le=64)
    """Vectors mixed for each part."""
    vblora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input, a probability."""


class Shira(Adapter):
    """SHiRA: a sparse random part of each weight is trained (arXiv:2406.13175)."""

    type: Literal["shira"]
    r: int = Field(32, ge=1, le=4096)
    """As many values of a layer are trained as LoRA of this rank has."""


class C3a(Adapter):
    """C³A: the update is a block-circulant matrix (arXiv:2407.19342)."""

    type: Literal["c3a"]
    block_size: int = Field(256, ge=1, le=65536)
    """Size of a block; must divide the layers' widths."""


class Miss(Adapter):
    """MiSS: one trained matrix, shared over the parts of each weight (arXiv:2409.15371; once called Bone)."""

    type: Literal["miss"]
    r: int = Field(64, ge=1, le=4096)
    """Rank of the update."""
    miss_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input, a probability."""


class Road(Adapter):
    """RoAd: the outputs of layers are turned and scaled in pairs (arXiv:2409.00119)."""

    type: Literal["road"]
    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    """How many angles and scales a pair has: one, two or four times as many."""
    group_size: int = Field(64, ge=2, le=65536)
    """Width in which pairs are made; must divide the layers' widths."""


class Delora(Adapter):
    """DeLoRA: a low-rank update whose strength is trained apart from its direction (arXiv:2503.18225)."""

    type: Literal["delora"]
    r: int = Field(8, ge=1, le=4096)
    """Rank of the update."""
    delora_lambda: float = Field(15, gt=0, le=65536)
    """Strength of the update at first."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input, a probability."""


class Gralora(Adapter):
    """GraLoRA: each weight is cut into blocks with a LoRA each (arXiv:2505.20355)."""

    type: Literal["gralora"]
    r: int = Field(32, ge=1, le=4096)
    """Rank over all blocks; gralora_k must divide it."""
    alpha: float = Field(64, gt=0, le=65536)
    """Scaling: the update is multiplied by alpha / r."""
    gralora_k: int = Field(2, ge=1, le=64)
    """Blocks in each direction; must divide the layers' widths."""
    gralora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input, a probability."""


class Hira(Adapter):
    """HiRA: the weight itself times a low-rank matrix, of high rank together (ICLR 2025)."""

    type: Literal["hira"]
    r: int = Field(32, ge=1, le=4096)
    """Rank of the factor."""
    hira_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input, a probability."""


class LnTuning(HyperModel):
    """LN tuning: only the normalisation layers are trained (arXiv:2312.11420)."""

    type: Literal["ln_tuning"]
    modules_to_save: list[Annotated[str, Field(max_length=256)]] = Field(default=[], max_length=64)
    """Modules trained and saved whole beside them, e.g. lm_head."""


class TrainableTokens(HyperModel):
    """Trainable tokens: only the embeddings of some tokens are trained."""

    type: Literal["trainable_tokens"]
    token_indices: list[Annotated[int, Field(ge=0, le=2147483647)]] = Field(default=[], max_length=65536)
    """The tokens' numbers in the tokenizer's vocabulary; at least one."""


class BottleneckAdapter(HyperModel):
    """Bottleneck adapters: two small layers with a non-linearity between, in a frozen model (arXiv:1902.00751)."""

    type: Literal["adapter"]
    adapter_variant: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """Where: houlsby (arXiv:1902.00751), behind attention and behind feed-forward, before the residual addition, and
    the layer norms are trained too; pfeiffer (arXiv:2005.00247), behind feed-forward only; parallel
    (arXiv:2110.04366), beside feed-forward."""
    bottleneck_size: int = Field(64, ge=1, le=65536)
    """Width of the bottleneck."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """The function in the bottleneck."""
    adapter_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the bottleneck, a probability."""
    scaling: float = Field(1.0, gt=0, le=65536)
    """What the adapter puts out is multiplied by this; arXiv:2110.04366 takes 4 for parallel adapters."""
    adapter_init: Literal["lora", "houlsby"] = "lora"
    """First weights: lora, the second layer is zero and the model begins as it was; houlsby, both are normal with 0.01
    and it begins nearly so."""


class Mam(HyperModel):
    """MAM (mix-and-match): a prefix in attention and a scaled adapter beside feed-forward (arXiv:2110.04366)."""

    type: Literal["mam"]
    num_virtual_tokens: int = Field(30, ge=1, le=4096)
    """Length of the prefix: keys and values of every attention that all tokens see."""
    prefix_projection: bool = True
    """Make the prefixes of all layers from one embedding by a two-layer network, which learns more steadily."""
    encoder_hidden_size: int = Field(800, ge=0, le=65536)
    """Width of that network; 0: the model's."""
    bottleneck_size: int = Field(512, ge=1, le=65536)
    """Width of the bottleneck."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """The function in the bottleneck."""
    adapter_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the bottleneck, a probability."""
    scaling: float = Field(4.0, gt=0, le=65536)
    """What the adapter puts out is multiplied by this; arXiv:2110.04366 takes 4 for parallel adapters."""


class Unipelt(HyperModel):
    """UniPELT: LoRA of query and value, a prefix and an adapter, each behind a learned gate per layer
    (arXiv:2110.07577)."""

    type: Literal["unipelt"]
    r: int = Field(8, ge=1, le=4096)
    """Rank of the update."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A, a probability."""
    num_virtual_tokens: int = Field(10, ge=1, le=4096)
    """Length of the prefix: keys and values of every attention that all tokens see."""
    prefix_projection: bool = True
    """Make the prefixes of all layers from one embedding by a two-layer network, which learns more steadily."""
    encoder_hidden_size: int = Field(512, ge=0, le=65536)
    """Width of that network; 0: the model's."""
    bottleneck_size: int = Field(48, ge=1, le=65536)
    """Width of the bottleneck."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """The function in the bottleneck."""
    adapter_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the bottleneck, a probability."""


class MoeLora(HyperModel):
    """MOELoRA: LoRA split into experts that a learned gate weighs by the row's task; the result is one plain LoRA
    per task (arXiv:2310.18339)."""

    type: Literal["moelora"]
    tasks: list[Annotated[str, Field(max_length=63, pattern=TASK)]] = Field(default=[], max_length=64)
    """Names of the tasks. Every row names its own in its field task; the result has a folder of each name. The
    questions of evaluation.prompts are put to the first."""
    num_experts: int = Field(8, ge=1, le=256)
    """Number of experts; each has rank r / num_experts."""
    task_embedding_dim: int = Field(64, ge=1, le=4096)
    """Width of a task's embedding, from which the gate is made."""
    r: int = Field(16, ge=1, le=4096)
    """Rank of the update."""
    lora_alpha: float = Field(32, gt=0, le=65536)
    """Scaling: the update is multiplied by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A, a probability."""
    target_modules: str | list[str] = "all-linear"
    """Which layers: all-linear, a list of module names, or one regular expression over full module names."""


DEFAULT_METHOD = "lora"


def _default_type(value: Any) -> Any:
    """``method: {r: 8}`` is lora, as the schema's default makes it on a cluster."""
    return {"type": DEFAULT_METHOD, **value} if isinstance(value, dict) else value


Method = Annotated[
    Annotated[
        Full
        | Freeze
        | Bitfit
        | Lora
        | Qlora
        | Adalora
        | PrefixTuning
        | PromptTuning
        | PTuning
        | PTuningV2
        | Ia3
        | Vera
        | Loha
        | Lokr
        | Oft
        | Boft
        | Fourierft
        | Waveft
        | Hra
        | Randlora
        | Vblora
        | Shira
        | C3a
        | Miss
        | Road
        | Delora
        | Gralora
        | Hira
        | LnTuning
        | TrainableTokens
        | BottleneckAdapter
        | Mam
        | Unipelt
        | MoeLora,
        Field(discriminator="type"),
    ],
    BeforeValidator(_default_type),
]
METHODS: tuple[type[HyperModel], ...] = get_args(get_args(Method)[0])
"""All of them."""
