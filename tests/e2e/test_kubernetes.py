"""A router that finds its workers by their pods, under load: every piece of news counts, and no request is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
from openai import AsyncOpenAI

from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, cluster
from tandem.testing.kubernetes import KubernetesEmulator, pod

log = logging.getLogger(__name__)

CLIENTS = 2
OUTPUT_TOKENS = 60
LIMIT_S = 20
"""For each piece of news to be seen; what it takes is noted, not asserted."""


@asynccontextmanager
async def serving(folder: Path, server: KubernetesEmulator) -> AsyncIterator[Cluster]:
    """A router and two decode workers, each in a pod of its name."""

    def announce(made: Cluster) -> None:
        made.router.environment = {"KUBECONFIG": str(server.kubeconfig(folder / "kubeconfig"))}
        for name, process in made.workers.items():
            server.put(pod(name, "127.0.0.1", process.port))

    model = make_checkpoint(folder / "llama", CheckpointSpec(family="llama", seed=1))
    found, small = ["--kubernetes-selector", "app=tandem"], ["--kv-mib", "16"]
    with ExitStack() as stack:
        made = cluster(model, folder, prefill=0, decode=2, announce=announce, router_args=found, worker_args=small)
        running = await asyncio.to_thread(stack.enter_context, made)
        yield running
        await asyncio.to_thread(stack.close)


class Observer:
    """What the router's metrics say of one worker, and how long it took after each piece of news."""

    def __init__(self, running: Cluster, name: str) -> None:
        self._url = running.url + "/metrics"
        self._worker = f"127.0.0.1:{running.workers[name].port}"
        self._client = httpx.AsyncClient(trust_env=False, timeout=10)
        self.seen: dict[str, float] = {}

    async def value(self, metric: str) -> float | None:
        """The worker's sample of a metric, unless there is none."""
        page = (await self._client.get(self._url)).text
        found = [line for line in page.splitlines() if line.startswith(metric + "{") and self._worker in line]
        return float(found[0].rsplit(" ", 1)[1]) if found else None

    async def until(self, news: str, metric: str, wanted: Callable[[float | None], bool]) -> None:
        begun = time.monotonic()
        while not wanted(value := await self.value(metric)):
            assert time.monotonic() - begun < LIMIT_S, f"{news}: {metric} is {value}"
            await asyncio.sleep(0.01)
        self.seen[news] = round(time.monotonic() - begun, 3)

    async def drains(self, news: str) -> None:
        await self.until(news, "tandem_fleet_draining", lambda value: value == 1)

    async def serves(self, news: str) -> None:
        await self.until(news, "tandem_fleet_draining", lambda value: value == 0)

    async def close(self) -> None:
        await self._client.aclose()


class Load:
    """Clients that stream all the time; each answer must be whole."""

    def __init__(self, running: Cluster) -> None:
        self.asked = self.finished = 0
        self.over = False
        self._openai = AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=60)

    async def ask(self) -> None:
        while not self.over:
            self.asked += 1
            prompt = [(self.asked * 31 + position * 17) % 250 for position in range(100)]
            stream = await self._openai.completions.create(
                model="llama",
                prompt=prompt,
                max_tokens=OUTPUT_TOKENS,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            usages = [chunk.usage async for chunk in stream if chunk.usage is not None]
            assert [usage.completion_tokens for usage in usages] == [OUTPUT_TOKENS]
            self.finished += 1

    async def some_more(self) -> None:
        """Waits until each client has had another answer."""
        until = self.finished + 2 * CLIENTS
        while self.finished < until:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        await self._openai.close()


async def pods_change(server: KubernetesEmulator, observer: Observer, load: Load, process_port: int) -> None:
    """Ready, not ready, deleted, and another pod at the same address."""
    server.set_ready("decode-1", False)
    await observer.drains("not ready")
    # What it had goes on to its end; then nothing runs there, however much is asked.
    await observer.until("empty", "tandem_fleet_running", lambda value: value == 0)
    await load.some_more()
    assert await observer.value("tandem_fleet_running") == 0
    server.set_ready("decode-1", True)
    await observer.serves("ready")
    await observer.until("busy", "tandem_fleet_running", lambda value: bool(value))
    server.terminate("decode-1")
    await observer.drains("deleted")
    server.delete("decode-1")
    server.put(pod("decode-1", "127.0.0.1", process_port, uid="another"))
    await observer.serves("added at the same address")


async def server_changes(server: KubernetesEmulator, observer: Observer, load: Load) -> None:
    """Expired watches in both forms, and a server that is away while a pod changes."""
    server.expire()
    server.set_ready("decode-1", False)
    await observer.drains("410 in the stream")
    server.gone_as = "status"
    server.cut()
    server.set_ready("decode-1", True)
    server.skip()
    server.compact()
    await observer.serves("410 as status")
    await server.stop()
    server.set_ready("decode-1", False)
    server.compact()
    await load.some_more()
    assert await observer.value("tandem_fleet_draining") == 0
    await server.start()
    await observer.drains("restart of the server")
    server.set_ready("decode-1", True)
    await observer.serves("ready after the restart")


async def test_a_router_in_kubernetes_loses_no_request(tmp_path: Path) -> None:
    async with KubernetesEmulator() as server, serving(tmp_path, server) as running:
        observer, load = Observer(running, "decode-1"), Load(running)
        second = running.workers["decode-1"]
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(load.ask())
            await load.some_more()
            await pods_change(server, observer, load, second.port)
            await server_changes(server, observer, load)
            # A worker that nobody lists is nobody's, however alive it is.
            server.terminate("decode-1")
            await observer.drains("deleted again")
            await observer.until("empty again", "tandem_fleet_running", lambda value: value == 0)
            server.delete("decode-1")
            second.kill()
            await observer.until("gone", "tandem_fleet_pages", lambda value: value is None)
            second.start()
            await asyncio.to_thread(running._until, lambda: running.answers(second), "decode-1 does not answer")
            await load.some_more()
            assert await observer.value("tandem_fleet_pages") is None
            server.put(pod("decode-1", "127.0.0.1", second.port, uid="third"))
            await observer.serves("added")
            load.over = True
        assert load.asked == load.finished > 0
        log.info("seconds until each piece of news was seen: %s", observer.seen)
        await observer.close()
        await load.close()


async def test_a_pod_of_the_wrong_role_is_not_used(tmp_path: Path) -> None:
    async with KubernetesEmulator() as server, serving(tmp_path, server) as running:
        observer = Observer(running, "decode-1")
        server.put(pod("decode-1", "127.0.0.1", running.workers["decode-1"].port, role="prefill"))
        await observer.drains("wrong role")
        text = "it is listed as a prefill worker and says that it is a decode worker"
        assert text in running.router.log.read_text()
        server.put(pod("decode-1", "127.0.0.1", running.workers["decode-1"].port))
        await observer.serves("right role")
        await observer.close()
