"""Dynamo's radix index under the load of `benchmarks.index`; runs in the peer's own interpreter."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.index_workload import Stored, Workload, measure


def number(block: bytes) -> int:
    """The peer's block hashes have 64 bits."""
    return int.from_bytes(block[:8], "little")


def main() -> None:
    from dynamo._core import RadixTree, compute_block_hash_for_seq

    workers, blocks, seed = map(int, sys.argv[1:4])
    tree: Any = RadixTree()
    count = 0

    def prepare(event: Stored) -> tuple[int, bytes]:
        nonlocal count
        count += 1
        names = [{"block_hash": number(block), "tokens_hash": number(block)} for block in event.hashes]
        stored = {"parent_hash": number(event.parent) if event.parent else None, "blocks": names}
        return event.worker, json.dumps({"event_id": count, "data": {"stored": stored}, "dp_rank": 0}).encode()

    def insert(ready: Any) -> None:
        tree.apply_event(*ready)

    def matcher(prompt: list[bytes]) -> Callable[[], dict[Any, int]]:
        numbers = [number(block) for block in prompt]
        return lambda: tree.find_matches(numbers).scores

    tokens = list(range(100_000))
    started = time.perf_counter()
    compute_block_hash_for_seq(tokens, 64)
    hash_ms = (time.perf_counter() - started) * 1e3
    work = Workload(workers, blocks, seed)
    found = measure("dynamo", work, prepare, insert, matcher, lambda scores: max(scores.values()), hash_ms)
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main()
