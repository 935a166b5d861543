"""Ports that are free, and the one line about one that is not."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest

from tandem import ports
from tandem.errors import ConfigError
from tandem.ports import OWN_DESCRIPTORS, allow_descriptors, authority, check_port, free_ports


def test_a_taken_port_is_named_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            check_port("127.0.0.1", port, "--metrics-port")
    said = f"--metrics-port: 127.0.0.1:{port} cannot be listened on: address already in use"
    fix = "stop what listens there, or give another port"
    assert (str(caught.value), caught.value.param) == (f"{said}; {fix}", "metrics_port")
    check_port("127.0.0.1", port, "--metrics-port")


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_of_others_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--port: {host}:0 cannot be listened on"):
        check_port(host, 0, "--port")


def test_free_ports_differ_and_can_be_listened_on() -> None:
    found = free_ports(20)
    assert len(set(found)) == 20
    servers = [socket.create_server(("127.0.0.1", port)) for port in found]
    assert not set(free_ports(50)).intersection(found)
    for server in servers:
        server.close()


def test_free_ports_are_none_that_an_outgoing_connection_may_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(ports, "EPHEMERAL", file)
    file.write_text("12000\t60999\n")
    assert max(free_ports(200)) < 12000
    file.write_text("1024\t60999\n")  # leaves no room below: then Linux' usual range is kept free
    assert ports.LOWEST <= min(free_ports(5)) <= max(free_ports(200)) < ports.EPHEMERAL_LOWEST
    file.unlink()
    assert max(free_ports(200)) < ports.EPHEMERAL_LOWEST


def test_more_ports_than_there_are_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ip_local_port_range"
    file.write_text("11001\t60999\n")
    monkeypatch.setattr(ports, "EPHEMERAL", file)
    with pytest.raises(ConfigError, match="2000 ports are needed"):
        free_ports(2000)


def test_an_authority_has_brackets_around_ipv6() -> None:
    assert authority("127.0.0.1", 80) == "127.0.0.1:80"
    assert authority("::1", 80) == "[::1]:80"


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "raised", "room"),
    [
        (1024, 1 << 20, 8192, 8192 + OWN_DESCRIPTORS, 8192),
        (1024, resource.RLIM_INFINITY, 8192, 8192 + OWN_DESCRIPTORS, 8192),
        (1024, 4096, 8192, 4096, 4096 - OWN_DESCRIPTORS),
        (1 << 20, 1 << 20, 8192, None, 8192),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 8192, None, 8192),
        (1024, 1024, 8192, None, 1024 - OWN_DESCRIPTORS),
    ],
)
def test_as_many_connections_as_the_system_allows(
    soft: int, hard: int, wanted: int, raised: int | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: done.append(limits))
    assert allow_descriptors(wanted) == room
    assert done == ([] if raised is None else [(raised, hard)])
