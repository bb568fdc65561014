"""Rows that hold a list of turns: OpenAI's messages, ShareGPT. Called by ``formats.py``."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from finetune_trainer.data.fields import Row, decoded, items, kind, of_cell, shown, text
from finetune_trainer.data.records import THOUGHTS, BadRowError, Conversation, Message, Record

ROLES = ("system", "developer", "user", "assistant", "tool")
TOOLS = ("tools", "functions")
"""Columns of the functions that a model may call."""

_OTHER_ROLES = {
    **dict.fromkeys(("prompter", "customer", "question", "instruction", "input"), "user"),
    **dict.fromkeys(("bot", "ai", "llm", "answer", "response", "output", "agent"), "assistant"),
    **dict.fromkeys(("function", "tool_result", "ipython"), "tool"),
}
"""What else conversations call the speakers: not taken, but guessed."""
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


def messages(row: Row) -> list[Record]:
    """``messages``: a list of ``role`` and ``content``, as OpenAI's, with ``tool_calls`` and thoughts
    (``reasoning_content``, ``reasoning`` or ``thinking``); optional ``tools`` (or OpenAI's older ``functions``) and
    ``system``.

    ``weight: 0`` on an assistant's message keeps it out of the loss. Messages after the last answer are dropped.
    """
    return [conversation(with_system(message_list(row, "messages"), row), row, tools_of(row))]


def _guess(given: Any, names: Iterable[str]) -> str:
    """Which role was probably meant: another tool's name for it, or one spelt like it."""
    name = str(given).strip().lower()
    names = list(names)
    meant = name if name in names else _SHAREGPT_ROLES.get(name) or _OTHER_ROLES.get(name)
    meant = meant or next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.7)), None)
    return f"; did you mean {meant}?" if meant else ""


def sharegpt(row: Row) -> list[Record]:
    """``conversations``: a list of ``from`` (human, gpt, system, function_call, observation …) and ``value``.

    Optional ``system`` and ``tools``. A function_call's value is JSON, ``{"name": …, "arguments": {…}}`` or a list of
    such, as LLaMA-Factory writes it. ``weight: 0`` on a turn keeps it out of the loss.
    """
    turns: list[Message] = []
    for number, turn in enumerate(items(row, "conversations", "a list of {from, value}")):
        where = f"conversations[{number}]"
        if not isinstance(turn, dict):
            raise BadRowError(f"{where} is {kind(turn)}; accepted: an object with from and value")
        said_by = _first(turn, "from", "role")
        role = _SHAREGPT_ROLES.get(said_by) if isinstance(said_by, str) else None
        if role is None:
            listed = ", ".join(_SHAREGPT_ROLES)
            raise BadRowError(f"{where}.from is {shown(said_by)}; accepted: {listed}{_guess(said_by, _SHAREGPT_ROLES)}")
        value = _first(turn, "value", "content")
        if said_by == "function_call":
            message: Message = {"role": role, "content": "", "tool_calls": _calls_of_text(value, f"{where}.value")}
        else:
            if not isinstance(value, str):
                raise BadRowError(f"{where}.value is {shown(value)}; accepted: a text")
            message = {"role": role, "content": value}
        turns.append(message | _of_answer(turn, where) if role == "assistant" else message)
    return [conversation(with_system(turns, row), row, tools_of(row))]


def conversation(turns: list[Message], row: Row, tools: list[dict[str, Any]] | None = None) -> Conversation:
    """The record, without what follows the last answer. BadRowError where no answer is to be learned."""
    last = max((n for n, message in enumerate(turns) if message["role"] == "assistant"), default=-1)
    kept = turns[: last + 1]
    if not any(learnable(message) for message in kept):
        raise BadRowError("the conversation holds no answer to learn; accepted: at least one turn of the assistant")
    return Conversation(kept, tools or [], row)


def learnable(message: Message) -> bool:
    """An answer that says something and may be learned."""
    says = any((str(message["content"]).strip(), message.get("tool_calls"), message.get(THOUGHTS[0])))
    return message["role"] == "assistant" and bool(message.get("train", True)) and says


def with_system(turns: list[Message], row: Row) -> list[Message]:
    """The turns, behind the system prompt of the column ``system`` where the row has one."""
    system = text(row, "system", optional=True)
    if not system:
        return turns
    if turns and turns[0]["role"] in ("system", "developer"):
        if turns[0]["content"] == system:
            return turns
        raise BadRowError("the row has a system prompt in the column system and another one among its messages")
    return [{"role": "system", "content": system}, *turns]


def holds_messages(row: Row, field: str) -> bool:
    """The field holds a list of messages and no text. The cell of a table may be an answer that is a list of something
    else."""
    if not isinstance(found := of_cell(row.get(field)), list):
        return False
    return found is row[field] or (found != [] and all(isinstance(one, dict) and "role" in one for one in found))


def message_list(row: Row, field: str) -> list[Message]:
    """OpenAI's messages in a field, in the form that chat templates take."""
    return [
        _message(message, f"{field}[{number}]")
        for number, message in enumerate(items(row, field, "a list of {role, content}"))
    ]


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise BadRowError(f"{where} is {kind(given)}; accepted: an object with role and content")
    role = given.get("role")
    if role == "function":  # OpenAI's older name
        role = "tool"
    if not isinstance(role, str) or role not in ROLES:
        raise BadRowError(f"{where}.role is {shown(role)}; accepted: {', '.join(ROLES)}{_guess(role, ROLES)}")
    calls = _calls(given, where) if role == "assistant" else []
    message: Message = {"role": role, "content": _content(given.get("content"), role, bool(calls), where)}
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if isinstance(given.get(key), str):
            message[key] = given[key]
    return message | _of_answer(given, where) if role == "assistant" else message


def _of_answer(given: dict[str, Any], where: str) -> Message:
    """What an answer may have beside its content: thoughts, and that it is not to be learned."""
    more: Message = {}
    thoughts = {name: given[name] for name in THOUGHTS if given.get(name)}
    for name, value in thoughts.items():
        if not isinstance(value, str):
            raise BadRowError(f"{where}.{name} is {shown(value)}; accepted: a text, the thoughts before the answer")
    if len(set(thoughts.values())) > 1:
        raise BadRowError(f"{where} has different thoughts in {' and '.join(thoughts)}; accepted: one of them")
    if thoughts:
        more[THOUGHTS[0]] = next(iter(thoughts.values()))
    if not all(_counts(given[key], f"{where}.{key}") for key in _LEARNED if given.get(key) is not None):
        more["train"] = False
    return more


_LEARNED = ("weight", "train", "trainable", "loss")
"""Where a message says whether it is learned: OpenAI's name, and those of other trainers."""


def _counts(value: Any, where: str) -> bool:
    said = str(value).strip().lower() if isinstance(value, bool | int | float | str) else ""
    if said in ("0", "0.0", "false"):
        return False
    if said in ("1", "1.0", "true"):
        return True
    raise BadRowError(f"{where} is {shown(value)}; accepted: 1 or true where the answer is learned, 0 or false")


def _content(given: Any, role: str, calls: bool, where: str) -> str:
    if isinstance(given, str):
        return given
    if given is None and calls:
        return ""
    if (
        isinstance(given, list)
        and given
        and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in given
        )
    ):
        return "".join(part["text"] for part in given)
    if role == "tool" and isinstance(given, dict | list):
        return _json(given)
    raise BadRowError(
        f'{where}.content is {shown(given)}; accepted: a text, or a list of {{"type": "text", "text": …}}'
    )


def _calls(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    given = decoded(message.get("tool_calls"))
    if given is None and message.get("function_call") is not None:
        given = [{"function": decoded(message["function_call"])}]
    if given is None:
        return []
    if not isinstance(given, list):
        raise BadRowError(f"{where}.tool_calls is {kind(given)}; accepted: a list of calls")
    return [_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(given)]


def _calls_of_text(value: Any, where: str) -> list[dict[str, Any]]:
    given = decoded(value)
    given = given if isinstance(given, list) else [given]
    if not given:
        raise BadRowError(f'{where} holds no call; accepted: {{"name": …, "arguments": {{…}}}}')
    return [_call(call, where) for call in given]


def _call(given: Any, where: str) -> dict[str, Any]:
    """One call, its arguments as an object: what chat templates expect."""
    function = decoded(given.get("function", given)) if isinstance(given, dict) else None
    accepted = 'accepted: {"type": "function", "function": {"name": …, "arguments": {…}}}'
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError(f"{where} is {shown(given)}; {accepted}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = decoded(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise BadRowError(f"{where}: its arguments are {kind(arguments)} and no JSON object; {accepted}")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": given["id"], **call} if isinstance(given.get("id"), str) else call


def tools_of(row: Row) -> list[dict[str, Any]]:
    """``tools``, or OpenAI's older ``functions``: a list of functions, or its JSON; a bare function is wrapped."""
    field = next((name for name in TOOLS if row.get(name)), "")
    given = decoded(row[field]) if field else []
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise BadRowError(
            f"{field} is {shown(given)}; accepted: a list of functions, as OpenAI describes them, or JSON"
        )
    return [
        tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool} for tool in given
    ]


def _first(given: dict[str, Any], *names: str) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)
