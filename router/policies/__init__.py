"""How a plan is made. A policy is a pure function over dataclasses; `POLICIES` names them for `--policy`."""

from __future__ import annotations

from router.policies.base import Policy, RequestInfo
from router.policies.cost import CostPolicy
from router.policies.least_loaded import LeastLoadedPolicy
from router.policies.longest_prefix import LongestPrefixPolicy
from router.policies.round_robin import RoundRobinPolicy

POLICIES: dict[str, type[Policy]] = {
    "cost": CostPolicy,
    "longest_prefix": LongestPrefixPolicy,
    "least_loaded": LeastLoadedPolicy,
    "round_robin": RoundRobinPolicy,
}

__all__ = ["POLICIES", "Policy", "RequestInfo"]
