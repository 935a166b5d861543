"""Workers found by Kubernetes: a watch on their pods, which says at once who is ready and who is being deleted."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from router.discovery.kubernetes_errors import ApiAway, ApiRefused, Expired
from router.discovery.pod_table import Change, PodTable
from router.discovery.pods import Pod, number_of, pod_of, version_of
from router.discovery.sources import Roster
from tandem.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from router.discovery.kubernetes_api import PodsApi

log = logging.getLogger(__name__)

START_S = 10.0
"""A server that does not answer is asked for so long before start-up fails: a pod's network may be younger than it."""
FIRST_RETRY_S = 0.1
AWAY_RETRY_S = 0.8
"""At most, between tries of a server that does not answer: its return is to be seen within a second."""
BUSY_RETRY_S = 30.0
"""At most, between tries of a server that answers with errors."""
QUICK_S = 1.0
"""A watch that ends sooner and said nothing did not work at all."""
FIXES = {
    400: "correct --kubernetes-selector",
    401: "the API server does not know this service account or user: correct its token",
    403: "give the service account a Role with the verbs list and watch on pods (docs/operations.md)",
    404: "correct the API server's address",
}
MISSING = "--kubernetes-selector is set and the package kubernetes is missing: pip install 'tandem-serve[k8s]'"


class KubernetesPods:
    """See `Discovery`. The last known pods stay while the API server is away."""

    def __init__(self, namespace: str, selector: str, roster: Roster, seed: int | None = None) -> None:
        """namespace: empty takes the router's own. seed: of the back-off's jitter."""
        self._namespace = namespace
        self._selector = selector
        self._roster = roster
        self._random = random.Random(seed)
        self._table = PodTable()
        self._version = ""
        """From which on to watch; empty: a list is needed."""
        self._failures = 0
        self._faults: dict[str, str] = {}
        self._away = False

    async def start(self) -> None:
        """See `Discovery`: returns with the first list. Raises Unavailable when no server answers within START_S."""
        try:
            from router.discovery.kubernetes_api import PodsApi
        except ImportError:
            raise ConfigError(MISSING, "kubernetes_selector") from None
        self._api = await PodsApi.open(self._namespace, self._selector)
        try:
            await self._first_list(self._api)
        except BaseException:
            await self._api.close()
            raise

    async def _first_list(self, api: PodsApi) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + START_S
        while True:
            try:
                await self._list(api)
                return
            except (ApiAway, ApiRefused, Expired) as error:
                if isinstance(error, ApiRefused) and not error.busy:
                    raise ConfigError(self._refused(api, error), "kubernetes_selector") from None
                pause = self._pause(error)
                if loop.time() + pause > until:
                    text = f"{self._where(api)}; it gave no list of pods for {START_S:g} s: {error}"
                    raise Unavailable(text, "kubernetes_selector") from None
                await asyncio.sleep(pause)

    def _where(self, api: PodsApi) -> str:
        return f"--kubernetes-selector is {self._selector} and the API server is {api.server}"

    def _refused(self, api: PodsApi, error: ApiRefused) -> str:
        fix = FIXES.get(error.status, "correct its address or the selector")
        return f"{self._where(api)}, namespace {api.namespace}; it answers {error}; {fix}"

    async def run(self) -> None:
        """See `Discovery`."""
        try:
            while True:
                try:
                    await self._follow(self._api)
                except Expired as error:
                    log.info("the watch on pods starts anew: %s", error)
                    self._version = ""
                    await self._wait(error)
                except (ApiAway, ApiRefused) as error:
                    if isinstance(error, ApiRefused) and not error.busy:
                        self._version = ""
                    self._complain(error)
                    await self._wait(error)
        finally:
            await self._api.close()

    async def _follow(self, api: PodsApi) -> None:
        """A list, if one is needed, and one watch to its end."""
        if not self._version:
            await self._list(api)
        loop = asyncio.get_running_loop()
        worked_from = loop.time() + QUICK_S
        async with aclosing(api.watch(self._version)) as changes:
            async for kind, described in changes:
                self._answered()
                self._failures = worked_from = 0
                self._take(kind, described)
        self._answered()
        if loop.time() < worked_from:
            raise Expired("it ended at once")
        self._failures = 0

    async def _list(self, api: PodsApi) -> None:
        described, self._version = await api.list()
        self._answered()
        pods = [pod for pod in map(pod_of, described) if pod is not None]
        self._faults = {uid: fault for uid, fault in self._faults.items() if uid in {pod.uid for pod in pods}}
        for pod in pods:
            self._note_fault(pod)
        self._tell(self._table.replace(pods))

    def _take(self, kind: str, described: dict[str, Any]) -> None:
        version = version_of(described)
        now, then = number_of(version), number_of(self._version)
        if version and (now is None or then is None or now > then):
            self._version = version
        pod = None if kind == "BOOKMARK" else pod_of(described)
        if pod is None:
            return
        if kind == "DELETED":
            self._faults.pop(pod.uid, None)
            self._tell(self._table.delete(pod))
        else:
            self._note_fault(pod)
            self._tell(self._table.put(pod))

    def _note_fault(self, pod: Pod) -> None:
        """Logs once what is wrong with a pod."""
        if pod.fault and self._faults.get(pod.uid) != pod.fault:
            log.warning("pod %s cannot be used as a worker: %s", pod.name, pod.fault)
            self._faults[pod.uid] = pod.fault

    def _tell(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if change.role is None:
                log.info("pod %s at %s gets no new requests: %s", change.pod, change.address, change.why)
                self._roster.unfollow(change.address)
            else:
                log.info("pod %s at %s is a ready %s worker", change.pod, change.address, change.role.value)
                self._roster.follow(change.address, change.role)

    # The server's absence ---------------------------------------------------------------------------------------------

    def _complain(self, error: ApiAway | ApiRefused) -> None:
        """Logs once that the server is lost."""
        if not self._away:
            known = self._table.ready()
            log.warning("the watch on pods broke: %s; the %d workers known last are kept meanwhile", error, known)
        self._away = True

    def _answered(self) -> None:
        if self._away:
            log.info("the Kubernetes API server answers again")
        self._away = False

    async def _wait(self, error: Exception) -> None:
        pause = self._pause(error)
        if not isinstance(error, Expired) or self._failures > 1:  # one that expired is simply asked anew
            await asyncio.sleep(pause)

    def _pause(self, error: Exception) -> float:
        """Seconds until the next try: doubled with each failure up to a bound, then shortened by up to a half."""
        most = BUSY_RETRY_S if isinstance(error, ApiRefused) else AWAY_RETRY_S
        asked = error.retry_s if isinstance(error, ApiRefused) else 0.0
        doubled = FIRST_RETRY_S * (1 << min(self._failures, 20))
        self._failures += 1
        return min(most, max(asked, doubled)) * self._random.uniform(0.5, 1.0)
