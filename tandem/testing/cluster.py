"""A cluster of real processes for end-to-end tests: started, killed and started again one by one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from urllib.error import URLError

import grpc

from tandem import obs
from tandem.config import child_environment
from tandem.ports import free_ports
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc

START_S = 120.0
THREADS = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Host:
    """Where a process runs: its address, what stands before its command line, and its environment's additions."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


LOCAL = Host()


@dataclass
class Process:
    """One process of the cluster. Its output goes to a file, which a failing test shows."""

    name: str
    arguments: list[str]
    port: int
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    popen: subprocess.Popen[bytes] | None = None
    host: Host = LOCAL

    def start(self) -> None:
        """Starts it, on the same port each time."""
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*self.host.prefix, sys.executable, "-m", "tandem.cli", *self.arguments],
                stdout=log,
                stderr=log,
                env=child_environment(THREADS | dict(self.environment) | dict(self.host.environment)),
            )

    def signal(self, number: int) -> None:
        """Sends a signal."""
        assert self.popen is not None
        os.kill(self.popen.pid, number)

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        assert self.popen is not None
        self.popen.kill()
        self.popen.wait()


@dataclass
class Cluster:
    """One router and its workers; `workers` by name: prefill-0, decode-0, ..."""

    router: Process
    workers: dict[str, Process] = field(default_factory=dict)
    token: str = ""
    """The processes' shared secret."""

    @property
    def url(self) -> str:
        """Base of the HTTP port."""
        return f"http://127.0.0.1:{self.router.port}"

    def get(self, path: str) -> str:
        """Body of a GET."""
        with urllib.request.urlopen(self._request(path), timeout=10) as answer:
            return str(answer.read().decode())

    def post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        """JSON in, JSON out."""
        with urllib.request.urlopen(self._request(path, json.dumps(body).encode()), timeout=60) as answer:
            return dict(json.load(answer))

    def _request(self, path: str, body: bytes | None = None) -> urllib.request.Request:
        headers = {"content-type": "application/json"}
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"
        return urllib.request.Request(self.url + path, body, headers)

    def metric(self, name: str) -> float:
        """Sum over all label values of a series on the router's page."""
        page = self.get("/metrics")
        family = name.removesuffix("_count").removesuffix("_total")
        assert f"# TYPE {family}" in page, f"no metric {name}"
        lines = [line for line in page.splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def wait_ready(self) -> None:
        """Waits until every worker answers and the router sees them all."""
        self._until(lambda: "ready" in self.get("/ready"), "the router is not ready")
        for process in self.workers.values():
            self._until(partial(self.answers, process), f"{process.name} does not answer")

        self._until(self.complete, "the router does not see every worker")

    def complete(self) -> bool:
        """Whether the router's page shows as many workers as there are."""
        return self.get("/metrics").count("\ntandem_fleet_pages{") == len(self.workers)

    def answers(self, process: Process) -> bool:
        """Whether a worker answers; raises grpc.RpcError when it does not."""
        self.audit(process)
        return True

    def audit(self, process: Process) -> list[str]:
        """What a worker still holds; raises grpc.RpcError when it does not answer."""
        with self._asking(process) as (stub, token):
            return list(stub.Audit(worker_pb2.AuditRequest(), timeout=2.0, metadata=token).leaks)

    def incarnation(self, process: Process) -> str:
        """A worker's; raises grpc.RpcError when it does not answer."""
        with self._asking(process) as (stub, token):
            return str(stub.Describe(worker_pb2.DescribeRequest(), timeout=2.0, metadata=token).incarnation)

    @contextlib.contextmanager
    def _asking(self, process: Process) -> Iterator[tuple[worker_pb2_grpc.WorkerStub, tuple[tuple[str, str], ...]]]:
        with grpc.insecure_channel(f"{process.host.address}:{process.port}") as channel:
            yield worker_pb2_grpc.WorkerStub(channel), (("tandem-token", self.token),) if self.token else ()

    def check_leaks(self, within_s: float = 10.0) -> None:
        """Raises AssertionError unless every live process soon holds nothing."""
        alive = [p for p in self.workers.values() if p.popen is not None and p.popen.poll() is None]
        deadline = time.monotonic() + within_s
        while True:
            leaks = {process.name: self.audit(process) for process in alive}
            inflight = self.metric(obs.REQUESTS_RUNNING) + self.metric(obs.REQUESTS_QUEUED)
            if not any(leaks.values()) and inflight == 0:
                return
            assert time.monotonic() < deadline, f"leaks: {leaks}, requests in flight at the router: {inflight}"
            time.sleep(0.1)

    def logs(self) -> str:
        """The end of every process's output."""
        processes = (self.router, *self.workers.values())
        ends = (process.log.read_text().splitlines()[-40:] for process in processes)
        return "\n".join(
            line for process, end in zip(processes, ends, strict=True) for line in (f"--- {process.name}", *end)
        )

    def _until(self, condition: Callable[[], bool], message: str) -> None:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(URLError, grpc.RpcError, ConnectionError, TimeoutError):
                if condition():
                    return
            dead = [p.name for p in (self.router, *self.workers.values()) if p.popen and p.popen.poll() is not None]
            assert not dead and time.monotonic() < deadline, f"{message}; ended: {dead}\n{self.logs()}"
            time.sleep(0.1)


@contextlib.contextmanager
def cluster(
    model: Path,
    folder: Path,
    prefill: int = 1,
    decode: int = 1,
    worker_args: Sequence[str] = (),
    decode_args: Sequence[str] = (),
    router_args: Sequence[str] = (),
    token: str = "",
    hosts: Mapping[str, Host] = MappingProxyType({}),
    announce: Callable[[Cluster], None] | None = None,
) -> Iterator[Cluster]:
    """Starts router, prefill and decode processes; at the end checks for leaks and stops them.

    token: the processes' shared secret. hosts: of processes that run elsewhere than on loopback; the router's is where
    its control port is. announce: tells the router of the workers, in place of their registration; it is called before
    any process is started.
    """
    environment = {"TANDEM_TOKEN": token} if token else {}
    names = [f"prefill-{i}" for i in range(prefill)] + [f"decode-{i}" for i in range(decode)]
    http, control, *ports = free_ports(2 + len(names))
    router = Process(
        "router",
        ["router", "--model", str(model), "--port", str(http), "--control-port", str(control), *router_args],
        http,
        folder / "router.log",
        environment,
    )
    made = Cluster(router, token=token)
    router.arguments += ["--control-host", control_host := hosts.get("router", LOCAL).address]
    registered = ["--router", f"{control_host}:{control}"] if announce is None else []
    for name, port in zip(names, ports, strict=True):
        role, host = name.split("-")[0], hosts.get(name, LOCAL)
        arguments = [role, str(model), "--port", str(port), "--threads", "1", "--host", host.address, *registered]
        arguments += [*worker_args, *(decode_args if role == "decode" else ())]
        made.workers[name] = Process(name, arguments, port, folder / f"{name}.log", environment, host=host)
    processes = [router, *made.workers.values()]
    try:
        if announce is not None:
            announce(made)
        for process in processes:
            process.start()
        made.wait_ready()
        yield made
        made.check_leaks()
    except BaseException:
        sys.stderr.write(made.logs())
        raise
    finally:
        _end(processes)


def _end(processes: Sequence[Process]) -> None:
    """SIGTERM, and SIGKILL for what does not heed it."""
    for process in processes:
        if process.popen is not None and process.popen.poll() is None:
            process.signal(signal.SIGTERM)
    for process in processes:
        if process.popen is not None:
            try:
                process.popen.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
