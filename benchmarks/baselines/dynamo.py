"""NVIDIA Dynamo's KV router: prompt blocks to compute plus blocks in use, smallest wins."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.baselines.disaggregated import DisaggregatedPolicy
from router.policies.base import Matches, RequestInfo
from router.workers.snapshot import WorkerView

BLOCK = 64
"""Everything is counted in blocks, so their size cancels out; only rounding depends on it."""
PREFILL_SCALE = 1.0
OVERLAP_CREDIT = 1.0
"""The defaults: a cached block counts for one, and nothing is discounted where load is uneven (decay 0)."""

Ranked = list[tuple[float, WorkerView]]


class DynamoPolicy(DisaggregatedPolicy):
    """`S * max(0, active prefill + prompt - credit * overlap) + blocks in use`, all in blocks, at its defaults.

    The weight of active requests is 0 and the temperature 0: the least cost wins, and ties are random. The decode hop
    of a disaggregated cluster leaves overlap out: blocks in use alone.
    """

    name = "dynamo"

    def rank_prefill(self, request: RequestInfo, views: Sequence[WorkerView], matches: Matches) -> Ranked:
        """In blocks."""
        return [(self._cost(request, view, matches), view) for view in views]

    def _cost(self, request: RequestInfo, view: WorkerView, matches: Matches) -> float:
        credit = OVERLAP_CREDIT * request.cached_tokens(matches, view)
        to_compute = max(0.0, view.queued_tokens + request.prompt_tokens - credit)
        return PREFILL_SCALE * to_compute / BLOCK + _blocks_in_use(view)

    def rank_decode(self, request: RequestInfo, views: Sequence[WorkerView], matches: Matches) -> Ranked:
        """In blocks."""
        return [(_blocks_in_use(view), view) for view in views]


def _blocks_in_use(view: WorkerView) -> float:
    return max(view.info.capacity_tokens - view.free_tokens, 0) / BLOCK
