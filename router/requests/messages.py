"""A conversation as clients send it, turned into what a chat template takes; tool calls and their results too."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from router.requests.openai import Message, plain_text
from tandem.errors import BadRequest
from tandem.text.abilities import CallStyle, TemplateAbilities
from tandem.text.formats.calls import NAME

MAX_CALLS = 128
"""Tool calls of one assistant message."""
MAX_ID_CHARS = 256
MAX_PARTS = 4096
"""Parts of one message's content."""
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")

Turn = dict[str, Any]


def chat_turns(messages: list[Message], can: TemplateAbilities) -> list[Turn]:
    """The messages as a chat template takes them; one without a `developer` role gets those turns as `system`.

    Raises BadRequest for what is malformed, and for what the template would leave out without a word.
    """
    turns: list[Turn] = []
    called: dict[str, str] = {}
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        if message.role not in KNOWN_ROLES:
            hint = "; results of tools have the role tool" if message.role == "function" else ""
            known = ", ".join(KNOWN_ROLES[:-1]) + f" or {KNOWN_ROLES[-1]}"
            raise BadRequest(f"{where}.role is {message.role[:40]!r}; it must be {known}{hint}", "messages")
        if message.function_call is not None:
            raise BadRequest(f"{where}.function_call is deprecated and not supported; use tool_calls", "messages")
        if message.tool_calls and message.role == "assistant":
            turn = _with_calls(message, where, can.calls)
            called |= {call["id"]: call["function"]["name"] for call in turn["tool_calls"]}
        elif message.role == "tool":
            turn = _result(message, where, can, called)
        else:
            developer = message.role == "developer" and not can.developer
            turn = {"role": "system" if developer else message.role, "content": message_text(message, where)}
        if message.role == "assistant" and message.reasoning_content:
            turn["reasoning_content"] = plain_text(message.reasoning_content, f"{where}.reasoning_content")
        turns.append(turn)
    return turns


def message_text(message: Message, where: str) -> str:
    """A message's text; several text parts are joined by newlines. Raises BadRequest for any other part."""
    where = f"{where}.content"
    content = message.content
    if content is None:
        if message.role == "assistant":
            return ""
        raise BadRequest(f"{where} is required", "messages")
    if isinstance(content, list):
        if len(content) > MAX_PARTS:
            raise BadRequest(f"{where} has {len(content)} parts; at most {MAX_PARTS} are allowed", "messages")
        content = "\n".join(_part_text(part, f"{where}.{rank}") for rank, part in enumerate(content))
    if not isinstance(content, str):
        raise BadRequest(f"{where} must be a string or a list of text parts", "messages")
    return plain_text(content, where)


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind is None or kind == "text":
        raise BadRequest(f"{where} must be an object with type 'text' and a string 'text'", "messages")
    raise BadRequest(f"{where}: parts of type {str(kind)[:40]!r} are not supported yet; only text is", "messages")


def _with_calls(message: Message, where: str, style: CallStyle | None) -> Turn:
    if style is None:
        raise BadRequest(f"{where}.tool_calls: this model's chat template takes no tool calls", "messages")
    calls = message.tool_calls
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise BadRequest(f"{where}.tool_calls must be a list of at most {MAX_CALLS} calls", "messages")
    text = message_text(message, where)
    return {
        "role": "assistant",
        "content": text or (None if style.no_content else ""),
        "tool_calls": [_call(call, f"{where}.tool_calls.{rank}", style) for rank, call in enumerate(calls)],
    }


def _call(call: Any, where: str, style: CallStyle) -> Turn:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise BadRequest(f"{where} must be an object with type 'function' and an object 'function'", "messages")
    name, arguments = function.get("name"), function.get("arguments", "")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadRequest(f"{where}.function.name must be 1 to 64 letters, digits, _ or -", "messages")
    if not isinstance(arguments, str):
        raise BadRequest(f"{where}.function.arguments must be a string of JSON", "messages")
    plain_text(arguments, f"{where}.function.arguments")
    call_id = _id(call.get("id"), f"{where}.id")
    given = _object(arguments) if style.objects else arguments
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}


def _object(arguments: str) -> Any:
    """Arguments for a template that writes them as JSON itself. What is no object stays text, as the model wrote it."""
    try:
        parsed = from_json(arguments or "{}", allow_inf_nan=False)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _result(message: Message, where: str, can: TemplateAbilities, called: dict[str, str]) -> Turn:
    if not can.results:
        raise BadRequest(f"{where}.role: this model's chat template takes no turns of the role 'tool'", "messages")
    call_id = _id(message.tool_call_id, f"{where}.tool_call_id")
    turn: Turn = {"role": "tool", "tool_call_id": call_id, "content": message_text(message, where)}
    # Some templates write the function's name, which clients need not send.
    name = message.name or called.get(call_id)
    return turn if name is None else {**turn, "name": plain_text(name, f"{where}.name")}


def _id(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_ID_CHARS:
        raise BadRequest(f"{where} must be a string of 1 to {MAX_ID_CHARS} characters", "messages")
    return plain_text(value, where)
