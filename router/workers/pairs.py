"""Which prefill worker does not reach which decode worker: pairs whose hand-overs fail are avoided for a while.

Decode workers count failed hand-overs by pair and report them; both workers may be sound, and only the way between them
broken. A pair that failed is tried again by a request once its time is over, and then again after twice as long.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from tandem.cluster import EARLIER, Candidate, Incarnation, MoveStat, Plan, Status

FIRST_S = 2.0
"""Seconds for which a pair is avoided after its first failure; doubled by each that follows."""
LONGEST_S = 60.0
PENALTY_MS = 60_000.0
"""Shown as the cost term `pair`."""

Pair = tuple[Incarnation, Incarnation]
"""(prefill, decode)"""


@dataclass(slots=True)
class _Health:
    failures: int
    tickets: int
    strikes: int = 0
    until: float = float("-inf")


class PairHealth:
    """What statuses tell of pairs. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._receivers: dict[Incarnation, dict[Incarnation, _Health]] = {}

    def observe(self, status: Status) -> None:
        """A decode worker's counts. What it counted before this router knew it is history."""
        known = self._receivers.get(status.incarnation)
        pairs: dict[Incarnation, _Health] = {}
        self._receivers[status.incarnation] = pairs  # without senders that it no longer tells apart
        for sender, (failures, tickets) in _by_sender(status.moves).items():
            health = _Health(failures, tickets) if known is None else known.get(sender) or _Health(0, 0)
            pairs[sender] = health
            if failures > health.failures:
                health.strikes += 1
                health.until = self._clock() + min(FIRST_S * 2.0 ** (health.strikes - 1), LONGEST_S)
            elif tickets > health.tickets:
                health.strikes, health.until = 0, float("-inf")
            health.failures, health.tickets = failures, tickets

    def broken(self) -> frozenset[Pair]:
        """Pairs to avoid now."""
        now = self._clock()
        return frozenset(
            (sender, receiver)
            for receiver, pairs in self._receivers.items()
            for sender, health in pairs.items()
            if health.until > now
        )

    def forget(self, incarnation: Incarnation) -> None:
        """A worker is gone."""
        self._receivers.pop(incarnation, None)
        for pairs in self._receivers.values():
            pairs.pop(incarnation, None)


def _by_sender(moves: Collection[MoveStat]) -> dict[Incarnation, tuple[int, int]]:
    found: dict[Incarnation, tuple[int, int]] = {}
    for move in (each for each in moves if each.sender != EARLIER):
        failures, tickets = found.get(move.sender, (0, 0))
        found[move.sender] = failures + move.failures, tickets + move.tickets
    return found


def avoiding(plan: Plan, broken: Collection[Pair]) -> Plan:
    """The plan with broken pairs last, whatever policy made it; they stay, because the others may be gone by then."""
    if not any((pair.prefill, pair.decode) in broken for pair in plan.candidates):
        return plan
    sound, rest = [], []
    for pair in plan.candidates:
        if (pair.prefill, pair.decode) in broken:
            rest.append(_penalised(pair))
        else:
            sound.append(pair)
    return replace(plan, candidates=(*sound, *rest))


def _penalised(pair: Candidate) -> Candidate:
    return replace(pair, costs={**pair.costs, "pair": PENALTY_MS})
