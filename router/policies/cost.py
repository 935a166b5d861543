"""The default policy: the pair with the least estimated cost in milliseconds.

    queue(P) + prefill(uncached tokens on P) + move(bytes not on D) + admission wait(D) + slowdown added to D's batch

beside the decode-only alternative, where D's own queue and prefill take P's place and prefilling slows D's batch down.
All terms are milliseconds of this request or of requests it delays, so they can be added; what holds up streams under
way weighs less. Coefficients are what workers measured, smoothed over the fleet; before any has measured, the defaults
below. Joint cost routing after Mooncake (Qin et al. 2024) and Dynamo, with measured times in place of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from router.policies.base import KEPT, Matches, Policy, RequestInfo, eligible, eligible_decode, tie_break
from router.workers.snapshot import FleetSnapshot, WorkerView
from tandem.cluster import Candidate, Incarnation, Plan, StepTiming
from tandem.kv import Span

DEFAULT_TIMING = StepTiming(base_ms=5.0, per_token_ms=0.1)
"""Until any worker has measured its steps: a small model on a few CPU cores."""
DEFAULT_MOVE_BYTES_PER_MS = 200_000.0
"""Until any hand-over was measured: 200 MB/s, a slow TCP link."""
HAND_OVER_MS = 3.0
"""A hand-over's fixed price: two control messages, a grant, the landing copy and its digest."""
OUTLIER = 3.0
"""A worker that measures this many times more or less than the fleet's median is believed to differ."""
TYPICAL_STEP_TOKENS = 64
EXPECTED_OUTPUT = 128
"""Output tokens assumed of a request that allows more: most answers end before their limit."""
PAUSE = 0.25
"""Weight of a millisecond for which a prompt holds up streams under way, beside one before this request's first token.
At 1, prompts queue at a prefill worker while decode workers idle; measured (docs/log.md), 0.25 shortens both waits."""
RESOLUTION_MS = 1e-3
"""Costs closer than this are equal."""


@dataclass(frozen=True, slots=True)
class _Helper:
    """A prefill worker with the two terms that no decode worker changes."""

    view: WorkerView
    cached: int
    queue_ms: float
    prefill_ms: float

    @property
    def cost(self) -> float:
        return self.queue_ms + self.prefill_ms


class CostPolicy(Policy):
    """Least estimated cost. Equal costs are ordered by a hash of the request, so that routers do not herd."""

    name = "cost"

    def plan(self, request: RequestInfo, fleet: FleetSnapshot, matches: Matches, now: float) -> Plan:
        """See the module; `now` is not needed, because a snapshot's load is already up to date."""
        decode = eligible_decode(fleet)
        model = _Coefficients(fleet)
        helpers = [_helper(request, view, matches, model) for view in eligible(fleet.prefill)]
        # The pair's terms add up, so the same prefill workers are best for every decode worker.
        helpers.sort(key=lambda h: (_rounded(h.cost), tie_break(request.request_id, h.view.incarnation)))
        pairs = [
            Candidate(
                decode=view.incarnation,
                prefill=None if helper is None else helper.view.incarnation,
                decode_cached=request.cached_tokens(matches, view),
                prefill_cached=0 if helper is None else helper.cached,
                costs=_costs(request, view, helper, matches, model),
            )
            for view in decode
            for helper in (None, *helpers[:KEPT])
        ]
        pairs.sort(key=lambda pair: _order(request, pair))
        return Plan(_keep(pairs), self.name)


def _keep(pairs: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The pairs of the best few decode workers, all of them: each needs its own prefill alternatives."""
    best: dict[Incarnation, None] = dict.fromkeys(pair.decode for pair in pairs)
    kept = set(list(best)[:KEPT])
    return tuple(pair for pair in pairs if pair.decode in kept)


def _order(request: RequestInfo, pair: Candidate) -> tuple[float, bool, int, int]:
    return (
        _rounded(pair.cost),
        pair.prefill is not None,
        tie_break(request.request_id, pair.decode),
        tie_break(request.request_id, pair.prefill or ""),
    )


def _rounded(cost: float) -> float:
    return round(cost / RESOLUTION_MS)


class _Coefficients:
    """Measured coefficients: the fleet's typical ones, and a worker's own where it is clearly another kind of machine.

    Two equal workers never measure the same: taken at their word, noise would outweigh a cached prefix.
    """

    def __init__(self, fleet: FleetSnapshot) -> None:
        views = (*fleet.prefill, *fleet.decode)
        measured = [view.status.timing for view in views if view.status.timing is not None]
        self._timing = DEFAULT_TIMING
        if measured:
            self._timing = StepTiming(median(t.base_ms for t in measured), median(t.per_token_ms for t in measured))
        rates = [view.status.move_bytes_per_ms for view in views if view.status.move_bytes_per_ms > 0]
        self._rate = median(rates) if rates else DEFAULT_MOVE_BYTES_PER_MS

    def timing(self, view: WorkerView) -> StepTiming:
        own = view.status.timing
        if own is None or _alike(_typical_step_ms(own), _typical_step_ms(self._timing)):
            return self._timing
        return own

    def prefill_ms(self, view: WorkerView, tokens: int) -> float:
        """Time to compute `tokens` prompt tokens in full steps."""
        timing = self.timing(view)
        return math.ceil(tokens / view.info.max_batch_tokens) * timing.base_ms + tokens * timing.per_token_ms

    def move_ms(self, view: WorkerView, tokens: int, total: int) -> float:
        """Time in which a prefill worker hands over the last `tokens` of `total` tokens."""
        if tokens <= 0:
            return 0.0
        own = view.status.move_bytes_per_ms
        rate = own if own > 0 and not _alike(own, self._rate) else self._rate
        return HAND_OVER_MS + view.info.layout.span_bytes(Span(total - tokens, tokens), total) / rate


def _typical_step_ms(timing: StepTiming) -> float:
    return timing.base_ms + TYPICAL_STEP_TOKENS * timing.per_token_ms


def _alike(own: float, typical: float) -> bool:
    return typical / OUTLIER <= own <= typical * OUTLIER


def _helper(request: RequestInfo, view: WorkerView, matches: Matches, model: _Coefficients) -> _Helper:
    cached = request.cached_tokens(matches, view)
    return _Helper(
        view=view,
        cached=cached,
        queue_ms=model.prefill_ms(view, view.queued_tokens),
        prefill_ms=model.prefill_ms(view, request.computable - cached),
    )


def _costs(
    request: RequestInfo, view: WorkerView, helper: _Helper | None, matches: Matches, model: _Coefficients
) -> dict[str, float]:
    missing = request.computable - request.cached_tokens(matches, view)
    output = request.choices * min(request.max_tokens, EXPECTED_OUTPUT)
    prefill_here = model.prefill_ms(view, missing) if helper is None else 0.0
    # Every sequence there waits for what is computed beside it. Prefilling counts for one sequence at least: a decode
    # worker idle now takes the next request in a moment; a prefill worker has nothing else to do.
    held_up = PAUSE * max(view.sequences, 1) * prefill_here
    return {
        "queue": model.prefill_ms(view, view.queued_tokens) if helper is None else helper.queue_ms,
        "prefill": prefill_here if helper is None else helper.prefill_ms,
        "move": 0.0 if helper is None else model.move_ms(helper.view, missing, request.computable),
        "admission": _admission_ms(request, view, model),
        "slowdown": view.sequences * model.timing(view).per_token_ms * output + held_up,
    }


def _admission_ms(request: RequestInfo, view: WorkerView, model: _Coefficients) -> float:
    """Wait for KV space: the sequences there end, and free theirs, over about EXPECTED_OUTPUT steps."""
    needed = request.prompt_tokens + request.choices * min(request.max_tokens, EXPECTED_OUTPUT)
    short = needed - view.free_tokens
    if short <= 0:
        return 0.0
    used = max(view.info.capacity_tokens - view.free_tokens, 1)
    timing = model.timing(view)
    step_ms = timing.base_ms + max(view.sequences, 1) * timing.per_token_ms
    return EXPECTED_OUTPUT * step_ms * short / used
