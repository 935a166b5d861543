"""What clients ask: conversations of one or more turns, made from a seed alone, or a trace (tandem/traces.py)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tandem.traces import TRACE_BLOCK_TOKENS, read_trace


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: token ids for /v1/completions, or a user's message for /v1/chat/completions."""

    prompt: tuple[int, ...] | str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that one client asks, each after the answer before. Chat turns carry the server's own answers forward."""

    turns: tuple[Turn, ...]
    system: str = ""
    at_s: float | None = None
    """When a trace says it starts, seconds after the first; None leaves it to the load."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a workload is; lengths are tokens, but words where requests are text."""

    requests: int
    input_tokens: int
    output_tokens: int
    spread: float = 0.0
    """Lengths are uniform within this share around the wished ones: 0.5 means from half to one and a half."""
    shared_tokens: int = 0
    """Tokens that all prompts start with; in `multiturn` the length of the system message."""
    turns: int = 1
    low_id: int = 8
    high_id: int = 250
    """Token ids are drawn from [low_id, high_id)."""
    trace: Path | None = None
    scale: float = 1.0
    """Lengths of a trace are multiplied by this."""

    def __post_init__(self) -> None:
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread is {self.spread:g}; it must be in [0, 1)")
        if not 0 <= self.low_id < self.high_id:
            raise ValueError(f"token ids are drawn from [{self.low_id}, {self.high_id}); it must not be empty")
        if self.scale <= 0:
            raise ValueError(f"scale is {self.scale:g}; it must be above 0")


Maker = Callable[[Shape, random.Random], Iterator[Conversation]]


def make(name: str, shape: Shape, seed: int) -> list[Conversation]:
    """`shape.requests` requests of the workload `name`. Raises ValueError with the field and the limit.

    The same name, shape and seed give the same conversations; shared prefixes differ between seeds, so that a warm-up
    with another seed leaves nothing in caches that the measured requests could find.
    """
    if name not in WORKLOADS:
        raise ValueError(f"workload is {name}; it must be one of {', '.join(WORKLOADS)}")
    return list(WORKLOADS[name](shape, random.Random(f"{name} {seed}")))


def _random(shape: Shape, rng: random.Random) -> Iterator[Conversation]:
    """Independent prompts."""
    return _shared(replace(shape, shared_tokens=0), rng)


def _shared(shape: Shape, rng: random.Random) -> Iterator[Conversation]:
    """Prompts that start with the same system prompt."""
    if shape.shared_tokens >= shape.input_tokens:
        raise ValueError(f"shared tokens are {shape.shared_tokens}; they must be below {shape.input_tokens}, the input")
    prefix = _ids(shape, rng, shape.shared_tokens)
    for _ in range(shape.requests):
        length = max(shape.shared_tokens + 1, _length(shape.input_tokens, shape, rng))
        prompt = prefix + _ids(shape, rng, length - shape.shared_tokens)
        yield Conversation((Turn(prompt, _length(shape.output_tokens, shape, rng)),))


def _multiturn(shape: Shape, rng: random.Random) -> Iterator[Conversation]:
    """Chats: a system message, then `turns` messages, each sent with everything said before."""
    if shape.turns < 1:
        raise ValueError(f"turns are {shape.turns}; at least 1 is needed")
    system = _words(rng, shape.shared_tokens)
    left = shape.requests
    while left > 0:
        count = min(shape.turns, left)
        left -= count
        turns = (
            Turn(_words(rng, _length(shape.input_tokens, shape, rng)), _length(shape.output_tokens, shape, rng))
            for _ in range(count)
        )
        yield Conversation(tuple(turns), system)


def _trace(shape: Shape, rng: random.Random) -> Iterator[Conversation]:
    """The first `requests` requests of a trace."""
    if shape.trace is None:
        raise ValueError("the workload trace needs the path of a trace")
    block_tokens = max(1, round(TRACE_BLOCK_TOKENS * shape.scale))
    blocks: dict[int, tuple[int, ...]] = {}
    first: float | None = None
    for entry in read_trace(shape.trace, shape.requests):
        first = entry.timestamp_ms if first is None else first
        prompt: tuple[int, ...] = ()
        for name in entry.hash_ids:
            if name not in blocks:
                blocks[name] = _ids(shape, rng, block_tokens)
            prompt += blocks[name]
        length = max(1, round(entry.input_length * shape.scale))
        prompt = prompt[:length] + _ids(shape, rng, length - len(prompt))
        output = max(1, round(entry.output_length * shape.scale))
        yield Conversation((Turn(prompt, output),), at_s=(entry.timestamp_ms - first) / 1e3)


def _length(wished: int, shape: Shape, rng: random.Random) -> int:
    low, high = round(wished * (1 - shape.spread)), round(wished * (1 + shape.spread))
    return max(1, rng.randint(low, high))


def _ids(shape: Shape, rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(shape.low_id, shape.high_id), k=max(0, count)))


def _words(rng: random.Random, count: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(count))


WORKLOADS: dict[str, Maker] = {
    "random": _random,
    "shared": _shared,
    "multiturn": _multiturn,
    "long": _random,
    "trace": _trace,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "random": {"input_tokens": 300, "output_tokens": 64, "spread": 0.5},
    "shared": {"input_tokens": 300, "output_tokens": 64, "shared_tokens": 256},
    "multiturn": {"input_tokens": 24, "output_tokens": 48, "shared_tokens": 48, "turns": 4},
    "long": {"input_tokens": 1800, "output_tokens": 32},
    "trace": {"input_tokens": 1, "output_tokens": 1},
}
"""Fields of `Shape` by workload, where the caller has no wish."""
