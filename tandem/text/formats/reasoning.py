"""Reasoning before an answer: what a format says about itself, and the parser that all formats share."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.text.formats.parts import Part, Reasoning, Text
from tandem.text.formats.reader import SPACES, Reader, Steps


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Reasoning between two markers at the start of the answer, or of the turn if the prompt has the first marker."""

    name: str
    open: str
    close: str

    @property
    def tokens(self) -> tuple[str, ...]:
        """Texts of the format that may be special tokens of the model, which decoding would skip."""
        return self.open, self.close

    @property
    def empty(self) -> str:
        """How a turn starts that does without reasoning, as templates with such a switch write it."""
        return f"{self.open}\n\n{self.close}\n\n"

    def fits(self, template: str) -> bool:
        """Whether a model with this chat template reasons so."""
        return self.open in template or self.close in template

    def opened_by(self, prompt: str) -> str:
        """The opening marker, and what follows it, when `prompt` ends so: the model is already inside."""
        kept = prompt.rstrip(SPACES)
        return prompt[len(kept) - len(self.open) :] if kept.endswith(self.open) else ""


class ReasoningParser:
    """Splits an answer into its reasoning and the text after it, without the newlines around either.

    Reasoning is looked for at the start alone: a marker later in the text is text. Reasoning that does not end is all
    there is.
    """

    def __init__(self, form: ReasoningFormat) -> None:
        self.end: int | None = None
        """Characters up to and including the closing marker; 0 when there is no reasoning, None while it is open."""
        self._form = form
        self._reader = Reader()
        self._parts: list[Part] = []
        self._forgotten = 0
        self._steps = self._run()

    def feed(self, text: str) -> list[Part]:
        """What `text` completes."""
        self._reader.text += text
        next(self._steps)
        return self._take()

    def finish(self) -> list[Part]:
        """What was held back. The text ends here."""
        self._reader.ended = True
        for _ in self._steps:
            raise AssertionError("a grammar waits for more than the end")
        return self._take()

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _run(self) -> Steps[None]:
        reader = self._reader
        yield from reader.spaces()
        if (yield from reader.literal(self._form.open)):
            yield from self._newlines()
            yield from self._inside()
            yield from self._newlines()
        else:
            reader.at, self.end = 0, 0
        while True:
            if text := reader.text[reader.at :]:
                self._parts.append(Text(text))
                reader.text, reader.at = "", 0
            if reader.ended:
                return
            yield

    def _newlines(self) -> Steps[None]:
        while (yield from self._reader.peek()) == "\n":
            self._reader.at += 1

    def _inside(self) -> Steps[None]:
        """Gives reasoning out up to the closing marker, which is read."""
        reader, close = self._reader, self._form.close
        while (found := reader.text.find(close, reader.at)) < 0:
            held = len(reader.text)
            if not reader.ended:
                held -= next(size for size in range(len(close) - 1, -1, -1) if reader.text.endswith(close[:size]))
            self._think(held)
            if reader.ended:
                reader.at = len(reader.text)
                return
            self._forgotten += reader.at
            reader.forget()
            yield
        self._think(found)
        reader.at = found + len(close)
        self.end = self._forgotten + reader.at

    def _think(self, end: int) -> None:
        """Gives out what stands before `end`, but newlines last of all."""
        text = self._reader.text[self._reader.at : end].rstrip("\n")
        if text:
            self._parts.append(Reasoning(text))
        self._reader.at += len(text)
