"""Checks of the KV transports: a page goes over each from this process to itself."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvtransfer.backends.nixl import NixlBackend
from kvtransfer.backends.tcp import TcpBackend
from kvtransfer.base import Backend, TransportError
from tandem.cli.doctor.report import Check, Group, State
from tandem.config import keep_native_ports_local
from tandem.errors import Unavailable
from tandem.worker.self_probe import send_page

LOOPBACK = "127.0.0.1"


def check_transports() -> Group:
    """NIXL, which is faster, and TCP, which must always work."""
    keep_native_ports_local(LOOPBACK)
    install = "pip install tandem-serve[nixl]; until then KV goes over TCP"
    return Group(
        "transports",
        [
            _loopback("nixl", NixlBackend, State.WARNING, install),
            _loopback("tcp", lambda: TcpBackend(LOOPBACK), State.ERROR, "let processes connect to 127.0.0.1"),
        ],
    )


def _loopback(name: str, make: Callable[[], Backend], otherwise: State, fix: str) -> Check:
    try:
        backend = make()
        started = time.perf_counter()
        send_page(backend)
    except (ImportError, OSError, TransportError, Unavailable) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return Check(name, f"moves no page: {reason}", otherwise, fix)
    return Check(name, f"a page went over it, to this process, in {(time.perf_counter() - started) * 1e3:.0f} ms")
