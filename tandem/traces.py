"""Recorded loads: a file of JSON objects, one a line, in order of `timestamp`.

    {"timestamp": 250, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}

timestamp: milliseconds after the start. input_length, output_length: tokens. hash_ids: one id for each 512 tokens of
the prompt, the last block possibly partial; the same id means the same tokens. Without hash_ids prompts share nothing.
(The format of the traces published with Mooncake, FAST '25.)
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
    ids = data.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError("hash_ids must be a list of integers")
    length = int(data["input_length"])
    if len(ids) > -(-length // TRACE_BLOCK_TOKENS):
        raise ValueError(f"hash_ids has {len(ids)} blocks of {TRACE_BLOCK_TOKENS}; input_length is {length}")
    return TraceEntry(float(data["timestamp"]), length, int(data["output_length"]), tuple(ids))
