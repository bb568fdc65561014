"""Rows that hold a list of turns: OpenAI's messages, ShareGPT. Called by ``formats.py``."""

import json
from typing import Any

from finetune_trainer.data.fields import Row, decoded, items, kind, shown, text
from finetune_trainer.data.records import BadRowError, Conversation, Message, Record

ROLES = ("system", "developer", "user", "assistant", "tool")

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
    """``messages``: a list of ``role`` and ``content``, as OpenAI's, with ``tool_calls``; optional ``tools``.

    ``weight: 0`` on an assistant's message keeps it out of the loss. Messages after the last answer are dropped.
    """
    return [conversation(message_list(row, "messages"), row, tools_of(row))]


def sharegpt(row: Row) -> list[Record]:
    """``conversations``: a list of ``from`` (human, gpt, system, function_call, observation …) and ``value``.

    Optional ``system`` and ``tools``. A function_call's value is JSON, ``{"name": …, "arguments": {…}}`` or a list of
    such, as LLaMA-Factory writes it. ``weight: 0`` on a turn keeps it out of the loss.
    """
    turns: list[Message] = []
    system = text(row, "system", optional=True)
    if system:
        turns.append({"role": "system", "content": system})
    for number, turn in enumerate(items(row, "conversations", "a list of {from, value}")):
        where = f"conversations[{number}]"
        if not isinstance(turn, dict):
            raise BadRowError(f"{where} is {kind(turn)}; accepted: an object with from and value")
        said_by = _first(turn, "from", "role")
        role = _SHAREGPT_ROLES.get(said_by) if isinstance(said_by, str) else None
        if role is None:
            raise BadRowError(f"{where}.from is {shown(said_by)}; accepted: {', '.join(_SHAREGPT_ROLES)}")
        value = _first(turn, "value", "content")
        if said_by == "function_call":
            message: Message = {"role": role, "content": "", "tool_calls": _calls_of_text(value, f"{where}.value")}
        else:
            if not isinstance(value, str):
                raise BadRowError(f"{where}.value is {shown(value)}; accepted: a text")
            message = {"role": role, "content": value}
        if role == "assistant" and turn.get("weight") == 0:
            message["train"] = False
        turns.append(message)
    return [conversation(turns, row, tools_of(row))]


def conversation(turns: list[Message], row: Row, tools: list[dict[str, Any]] | None = None) -> Conversation:
    """The record, without what follows the last answer. BadRowError where no answer is to be learned."""
    last = max((n for n, message in enumerate(turns) if message["role"] == "assistant"), default=-1)
    kept = turns[: last + 1]
    if not any(learnable(message) for message in kept):
        raise BadRowError("the conversation holds no answer to learn; accepted: at least one turn of the assistant")
    return Conversation(kept, tools or [], row)


def learnable(message: Message) -> bool:
    """An answer that says something and may be learned."""
    says = bool(str(message["content"]).strip()) or bool(message.get("tool_calls"))
    return message["role"] == "assistant" and bool(message.get("train", True)) and says


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
        raise BadRowError(f"{where}.role is {shown(role)}; accepted: {', '.join(ROLES)}")
    calls = _calls(given, where) if role == "assistant" else []
    message: Message = {"role": role, "content": _content(given.get("content"), role, bool(calls), where)}
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id", "reasoning_content"):
        if isinstance(given.get(key), str):
            message[key] = given[key]
    if role == "assistant" and given.get("weight") == 0:
        message["train"] = False
    return message


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
    call = {"type": "function", "function": {"name": function["name"], "arguments": _known(arguments)}}
    return {"id": given["id"], **call} if isinstance(given.get("id"), str) else call


def _known(arguments: dict[str, Any]) -> dict[str, Any]:
    """A column of parquet gives every call the arguments of all: those without a value are not this one's."""
    return {str(key): value for key, value in arguments.items() if value is not None}


def tools_of(row: Row) -> list[dict[str, Any]]:
    """``tools``: OpenAI's list of functions, or its JSON; a bare function is wrapped."""
    given = decoded(row.get("tools"))
    if given is None or given == "":
        return []
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise BadRowError(f"tools is {shown(given)}; accepted: a list of functions, as OpenAI describes them, or JSON")
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
