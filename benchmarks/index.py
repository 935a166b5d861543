"""The router's prefix index alone, beside Dynamo's (Rust) under the same load in the same run.

    python -m benchmarks.index --blocks 10000000 --peer PEERS/dynamo/.venv/bin/python

Insertion is timed from what each is told by a worker: ours from the message's bytes, the peer from its JSON. Matching
is timed given the hashes, which both need; hashing is reported apart. Memory is the growth of the resident set.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.index_workload import Figures, Stored, Workload, measure
from router.cache.prefix_index import PrefixIndex
from tandem.cluster import CacheEvent, EventKind, WorkerUpdate
from tandem.kv import block_hashes
from tandem.testing.updates import update_bytes, update_of

ROOT = Path(__file__).resolve().parent.parent
ROWS = (
    ("insert, µs of CPU a block", "insert_us_per_block"),
    ("insert, µs of CPU an event", "insert_us_per_event"),
    ("insert, µs a block by the clock", "insert_wall_us_per_block"),
    ("longest event, ms", "longest_event_ms"),
    ("bytes a block", "bytes_per_block"),
    ("match of 1,562 blocks, µs p50", "match_us_p50"),
    ("match of 1,562 blocks, µs p99", "match_us_p99"),
    ("match of a system prompt only, µs p50", "miss_us_p50"),
    ("hashing 100,000 tokens, ms", "hash_ms"),
)

app = typer.Typer(add_completion=False)


def ours(workers: int, blocks: int, seed: int) -> Figures:
    """Fills and matches the product's index."""
    index = PrefixIndex(max_blocks=2 * blocks + 1_000_000, max_age_s=1e9, clock=time.monotonic)
    names = [f"{worker:032x}" for worker in range(workers)]
    sequences = [0] * workers

    def prepare(event: Stored) -> bytes:
        sequences[event.worker] += 1
        stored = CacheEvent(EventKind.STORED, tuple(event.hashes), event.parent)
        return update_bytes(WorkerUpdate(names[event.worker], sequences[event.worker], (stored,)))

    def insert(ready: Any) -> None:
        update = update_of(ready)
        for event in update.events:
            index.apply(update.incarnation, event)

    def matcher(prompt: list[bytes]) -> Callable[[], dict[str, int]]:
        return lambda: index.match(prompt)

    tokens = list(range(100_000))
    started = time.perf_counter()
    block_hashes(bytes(32), tokens)
    hash_ms = (time.perf_counter() - started) * 1e3
    work = Workload(workers, blocks, seed)
    found = measure("tandem", work, prepare, insert, matcher, lambda result: max(result.values()), hash_ms)
    assert len(index) == work.made, (len(index), work.made)
    return found


def peer(python: Path, workers: int, blocks: int, seed: int) -> Figures:
    """The same for the peer, in a process of its own."""
    command = [str(python), "-m", "benchmarks.index_peer", str(workers), str(blocks), str(seed)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


@app.command()
def main(
    workers: Annotated[int, typer.Option(min=1)] = 1000,
    blocks: Annotated[int, typer.Option(min=150_000, help="different blocks in the index")] = 1_000_000,
    seed: int = 1,
    python: Annotated[Path | None, typer.Option("--peer", help="interpreter that has Dynamo's wheel")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="file to write the figures to")] = None,
) -> None:
    """Measures, prints a table."""
    found = [ours(workers, blocks, seed)] + ([peer(python, workers, blocks, seed)] if python else [])
    table = Table(title=f"{workers} workers, {found[0].blocks:,} blocks, held {found[0].held:,} times")
    table.add_column("")
    for figures in found:
        table.add_column(figures.name, justify="right")
    if python:
        table.add_column("ratio", justify="right")
    for title, field in ROWS:
        values = [getattr(figures, field) for figures in found]
        ratio = [f"{values[0] / values[1]:.2f}"] if python else []
        table.add_row(title, *(f"{value:.2f}" for value in values), *ratio)
    Console(file=sys.stdout, width=110).print(table)
    if out is not None:
        out.write_text(json.dumps([asdict(figures) for figures in found], indent=2) + "\n")


if __name__ == "__main__":
    app()
