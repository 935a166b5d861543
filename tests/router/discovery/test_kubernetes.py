"""The watch on pods against an API server over real HTTP, in every way in which it can break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from router.discovery.kubernetes import KubernetesPods
from tandem.cluster import Role
from tandem.testing.kubernetes import KubernetesEmulator, pod

SELECTOR = "app=tandem"


class Notes:
    """A roster that notes."""

    def __init__(self) -> None:
        self.now: dict[str, Role | None] = {}
        self.told: list[str] = []

    def follow(self, address: str, role: Role | None = None) -> None:
        self.now[address] = role
        self.told.append("+" + address)

    def unfollow(self, address: str) -> None:
        self.now.pop(address, None)
        self.told.append("-" + address)

    async def becomes(self, *addresses: str) -> None:
        await eventually(lambda: set(self.now) == set(addresses))


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture(autouse=True)
def no_cluster_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever runs the tests may have a kubeconfig, or be a pod."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    lead_to(monkeypatch, tmp_path / "nowhere")


def lead_to(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """The client reads KUBECONFIG when it is imported."""
    from kubernetes.aio.config import kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[KubernetesEmulator]:
    async with KubernetesEmulator() as emulator:
        lead_to(monkeypatch, emulator.kubeconfig(tmp_path / "config"))
        yield emulator


@asynccontextmanager
async def followed(server: KubernetesEmulator) -> AsyncIterator[Notes]:
    notes = Notes()
    source = KubernetesPods("", SELECTOR, notes, seed=1)
    await source.start()
    task = asyncio.create_task(source.run())
    try:
        await eventually(lambda: server.watches)
        yield notes
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_pods_come_and_go(server: KubernetesEmulator) -> None:
    server.put(pod("old", "10.0.0.1", 9000, "prefill"))
    server.put(pod("starting", "10.0.0.2", 9000, ready=False))
    async with followed(server) as notes:
        assert notes.now == {"10.0.0.1:9000": Role.PREFILL}
        server.put(pod("new", "fd00::1", 9001))
        await notes.becomes("10.0.0.1:9000", "[fd00::1]:9001")
        server.set_ready("starting", True)
        await notes.becomes("10.0.0.1:9000", "10.0.0.2:9000", "[fd00::1]:9001")
        server.set_ready("old", False)
        await notes.becomes("10.0.0.2:9000", "[fd00::1]:9001")
        server.terminate("new")
        await notes.becomes("10.0.0.2:9000")
        server.delete("new")
        server.delete("starting")
        await notes.becomes()
        server.set_ready("old", True)
        await notes.becomes("10.0.0.1:9000")
        assert sum("watch" not in request for request in server.requests) == 1
