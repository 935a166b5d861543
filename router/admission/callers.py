"""From a request's headers to its tenant, with keys that may change while the router runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from router.admission.quota import Quotas, Visit
from router.admission.tenants import CLUSTER, Keyring, Tenant, presented, read_keys
from tandem.errors import Unauthorized
from tandem.trust import same_secret


class Callers:
    """Who may ask, and how much.

    quotas: the tenants' accounts. token, metrics_token: the cluster's own secrets, empty where there are none.
    """

    def __init__(self, quotas: Quotas, token: str = "", metrics_token: str = "") -> None:
        self._quotas = quotas
        self._token = hashlib.sha256(token.encode()).digest() if token else b""
        self._metrics_token = hashlib.sha256(metrics_token.encode()).digest() if metrics_token else b""
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
        if self._shows(headers, self._token):
            return CLUSTER
        return self._keyring.tenant(headers.get("authorization"), headers.get("x-api-key"))

    def check_metrics(self, headers: Mapping[str, str]) -> None:
        """Raises Unauthorized unless metrics are open, or who asks shows their token or is an operator."""
        guarded = self._metrics_token or not self.open
        if guarded and not self._shows(headers, self._metrics_token) and not self.tenant(headers).operator:
            raise Unauthorized("metrics need the metrics token, or an operator's API key")

    @staticmethod
    def _shows(headers: Mapping[str, str], secret: bytes) -> bool:
        key = presented(headers.get("authorization"), headers.get("x-api-key"))
        return bool(secret and key) and same_secret(key, secret)

    def enter(self, tenant: Tenant) -> Visit:
        """See `Quotas.enter`."""
        return self._quotas.enter(tenant)

    def inside(self) -> Mapping[str, int]:
        """Requests at work by tenant, where there are any."""
        return self._quotas.inside()

    def limits(self, tenant: Tenant) -> list[tuple[bytes, bytes]]:
        """`x-ratelimit-*` headers for the tenant's answers."""
        return [(name.encode(), value.encode()) for name, value in self._quotas.headers(tenant)]
