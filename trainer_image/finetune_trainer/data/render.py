"""From conversations to tokens, with a mask that says which tokens are learned: the assistant's, and only those.

Works with any chat template, marked with ``{% generation %}`` or not. The template is rendered up to before and
up to after each answer; where both are beginnings of the whole text, the answer is what lies between. The text is
then tokenised once, and a token is learned where it lies inside an answer. Called by ``data/__init__.py``.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from finetune_api.causes import Cause
from finetune_trainer.data.fields import shown
from finetune_trainer.data.records import THOUGHTS, BadRowError, Conversation, Message
from finetune_trainer.outcome import RunError


@dataclass(frozen=True)
class Rendered:
    """A text and what of it is learned."""

    text: str
    spans: list[tuple[int, int]]
    """[start, end) in characters of ``text``, in order, not overlapping."""


@dataclass(frozen=True)
class Tokens:
    """A tokenised text of T tokens."""

    ids: np.ndarray
    """int32 (T,)"""
    learned: np.ndarray
    """bool (T,): the token is learned (of a conversation: it is part of an answer)."""
    labels: np.ndarray | None = None
    """int32 (T,): what is learned at each token, where that is not the token itself."""


class _Write(Protocol):
    """Messages as text; ``asking``: up to where the model begins to answer."""

    def __call__(self, messages: list[Message], asking: bool = False) -> str: ...


class Renderer:
    """Conversations to tokens, for one tokenizer. Give it a chat template first (``templates.py``).

    ``lossless``: an answer of which the template leaves out a part is refused. Judges take it as it is written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, lossless: bool = True) -> None:
        self.tokenizer = tokenizer
        self._lossless = lossless
        # Also tokens that are not special are added, such as the marks around a call; none of them ends a turn.
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._ends = tuple({*tokenizer.all_special_tokens, *added})
        templates = tokenizer.chat_template
        self._templates: dict[str, str] = templates if isinstance(templates, dict) else {"": str(templates)}
        self._written = "\n".join(self._templates.values())
        named = [name for name in THOUGHTS if re.search(rf"""[.'"]{name}\b""", self._written)]
        self._thoughts = named or THOUGHTS[:1]
        """What the template calls an answer's thoughts."""

    def render(self, conversation: Conversation) -> list[Rendered]:
        """The conversation as text, one element in general.

        Templates that write earlier turns differently once later ones follow (dropping their thoughts, moving the
        system prompt) give one element per answer, each up to and including it: exactly what the model will see when
        it has to give that answer. BadRowError where the template refuses the conversation, or does not write all of
        what is to be learned.
        """
        messages, tools = conversation.messages, conversation.tools
        self._check_tools(messages, tools)
        write = self._writer(messages, tools)
        if not any(_only_calls(message) for message in messages):
            return self._render(messages, write)
        try:
            return self._render(messages, write)
        except BadRowError:
            # Some templates write the calls only of an answer that has no content at all.
            return self._render([m | {"content": None} if _only_calls(m) else m for m in messages], write)

    def _render(self, messages: list[Message], write: _Write) -> list[Rendered]:
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        whole = write(messages[: answers[-1] + 1])
        spans = []
        for number in answers:
            after = whole if number == answers[-1] else write(messages[: number + 1])
            span = self._span(messages[: number + 1], write, after) if whole.startswith(after.rstrip()) else None
            if span is None:
                return [self._last_answer(messages[: n + 1], write) for n in answers if _learned(messages[n])]
            if _learned(messages[number]):
                self._check_written(messages[number], whole[slice(*span)])
                spans.append(span)
        return [self._closed(Rendered(whole, spans))]

    def asking(self, messages: list[Message], tools: list[Any]) -> Rendered:
        """A conversation that ends with the user, up to where the model begins to answer; nothing of it is learned."""
        self._check_tools(messages, tools)
        return Rendered(self._writer(messages, tools)(messages, asking=True), [])

    def _check_tools(self, messages: list[Message], tools: list[Any]) -> None:
        """BadRowError where the template would leave out functions or calls without a word."""
        called = any(message.get("tool_calls") for message in messages)
        for used, field in ((bool(tools), "tools"), (called, "tool_calls")):
            if used and field not in self._written:
                raise BadRowError(
                    f"the row has {field}, which the chat template does not write; give another data.chat_template "
                    "(qwen writes them)"
                )

    def _last_answer(self, messages: list[Message], write: _Write) -> Rendered:
        whole = write(messages)
        span = self._span(messages, write, whole)
        if span is None:
            raise BadRowError(
                "the chat template does not write the answer after what it writes before it, so it cannot be told what "
                "to learn; give another data.chat_template"
            )
        self._check_written(messages[-1], whole[slice(*span)])
        return self._closed(Rendered(whole, [span]))

    def _span(self, messages: list[Message], write: _Write, after: str) -> tuple[int, int] | None:
        """Where the last message, an answer, lies in ``after``, the messages as text; None where it is unclear.

        White space behind an answer's end token belongs to the template, not to the answer.
        """
        first = len(messages) == 1
        before = after[: _header(messages[0], write, after)] if first else write(messages[:-1], asking=True)
        start, end = len(before), len(after.rstrip())
        if not after.startswith(before):
            # Some prompts end in an opening that is put into the model's mouth (<think>) and not written otherwise.
            start = _common(before, after)
            if start < len(write(messages[:-1]).rstrip()):
                return None
        return (start, end) if end > start else None

    def _check_written(self, answer: Message, written: str) -> None:
        lost = _lost(answer, written) if self._lossless else ""
        if lost:
            instead = ", or put them into content as <think>…</think>" if lost == THOUGHTS[0] else ""
            raise BadRowError(
                f"the chat template does not write all of the answer's {lost} ({shown(answer[lost])}), which would not "
                f"be learned; give a data.chat_template that does{instead}"
            )

    def _closed(self, rendered: Rendered) -> Rendered:
        """With an end token after the last answer, without which the model would never learn to stop."""
        if not rendered.spans:
            return rendered
        start, end = rendered.spans[-1]
        eos = self.tokenizer.eos_token
        if not eos or rendered.text[end:].strip() or rendered.text[:end].endswith(self._ends):
            return rendered
        text = rendered.text[:end] + str(eos)
        return Rendered(text, [*rendered.spans[:-1], (start, len(text))])

    def _writer(self, messages: list[Message], tools: list[Any]) -> _Write:
        """What writes these messages as text. BadRowError where the template refuses them."""
        template = self.tokenizer.get_chat_template(None, tools or None)
        if any(message.get("tool_calls") for message in messages):
            # Of several templates transformers takes the one for tools only where functions are listed.
            template = self._templates.get("tool_use", template)
        special: dict[str, Any] = dict(self.tokenizer.special_tokens_map)

        def write(messages: list[Message], asking: bool = False) -> str:
            try:
                # apply_chat_template() would drop a content of None, which some templates ask for.
                rendered: Any = render_jinja_template(
                    [[self._plain(message) for message in messages]],
                    tools=tools or None,
                    chat_template=template,
                    add_generation_prompt=asking,
                    **special,
                )
            except Exception as error:  # jinja's own, and whatever a template raises by raise_exception
                raise BadRowError(
                    f"the chat template refuses the conversation ({', '.join(m['role'] for m in messages)}): "
                    f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
                ) from error
            return str(rendered[0][0])

        return write

    def _plain(self, message: Message) -> Message:
        """The message as chat templates take it."""
        plain = {key: value for key, value in message.items() if key not in ("train", *THOUGHTS)}
        if thoughts := message.get(THOUGHTS[0]):
            plain |= dict.fromkeys(self._thoughts, thoughts)
        return plain

    def document(self, text: str) -> Rendered:
        """Running text, all of it learned, with the tokenizer's token of beginning (where it writes one) and of end."""
        begin = str(self.tokenizer.bos_token) if self._begins else ""
        whole = f"{begin}{text}{self.tokenizer.eos_token or ''}"
        return Rendered(whole, [(0, len(whole))])

    @cached_property
    def _begins(self) -> bool:
        """The tokenizer puts its token of beginning before every text."""
        first = self.tokenizer("a").input_ids[:1]
        return self.tokenizer.bos_token_id is not None and first == [self.tokenizer.bos_token_id]

    def encode(self, texts: Sequence[Rendered]) -> Iterator[Tokens]:
        """Tokenise texts, many at once. Templates write special tokens themselves, so none are added."""
        if not texts:
            return
        if not self.tokenizer.is_fast:
            for rendered in texts:
                yield self._encode_slow(rendered)
            return
        encoded = self.tokenizer(
            [rendered.text for rendered in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            verbose=False,
        )
        for rendered, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield Tokens(np.asarray(ids, dtype=np.int32), _mask(offsets, rendered.spans))

    def _encode_slow(self, rendered: Rendered) -> Tokens:
        """Without offsets: an answer's tokens are those by which the text to its end is longer than to its start."""
        ids = self._ids(rendered.text)
        learned = np.zeros(len(ids), dtype=bool)
        for start, end in rendered.spans:
            first, last = (_common(self._ids(rendered.text[:cut]), ids) for cut in (start, end))
            learned[first:last] = True
        return Tokens(np.asarray(ids, dtype=np.int32), learned)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _header(answer: Message, write: _Write, after: str) -> int:
    """Where a first answer begins in ``after``: behind what the template writes before any other answer, too."""
    other = "a" if not str(answer["content"] or "").lstrip().startswith("a") else "b"
    return _common(write([{"role": answer["role"], "content": other}]), after)


def _learned(message: Message) -> bool:
    return bool(message.get("train", True))


def _only_calls(message: Message) -> bool:
    return bool(message.get("tool_calls")) and not message["content"]


def _lost(answer: Message, written: str) -> str:
    """The first part of an answer that does not stand in what the template wrote of it, white space apart; "": none."""
    dense = _dense(written)
    for text in re.split(r"</?think(?:ing)?>", str(answer["content"] or "")):
        if _dense(text) not in dense:
            return "content"
    if _dense(answer.get(THOUGHTS[0], "")) not in dense:
        return THOUGHTS[0]
    for call in answer.get("tool_calls") or []:
        said = [call["function"]["name"], *_leaves(call["function"]["arguments"])]
        if not all(_stands(one, written) for one in said):
            return "tool_calls"
    return ""


def _dense(text: str) -> str:
    return "".join(text.split())


def _leaves(value: Any) -> Iterator[Any]:
    """The names and the values in the arguments of a call."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield str(key)
            yield from _leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _stands(value: Any, written: str) -> bool:
    """A value stands in the text, as itself, as JSON or as Python writes it."""
    ways = {str(value), json.dumps(value), json.dumps(value, ensure_ascii=False)}
    return any(way.strip('"') in written for way in ways)


def _mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """bool (T,): the token begins inside a span. ``offsets``: [start, end) in characters, one pair per token.

    A token that begins before an answer and reaches into it is not learned: when the model answers, the prompt's
    tokens are there already, and it can never choose that one.
    """
    learned = np.zeros(len(offsets), dtype=bool)
    starts = [offset[0] for offset in offsets]  # ascending; the bytes of one character share theirs
    for start, end in spans:
        learned[bisect_left(starts, start) : bisect_left(starts, end)] = True
    return learned


def _common(left: Sequence[object], right: Sequence[object]) -> int:
    """Length of the common beginning."""
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def check_vocabulary(highest: int, rows: int | None, uri: str) -> None:
    """RunError(INVALID_CONFIGURATION) where the tokenizer makes tokens the model has no embedding for."""
    if rows is not None and highest >= rows:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"the tokenizer of {uri} gives token {highest}, but the model has embeddings for 0 to {rows - 1} only: "
            "they do not belong together, or data.chat_template uses special tokens the model does not have",
        )
