"""Baseline: the least loaded worker on both ends, whatever is cached where."""

from __future__ import annotations

from collections.abc import Mapping

from router.policies.base import Matches, Policy, RequestInfo, eligible, eligible_decode, joint_plan, ranked
from router.workers.snapshot import FleetSnapshot, WorkerView
from tandem.cluster import Plan


class LeastLoadedPolicy(Policy):
    """Fewest sequences on the decode side, fewest queued prompt tokens on the prefill side."""

    name = "least_loaded"

    def plan(self, request: RequestInfo, fleet: FleetSnapshot, matches: Matches, now: float) -> Plan:
        """Costs kept: the two loads compared."""

        def costs(decode: WorkerView, prefill: WorkerView | None) -> Mapping[str, float]:
            return {"sequences": decode.sequences, "queued_tokens": (prefill or decode).queued_tokens}

        decode = ranked(eligible_decode(fleet), request, lambda view: (view.sequences, -view.free_tokens))
        prefill = ranked(eligible(fleet.prefill), request, lambda view: (view.queued_tokens, view.sequences))
        return joint_plan(self.name, request, matches, decode, prefill, costs)
