"""Whether a run's figures speak for its result. Pure; called by ``run.py`` at every logged step and at the end.

What is doubtful comes back as reasons of the condition ``Healthy`` (``finetune_api/health.py`` has the sentences). A
false alarm is worse than silence: every threshold says what it lets pass.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from finetune_api.conditions import Reason
from finetune_api.run import Answer, TrainerConfig
from finetune_api.stages import STAGES

WINDOW = 10
"""Logged figures that are looked at together, at both ends of a run."""
HANDFUL = 5
"""Steps: AdamW moves a weight by about the learning rate in each, so fewer change next to nothing."""
CHANCE = 0.95
"""Share of the logarithm of the vocabulary. Texts that a model knows nothing of at all stay below it: their words are
not equally frequent."""
LARGE_VOCABULARY = 1000
"""With fewer tokens (bytes, amino acids, bases), good models are not far from chance."""
LEARNED = 0.01
"""A loss below this may have no gradient because nothing is left to learn."""
MOST = 0.9
"""Share of the training rows that are cut. Some long rows are cut in every data set."""
CONTAMINATED = 0.1
"""Share of the held-out rows of a source. A few stand in the training rows by chance ("thank you"), and move no
figure."""

FIGURE = 80
"""Characters of a figure: the last word is short."""


@dataclass
class Course:
    """The first and the last logged figures of a run, however long it is: (step, loss, gradient norm)."""

    first: list[tuple[int, float, float]] = field(default_factory=list)
    last: deque[tuple[int, float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    count: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if "loss" not in line or not math.isfinite(line["loss"]):
            return
        point = (int(line["step"]), float(line["loss"]), float(line["grad_norm"]))
        self.count += 1
        self.last.append(point)
        if len(self.first) < WINDOW:
            self.first.append(point)


@dataclass(frozen=True)
class Evidence:
    """What there is to judge by."""

    config: TrainerConfig
    course: Course
    max_steps: int
    data: Mapping[str, Mapping[str, Any]]
    """What the data preparation reports, by source; ``eval/`` before held-out ones."""
    vocabulary: int | None = None
    """Tokens the model chooses from."""
    answers: Sequence[Answer] = ()
    taught: Callable[[str], bool] = lambda answer: False
    """Whether a training row says this."""
    done: bool = False
    """The last step was made."""


def symptoms(evidence: Evidence) -> dict[str, str]:
    """What makes the result doubtful: reasons, each with a figure. Empty: nothing does."""
    found = {
        Reason.LOSS_AT_CHANCE: _at_chance(evidence),
        Reason.LOSS_ABOVE_START: _above_start(evidence),
        Reason.ZERO_GRADIENTS: _no_gradients(evidence),
        Reason.EMPTY_ANSWERS: _empty(evidence.answers),
        Reason.IDENTICAL_ANSWERS: _identical(evidence),
        Reason.ROWS_TRUNCATED: _truncated(evidence),
        Reason.HELD_OUT_ROWS_IN_TRAINING: _contaminated(evidence),
        Reason.TOO_FEW_STEPS: _too_few_steps(evidence),
    }
    return {str(reason): figure[:FIGURE] for reason, figure in found.items() if figure}


def _ends(course: Course) -> tuple[float, float, float]:
    """The loss at the beginning, at the end, and how far two such medians differ by chance: five standard errors,
    because the losses of single batches have a long tail."""
    reach = min(WINDOW, max(1, course.count // 5))
    first, last = [loss for _, loss, _ in course.first], [loss for _, loss, _ in course.last]
    jumps = [abs(b - a) for losses in (first, last) for a, b in pairwise(losses)]
    # The median of |a - b| of two normal draws is 0.954 of their deviation; one jump does not move it.
    noise = median(jumps) / 0.954 if jumps else 0.0
    return median(first[:reach]), median(last[-reach:]), 5 * noise * math.sqrt(2 / reach)


def _above_start(evidence: Evidence) -> str:
    """Not of what is rewarded: the losses of PPO and GRPO are differences, and need not fall. Fewer than four figures
    may be those of odd batches."""
    course = evidence.course
    if STAGES[evidence.config.stage].rollouts or course.count < 4:
        return ""
    before, now, noise = _ends(course)
    # A loss near zero may double without harm.
    margin = 0.25 + 0.1 * abs(before) if course.count >= WINDOW else 0.5 + 0.25 * abs(before)
    return f"{before:.2f} → {now:.2f}" if now - before > margin + noise else ""


def _at_chance(evidence: Evidence) -> str:
    vocabulary, course = evidence.vocabulary or 0, evidence.course
    if evidence.config.stage not in ("pretrain", "sft", "seq2seq") or vocabulary < LARGE_VOCABULARY or not course.count:
        return ""
    guess = math.log(vocabulary)
    before, now, _ = _ends(course)
    # A model that begins with random weights begins at chance.
    early = course.last[-1][0] * 2 < evidence.max_steps and before > 0.9 * guess
    if now < CHANCE * guess or (early and not evidence.done):
        return ""
    return f"{now:.2f}; the logarithm of {vocabulary:,} tokens is {guess:.2f}"


def _no_gradients(evidence: Evidence) -> str:
    """GRPO has none where all answers to a prompt are rewarded alike, which happens in good runs."""
    course = evidence.course
    if STAGES[evidence.config.stage].rollouts or course.count < (1 if evidence.done else 3):
        return ""
    still = [step for step, _, norm in list(course.last)[-3:] if norm == 0]
    if len(still) < min(3, course.count) or course.last[-1][1] < LEARNED:
        return ""
    return f"steps {still[0]} to {still[-1]}" if len(still) > 1 else f"step {still[0]}"


def _empty(answers: Sequence[Answer]) -> str:
    """A model that said nothing before either is not made worse."""
    empty = answers and not any(answer.after.strip() for answer in answers)
    return f"{len(answers)} of {len(answers)}" if empty and any(answer.before.strip() for answer in answers) else ""


def _identical(evidence: Evidence) -> str:
    """Two questions may well have one answer; and more, where the rows teach it: a label, a name."""
    answers = evidence.answers
    after, before = ({getattr(answer, side).strip() for answer in answers} for side in ("after", "before"))
    prompts = {answer.prompt for answer in answers}
    if len(prompts) < 3 or len(after) != 1 or len(before) == 1 or not any(after):
        return ""
    return "" if evidence.taught(answers[0].after) else str(len(prompts))


def _truncated(evidence: Evidence) -> str:
    sources = [counts for name, counts in evidence.data.items() if not name.startswith("eval/")]
    cut, rows = (sum(int(counts.get(key, 0)) for counts in sources) for key in ("truncated", "rows"))
    return f"{cut:,} of {rows:,} at {evidence.config.data.max_length} tokens" if rows and cut >= MOST * rows else ""


def _contaminated(evidence: Evidence) -> str:
    told = [
        f"{name.removeprefix('eval/')}: {counts['contaminated']:,} of {counts['sequences']:,}"
        for name, counts in evidence.data.items()
        if counts.get("contaminated", 0) > CONTAMINATED * max(1, counts.get("sequences", 0))
    ]
    return "; ".join(told[:3])


def _too_few_steps(evidence: Evidence) -> str:
    """Who writes max_steps wants as many; a step of PPO or GRPO holds many updates."""
    config, steps = evidence.config, evidence.max_steps
    meant = config.training.max_steps > 0 or STAGES[config.stage].rollouts
    return "" if meant or not 0 < steps < HANDFUL else f"{steps} step{'s' if steps > 1 else ''}"
