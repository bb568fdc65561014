"""The stages a job can name: what each learns from, which kind of model it trains, and its own parameters.

A stage's parameters stand in the spec under its name (``spec.dpo`` of stage dpo), by the names and defaults of TRL
where TRL has them. To add a stage: a row of :data:`STAGES`, a class with its parameters, the field of that name in
``spec.py``, one file in the trainer's ``objectives/``, and the methods it goes with in ``compatibility.py``. A stage
that makes data (:attr:`Stage.makes`) has a file in the trainer's ``making/`` instead, and goes with no method.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Duration, HyperModel, Preserved
from finetune_api.reinforcement import Grpo, Ppo
from finetune_api.uris import ModelUri

DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]


class Sft(HyperModel):
    """Supervised fine-tuning."""

    loss_on: Literal["answers", "last_answer", "all"] = "answers"
    """What is learned of a conversation: every answer, only the last one, or the whole text."""


class Reward(HyperModel):
    """A reward model: a scalar head, trained by pairs (Bradley-Terry)."""

    center_rewards_coefficient: float | None = Field(None, ge=0, le=1000)
    """Weight of the squared sum of both rewards, which keeps their mean near zero (arXiv:2312.09244), e.g. 0.01.
    Unset: none."""
    use_margin: bool = True
    """Where a row says by how much its better answer is better, the rewards must differ by that much."""


class Dpo(HyperModel):
    """Direct preference optimisation (arXiv:2305.18290). The reference is the model the job starts from."""

    loss_type: DpoLoss = "sigmoid"
    """TRL's: sigmoid (the paper's), hinge (SLiC), ipo (arXiv:2310.12036), sigmoid_norm (mean log-probabilities, so that
    length does not count) and others of its documentation."""
    beta: float = Field(0.1, gt=0, le=1000)
    """How closely the model stays with the reference; tau of ipo."""
    label_smoothing: float = Field(0.0, ge=0, le=0.499)  # API servers judge 0 < 0.5 in whole numbers
    """Probability that a preference is the wrong way round; of sigmoid (conservative DPO), robust and exo_pair."""
    rpo_alpha: float | None = Field(None, ge=0, le=1000)
    """Weight of the better answer's own loss, per token (arXiv:2404.19733). Unset: 0."""
    ld_alpha: float | None = Field(None, ge=0, le=1)
    """Weight of the tokens of the longer answer beyond the length of the shorter one (LD-DPO, arXiv:2409.06411).
    Unset: 1."""
    discopop_tau: float = Field(0.05, gt=0, le=1000)
    """Temperature of discopop."""
    precompute_ref_log_probs: bool = False
    """Have the reference look at every row once before training, in place of once in every epoch. Methods whose result
    is a whole model always do."""


class Kto(HyperModel):
    """Kahneman-Tversky optimisation (arXiv:2402.01306): single answers, each judged good or bad."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto, or TRL's apo_zero_unpaired (arXiv:2408.06266), which needs no estimate of the divergence."""
    beta: float = Field(0.1, gt=0, le=1000)
    """How closely the model stays with the reference."""
    desirable_weight: float = Field(1.0, ge=0, le=1000)
    """Weight of good answers; with undesirable_weight it makes up for one kind being rarer."""
    undesirable_weight: float = Field(1.0, ge=0, le=1000)
    """Weight of bad answers."""
    precompute_ref_log_probs: bool = False
    """As dpo.precompute_ref_log_probs."""


class Orpo(HyperModel):
    """Odds-ratio preference optimisation (arXiv:2403.07691): no reference, and SFT in the same loss."""

    beta: float = Field(0.1, ge=0, le=1000)
    """Weight of the odds ratio; lambda of the paper."""


class Judge(HyperModel):
    """Who compares the answers: a model behind an endpoint, or one that is loaded."""

    endpoint: str = Field("", max_length=1024)
    """Base URL of an OpenAI-compatible API, e.g. https://api.openai.com/v1; chat/completions below it is asked, with
    OPENAI_API_KEY of the Secret in spec.credentials where it is there."""
    model: str = Field("", max_length=256)
    """Name of the model at the endpoint."""
    uri: ModelUri | None = None
    """In place of an endpoint: a model to load, written as spec.model.uri. It writes nothing: its verdict is the one it
    holds most probable (arXiv:2309.00267)."""
    revision: str = Field("main", max_length=256)
    """Branch, tag or commit; only for hf://."""
    criteria: str = Field("helpful, honest and harmless", min_length=1, max_length=4096)
    """What the better answer is more of; a part of the built-in question."""
    prompt: str = Field("", max_length=65536)
    """The question to the judge, in place of the built-in one, with {prompt}, {answer_a} and {answer_b}. It must ask
    for one of [[A]], [[B]] and [[C]] (a tie)."""
    max_concurrency: int = Field(8, ge=1, le=1024)
    """Requests to the endpoint at the same time, of all workers together."""
    timeout: Duration = "2m"
    """How long one request may take."""
    max_retries: int = Field(8, ge=0, le=100)
    """How often a request is repeated that failed for the moment (no connection, 408, 429, 5xx), after growing pauses,
    or after those that the endpoint asks for (Retry-After)."""
    max_tokens: int = Field(1024, ge=1, le=1048576)
    """Longest verdict with its reasons, in tokens."""
    temperature: float = Field(0.0, ge=0, le=10)
    """Of the endpoint's sampling."""
    extra_body: Preserved = {}
    """Laid over the body of every request, e.g. {reasoning_effort: low}. With max_completion_tokens in it, max_tokens
    is not sent."""


class Rlaif(HyperModel):
    """Preferences by a judge in place of people (arXiv:2212.08073, arXiv:2309.00267). Every two answers to a prompt are
    compared twice, each once in first place; where the verdicts differ, it is a tie. Ties are dropped."""

    judge: Judge
    """Who compares the answers."""
    num_generations: int = Field(2, ge=2, le=64)
    """Answers to each prompt; all pairs of them are compared."""
    max_prompts: int = Field(0, ge=0, le=1000000000)
    """A random choice of so many prompts; 0: all."""
    max_new_tokens: int = Field(512, ge=1, le=131072)
    """Longest answer in tokens."""
    temperature: float = Field(1.0, gt=0, le=10)
    """Of the sampling of answers."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Answers are drawn from the most probable tokens that come to this probability."""
    top_k: int = Field(0, ge=0, le=1000000)
    """Answers are drawn from so many most probable tokens; 0: from all."""
    generation_batch_size: int = Field(8, ge=1, le=65536)
    """Prompts answered together by a process."""


LabelName = Annotated[str, Field(min_length=1, max_length=256)]


class SequenceClassification(HyperModel):
    """Classification of texts, and of pairs of texts."""

    labels: list[LabelName] = Field(default=[], max_length=1024)
    """Names of the labels, in the order of the model's outputs. Empty: those of the training rows, sorted."""
    problem_type: Literal["auto", "single_label_classification", "multi_label_classification", "regression"] = "auto"
    """One label, any number of labels, or a number (transformers' names). auto: as the training rows are: lists are
    several labels, numbers with a fraction a regression."""


class TokenClassification(HyperModel):
    """Classification of words, such as named entities."""

    labels: list[LabelName] = Field(default=[], max_length=1024)
    """Names of the tags, as IOB: O, B-PER, I-PER …, in the order of the model's outputs. Empty: those of the training
    rows, sorted."""


class Seq2Seq(HyperModel):
    """Texts made of texts by an encoder-decoder."""

    source_prefix: str = Field("", max_length=1024)
    """Put before every source, e.g. "summarize: "."""
    max_target_length: int = Field(128, ge=1, le=1048576)
    """Longest target in tokens; longer ones are cut, counted and reported. Of sources data.max_length is the limit."""


@dataclass(frozen=True)
class Stage:
    """What is particular to a stage."""

    record: str
    """The kind of record it learns from, by its name in the trainer's ``data/records.py``; what else may stand for it,
    is said there."""
    told: str
    """What it does, for people."""
    packing: bool = False
    """Several rows may share a sequence."""
    generates: bool = True
    """The model writes text, so that ``evaluation.prompts`` can be put to it."""
    rollouts: bool = False
    """It learns from answers that the model writes itself: a step is one rollout."""
    parameters: type[HyperModel] | None = None
    """The class of ``spec.<stage>``."""
    makes: str = ""
    """It trains nothing and writes rows: the name of their file in the output."""


STAGES: dict[str, Stage] = {
    "pretrain": Stage("Text", "continued pretraining on running text", packing=True),
    "sft": Stage(
        "Conversation", "supervised fine-tuning; the loss covers the answers only", packing=True, parameters=Sft
    ),
    "reward": Stage("Preference", "a reward model of pairs of answers", generates=False, parameters=Reward),
    "dpo": Stage("Preference", "preferences without a reward model", parameters=Dpo),
    "kto": Stage("Judged", "answers judged good or bad", parameters=Kto),
    "orpo": Stage("Preference", "SFT and preferences in one, without a reference", parameters=Orpo),
    "rlaif": Stage(
        "Prompt",
        "preferences by a judge: the model answers prompts, the judge compares the answers",
        generates=False,
        parameters=Rlaif,
        makes="preferences.jsonl",
    ),
    "ppo": Stage("Prompt", "rewards of what the model writes itself, by PPO", rollouts=True, parameters=Ppo),
    "grpo": Stage("Prompt", "rewards of several answers to each prompt, by GRPO", rollouts=True, parameters=Grpo),
    "sequence_classification": Stage(
        "Labelled", "labels of texts or of pairs of texts", generates=False, parameters=SequenceClassification
    ),
    "token_classification": Stage("Tagged", "a label for every word", generates=False, parameters=TokenClassification),
    "seq2seq": Stage("SourceTarget", "texts made of texts by an encoder-decoder", parameters=Seq2Seq),
}
TRAINED = tuple(name for name, stage in STAGES.items() if not stage.makes)
"""Stages whose result is a model or an adapter; that of the others is data."""
LANGUAGE = ("pretrain", "sft")
"""Stages that learn to write the next token of each row, and nothing else."""
MAKERS = tuple(name for name, stage in STAGES.items() if stage.makes)
"""The others."""
SECTIONS = tuple(name for name, stage in STAGES.items() if stage.parameters is not None)
"""Stages with parameters of their own, ``spec.<stage>``."""
ROLLOUTS = tuple(name for name, stage in STAGES.items() if stage.rollouts)
"""Stages that learn from answers that the model writes itself."""
