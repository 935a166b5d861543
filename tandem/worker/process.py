"""One worker process from its settings to its exit: load, listen, register, serve, stop. The role adds its services."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import grpc
from pydantic import SecretStr

from tandem.cluster import MoveStat, Role, Status, TenantUse, WorkerInfo, new_id
from tandem.compute_slots import ComputeSlots
from tandem.config import WorkerConfig
from tandem.device import set_compute_threads
from tandem.engine.build import build_engine
from tandem.engine.engine import Engine
from tandem.engine.output import EngineStatus, StepOutput
from tandem.errors import ConfigError
from tandem.kv import HashRoot, KvLayout
from tandem.obs import tracer_of
from tandem.ports import authority, check_port
from tandem.trust import Trust
from tandem.types import ModelInfo
from tandem.worker.engine_thread import EngineThread
from tandem.worker.metrics import WorkerMetrics
from tandem.worker.publish import Publisher
from tandem.worker.register import Registrar
from tandem.worker.self_probe import SelfProbe, Transport
from tandem.worker.service import WorkerService, attach, server_options
from tandem.worker.vllm_page import vllm_page

if TYPE_CHECKING:
    from tandem.worker.tracing import WorkerTraces

log = logging.getLogger(__name__)
DRAIN_POLL_S = 0.05
STOP_GRACE_S = 1.0
"""Calls under way get this long to end when the server stops."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a role adds to its worker's status."""

    dispatches: Mapping[str, int] = field(default_factory=dict)
    moves: tuple[MoveStat, ...] = ()
    move_bytes_per_ms: float = 0.0
    draining: bool = False
    waiting: int = 0
    """Sequences that the engine does not know of yet."""
    tenants: tuple[TenantUse, ...] = ()


class RoleServices(Protocol):
    """What a role does beside what every worker does. All methods run on the event loop."""

    def on_step(self, output: StepOutput) -> None:
        """An engine step ended."""

    def report(self) -> Report:
        """For the next status."""

    def discovered(self, workers: Sequence[tuple[str, str]]) -> None:
        """A router named prefill workers: (incarnation, address)."""

    def background(self) -> Sequence[asyncio.Task[None]]:
        """Tasks that must not end while the worker lives."""

    def drain(self) -> None:
        """Takes nothing more where others can; what is under way goes on."""

    def busy(self) -> bool:
        """Whether anything is under way, or not yet told to those who wait for it."""

    async def finish(self) -> None:
        """Ends every request; the server still runs, so that routers hear of it."""

    async def close(self) -> None:
        """Lets go of everything else; the server has stopped."""

    def leaks(self) -> list[str]:
        """What is still held although nothing runs."""


@dataclass(slots=True)
class Parts:
    """What a role builds its services from."""

    info: WorkerInfo
    root: HashRoot
    engine: Engine
    thread: EngineThread
    metrics: WorkerMetrics
    publisher: Publisher
    server: grpc.aio.Server
    traces: WorkerTraces | None
    """What requests are traced with; None where they are not."""
    give_up: Callable[[str], None]
    """Ends the process with an error: the role cannot go on. A supervisor starts it anew."""


Build = Callable[[Parts], RoleServices]


class WorkerProcess:
    """Everything of one worker: `start`, and `stop`. Several can live in one process, which tests use."""

    def __init__(
        self, config: WorkerConfig, role: Role, transport: str, build: Build, probed: Transport | None = None
    ) -> None:
        """transport: its name. probed: what must move a page before the worker is ready, and ever after."""
        self.config = config
        self.trust = Trust.of(config)
        self.stopping = asyncio.Event()
        """It must end now."""
        self.told = asyncio.Event()
        """It must end: now, or once it is drained."""
        self.failed = False
        self._role_kind = role
        self._transport = transport
        self._build = build
        self._probed = probed
        self._probe: SelfProbe | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._registrar: Registrar | None = None
        self._traces: WorkerTraces | None = None

    async def start(self) -> None:
        """Loads the model and serves. Raises CheckpointError, ConfigError."""
        config = self.config
        # Loading may take minutes: a port that is taken is told before.
        check_port(config.host, config.port, "--port")
        check_port(config.host, config.metrics_port, "--metrics-port")
        threads = set_compute_threads(config.threads)
        self.engine, loaded = await asyncio.to_thread(build_engine, config)
        slots = _compute_slots(config.compute_slots)
        self.thread = EngineThread(self.engine, self._on_step, self._on_failure, slots.held if slots else nullcontext)
        self.metrics = WorkerMetrics(lambda: self.services.report().moves)
        self.server = self.trust.server(server_options(config.lease_s))
        port = self._listen()
        name = config.served_model_name or Path(config.model).name
        model = loaded.info(name, config.max_context)
        self.info = self._describe(model, self.engine.layout, port, threads)
        self._traces = _traces(config, self.info)
        self.metrics.about(self.info)
        if config.metrics_alias == "vllm":
            self.metrics.alias = vllm_page(self.metrics.registry, self.info, config.prefix_cache)
        root = HashRoot(config.cluster_key, model.fingerprint, self.info.kv_dtype)
        self.publisher = Publisher(self.info.incarnation, self.engine, self.thread, self._compose)
        parts = Parts(
            self.info,
            root,
            self.engine,
            self.thread,
            self.metrics,
            self.publisher,
            self.server,
            self._traces,
            self._give_up,
        )
        self.services = self._build(parts)
        attach(self.server, WorkerService(self.info, self.publisher, self.leaks, self.leave))
        self.thread.start()
        proving = await self._prove()
        await self.server.start()
        self.metrics.ready = lambda: self._sound() and not self.told.is_set()
        self._tasks = [asyncio.create_task(self.publisher.run()), *self.services.background(), *proving]
        if config.router:
            self._registrar = Registrar(self.info, config.router, self.services.discovered, self.trust)
            self._tasks.append(asyncio.create_task(self._registrar.run()))
        for task in self._tasks:
            task.add_done_callback(self._task_ended)
        log.info("%s worker %s serves %s at %s", self._role_kind.value, self.info.incarnation, name, self.info.address)

    async def _prove(self) -> list[asyncio.Task[None]]:
        """Sends a first page over the transport; returns what will go on doing so. Raises Unavailable."""
        if self._probed is None or not self.config.probe_s:
            return []
        self._probe = SelfProbe(
            self._probed, self.config.probe_s, self.publisher.poke, self._give_up, counted=self.metrics.probes
        )
        await self._probe.check()
        return [asyncio.create_task(self._probe.run())]

    def _sound(self) -> bool:
        return self._probe is None or self._probe.ready

    def _listen(self) -> int:
        wanted = authority(self.config.host, self.config.port)
        try:
            port = self.trust.listen(self.server, wanted)
        except RuntimeError as error:
            raise ConfigError(f"--port: {wanted} cannot be used: {error}", param="port") from None
        return int(port)

    def _describe(self, model: ModelInfo, layout: KvLayout, port: int, threads: int) -> WorkerInfo:
        config, engine = self.config, self.engine
        try:
            metrics_port = self.metrics.serve(config.host, config.metrics_port, _shown(config.metrics_token))
        except OSError as error:
            raise ConfigError(f"--metrics-port: {config.metrics_port} cannot be used: {error.strerror}") from None
        return WorkerInfo(
            incarnation=new_id(),
            role=self._role_kind,
            address=authority(config.host, port),
            model=replace(model, max_context=min(model.max_context, engine.capacity_tokens)),
            layout=layout,
            kv_dtype=layout.planes[0].dtype,
            page_size=config.page_size,
            total_pages=engine.memory.total_pages,
            max_batch_tokens=config.max_batch_tokens,
            transport=self._transport,
            metrics_port=metrics_port,
            threads=threads,
            pid=os.getpid(),
        )

    def _on_step(self, output: StepOutput) -> None:
        seconds = output.schedule_s + output.forward_s + output.commit_s
        if output.batch_tokens:
            self.metrics.step.observe(seconds)
            self.metrics.step_tokens.inc(output.batch_tokens)
        if output.retracted:
            self.metrics.retractions.inc(len(output.retracted))
        for outcome in output.drafts:
            self.metrics.drafts.add(outcome)
        self.services.on_step(output)
        self.publisher.poke()

    def _give_up(self, reason: str) -> None:
        log.error("this worker cannot go on: %s", reason)
        self._fail()

    def _on_failure(self, error: BaseException) -> None:
        self._fail()

    def _fail(self) -> None:
        self.failed = True
        self.stopping.set()
        self.told.set()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.stopping.is_set():
            log.error("a task of this worker ended; it cannot go on", exc_info=task.exception())
            self._on_failure(RuntimeError("task ended"))

    def _compose(self) -> Callable[[EngineStatus], Status]:
        return partial(self._status, self.services.report())

    def _status(self, report: Report, engine: EngineStatus) -> Status:
        self.metrics.running.set(engine.running)
        self.metrics.waiting.set(engine.waiting + report.waiting)
        self.metrics.queued_tokens.set(engine.queued_tokens)
        self.metrics.oldest.set(engine.oldest_s)
        self.metrics.compared(engine.checked_pages, engine.corrupt_pages)
        cached = engine.cached_pages
        self.metrics.pages.labels("available").set(engine.free_pages)
        self.metrics.pages.labels("cached").set(cached)
        self.metrics.pages.labels("used").set(engine.total_pages - engine.free_pages)
        return Status(
            incarnation=self.info.incarnation,
            running=engine.running,
            waiting=engine.waiting + report.waiting,
            queued_tokens=engine.queued_tokens,
            free_pages=engine.free_pages,
            total_pages=engine.total_pages,
            timing=engine.timing,
            move_bytes_per_ms=report.move_bytes_per_ms,
            dispatches=report.dispatches,
            draining=report.draining or not self._sound(),
            moves=report.moves,
            tenants=report.tenants,
        )

    def end(self) -> None:
        """Told once, it drains; told again, it stops. For signals."""
        if self.told.is_set():
            self.stopping.set()
        self.told.set()

    def leave(self) -> float:
        """Told by others to drain, however often; returns the seconds that it takes at most."""
        if not self.told.is_set():
            log.info("told to drain")
        self.told.set()
        return self.config.drain_s

    async def drain(self) -> None:
        """Lets routers know that nothing more should come, and waits for what is under way, at most `drain_s`."""
        self.services.drain()
        self.publisher.poke()
        loop = asyncio.get_running_loop()
        until = loop.time() + self.config.drain_s
        log.info("draining for at most %g s", self.config.drain_s)
        while self.services.busy() and (left := until - loop.time()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), min(left, DRAIN_POLL_S))
                return

    async def stop(self) -> None:
        """Says goodbye to the routers and ends everything, in the order in which others depend on it.

        A worker that failed is silent, as if it had been killed: routers let its requests go on elsewhere, and count
        that they were lost with it.
        """
        self.stopping.set()
        if self.failed:
            if self._registrar is not None:
                self._registrar.goodbye = False
            await self.server.stop(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.services.finish()
        await self.server.stop(STOP_GRACE_S)
        await self.services.close()
        await self.thread.stop()
        await asyncio.to_thread(self.metrics.close)
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    async def leaks(self) -> list[str]:
        """What is held although nothing runs: ask it when idle."""
        return self.services.leaks() + await self.thread.call(self.engine.idle_leaks)


async def serve(process: WorkerProcess) -> int:
    """Starts a worker and runs it until SIGTERM or SIGINT, then drains it; returns the exit code.

    A second signal ends it without waiting.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, process.end)
    await process.start()
    await process.told.wait()
    await process.drain()
    await process.stop()
    return 1 if process.failed else 0


def _traces(config: WorkerConfig, info: WorkerInfo) -> WorkerTraces | None:
    tracer = tracer_of(config, f"tandem-{info.role.value}", info.incarnation)
    if tracer is None:
        return None
    from tandem.worker.tracing import WorkerTraces

    return WorkerTraces(tracer, info.role.value)


def _shown(secret: SecretStr | None) -> str:
    return secret.get_secret_value() if secret is not None else ""


def _compute_slots(key: int | None) -> ComputeSlots | None:
    try:
        return None if key is None else ComputeSlots(key)
    except OSError as error:
        raise ConfigError(
            f"compute_slots is {key}; this machine has no such semaphore: {error}", "compute_slots"
        ) from None
