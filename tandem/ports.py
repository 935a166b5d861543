"""TCP ports of this machine: which can be taken, which nobody has, and how many connections there may be."""

from __future__ import annotations

import errno
import ipaddress
import logging
import random
import resource
import socket
from pathlib import Path

from tandem.errors import ConfigError

log = logging.getLogger(__name__)
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Where Linux says from which range outgoing connections get their ports."""
LOWEST = 10_000
EPHEMERAL_LOWEST = 32_768
"""Linux' default."""
OWN_DESCRIPTORS = 256
"""Files and connections of a process that are no client's."""


def authority(host: str, port: int) -> str:
    """`host:port` as it stands in URLs; IPv6 addresses get brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether an address that is listened on can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


FIXES = {
    errno.EADDRINUSE: "stop what listens there, or give another port",
    errno.EADDRNOTAVAIL: "give an address of this machine",
    errno.EACCES: "give a port above 1023",
}


def refused(error: OSError, host: str, port: int, setting: str) -> ConfigError:
    """Why a port cannot be listened on, naming the flag `setting`, and what to do about it."""
    reason, fix = (error.strerror or str(error)).lower(), FIXES.get(error.errno or 0, "")
    text = f"{setting}: {authority(host, port)} cannot be listened on: {reason}"
    return ConfigError(f"{text}; {fix}" if fix else text, setting.removeprefix("--").replace("-", "_"))


def check_port(host: str, port: int, setting: str) -> None:
    """Raises ConfigError, naming the flag `setting`, unless `port` of `host` can be listened on now; 0 is any port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise refused(error, host, port, setting) from None


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports that nobody listens on now, below those of outgoing connections.

    A process that is given one may start, or start again, much later: no connection that anybody opens meanwhile can
    get it by chance. Raises ConfigError when there are not that many.
    """
    found: list[int] = []
    candidates = range(LOWEST, _ephemeral_lowest())
    for port in random.sample(candidates, len(candidates)):
        if len(found) == count:
            break
        try:
            check_port(host, port, "--port")
        except ConfigError:
            continue
        found.append(port)
    if len(found) < count:
        raise ConfigError(f"{count} ports are needed; {host} has {len(found)} free ones in {candidates}")
    return found


def allow_descriptors(wanted: int) -> int:
    """Lets this process have `wanted` connections, as far as the system does; how many there is room for.

    What logs, listening ports and connections within the cluster take is left out.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    limit = wanted + OWN_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(wanted + OWN_DESCRIPTORS, hard)
    if soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    room = max(min(wanted, max(soft, limit) - OWN_DESCRIPTORS), 1)
    if room < wanted:
        log.warning("%d connections are wanted at once; this system has room for %d", wanted, room)
    return room


def _ephemeral_lowest() -> int:
    try:
        lowest = int(EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        lowest = EPHEMERAL_LOWEST
    return lowest if lowest > LOWEST + 1000 else EPHEMERAL_LOWEST
