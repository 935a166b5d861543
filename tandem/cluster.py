"""The nouns of the cluster: who is there, what is reported, decided and leased. Standard library only."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from tandem.kv import BlockHash, KvLayout
from tandem.types import ModelInfo

Incarnation = str
"""32 hexadecimal digits a worker draws at start; a restarted worker is another worker."""


def new_id() -> str:
    """A fresh 128-bit id as 32 hexadecimal digits: incarnations, requests, tickets."""
    return secrets.token_hex(16)


class Role(Enum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker is: fixed for one incarnation."""

    incarnation: Incarnation
    role: Role
    address: str
    """host:port of its gRPC server."""
    model: ModelInfo
    layout: KvLayout
    kv_dtype: str
    page_size: int
    """Tokens in a page."""
    total_pages: int
    """Of the layer group that remembers most."""
    max_batch_tokens: int
    """The token budget of one step."""
    transport: str
    """KV backend in use: nixl, tcp or inproc."""
    metrics_port: int = 0
    """Port of its Prometheus page; 0 when it has none."""
    threads: int = 0
    """Compute threads it runs with."""
    pid: int = 0

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit into its pages. One sequence may have more, where all layers have windows."""
        return self.page_size * self.total_pages


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Coefficients of a worker's measured step time, milliseconds: `base + per_token * batch tokens`."""

    base_ms: float
    per_token_ms: float


EARLIER = "earlier"
"""Stands for the workers of pairs that are no longer told apart; no incarnation."""


@dataclass(frozen=True, slots=True)
class MoveStat:
    """What a decode worker received over one pair since it started."""

    sender: Incarnation
    receiver: Incarnation
    transport: str
    bytes: int = 0
    """KV bytes landed."""
    seconds: float = 0.0
    """Seconds with bytes under way."""
    tickets: int = 0
    """Hand-overs that landed something; one that goes on with another sender counts for each pair."""
    failures: int = 0
    """Hand-overs that this pair did not bring to their end."""

    def plus(self, other: MoveStat) -> MoveStat:
        """What both counted, as this pair's."""
        return replace(
            self,
            bytes=self.bytes + other.bytes,
            seconds=self.seconds + other.seconds,
            tickets=self.tickets + other.tickets,
            failures=self.failures + other.failures,
        )


@dataclass(frozen=True, slots=True)
class TenantUse:
    """What one tenant used of a worker through one router since the worker remembers it."""

    tenant: str
    router_id: str
    requests: int = 0
    """Admitted."""
    tokens: int = 0
    """Prompt tokens of these, and output tokens."""
    running: int = 0
    """Admitted and not yet ended."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a worker reports of itself, a few times a second and after every admission."""

    incarnation: Incarnation
    running: int = 0
    """Sequences in the batch."""
    waiting: int = 0
    """Sequences not yet in the batch, for whatever reason."""
    queued_tokens: int = 0
    """Prompt tokens waiting to be computed here."""
    free_pages: int = 0
    """Pages free or reclaimable from the prefix cache."""
    total_pages: int = 0
    timing: StepTiming | None = None
    """None until enough steps were measured."""
    move_bytes_per_ms: float = 0.0
    """Measured rate of this worker's KV writes to others; 0 until one was measured."""
    dispatches: Mapping[str, int] = field(default_factory=dict)
    """Per router id, the sequence number of the last dispatch this status includes: load is never counted twice."""
    draining: bool = False
    moves: tuple[MoveStat, ...] = ()
    tenants: tuple[TenantUse, ...] = ()
    """Of tenants that had a request here lately, so that all routers keep one quota."""


class EventKind(Enum):
    """What happened to blocks in a worker's cache."""

    PROMISED = "promised"
    """Accepted, not yet stored."""
    STORED = "stored"
    EVICTED = "evicted"
    WITHDRAWN = "withdrawn"
    """A promise that will not be kept."""


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """Blocks a worker promised, stored, evicted or withdrew; `hashes` are consecutive after `parent`."""

    kind: EventKind
    hashes: tuple[BlockHash, ...]
    parent: BlockHash = b""
    """Hash before the first one; empty at the root. Unused for EVICTED."""
    tier: str = "device"


@dataclass(frozen=True, slots=True)
class WorkerUpdate:
    """One message of a worker's subscription. Sequence numbers are consecutive within an incarnation."""

    incarnation: Incarnation
    sequence: int
    events: tuple[CacheEvent, ...] = ()
    status: Status | None = None
    snapshot: bool = False
    """The events are the whole cache: forget what was known before."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pair that a policy weighed. Costs are milliseconds; a plan keeps them so that it can be explained."""

    decode: Incarnation
    prefill: Incarnation | None
    decode_cached: int
    """Prompt tokens the index believes the decode worker has."""
    prefill_cached: int
    costs: Mapping[str, float]

    @property
    def cost(self) -> float:
        """The sum that is compared."""
        return sum(self.costs.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """The router's decision for one request: the chosen pair, then the next best, all with their costs."""

    candidates: tuple[Candidate, ...]
    """Best first, never empty."""
    policy: str

    @property
    def decode(self) -> Incarnation:
        """The decode worker that owns the request."""
        return self.candidates[0].decode

    @property
    def prefill(self) -> Incarnation | None:
        """The prefill worker, or None: the decode worker prefills locally."""
        return self.candidates[0].prefill

    @property
    def expected_cached(self) -> int:
        """Tokens the plan assumes the decode worker has; a larger real miss makes it take a prefill alternative."""
        return self.candidates[0].decode_cached

    @property
    def prefill_alternatives(self) -> tuple[Incarnation, ...]:
        """Prefill workers to try for the chosen decode worker, best first, each once."""
        names = (c.prefill for c in self.candidates if c.decode == self.decode and c.prefill is not None)
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class Ticket:
    """Names one KV hand-over. Leased: void when either incarnation ends or a deadline passes."""

    ticket_id: str
    request_id: str
    attempt: int
    sender: Incarnation
    receiver: Incarnation
    layout_digest: str
    queue_deadline_s: float
    """Seconds the sender may let it wait before the first span."""
    transfer_deadline_s: float
    """Seconds between grant and landing."""
    tenant: str = ""
    """Whose prompt it is: the sender's queue is shared fairly, too."""
    traceparent: str = ""
    """What the sender's spans belong to (W3C Trace Context); empty where the request is not traced."""
    tracestate: str = ""


class TicketWatch:
    """Is told of one ticket at its sender, for tracing; this one cares for nothing."""

    def accepted(self, cached: int) -> None:
        """The source has taken it; so many of its tokens were cached."""

    def wrote(self, seconds: float, length: int) -> None:
        """A write of so many bytes has ended, that long after it was posted."""

    def ended(self, error: str) -> None:
        """Called once, at the ticket's end. error: empty when it did not fail."""


UNWATCHED = TicketWatch()
