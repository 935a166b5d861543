"""The watch on pods against an API server over real HTTP, in every way in which it can break."""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from router.discovery.kubernetes import AWAY_RETRY_S, BUSY_RETRY_S, KubernetesPods
from router.discovery.kubernetes_errors import ApiAway, ApiRefused
from tandem.cluster import Role
from tandem.errors import ConfigError, Unavailable
from tandem.testing.kubernetes import KubernetesEmulator, pod
from tandem.testing.polling import eventually
from tests.security.rig import Authority

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


async def test_a_watch_that_ends_in_order_goes_on_where_it_was(server: KubernetesEmulator) -> None:
    async with followed(server) as notes:
        server.put(pod("first", "10.0.0.1", 9000))
        await notes.becomes("10.0.0.1:9000")
        server.skip()
        server.bookmark()
        server.put(pod("second", "10.0.0.2", 9000))
        await notes.becomes("10.0.0.1:9000", "10.0.0.2:9000")
        server.cut()
        await eventually(lambda: not server.watches)
        server.put(pod("third", "10.0.0.3", 9000))
        await notes.becomes("10.0.0.1:9000", "10.0.0.2:9000", "10.0.0.3:9000")
        assert sum("watch" not in request for request in server.requests) == 1
        assert notes.told == ["+10.0.0.1:9000", "+10.0.0.2:9000", "+10.0.0.3:9000"]


async def test_a_bookmark_moves_the_place_to_go_on_from(server: KubernetesEmulator) -> None:
    async with followed(server) as notes:
        server.put(pod("first", "10.0.0.1", 9000))
        server.skip(1000)
        server.bookmark()
        await notes.becomes("10.0.0.1:9000")
        server.end()
        await eventually(lambda: len(server.requests) > 2)
        assert server.requests[2].get("resourceVersion") == str(server.version)


@pytest.mark.parametrize("gone_as", ["status", "event"])
async def test_an_expired_watch_begins_with_a_list_that_tells_what_was_missed(
    server: KubernetesEmulator, gone_as: Literal["status", "event"]
) -> None:
    server.gone_as = gone_as
    for name, ip in (("first", "10.0.0.1"), ("second", "10.0.0.2"), ("third", "10.0.0.3")):
        server.put(pod(name, ip, 9000))
    async with followed(server) as notes:
        await server.stop()
        server.delete("first")
        server.set_ready("second", False)
        server.put(pod("fourth", "10.0.0.4", 9000))
        server.compact()
        assert set(notes.now) == {"10.0.0.1:9000", "10.0.0.2:9000", "10.0.0.3:9000"}
        await server.start()
        await notes.becomes("10.0.0.3:9000", "10.0.0.4:9000")
        assert "-10.0.0.3:9000" not in notes.told
        server.put(pod("fifth", "10.0.0.5", 9000))
        await notes.becomes("10.0.0.3:9000", "10.0.0.4:9000", "10.0.0.5:9000")


async def test_an_error_in_the_stream_is_an_expired_watch(server: KubernetesEmulator) -> None:
    server.put(pod("first", "10.0.0.1", 9000))
    async with followed(server) as notes:
        server.expire()
        await eventually(lambda: sum("watch" not in request for request in server.requests) == 2 and server.watches)
        server.delete("first")
        await notes.becomes()


@pytest.mark.parametrize(
    "line", [b"<html>\n", b'{"type": 7}\n', b"[]\n", b'{"type": "ADDED", "object": {"metadata": 1}}\n']
)
async def test_nonsense_ends_nothing(server: KubernetesEmulator, line: bytes) -> None:
    async with followed(server) as notes:
        server.say_line(line)
        server.put(pod("first", "10.0.0.1", 9000))
        await notes.becomes("10.0.0.1:9000")


async def test_duplicates_and_late_news_change_nothing(server: KubernetesEmulator) -> None:
    async with followed(server) as notes:
        server.put(pod("first", "10.0.0.1", 9000, ready=False))
        late = server.described("first")
        server.set_ready("first", True)
        await notes.becomes("10.0.0.1:9000")
        server.say("MODIFIED", server.described("first"))
        server.say("MODIFIED", late)
        server.put(pod("second", "10.0.0.2", 9000))
        await notes.becomes("10.0.0.1:9000", "10.0.0.2:9000")
        last = server.described("second")
        server.delete("second")
        await notes.becomes("10.0.0.1:9000")
        server.say("MODIFIED", last)
        server.put(pod("third", "10.0.0.3", 9000))
        await notes.becomes("10.0.0.1:9000", "10.0.0.3:9000")
        assert notes.told == [
            "-10.0.0.1:9000",
            "+10.0.0.1:9000",
            "+10.0.0.2:9000",
            "-10.0.0.2:9000",
            "+10.0.0.3:9000",
        ]


async def test_a_list_of_several_pages_is_one_list(server: KubernetesEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.discovery.kubernetes_api.PAGE", 2)
    for number in range(5):
        server.put(pod(f"pod-{number}", f"10.0.0.{number}", 9000))
    async with followed(server) as notes:
        assert len(notes.now) == 5
        assert [request["limit"] for request in server.requests if "limit" in request] == ["2", "2", "2"]


async def test_what_is_wrong_with_a_pod_is_said_once(
    server: KubernetesEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    mute = pod("mute", "10.0.0.1", 9000)
    mute["spec"]["containers"][0]["ports"] = []
    async with followed(server) as notes:
        for _ in range(3):
            server.put(mute)
        server.put(pod("good", "10.0.0.2", 9000))
        await notes.becomes("10.0.0.2:9000")
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "pod mute cannot be used as a worker: it has no container port named grpc and no annotation tandem/grpc-port"
    ]


async def test_a_server_that_refuses_is_asked_less_and_less(
    server: KubernetesEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    server.put(pod("first", "10.0.0.1", 9000))
    async with followed(server) as notes:
        server.refuse = (403, "pods is forbidden")
        server.cut()
        await eventually(lambda: len(server.requests) >= 5)
        server.put(pod("second", "10.0.0.2", 9000))
        assert set(notes.now) == {"10.0.0.1:9000"}
        server.refuse = None
        await notes.becomes("10.0.0.1:9000", "10.0.0.2:9000")
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "1 workers known last are kept" in warned[0]


def test_pauses_are_bounded_and_spread() -> None:
    source = KubernetesPods("", SELECTOR, Notes(), seed=3)
    away = [source._pause(ApiAway("")) for _ in range(200)]
    assert 0.05 <= away[0] <= 0.1
    assert all(AWAY_RETRY_S / 2 <= pause <= AWAY_RETRY_S for pause in away[4:])
    assert len(set(away)) == len(away)
    source = KubernetesPods("", SELECTOR, Notes(), seed=3)
    busy = [source._pause(ApiRefused(429, "", 5.0)) for _ in range(20)]
    assert 2.5 <= busy[0] <= 5.0
    assert BUSY_RETRY_S / 2 <= busy[-1] <= BUSY_RETRY_S


def test_answers_that_may_be_others_later_are_no_wrong_settings() -> None:
    asked = (400, 401, 403, 404, 408, 409, 422, 429, *range(500, 600))
    assert {status for status in asked if not ApiRefused(status, "").busy} == {400, 401, 403, 404, 409, 422}


async def refused(selector: str = SELECTOR, namespace: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        await KubernetesPods(namespace, selector, Notes()).start()
    assert caught.value.param == "kubernetes_selector"
    return str(caught.value)


async def test_wrong_settings_are_one_line_at_the_start(server: KubernetesEmulator) -> None:
    text = await refused("app=(")
    assert "--kubernetes-selector is app=( and" in text
    assert "400 unable to parse requirement: app=(; correct --kubernetes-selector" in text
    text = await refused(namespace="elsewhere")
    assert "403 pods is forbidden in the namespace elsewhere; give the service account a Role" in text
    server.token = "another"
    assert "401 Unauthorized; the API server does not know this service account" in await refused()


async def test_without_a_way_to_a_server_the_line_says_what_there_could_be() -> None:
    text = await refused()
    assert "that needs a pod's service account" in text
    assert "KUBECONFIG" in text


async def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "router.discovery.kubernetes_api", None)
    assert "pip install 'tandem-serve[k8s]'" in await refused()


async def test_a_server_that_is_away_at_the_start_is_waited_for_and_given_up(
    server: KubernetesEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.stop()
    with monkeypatch.context() as hurried:
        hurried.setattr("router.discovery.kubernetes.START_S", 0.3)
        with pytest.raises(Unavailable, match=r"--kubernetes-selector is app=tandem and the API server is http://127"):
            await KubernetesPods("", SELECTOR, Notes()).start()
    source = KubernetesPods("", SELECTOR, notes := Notes())
    server.put(pod("first", "10.0.0.1", 9000))
    starting = asyncio.create_task(source.start())
    await server.start()
    await starting
    assert set(notes.now) == {"10.0.0.1:9000"}
    await source._api.close()


async def test_in_a_pod_the_service_account_opens_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kubernetes.aio.config import incluster_config

    mine = Authority().issue()
    for file, content in (
        ("ca.crt", mine.authority),
        ("token", b"of-this-pod"),
        ("namespace", b"serving\n"),
        ("pem", mine.chain + mine.key),
    ):
        (tmp_path / file).write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    async with KubernetesEmulator(token="of-this-pod", ssl=context) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
        monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
        lead_to(monkeypatch, KubernetesEmulator().kubeconfig(tmp_path / "kubeconfig"))  # the account comes first
        server.put(pod("first", "10.0.0.1", 9000))
        async with followed(server) as notes:
            assert set(notes.now) == {"10.0.0.1:9000"}
        (tmp_path / "ca.crt").write_bytes(Authority().issue().authority)
        monkeypatch.setattr("router.discovery.kubernetes.START_S", 0.2)
        with pytest.raises(Unavailable, match="certificate verify failed"):
            await KubernetesPods("", SELECTOR, Notes()).start()
