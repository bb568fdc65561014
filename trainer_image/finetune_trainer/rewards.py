"""What answers are worth: reward functions by a rule, the user's own, and reward models; all added by their weights.

A judge gets prompts and answers as messages, never tokens: a reward model may have another tokenizer than the policy.
Called by ``rollout.py``; ``run.py`` loads it, because a reward model that is an adapter of the policy's base must be
there before the engine.
"""

import importlib.util
import logging
import math
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_api.causes import Cause
from finetune_api.reinforcement import RewardFunction
from finetune_api.run import TrainerConfig
from finetune_trainer.adapter_files import CONFIG, WEIGHTS, described
from finetune_trainer.data.records import BadRowError, Conversation, Message
from finetune_trainer.data.render import Rendered, Renderer
from finetune_trainer.fetch import Fetched
from finetune_trainer.finished import put_on
from finetune_trainer.outcome import RunError

log = logging.getLogger(__name__)

ADAPTER = "reward"
"""The name of a reward model that is an adapter of the policy's base."""
_RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")


@dataclass(frozen=True)
class Asked:
    """An answer to be judged."""

    prompt: list[Message]
    answer: str
    tokens: int
    """Of the answer."""
    ids: list[int]
    """The answer's tokens."""
    columns: dict[str, Any]
    """The row's, ``answer`` among them where there is a known one."""


Judge = Callable[[list[Asked]], list[float | None]]
"""A reward for every answer; None: no opinion, it counts nothing."""


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Rewards:
    """All that judges the answers of a run."""

    judges: dict[str, tuple[Judge, float]]
    """By name, with its weight."""
    detach: Callable[[], None] = _nothing
    """Takes the reward model out of the policy again."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the judges."""
        return tuple(self.judges)

    def of(self, answers: list[Asked]) -> np.ndarray:
        """float64 (answers, judges): what each says, NaN where it has no opinion."""
        told = [[math.nan if r is None else float(r) for r in judge(answers)] for judge, _ in self.judges.values()]
        return np.array(told, np.float64).T.reshape(len(answers), len(self.judges))

    def total(self, told: np.ndarray) -> np.ndarray:
        """float64 (answers,): their sums by weight, of what :meth:`of` gives."""
        weights = np.array([weight for _, weight in self.judges.values()])
        total: np.ndarray = np.nansum(told * weights, axis=1)
        return total


def load(
    config: TrainerConfig,
    fetched: Fetched,
    tokenizer: Any,
    policy: torch.nn.Module,
    device: torch.device,
) -> Rewards:
    """Everything that judges. ``policy``: the model with the method's trainable part; a reward model may join it.

    RunError(INVALID_CONFIGURATION) where a function or a reward model is none.
    """
    from finetune_trainer import model as models

    options = config.rollout
    assert options is not None
    judges: dict[str, tuple[Judge, float]] = {}
    detach = _nothing
    if options.reward_model is not None:
        assert fetched.reward_model is not None
        model, renderer, detach = _reward_model(config, fetched.reward_model, fetched, tokenizer, policy, device)
        size = options.local_rollout_forward_batch_size
        judges["model"] = (
            _scoring(model, renderer, device, models.dtype_of(config, device), size),
            options.reward_model.weight,
        )
    for number, function in enumerate(options.reward_funcs):
        name = function.function if function.type == "python" else function.type
        while name in judges:
            name = f"{name}_{number}"
        path = fetched.reward_funcs[number]
        judges[name] = (_python(function, path) if path else _RULES[function.type](function), function.weight)
    return Rewards(judges, detach)


# --- rules ----------------------------------------------------------------------------------------------------------


def _exact_match(function: RewardFunction) -> Judge:
    def judge(answers: list[Asked]) -> list[float | None]:
        return [float(what(one.answer) == what(_known(function, one))) for one in answers]

    def what(text: str) -> str:
        if function.pattern:
            found = list(re.finditer(function.pattern, text, re.DOTALL))
            text = (found[-1].group(1) if found[-1].re.groups else found[-1].group()) or "" if found else text
        return " ".join(text.split())

    return judge


def _known(function: RewardFunction, asked: Asked) -> str:
    known = asked.columns.get(function.column)
    if known is None:
        raise RunError(
            Cause.INVALID_DATA,
            f"a row has no column {function.column!r}, which holds the known answer for exact_match; it "
            f"has {', '.join(asked.columns) or 'none'}. Name its column in reward_funcs[].column.",
        )
    return str(known)


def _format(function: RewardFunction) -> Judge:
    pattern = re.compile(function.pattern, re.DOTALL)
    return lambda answers: [float(pattern.search(one.answer) is not None) for one in answers]


def _length(function: RewardFunction) -> Judge:
    target = function.target_length
    return lambda answers: [max(0.0, 1 - abs(one.tokens - target) / target) for one in answers]


_RULES: dict[str, Callable[[RewardFunction], Judge]] = {
    "exact_match": _exact_match,
    "format": _format,
    "length": _length,
}


# --- the user's own -------------------------------------------------------------------------------------------------


def _python(function: RewardFunction, path: Path) -> Judge:
    """TRL's: ``function(prompts, completions, **columns)``; conversations, as lists of messages."""
    where = f"{function.function} of {function.uri}"
    own = _load_python(function, path)

    def judge(answers: list[Asked]) -> list[float | None]:
        names = {name for one in answers for name in one.columns if name not in _RESERVED}
        try:
            told = own(
                prompts=[one.prompt for one in answers],
                completions=[[{"role": "assistant", "content": one.answer}] for one in answers],
                completion_ids=[one.ids for one in answers],
                **{name: [one.columns.get(name) for one in answers] for name in sorted(names)},
            )
        except Exception as error:
            raise _fault(where, error) from error
        problem = _not_rewards(told, len(answers))
        if problem:
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"the reward function {where} gave {problem}; accepted: a list of {len(answers)} numbers (or None), "
                "one for each completion.",
            )
        return list(told)

    return judge


def _not_rewards(told: Any, count: int) -> str:
    if not isinstance(told, list | tuple):
        return f"{type(told).__name__}"
    if len(told) != count:
        return f"{len(told)} values for {count} completions"
    for value in told:
        if value is None:
            continue
        try:
            if not math.isfinite(float(value)):
                return f"{value}"
        except (TypeError, ValueError):
            return f"{value!r}"
    return ""


def _load_python(function: RewardFunction, path: Path) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location("finetune_reward_" + path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _fault(str(function.uri), error) from error
    found = getattr(module, function.function, None)
    if not callable(found):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{function.uri} has no function {function.function!r}; accepted in reward_funcs[].function: "
            f"{', '.join(known) or 'none, it defines no function'}.",
        )
    own: Callable[..., Any] = found
    return own


def _fault(where: str, error: Exception) -> RunError:
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    place = f" (line {last.lineno} of {Path(last.filename).name}: {last.line})" if last else ""
    return RunError(
        Cause.INVALID_CONFIGURATION,
        f"the reward function {where} failed: {type(error).__name__}: {error}{place}. Correct it; columns of the rows "
        "come by their names, so it should take **columns.",
    )


# --- reward models --------------------------------------------------------------------------------------------------


def _scoring(model: Any, renderer: Renderer, device: torch.device, dtype: torch.dtype, size: int) -> Judge:
    """Scores as the reward model's training gave them: of the text that its own tokenizer and template make."""
    tokenizer = renderer.tokenizer

    @torch.no_grad()
    def judge(answers: list[Asked]) -> list[float | None]:
        tokens = list(renderer.encode([_rendered(renderer, one) for one in answers]))
        scores: list[float | None] = []
        for first in range(0, len(tokens), size):
            rows = [{"input_ids": part.ids.tolist()} for part in tokens[first : first + size]]
            batch = tokenizer.pad(rows, return_tensors="pt", padding_side="right")
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                logits = model(
                    input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
                ).logits
            scores += logits.float().squeeze(-1).tolist()
        return scores

    return judge


def _rendered(renderer: Renderer, asked: Asked) -> Rendered:
    try:
        return renderer.render(Conversation([*asked.prompt, {"role": "assistant", "content": asked.answer}]))[-1]
    except BadRowError:  # templates that refuse an empty answer
        return Rendered(renderer.asking(asked.prompt, []).text + asked.answer, [])


def _reward_model(
    config: TrainerConfig,
    folder: Path,
    fetched: Fetched,
    tokenizer: Any,
    policy: torch.nn.Module,
    device: torch.device,
) -> tuple[Any, Renderer, Callable[[], None]]:
    """The model, its texts, and what takes it out of the policy again."""
    from finetune_trainer import model as models

    options = config.rollout
    assert options is not None and options.reward_model is not None
    uri = options.reward_model.uri
    as_reward = config.model_copy(
        update={
            "stage": "reward",
            "data": config.data.model_copy(update={"packing": False, "chat_template": ""}),
            "model": config.model.model_copy(update={"uri": uri, "gguf_file": "", "adapters": []}),
        }
    )
    if not (folder / CONFIG).exists():
        _check_classifier(folder, uri)
        own = as_reward.model_copy(update={"method": _unquantised()})
        found = models.load_model(folder, own, device).eval().requires_grad_(False)
        return found, Renderer(models.load_tokenizer(folder, as_reward), lossless=False), _nothing
    written = described(folder, uri)
    _check_base(config, written, uri)
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    renderer = Renderer(models.load_tokenizer(folder, as_reward) if has_tokenizer else tokenizer, lossless=False)
    if _can_share(policy, written, folder):
        shared = _beside(policy, folder, device, uri)
        log.info("the reward model %s shares the policy's base in memory", uri)
        return shared, renderer, lambda: policy.delete_adapter(ADAPTER)  # type: ignore[operator]
    base = models.load_model(
        fetched.model, as_reward.model_copy(update={"method": _unquantised(), "model": config.model}), device
    )
    found, _ = put_on(base, folder, config.model.uri)
    log.info("the reward model %s is a second model in memory", uri)
    return found.requires_grad_(False), renderer, _nothing


def _can_share(policy: Any, written: dict[str, Any], folder: Path) -> bool:
    """Both are LoRAs, and nothing else of the base is changed by either."""
    from safetensors import safe_open

    lora = getattr(policy, "peft_config", {}).get("default")
    if lora is None or lora.peft_type != "LORA" or written.get("peft_type") != "LORA":
        return False
    if lora.modules_to_save or lora.bias != "none" or getattr(policy, "_first_lora", None) is not None:
        return False
    below = f"base_model.model.{policy.get_base_model().base_model_prefix}."
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return not any(key.startswith(below) and "lora_" not in key for key in list(file.keys()))


def _unquantised() -> Any:
    from finetune_api.methods import Lora

    return Lora(type="lora")


def _check_classifier(folder: Path, uri: str) -> None:
    import json

    try:
        kinds = json.loads((folder / "config.json").read_text()).get("architectures") or []
    except (OSError, ValueError):
        kinds = []
    if kinds and not any("ForSequenceClassification" in kind for kind in kinds):
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri} is no reward model but a {kinds[0]}. Accepted in reward_model.uri: what a job of stage reward has "
            "written, or another model for sequence classification with one output.",
        )


def _check_base(config: TrainerConfig, written: dict[str, Any], uri: str) -> None:
    from finetune_trainer.methods.adapters import base_name

    theirs, ours = written.get("base_model_name_or_path"), base_name(config.model)
    if theirs and theirs != ours:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"the reward model {uri} is an adapter over {theirs}, and this job trains {ours}. Accepted: an adapter "
            "over the same model, or a whole reward model. Set output.merge: true in the job that made it, and name "
            "its folder merged.",
        )


class _Beside:
    """A classifier over the policy's own layers, through its adapter ``reward``."""

    def __init__(self, policy: Any, shell: Any) -> None:
        self.layers = [module for module in policy.modules() if hasattr(module, "lora_A")]
        self.policy, self.shell = policy, shell

    def __call__(self, **inputs: Any) -> Any:
        with self._switched():
            return self.shell(**inputs, use_cache=False)

    @contextmanager
    def _switched(self) -> Iterator[None]:
        # Not PEFT's set_adapter: it would change what is trained.
        kept = [(layer, layer._active_adapter) for layer in self.layers]
        training = self.policy.training
        self.policy.eval()
        try:
            for layer, _ in kept:
                layer._active_adapter = [ADAPTER]
            yield
        finally:
            for layer, active in kept:
                layer._active_adapter = active
            self.policy.train(training)


def _beside(policy: Any, folder: Path, device: torch.device, uri: str) -> _Beside:
    """A LoRA reward model over the policy's base: its adapter joins the policy's, its head stands beside."""
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForSequenceClassification

    weights = load_file(folder / WEIGHTS)
    own = {key: value for key, value in weights.items() if "lora_" in key}
    head = {key.removeprefix("base_model.model."): value for key, value in weights.items() if "lora_" not in key}
    trained = {id(parameter): parameter.requires_grad for parameter in policy.parameters()}
    adapter: Any = PeftConfig.from_pretrained(str(folder))
    adapter.task_type, adapter.modules_to_save = policy.peft_config["default"].task_type, None
    adapter.inference_mode = True
    policy.add_adapter(ADAPTER, adapter)
    result: Any = set_peft_model_state_dict(policy, own, adapter_name=ADAPTER)
    for parameter in policy.parameters():  # PEFT marks anew what is trained
        parameter.requires_grad_(trained.get(id(parameter), False))
    described = AutoConfig.from_pretrained(folder) if (folder / "config.json").exists() else None
    base = policy.get_base_model()
    described = described or type(base.config).from_dict(base.config.to_dict() | {"num_labels": 1})
    with torch.device("meta"):
        shell: Any = AutoModelForSequenceClassification.from_config(described)
    setattr(shell, shell.base_model_prefix, getattr(base, base.base_model_prefix))
    shell.load_state_dict({key: value.to(device) for key, value in head.items()}, strict=False, assign=True)
    missing = [name for name, parameter in shell.named_parameters() if parameter.is_meta]
    if missing or result.unexpected_keys:
        wrong = (missing or result.unexpected_keys)[0]
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"the reward model {uri} does not fit: {wrong} is missing or has no place. Accepted: an adapter that a job "
            "of stage reward has made over the model of this job.",
        )
    for child in set(shell.children()) - {getattr(shell, shell.base_model_prefix)}:
        child.eval()
    return _Beside(policy, shell)
