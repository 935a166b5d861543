from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections import defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest

from kvtransfer import backends
from kvtransfer.backends import choose
from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.backends.nixl import NixlBackend
from kvtransfer.backends.tcp import TcpBackend
from kvtransfer.base import Backend, Buffer, Landing, Link, TransportError
from tandem.errors import ConfigError

T = TypeVar("T")

SLAB = 1 << 20
STAGING: Buffer = np.random.default_rng(0).integers(0, 256, SLAB, dtype=np.uint8)


@pytest.fixture(params=[InprocBackend, TcpBackend])
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.param()
    return made


def pair(backend: Backend, allows: Callable[[int, int], bool] = lambda offset, length: True) -> tuple[Landing, Link]:
    landing = backend.landing("me", "peer", SLAB)
    landing.guard(allows)
    link = backend.link("peer", "me", STAGING)
    link.connect(landing.metadata())
    return landing, link


def until(work: Callable[[], T]) -> T:
    """Polls until something comes, or raises."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if result := work():
            return result
        time.sleep(0.001)
    raise AssertionError("nothing came")


def done(link: Link, handle: Any) -> bool:
    """Polls until the write is complete, or raises."""
    return until(lambda: link.poll(handle))


def test_bytes_then_manifest_then_done(backend: Backend) -> None:
    landing, link = pair(backend)
    handles = [link.post(STAGING[i * 1000 : i * 1000 + 999], i * 2000, b"manifest %d" % i) for i in range(5)]
    got: list[bytes] = []
    while len(got) < 5:
        got += until(landing.poll)
    assert got == [b"manifest %d" % i for i in range(5)]
    for i, handle in enumerate(handles):
        done(link, handle)
        assert np.array_equal(landing.memory[i * 2000 : i * 2000 + 999], STAGING[i * 1000 : i * 1000 + 999])
        assert not landing.memory[i * 2000 + 999 : i * 2000 + 2000].any()
    link.close()
    landing.close()


def test_a_large_write_and_then_a_closed_landing(backend: Backend) -> None:
    landing, link = pair(backend)
    handle = link.post(STAGING, 0, b"all")
    done(link, handle)
    assert landing.poll() == [b"all"]
    assert np.array_equal(landing.memory, STAGING)
    landing.close()
    landing.memory[:] = 0

    def write() -> object:
        return link.poll(link.post(STAGING[:64], 0, b"late"))

    with pytest.raises(TransportError):
        until(write)
    assert not landing.memory.any()
    link.close()
    link.close()


def test_connecting_to_nothing_fails(backend: Backend) -> None:
    landing, link = pair(backend)
    link.close()
    landing.close()
    lost = backend.link("peer", "me", STAGING)
    with pytest.raises(TransportError):
        lost.connect(landing.metadata() if backend.name == "tcp" else b"?")
    with pytest.raises(TransportError):
        backend.link("peer", "me", STAGING).connect(b"")
    lost.close()


def test_tcp_takes_no_write_without_a_grant_in_force() -> None:
    landing, link = pair(TcpBackend(), lambda offset, length: (offset, length) == (4096, 64))
    done(link, link.post(STAGING[:64], 4096, b"granted"))
    assert landing.poll() == [b"granted"]
    handle = link.post(STAGING[:64], 0, b"not granted")
    with pytest.raises(TransportError, match="TCP"):
        done(link, handle)
    with pytest.raises(TransportError, match="64 bytes at 0 without a grant"):
        until(landing.poll)
    assert not landing.memory[:4096].any()
    link.close()
    landing.close()


def test_tcp_cannot_be_made_to_write_outside_the_slab() -> None:
    landing = TcpBackend().landing("me", "peer", SLAB)
    landing.guard(lambda offset, length: True)
    metadata = landing.metadata()
    (port,) = struct.unpack_from("<H", metadata)
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(metadata[2:34] + struct.pack("<QQH", SLAB - 10, 64, 0) + b"x" * 64)
        with pytest.raises(TransportError, match="without a grant"):
            until(landing.poll)
    assert not landing.memory[:-10].any()
    landing.close()


def test_tcp_keeps_strangers_out_and_the_peer_gets_in_afterwards() -> None:
    landing = TcpBackend().landing("me", "peer", SLAB)
    landing.guard(lambda offset, length: True)
    metadata = landing.metadata()
    (port,) = struct.unpack_from("<H", metadata)
    for said in (b"y" * 32, b"short"):
        with socket.create_connection(("127.0.0.1", port)) as stranger, contextlib.suppress(OSError):
            stranger.sendall(said + struct.pack("<QQH", 0, 4, 0) + b"evil")
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    link = TcpBackend().link("peer", "me", STAGING)
    link.connect(metadata)
    done(link, link.post(STAGING[:64], 0, b"m"))
    assert landing.poll() == [b"m"]
    link.close()
    landing.close()


def test_a_host_that_is_not_ours_cannot_be_listened_on() -> None:
    with pytest.raises(TransportError, match=r"192\.0\.2\.1"):
        TcpBackend("192.0.2.1").landing("me", "peer", SLAB)


def test_a_slab_that_served_is_kept_when_no_agent_can_be_made_for_it() -> None:
    broken = False

    def register(region: object, mem_type: str) -> str:
        if broken:
            raise RuntimeError("NIXL_ERR_BACKEND")
        return "registered"

    agent = SimpleNamespace(backends=["UCX"], register_memory=register, deregister_memory=lambda registered: None)
    api = SimpleNamespace(
        nixl_thread_sync_t=SimpleNamespace(NIXL_THREAD_SYNC_STRICT=0), nixl_agent_config=lambda **settings: None,
        nixl_agent=lambda name, config: agent,
    )  # fmt: skip
    backend = NixlBackend.__new__(NixlBackend)
    backend._api, backend._slabs = api, defaultdict(deque)
    landing = backend.landing("me", "peer", SLAB)
    memory = landing.memory
    landing.close()
    broken = True
    with pytest.raises(TransportError, match="NIXL_ERR_BACKEND"):
        backend.landing("me", "peer", SLAB)
    broken = False
    assert backend.landing("me", "peer", SLAB).memory is memory


def test_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Backend:
        raise ImportError("no NIXL wheel is installed")

    def broken() -> Backend:
        raise TransportError("NIXL agent: no plugin")

    assert choose("tcp").preferred.name == "tcp"
    for unusable, text in ((missing, "no NIXL wheel"), (broken, "no plugin")):
        monkeypatch.setattr(backends, "NixlBackend", unusable)
        chosen = choose("auto")
        assert (chosen.preferred.name, [each.name for each in chosen.all]) == ("tcp", ["tcp"])
        assert text in chosen.reason
        with pytest.raises(ConfigError, match=text):
            choose("nixl")
    monkeypatch.setattr(backends, "NixlBackend", InprocBackend)
    assert [each.name for each in choose("auto").all] == ["inproc", "tcp"]
    with pytest.raises(ConfigError, match="must be auto, nixl or tcp"):
        choose("pigeon")
