"""What every policy takes and gives, and what they share: who may be chosen, what is cached, how ties are broken."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from router.workers.snapshot import FleetSnapshot, WorkerView
from tandem.cluster import Candidate, Incarnation, Plan
from tandem.errors import Unavailable
from tandem.kv import BLOCK_TOKENS

Matches = Mapping[Incarnation, int]
"""Per worker, the tokens at the prompt's front that are believed cached there."""

KEPT = 4
"""Prefill workers kept as alternatives for each decode worker, and decode workers kept in a plan: best first."""


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """What a policy may know of a request."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    choices: int = 1
    ordinal: int = 0
    """The router's running number of the request; round robin counts by it."""

    @property
    def computable(self) -> int:
        """Prompt tokens whose KV can be cached or handed over; the last one is always run by the decode worker."""
        return self.prompt_tokens - 1

    def cached_tokens(self, matches: Matches, view: WorkerView) -> int:
        """Prompt tokens believed cached on a worker."""
        return min(matches.get(view.incarnation, 0), self.computable)


class Policy(ABC):
    """Decides both ends of a request at once. Stateless: the same arguments give the same plan."""

    name: ClassVar[str]

    @abstractmethod
    def plan(self, request: RequestInfo, fleet: FleetSnapshot, matches: Matches, now: float) -> Plan:
        """Chooses a decode worker and a prefill worker or none. Raises Unavailable when no decode worker can be chosen.

        matches: what the prefix index and the memory of tails know. now: seconds, the clock of the fleet.
        """


def eligible(views: Sequence[WorkerView]) -> list[WorkerView]:
    """Workers that take new requests."""
    return [view for view in views if not view.draining]


def eligible_decode(fleet: FleetSnapshot) -> list[WorkerView]:
    """Decode workers that take new requests; raises Unavailable when there is none."""
    found = eligible(fleet.decode)
    if not found:
        what = "every decode worker is draining" if fleet.decode else "no decode worker is connected"
        raise Unavailable(f"{what}; try again later")
    return found


def tie_break(request_id: str, incarnation: Incarnation) -> int:
    """A number that orders equals differently for every request, and the same way on every router."""
    return zlib.crc32(incarnation.encode(), zlib.crc32(request_id.encode()))


def ranked(
    views: Iterable[WorkerView], request: RequestInfo, key: Callable[[WorkerView], tuple[float, ...]]
) -> list[WorkerView]:
    """The workers with the smallest key first, equals in an order of the request's own."""
    return sorted(views, key=lambda view: (key(view), tie_break(request.request_id, view.incarnation)))


def joint_plan(
    policy: str,
    request: RequestInfo,
    matches: Matches,
    decode: Sequence[WorkerView],
    prefill: Sequence[WorkerView],
    costs: Callable[[WorkerView, WorkerView | None], Mapping[str, float]],
) -> Plan:
    """A plan from two rankings: the best prefill worker whenever the best decode worker lacks a whole block, else none.

    decode, prefill: best first. costs: what the policy compared, for a pair; only kept for explanation.
    """
    candidates = []
    for view in decode[:KEPT]:
        cached = request.cached_tokens(matches, view)
        helpers: list[WorkerView | None] = [*prefill[:KEPT], None]
        if request.computable - cached < BLOCK_TOKENS:
            helpers = [None, *prefill[:KEPT]]
        candidates += [
            Candidate(
                decode=view.incarnation,
                prefill=None if helper is None else helper.incarnation,
                decode_cached=cached,
                prefill_cached=0 if helper is None else request.cached_tokens(matches, helper),
                costs=costs(view, helper),
            )
            for helper in helpers
        ]
    return Plan(tuple(candidates), policy)
