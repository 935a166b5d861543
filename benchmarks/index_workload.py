"""What the index benchmark stores and asks for. Standard library only: a peer's interpreter imports it, too.

Conversations grow turn by turn on workers that were drawn for them, a few thousand open at a time. A turn is one event
with the prompt's new blocks and then events of single blocks, as a decode worker reports them. One conversation in six
is held by a second worker as well. Long prompts, which are what is matched, are held by twenty workers, by each up to
another block.
"""

from __future__ import annotations

import random
import resource
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

HASH_BYTES = 16
OPEN = 2000
"""Conversations that grow at the same time."""
SYSTEM_PROMPTS = 256
SYSTEM_BLOCKS = 16
EVERYWHERE = 8
"""System prompts that every worker holds."""
SYSTEM_HOLDERS = 50
"""Workers that hold each of the others."""
PROMPT_BLOCKS = 12
"""New blocks of a turn's prompt, on average."""
SINGLES = 4
"""Blocks of a turn's answer, each in an event of its own."""
TURNS = 8
"""Turns of a conversation, on average."""
SHARED = 1 / 6
"""Share of conversations that a second worker stores as well."""
LONG_PROMPTS = 64
LONG_BLOCKS = 1562
"""100,000 tokens in blocks of 64."""
LONG_HOLDERS = 20
CHUNK = 4000
"""Events made ahead, so that making them is not timed."""


@dataclass(frozen=True)
class Stored:
    """One event: `worker` stored the blocks `hashes` after `parent` (empty: at the root)."""

    worker: int
    parent: bytes
    hashes: list[bytes]


@dataclass(frozen=True)
class Figures:
    """What one index took."""

    name: str
    blocks: int
    held: int
    """Blocks counted once for each worker that holds them."""
    insert_us_per_block: float
    """Processor time, over blocks counted once for each event that names them."""
    insert_us_per_event: float
    insert_wall_us_per_block: float
    bytes_per_block: float
    """Growth of the resident set over different blocks."""
    match_us_p50: float
    match_us_p99: float
    miss_us_p50: float
    """A match of a prompt that shares its system prompt only."""
    hash_ms: float
    """Hashing 100,000 tokens."""
    longest_event_ms: float


class Workload:
    """Events until `blocks` different blocks are stored; the same for the same seed."""

    def __init__(self, workers: int, blocks: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._workers = workers
        self._blocks = blocks
        self.made = 0
        """Different blocks in the events so far."""
        self.held = 0
        self.systems = [self._new(SYSTEM_BLOCKS) for _ in range(SYSTEM_PROMPTS)]
        everyone: Sequence[int] = range(workers)
        self._holders = [
            everyone if n < EVERYWHERE else self._rng.sample(everyone, min(SYSTEM_HOLDERS, workers))
            for n in range(SYSTEM_PROMPTS)
        ]
        self.long = [self.systems[n] + self._new(LONG_BLOCKS - SYSTEM_BLOCKS) for n in range(LONG_PROMPTS)]
        self.misses = [self.systems[n] + self._new(LONG_BLOCKS - SYSTEM_BLOCKS) for n in range(LONG_PROMPTS)]
        self.made -= LONG_PROMPTS * (LONG_BLOCKS - SYSTEM_BLOCKS)

    def _new(self, count: int) -> list[bytes]:
        self.made += count
        joined = self._rng.randbytes(HASH_BYTES * count)
        return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]

    def chunks(self) -> Iterator[list[Stored]]:
        """All events, some thousands at a time."""
        chunk: list[Stored] = []
        for event in self._events():
            self.held += len(event.hashes)
            chunk.append(event)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        yield chunk

    def _events(self) -> Iterator[Stored]:
        rng = self._rng
        for system, holders in zip(self.systems, self._holders, strict=True):
            for worker in holders:
                yield Stored(worker, b"", system)
        for prompt, among in zip(self.long, self._holders, strict=False):
            holders = rng.sample(among, min(LONG_HOLDERS, len(among)))
            for place, worker in enumerate(holders):
                until = LONG_BLOCKS - place * (LONG_BLOCKS - SYSTEM_BLOCKS - 1) // LONG_HOLDERS
                yield Stored(worker, prompt[SYSTEM_BLOCKS - 1], prompt[SYSTEM_BLOCKS:until])
        talks = [self._talk() for _ in range(OPEN)]
        while self.made < self._blocks:
            place = rng.randrange(OPEN)
            worker, among, path = talks[place]
            fresh = self._new(min(1 + int(rng.expovariate(1 / PROMPT_BLOCKS)), 200))
            yield Stored(worker, path[-1], fresh)
            path += fresh
            for _ in range(SINGLES):
                (block,) = self._new(1)
                yield Stored(worker, path[-1], [block])
                path.append(block)
            if rng.random() < 1 / TURNS:
                if rng.random() < SHARED:
                    yield Stored(rng.choice(among), path[0], path[1:])
                talks[place] = self._talk()

    def _talk(self) -> tuple[int, Sequence[int], list[bytes]]:
        """Its worker, those that hold its system prompt, and its blocks from that prompt's last one on."""
        system = min(int(self._rng.expovariate(1 / 40)), SYSTEM_PROMPTS - 1)
        return self._rng.choice(self._holders[system]), self._holders[system], [self.systems[system][-1]]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest value."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def _timed(call: Callable[[list[bytes]], object], prompts: list[list[bytes]], count: int) -> array[float]:
    """Microseconds of each call."""
    rng, took = random.Random(1), array("d")
    for _ in range(count):
        prompt = rng.choice(prompts)
        started = time.perf_counter()
        call(prompt)
        took.append((time.perf_counter() - started) * 1e6)
    return took


def measure(
    name: str,
    work: Workload,
    prepare: Callable[[Stored], object],
    insert: Callable[[object], None],
    matcher: Callable[[list[bytes]], Callable[[], Result]],
    longest_of: Callable[[Result], int],
    hash_ms: float,
) -> Figures:
    """Fills an index and matches in it.

    prepare: makes of an event what `insert` takes, untimed. matcher: the same for a prompt. longest_of: blocks of
    the longest match in a result.
    """
    before, seconds, wall, longest, events = resident(), 0.0, 0.0, 0.0, 0
    for chunk in work.chunks():
        ready = [prepare(event) for event in chunk]
        began = last = time.perf_counter()
        cpu = time.process_time()
        for each in ready:
            insert(each)
            now = time.perf_counter()
            longest = max(longest, now - last)
            last = now
        seconds += time.process_time() - cpu
        wall += last - began
        events += len(ready)
        del ready
    grown = resident() - before
    calls = {id(prompt): matcher(prompt) for prompt in (*work.long, *work.misses)}
    for prompt in work.long:
        assert longest_of(calls[id(prompt)]()) == LONG_BLOCKS, "a stored prompt is not found whole"
    for prompt in work.misses:
        assert longest_of(calls[id(prompt)]()) == SYSTEM_BLOCKS, "a prompt is found beyond its system prompt"
    matched = _timed(lambda prompt: calls[id(prompt)](), work.long, 5000)
    missed = _timed(lambda prompt: calls[id(prompt)](), work.misses, 1000)
    return Figures(
        name=name,
        blocks=work.made,
        held=work.held,
        insert_us_per_block=seconds * 1e6 / work.held,
        insert_us_per_event=seconds * 1e6 / events,
        insert_wall_us_per_block=wall * 1e6 / work.held,
        bytes_per_block=grown / work.made,
        match_us_p50=percentile(matched, 0.5),
        match_us_p99=percentile(matched, 0.99),
        miss_us_p50=percentile(missed, 0.5),
        hash_ms=hash_ms,
        longest_event_ms=longest * 1e3,
    )
