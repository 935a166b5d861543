"""llm-d's endpoint picker: the gate of its guides since July 2026, and the scorers that its code defaults to."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.baselines.disaggregated import DisaggregatedPolicy
from router.policies.base import Matches, RequestInfo
from router.workers.snapshot import WorkerView

STICKY_SHARE = 0.80
"""Prefix share from which an endpoint is sticky."""
MAX_PENALTY_S = 18.0
"""Estimated wait that stickiness may cost."""
TOKENS_IN_FLIGHT = 4 << 20
"""At which the load score is 0."""
PEAK_TOKENS_PER_S = 20_000.0
"""Calibrated peak prefill throughput, until workers have measured theirs."""

QUEUE_WEIGHT, KV_WEIGHT, PREFIX_WEIGHT = 2.0, 2.0, 3.0

Ranked = list[tuple[float, WorkerView]]


def _decode(views: Sequence[WorkerView]) -> Ranked:
    """Active requests only."""
    return [(float(view.sequences), view) for view in views]


class LlmdGatePolicy(DisaggregatedPolicy):
    """Endpoints with at least 0.80 of the prefix, then the fewest tokens in flight.

    Unless the best sticky endpoint would make a request wait 18 s longer than the best other one: then all count. A
    wait is the uncached tokens in flight over the peak prefill throughput.
    """

    name = "llmd"

    def rank_prefill(self, request: RequestInfo, views: Sequence[WorkerView], matches: Matches) -> Ranked:
        """Less the score, so that the smallest is best."""
        sticky = [v for v in views if request.cached_tokens(matches, v) / request.prompt_tokens >= STICKY_SHARE]
        others = [view for view in views if view not in sticky]
        kept: Sequence[WorkerView] = views
        if sticky and others:
            peak = _peak(views)
            waits = [min(view.queued_tokens for view in group) / peak for group in (sticky, others)]
            kept = sticky if waits[0] - waits[1] <= MAX_PENALTY_S else views
        return [(view.queued_tokens / TOKENS_IN_FLIGHT - 1.0, view) for view in kept]

    def rank_decode(self, request: RequestInfo, views: Sequence[WorkerView], matches: Matches) -> Ranked:
        """Requests."""
        return _decode(views)


def _peak(views: Sequence[WorkerView]) -> float:
    rates = [
        1e3 * view.info.max_batch_tokens / (timing.base_ms + view.info.max_batch_tokens * timing.per_token_ms)
        for view in views
        if (timing := view.status.timing) is not None
    ]
    return median(rates) if rates else PEAK_TOKENS_PER_S


class LlmdScorersPolicy(DisaggregatedPolicy):
    """`2 * queue + 2 * free KV + 3 * prefix`, highest wins.

    queue: 1 for the shortest queue, 0 for the longest. free KV: share of memory. prefix: share of the prompt.
    """

    name = "llmd_scorers"

    def rank_prefill(self, request: RequestInfo, views: Sequence[WorkerView], matches: Matches) -> Ranked:
        """Less the score, so that the smallest is best."""
        queues = [view.sequences for view in views]
        low, high = min(queues), max(queues)

        def score(view: WorkerView) -> float:
            queue = (high - view.sequences) / (high - low) if high > low else 1.0
            free = max(view.free_tokens, 0) / view.info.capacity_tokens
            prefix = request.cached_tokens(matches, view) / request.prompt_tokens
            return QUEUE_WEIGHT * queue + KV_WEIGHT * free + PREFIX_WEIGHT * prefix

        return [(-score(view), view) for view in views]

    def rank_decode(self, request: RequestInfo, views: Sequence[WorkerView], matches: Matches) -> Ranked:
        """Requests."""
        return _decode(views)
