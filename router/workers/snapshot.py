"""What policies see of the fleet: immutable views of workers, with load that their last status does not include yet."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker: what it is, what it last reported, and what this router sent it since."""

    info: WorkerInfo
    status: Status
    pending: Load = Load()
    draining: bool = False
    """Takes no new requests: it says so, or it said goodbye."""

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
