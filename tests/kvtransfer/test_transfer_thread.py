from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from kvtransfer.arrivals import Arrival, Arrivals, Expected, Fault
from kvtransfer.backends.inproc import InprocBackend, InprocLanding
from kvtransfer.base import Buffer, Link, TransportError
from kvtransfer.manifest import NO_DIGEST, Manifest, digest
from kvtransfer.transfer_thread import TransferThread, in_thread
from tandem.errors import Overloaded, Unavailable
from tandem.testing.polling import eventually
from tests.kvtransfer.rig import FaultyBackend

TICKET = "a" * 32
STAGING: Buffer = np.arange(4096, dtype=np.uint64).view(np.uint8)


@pytest.fixture
async def thread() -> AsyncIterator[TransferThread]:
    made = TransferThread()
    made.start()
    yield made
    if made._thread.is_alive():
        made.close()


def manifest(sequence: int = 0, length: int = 1024) -> Manifest:
    return Manifest(TICKET, 0, sequence, 0, 8, length, NO_DIGEST)


def connected(backend: InprocBackend) -> tuple[InprocLanding, Link]:
    landing = backend.landing("me", "peer", 1 << 16)
    assert isinstance(landing, InprocLanding)
    link = backend.link("peer", "me", STAGING)
    link.connect(landing.metadata())
    return landing, link


async def test_a_write_is_digested_posted_and_taken_by_the_other_end(thread: TransferThread) -> None:
    landing, link = connected(InprocBackend())
    loop, got = asyncio.get_running_loop(), asyncio.Queue[Arrival]()
    arrivals = Arrivals(landing, lambda arrival: loop.call_soon_threadsafe(got.put_nowait, arrival), lambda _: None)
    await thread.attach(arrivals)
    arrivals.expect(Expected(TICKET, 0, 0, 0, 8, 512, 1024))
    assert await thread.write(link, STAGING[:1024], 512, manifest()) >= 0.0
    arrival = await got.get()
    assert isinstance(arrival.outcome, np.ndarray)
    assert np.array_equal(arrival.outcome, STAGING[:1024])
    landing.memory[:] = 0
    assert np.array_equal(arrival.outcome, STAGING[:1024]), "what is handed on is a copy"
    await thread.detach(arrivals)
    await thread.detach(arrivals)


async def test_it_sleeps_while_nothing_is_open_and_polls_while_something_is(thread: TransferThread) -> None:
    backend = FaultyBackend()
    landing, link = connected(backend)
    arrivals = Arrivals(landing, lambda _: None, lambda _: None)
    await thread.attach(arrivals)
    before = thread.polls
    for _ in range(5):
        await thread.abandon(link)  # a round through the thread
    assert thread.polls == before
    arrivals.expect(Expected(TICKET, 0, 0, 0, 8, 0, 1024))
    thread.wake()
    await eventually(lambda: thread.polls > before + 3)
    arrivals.forget(TICKET)
    backend.flowing.clear()
    write = asyncio.create_task(thread.write(link, STAGING[:1024], 0, manifest()))
    await eventually(lambda: thread.open_writes == 1)
    seen = thread.polls
    await eventually(lambda: thread.polls > seen + 3)
    backend.flowing.set()
    await write
    await eventually(lambda: thread.open_writes == 0)


async def test_a_link_that_is_abandoned_fails_its_writes_only(thread: TransferThread) -> None:
    backend = FaultyBackend()
    (_, bad), (_, good) = connected(backend), connected(backend)
    backend.flowing.clear()
    writes = [asyncio.create_task(thread.write(link, STAGING[:64], 0, manifest(0, 64))) for link in (bad, good)]
    await eventually(lambda: thread.open_writes == 2)
    await thread.abandon(bad)
    with pytest.raises(TransportError, match="the link was closed"):
        await writes[0]
    backend.flowing.set()
    await writes[1]


async def test_errors_of_a_transport_reach_the_one_who_waits(thread: TransferThread) -> None:
    backend = FaultyBackend()
    landing, link = connected(backend)
    backend.fail = True
    with pytest.raises(TransportError, match="the wire is cut"):
        await thread.write(link, STAGING[:64], 0, manifest(0, 64))
    landing.close()
    backend.fail = False
    with pytest.raises(TransportError, match="landing closed"):
        await thread.write(link, STAGING[:64], 0, manifest(0, 64))


async def test_closing_fails_what_is_under_way_and_refuses_what_comes_later(thread: TransferThread) -> None:
    backend = FaultyBackend()
    _, link = connected(backend)
    backend.flowing.clear()
    write = asyncio.create_task(thread.write(link, STAGING[:64], 0, manifest(0, 64)))
    await eventually(lambda: thread.open_writes == 1)
    thread.close()
    with pytest.raises(TransportError, match="closing"):
        await write
    with pytest.raises(Unavailable, match="has ended"):
        await thread.write(link, STAGING[:64], 0, manifest(0, 64))
    await thread.abandon(link)


async def test_the_inbox_is_bounded() -> None:
    thread = TransferThread(inbox=2)
    thread.start()
    _, link = connected(InprocBackend())
    blocked, go = threading.Event(), threading.Event()

    class Blocking:
        def post(self, view: Buffer, offset: int, manifest: bytes) -> None:
            blocked.set()
            go.wait(10)
            raise TransportError("done")

    stuck = asyncio.create_task(thread.write(Blocking(), STAGING[:64], 0, manifest(0, 64)))  # type: ignore[arg-type]
    await eventually(blocked.is_set)
    queued = [asyncio.create_task(thread.write(link, STAGING[:64], 0, manifest(0, 64))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 jobs waiting"):
        await thread.write(link, STAGING[:64], 0, manifest(0, 64))
    go.set()
    with pytest.raises(TransportError, match="done"):
        await stuck
    await asyncio.gather(*queued)
    thread.close()


async def test_blocking_work_gives_its_result_its_error_or_to_the_discarder() -> None:
    assert await in_thread(lambda: 7) == 7

    def failing() -> int:
        raise TransportError("no")

    with pytest.raises(TransportError, match="no"):
        await in_thread(failing)
    go, discarded = threading.Event(), list[int]()

    def slow() -> int:
        go.wait(10)
        return 8

    task = asyncio.create_task(in_thread(slow, discarded.append))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    await eventually(lambda: discarded == [8])


class _Told:
    """A landing that is told what has landed."""

    def __init__(self) -> None:
        self.memory: Buffer = np.zeros(4096, dtype=np.uint8)
        self.manifests: list[bytes] = []
        self.error = ""

    def guard(self, allows: object) -> None:
        self.allows = allows

    def metadata(self) -> bytes:
        return b""

    def poll(self) -> list[bytes]:
        if self.error:
            raise TransportError(self.error)
        taken, self.manifests = self.manifests, []
        return taken

    def close(self) -> None:
        self.error = "closed"


def test_arrivals_tell_what_is_wrong() -> None:
    landing, got, broken = _Told(), list[Arrival](), list[str]()
    arrivals = Arrivals(landing, got.append, broken.append)
    right = digest(landing.memory[:1024])

    def say(ticket: str = TICKET, sequence: int = 0, hashed: bytes = right, length: int = 1024) -> object:
        landing.manifests = [Manifest(ticket, 0, sequence, 0, 8, length, hashed).pack()]
        arrivals.poll()
        return got.pop().outcome if got else None

    for sequence in range(4):
        arrivals.expect(Expected(TICKET, 0, sequence, 0, 8, 1024 * sequence, 1024))
    assert isinstance(say(), np.ndarray)
    assert say() is Fault.DUPLICATE
    assert say(sequence=1, hashed=bytes(16)) is Fault.DIGEST
    assert say(sequence=2, length=1023) is Fault.FOREIGN
    assert say(sequence=9) is Fault.FOREIGN
    assert say(ticket="b" * 32) is None
    assert (arrivals.late, arrivals.outstanding) == (1, 1)
    assert arrivals.allows(3072, 1024)
    assert not arrivals.allows(0, 1024), "used grants are not in force"
    assert not arrivals.allows(3072, 1023)
    with pytest.raises(ValueError, match="given before"):
        arrivals.expect(Expected(TICKET, 0, 3, 0, 8, 0, 1024))
    arrivals.forget(TICKET)
    assert (arrivals.outstanding, arrivals.allows(3072, 1024)) == (0, False)
    assert say(sequence=3) is None
    landing.manifests = [b"?"]
    assert not arrivals.poll()
    landing.error = "cut"
    assert not arrivals.poll()
    assert broken == ["manifest has 1 bytes; 62 are expected", "cut"]
