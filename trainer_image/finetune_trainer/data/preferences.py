"""Rows that compare answers: pairs, verdicts, ranked lists, trees. Called by ``formats.py``.

A comparison that decides nothing (equal answers, equal ranks, an older comment with more votes) is no mistake of the
row: it gives no record, and the reader counts it.
"""

from typing import Any

from finetune_trainer.data import transcripts
from finetune_trainer.data.conversations import holds_messages, learnable, message_list, tools_of, with_system
from finetune_trainer.data.fields import Row, answer, filled, items, kind, number, of_cell, shown, truth
from finetune_trainer.data.records import BadRowError, Judged, Message, Preference, Ranked, Record

_SYSTEM = ("system", "developer")


def preference(row: Row) -> list[Record]:
    """``prompt``, ``chosen``, ``rejected``: texts, or lists of messages; without prompt, what both begin with.

    Optional ``margin``, ``system`` and ``tools``. As TRL's preference data sets, explicit and implicit. Where both
    sides are whole conversations, ``prompt`` only repeats something of what they begin with.
    """
    chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
    alone = row.get("prompt") is not None and "assistant" in (chosen[0]["role"], rejected[0]["role"])
    asked = with_system([], row) if row.get("prompt") is None else prompt_of(row, "prompt")
    prompt, chosen, rejected = _parted(asked if alone else [], chosen, rejected)
    prompt = prompt if alone else _with_asked(asked, prompt)
    _ends_in_answer(chosen, "chosen")
    _ends_in_answer(rejected, "rejected")
    margin = None if row.get("margin") in (None, "") else number(row, "margin")
    return _compared(prompt, chosen, rejected, margin, tools_of(row))


def _with_asked(asked: list[Message], prompt: list[Message]) -> list[Message]:
    """The messages that whole conversations begin with, behind a system prompt that only ``asked`` has.

    BadRowError where ``asked`` says something else.
    """
    if asked and asked[0]["role"] in _SYSTEM and prompt[0]["role"] not in _SYSTEM:
        prompt = [asked[0], *prompt]
    there = [str(message["content"]).strip() for message in prompt]
    for message in asked:
        if str(message["content"]).strip() not in there:
            raise BadRowError(
                f"prompt says {shown(message['content'])}, which chosen and rejected do not begin with though they are "
                "whole conversations; accepted: the same prompt in all three, or answers alone in chosen and rejected"
            )
    return prompt


def hh_rlhf(row: Row) -> list[Record]:
    """``chosen``, ``rejected``: whole transcripts (Human:, Assistant:) that differ at the end."""
    sides = {}
    for field in ("chosen", "rejected"):
        sides[field] = transcripts.claude(filled(row, field))
        if not sides[field]:
            raise BadRowError(f"{field} is no transcript; accepted: a text of Human: … and Assistant: …")
    prompt, chosen, rejected = _parted([], sides["chosen"], sides["rejected"])
    _ends_in_answer(chosen, "chosen")
    _ends_in_answer(rejected, "rejected")
    return _compared(prompt, chosen, rejected)


def rm_static(row: Row) -> list[Record]:
    """``prompt`` (a transcript that ends with Assistant:), ``chosen``, ``rejected``; ``response`` is not needed."""
    asked = filled(row, "prompt")
    prompt = transcripts.claude(asked)
    while prompt and prompt[-1]["role"] == "assistant" and not prompt[-1]["content"]:
        prompt.pop()
    if not prompt:
        prompt = [{"role": "user", "content": asked.strip()}]
    if prompt[-1]["role"] != "user":
        raise BadRowError("prompt does not end with the user; accepted: a transcript that ends with Assistant:")
    chosen, rejected = ([_said(answer(row, field).strip())] for field in ("chosen", "rejected"))
    return _compared(prompt, chosen, rejected)


def shp(row: Row) -> list[Record]:
    """Stanford Human Preferences: a post (``history``) and two comments, ``human_ref_A`` and ``human_ref_B``.

    The later comment with the higher score wins, because it had less time to be voted for; the others decide nothing.
    """
    scores = [number(row, f"score_{side}") for side in "AB"]
    times = [number(row, f"created_at_utc_{side}") for side in "AB"]
    answers = [[_said(answer(row, f"human_ref_{side}"))] for side in "AB"]
    prompt: list[Message] = [{"role": "user", "content": filled(row, "history")}]
    later = 0 if times[0] > times[1] else 1
    if times[0] == times[1] or scores[later] <= scores[1 - later]:
        return []
    return _compared(prompt, answers[later], answers[1 - later])


def kto(row: Row) -> list[Record]:
    """``prompt``, ``completion`` (texts, or lists of messages) and ``label``: true where the answer is good."""
    completion = _turns(row, "completion")
    _ends_in_answer(completion, "completion")
    return [Judged(prompt_of(row, "prompt"), completion, truth(row, "label"), tools_of(row))]


def ranked(row: Row) -> list[Record]:
    """``prompt`` and ``answers``, the best first; or in any order with ``ranks`` (0 is the best) or ``scores``."""
    accepted = "a list of texts"
    given = items(row, "answers", accepted)
    for place, one in enumerate(given):
        if not isinstance(one, str) or not one.strip():
            raise BadRowError(f"answers[{place}] is {shown(one)}; accepted: a text")
    if len(given) < 2:
        raise BadRowError("answers holds one answer; accepted: at least two")
    ranks = list(map(float, range(len(given))))
    for field, sign in (("ranks", 1.0), ("scores", -1.0)):
        if row.get(field) is not None:
            found = items(row, field, "a list of numbers")
            if len(found) != len(given):
                raise BadRowError(f"{field} holds {len(found)} numbers; accepted: {len(given)}, one for each answer")
            ranks = [sign * number({field: one}, field) for one in found]
    return [_ranked(prompt_of(row, "prompt"), [[_said(one)] for one in given], ranks, tools_of(row))]


def oasst(row: Row) -> list[Record]:
    """OpenAssistant's trees: ``prompt`` is a message: ``text``, ``role`` (prompter, assistant), ``replies``, ``rank``.

    Every message of a prompter with answers gives one record, its answers ordered by ``rank``. Deleted messages and
    those below them are left out.
    """
    root = of_cell(row.get("prompt"))
    if not isinstance(root, dict):
        raise BadRowError(
            f"prompt is {kind(root)}; accepted: a message with text and replies (as the files of trees have it)"
        )
    records: list[Record] = []
    branches: list[tuple[Any, list[Message], str]] = [(root, [], "prompt")]
    while branches:
        node, before, where = branches.pop()
        if not isinstance(node, dict) or not isinstance(node.get("text"), str):
            raise BadRowError(f"{where} is {shown(node)}; accepted: a message with text, role and replies")
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise BadRowError(f"{where}.replies is {kind(replies)}; accepted: a list of messages")
        if node.get("deleted") is True or not node["text"].strip():
            continue
        expected = "assistant" if len(before) % 2 else "prompter"
        if node.get("role", expected) != expected:
            raise BadRowError(f"{where}.role is {shown(node['role'])}; accepted: {expected}, as the turns alternate")
        path = [*before, {"role": "user" if expected == "prompter" else "assistant", "content": node["text"]}]
        branches += [(reply, path, f"{where}.replies[{place}]") for place, reply in reversed(list(enumerate(replies)))]
        usable = [r for r in replies if isinstance(r, dict) and isinstance(r.get("text"), str) and r["text"].strip()]
        usable = [reply for reply in usable if reply.get("deleted") is not True]
        if expected == "prompter" and usable:
            ranks = [number(reply, "rank") if reply.get("rank") is not None else float("inf") for reply in usable]
            records.append(_ranked(path, [[_said(reply["text"])] for reply in usable], ranks))
    return records


def prompt_of(row: Row, field: str) -> list[Message]:
    """The prompt in a field, behind the row's ``system``: a text is one message of the user; a list of messages ends
    with the user or a tool."""
    if not holds_messages(row, field):
        return with_system([{"role": "user", "content": filled(row, field)}], row)
    found = message_list(row, field)
    if found[-1]["role"] not in ("user", "tool"):
        raise BadRowError(f"{field} ends with {found[-1]['role']}; accepted: messages that end with the user")
    return with_system(found, row)


def _turns(row: Row, field: str) -> list[Message]:
    """The answer in a field, a text or a list of messages."""
    return message_list(row, field) if holds_messages(row, field) else [_said(answer(row, field))]


def _said(words: str) -> Message:
    return {"role": "assistant", "content": words}


def _parted(
    asked: list[Message], left: list[Message], right: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """What is asked with the common beginning, up to a message of the user; and what follows it on both sides."""
    same = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    same = min(same, len(left) - 1, len(right) - 1)
    while same > 0 and left[same - 1]["role"] not in ("user", "tool"):
        same -= 1
    if same <= 0 and not asked:
        raise BadRowError("chosen and rejected do not begin alike; accepted: the same prompt in both")
    return [*asked, *left[:same]], left[same:], right[same:]


def _ends_in_answer(turns: list[Message], field: str) -> None:
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRowError(f"{field} does not end with an answer; accepted: a last turn of the assistant")
    if not learnable(turns[-1]):
        raise BadRowError(f"the last answer of {field} is empty; accepted: a text")


def _compared(
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    margin: float | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> list[Record]:
    return [] if chosen == rejected else [Preference(prompt, chosen, rejected, margin, tools or [])]


def _ranked(
    prompt: list[Message],
    answers: list[list[Message]],
    ranks: list[float],
    tools: list[dict[str, Any]] | None = None,
) -> Ranked:
    order = sorted(range(len(answers)), key=lambda place: ranks[place])
    return Ranked(prompt, [answers[place] for place in order], [ranks[place] for place in order], tools or [])
