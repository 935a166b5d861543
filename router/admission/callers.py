"""From a request's headers to its tenant, with keys that may change while the router runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from router.admission.quota import Quotas, Visit
from router.admission.tenants import Keyring, Tenant, read_keys


class Callers:
    """Who may ask, and how much. quotas: the tenants' accounts."""

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas
        self._keyring = Keyring({})

    def load(self, path: Path) -> None:
        """Takes over a file of tenants. Raises ConfigError; then nothing has changed."""
        self.replace(read_keys(path))

    def replace(self, keyring: Keyring) -> None:
        """Other keys count from now on. Requests at work go on."""
        self._keyring = keyring
        self._quotas.update(keyring.tenants)

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return self._keyring.open

    def tenant(self, headers: Mapping[str, str]) -> Tenant:
        """Who asks. Raises Unauthorized when keys are configured and this has none of them."""
        return self._keyring.tenant(headers.get("authorization"), headers.get("x-api-key"))

    def enter(self, tenant: Tenant) -> Visit:
        """See `Quotas.enter`."""
        return self._quotas.enter(tenant)

    def inside(self) -> Mapping[str, int]:
        """Requests at work by tenant, where there are any."""
        return self._quotas.inside()

    def limits(self, tenant: Tenant) -> list[tuple[bytes, bytes]]:
        """`x-ratelimit-*` headers for the tenant's answers."""
        return [(name.encode(), value.encode()) for name, value in self._quotas.headers(tenant)]
