"""The parts of an answer in OpenAI's words: deltas of a stream, and the message they add up to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tandem.text.formats.parts import CallArguments, CallStart, Part, Reasoning, Text

Json = dict[str, Any]


def delta(part: Part) -> Json:
    """A call's first delta names it, the later ones only add to its arguments."""
    match part:
        case Text(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def message(parts: Iterable[Part]) -> Json:
    """The whole message. Content is null when there are only calls."""
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[Json] = []
    for part in parts:
        match part:
            case Text():
                text.append(part.text)
            case Reasoning():
                reasoning.append(part.text)
            case CallStart(_, call_id, name):
                calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}})
            case CallArguments(index, more):
                calls[index]["function"]["arguments"] += more
    content = "".join(text) if text or not calls else None
    made: Json = {"role": "assistant", "content": content, "refusal": None}
    if reasoning:
        made["reasoning_content"] = "".join(reasoning)
    if calls:
        made["tool_calls"] = calls
    return made
