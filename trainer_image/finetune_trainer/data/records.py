"""What a row says once its format is read: nine kinds of records, and which may stand for which.

A format (``formats.py``) makes records of one kind, a stage learns from one kind. Where a record of another kind says
what the stage needs, it is turned into it here: preference rows serve for SFT by their chosen answer, conversations
give PPO its prompts. Pure.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""``role`` (system, user, assistant, tool), ``content``, ``"train": False`` on an answer that is not learned, the first
of ``THOUGHTS``, and OpenAI's ``tool_calls``, ``tool_call_id`` and ``name`` where the row has them."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What data sets and chat templates call the thoughts before an answer. Records have the first name."""


class BadRowError(Exception):
    """A row that is not written as its format says. The text names the field and what is accepted."""


@dataclass(frozen=True)
class Text:
    """A document of running text."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages; the last one is an answer."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Functions that the model may call, as OpenAI describes them."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The whole row, for those who need more of it (reward functions, tasks)."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user: the model is to answer."""

    messages: list[Message]
    fields: dict[str, Any] = field(default_factory=dict)
    """The row's columns; ``answer`` is the known one, where there is one."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Functions that the model may call, as of a conversation."""


@dataclass(frozen=True)
class Preference:
    """Two answers to the same prompt, one of them better."""

    prompt: list[Message]
    chosen: list[Message]
    """What follows the prompt; the last one is an answer."""
    rejected: list[Message]
    margin: float | None = None
    """How much better, where the row says so."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Functions that the model may call, as of a conversation."""


@dataclass(frozen=True)
class Ranked:
    """Several answers to the same prompt, the best first; one alone where nobody wrote a second."""

    prompt: list[Message]
    answers: list[list[Message]]
    """Each is what follows the prompt."""
    ranks: list[float]
    """Of each answer, ascending; equal ones decide nothing."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Functions that the model may call, as of a conversation."""


@dataclass(frozen=True)
class Judged:
    """One answer with a verdict (KTO)."""

    prompt: list[Message]
    completion: list[Message]
    desirable: bool
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Functions that the model may call, as of a conversation."""


@dataclass(frozen=True)
class Labelled:
    """A text or a pair of texts with what is to be said of it."""

    text: str
    text_pair: str | None
    label: Any
    """A name or a number; a list of names where several may hold."""


@dataclass(frozen=True)
class Tagged:
    """Words, each with its tag."""

    tokens: list[str]
    tags: list[str]


@dataclass(frozen=True)
class SourceTarget:
    """A text and the text to make of it."""

    source: str
    target: str


Record = Text | Conversation | Prompt | Preference | Ranked | Judged | Labelled | Tagged | SourceTarget


KIND_NAMES: dict[type, str] = {
    Text: "texts",
    Conversation: "conversations",
    Prompt: "prompts",
    Preference: "compared answers",
    Ranked: "ranked answers",
    Judged: "answers with a verdict",
    Labelled: "texts with labels",
    Tagged: "words with tags",
    SourceTarget: "pairs of source and target",
}
"""In words, for messages."""


def _prompt_of(record: Conversation) -> Prompt:
    *before, answer = record.messages
    return Prompt(before, {"answer": answer["content"], **record.fields}, record.tools)


def _source_target_of(record: Conversation) -> SourceTarget:
    *before, answer = record.messages
    return SourceTarget("\n".join(message["content"] for message in before), answer["content"])


def _pairs_of(record: Ranked) -> list[Preference]:
    """Every better answer against every worse one (InstructGPT, arXiv:2203.02155, section 3.5)."""
    placed = list(zip(record.ranks, record.answers, strict=True))
    return [
        Preference(record.prompt, better, worse, tools=record.tools)
        for place, (rank, better) in enumerate(placed)
        for other, worse in placed[place + 1 :]
        if rank < other and better != worse
    ]


_TURNED: dict[tuple[type, type], Callable[[Any], list[Any]]] = {
    (Conversation, Prompt): lambda record: [_prompt_of(record)],
    (Conversation, SourceTarget): lambda record: [_source_target_of(record)],
    (Preference, Conversation): lambda record: [Conversation([*record.prompt, *record.chosen], record.tools)],
    (Preference, Prompt): lambda record: [Prompt(record.prompt, tools=record.tools)],
    (Preference, Judged): lambda record: [
        Judged(record.prompt, record.chosen, True, record.tools),
        Judged(record.prompt, record.rejected, False, record.tools),
    ],
    (Ranked, Preference): _pairs_of,
    (Ranked, Conversation): lambda record: [Conversation([*record.prompt, *record.answers[0]], record.tools)],
    (Ranked, Prompt): lambda record: [Prompt(record.prompt, tools=record.tools)],
    (Judged, Conversation): lambda record: (
        [Conversation([*record.prompt, *record.completion], record.tools)] if record.desirable else []
    ),
    (Judged, Prompt): lambda record: [Prompt(record.prompt, tools=record.tools)],
}


def accepts(given: type, wanted: type) -> bool:
    """A stage that learns from ``wanted`` takes records of the kind ``given``."""
    return given is wanted or (given, wanted) in _TURNED


def as_kind(record: Any, wanted: type) -> list[Any]:
    """The record as records of the kind ``wanted``: one, two (a preference as two verdicts), or none (an answer
    judged bad teaches SFT nothing). KeyError unless :func:`accepts`."""
    return [record] if type(record) is wanted else _TURNED[type(record), wanted](record)
