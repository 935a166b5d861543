"""`tandem up`: one router and its workers on this machine, watched until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import grpc
import httpx
from rich.console import Console

import tandem.demo
from tandem.cli.banner import banner
from tandem.cli.children import Child, stop_all
from tandem.cluster import WorkerInfo
from tandem.config import UpConfig
from tandem.errors import ConfigError
from tandem.wire import codec
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc

STOP_GRACE_S = 8.0
START_LIMIT_S = 600.0
"""A large checkpoint may take minutes to load; a worker that dies ends the wait at once."""
RESTART_DELAY_S = 0.5
WARM_TOKENS = 256
MAX_RESTARTS = 10
"""Restarts of one worker before the cluster gives up."""

# Workers share the cores: threads that wait must sleep, or five processes on two cores fight each other.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false"}


def up(config: UpConfig) -> int:
    """Runs the cluster until it is told to stop; returns the exit code."""
    return asyncio.run(_Cluster(config).run())


def resolve_model(model: str) -> str:
    """`demo` is the shipped model; a folder is used as it is; anything else is fetched from the hub, once for all workers."""
    if model == "demo":
        return str(tandem.demo.MODEL_PATH)
    if Path(model).is_dir():
        return str(Path(model).resolve())
    if Path(model).exists() or model.startswith((".", "/")) or model.count("/") > 1:
        raise ConfigError(f"model: {model} is not a folder", param="model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"model: {model} is neither a folder nor to be had from the hub: {first}", param="model") from None


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when the port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--port: {host}:{port} cannot be used: {error.strerror}", param="port") from None


class _Cluster:
    def __init__(self, config: UpConfig) -> None:
        self._config = config
        self._console = Console(stderr=True)
        self._stopping = asyncio.Event()
        self._failure = ""

    async def run(self) -> int:
        check_port(self._config.host, self._config.port)
        model = resolve_model(self._config.model)
        router, workers = self._plan(model)
        children = [router, *workers]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopping.set)
        watchers: list[asyncio.Task[None]] = []
        try:
            for child in children:
                await child.start()
                watchers.append(asyncio.create_task(self._watch(child)))
            infos = await self._wait_ready(workers)
            if infos:
                shown = banner(self._config, model, infos, [child.name for child in children])
                self._console.print(shown, soft_wrap=True)
                await self._stopping.wait()
        finally:
            for watcher in watchers:
                watcher.cancel()
            await stop_all(children, STOP_GRACE_S)
        if self._failure:
            self._console.print(f"tandem: {self._failure}", markup=False)
        return 1 if self._failure else 0

    def _plan(self, model: str) -> tuple[Child, list[Child]]:
        """The processes to start, with the cores divided among the workers."""
        config = self._config
        roles = ["prefill"] * config.prefill + ["decode"] * config.decode
        control, *ports = free_ports(1 + len(roles))
        threads = max(1, len(os.sched_getaffinity(0)) // len(roles))
        logs = ["--log-level", config.log_level, "--log-format", config.log_format]
        name = config.served_model_name or ("tandem-demo" if config.model == "demo" else Path(model).name)
        names = ["--served-model-name", name]
        router = Child(
            "router",
            ["router", "--model", model, "--host", config.host, "--port", str(config.port), "--control-port", str(control)]
            + ["--policy", config.policy, *names, *logs],
            PASSIVE,
        )
        environment = PASSIVE | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        shared = ["--router", f"127.0.0.1:{control}", "--threads", str(threads), "--dtype", config.dtype, "--kv-mib"]
        shared += [str(config.kv_mib), "--page-size", str(config.page_size), "--transport", config.transport, *names, *logs]
        titles = [f"{role}-{roles[:at].count(role)}" for at, role in enumerate(roles)]
        workers = [
            Child(title, [role, model, "--port", str(port), *shared], environment)
            for title, role, port in zip(titles, roles, ports, strict=True)
        ]
        return router, workers

    async def _watch(self, child: Child) -> None:
        """Starts a worker again when it dies at work; a failure before the cluster stood, or of the router, ends everything."""
        while True:
            status = await child.wait()
            if self._stopping.is_set():
                return
            permanent = status in (2, 3) or child.name == "router" or child.restarts >= MAX_RESTARTS
            if permanent:
                self._failure = f"{child.name} ended with status {status}"
                self._stopping.set()
                return
            child.restarts += 1
            self._console.print(f"{child.name} ended with status {status}; starting it again")
            await asyncio.sleep(RESTART_DELAY_S)
            await child.start()

    async def _wait_ready(self, workers: list[Child]) -> list[WorkerInfo]:
        """Waits until every worker answers and the router is ready; returns what the workers are, or nothing when stopped."""
        addresses = [f"127.0.0.1:{child.arguments[3]}" for child in workers]
        with self._console.status("starting") as status:
            infos: list[WorkerInfo] = []
            for address, child in zip(addresses, workers, strict=True):
                status.update(f"loading the model: {len(infos)} of {len(workers)} workers stand, waiting for {child.name}")
                info = await self._until(_describe, address)
                if info is None:
                    return []
                infos.append(info)
            status.update("waiting for the router to see its workers")
            url = f"http://{self._config.host}:{self._config.port}"
            if not await self._until(_ready, url + "/ready"):
                return []
            status.update("warming up: the first step and the first transfer of a process are slow")
            await self._warm_up(url, infos)
            return [] if self._failure else infos

    async def _warm_up(self, url: str, infos: list[WorkerInfo]) -> None:
        """Sends a few requests through every process, so that no user's request pays for first times; they must succeed."""
        model = infos[0].model
        length = max(1, min(WARM_TOKENS, model.max_context // 2, model.vocab_size - 1))
        prompts = [[(at + row) % length for at in range(length)] for row in range(2 * len(infos))]
        async with httpx.AsyncClient(base_url=url, timeout=START_LIMIT_S) as client:
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json={"model": model.name, "prompt": p, "max_tokens": 2}) for p in prompts),
                return_exceptions=True,
            )
        for answer in answers:
            if isinstance(answer, BaseException) or answer.status_code != 200:
                reason = repr(answer) if isinstance(answer, BaseException) else answer.text
                self._failure = f"the warm-up failed: {reason}"
                self._stopping.set()
                return

    async def _until(self, probe, target: str):  # type: ignore[no-untyped-def]
        deadline = asyncio.get_running_loop().time() + START_LIMIT_S
        while not self._stopping.is_set():
            result = await probe(target)
            if result is not None:
                return result
            if asyncio.get_running_loop().time() > deadline:
                self._failure = f"{target} did not answer within {START_LIMIT_S:.0f} s"
                self._stopping.set()
            await asyncio.sleep(0.1)
        return None


async def _describe(address: str) -> WorkerInfo | None:
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            return codec.worker_info_from_wire(
                await worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=2.0)
            )
        except grpc.aio.AioRpcError:
            return None


async def _ready(url: str) -> bool | None:
    async with httpx.AsyncClient() as client:
        try:
            return True if (await client.get(url, timeout=2.0)).status_code == 200 else None
        except httpx.HTTPError:
            return None
