"""One simulated request, from its arrival to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.simulation.setting import Arrival
from router.workers.load import Booking
from tandem.cluster import Incarnation
from tandem.kv import BlockHash


@dataclass(slots=True, eq=False)
class Flight:
    """What happens to a request. Times are seconds; -1 until it happened."""

    number: int
    arrival: Arrival
    now: Callable[[], float]
    on_first: Callable[[Flight], None]
    on_end: Callable[[Flight], None]
    decode: Incarnation = ""
    prefill: Incarnation | None = None
    alternative: Incarnation | None = None
    """A prefill worker for when the decode worker's cache is not what the plan counted on."""
    expected_cached: int = 0
    dispatch: int = 0
    """The number of its booking on the decode worker."""
    bookings: tuple[Booking | None, Booking | None] = (None, None)
    local: bool = False
    """Whether the decode worker computed the prompt."""
    decode_cached: int = 0
    prefill_cached: int = 0
    held: int = 0
    """Blocks that it uses in the decode worker's cache from its admission on."""
    private: int = 0
    """Blocks reserved on the decode worker for what is not in the cache yet."""
    computed: int = 0
    """Prompt tokens computed for it."""
    arrived_at: float = -1.0
    first_at: float = -1.0
    ended_at: float = -1.0
    rejected: bool = False

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        """Of the prompt's whole blocks."""
        return self.arrival.hashes

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self.arrival.prompt_tokens

    @property
    def output_tokens(self) -> int:
        """Length of the answer."""
        return self.arrival.output_tokens

    @property
    def kv_tokens(self) -> int:
        """Memory it needs on the decode worker."""
        return self.prompt_tokens + self.output_tokens

    @property
    def cached_tokens(self) -> int:
        """What a client is told: the better of both workers' caches.

        More than was not computed: a prefill worker that lacks what the decode worker has computes it all the same.
        """
        if self.local:
            return self.prompt_tokens - self.computed
        return max(self.decode_cached, self.prefill_cached)

    @property
    def ttft_s(self) -> float:
        """From its arrival to its first token."""
        return self.first_at - self.arrived_at

    @property
    def tpot_s(self) -> float:
        """For each token after the first; 0 if there is none."""
        return (self.ended_at - self.first_at) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    def first(self) -> None:
        """Its first token has been sampled."""
        self.first_at = self.now()
        self.on_first(self)

    def end(self) -> None:
        """Its last token has been sampled."""
        self.ended_at = self.now()
        self.on_end(self)
