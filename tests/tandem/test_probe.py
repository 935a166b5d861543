"""Asking one worker what it is: who answers, who does not, and who knows another token."""

from __future__ import annotations

import pytest

from tandem.cluster import Role
from tandem.errors import ConfigError, Unavailable
from tandem.ports import free_ports
from tandem.testing.workers import FakeWorker
from tandem.trust import Trust
from tandem.wire.probe import ask_workers, describe, identify


async def test_every_way_of_asking_says_the_same_of_who_does_not_answer() -> None:
    (port,) = free_ports(1)
    nobody = f"127.0.0.1:{port}"
    server = Trust("secret-of-sixteen").server()
    closed = f"127.0.0.1:{Trust().listen(server, '127.0.0.1:0')}"
    await server.start()
    other = Trust("another-of-sixteen")
    try:
        assert await describe(nobody, other) is None
        assert await describe(closed, other) is None
        with pytest.raises(Unavailable) as silent:
            await identify(nobody, other)
        with pytest.raises(ConfigError) as refused:
            await identify(closed, other)
        answers, reasons = await ask_workers([nobody, closed], other)
        assert answers == {}
        assert reasons == {nobody: str(silent.value), closed: str(refused.value)}
        assert str(silent.value).startswith(f"no worker answers at {nobody}: ")
        assert str(refused.value) == f"TANDEM_TOKEN: {closed} knows another one; give its cluster's"
    finally:
        await server.stop(None)


async def test_a_worker_that_cannot_be_probed_says_who_it_is() -> None:
    async with FakeWorker(Role.DECODE) as worker:
        address = worker.info.address
        assert await identify(address) == await describe(address) == worker.info
        answers, reasons = await ask_workers([address], Trust())
        assert answers == {}
        assert reasons[address].startswith("it does not tell its cluster: ")
