"""Writes a trace of chats of several tenants: `python -m benchmarks.make_trace chats.jsonl --requests 400`.

Every tenant has a system prompt of its own, all of them begin alike, and few tenants have most chats. A turn is sent
with all that was said before, answers included. For tandem/traces.py, in its blocks of 512 tokens; a scale of 0.125
makes them Tandem's blocks of 64.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tandem.traces import TRACE_BLOCK_TOKENS

THINK_S = 4.0
"""Mean time between an answer's start and the next turn."""


def chats(
    requests: int, rate: float, tenants: int, system: int, turns: int, output: int, seed: int
) -> list[dict[str, Any]]:
    """Entries in order of time. rate: requests a second. system, output: blocks and tokens. turns: mean of a chat."""
    rng = random.Random(f"chats {seed}")
    names = iter(range(1, 1 << 31))
    systems = [[0, *(next(names) for _ in range(system - 1))] for _ in range(tenants)]
    weights = [1 / (rank + 1) for rank in range(tenants)]
    entries: list[dict[str, Any]] = []
    at = 0.0
    while len(entries) < requests:
        at += rng.expovariate(rate / turns)
        prefix = rng.choices(systems, weights)[0]
        entries += _chat(rng, at, list(prefix), rng.randint(1, 2 * turns - 1), output, names)
    return sorted(entries, key=lambda entry: float(entry["timestamp"]))[:requests]


def _chat(
    rng: random.Random, at: float, blocks: list[int], turns: int, output: int, names: Iterator[int]
) -> Iterator[dict[str, Any]]:
    for _ in range(turns):
        blocks = [*blocks, *(next(names) for _ in range(rng.randint(1, 3)))]
        yield {
            "timestamp": round(at * 1e3),
            "input_length": len(blocks) * TRACE_BLOCK_TOKENS - rng.randrange(1, TRACE_BLOCK_TOKENS // 2),
            "output_length": output,
            "hash_ids": blocks,
        }
        at += rng.expovariate(1 / THINK_S)


def main(
    path: Path,
    requests: Annotated[int, typer.Option(min=1)] = 400,
    rate: Annotated[float, typer.Option(min=0.001, help="requests a second")] = 8.0,
    tenants: Annotated[int, typer.Option(min=1)] = 8,
    system: Annotated[int, typer.Option(min=1, help="blocks of a system prompt")] = 6,
    turns: Annotated[int, typer.Option(min=1, help="of a chat, on average")] = 4,
    output: Annotated[int, typer.Option(min=1, help="tokens of an answer")] = 128,
    seed: int = 0,
) -> None:
    """Writes the trace."""
    entries = chats(requests, rate, tenants, system, turns, output, seed)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
