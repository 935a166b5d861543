"""SGLang's model gateway (sgl-model-gateway, `policies/cache_aware.rs`), and its successor that listens to events."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.baselines.disaggregated import DisaggregatedPolicy
from router.policies.base import Matches, RequestInfo, tie_break
from router.workers.snapshot import WorkerView

BALANCE_ABS = 64
"""`--balance-abs-threshold`: requests between the most and the least loaded worker."""
BALANCE_REL = 1.5
"""`--balance-rel-threshold`."""
CACHE_THRESHOLD = 0.3
"""`--cache-threshold`: the share of a prompt that must match."""

Ranked = list[tuple[float, WorkerView]]


class SglangPolicy(DisaggregatedPolicy):
    """`cache_aware` for prefill, `power_of_two` for decode.

    Where request counts differ by more than 64 and by half, the worker with the fewest requests, affinity discarded.
    Else, when more than 0.3 of the prompt matches, one of the workers with the deepest match, whatever its load: a node
    of its tree names one worker. Else the worker with the fewest requests.
    """

    name = "sglang"

    def rank_prefill(self, request: RequestInfo, views: Sequence[WorkerView], matches: Matches) -> Ranked:
        """Load is requests, not tokens."""
        loads = [view.sequences for view in views]
        imbalanced = max(loads) - min(loads) > BALANCE_ABS and max(loads) > BALANCE_REL * min(loads)
        deepest = max(request.cached_tokens(matches, view) for view in views)
        if not imbalanced and deepest / request.prompt_tokens > CACHE_THRESHOLD:
            found = [view for view in views if request.cached_tokens(matches, view) == deepest]
            return [(self.among_matching(view), view) for view in found]
        return [(float(view.sequences), view) for view in views]

    def among_matching(self, view: WorkerView) -> float:
        """Orders workers with the same match: not at all."""
        return 0.0

    def rank_decode(self, request: RequestInfo, views: Sequence[WorkerView], matches: Matches) -> Ranked:
        """The less loaded of two drawn at random."""
        rng = random.Random(tie_break(request.request_id, "decode"))
        drawn = rng.sample(list(views), min(2, len(views)))
        return [(float(view.sequences), view) for view in drawn]


class SglangEventsPolicy(SglangPolicy):
    """`cache_aware_zmq`: the same gate, then the least loaded of all workers with the deepest match."""

    name = "sglang_events"

    def among_matching(self, view: WorkerView) -> float:
        """By requests."""
        return float(view.sequences)
