"""What a chat template can do with tools, found out by rendering: templates are programs and declare nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem.errors import BadRequest
from tandem.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_NAME, _KEY, _VALUE, _RESULT = "tandem_probe", "tandemkey", "tandemvalue", "tandemresult"
_ARGUMENTS = {_KEY: _VALUE}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"tandemparameter": {"type": "string", "description": "A probe."}},
        },
    },
}
_CALL_ID = "probe1234"
"""Some templates refuse ids that are not nine letters and digits."""


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a template wants an assistant's turn with tool calls."""

    objects: bool
    """Arguments as objects; else as the JSON text."""
    no_content: bool
    """A turn without text has no content; else an empty one."""


@dataclass(frozen=True, slots=True)
class TemplateAbilities:
    """What a chat template takes. Everything is False for a checkpoint without one."""

    developer: bool = False
    """The `developer` role, told from `system`."""
    tools: bool = False
    """Declarations of functions reach the prompt."""
    calls: CallStyle | None = None
    """Tool calls of earlier turns do; None if not."""
    results: bool = False
    """So do their results, as turns of the role `tool`."""


def find_abilities(tokenizer: Tokenizer) -> TemplateAbilities:
    """Renders a few conversations and looks what came out."""
    if not tokenizer.has_chat_template:
        return TemplateAbilities()
    user = {"role": "user", "content": "a"}
    tools = _NAME in _rendered(tokenizer, [user], tools=True)
    style, turn = None, None
    for style in (CallStyle(objects, bare) for objects in (True, False) for bare in (True, False)):
        turn = _call_turn(style)
        if _shows_call(style)(_rendered(tokenizer, [user, turn], tools)):
            break
    else:
        return TemplateAbilities(tokenizer.knows_developer, tools)
    result = {"role": "tool", "tool_call_id": _CALL_ID, "name": _NAME, "content": _RESULT}
    results = _RESULT in _rendered(tokenizer, [user, turn, result], tools)
    return TemplateAbilities(tokenizer.knows_developer, tools, style, results)


def _call_turn(style: CallStyle) -> dict[str, Any]:
    arguments = _ARGUMENTS if style.objects else json.dumps(_ARGUMENTS)
    call = {"id": _CALL_ID, "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    return {"role": "assistant", "content": None if style.no_content else "", "tool_calls": [call]}


def _shows_call(style: CallStyle) -> Callable[[str], bool]:
    """Whether a rendered text has the call in it: neither as Python's own notation nor as JSON inside JSON."""

    def shows(text: str) -> bool:
        if style.objects:
            return _KEY in text and _VALUE in text and f"'{_KEY}'" not in text
        return json.dumps(_ARGUMENTS) in text

    return shows


def _rendered(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: bool) -> str:
    """The conversation, or nothing when the template refuses it: that, too, says what it can do."""
    try:
        return tokenizer.render(messages, add_generation_prompt=False, tools=[_TOOL] if tools else None)
    except BadRequest as error:
        log.debug("the chat template refused a probe: %s", error)
        return ""
