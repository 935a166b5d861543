"""The cluster side of the router put together from its settings: index, fleet, dispatcher and control port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

import grpc.aio

from router.admission.callers import Callers
from router.admission.quota import Quotas
from router.cache.prefix_index import PrefixIndex
from router.discovery.build import discoveries
from router.dispatch import Dispatcher
from router.explain.ladder import HitLadder
from router.explain.recorder import Recorder
from router.file_watch import FileWatch
from router.policies import POLICIES
from router.tracing.setup import traces_of
from router.workers.fleet import Fleet
from router.workers.registry import Relay, serve_registry
from tandem.cluster import new_id
from tandem.config import RouterConfig
from tandem.trust import Trust

STOP_GRACE_S = 0.5


class ControlPlane:
    """`async with ControlPlane(config) as control:` follows workers and serves their registrations until it exits."""

    def __init__(
        self, config: RouterConfig, relay: Relay | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """relay: to the other processes of this router. clock: seconds, monotonic."""
        self.index = PrefixIndex(config.index_max_blocks, config.index_max_age_s, clock)
        self.fleet = Fleet(new_id(), self.index, config.lease_s, clock, Trust.of(config))
        self.ladder = HitLadder(config.ladder_blocks, config.index_max_age_s, clock)
        self.traces = traces_of(config, self.fleet.router_id)
        self.recorder = (self.traces.recorder if self.traces else Recorder)(
            config.explain_requests, int(config.explain_mib * (1 << 20)), config.explain_age_s, clock
        )
        self.quotas = Quotas(self.fleet.router_id, clock)
        secrets = [each.get_secret_value() if each else "" for each in (config.token, config.metrics_token)]
        self.callers = Callers(self.quotas, *secrets)
        self._watches = [FileWatch(config.api_keys, self.callers.load)] if config.api_keys is not None else []
        self._discovery = discoveries(config, self.fleet)
        self._tasks: list[asyncio.Task[None]] = []
        policy = POLICIES[config.policy]()
        self.dispatcher = Dispatcher(
            config, self.fleet, self.index, policy, self.recorder, self.ladder, self.quotas, clock
        )
        self.port = 0
        """The control port taken."""
        self._config = config
        self._relay = relay
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Opens the control port and connects to the listed workers. Raises ConfigError for a taken port, or keys."""
        config = self._config
        for watch in self._watches:
            watch.read()
        self._server, self.port = await serve_registry(
            self.fleet, config.control_host, config.control_port, self._relay
        )
        for source in self._discovery:
            await source.start()
        runs = [watch.run() for watch in self._watches] + [source.run() for source in self._discovery]
        self._tasks = [asyncio.create_task(run, name="watch") for run in runs]

    async def close(self) -> None:
        """Ends every request, then every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.dispatcher.close()
        await self.fleet.close()
        if self._relay is not None:
            await self._relay.close()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)

    async def __aenter__(self) -> ControlPlane:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
