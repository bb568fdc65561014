"""The spec of a FineTuneJob: what a user writes. The docstring of a field is its ``kubectl explain``.

Only shapes, ranges and defaults live here; what spans several fields is a row of ``rules.py``.
"""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Duration, HyperModel, KubeModel, Preserved
from finetune_api.methods import Lora, Method
from finetune_api.reinforcement import Grpo, Ppo
from finetune_api.stages import (
    Dpo,
    Kto,
    Orpo,
    Reward,
    Rlaif,
    Seq2Seq,
    SequenceClassification,
    Sft,
    TokenClassification,
)
from finetune_api.uris import DataUri, ModelUri, Name, StorageUri

SPLIT = r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$"
SHARD_SIZE = r"^[0-9]+(\.[0-9]+)?(MB|GB|MiB|GiB)$"

Stage = Literal[
    "pretrain",
    "sft",
    "reward",
    "dpo",
    "kto",
    "orpo",
    "rlaif",
    "ppo",
    "grpo",
    "sequence_classification",
    "token_classification",
    "seq2seq",
]
DataFormat = Literal[
    "auto",
    "alpaca",
    "messages",
    "sharegpt",
    "chatml",
    "chatglm",
    "claude",
    "guanaco",
    "prompt_completion",
    "prompt",
    "preference",
    "hh_rlhf",
    "rm_static",
    "shp",
    "oasst",
    "ranked",
    "kto",
    "text",
    "labelled",
    "source_target",
    "conll",
]
CHAT_TEMPLATES = (
    *("chatml", "alpaca", "guanaco", "chatglm", "claude", "vicuna", "zephyr", "llama-2", "llama-3"),
    *("qwen", "mistral", "gemma", "phi"),
)
"""Names that stand for a template; the trainer's ``templates.py`` has them."""


class AdapterSource(HyperModel):
    """An adapter that was trained over the model earlier."""

    uri: ModelUri
    """Where the adapter lies (the folder of adapter_config.json), written as the model's uri; job://NAME: the adapter
    that another FineTuneJob wrote."""
    revision: str = Field("main", max_length=256)
    """Branch, tag or commit; only for hf://."""
    train: bool = False
    """Train it on, instead of a new one: its parameters are those of spec.method. Only the last one. false: it is
    merged into the model, and stays as it is."""


class RopeParameters(HyperModel):
    """How rotary positions are stretched, so that the model takes longer texts than it was made for."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    """default: as the model has it. linear: position interpolation (arXiv:2306.15595); dynamic: NTK-aware, by the
    length at hand; yarn (arXiv:2309.00071); llama3: as Llama 3.1. Written to the result's config.json."""
    factor: float = Field(1.0, ge=1, le=1024)
    """The new longest text, in lengths of the model's own."""


class ModelSource(HyperModel):
    """The model to start from."""

    uri: ModelUri
    """Where the model lies: hf://ORG/NAME, s3:// gs:// az://BUCKET/PATH, pvc://CLAIM/PATH, file:///PATH,
    or job://NAME for the output of another FineTuneJob of this namespace (this job waits for it)."""
    revision: str = Field("main", max_length=256)
    """Branch, tag or commit; only for hf://."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the weights and of the computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    gguf_file: str = Field("", max_length=256)
    """Name of the GGUF file inside uri, where the model is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""
    rope_parameters: RopeParameters = RopeParameters()
    """How rotary positions are stretched. An adapter's result must be used with the same."""
    adapters: list[AdapterSource] = Field(default=[], max_length=16)
    """Adapters trained over the model earlier, in the order they were: the new one is stacked on top of them, or the
    last one is trained on."""


class DataSource(HyperModel):
    """One file or data set of training or evaluation rows."""

    uri: DataUri
    """Where the rows lie: hf://datasets/ORG/NAME, s3:// gs:// az://BUCKET/KEY, pvc://CLAIM/PATH,
    file:///PATH, or job://NAME for the rows that another FineTuneJob makes (this job waits for it).
    A file (.jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow; all but the last two also .gz, .bz2, .xz
    or .zst), a folder of such files, or a pattern of them (*, ?, [a-z]; ** for folders)."""
    format: DataFormat = "auto"
    """How a row is written (docs/data.md). auto: told by the first rows; the log and the report say which it is."""
    columns: dict[str, Annotated[str, Field(max_length=128)]] = Field(default={}, max_length=64)
    """Columns with other names than the format's: {yours: the format's}, e.g. {question: instruction}."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What of a .txt file is one row: a line, what stands between blank lines, or the file."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often the rows of this source are seen in one epoch: 2 is twice, 0.5 a fresh half each epoch.
    Training only."""
    split: str = Field("train", pattern=SPLIT, max_length=128)
    """Split of a hub data set; only for hf://."""
    revision: str = Field("main", max_length=256)
    """Branch, tag or commit; only for hf://."""


class Data(HyperModel):
    """What to train and to evaluate on, and how rows become sequences of tokens."""

    train: list[DataSource] = Field(min_length=1, max_length=64)
    """Sources of training rows; all of them make one epoch."""
    eval: list[DataSource] = Field(default=[], max_length=64)
    """Sources of held-out rows: their loss and perplexity are reported, each source by itself and all."""
    max_length: int = Field(2048, ge=16, le=1048576)
    """Longest sequence in tokens; longer rows are cut, counted and reported."""
    packing: bool = False
    """Fill sequences of max_length with several rows. Rows never see each other: attention and positions
    stop at their boundaries."""
    chat_template: str = Field("", max_length=65536)
    """Used in place of the tokenizer's own: the name of a known one (chatml, alpaca, guanaco, chatglm, claude, vicuna,
    zephyr, llama-2, llama-3, qwen, mistral, gemma, phi) or the text of a Jinja template. Written to the output."""
    max_bad_rows: int = Field(0, ge=0, le=1000000000)
    """How many rows of each source may be unlike their format: they are left out, counted and reported.
    One more ends the job before anything is trained."""
    temperature: float = Field(1.0, ge=1, le=1000000)
    """Evens out sources of different sizes: rows come weight x (reference / rows of the source)^(1 - 1/temperature)
    times in an epoch. 1: as weight says; large: of every source equally many. stopping_strategy gives the reference."""
    stopping_strategy: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    """With a temperature above 1: all_exhausted takes the largest source as the reference (smaller ones are repeated),
    first_exhausted the smallest (of larger ones every epoch sees a fresh part)."""
    deduplication: Literal["none", "exact", "near"] = "none"
    """Leave out training rows that repeat an earlier one, in all sources together: exact but for white space, or near
    (MinHash)."""
    deduplication_threshold: float = Field(0.8, ge=0.3, le=1)
    """Share of its three-word sequences that a near duplicate has in common with the earlier row."""
    check_contamination: bool = True
    """Count the held-out rows of which at least half stands in the training rows, and report them."""


class Training(HyperModel):
    """The optimisation. Names and meanings are those of transformers' TrainingArguments."""

    learning_rate: float = Field(2.0e-4, gt=0, le=10)
    """Peak learning rate of AdamW."""
    num_train_epochs: float = Field(3.0, gt=0, le=100000)
    """Passes over the training rows; not used where max_steps is set."""
    max_steps: int = Field(-1, ge=-1, le=1000000000)
    """Optimizer steps in all; -1: as num_train_epochs says."""
    per_device_train_batch_size: int = Field(1, ge=1, le=65536)
    """Sequences per process and forward pass."""
    per_device_eval_batch_size: int = Field(1, ge=1, le=65536)
    """Sequences per process in evaluation."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=65536)
    """Forward passes per optimizer step. The batch of a step is per_device_train_batch_size x
    gradient_accumulation_steps x processes, and is kept when the number of processes changes."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr", "polynomial", "inverse_sqrt"
    ] = "cosine"
    """Shape of the learning rate over the run (transformers' get_scheduler)."""
    lr_scheduler_kwargs: Preserved = {}
    """Further arguments of the scheduler, e.g. min_lr_rate."""
    warmup_steps: float = Field(0, ge=0, le=1000000000)
    """Steps of linear warm-up; below 1 it is a share of all steps."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """AdamW's decoupled weight decay; not applied to biases and norms."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    adam_epsilon: float = Field(1.0e-8, gt=0, le=1)
    """AdamW's term against division by zero."""
    max_grad_norm: float = Field(1.0, ge=0, le=1000000)
    """Gradients are scaled down to this L2 norm; 0: never."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    neftune_noise_alpha: float = Field(0.0, ge=0, le=1000)
    """NEFTune (arXiv:2310.05914): uniform noise of alpha / sqrt(length x hidden size) on the embeddings
    while training; 0: none."""
    eval_steps: int = Field(0, ge=0, le=1000000000)
    """Evaluate every so many steps; 0: at the end of every epoch. Always at the end of the run."""
    eval_on_start: bool = False
    """Evaluate before the first step, too: what the training begins from."""
    load_best_model_at_end: bool = False
    """The result is the model of the best evaluation, not the last one. Its checkpoint is kept."""
    metric_for_best_model: str = Field("loss", min_length=1, max_length=256)
    """The figure of the evaluation that tells which is best: loss, accuracy …, or that of one source, loss/NAME."""
    greater_is_better: bool | None = None
    """Whether more of it is better. Unset: false for losses, perplexity, kl and errors, true for others."""
    early_stopping_patience: int = Field(0, ge=0, le=1000000)
    """Stop after so many evaluations without a better one; 0: never."""
    early_stopping_threshold: float = Field(0.0, ge=0, le=1000000)
    """By how much an evaluation must be better to count as such."""
    logging_steps: int = Field(1, ge=1, le=1000000)
    """Write metrics every so many steps."""
    seed: int = Field(42, ge=0, le=4294967295)
    """Seed of initialisation, data order, dropout and noise."""


class Evaluation(HyperModel):
    """Questions put to the model before and after training; the answers stand in the report."""

    prompts: list[Annotated[str, Field(max_length=4096)]] = Field(default=[], max_length=32)
    """User messages to answer, each in a conversation of its own, by greedy decoding."""
    max_new_tokens: int = Field(64, ge=1, le=8192)
    """Longest answer in tokens."""
    predict_with_generate: bool = False
    """With stage seq2seq: have the model write every target of the held-out rows, and report ROUGE and BLEU."""
    generation_max_length: int = Field(0, ge=0, le=1048576)
    """Longest target to write, in tokens; 0: seq2seq.max_target_length."""
    generation_num_beams: int = Field(1, ge=1, le=64)
    """Beams of the search for it; 1: greedy."""
    perplexity_positions: list[Annotated[int, Field(ge=1, le=16777216)]] = Field(default=[], max_length=32)
    """With stages pretrain and sft: tell the perplexity by position, too. [1024, 4096] gives perplexity_to_1024 of the
    first 1024 tokens of every document, perplexity_to_4096 of the tokens from there up to 4096, and one of those up to
    data.max_length."""


class ZeroOptimization(HyperModel):
    """DeepSpeed's ``zero_optimization``; further keys of DeepSpeed are passed on."""

    model_config = {"extra": "allow", "json_schema_extra": {"x-kubernetes-preserve-unknown-fields": True}}

    stage: int | None = Field(None, ge=0, le=3)
    """What is partitioned over the processes: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too.
    Unset: the plan chooses (0 for adapters, 2 for full fine-tuning)."""


class DeepSpeed(HyperModel):
    """A DeepSpeed configuration, merged over what the plan decides. A key that contradicts another field
    of the spec is refused; further keys of DeepSpeed are passed on."""

    model_config = {"extra": "allow", "json_schema_extra": {"x-kubernetes-preserve-unknown-fields": True}}

    zero_optimization: ZeroOptimization = ZeroOptimization()
    """ZeRO stage and offloading."""


class Workers(KubeModel):
    """The pods: replicas workers, each of gpusPerWorker training processes."""

    replicas: int = Field(1, ge=1, le=4096)
    """Number of worker pods; all of them start together and fail together."""
    gpus_per_worker: int = Field(1, ge=0, le=64)
    """GPUs and training processes of one worker. 0: one process on the CPU."""
    template: Preserved = {}
    """Fields of a pod template (metadata.labels, metadata.annotations, spec), merged over what the operator
    makes: lists of named things by name (the training container is named trainer), volumeMounts by mountPath, ports by
    number; tolerations and envFrom are added; all else is replaced."""


class Checkpoint(HyperModel):
    """Checkpoints on object storage: exact states to continue from."""

    uri: StorageUri | None = None
    """Where checkpoints go; a folder named after the job is made in it.
    Unset: the folder checkpoints in output.uri."""
    save_steps: int = Field(200, ge=1, le=1000000000)
    """Save every so many optimizer steps. A save does not stop the training."""
    save_total_limit: int = Field(3, ge=1, le=10000)
    """How many checkpoints are kept, the newest ones."""
    resume: Literal["auto", "always", "never"] = "auto"
    """auto: continue from the newest valid checkpoint in the folder; where that one is of another configuration
    or of other data, the job fails (CheckpointMismatch).
    always: continue there too, to train on with more rows or epochs; only stage, model and method must be the same.
    never: start anew, and refuse to start where the folder already holds checkpoints of another run."""


class Output(HyperModel):
    """Where the result goes: adapter or model, tokenizer, metrics.jsonl, loss.png, report.html."""

    uri: StorageUri
    """Folder of the result."""
    merge: bool = False
    """Also write the model with the adapter merged into it, to the folder merged below uri."""
    max_shard_size: str = Field("5GB", pattern=SHARD_SIZE, max_length=16)
    """Largest safetensors file of a written model."""


class Recovery(KubeModel):
    """What happens when a worker fails. Mistakes of the user are never retried."""

    max_restarts: int = Field(10, ge=0, le=10000)
    """How many failures of the run itself are answered by a restart from the newest checkpoint.
    Lost nodes, evictions and preemptions do not count."""
    hang_timeout: Duration = "10m"
    """Restart the workers when no step was finished for this long."""
    start_timeout: Duration = "1h"
    """Restart the workers when the first step is not finished this long after all of them run."""
    pending_timeout: Duration = "10m"
    """Give the nodes back when only some of the workers have one for this long (and up to half as long again, so that
    of two jobs that wait for each other one goes first), and try again later."""


class Credentials(KubeModel):
    """Access to storage and hub."""

    secret_name: Name
    """A Secret of the job's namespace whose keys become environment variables of the pods:
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, HF_TOKEN and the like."""


class FineTuneJobSpec(KubeModel):
    """What to train, on what, how, with which machines, and where the result goes."""

    stage: Stage = "sft"
    """What is learned: pretrain (continued pretraining on running text), sft (supervised fine-tuning; the loss covers
    the answers only), reward (a reward model of pairs of answers), dpo (preferences without a reward model), kto
    (answers judged good or bad), orpo (SFT and preferences in one, without a reference), ppo and grpo (rewards of what
    the model writes itself), sequence_classification (labels of texts or of pairs of texts), token_classification (a
    label for every word), seq2seq (texts made of texts by an encoder-decoder). rlaif trains nothing: the model answers
    prompts, a judge compares the answers, and the output are preferences for reward, dpo or orpo."""
    model: ModelSource
    """The model to start from."""
    method: Method = Lora(type="lora")
    """Which weights are trained, and how."""
    data: Data
    """The training and evaluation rows."""
    training: Training = Training()
    """The optimisation."""
    sft: Sft | None = None
    """Parameters of stage sft."""
    reward: Reward | None = None
    """Parameters of stage reward."""
    dpo: Dpo | None = None
    """Parameters of stage dpo."""
    kto: Kto | None = None
    """Parameters of stage kto."""
    orpo: Orpo | None = None
    """Parameters of stage orpo."""
    rlaif: Rlaif | None = None
    """Parameters of stage rlaif."""
    ppo: Ppo | None = None
    """Parameters of stage ppo."""
    grpo: Grpo | None = None
    """Parameters of stage grpo."""
    sequence_classification: Annotated[SequenceClassification | None, Field(alias="sequence_classification")] = None
    """Parameters of stage sequence_classification."""
    token_classification: Annotated[TokenClassification | None, Field(alias="token_classification")] = None
    """Parameters of stage token_classification."""
    seq2seq: Annotated[Seq2Seq | None, Field(alias="seq2seq")] = None
    """Parameters of stage seq2seq."""
    evaluation: Evaluation = Evaluation()
    """Questions answered before and after."""
    deepspeed: DeepSpeed = DeepSpeed()
    """DeepSpeed configuration, merged over what the plan decides."""
    workers: Workers = Workers()
    """The pods."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints."""
    output: Output
    """Where the result goes."""
    recovery: Recovery = Recovery()
    """What happens when a worker fails."""
    credentials: Credentials | None = None
    """Access to storage and hub."""
    profile: Name = "default"
    """The platform defaults to use (images, tolerations, caches …), by the name they have in the Helm values."""
    suspend: bool = False
    """true: save a checkpoint and give the pods back; false again: continue from it."""
    ttl_seconds_after_finished: int | None = Field(None, ge=0, le=2147483647)
    """Delete the job and its pods this many seconds after it finished. Unset: keep it."""
