"""The transports, and the choice between them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kvtransfer.backends.nixl import NixlBackend
from kvtransfer.backends.tcp import TcpBackend
from kvtransfer.base import Backend, TransportError
from tandem.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The transports of a worker: it receives with `preferred` and sends with what a receiver asks for."""

    preferred: Backend
    all: tuple[Backend, ...]
    reason: str
    """One line: why this one."""


def choose(transport: str, host: str = "127.0.0.1") -> Chosen:
    """The backends for the setting `transport`: auto, nixl or tcp. May block for a second.

    host: the address the TCP transport listens on and announces. Raises ConfigError when nixl is demanded and unusable.
    """
    if transport not in ("auto", "nixl", "tcp"):
        raise ConfigError(f"transport is {transport}; it must be auto, nixl or tcp", "transport")
    tcp = TcpBackend(host)
    if transport == "tcp":
        return _chosen(tcp, (tcp,), "as set")
    try:
        nixl = NixlBackend()
    except (ImportError, TransportError) as error:
        if transport == "nixl":
            raise ConfigError(f"transport is nixl, but it cannot be used here: {error}", "transport") from error
        return _chosen(tcp, (tcp,), f"nixl cannot be used here: {error}")
    return _chosen(nixl, (nixl, tcp), "as set" if transport == "nixl" else "it is installed and an agent can be made")


def _chosen(preferred: Backend, backends: tuple[Backend, ...], reason: str) -> Chosen:
    log.info("KV transport is %s: %s", preferred.name, reason)
    return Chosen(preferred, backends, reason)
