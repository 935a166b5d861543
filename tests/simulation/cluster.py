"""A router and its workers as simulated processes: everything between HTTP and the model's arithmetic is as shipped."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from random import Random
from typing import Any, Literal
from unittest import mock

import grpc.aio

import decode_worker.services
import kvtransfer.pairs
import kvtransfer.transfer_thread
import prefill_worker.services
import router.workers.registry
import tandem.worker.process
from decode_worker.services import DecodeServices
from kvtransfer.backends import Chosen
from kvtransfer.inbound import PairClient
from router.control import ControlPlane
from tandem.cluster import Role
from tandem.config import DecodeConfig, PrefillConfig, RouterConfig, WorkerConfig
from tandem.engine.build import engine_config
from tandem.engine.engine import Engine
from tandem.testing.engine import LAYOUT, VOCAB, FakePool, FakeRunner
from tandem.types import ModelInfo
from tandem.worker.metrics import WorkerMetrics
from tandem.worker.process import WorkerProcess, serve
from tests.simulation.loop import Node, VirtualLoop
from tests.simulation.memory import Fabric, Mischief, SimBackend
from tests.simulation.network import Network
from tests.simulation.rpc import Rpc
from tests.simulation.threads import THREADING, SimEngineThread, SimTransferThread, virtual

EOS = 7
ROUTER = "router"
CONTROL_PORT = 8001
MAX_CONTEXT = 1024


@dataclass(frozen=True)
class Shape:
    """Settings of a simulated cluster; times in seconds."""

    prefill: int = 1
    decode: int = 1
    pages: int = 48
    page_size: int = 16
    slab_tokens: int = 256
    span_tokens: int = 32
    max_batch_tokens: int = 64
    lease_s: float = 2.0
    quiesce_s: float = 1.5
    queue_deadline_s: float = 4.0
    transfer_deadline_s: float = 2.0
    policy: Literal["cost", "round_robin", "least_loaded", "longest_prefix"] = "cost"
    step_s: tuple[float, float] = (0.001, 0.01)
    """Of an engine's step."""
    write_s: tuple[float, float] = (0.0005, 0.02)
    """Of a write of the hand-over."""
    index_blocks: int = 4_000_000
    """That the router's index may have."""
    max_inflight: int = 1024
    worker_backlog: int = 128
    """From small ones on, requests wait at the router."""
    notice_s: float = 0.0
    """A process hears at most this late that a connection broke; gRPC may have made another one by then."""


@cache
def _defaults(kind: type[PrefillConfig] | type[DecodeConfig] | type[RouterConfig]) -> Any:
    """Reading settings from everywhere they may come from takes longer than many a simulated second."""
    return kind(model="fake")


def worker_config(role: Role, port: int, shape: Shape) -> WorkerConfig:
    """A worker's settings."""
    slab_mib = shape.slab_tokens * LAYOUT.token_bytes / (1 << 20)
    chosen: dict[str, Any] = {
        "port": port, "router": (f"127.0.0.1:{CONTROL_PORT}",), "pages": shape.pages,
        "page_size": shape.page_size, "max_batch_tokens": shape.max_batch_tokens, "lease_s": shape.lease_s,
        "quiesce_s": shape.quiesce_s, "drain_s": 3.0, "staging_mib": slab_mib,
        "slab_mib": slab_mib, "slabs_max_mib": 8 * slab_mib, "span_tokens": shape.span_tokens,
        "queue_deadline_s": shape.queue_deadline_s, "transfer_deadline_s": shape.transfer_deadline_s,
        "handshake_deadline_s": 3.0,
    }  # fmt: skip
    kind = PrefillConfig if role is Role.PREFILL else DecodeConfig
    config: WorkerConfig = _defaults(kind).model_copy(update={**chosen, "local_prefill_tokens": 4})
    return config


def router_config(shape: Shape) -> RouterConfig:
    """The router's settings."""
    chosen: dict[str, Any] = {"control_port": CONTROL_PORT, "lease_s": shape.lease_s, "policy": shape.policy}
    chosen["index_max_blocks"] = shape.index_blocks
    chosen.update(max_inflight=shape.max_inflight, worker_backlog=shape.worker_backlog, queue_s=60.0)
    config: RouterConfig = _defaults(RouterConfig).model_copy(update=chosen)
    return config


class _Loaded:
    """What a checkpoint says of itself."""

    def info(self, name: str, max_context_override: int = 0) -> ModelInfo:
        return ModelInfo(name, name, "f" * 32, VOCAB, MAX_CONTEXT, (EOS,))


def build_engine(config: WorkerConfig) -> tuple[Engine, _Loaded]:
    """A real engine over a model of a few lines."""
    pool, loop, looks = FakePool(config.pages, config.page_size, LAYOUT), asyncio.get_running_loop(), count()

    def clock() -> float:
        # A step is computed at one virtual moment; measured, it must have taken some time.
        return loop.time() + 0.0005 * next(looks)

    return Engine(FakeRunner(pool), pool, engine_config(config), clock=clock), _Loaded()


class _Owned:
    """A backend whose landings know when their pair has been given up."""

    def __init__(self, inner: Any, given_up: Callable[[], bool]) -> None:
        self.name, self._inner, self._given_up = inner.name, inner, given_up

    def landing(self, *names: Any) -> Any:
        """See `Backend`."""
        landing = self._inner.landing(*names)
        landing.given_up = self._given_up
        return landing


class _Pair(PairClient):
    """As shipped, with such a backend."""

    def __init__(self, me: Any, address: str, peer: str, backend: Any, *rest: Any, **more: Any) -> None:
        super().__init__(me, address, peer, _Owned(backend, lambda: self.closed), *rest, **more)  # type: ignore[arg-type]


@dataclass
class Worker:
    """One worker's place: its address, and the process that has it now."""

    name: str
    role: Role
    port: int
    node: Node
    process: WorkerProcess | None = None
    starts: int = 0
    ended: list[int] = field(default_factory=list)
    """Exit codes; -9 is a SIGKILL."""

    @property
    def up(self) -> bool:
        """Whether it serves."""
        return not self.node.dead and self.process is not None and hasattr(self.process, "services")


class Cluster:
    """One seed's processes. `log` is the trace."""

    def __init__(self, loop: VirtualLoop, shape: Shape, mischief: Mischief) -> None:
        self.loop, self.shape = loop, shape
        self.log: list[str] = []
        self.wrong: list[str] = []
        self.net = Network(loop)
        self.fabric = Fabric(loop, self.net, mischief, write_s=shape.write_s)
        loop.rpc, loop.step_s = Rpc(loop, self.net, self._tap, shape.notice_s), shape.step_s
        self.control: ControlPlane | None = None
        self.retries = router_config(shape).retries
        self.router = self._node(ROUTER)
        self.router_ending = asyncio.Event()
        self.incarnations: dict[str, str] = {}
        """Every incarnation there ever was, and its process's name."""
        names = [(f"prefill-{n}", Role.PREFILL) for n in range(shape.prefill)]
        names += [(f"decode-{n}", Role.DECODE) for n in range(shape.decode)]
        self.workers = {
            name: Worker(name, role, 9000 + port, self._node(name)) for port, (name, role) in enumerate(names)
        }
        self.submits: dict[str, list[tuple[int, str]]] = {}
        """Of each request, (attempt, process) of each submission that reached a worker."""

    def say(self, text: str) -> None:
        """Adds a line to the trace."""
        self.log.append(f"{self.loop.time():9.4f} {text}")

    def _node(self, name: str) -> Node:
        node = Node(self.loop, name)
        node.on_death.append(lambda: self.net.died(node))
        return node

    def _tap(self, what: str, there: Node, here: Node, method: str, message: Any, asked: Any) -> None:
        """Every message as its servicer hears and says it."""
        told = message if what == "refuses" else f"{message.ByteSize()} bytes"
        self.say(f"{here.name} {what} {method.rsplit('/', 1)[1]} {told} ({there.name})")
        worker = self.workers.get(here.name)
        if worker is None or worker.process is None or not hasattr(worker.process, "info"):
            return
        mine, method = worker.process.info.incarnation, method.rsplit("/", 1)[1]
        if what == "hears" and method == "Submit":
            self.submits.setdefault(message.request.request_id, []).append((message.request.attempt, here.name))
        elif method == "Submit" and asked.incarnation != mine and (what == "says" or mine not in message):
            # Other reasons to refuse it, such as a router that has no stream yet, would not hold a moment later.
            self.wrong.append(f"fence: {here.name} is {mine} and did not fence a request for {asked.incarnation}")
        elif what == "says" and method == "Pair" and message.HasField("welcome") and asked.hello.sender != mine:
            self.wrong.append(f"fence: {here.name} is {mine} and welcomed a receiver of {asked.hello.sender}")

    # Processes -------------------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Starts a process, or a new one in place of one that has ended."""
        self.say(f"{name} is started")
        if name == ROUTER:
            self.start_router()
        else:
            self.start_worker(name)

    def start_router(self) -> None:
        """Starts the router, or a new one in its place."""
        if self.router.dead:
            self.router = self._node(ROUTER)
        self.router_ending = asyncio.Event()
        self.router.start(self._route(router_config(self.shape), self.router, self.router_ending))

    async def _route(self, config: RouterConfig, node: Node, ending: asyncio.Event) -> None:
        async with ControlPlane(config, clock=self.loop.time) as control:
            self.control = control
            await ending.wait()
        self.control = None
        node.kill()

    def start_worker(self, name: str) -> None:
        """Starts a worker, or a new one on the address of one that has ended."""
        worker = self.workers[name]
        if worker.starts:
            worker.node = self._node(name)
        worker.starts += 1
        config = worker_config(worker.role, worker.port, self.shape)
        worker.node.start(self._work(worker, config, worker.node))

    async def _work(self, worker: Worker, config: WorkerConfig, node: Node) -> None:
        backend = SimBackend(self.fabric)
        transports = Chosen(backend, (backend,), "simulated")
        build = prefill_worker.services.build if worker.role is Role.PREFILL else decode_worker.services.build
        worker.process = WorkerProcess(config, worker.role, backend.name, build(config, transports))  # type: ignore[arg-type]
        code = await serve(worker.process)
        self.say(f"{worker.name} exits with {code}")
        worker.ended.append(code)
        node.kill()

    def kill(self, name: str) -> None:
        """SIGKILL."""
        if name == ROUTER:
            self.router.kill()
            self.control = None
        elif not self.workers[name].node.dead:
            self.workers[name].node.kill()
            self.workers[name].ended.append(-9)

    def terminate(self, name: str) -> None:
        """SIGTERM."""
        if name == ROUTER:
            self.router_ending.set()
        else:
            self.workers[name].node.signal(signal.SIGTERM)

    def node(self, name: str) -> Node:
        """The process of that name that is there now."""
        return self.router if name == ROUTER else self.workers[name].node

    def budgets(self) -> Iterator[tuple[str, DecodeServices]]:
        """Decode workers' services."""
        for worker in self.workers.values():
            if worker.up and worker.role is Role.DECODE:
                assert worker.process is not None and isinstance(worker.process.services, DecodeServices)
                yield worker.name, worker.process.services


@contextlib.contextmanager
def simulated(seed: int) -> Iterator[VirtualLoop]:
    """A loop on which `Cluster` works: threads, sockets, ids and the model are stood in for until the end."""
    loop = VirtualLoop(seed)
    ids = Random(seed)
    process = tandem.worker.process
    patches: list[tuple[Any, str, Any]] = [
        (secrets, "token_hex", lambda size=16: f"{ids.getrandbits(8 * size):0{2 * size}x}"),
        (secrets, "token_bytes", lambda size=16: ids.randbytes(size)),
        (process, "build_engine", build_engine),
        (process, "set_compute_threads", lambda threads: 1),
        (process, "check_port", lambda *_: None),
        (process, "EngineThread", SimEngineThread),
        (router.workers.registry, "check_port", lambda *_: None),
        (WorkerMetrics, "serve", lambda *_: 0),
        (kvtransfer.transfer_thread, "threading", THREADING),
        (decode_worker.services, "TransferThread", SimTransferThread),
        (prefill_worker.services, "TransferThread", SimTransferThread),
        (kvtransfer.pairs, "PairClient", _Pair),
        (grpc.aio, "insecure_channel", lambda target, options=(): virtual().rpc.channel(target, options)),
        (grpc.aio, "server", lambda options=(): virtual().rpc.server(options)),
    ]
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    gc.disable()  # a collection at an odd moment would end coroutines of dead processes
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, stand_in in patches:
                stack.enter_context(mock.patch.object(owner, name, stand_in))
            yield loop
            loop.end()
    finally:
        gc.enable()
        logging.disable(level)
