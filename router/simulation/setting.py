"""What is simulated: machines, cluster and load. Times are seconds unless a name says milliseconds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.kv import BlockHash
from tandem.traces import TRACE_BLOCK_TOKENS, TraceEntry


@dataclass(frozen=True, slots=True)
class Machine:
    """One worker's hardware as fitted coefficients.

    A step takes `base + per_token * tokens + per_context * context + per_prefix * prefix`. tokens: of prompts and of
    output, in one batch. context: tokens that the batch's decoding sequences look back on. prefix: for each token of a
    prompt, those that had KV before the step; what a token looks back on within its step is in `per_token`.
    """

    base_ms: float = 8.0
    per_token_ms: float = 0.05
    per_context_ms: float = 4e-5
    max_batch_tokens: int = 8192
    max_running: int = 256
    per_prefix_ms: float = 0.0
    kv_bytes: int = 131_072
    """Of one token: 128 KiB is a model of 8 billion parameters with 8 KV heads."""
    link_bytes_per_ms: float = 25e6
    """What a prefill worker writes to others: 25 GB/s."""
    hand_over_ms: float = 3.0
    """A hand-over's fixed price."""
    kv_tokens: int = 2_000_000
    """Tokens of sequences under way, beside the cache; with `Setting.pool`, all of its memory."""
    overhead_ms: float = 0.0
    """Of a request until it reaches the router, and of its first token on the way back: client, HTTP, dispatch."""
    request_cpu_ms: float = 0.0
    """What all processes together spend on a request beside steps; what follows is of shared cores alone, too."""
    token_cpu_ms: float = 0.0
    """On each token of an answer, from the step's end to its client."""
    background_cores: float = 0.0
    """Always busy, with reports and heartbeats."""
    crowding: float = 0.0
    """How much longer everything takes while no core is free, beside waiting: what cores share."""
    contention: float = 0.0
    """How much longer what surrounds a request and a hand-over take while all cores are busy: they are many short turns
    of several processes, and each has to be woken."""

    def step_ms(self, tokens: int, context: float, prefix: float = 0.0) -> float:
        """Of one step."""
        own = self.base_ms + self.per_token_ms * tokens
        return own + self.per_context_ms * context + self.per_prefix_ms * prefix

    @property
    def prefill_tokens_per_s(self) -> float:
        """In full steps: what capacity means."""
        return 1e3 * self.max_batch_tokens / self.step_ms(self.max_batch_tokens, 0)


@dataclass(frozen=True, slots=True)
class Setting:
    """A cluster of equal workers and one router."""

    prefill: int = 8
    decode: int = 4
    machine: Machine = Machine()
    cache_blocks: int = 1000
    """Blocks that a worker keeps of sequences that have ended."""
    block_tokens: int = TRACE_BLOCK_TOKENS
    seed: int = 0
    noise: float = 0.05
    """Standard deviation of a step's time, relative."""
    pool: bool = False
    """Whether a worker's cache takes its memory from `Machine.kv_tokens`, as sequences do, and keeps all their output.
    Else it has `cache_blocks` beside it, and keeps output that the trace names."""
    slots: int = 0
    """Cores that all workers, the router and the clients share; 0: each worker has a machine of its own."""
    interval_s: float = 0.05
    """Least time between two reports of a worker."""
    delay_s: float = 0.001
    """Of one message."""
    max_inflight: int = 1 << 20
    """Requests that the router admits at once."""
    max_tokens: int = 2048
    """What every client asks for: the router does not know how long an answer will be."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field and the limit."""
        limits = {"prefill": 0, "decode": 1, "cache_blocks": 0, "block_tokens": 1, "slots": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool, 0 without one."""
        return self.machine.kv_tokens // self.block_tokens if self.pool else 0


@dataclass(frozen=True, slots=True)
class Objective:
    """A service level, milliseconds."""

    ttft_ms: float = 5000.0
    tpot_ms: float = 50.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a load."""

    at: float
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[BlockHash, ...]
    """Of the prompt's whole blocks."""
    output_hashes: tuple[BlockHash, ...] = ()
    """Of the whole blocks after those that the answer leaves in a cache; its last token has no KV."""
    reported: bool = True
    """Whether it counts; earlier ones fill the caches."""


def arrivals(
    entries: Sequence[TraceEntry], skip: int, load: float, setting: Setting, scale: float = 1.0
) -> list[Arrival]:
    """A trace with its time compressed, so that its prompts are `load` times what the prefill workers can compute.

    Nothing is assumed of caches. A load of 0 leaves the trace its own times. skip: requests that are not reported; the
    load is measured on the others. A cluster without prefill workers is given what its decode workers could compute.
    scale: factor of all lengths, and of the trace's blocks. Raises ValueError.
    """
    if not 0 <= skip < len(entries):
        raise ValueError(f"{skip} requests are skipped of {len(entries)}; at least one must be left")
    counted = entries[skip:]
    span_s = (counted[-1].timestamp_ms - counted[0].timestamp_ms) / 1e3
    if load < 0 or span_s <= 0:
        raise ValueError(f"load is {load:g}, at least 0 is needed; the trace takes {span_s:g} s, which must be above 0")
    tokens = sum(entry.input_length for entry in counted) * scale
    capacity = (setting.prefill or setting.decode) * setting.machine.prefill_tokens_per_s
    speed = load * capacity / (tokens / span_s) if load else 1.0
    start, parts = entries[0].timestamp_ms, blocks_in(setting.block_tokens, scale)
    return [
        _arrival(number, entry, (entry.timestamp_ms - start) / 1e3 / speed, scale, parts, setting, number >= skip)
        for number, entry in enumerate(entries)
    ]


def blocks_in(block_tokens: int, scale: float) -> int:
    """How many blocks one block of the trace is. Raises ValueError unless it is a whole number of them."""
    trace_block = TRACE_BLOCK_TOKENS * scale
    if scale <= 0 or trace_block % block_tokens:
        raise ValueError(
            f"block_tokens is {block_tokens}; the trace's blocks of {trace_block:g} tokens must be a multiple of it"
        )
    return int(trace_block // block_tokens)


def _arrival(
    number: int, entry: TraceEntry, at: float, scale: float, parts: int, setting: Setting, reported: bool
) -> Arrival:
    prompt, output = max(1, round(entry.input_length * scale)), max(1, round(entry.output_length * scale))
    whole, kept = prompt // setting.block_tokens, (prompt + output - 1) // setting.block_tokens
    named = _names(entry.hash_ids, parts, whole)
    if entry.output_hash_ids:
        after = _names((*entry.hash_ids, *entry.output_hash_ids), parts, kept)[whole:]
    else:
        after = [f"{number} {place}" for place in range(whole, kept)] if setting.pool else []
    return Arrival(
        at, prompt, output, tuple(map(_hash, named)), tuple(map(_hash, after)) if len(named) == whole else (), reported
    )


def _names(ids: Sequence[int], parts: int, count: int) -> list[str]:
    """Of the first blocks: the trace's blocks, or what they are cut into."""
    if parts == 1:
        return [str(name) for name in ids[:count]]
    return [f"{name}.{part}" for name in ids[: -(-count // parts)] for part in range(parts)][:count]


def _hash(name: str) -> BlockHash:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def working_set(entries: Sequence[TraceEntry]) -> int:
    """Different blocks in a trace."""
    return len({name for entry in entries for name in entry.hash_ids})


def ideal_share(load: Sequence[Arrival], block_tokens: int) -> float:
    """Share of the reported prompt tokens that one infinite cache, filled as soon as a prompt arrives, would have."""
    seen: set[BlockHash] = set()
    hits = tokens = 0
    for arrival in load:
        known = next((i for i, block in enumerate(arrival.hashes) if block not in seen), len(arrival.hashes))
        seen.update(arrival.hashes)
        if arrival.reported:
            hits += min(known * block_tokens, arrival.prompt_tokens - 1)
            tokens += arrival.prompt_tokens
    return hits / tokens if tokens else 0.0
