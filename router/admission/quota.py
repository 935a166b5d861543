"""Limits of each tenant: requests and tokens a minute, and requests at once, kept by all routers together.

A router knows at once what goes through it, and from workers' statuses what went through the others: so N routers keep
one quota, one status late. A minute's allowance may be used in one go and comes back evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from router.admission.tenants import Tenant
from tandem.cluster import Incarnation, Status, TenantUse
from tandem.errors import RateLimited

MINUTE_S = 60.0
BUSY_RETRY_S = 1.0
"""What a tenant that has too many requests at work is told to wait."""


class Bucket:
    """A minute's allowance that refills evenly. What is taken beyond it is owed: the next to ask wait for it."""

    def __init__(self, per_minute: int, now: float) -> None:
        """per_minute: 0 is no limit."""
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def left(self, now: float) -> float:
        """What could be taken now; negative when owed."""
        return min(self._level + (now - self._at) * self.per_minute / MINUTE_S, self.per_minute)

    def take(self, amount: float, now: float) -> None:
        """Takes it, whether or not it is there."""
        self._level, self._at = self.left(now) - amount, now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there, or a whole minute's allowance for those who ask for more."""
        if not self.per_minute:
            return 0.0
        missing = min(amount, self.per_minute) - self.left(now)
        return max(missing * MINUTE_S / self.per_minute, 0.0)


@dataclass(slots=True)
class _Account:
    """One tenant's state on this router, and what is known of others."""

    tenant: Tenant
    requests: Bucket
    tokens: Bucket
    inside: int = 0
    admitted: int = 0
    spent: int = 0
    refused: dict[str, int] = field(default_factory=dict)


class Visit:
    """One HTTP request of a tenant, from its admission to its end."""

    def __init__(self, quotas: Quotas, tenant: Tenant) -> None:
        self.tenant = tenant
        self._quotas = quotas
        self._ended = False
        self._prompt = 0

    def prompt(self, tokens: int) -> None:
        """The prompt is known. Raises RateLimited when the tenant has no tokens left."""
        self._quotas.take_prompt(self.tenant, tokens)
        self._prompt += tokens

    def refused(self) -> None:
        """The cluster did not take it: what it was charged goes back."""
        self._quotas.give_back(self.tenant, self._prompt)
        self._prompt = 0

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(0)

    def end(self, output_tokens: int) -> None:
        """It has ended, after so many output tokens; a second time does nothing."""
        if not self._ended:
            self._ended = True
            self._quotas.leave(self.tenant, self._prompt, output_tokens)


class Quotas:
    """All tenants' accounts. router_id: whose use in statuses is this router's own. clock: seconds, monotonic."""

    def __init__(self, router_id: str, clock: Callable[[], float]) -> None:
        self._router_id = router_id
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._reported: dict[Incarnation, dict[tuple[str, str], TenantUse]] = {}

    def enter(self, tenant: Tenant) -> Visit:
        """Lets a request in. Raises RateLimited when the tenant has too many at work, or used its minute's allowance.

        Who has no token left is refused here, before a prompt is tokenised for nothing.
        """
        account, now = self._account(tenant), self._clock()
        at_work = account.inside + self._elsewhere(tenant.name)
        if tenant.concurrency and at_work >= tenant.concurrency:
            text = f"{at_work} requests of this key are at work; at most {tenant.concurrency} may be"
            raise self._refusal(account, "concurrency", text, BUSY_RETRY_S)
        if (wait := account.requests.wait_s(1, now)) > 0:
            text = f"this key may send {tenant.requests_per_minute} requests a minute"
            raise self._refusal(account, "requests", text, wait)
        if (wait := account.tokens.wait_s(1, now)) > 0:
            text = f"this key may use {tenant.tokens_per_minute} tokens a minute, and has used them"
            raise self._refusal(account, "tokens", text, wait)
        account.requests.take(1, now)
        account.admitted += 1
        account.inside += 1
        return Visit(self, tenant)

    def take_prompt(self, tenant: Tenant, tokens: int) -> None:
        """Takes a prompt's tokens. Raises RateLimited when they are not there; then none were taken."""
        account, now = self._account(tenant), self._clock()
        if (wait := account.tokens.wait_s(tokens, now)) > 0:
            text = f"this key may use {tenant.tokens_per_minute} tokens a minute, and the prompt has {tokens}"
            raise self._refusal(account, "tokens", text, wait)
        account.tokens.take(tokens, now)

    def give_back(self, tenant: Tenant, tokens: int) -> None:
        """A prompt's tokens were taken for nothing."""
        self._account(tenant).tokens.take(-tokens, self._clock())

    def leave(self, tenant: Tenant, prompt_tokens: int, output_tokens: int) -> None:
        """A request has ended after so many output tokens; those of its prompt were taken."""
        account = self._account(tenant)
        account.inside -= 1
        account.spent += prompt_tokens + output_tokens
        account.tokens.take(output_tokens, self._clock())

    def headers(self, tenant: Tenant) -> list[tuple[str, str]]:
        """OpenAI's `x-ratelimit-*` headers, of the limits that there are."""
        account, now = self._account(tenant), self._clock()
        found = []
        for kind, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if bucket.per_minute:
                left = max(math.floor(bucket.left(now)), 0)
                reset = (bucket.per_minute - bucket.left(now)) * MINUTE_S / bucket.per_minute
                found += [
                    (f"x-ratelimit-limit-{kind}", str(bucket.per_minute)),
                    (f"x-ratelimit-remaining-{kind}", str(left)),
                    (f"x-ratelimit-reset-{kind}", f"{max(reset, 0.0):.3f}s"),
                ]
        return found

    def update(self, tenants: Iterable[Tenant]) -> None:
        """New limits: who has others now starts with a full allowance; who is gone is forgotten once nothing runs."""
        new = {tenant.name: tenant for tenant in tenants}
        for name, account in list(self._accounts.items()):
            if name not in new and not account.inside:
                del self._accounts[name]
            elif name in new and new[name] != account.tenant:
                account.tenant, now = new[name], self._clock()
                account.requests = Bucket(account.tenant.requests_per_minute, now)
                account.tokens = Bucket(account.tenant.tokens_per_minute, now)
        for tenant in new.values():
            self._account(tenant)  # what goes through other routers counts from now on

    def observe(self, status: Status) -> None:
        """A worker's status: what went through other routers is taken from the same allowance."""
        known = self._reported.get(status.incarnation)
        now = self._clock()
        latest = {(use.tenant, use.router_id): use for use in status.tenants if use.router_id != self._router_id}
        self._reported[status.incarnation] = latest
        if known is None:
            return  # what it used before this router knew it is long ago, or unknown
        for key, use in latest.items():
            account = self._accounts.get(use.tenant)
            if account is not None:
                before = known.get(key, TenantUse(use.tenant, use.router_id))
                account.requests.take(max(use.requests - before.requests, 0), now)
                account.tokens.take(max(use.tokens - before.tokens, 0), now)

    def forget(self, incarnation: Incarnation) -> None:
        """The worker is gone."""
        self._reported.pop(incarnation, None)

    def collect(self) -> Iterable[Metric]:
        """For Prometheus: by tenant, through this router."""
        requests = CounterMetricFamily("tandem_tenant_requests", "HTTP requests admitted", labels=("tenant",))
        tokens = CounterMetricFamily("tandem_tenant_tokens", "Prompt and output tokens", labels=("tenant",))
        refused = CounterMetricFamily("tandem_tenant_refused", "HTTP requests over a limit", labels=("tenant", "limit"))
        inside = GaugeMetricFamily("tandem_tenant_running", "HTTP requests at work", labels=("tenant",))
        left = GaugeMetricFamily("tandem_tenant_requests_left", "Of the minute's allowance", labels=("tenant",))
        now = self._clock()
        for name, account in self._accounts.items():
            if account.requests.per_minute:
                left.add_metric([name], account.requests.left(now))
            requests.add_metric([name], account.admitted)
            tokens.add_metric([name], account.spent)
            inside.add_metric([name], account.inside)
            for limit, count in account.refused.items():
                refused.add_metric([name, limit], count)
        return [requests, tokens, refused, inside, left]

    def inside(self) -> Mapping[str, int]:
        """Requests at work by tenant, where there are any."""
        return {name: account.inside for name, account in self._accounts.items() if account.inside}

    def _account(self, tenant: Tenant) -> _Account:
        account = self._accounts.get(tenant.name)
        if account is None:
            now = self._clock()
            account = self._accounts[tenant.name] = _Account(
                tenant, Bucket(tenant.requests_per_minute, now), Bucket(tenant.tokens_per_minute, now)
            )
        return account

    def _elsewhere(self, tenant: str) -> int:
        """Requests at work through other routers, as workers last said."""
        return sum(use.running for uses in self._reported.values() for use in uses.values() if use.tenant == tenant)

    def _refusal(self, account: _Account, limit: str, text: str, wait_s: float) -> RateLimited:
        account.refused[limit] = account.refused.get(limit, 0) + 1
        return RateLimited(f"{text}; try again in {max(wait_s, 0.001):.3g} s", retry_s=wait_s)
