"""Recorded loads: a file of JSON objects, one a line, in order of `timestamp`.

    {"timestamp": 250, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}

timestamp: milliseconds after the start. input_length, output_length: tokens. hash_ids: one id for each 512 tokens of
the prompt, the last block possibly partial; the same id means the same tokens. Without hash_ids prompts share nothing.
(The format of the traces published with Mooncake, FAST '25.)

output_hash_ids: where the next turn repeats the answer, the ids that it has for the blocks after those of this prompt,
as far as the answer goes. An extension: other traces do not name what was generated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRACE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One line of a trace."""

    timestamp_ms: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]
    output_hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, limit: int) -> Iterator[TraceEntry]:
    """The first `limit` entries. Raises ValueError naming file, line and field."""
    before = 0.0
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if number > limit:
                return
            try:
                entry = _entry(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            if entry.timestamp_ms < before:
                raise ValueError(
                    f"{path}:{number}: timestamp is {entry.timestamp_ms:g}, before the last line's {before:g}"
                )
            before = entry.timestamp_ms
            yield entry


def _entry(data: Any) -> TraceEntry:
    if not isinstance(data, dict):
        raise ValueError("a line must be a JSON object")
    for field, least in (("timestamp", 0), ("input_length", 1), ("output_length", 1)):
        value = data.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            raise ValueError(f"{field} is {value!r}; a number of at least {least} is needed")
    length, answer = int(data["input_length"]), int(data["output_length"])
    ids, after = _ids(data, "hash_ids"), _ids(data, "output_hash_ids")
    if len(ids) > -(-length // TRACE_BLOCK_TOKENS):
        raise ValueError(f"hash_ids has {len(ids)} blocks of {TRACE_BLOCK_TOKENS}; input_length is {length}")
    if after and len(ids) + len(after) > -(-(length + answer) // TRACE_BLOCK_TOKENS):
        raise ValueError(f"output_hash_ids has {len(after)} blocks of {TRACE_BLOCK_TOKENS} more; that is too much")
    return TraceEntry(float(data["timestamp"]), length, answer, ids, after)


def _ids(data: dict[str, Any], field: str) -> tuple[int, ...]:
    ids = data.get(field, [])
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError(f"{field} must be a list of integers")
    return tuple(ids)
