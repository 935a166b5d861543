"""Which formats the model's answers have, and how the answers to one chat request are read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from router.requests.openai import ChatBody
from router.requests.tools import ToolUse
from tandem.config import RouterConfig
from tandem.errors import BadRequest
from tandem.text.abilities import TemplateAbilities, find_abilities
from tandem.text.formats.answer import AnswerFormat
from tandem.text.formats.calls import ToolFormat
from tandem.text.formats.reasoning import ReasoningFormat
from tandem.text.formats.registry import REASONING_FORMATS, TOOL_FORMATS, choose
from tandem.text.tokenizer import Tokenizer
from tandem.types import TokenIds

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFormats:
    """What a model's chat template takes and how its answers are written; None where that is not parsed."""

    can: TemplateAbilities = field(default_factory=TemplateAbilities)
    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    template: str = ""
    special: dict[str, int] = field(default_factory=dict)
    """Ids of those texts of the formats that are special tokens."""


class FormatChoice:
    """Chooses the formats of a tokeniser once, as the settings say, and logs what was chosen."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._tokenizer: Tokenizer | None = None
        self._formats = ModelFormats()

    def of(self, tokenizer: Tokenizer) -> ModelFormats:
        """The formats of the model with this tokeniser."""
        if tokenizer is not self._tokenizer:
            self._formats = self._choose(tokenizer)
            self._tokenizer = tokenizer
        return self._formats

    def _choose(self, tokenizer: Tokenizer) -> ModelFormats:
        config, template = self._config, tokenizer.template_text
        can = find_abilities(tokenizer)
        tools = choose(TOOL_FORMATS, config.tool_parser, template)
        reasoning = choose(REASONING_FORMATS, config.reasoning_parser, template)
        texts = {token for each in (tools, reasoning) if each is not None for token in each.tokens}
        special = {text: token for token in tokenizer.special_ids if (text := tokenizer.token(token) or "") in texts}
        log.info(
            "tool parser: %s (asked for: %s; the chat template takes %s); reasoning parser: %s (asked for: %s)",
            "none" if tools is None else tools.name,
            config.tool_parser,
            _told(can),
            "none" if reasoning is None else reasoning.name,
            config.reasoning_parser,
        )
        return ModelFormats(can, tools, reasoning, template, special)


def _told(can: TemplateAbilities) -> str:
    takes = [name for name, there in (("tools", can.tools), ("calls", can.calls), ("results", can.results)) if there]
    return ", ".join(takes) or "neither tools nor calls"


def check_tools(use: ToolUse, formats: ModelFormats) -> None:
    """Raises BadRequest when the model cannot be told of the tools, or its calls could not be read."""
    if use.tools and not formats.can.tools:
        raise BadRequest("tools: this model's chat template takes no tools", "tools")
    if use.tools and formats.tools is None:
        raise BadRequest("tools: no parser reads this model's tool calls; the server needs --tool-parser", "tools")


@dataclass(frozen=True, slots=True)
class AssistantTurn:
    """The assistant's turn: what of it the prompt already has to say, and how the rest is read."""

    prefill: str = ""
    """Text that goes behind the rendered conversation."""
    form: AnswerFormat | None = None
    """None: everything is text."""
    special: frozenset[int] = frozenset()
    """Special tokens that are text, since the format is made of them."""
    thoughts_end: TokenIds = ()
    """What ends the reasoning that the turn starts with; empty when there is none."""


def assistant_turn(
    body: ChatBody, use: ToolUse, formats: ModelFormats, rendered: str, encode: Callable[[str], Sequence[int]]
) -> AssistantTurn:
    """rendered: the conversation as the template wrote it, which may have begun the model's reasoning."""
    turn = _answer(body, use, formats, rendered)
    reasoning = formats.reasoning
    if reasoning is None or turn.prefill or not _reasons(formats, rendered):
        return turn
    return replace(turn, thoughts_end=tuple(encode(reasoning.close)))


def _reasons(formats: ModelFormats, rendered: str) -> bool:
    """Whether the model's reasoning comes first: its template has begun it, or leaves that to the model."""
    reasoning = formats.reasoning
    if reasoning is None or rendered.rstrip().endswith(reasoning.close):
        return False
    return bool(reasoning.opened_by(rendered)) or reasoning.open in formats.template


def _answer(body: ChatBody, use: ToolUse, formats: ModelFormats, rendered: str) -> AssistantTurn:
    reasoning = formats.reasoning if body.separate_reasoning is not False else None
    tools = formats.tools if use.tools else None
    if reasoning is None and tools is None:
        return AssistantTurn()
    opened = formats.reasoning.opened_by(rendered) if formats.reasoning is not None else ""
    silence = call = ""
    if use.forced and tools is not None:
        silence = _without_reasoning(formats, rendered, opened)
        call = tools.prefill(formats.template, use.function)
    form = AnswerFormat(
        reasoning=reasoning,
        tools=tools,
        declared=use.names,
        begun=(opened + silence if reasoning is not None else "") + call,
        one_call=use.one_call,
        hide_reasoning=body.include_reasoning is False,
    )
    special = frozenset(formats.special[text] for text in form.tokens if text in formats.special)
    return AssistantTurn(silence + call, form, special)


def _without_reasoning(formats: ModelFormats, rendered: str, opened: str) -> str:
    """What ends the model's reasoning before it starts: a call that is forced comes first."""
    reasoning = formats.reasoning
    if reasoning is None or not _reasons(formats, rendered):
        return ""
    if opened and not reasoning.empty.startswith(opened):
        return f"\n{reasoning.close}\n\n"
    return reasoning.empty.removeprefix(opened)
