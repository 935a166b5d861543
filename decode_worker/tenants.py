"""What each tenant used of this worker, by router: what routers need to keep one quota together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tandem.cluster import TenantUse
from tandem.types import GenerateRequest

KEPT_S = 120.0
"""Seconds for which a tenant without requests is still reported; then its counts start anew."""


@dataclass(slots=True)
class _Use:
    requests: int = 0
    tokens: int = 0
    running: int = 0
    open: int = 0
    """Those that have not ended, with those that are counted with others."""
    since: float = 0.0


class TenantLedger:
    """Counts requests and tokens of tenants that have names. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._uses: dict[tuple[str, str], _Use] = {}

    def admitted(self, request: GenerateRequest, router_id: str) -> None:
        """A request was admitted.

        What goes on here was counted where it began, and prompts that came with another one are one request with it.
        """
        if request.tenant:
            key = request.tenant, router_id
            use = self._uses.get(key)
            if use is None or self._forgotten(use):
                self._uses = {name: each for name, each in self._uses.items() if not self._forgotten(each)}
                use = self._uses[key] = _Use()
            moved = bool(request.generated)
            use.requests += not (moved or request.follows)
            use.tokens += 0 if moved else len(request.prompt)
            use.running += not request.follows
            use.open += 1

    def made(self, tenant: str, router_id: str, tokens: int) -> None:
        """Tokens of an answer."""
        if tenant:
            self._uses[tenant, router_id].tokens += tokens

    def ended(self, request: GenerateRequest, router_id: str) -> None:
        """A request has ended."""
        if request.tenant:
            use = self._uses[request.tenant, router_id]
            use.running -= not request.follows
            use.open -= 1
            use.since = self._clock()

    def uses(self) -> tuple[TenantUse, ...]:
        """What routers are told."""
        return tuple(
            TenantUse(tenant, router_id, use.requests, use.tokens, use.running)
            for (tenant, router_id), use in list(self._uses.items())
            if not self._forgotten(use)
        )

    def _forgotten(self, use: _Use) -> bool:
        return not use.open and self._clock() - use.since > KEPT_S
