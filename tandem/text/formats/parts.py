"""What an answer's text consists of, in the order in which it was written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The model's thoughts before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; it cannot be taken back. Its arguments follow before any other call starts."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """Further text of a call's arguments. All of a call's together are one JSON object, as the model wrote it."""

    index: int
    text: str


Part = Text | Reasoning | CallStart | CallArguments


def joined(parts: Iterable[Part]) -> list[Part]:
    """The same with neighbours of one kind as one part, and without empty ones."""
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        match last, part:
            case Text(), Text():
                out[-1] = Text(last.text + part.text)
            case Reasoning(), Reasoning():
                out[-1] = Reasoning(last.text + part.text)
            case CallArguments(index=index), CallArguments() if index == part.index:
                out[-1] = CallArguments(index, last.text + part.text)
            case _, CallStart():
                out.append(part)
            case _ if part.text:
                out.append(part)
    return out
