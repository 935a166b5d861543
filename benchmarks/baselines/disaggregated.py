"""What the re-created routers have in common: each end is chosen by itself, and a prompt goes to a prefill worker."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from router.policies.base import KEPT, Matches, Policy, RequestInfo, eligible, eligible_decode, tie_break
from router.workers.snapshot import FleetSnapshot, WorkerView
from tandem.cluster import Candidate, Plan


class DisaggregatedPolicy(Policy):
    """Two rankings, one for each end. There is no local prefill as long as there are prefill workers."""

    @abstractmethod
    def rank_prefill(
        self, request: RequestInfo, views: Sequence[WorkerView], matches: Matches
    ) -> list[tuple[float, WorkerView]]:
        """The workers to choose from and what the rule gives them; the smallest is best."""

    @abstractmethod
    def rank_decode(
        self, request: RequestInfo, views: Sequence[WorkerView], matches: Matches
    ) -> list[tuple[float, WorkerView]]:
        """The same for decode workers."""

    def plan(self, request: RequestInfo, fleet: FleetSnapshot, matches: Matches, now: float) -> Plan:
        """Costs kept: what the rule gave each end, in its own unit. Equals are ordered at random."""
        prefill_views = eligible(fleet.prefill)
        decode_views = eligible_decode(fleet)
        rank = self.rank_decode if prefill_views else self.rank_prefill
        decode = _best(request, rank(request, decode_views, matches))
        prefill = _best(request, self.rank_prefill(request, prefill_views, matches)) if prefill_views else []
        helpers: list[tuple[float, WorkerView | None]] = [*prefill] if prefill else [(0.0, None)]
        candidates = tuple(
            Candidate(
                decode=view.incarnation,
                prefill=None if helper is None else helper.incarnation,
                decode_cached=request.cached_tokens(matches, view),
                prefill_cached=0 if helper is None else request.cached_tokens(matches, helper),
                costs={"decode": cost, "prefill": more},
            )
            for cost, view in decode
            for more, helper in helpers
        )
        return Plan(candidates, self.name)


def _best(request: RequestInfo, ranked: list[tuple[float, WorkerView]]) -> list[tuple[float, WorkerView]]:
    # Ties are drawn only among those that can be kept: of a thousand workers, few.
    limit = sorted([rank for rank, _ in ranked])[:KEPT][-1]
    ranked = [each for each in ranked if each[0] <= limit]
    return sorted(ranked, key=lambda each: (each[0], tie_break(request.request_id, each[1].incarnation)))[:KEPT]
