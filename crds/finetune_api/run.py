"""What passes between operator and trainer: the configuration in, progress and the last word out.

The operator writes :class:`TrainerConfig` into a ConfigMap; the trainer reads it, serves :class:`Progress`
over HTTP (``GET /progress``) and leaves a :class:`Termination` in the container's termination message.
Only names of this module are known to both sides.
"""

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune_api.causes import Cause
from finetune_api.methods import Method
from finetune_api.reinforcement import Grpo, Ppo, Rollout
from finetune_api.spec import Data, DataSource, Evaluation, ModelSource, Stage, Training
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

# Environment variables the pods get (all optional for the trainer but CONFIG).
ENV_CONFIG = "FINETUNE_CONFIG"  # path of the trainer's configuration, a JSON file
ENV_ATTEMPT = "FINETUNE_ATTEMPT"  # number of this attempt, from 1; writers of older attempts are fenced off
ENV_RUN = "FINETUNE_RUN"  # uid of the FineTuneJob: tells attempts of this job from those of an earlier one of its name
ENV_CACHE = "FINETUNE_CACHE"  # folder for fetched models and data; may be shared by many jobs
ENV_WORK = "FINETUNE_WORK"  # scratch folder of this pod
ENV_HTTP_PORT = "FINETUNE_HTTP_PORT"  # port of /metrics, /progress and /healthz on rank 0
ENV_TERMINATION_LOG = "FINETUNE_TERMINATION_LOG"  # file for the Termination document
ENV_ENDS = "FINETUNE_ENDS"  # JSON: how earlier attempts ended by their numbers, [cause, message]; for the report
ENV_LOCAL = "FINETUNE_LOCAL"  # set on the user's own machine, where there is no Secret, profile or pod to speak of
ENV_SAVE_STEPS = "FINETUNE_SAVE_STEPS"  # steering: may change from attempt to attempt
ENV_SAVE_TOTAL_LIMIT = "FINETUNE_SAVE_TOTAL_LIMIT"

HTTP_PORT = 9400
MASTER_PORT = 29500
TRAINER_CONTAINER = "trainer"
FETCH_CONTAINER = "fetch"

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, a checkpoint is saved
EXIT_USER = 64  # EX_USAGE: a mistake that a restart would repeat
EXIT_FAILED = 1


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class _Told(_Wire):
    """What a trainer says, to an operator that may be older than its image: what that does not know, it passes over."""

    model_config = ConfigDict(extra="ignore")


class TrainerConfig(_Wire):
    """Everything a run's result depends on, every default resolved. Written once per job, never changed."""

    namespace: str
    name: str
    stage: Stage
    model: ModelSource
    """``job://`` and ``pvc://`` are already resolved."""
    method: Method
    data: Data
    training: Training
    sft: Sft | None = None
    """The stage's own parameters, as ``spec.<stage>``; of other stages None."""
    reward: Reward | None = None
    dpo: Dpo | None = None
    kto: Kto | None = None
    orpo: Orpo | None = None
    rlaif: Rlaif | None = None
    ppo: Ppo | None = None
    """Of ppo and grpo, ``job://`` and ``pvc://`` are already resolved."""
    grpo: Grpo | None = None
    sequence_classification: SequenceClassification | None = None
    token_classification: TokenClassification | None = None
    seq2seq: Seq2Seq | None = None
    evaluation: Evaluation
    deepspeed: dict[str, Any]
    """The DeepSpeed configuration, complete but for the three batch sizes, which depend on the world."""
    checkpoint_uri: str
    """Folder of this job's checkpoints (``step-N/`` lie directly in it)."""
    save_steps: int
    save_total_limit: int
    resume: str = "auto"
    output_uri: str
    merge: bool = False
    max_shard_size: str = "5GB"
    global_batch_size: int
    """Sequences per optimizer step over all processes, as planned; kept when the world changes. Of ppo and grpo:
    prompts per rollout."""
    accelerator: str = "gpu"
    """gpu: it is an error where no GPU is found. cpu: GPUs are not used."""

    @property
    def rollout(self) -> Rollout | None:
        """The parameters of a stage that learns from what the model writes; None of other stages."""
        return self.ppo or self.grpo


Combination = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
"""How several LoRAs become one (PEFT's ``add_weighted_adapter``); cat and svd are exact sums."""


class MergeConfig(_Wire):
    """What ``finetune merge`` hands to ``finetune_trainer.merge``."""

    model: ModelSource
    """The base, and the adapters in ``adapters``."""
    weights: list[float]
    """One for each adapter; negative: it is taken away."""
    combination: Combination = "cat"
    density: float | None = None
    """Share of the values that is kept, where a combination prunes."""
    rank: int | None = None
    """Of the result, where a combination decomposes."""
    modules: str = ""
    """A regular expression found in the names of the layers to change; empty: all."""
    kind: Literal["model", "adapter"] = "model"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    output_uri: str
    max_shard_size: str = "5GB"
    seed: int = 42


class UseConfig(_Wire):
    """A finished model that is to be used: what ``finetune evaluate`` and ``finetune chat`` have in common."""

    model: ModelSource
    """A whole model with its adapters in ``adapters``; or the folder of an adapter."""
    base: ModelSource | None = None
    """The model below an adapter's folder. None: as the folder says."""
    stage: Stage | None = None
    """None: as the folder says; sft where it does not."""
    chat_template: str = ""
    accelerator: Literal["auto", "gpu", "cpu"] = "auto"
    compare: bool = False
    """Show what the model without its (last) adapter says, too."""


class EvaluateConfig(UseConfig):
    """What ``finetune evaluate`` hands to ``finetune_trainer.evaluate``."""

    data: list[DataSource]
    max_length: int = 2048
    max_bad_rows: int = 0
    batch_size: int = 1
    as_json: bool = False
    perplexity_positions: list[int] = []
    seq2seq: Seq2Seq | None = None


class ChatConfig(UseConfig):
    """What ``finetune chat`` hands to ``finetune_trainer.chat``."""

    system: str = ""
    max_new_tokens: int = 512
    temperature: float = 0.7
    """0: greedy."""
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None


class CheckpointInfo(_Told):
    """A complete checkpoint (or the reason why a found one was passed over)."""

    step: int
    uri: str
    digest: str = ""
    """``sha256:…`` of its manifest."""
    size: int = 0
    """Bytes of all its files."""
    time: str = ""
    """When it was completed, RFC 3339."""
    problem: str = ""
    """Why it was not used, where it was broken."""


class Answer(_Wire):
    """One prompt of ``evaluation.prompts`` with the model's answers."""

    prompt: str
    before: str = ""
    after: str = ""


class Progress(_Told):
    """Where a run stands, as rank 0 sees it. Served as JSON."""

    attempt: int = 1
    phase: str = "starting"
    """starting, loading, preparing, training, generating, judging, evaluating, saving, exporting, done"""
    step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    """Useful tokens (not padding) of all processes per second."""
    mfu: float | None = None
    """Share of the GPUs' peak that went into the model, 0 to 1."""
    step_seconds: float | None = None
    eta_seconds: float | None = None
    last_step_time: str = ""
    """When the last step ended, RFC 3339; empty before the first one of this attempt."""
    resumed_from_step: int | None = None
    formats: dict[str, str] = {}
    """How the rows of each source are written; where ``auto`` chose, what it took."""
    world_size: int = 1
    trainable_parameters: int = 0
    total_parameters: int = 0
    heartbeats: dict[str, float] = {}
    """Seconds since each rank (by number) was last seen to go forward."""
    checkpoints: list[CheckpointInfo] = []
    """Complete checkpoints, oldest first."""
    skipped_checkpoints: list[CheckpointInfo] = []
    """Broken ones that were found at start and passed over."""
    checkpoint_failures: int = 0
    evaluation: dict[str, float] = {}
    """Last evaluation figures: loss, perplexity, and the same per source as loss/NAME."""
    unhealthy: dict[str, str] | None = None
    """What makes the result doubtful: reasons of the condition Healthy (``health.py``), each with a figure. None: it
    was not judged yet."""
    message: str = ""
    """What the run is doing, one line for people."""


class OutputInfo(_Told):
    """A written result."""

    uri: str
    kind: str
    """adapter, model, merged or data (uri is the file of rows)"""
    digest: str = ""
    """``sha256:…`` of its manifest."""
    size: int = 0


TERMINATION_LIMIT = 4096
"""Bytes a kubelet keeps of a container's termination message, and less in a pod of more than three containers: those
of a pod share 12,288."""


class Termination(_Told):
    """The last word of a worker process. What decides stands first: a kubelet cuts the end off."""

    cause: Cause
    exit_code: int = 0
    """Of the process that ended first; negative: the number of the signal that killed it."""
    rank: int = 0
    step: int = 0
    max_steps: int = 0
    outputs: list[OutputInfo] = []
    last_checkpoint: CheckpointInfo | None = None
    loss: float | None = None
    unhealthy: dict[str, str] | None = None
    """As in :class:`Progress`."""
    message: str = Field("", max_length=2000)
    """For the user: what happened, the value, what is accepted, the remedy."""
    kept: list[int] = []
    """Steps of the complete checkpoints that are on storage now, the last one too."""
    evaluation: dict[str, float] = {}
    cut: bool = Field(default=False, exclude=True)
    """Its end was cut off: what is missing here may have been told."""

    def to_message(self) -> str:
        """JSON that fits into a termination message: the evaluation gives way first, then the message."""
        word = self
        for evaluation in (self.evaluation, {}):
            word = self.model_copy(update={"evaluation": evaluation})
            spare = TERMINATION_LIMIT - len(word.model_dump_json(exclude_defaults=True).encode())
            if spare >= 0:
                return word.model_dump_json(exclude_defaults=True)
        while spare < 0 and word.message:
            word = word.model_copy(update={"message": word.message.encode()[:spare].decode(errors="ignore")})
            spare = TERMINATION_LIMIT - len(word.model_dump_json(exclude_defaults=True).encode())
        return word.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_message(cls, text: str) -> "Termination | None":
        """What a termination message says, also one whose end is cut off. None where it does not even tell the cause.

        Of a word that was cut, whole members are taken, and of the message what is left of it.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            if not text.startswith("{"):  # something else, the end of a log
                return None
        for end in (found.start() for found in reversed(list(re.finditer(",", text)))):
            try:
                told = json.loads(text[:end] + "}")
            except ValueError:  # within a string, a list or an object
                continue
            told |= _cut_message(text[end + 1 :])
            try:
                return cls.model_validate({**told, "cut": True})
            except ValidationError:
                return None
        return None


def _cut_message(member: str) -> dict[str, str]:
    """The beginning of a message, where that is the member that was cut."""
    found = re.match(r'\s*"message"\s*:\s*("(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*)', member)
    return {"message": json.loads(found[1] + '"')} if found else {}
