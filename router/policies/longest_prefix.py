"""Baseline: the longest cached prefix on both ends, load only between equals. A trap where all prompts share one."""

from __future__ import annotations

from collections.abc import Mapping

from router.policies.base import Matches, Policy, RequestInfo, eligible, eligible_decode, joint_plan, ranked
from router.workers.snapshot import FleetSnapshot, WorkerView
from tandem.cluster import Plan


class LongestPrefixPolicy(Policy):
    """Most cached tokens first, then least loaded."""

    name = "longest_prefix"

    def plan(self, request: RequestInfo, fleet: FleetSnapshot, matches: Matches, now: float) -> Plan:
        """Costs kept: the prompt tokens not cached on the worker that computes them."""

        def decode_key(view: WorkerView) -> tuple[float, ...]:
            return (-request.cached_tokens(matches, view), view.sequences)

        def prefill_key(view: WorkerView) -> tuple[float, ...]:
            return (-request.cached_tokens(matches, view), view.queued_tokens)

        def costs(decode: WorkerView, prefill: WorkerView | None) -> Mapping[str, float]:
            return {"uncached_tokens": request.computable - request.cached_tokens(matches, prefill or decode)}

        decode = ranked(eligible_decode(fleet), request, decode_key)
        prefill = ranked(eligible(fleet.prefill), request, prefill_key)
        return joint_plan(self.name, request, matches, decode, prefill, costs)
