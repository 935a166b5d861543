"""A network namespace for each worker, on one bridge: links that can be cut for one pair, or made slow.

Needs root and `ip` and `tc` of iproute2. A pair is cut by giving each end a wrong hardware address for the other: what
they send each other is lost without a word, while both reach everybody else.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence

from tandem.testing.cluster import Host

BRIDGE = "tandem-br"
SUBNET = "10.77.0"
NOWHERE = "02:00:00:00:00:ff"
SLOW = ("tbf", "rate", "8mbit", "burst", "64k", "latency", "2s")
"""1 MB/s."""
ENVIRONMENT = (("UCX_TLS", "tcp"), ("UCX_NET_DEVICES", "eth0"), ("TANDEM_METRICS_TOKEN", "token-of-the-fault-matrix"))
"""Between namespaces of one machine UCX would use shared memory, and no link would matter."""


def run(*command: str) -> None:
    """Raises CalledProcessError, or FileNotFoundError where the command is missing."""
    subprocess.run(command, check=True, capture_output=True, text=True)


class Network:
    """Hosts by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, start=2)}
        self.hosts = {"router": Host(f"{SUBNET}.1")}
        for name, address in self._addresses.items():
            self.hosts[name] = Host(address, ("ip", "netns", "exec", self._namespace(name)), ENVIRONMENT)

    @staticmethod
    def _namespace(name: str) -> str:
        return f"tandem-{name}"

    def make(self) -> None:
        """Makes bridge and namespaces."""
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for name, address in self._addresses.items():
            space, outside = self._namespace(name), self._outside(name)
            run("ip", "netns", "add", space)
            run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "link", "set", outside, "master", BRIDGE, "up")
            self._inside(name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            self._inside(name, "ip", "link", "set", "eth0", "up")
            self._inside(name, "ip", "link", "set", "lo", "up")

    def _inside(self, name: str, *command: str) -> None:
        run("ip", "netns", "exec", self._namespace(name), *command)

    def destroy(self) -> None:
        """Removes everything, as far as it is there."""
        for name in self._addresses:
            with contextlib.suppress(subprocess.CalledProcessError):
                run("ip", "netns", "del", self._namespace(name))
            # A namespace in which a process lives on keeps its link.
            with contextlib.suppress(subprocess.CalledProcessError):
                run("ip", "link", "del", self._outside(name))
        with contextlib.suppress(subprocess.CalledProcessError):
            run("ip", "link", "del", BRIDGE)

    def cut(self, one: str, other: str) -> None:
        """Nothing gets from one to the other any more."""
        for here, there in ((one, other), (other, one)):
            address = self._addresses[there]
            self._inside(here, "ip", "neigh", "replace", address, "lladdr", NOWHERE, "dev", "eth0", "nud", "permanent")

    def mend(self, one: str, other: str) -> None:
        """Ends a cut."""
        for here, there in ((one, other), (other, one)):
            self._inside(here, "ip", "neigh", "del", self._addresses[there], "dev", "eth0")

    def slow(self, name: str) -> None:
        """What a host sends, and what it is sent, passes at 1 MB/s."""
        self._inside(name, "tc", "qdisc", "add", "dev", "eth0", "root", *SLOW)
        run("tc", "qdisc", "add", "dev", self._outside(name), "root", *SLOW)

    def fast(self, name: str) -> None:
        """Ends that."""
        self._inside(name, "tc", "qdisc", "del", "dev", "eth0", "root")
        run("tc", "qdisc", "del", "dev", self._outside(name), "root")

    def _outside(self, name: str) -> str:
        return f"tandem-v{list(self._addresses).index(name)}"


@contextlib.contextmanager
def network(names: Sequence[str]) -> Iterator[Network | str]:
    """Hosts for these workers; where they cannot be made, why."""
    made = Network(names)
    made.destroy()
    try:
        made.make()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        made.destroy()
        yield f"no network namespaces: {getattr(error, 'stderr', '') or error}".strip()
        return
    try:
        yield made
    finally:
        made.destroy()
