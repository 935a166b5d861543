"""Baseline: workers in turn on both ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.policies.base import Matches, Policy, RequestInfo, eligible, eligible_decode, joint_plan
from router.workers.snapshot import FleetSnapshot, WorkerView
from tandem.cluster import Plan


class RoundRobinPolicy(Policy):
    """The request's running number picks the worker; workers are ordered by incarnation."""

    name = "round_robin"

    def plan(self, request: RequestInfo, fleet: FleetSnapshot, matches: Matches, now: float) -> Plan:
        """Costs kept: the distance from the worker whose turn it is."""
        decode = _turn(eligible_decode(fleet), request.ordinal)
        prefill = _turn(eligible(fleet.prefill), request.ordinal)

        def costs(first: WorkerView, second: WorkerView | None) -> Mapping[str, float]:
            turn = {"decode_turn": float(decode.index(first))}
            return turn if second is None else {**turn, "prefill_turn": float(prefill.index(second))}

        return joint_plan(self.name, request, matches, decode, prefill, costs)


def _turn(views: Sequence[WorkerView], ordinal: int) -> list[WorkerView]:
    ordered = sorted(views, key=lambda view: view.incarnation)
    start = ordinal % len(ordered) if ordered else 0
    return ordered[start:] + ordered[:start]
