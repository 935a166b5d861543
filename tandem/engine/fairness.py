"""Deficit round robin over tenants (Shreedhar and Varghese 1995): pure functions over what each tenant has in credit.

Each tenant with waiting requests gains the same credit in every round, and a request starts when its tenant's credit
covers its cost: whoever asks more, or more often, only waits behind himself. Costs are tokens, so long prompts and long
answers count for what they take. Credits are lost with the last waiting request, as in the original: being idle earns
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

QUANTUM = 512
"""Tokens of credit that a tenant gains in a round; about a request, so that tenants take turns."""
MOST = 64 * QUANTUM
"""Most that is saved up, while tenants with requests of higher priority are served."""


class Shared(Protocol):
    """A waiting request, as far as fairness is concerned."""

    @property
    def tenant(self) -> str:
        """Whose it is."""

    @property
    def cost(self) -> int:
        """Tokens it will take; at least 1."""

    @property
    def priority(self) -> int:
        """Tenants take turns among requests of the same priority."""


S = TypeVar("S", bound=Shared)


def rounds(cost: int, credit: float, quantum: int = QUANTUM) -> int:
    """Rounds until `credit` covers `cost`."""
    return max(math.ceil((cost - credit) / quantum), 0)


def served(balances: Mapping[str, float], tenant: str, cost: int, quantum: int = QUANTUM) -> dict[str, float]:
    """The balances of all waiting tenants after one of them had a request served; that one is asked last again."""
    gained = rounds(cost, balances[tenant], quantum) * quantum
    after = {name: min(balance + gained, MOST) for name, balance in balances.items() if name != tenant}
    after[tenant] = balances[tenant] + gained - cost
    return after


def fair_order(
    waiting: Sequence[S], balances: Mapping[str, float], quantum: int = QUANTUM, first: int | None = None
) -> list[S]:
    """`waiting`, sorted by priority first, with tenants of equal priority taking turns; a tenant's own order is kept.

    balances: of every tenant in `waiting`, those served longest ago first. first: so many are put in order, the rest
    follows as it came: each one's turn takes as long to find as there are tenants.
    """
    order: list[S] = []
    for _, level in groupby(waiting, key=lambda item: item.priority):
        queues: dict[str, list[S]] = {}
        for item in level:
            queues.setdefault(item.tenant, []).append(item)
        if len(queues) == 1:
            (only,) = queues.values()
            order += only
            continue
        for queue in queues.values():
            queue.reverse()
        left = {name: balance for name, balance in balances.items() if name in queues}
        while left and (first is None or len(order) < first):
            name = min(left, key=lambda tenant: rounds(queues[tenant][-1].cost, left[tenant], quantum))
            item = queues[name].pop()
            order.append(item)
            left = served(left, name, item.cost, quantum)
            if not queues[name]:
                del left[name]
        order += [item for queue in queues.values() for item in reversed(queue)]
    return order


def present(balances: Mapping[str, float], tenants: Iterable[str]) -> dict[str, float]:
    """The balances of those who wait; newcomers start with none, in front of whoever was served."""
    waiting = dict.fromkeys(tenants)
    new = {name: 0.0 for name in waiting if name not in balances}
    return new | {name: balance for name, balance in balances.items() if name in waiting}
