"""Whether a prefix should be copied to one more worker: a pure decision, in milliseconds.

A worker that has what everybody asks for is the one that everybody waits for. Whoever does not wait computes the prefix
again elsewhere, which takes time, too, and delays others there. A copy spares the lesser of both for each request that
comes within `HORIZON_S`; it is made when that is worth `MARGIN` times what it costs to move:

    rate x horizon x min(wait where it is - wait where it would be, computing it) > margin x move
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest

from router.policies.base import Matches, RequestInfo, tie_break
from router.policies.cost import DEFAULT_MOVE_BYTES_PER_MS, DEFAULT_TIMING, HAND_OVER_MS
from router.replication.heat import TAU_S
from router.workers.pairs import Pair
from router.workers.snapshot import RECENT_S, FleetSnapshot, WorkerView, decayed
from tandem.cluster import Candidate, Incarnation, StepTiming
from tandem.kv import BLOCK_TOKENS, Span

HORIZON_S = 10.0
"""A copy is expected to be of use for so long; popular prefixes live longer."""
MARGIN = 2.0
"""Times that a copy must be worth what it costs: rates and waits are estimates."""
LEAST_REQUESTS = 3.0
"""Requests lately, below which nothing is popular."""
LEAST_SAVED_MS = 5.0
"""A shorter wait is none."""
BUSIEST = 0.95
"""Share of its time that a worker is taken to be busy at most."""
WEIGHED = 4
"""Prefixes of one prompt that are looked at: those asked for most tokens of."""
LARGEST_SHARE = 0.25
"""Of a worker's pages, what one copy may take up."""

_Holding = list[tuple[WorkerView, int]]
"""Workers that are not draining, and the prompt's tokens that they hold."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A prefix that should be copied, and why."""

    source: Incarnation
    target: Incarnation
    blocks: int
    bytes: int
    terms: Mapping[str, float]
    """requests per second that ask for it; milliseconds: waits at its holders and at the target, what each of these
    requests is spared, what all of them are within the horizon, and what moving it costs."""

    @property
    def tokens(self) -> int:
        """In the prefix."""
        return self.blocks * BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class _Pace:
    """What a fleet's workers need, as they measured it."""

    timing: StepTiming
    bytes_per_ms: float

    @classmethod
    def of(cls, views: Sequence[WorkerView]) -> _Pace:
        timings = sorted((v.status.timing for v in views if v.status.timing is not None), key=lambda t: t.per_token_ms)
        rates = sorted(view.status.move_bytes_per_ms for view in views if view.status.move_bytes_per_ms)
        return cls(
            timings[len(timings) // 2] if timings else DEFAULT_TIMING,
            rates[len(rates) // 2] if rates else DEFAULT_MOVE_BYTES_PER_MS,
        )

    def compute_ms(self, view: WorkerView, tokens: float) -> float:
        """Prompt tokens in full steps."""
        steps = -(-tokens // view.info.max_batch_tokens)
        return float(steps * self.timing.base_ms + tokens * self.timing.per_token_ms)

    def move_ms(self, view: WorkerView, tokens: int) -> float:
        """A copy of so many tokens to it."""
        return HAND_OVER_MS + _size(view, tokens) / self.bytes_per_ms


class _Waits:
    """What requests wait at workers; each worker is looked at once, however many prefixes are weighed."""

    def __init__(self, pace: _Pace, name: str, now: float) -> None:
        self.pace = pace
        self._name = name
        self._now = now
        self._known: dict[Incarnation, tuple[float, float, int]] = {}

    def of(self, view: WorkerView, service_ms: float) -> tuple[float, int]:
        """What a request waits there: behind what is queued, or, if that is more, behind what usually is; and a draw.

        The latter by Pollaczek and Khinchine: requests of `service_ms` each that come at random.
        """
        known = self._known.get(view.incarnation)
        if known is None:
            known = self._known[view.incarnation] = self._look(view)
        queued, usual, draw = known
        return max(queued, usual * service_ms), draw

    def _look(self, view: WorkerView) -> tuple[float, float, int]:
        work = decayed(view.recent_tokens, self._now - view.recent_at) * self.pace.timing.per_token_ms
        load = min(work / (RECENT_S * 1e3), BUSIEST)
        queued = self.pace.compute_ms(view, view.queued_tokens)
        return queued, load / (2 * (1 - load)), tie_break(self._name, view.incarnation)


def wanted(
    request: RequestInfo,
    fleet: FleetSnapshot,
    matches: Matches,
    chosen: Candidate,
    counts: Mapping[int, float],
    broken: Collection[Pair],
    now: float,
) -> Replica | None:
    """The copy that is worth most after a request was sent to `chosen`; None when there is none worth making.

    counts: requests lately that began with so many of this one's blocks. The copy goes to a worker of the role that
    computes the prompt; where all of that role have the prefix, from a prefill worker to a decode worker.
    """
    computing = fleet.prefill if chosen.prefill is not None else fleet.decode
    prefill, decode = _holding(fleet.prefill, matches), _holding(fleet.decode, matches)
    ours = prefill if computing is fleet.prefill else decode
    longest = min(max((held for _, held in ours), default=0), request.computable) // BLOCK_TOKENS
    popular = [blocks for blocks, count in counts.items() if count >= LEAST_REQUESTS and blocks <= longest]
    if not popular:
        return None
    waits = _Waits(_Pace.of(computing), request.request_id, now)
    slowest = min((*computing, *fleet.decode), key=lambda view: view.info.max_batch_tokens)
    best: Replica | None = None
    for blocks in nlargest(WEIGHED, popular, key=lambda blocks: blocks * counts[blocks]):
        rate, tokens = counts[blocks] / TAU_S, blocks * BLOCK_TOKENS
        if rate * HORIZON_S * waits.pace.compute_ms(slowest, tokens) <= MARGIN * waits.pace.move_ms(slowest, tokens):
            continue
        found = _copy(request, ours, prefill, decode, blocks, rate, waits, broken)
        if found is not None and (best is None or _gain(found) > _gain(best)):
            best = found
    return best


def _holding(views: Iterable[WorkerView], matches: Matches) -> _Holding:
    return [(view, matches.get(view.incarnation, 0)) for view in views if not view.draining]


def _size(view: WorkerView, tokens: int) -> int:
    return view.info.layout.span_bytes(Span(0, tokens), tokens)


def _gain(replica: Replica) -> float:
    return replica.terms["worth"] - MARGIN * replica.terms["move"]


def _copy(
    request: RequestInfo,
    computing: _Holding,
    prefill: _Holding,
    decode: _Holding,
    blocks: int,
    rate: float,
    waits: _Waits,
    broken: Collection[Pair],
) -> Replica | None:
    """The copy of one prefix to the worker that would wait least."""
    tokens = blocks * BLOCK_TOKENS
    pace, holders = waits.pace, [view for view, held in computing if held >= tokens]
    service = pace.compute_ms(holders[0], request.computable - tokens)
    here = min(waits.of(view, service)[0] for view in holders)
    if here < LEAST_SAVED_MS:
        return None
    sources = [view for view, held in (*prefill, *decode) if held >= tokens]
    source = min(sources, key=lambda view: waits.of(view, service)[0])
    targets = _able(computing, tokens) or _able(decode, tokens)
    if broken:
        targets = [view for view in targets if (source.incarnation, view.incarnation) not in broken]
    if not targets:
        return None
    target = min(targets, key=lambda view: waits.of(view, service))
    there, recomputed = waits.of(target, service)[0], pace.compute_ms(target, tokens)
    saved = min(here - there, recomputed)
    worth, move = rate * HORIZON_S * saved, pace.move_ms(target, tokens)
    if saved < LEAST_SAVED_MS or worth <= MARGIN * move:
        return None
    terms = {
        "requests_per_s": rate, "wait": here, "wait_there": there,
        "saved": saved, "worth": worth, "move": move,
    }  # fmt: skip
    return Replica(source.incarnation, target.incarnation, blocks, _size(target, tokens), terms)


def _able(views: _Holding, tokens: int) -> list[WorkerView]:
    """Workers that lack a prefix and have room for it."""
    return [view for view, held in views if held < tokens <= LARGEST_SHARE * view.info.capacity_tokens]
