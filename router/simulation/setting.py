"""What is simulated: machines, cluster and load. Times are seconds unless a name says milliseconds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.kv import BlockHash
from tandem.traces import TRACE_BLOCK_TOKENS, TraceEntry


@dataclass(frozen=True, slots=True)
class Machine:
    """One worker's hardware as fitted coefficients. A step takes `base + per_token * tokens + per_context * context`.

    tokens: of prompts and of output, in one batch. context: tokens that the batch's decoding sequences look back on.
    """

    base_ms: float = 8.0
    per_token_ms: float = 0.05
    per_context_ms: float = 4e-5
    max_batch_tokens: int = 8192
    max_running: int = 256
    kv_bytes: int = 131_072
    """Of one token: 128 KiB is a model of 8 billion parameters with 8 KV heads."""
    link_bytes_per_ms: float = 25e6
    """What a prefill worker writes to others: 25 GB/s."""
    hand_over_ms: float = 3.0
    """A hand-over's fixed price."""
    kv_tokens: int = 2_000_000
    """Tokens of sequences under way, beside the cache."""

    def step_ms(self, tokens: int, context: float) -> float:
        """Of one step."""
        return self.base_ms + self.per_token_ms * tokens + self.per_context_ms * context

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
        for name, least in (("prefill", 0), ("decode", 1), ("cache_blocks", 0), ("block_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


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
    reported: bool = True
    """Whether it counts; earlier ones fill the caches."""


def arrivals(entries: Sequence[TraceEntry], skip: int, load: float, setting: Setting) -> list[Arrival]:
    """A trace with its time compressed, so that its prompts are `load` times what the prefill workers can compute.

    Nothing is assumed of caches. skip: requests that are not reported; the load is measured on the others. A cluster
    without prefill workers is given what its decode workers could compute. Raises ValueError.
    """
    if not 0 <= skip < len(entries):
        raise ValueError(f"{skip} requests are skipped of {len(entries)}; at least one must be left")
    counted = entries[skip:]
    span_s = (counted[-1].timestamp_ms - counted[0].timestamp_ms) / 1e3
    if load <= 0 or span_s <= 0:
        raise ValueError(f"load is {load:g} and the trace takes {span_s:g} s; both must be above 0")
    tokens = sum(entry.input_length for entry in counted)
    capacity = (setting.prefill or setting.decode) * setting.machine.prefill_tokens_per_s
    speed = load * capacity / (tokens / span_s)
    start = entries[0].timestamp_ms
    return [
        Arrival(
            at=(entry.timestamp_ms - start) / 1e3 / speed,
            prompt_tokens=entry.input_length,
            output_tokens=entry.output_length,
            hashes=tuple(_hash(name) for name in entry.hash_ids[: entry.input_length // setting.block_tokens]),
            reported=number >= skip,
        )
        for number, entry in enumerate(entries)
    ]


def _hash(name: int) -> BlockHash:
    return hashlib.blake2b(str(name).encode(), digest_size=16).digest()


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
