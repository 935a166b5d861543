"""Reads a router's pages and its workers', for commands that look at a running cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tandem.cli.frame import Reading, Series, series_of
from tandem.config import ProcessConfig, client_key
from tandem.errors import BadRequest, ConfigError, Unavailable

TIMEOUT_S = 5.0
PAGES_AT_ONCE = 16


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
        path = "/metrics/fleet"
        try:
            found: dict[str, Any] = self.get(path).json()
        except ValueError:
            raise BadRequest(f"--router: {self.url}{path} is no JSON; is it a Tandem router?") from None
        return found

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
        fleet, page = self.fleet(), self.get("/metrics").text
        return Reading(self.url, time.monotonic(), fleet, series_of(page), self._workers(fleet))

    def _workers(self, fleet: Mapping[str, Any]) -> dict[str, Series]:
        where = {each["incarnation"]: each["metrics"] for each in fleet["workers"] if each["metrics"]}
        with ThreadPoolExecutor(PAGES_AT_ONCE) as pool:
            pages = pool.map(self.worker_page, where.values())
        return {
            name: series_of(page.text)
            for name, page in zip(where, pages, strict=True)
            if page is not None and page.status_code == httpx.codes.OK
        }


def _reason(answer: httpx.Response) -> str:
    """Of an answer that is none, as a router says it."""
    try:
        return f": {answer.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return "; is it a Tandem router?"


def _bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"} if secret else {}
