"""What policies see of the fleet: immutable views of workers, with load that their last status does not include yet."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum

from tandem.cluster import Incarnation, Status, WorkerInfo


@dataclass(frozen=True, slots=True)
class Load:
    """What one request adds to a worker, until a status of the worker includes it."""

    sequences: int = 0
    prefill_tokens: int = 0
    """Prompt tokens to compute there."""
    kv_tokens: int = 0
    """Tokens of KV it will take up there."""

    def __add__(self, other: Load) -> Load:
        return Load(
            self.sequences + other.sequences,
            self.prefill_tokens + other.prefill_tokens,
            self.kv_tokens + other.kv_tokens,
        )

    def negated(self) -> Load:
        """What takes this load away again."""
        return Load(-self.sequences, -self.prefill_tokens, -self.kv_tokens)


RECENT_S = 30.0
"""Time constant of what a worker did recently."""


def decayed(tokens: float, seconds: float) -> float:
    """What is left of recent work so much later."""
    return tokens * math.exp(-max(seconds, 0.0) / RECENT_S)


class Column(IntEnum):
    """Where a number of a worker is in `WorkerView.row`; what was not measured is not a number."""

    QUEUED_TOKENS = 0
    SEQUENCES = 1
    FREE_TOKENS = 2
    BASE_MS = 3
    PER_TOKEN_MS = 4
    MOVE_BYTES_PER_MS = 5
    MAX_BATCH_TOKENS = 6
    CAPACITY_TOKENS = 7
    RECENT_TOKENS = 8
    RECENT_AT = 9
    SINCE = 10
    NAME = 11
    """A number that stands for its name, below 2**32."""


ROW = f"{len(Column)}d"


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker: what it is, what it last reported, and what this router sent it since."""

    info: WorkerInfo
    status: Status
    pending: Load = Load()
    draining: bool = False
    """Takes no new requests: it says so, or it said goodbye."""
    recent_tokens: float = 0.0
    """Prompt tokens that this router sent it to compute, each counting less as time goes by; as of `recent_at`."""
    recent_at: float = 0.0
    since: float = 0.0
    """When this router first knew it."""
    row: bytes = field(init=False, repr=False, compare=False)
    """Its numbers in the order of `Column`, as doubles, for policies that weigh a thousand workers at once."""

    def __post_init__(self) -> None:
        timing = self.status.timing
        row = struct.pack(
            ROW,
            self.queued_tokens,
            self.sequences,
            self.free_tokens,
            math.nan if timing is None else timing.base_ms,
            math.nan if timing is None else timing.per_token_ms,
            self.status.move_bytes_per_ms or math.nan,
            self.info.max_batch_tokens,
            self.info.capacity_tokens,
            self.recent_tokens,
            self.recent_at,
            self.since,
            zlib.crc32(self.incarnation.encode()),
        )
        object.__setattr__(self, "row", row)

    @property
    def incarnation(self) -> Incarnation:
        """Which worker."""
        return self.info.incarnation

    @property
    def sequences(self) -> int:
        """Sequences in its batch, waiting, and on the way."""
        return max(self.status.running + self.status.waiting + self.pending.sequences, 0)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens to be computed there, and on the way."""
        return max(self.status.queued_tokens + self.pending.prefill_tokens, 0)

    @property
    def free_tokens(self) -> int:
        """Tokens of KV that still fit; negative when more was promised than there is."""
        return self.status.free_pages * self.info.page_size - self.pending.kv_tokens


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """All usable workers at one moment."""

    prefill: tuple[WorkerView, ...] = ()
    decode: tuple[WorkerView, ...] = ()

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the pages of all workers hold together."""
        return sum(view.info.capacity_tokens for view in (*self.prefill, *self.decode))

    def without(self, incarnations: Collection[Incarnation]) -> FleetSnapshot:
        """The same fleet without some workers: those that already refused a request."""
        return replace(self, prefill=_without(self.prefill, incarnations), decode=_without(self.decode, incarnations))


def _without(views: Iterable[WorkerView], incarnations: Collection[Incarnation]) -> tuple[WorkerView, ...]:
    return tuple(view for view in views if view.incarnation not in incarnations)
