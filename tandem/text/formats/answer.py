"""One answer's text split into reasoning, text and tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.text.formats.calls import CallParser, ToolFormat
from tandem.text.formats.parts import CallArguments, CallStart, Part, Reasoning, Text, joined
from tandem.text.formats.reasoning import ReasoningFormat, ReasoningParser


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answers to one request are read."""

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    declared: frozenset[str] = frozenset()
    """Names of the functions that the request offers."""
    begun: str = ""
    """The start of the assistant's turn, as far as it stands in the prompt."""
    one_call: bool = False
    """Everything after the first call is dropped."""
    hide_reasoning: bool = False

    @property
    def tokens(self) -> frozenset[str]:
        """Texts that must not be skipped even if they are special tokens."""
        both = (self.reasoning, self.tools)
        return frozenset(token for each in both if each is not None for token in each.tokens)


class AnswerParser:
    """An incremental parser: the parts of all calls, joined, are the same however the text is cut."""

    def __init__(self, form: AnswerFormat) -> None:
        self.called = False
        """A tool call was announced."""
        self._form = form
        self._reasoning = ReasoningParser(form.reasoning) if form.reasoning is not None else None
        self._calls = CallParser(form.tools, form.declared) if form.tools is not None else None
        self._closed = False
        self._early = self._read(form.begun) if form.begun else []

    @property
    def reasoning_end(self) -> int | None:
        """Characters of the text that are reasoning, its markers included; None while it goes on."""
        if self._reasoning is None:
            return 0
        return None if self._reasoning.end is None else max(0, self._reasoning.end - len(self._form.begun))

    def feed(self, text: str) -> list[Part]:
        """The parts that `text` completes."""
        parts, self._early = [*self._early, *self._read(text)], []
        return joined(self._kept(parts))

    def finish(self) -> list[Part]:
        """What was held back. The text ends here."""
        parts: list[Part] = [Text("")] if self._reasoning is None else self._reasoning.finish()
        parts = [*self._early, *self._through_calls(parts)]
        if self._calls is not None:
            parts += self._calls.finish()
        return joined(self._kept(parts))

    def _read(self, text: str) -> list[Part]:
        return self._through_calls([Text(text)] if self._reasoning is None else self._reasoning.feed(text))

    def _through_calls(self, parts: list[Part]) -> list[Part]:
        if self._calls is None:
            return parts
        out: list[Part] = []
        for part in parts:
            out += self._calls.feed(part.text) if isinstance(part, Text) else [part]
        return out

    def _kept(self, parts: list[Part]) -> list[Part]:
        out: list[Part] = []
        for part in parts:
            match part:
                case Reasoning() if self._form.hide_reasoning:
                    continue
                case CallStart(index=index):
                    self.called = True
                    self._closed = self._form.one_call and index > 0
                case Text() if self._form.one_call and self.called:
                    self._closed = True
                case CallArguments():
                    pass
            if not self._closed:
                out.append(part)
        return out
