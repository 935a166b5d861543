"""Tool calls in an answer's text: what a format says about itself, and the parser that all formats share.

When a call is announced. Nothing that was given out can be taken back, so a call is held until its name is known and
its arguments have begun as an object. From then on arguments are given out as they come, each character checked: what
was given is always the beginning of a JSON object. Text that goes wrong before a call is announced is text as it
stands, markers included. Where it goes wrong afterwards, the call keeps the arguments it has, and the rest is text.
"""

from __future__ import annotations

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from tandem.text.formats.held import CallSpelling
from tandem.text.formats.json_scanner import JsonScanner
from tandem.text.formats.parts import CallArguments, CallStart, Part, Text, joined
from tandem.text.formats.reader import SPACES, Malformed, Reader, Steps

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""OpenAI's rule for the names of functions."""


class ToolFormat(ABC):
    """How a model writes tool calls."""

    name: ClassVar[str]
    openings: ClassVar[tuple[str, ...]] = ()
    """Texts that a block of calls starts with, wherever it stands."""
    bare: ClassVar[str] = ""
    """A character that a block may start with as the first of the answer."""
    tokens: ClassVar[tuple[str, ...]] = ()
    """Texts of the format that may be special tokens of the model, which decoding would skip."""

    @abstractmethod
    def fits(self, template: str) -> bool:
        """Whether a model with this chat template writes its calls so."""

    @abstractmethod
    def block(self, reader: Reader, calls: Calls) -> Steps[None]:
        """Reads calls, beginning at an opening or at `bare`. Raises Malformed."""

    @abstractmethod
    def prefill(self, template: str, name: str | None) -> str:
        """What an answer starts with that calls function `name`, or some function: up to where the model decides."""

    @abstractmethod
    def spelling(self, template: str) -> CallSpelling:
        """How calls are written that a grammar holds. Its start, and with the name its call, begin with `prefill`."""

    def new_id(self) -> str:
        """A call's id, in a form that the model's chat template accepts when it comes back."""
        return f"call_{secrets.token_hex(12)}"


class Calls:
    """The calls of one answer, as far as they are announced."""

    def __init__(self, form: ToolFormat, declared: frozenset[str]) -> None:
        """declared: names of the functions that the request offers."""
        self.declared = declared
        self.count = 0
        self.parts: list[Part] = []
        """What was announced and not given out yet."""
        self._form = form

    def start(self, name: str) -> None:
        """Announces a call. Raises Malformed when it is no name."""
        if not NAME.fullmatch(name):
            raise Malformed
        self.parts.append(CallStart(self.count, self._form.new_id(), name))
        self.count += 1

    def arguments(self, text: str) -> None:
        """More of the arguments of the last call."""
        self.parts.append(CallArguments(self.count - 1, text))


class CallParser:
    """Splits the text of one answer into text and calls.

    Whitespace before a block of calls and after the last one belongs to the format and is dropped.
    """

    def __init__(self, form: ToolFormat, declared: frozenset[str]) -> None:
        self._form = form
        self._reader = Reader()
        self._calls = Calls(form, declared)
        self._spaces = ""
        """Whitespace before the block that is being read."""
        self._blank = 0
        """Characters behind the reader that are known to be whitespace: a model may write it without end."""
        self._at_start = bool(form.bare)
        self._after_call = False
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
        parts, self._calls.parts = joined(self._calls.parts), []
        return parts

    def _run(self) -> Steps[None]:
        reader, calls = self._reader, self._calls
        while opening := (yield from self._text()):
            start, before = reader.at, calls.count
            try:
                yield from self._form.block(reader, calls)
            except Malformed:
                if calls.count == before:
                    reader.at = start + len(opening)
                    self._say(self._spaces + opening)
            self._at_start = False
            if calls.count > before:
                self._after_call = True

    def _text(self) -> Steps[str]:
        """Gives text out up to the next opening, which is returned and not read yet; empty at the end."""
        reader = self._reader
        while True:
            at, text = reader.at, reader.text
            new = at + self._blank
            found, opening = self._find(text, new)
            held = len(text) if found < 0 else found
            if found < 0 and not reader.ended:
                held -= _begun(text, new, self._form.openings)
            shown = new - at + len(said) if (said := text[new:held].rstrip(SPACES)) else 0
            self._say(text[at : at + shown])
            reader.at = at + shown
            # No opening begins with whitespace.
            self._blank = held - reader.at if found < 0 else 0
            if found >= 0:
                self._spaces, reader.at = text[reader.at : found], found
                return opening
            if reader.ended:
                rest = text[reader.at :]
                self._say("" if self._after_call and not rest.strip(SPACES) else rest)
                reader.at = len(text)
                return ""
            reader.forget()
            yield

    def _find(self, text: str, at: int) -> tuple[int, str]:
        """The first opening from `at` on, and where; -1 when there is none."""
        if self._at_start:
            first = len(text) - len(text[at:].lstrip(SPACES))
            if text.startswith(self._form.bare, first):
                return first, self._form.bare
        places = [(place, each) for each in self._form.openings if (place := text.find(each, at)) >= 0]
        return min(places, default=(-1, ""))

    def _say(self, text: str) -> None:
        if text:
            self._calls.parts.append(Text(text))
            self._after_call = False
            self._at_start = False


def _begun(text: str, at: int, openings: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of an opening."""
    longest = max(map(len, openings), default=1)
    for start in range(max(at, len(text) - longest + 1), len(text)):
        if any(opening.startswith(text[start:]) for opening in openings):
            return len(text) - start
    return 0


def json_call(reader: Reader, calls: Calls, strict: bool = False) -> Steps[None]:
    """Reads `{"name": ..., "arguments": {...}}`, in which arguments may also be called parameters.

    strict: for calls that no marker sets apart: the function must be a declared one, and no other fields are allowed.
    Raises Malformed; the reader then stands at the call's start if it was not announced.
    """
    start = reader.at
    call = _JsonCall(reader, calls, strict)
    try:
        yield from call.read()
    except Malformed:
        if not call.announced:
            reader.at = start
            raise
        if not call.complete:
            raise


def arguments(reader: Reader, calls: Calls) -> Steps[None]:
    """Reads the arguments of the call that was just announced, giving them out as they come."""

    def give(text: str) -> None:
        calls.arguments(text)
        reader.forget()  # nobody goes back behind an announcement

    yield from reader.json(give)


class _JsonCall:
    """One call as a JSON object, its fields in any order."""

    def __init__(self, reader: Reader, calls: Calls, strict: bool) -> None:
        self.announced = False
        self.complete = False
        """The arguments are whole; what still is to come are brackets, which small models forget."""
        self._reader = reader
        self._calls = calls
        self._strict = strict
        self._name: str | None = None
        self._held: str | None = None
        """Arguments that came before the name."""

    def read(self) -> Steps[None]:
        reader = self._reader
        yield from reader.expect("{")
        yield from reader.spaces()
        if not (yield from reader.literal("}")):
            while True:
                yield from self._field()
                yield from reader.spaces()
                if (yield from reader.literal("}")):
                    break
                yield from reader.expect(",")
                yield from reader.spaces()
        if not self.announced:
            self._announce()
            self._calls.arguments("{}")

    def _field(self) -> Steps[None]:
        reader = self._reader
        if (yield from reader.peek()) != '"':
            raise Malformed
        key = json.loads((yield from reader.json()))
        yield from reader.spaces()
        yield from reader.expect(":")
        yield from reader.spaces()
        if key == "name" and self._name is None:
            yield from self._read_name()
        elif key in ("arguments", "parameters") and not self.complete:
            yield from self._read_arguments()
        elif self._strict and key not in ("type", "id"):
            raise Malformed
        else:
            yield from reader.json()

    def _read_name(self) -> Steps[None]:
        if (yield from self._reader.peek()) != '"':
            raise Malformed
        name = json.loads((yield from self._reader.json()))
        if not NAME.fullmatch(name) or (self._strict and name not in self._calls.declared):
            raise Malformed
        self._name = name
        if self._held is not None:
            self._announce()
            self._calls.arguments(self._held)

    def _read_arguments(self) -> Steps[None]:
        reader = self._reader
        first = yield from reader.peek()
        if first == "{" and self._name is not None:
            self._announce()
            yield from arguments(reader, self._calls)
        else:
            value = yield from reader.json()
            if value == "null":
                return
            self._held = value if first == "{" else _unquoted(value)
            if self._name is not None:
                self._announce()
                self._calls.arguments(self._held)
        self.complete = True

    def _announce(self) -> None:
        if self._name is None:
            raise Malformed
        self._calls.start(self._name)
        self.announced = True


def _unquoted(value: str) -> str:
    """The object inside a JSON string, for models that write arguments as OpenAI's answers have them."""
    inner = json.loads(value) if value.startswith('"') else ""
    scanner = JsonScanner()
    whole = inner.startswith("{") and scanner.feed(inner) == len(inner) and scanner.done
    if not whole or any("\ud800" <= char <= "\udfff" for char in inner):
        raise Malformed
    return str(inner)
