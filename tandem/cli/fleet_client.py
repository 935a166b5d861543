"""Reads a router's pages and its workers', for commands that look at a running cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from tandem.cli.frame import Reading, Series, series_of
from tandem.config import ProcessConfig, client_key
from tandem.errors import BadRequest, ConfigError, Unavailable

T = TypeVar("T")
TIMEOUT_S = 5.0
PAGES_AT_ONCE = 16
UNREADABLE = (ValueError, LookupError)
"""What parsers of JSON and of metrics raise."""


class FleetClient:
    """One router. Shows `TANDEM_API_KEY` or else a secret of the cluster's own to it, and the metrics' to workers."""

    def __init__(self, router: str, config: ProcessConfig) -> None:
        """router: HOST:PORT of its HTTP port, or a URL. config: the secrets."""
        self.url = (router if "://" in router else f"http://{router}").rstrip("/")
        cluster, metrics = (
            secret.get_secret_value() if secret is not None else "" for secret in (config.token, config.metrics_token)
        )
        self._for_pages = _bearer(client_key() or metrics or cluster)
        self._for_requests = _bearer(client_key() or cluster)
        self._for_workers = _bearer(metrics)

    def fleet(self) -> dict[str, Any]:
        """The router's `/metrics/fleet`. Raises Unavailable, BadRequest, ConfigError."""
        found = self._understood("/metrics/fleet", lambda answer: answer.json(), "JSON")
        if not isinstance(found, dict) or found.get("object") != "tandem.fleet":
            raise self._not_ours("/metrics/fleet", "fleet")
        return found

    def _understood(self, path: str, parse: Callable[[httpx.Response], T], kind: str) -> T:
        """A page of the router, parsed."""
        answer = self.get(path)
        try:
            return parse(answer)
        except UNREADABLE:
            raise self._not_ours(path, kind) from None

    def _not_ours(self, path: str, kind: str) -> BadRequest:
        return BadRequest(f"--router: {self.url}{path} is no {kind}; is it a Tandem router?")

    def get(self, path: str) -> httpx.Response:
        """A page of the router. Raises Unavailable when nobody answers, ConfigError when the key does not open it."""
        try:
            headers = self._for_pages if path.startswith("/metrics") else self._for_requests
            answer = httpx.get(self.url + path, headers=headers, timeout=TIMEOUT_S, trust_env=False)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fix = "start it, or give its HTTP address HOST:PORT"
            raise Unavailable(f"--router: no router answers at {self.url}: {error}; {fix}") from None
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            need = "set TANDEM_API_KEY to an operator's key, TANDEM_METRICS_TOKEN, or TANDEM_TOKEN to the cluster's"
            raise ConfigError(f"--router: {self.url}{path} needs a key: {need}")
        if answer.status_code != httpx.codes.OK:
            raise BadRequest(f"--router: {self.url}{path} answers {answer.status_code}{_reason(answer)}")
        return answer

    def worker_page(self, address: str, path: str = "/metrics") -> httpx.Response | None:
        """A page of a worker's metrics port; None when it is not reached."""
        try:
            url = f"http://{address}{path}"
            return httpx.get(url, headers=self._for_workers, timeout=TIMEOUT_S, trust_env=False)
        except (httpx.HTTPError, httpx.InvalidURL):
            return None

    def read(self) -> Reading:
        """All pages now."""
        fleet, own = (
            self.fleet(),
            self._understood("/metrics", lambda answer: series_of(answer.text), "page of metrics"),
        )
        return Reading(self.url, time.monotonic(), fleet, own, self._workers(fleet))

    def _workers(self, fleet: Mapping[str, Any]) -> dict[str, Series]:
        where = {each["incarnation"]: each["metrics"] for each in fleet["workers"] if each["metrics"]}
        with ThreadPoolExecutor(PAGES_AT_ONCE) as pool:
            pages = pool.map(self.worker_page, where.values())
        found = {name: _series(page) for name, page in zip(where, pages, strict=True)}
        return {name: series for name, series in found.items() if series is not None}


def _series(page: httpx.Response | None) -> Series | None:
    """A worker's page; None where it is not reached or something else answers there."""
    if page is None or page.status_code != httpx.codes.OK:
        return None
    try:
        return series_of(page.text)
    except UNREADABLE:
        return None


def _reason(answer: httpx.Response) -> str:
    """Of an answer that is none, as a router says it."""
    try:
        return f": {answer.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return "; is it a Tandem router?"


def _bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"} if secret else {}
