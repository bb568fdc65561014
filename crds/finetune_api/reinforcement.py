"""The stages that learn from what the model writes itself, ppo and grpo, and what judges it.

Names and defaults are TRL's where it has them. One step of training is one rollout: the prompts of a global batch are
answered, the answers judged, and learned from in every epoch and mini-batch.
"""

from typing import Literal

from pydantic import Field

from finetune_api.base import HyperModel
from finetune_api.uris import ModelUri, StorageUri

FUNCTION = r"^[A-Za-z_][A-Za-z0-9_]*$"


class RewardModel(HyperModel):
    """A reward model, as stage reward makes it: a whole model, or an adapter over the model of this job."""

    uri: ModelUri
    """Where it lies, written as the model's uri; job://NAME: the one that another FineTuneJob wrote (this job waits for
    it). An adapter of a LoRA policy shares its base in memory."""
    revision: str = Field("main", max_length=256)
    """Branch, tag or commit; only for hf://."""
    weight: float = Field(1.0, ge=-1000, le=1000)
    """Its reward counts so much in the sum of all."""


class RewardFunction(HyperModel):
    """One way to judge an answer by a rule."""

    type: Literal["exact_match", "format", "length", "python"]
    """exact_match: 1 where the answer is the known one, else 0. format: 1 where pattern is found in the answer, else 0.
    length: 1 at target_length tokens, less the farther away, 0 at none and at twice as many. python: your function."""
    weight: float = Field(1.0, ge=-1000, le=1000)
    """Its reward counts so much in the sum of all."""
    column: str = Field("answer", min_length=1, max_length=128)
    """The column of the rows with the known answer; of exact_match. Rows with an answer of their own need none."""
    pattern: str = Field("", max_length=4096)
    r"""A regular expression (Python's; . is any character). Of exact_match: its last match, or of that the first group,
    is what is compared, of both answers, e.g. ####\s*(.+)."""
    target_length: int = Field(0, ge=0, le=1048576)
    """Tokens; of length."""
    uri: StorageUri | None = None
    """A Python file; of python. It runs in the trainer's pods, with all they may do."""
    function: str = Field("reward", pattern=FUNCTION, max_length=128)
    """Its function, as TRL's: (prompts, completions, **columns) to a list of numbers, None where it has no opinion.
    prompts are lists of messages, completions lists of one message."""


class Rollout(HyperModel):
    """How answers are drawn and judged."""

    reward_model: RewardModel | None = None
    """A model that judges the answers."""
    reward_funcs: list[RewardFunction] = Field(default=[], max_length=16)
    """Rules that judge them; all rewards are added by their weights."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Of drawing, and of the probabilities that are learned."""
    max_completion_length: int = Field(256, ge=1, le=1048576)
    """Longest answer in tokens. Prompts that leave no room for it in data.max_length are left out and counted."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Answers are drawn of the likeliest tokens with this probability together."""
    num_mini_batches: int = Field(1, ge=1, le=65536)
    """Updates per epoch over the answers of a step, each by its share of them."""
    local_rollout_forward_batch_size: int = Field(16, ge=1, le=65536)
    """Answers that are written at once in a process."""


class Ppo(Rollout):
    """Proximal policy optimisation with a value head (arXiv:1707.06347, arXiv:2203.02155)."""

    temperature: float = Field(0.7, gt=0, le=100)
    """Of drawing, and of the probabilities that are learned."""
    num_ppo_epochs: int = Field(4, ge=1, le=1000)
    """How often each answer is learned from."""
    kl_coef: float = Field(0.05, ge=0, le=1000)
    """Cost of every nat per token away from the reference, the model the job starts from."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """How that is estimated: k1, the difference of log-probabilities; k3 has less variance."""
    kl_target: float | None = Field(None, gt=0, le=100000)
    """Nats per answer away from the reference that kl_coef is steered to (arXiv:1909.08593), e.g. 6.
    Unset: it stays."""
    kl_horizon: float = Field(10000, gt=0, le=1e9)
    """Answers over which kl_coef follows: by at most a fifth in so many."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of the advantages (GAE, arXiv:1506.02438)."""
    whiten_rewards: bool = False
    """Divide rewards by their deviation over the batch."""
    cliprange: float = Field(0.2, gt=0, le=100)
    """A token's probability is moved by this share in a step at most."""
    cliprange_value: float = Field(0.2, gt=0, le=1000000)
    """A value is moved by so much in a step at most."""
    vf_coef: float = Field(0.1, ge=0, le=1000)
    """Weight of the values' loss."""
    missing_eos_penalty: float | None = Field(None, ge=0, le=1000000)
    """Taken from the reward of an answer that did not end by itself. Unset: 0."""


class Grpo(Rollout):
    """Group-relative policy optimisation (arXiv:2402.03300): answers to one prompt are judged by each other."""

    num_generations: int = Field(8, ge=2, le=1024)
    """Answers to every prompt."""
    num_iterations: int = Field(1, ge=1, le=1000)
    """How often each answer is learned from."""
    beta: float = Field(0.0, ge=0, le=1000)
    """Weight of the divergence from the reference, the model the job starts from; 0: there is none."""
    use_bias_correction_kl: bool = True
    """Weigh the divergence by the ratio of probabilities, now to when the answer was written (arXiv:2512.02556)."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"] = "dapo"
    """TRL's. grpo: mean over answers of the mean over tokens. dapo and bnpo: mean over all tokens. dr_grpo: sum over
    max_completion_length. cispo, sapo, luspo: see TRL's documentation."""
    epsilon: float = Field(0.2, ge=0, le=1000)
    """A token's probability is lowered by this share in a step at most."""
    epsilon_high: float | None = Field(None, ge=0, le=1000)
    """And raised by this one (0.28 in DAPO; the highest ratio of cispo). Unset: as epsilon."""
    delta: float | None = Field(None, gt=0, le=1000)
    """Highest ratio of probabilities that counts where the answer was bad. Unset: none."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios of probabilities by token, or one per answer (GSPO, arXiv:2507.18071)."""
    sapo_temperature_pos: float = Field(1.0, gt=0, le=1000)
    """Temperature of sapo's gate for good answers."""
    sapo_temperature_neg: float = Field(1.05, gt=0, le=1000)
    """And for bad ones."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the deviation of the rewards in the group, in the batch, or not (Dr. GRPO)."""
    mask_truncated_completions: bool = False
    """Learn nothing from answers that did not end by themselves."""
