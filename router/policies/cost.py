"""The default policy: the pair with the least estimated cost in milliseconds.

    queue(P) + prefill(uncached tokens on P) + others(P) + recent(P)
        + move(bytes not on D) + admission wait(D) + slowdown this adds to D's batch

beside the decode-only alternative, where D's own queue and prefill take P's place and prefilling slows D's batch down.
All terms are milliseconds of this request or of requests it delays, so they can be added; what holds up streams under
way weighs less. Coefficients are what workers measured, smoothed over the fleet; before any has measured, the defaults
below. Joint cost routing after Mooncake (Qin et al. 2024) and Dynamo, with measured times in place of weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.policies.base import KEPT, Matches, Policy, RequestInfo, eligible, eligible_decode, tie_break
from router.workers.snapshot import RECENT_S, Column, FleetSnapshot, WorkerView
from tandem.cluster import Candidate, Plan, StepTiming
from tandem.kv import Span

DEFAULT_TIMING = StepTiming(base_ms=5.0, per_token_ms=0.1)
"""Until any worker has measured its steps: a small model on a few CPU cores."""
DEFAULT_MOVE_BYTES_PER_MS = 200_000.0
"""Until any hand-over was measured: 200 MB/s, a slow TCP link."""
HAND_OVER_MS = 3.0
"""A hand-over's fixed price: two control messages, a grant, the landing copy and its digest."""
OUTLIER = 3.0
"""A worker that measures this many times more or less than the fleet's median is believed to differ."""
TYPICAL_DECODES = 64
"""Tokens of a step by which decode workers are compared; prefill workers are by full steps."""
EXPECTED_OUTPUT = 128
"""Output tokens assumed of a request that allows more: most answers end before their limit."""
PAUSE = 0.25
"""Weight of a millisecond for which a prompt holds up streams under way, beside one before this request's first token.
At 1, prompts queue at a prefill worker while decode workers idle; measured (docs/log.md), 0.25 shortens both waits."""
OTHERS = 8.0
"""Weight of the requests that a prompt's computing delays, whoever comes after it. Fitted by simulation on the first
half of a trace (docs/routing.md): without it prompts are computed again to avoid short queues, and that work delays
everybody; from 3 to 10 the results hardly change."""
RECENT = 0.05
"""Weight of the work that a worker got recently, beside work that waits there now. It levels what queues are too short
to show, caches included; any small weight does where there is enough to do (docs/routing.md). A router that has seen
only a part of the time constant gives it in proportion more: differences have not had the time to grow."""
BUSY = 0.15
"""Share of their time that workers computed prompts lately, below which that weight grows in proportion: computing in
an idle cluster delays nobody, and to follow prefixes there would leave most caches empty."""
IDLE = 20.0
"""How many times at most it grows."""
SLOW_START_S = 10.0
"""A worker is a newcomer for so long."""
SPREAD = np.uint64(0x9E3779B1)
"""An odd number near the golden ratio of 2**32: multiplying by it scatters numbers (Knuth)."""
RESOLUTION_MS = 1e-3
"""Costs closer than this are equal."""

Numbers = NDArray[np.float64]


class CostPolicy(Policy):
    """Least estimated cost. Equal costs are ordered by a hash of the request, so that routers do not herd."""

    name = "cost"

    def plan(self, request: RequestInfo, fleet: FleetSnapshot, matches: Matches, now: float) -> Plan:
        """See the module."""
        decode = _Group(eligible_decode(fleet), request, matches)
        prefill = _Group(eligible(fleet.prefill), request, matches)
        model = _Coefficients(prefill, decode)
        recent = _recent(prefill, decode, model, now)
        helpers = _helpers(request, prefill, model, recent[0], now)
        shared = _decode_terms(request, decode, model)
        local = _local_terms(request, decode, model, recent[1], now)
        missing_bytes = _missing_bytes(request, decode)
        moves = [np.where(missing_bytes > 0, HAND_OVER_MS + missing_bytes / helper.rate, 0.0) for helper in helpers]
        best = _total(local)
        for helper, move in zip(helpers, moves, strict=True):
            best = np.minimum(best, helper.cost + move)
        pairs = []
        for place in _smallest(best + _total(shared), KEPT, request, decode):
            terms = {name: float(values[place]) for name, values in shared.items()}
            own = {name: float(values[place]) for name, values in local.items()}
            pairs.append(_candidate(request, decode, place, None, own, terms))
            for helper, move in zip(helpers, moves, strict=True):
                own = {**helper.terms, "move": float(move[place])}
                pairs.append(_candidate(request, decode, place, (prefill, helper), own, terms))
        pairs.sort(key=lambda pair: _order(request, pair))
        return Plan(tuple(pairs), self.name)


TERMS = ("queue", "prefill", "others", "recent", "move", "admission", "slowdown")


class _Helper(NamedTuple):
    place: int
    cost: float
    rate: float
    terms: dict[str, float]


class _Group:
    """Workers of one role as columns."""

    def __init__(self, views: Sequence[WorkerView], request: RequestInfo, matches: Matches) -> None:
        self.views = views
        self.table: Numbers = np.frombuffer(b"".join([view.row for view in views])).reshape(len(views), len(Column))
        known = [matches.get(view.info.incarnation, 0) for view in views]
        self.cached: Numbers = np.minimum(np.array(known, dtype=np.float64), request.computable)

    def column(self, column: Column) -> Numbers:
        found: Numbers = self.table[:, column]
        return found


def _total(terms: dict[str, Numbers]) -> Numbers:
    total: Numbers = np.sum(list(terms.values()), axis=0)
    return total


def _candidate(
    request: RequestInfo,
    decode: _Group,
    place: int,
    helper: tuple[_Group, _Helper] | None,
    first: dict[str, float],
    second: dict[str, float],
) -> Candidate:
    """A pair with its costs: those of who computes the prompt, and of the decode worker whoever does."""
    return Candidate(
        decode=decode.views[place].incarnation,
        prefill=None if helper is None else helper[0].views[helper[1].place].incarnation,
        decode_cached=int(decode.cached[place]),
        prefill_cached=0 if helper is None else int(helper[0].cached[helper[1].place]),
        costs={name: first.get(name, 0.0) + second.get(name, 0.0) for name in TERMS},
    )


def _order(request: RequestInfo, pair: Candidate) -> tuple[float, bool, int, int]:
    return (
        round(pair.cost / RESOLUTION_MS),
        pair.prefill is not None,
        tie_break(request.request_id, pair.decode),
        tie_break(request.request_id, pair.prefill or ""),
    )


def _smallest(costs: Numbers, count: int, request: RequestInfo, group: _Group) -> list[int]:
    """Places of the smallest, best first; equals in an order of the request's own."""
    rounded = np.round(costs / RESOLUTION_MS)
    limit = np.inf if len(rounded) <= count else np.partition(rounded, count - 1)[count - 1]
    places = np.flatnonzero(rounded <= limit)
    names = group.column(Column.NAME)[places].astype(np.uint64)
    drawn = (names ^ np.uint64(zlib.crc32(request.request_id.encode()))) * SPREAD & np.uint64(0xFFFFFFFF)
    found: list[int] = places[np.lexsort((drawn, rounded[places]))][:count].tolist()
    return found


class _Coefficients:
    """Measured coefficients: a role's typical ones, and a worker's own where it is clearly another kind of machine.

    Two equal workers never measure the same: taken at their word, noise would outweigh a cached prefix. The roles are
    kept apart because their steps are: a decode worker's time for one more token is mostly that of the context it looks
    back on, unless it has just computed a prompt. Where there are prefill workers, what a prompt's token takes is
    therefore what they measured, and decode workers are taken to be alike.
    """

    def __init__(self, prefill: _Group, decode: _Group) -> None:
        self._timings = {
            id(prefill): _Timing(prefill, prefill.column(Column.MAX_BATCH_TOKENS)),
            id(decode): _Timing(decode, np.float64(TYPICAL_DECODES)),
        }
        self._base, self._per_token = self._timings[id(prefill if prefill.views else decode)].typical
        if prefill.views:
            self._timings[id(decode)].pace = np.ones(len(decode.views))
        self._rate = _typical(prefill.column(Column.MOVE_BYTES_PER_MS), DEFAULT_MOVE_BYTES_PER_MS)

    def timing(self, group: _Group) -> tuple[Numbers, Numbers]:
        """Base and milliseconds a token of each worker's own steps."""
        timing = self._timings[id(group)]
        return timing.pace * timing.typical[0], timing.pace * timing.typical[1]

    def rates(self, group: _Group) -> Numbers:
        """Bytes a millisecond that each worker writes."""
        own = group.column(Column.MOVE_BYTES_PER_MS)
        return np.where(_differs(own, self._rate), own, self._rate)

    def token_ms(self, group: _Group) -> Numbers:
        """Time for one token of a prompt."""
        return self._timings[id(group)].pace * self._per_token

    def prefill_ms(self, group: _Group, tokens: Numbers) -> Numbers:
        """Time to compute so many prompt tokens in full steps."""
        steps = np.ceil(tokens / group.column(Column.MAX_BATCH_TOKENS))
        found: Numbers = self._timings[id(group)].pace * (steps * self._base + tokens * self._per_token)
        return found


def _start(group: _Group, now: float) -> Numbers:
    """How many times longer a newcomer is taken to need: twice at first, as much as the others after SLOW_START_S.

    Its caches are cold in ways that nobody reports. Where most have just begun, nobody is a newcomer.
    """
    age = now - group.column(Column.SINCE)
    if not len(age) or float(np.median(age)) < SLOW_START_S:
        return np.ones(len(age))
    found: Numbers = 1.0 + np.clip(1.0 - age / SLOW_START_S, 0.0, 1.0)
    return found


class _Timing:
    """Of one role: its typical coefficients, and each worker's pace, how many times longer a step of `tokens` takes."""

    def __init__(self, group: _Group, tokens: Numbers | np.float64) -> None:
        base, per_token = group.column(Column.BASE_MS), group.column(Column.PER_TOKEN_MS)
        self.typical = (_typical(base, DEFAULT_TIMING.base_ms), _typical(per_token, DEFAULT_TIMING.per_token_ms))
        step = self.typical[0] + tokens * self.typical[1]
        own = base + tokens * per_token
        self.pace: Numbers = np.where(_differs(own, step), own / step, 1.0)


def _typical(values: Numbers, default: float) -> float:
    measured = values[~np.isnan(values)]
    return float(np.sort(measured)[len(measured) // 2]) if len(measured) else default


def _differs(own: Numbers, typical: Numbers | float) -> NDArray[np.bool_]:
    """False where nothing was measured."""
    return (own < typical / OUTLIER) | (own > typical * OUTLIER)


def _recent(prefill: _Group, decode: _Group, model: _Coefficients, now: float) -> list[Numbers]:
    """What the work that it got recently, above the least, adds to the cost of each worker, by role."""
    work = []
    for group in (prefill, decode):
        age = np.maximum(now - group.column(Column.RECENT_AT), 0.0)
        work.append(group.column(Column.RECENT_TOKENS) * np.exp(-age / RECENT_S) * model.token_ms(group))
    # A decode worker has too much of it when it computed more than a prefill worker did.
    first = work[0 if prefill.views else 1]
    # Who has known the workers for a shorter time than work counts has seen a part of it: a router that just began.
    known_s = now - min(group.column(Column.SINCE).min(initial=now) for group in (prefill, decode))
    seen = max(-np.expm1(-known_s / RECENT_S), 1 / IDLE)
    busy = (work[0].sum() + work[1].sum()) / (len(first) * RECENT_S * 1e3 * seen)
    weight = RECENT * min(IDLE, max(1 / seen, BUSY / busy if busy else IDLE))
    return [weight * np.maximum(each - first.min(), 0.0) for each in work]


def _helpers(request: RequestInfo, group: _Group, model: _Coefficients, recent: Numbers, now: float) -> list[_Helper]:
    """The best prefill workers. The pair's terms add up, so the same ones are best for every decode worker."""
    if not group.views:
        return []
    terms, rates = _computing(request, group, model, recent, now), model.rates(group)
    cost = _total(terms)
    return [
        _Helper(at, float(cost[at]), float(rates[at]), {name: float(each[at]) for name, each in terms.items()})
        for at in _smallest(cost, KEPT, request, group)
    ]


def _computing(
    request: RequestInfo, group: _Group, model: _Coefficients, recent: Numbers, now: float
) -> dict[str, Numbers]:
    """What it costs that a worker computes the prompt, whatever its role."""
    computed, start = model.prefill_ms(group, request.computable - group.cached), _start(group, now)
    return {
        "queue": start * model.prefill_ms(group, group.column(Column.QUEUED_TOKENS)),
        "prefill": start * computed,
        "others": OTHERS * computed,
        "recent": recent,
    }


def _output(request: RequestInfo) -> int:
    return request.choices * min(request.max_tokens, EXPECTED_OUTPUT)


def _decode_terms(request: RequestInfo, group: _Group, model: _Coefficients) -> dict[str, Numbers]:
    """What a decode worker costs wherever the prompt is computed."""
    base, per_token = model.timing(group)
    sequences = group.column(Column.SEQUENCES)
    free = group.column(Column.FREE_TOKENS)
    # The sequences there end, and free their memory, over about EXPECTED_OUTPUT steps.
    short = np.maximum(request.prompt_tokens + _output(request) - free, 0.0)
    used = np.maximum(group.column(Column.CAPACITY_TOKENS) - free, 1.0)
    step_ms = base + np.maximum(sequences, 1.0) * per_token
    return {
        "admission": EXPECTED_OUTPUT * step_ms * short / used,
        "slowdown": sequences * per_token * _output(request),
    }


def _local_terms(
    request: RequestInfo, group: _Group, model: _Coefficients, recent: Numbers, now: float
) -> dict[str, Numbers]:
    """What it costs that the decode worker computes the prompt itself."""
    # Every sequence there waits for what is computed beside it. Prefilling counts for one sequence at least: a decode
    # worker idle now takes the next request in a moment; a prefill worker has nothing else to do.
    held_up = PAUSE * np.maximum(group.column(Column.SEQUENCES), 1.0)
    here = model.prefill_ms(group, request.computable - group.cached)
    return {**_computing(request, group, model, recent, now), "slowdown": held_up * here}


def _missing_bytes(request: RequestInfo, decode: _Group) -> Numbers:
    """What each decode worker lacks of the prompt's KV."""
    total, layout = request.computable, decode.views[0].info.layout
    sizes = {
        cached: layout.span_bytes(Span(int(cached), total - int(cached)), total)
        for cached in set(decode.cached.tolist())
    }
    return np.array([sizes[cached] for cached in decode.cached.tolist()], dtype=np.float64)
