"""What each tenant used of this worker, by router: what routers need to keep one quota together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tandem.cluster import TenantUse

KEPT_S = 120.0
"""Seconds for which a tenant without requests is still reported; then its counts start anew."""


@dataclass(slots=True)
class _Use:
    requests: int = 0
    tokens: int = 0
    running: int = 0
    since: float = 0.0


class TenantLedger:
    """Counts requests and tokens of tenants that have names. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._uses: dict[tuple[str, str], _Use] = {}

    def admitted(self, tenant: str, router_id: str, prompt_tokens: int) -> None:
        """A request was admitted."""
        if tenant:
            key = tenant, router_id
            use = self._uses.get(key)
            if use is None or self._forgotten(use):
                self._uses = {name: each for name, each in self._uses.items() if not self._forgotten(each)}
                use = self._uses[key] = _Use()
            use.requests += 1
            use.tokens += prompt_tokens
            use.running += 1

    def made(self, tenant: str, router_id: str, tokens: int) -> None:
        """Tokens of an answer."""
        if tenant:
            self._uses[tenant, router_id].tokens += tokens

    def ended(self, tenant: str, router_id: str) -> None:
        """A request has ended."""
        if tenant:
            use = self._uses[tenant, router_id]
            use.running -= 1
            use.since = self._clock()

    def uses(self) -> tuple[TenantUse, ...]:
        """What routers are told."""
        return tuple(
            TenantUse(tenant, router_id, use.requests, use.tokens, use.running)
            for (tenant, router_id), use in list(self._uses.items())
            if not self._forgotten(use)
        )

    def _forgotten(self, use: _Use) -> bool:
        return not use.running and self._clock() - use.since > KEPT_S
