"""Conversations written as one running text, with marks between the turns. Called by ``formats.py``.

Each function takes a text and gives its messages; [] where it is no such text.
"""

import re

from finetune_trainer.data.records import Message

_CHATML = re.compile(r"<\|im_start\|>[ \t]*(\w+)[ \t]*\n(.*?)(?:<\|im_end\|>|(?=<\|im_start\|>)|\Z)", re.DOTALL)
_CHATML_ROLES = ("system", "user", "assistant", "tool")
_ROUND = re.compile(r"\[Round \d+\]\s*")
_CHATGLM = re.compile(r"\s*问[：:](.*?)\n+\s*答[：:](.*)\Z", re.DOTALL)
_CLAUDE = re.compile(r"(?:\A\s*|\n[ \t]*\n\s*)(Human|Assistant):")
_INSTRUCTION = re.compile(r"###[ \t]*(Instruction|Input|Response|Human|Assistant|User|System):")
_ROLES = {"human": "user", "response": "assistant", "instruction": "user"}


def chatml(text: str) -> list[Message]:
    """``<|im_start|>ROLE`` newline, words, ``<|im_end|>``."""
    turns = [(role.lower(), words) for role, words in _CHATML.findall(text)]
    if _CHATML.sub("", text).strip() or any(role not in _CHATML_ROLES for role, _ in turns):
        return []
    return _said(turns, strip=False)


def chatglm(text: str) -> list[Message]:
    """``[Round 0]`` newline ``问：…`` newline ``答：…``, as ChatGLM-6B; blank lines between as ChatGLM2."""
    before, *rounds = _ROUND.split(text)
    turns = [("system", before)] if before.strip() else []
    for number, part in enumerate(rounds):
        found = _CHATGLM.match(part)
        if found is None:
            # The last round may end with the question.
            asked = re.match(r"\s*问[：:](.*)\Z", part, re.DOTALL)
            if asked is None or number + 1 < len(rounds):
                return []
            turns.append(("user", asked[1]))
            continue
        turns += [("user", found[1]), ("assistant", found[2])]
    return _said(turns) if rounds else []


def claude(text: str) -> list[Message]:
    """``Human:`` and ``Assistant:``, each after a blank line; what stands before the first is the system prompt."""
    return _between(_CLAUDE, text)


def guanaco(text: str) -> list[Message]:
    """``### Instruction:``, ``### Input:``, ``### Response:``, or ``### Human:`` and ``### Assistant:``."""
    return _between(_INSTRUCTION, text)


def _between(mark: re.Pattern[str], text: str) -> list[Message]:
    before, *parts = mark.split(text)
    turns = [("system", before)] if before.strip() else []
    for name, words in zip(parts[::2], parts[1::2], strict=True):
        role = name.lower()
        if role == "input":  # belongs to the instruction before it
            if not turns or turns[-1][0] != "user":
                return []
            if words.strip():
                turns[-1] = ("user", turns[-1][1].strip() + "\n" + words.strip())
            continue
        turns.append((_ROLES.get(role, role), words))
    return _said(turns) if parts else []


def _said(turns: list[tuple[str, str]], strip: bool = True) -> list[Message]:
    """Messages of the turns; white space around the words belongs to the marks."""
    return [{"role": role, "content": words.strip() if strip else words} for role, words in turns]
