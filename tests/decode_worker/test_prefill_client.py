"""One prefill worker of a plan after another; what all of them failed to bring is left to be computed here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from decode_worker.prefill_client import Outcome, PrefillClient
from kvtransfer.base import FetchResult, SpanSink
from kvtransfer.pairs import PairPool, Target
from tandem import obs
from tandem.cluster import Ticket
from tandem.errors import Overloaded, Unavailable
from tandem.testing.kv import FakeSink
from tandem.types import GenerateRequest, SamplingParams, TokenIds

PROMPT = tuple(range(10))
REQUEST = GenerateRequest("a" * 32, "m", PROMPT, SamplingParams(), attempt=3, salt="tenant", priority=2)
A, B, C = (Target(letter * 32, f"host-{letter}:1") for letter in "abc")


@dataclass
class FakePair:
    """A pair whose connection and fetches end as scripted."""

    peer: str
    results: list[FetchResult] = field(default_factory=list)
    refuse: Exception | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Holds `connect` back while clear."""
    connected: int = 0
    closed: bool = False
    reason: str = "not connected"
    asked: list[tuple[Ticket, TokenIds, str, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    async def connect(self) -> None:
        self.connected += 1
        await self.gate.wait()
        if self.refuse is not None:
            raise self.refuse
        self.reason = ""

    async def fetch(
        self, ticket: Ticket, tokens: TokenIds, salt: str, adapter: str, priority: int, sink: SpanSink
    ) -> FetchResult:
        self.asked.append((ticket, tokens, salt, adapter, priority))
        return self.results.pop(0) if self.results else FetchResult(len(tokens))

    async def close(self) -> None:
        self.closed, self.reason = True, "closed"

    def leaks(self) -> list[str]:
        return [] if self.closed else [f"pair {self.peer} leaks"]


class Rig:
    """A client over fake pairs, one for each incarnation."""

    def __init__(self, *pairs: FakePair) -> None:
        self.pairs = {pair.peer: pair for pair in pairs}
        self.made: list[str] = []
        self.failures: list[str] = []
        self.broken: list[str] = []
        self.pool = PairPool(self._make)
        self.client = PrefillClient("d" * 32, "layout", self.pool, 3.0, 4.0, self.failures.append, self.broken.append)

    def _make(self, incarnation: str, address: str) -> Any:
        self.made.append(address)
        return self.pairs[incarnation]

    async def fetch(self, targets: Sequence[Target]) -> Outcome:
        return await self.client.fetch(REQUEST, PROMPT[:-1], targets, FakeSink())


async def test_the_first_target_that_manages_is_enough() -> None:
    rig = Rig(FakePair(A.incarnation, [FetchResult(9, sender_cached=4)]), FakePair(B.incarnation))
    assert await rig.fetch([A, B]) == Outcome(sender_cached=4, tried=1, complete=True, sender=A.incarnation)
    assert (rig.made, rig.failures) == ([A.address], [])
    ((ticket, tokens, salt, adapter, priority),) = rig.pairs[A.incarnation].asked
    assert (ticket.request_id, ticket.attempt, ticket.sender, ticket.receiver) == ("a" * 32, 3, "a" * 32, "d" * 32)
    assert (ticket.layout_digest, ticket.queue_deadline_s, ticket.transfer_deadline_s) == ("layout", 3.0, 4.0)
    assert (tokens, salt, adapter, priority) == (PROMPT[:-1], "tenant", "", 2)


@pytest.mark.parametrize("refusal", [Unavailable("not there"), Overloaded("slab cap")])
async def test_a_target_that_cannot_be_reached_is_passed_over(refusal: Exception) -> None:
    rig = Rig(FakePair(A.incarnation, refuse=refusal), FakePair(B.incarnation, [FetchResult(9)]))
    assert await rig.fetch([A, B]) == Outcome(0, 2, complete=True, sender=B.incarnation)
    assert rig.failures == ["hand_over"]
    assert rig.broken == [A.incarnation], "routers are to plan another pair"


@pytest.mark.usefixtures("logging_as_it_was")
async def test_a_pair_outlives_the_request_that_came_first_and_knows_nothing_of_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Pair(FakePair):
        async def connect(self) -> None:
            logging.getLogger("pair").warning("connects")

    obs.setup_logging("info", "text")
    with obs.request_context("ab" * 16):
        logging.getLogger("pair").warning("asked for")
        assert (await Rig(Pair(A.incarnation, [FetchResult(9)])).fetch([A])).complete
    asked, connects = capfd.readouterr().err.splitlines()
    assert asked.endswith("[" + "ab" * 16 + "]")
    assert connects.endswith("pair: connects")


class SlabPair(FakePair):
    """Pairs that share two slabs."""

    used: ClassVar[list[str]] = []
    busy: bool = False

    async def connect(self) -> None:
        if len(self.used) == 2:
            raise Overloaded("slab cap")
        self.used.append(self.peer)
        self.reason = ""

    async def close(self) -> None:
        await super().close()
        self.used.remove(self.peer)

    def leaks(self) -> list[str]:
        return ["a ticket is not quiesced"] if self.busy else []


async def test_the_idle_pair_used_longest_ago_makes_room_for_one_that_a_request_needs() -> None:
    pairs = [SlabPair(f"{number:032}") for number in range(4)]
    rig, targets = Rig(*pairs), [Target(pair.peer, "host") for pair in pairs]
    for target in (targets[0], targets[1], targets[0]):
        assert (await rig.fetch([target])).complete
    rig.pool.discovered([(targets[2].incarnation, "host")])
    await asyncio.gather(*rig.pool._warming)
    assert SlabPair.used == [pairs[0].peer, pairs[1].peer], "what no request asked for costs none its pair"
    assert (await rig.fetch([targets[2]])).complete
    assert SlabPair.used == [pairs[0].peer, pairs[2].peer]
    pairs[0].busy = pairs[2].busy = True
    assert not (await rig.fetch([targets[3]])).complete
    assert SlabPair.used == [pairs[0].peer, pairs[2].peer]
    pairs[2].busy = False
    assert (await rig.fetch([targets[3]])).complete
    assert SlabPair.used == [pairs[0].peer, pairs[3].peer]
    await rig.pool.close()


async def test_a_target_that_fails_half_way_is_followed_by_the_next() -> None:
    first = FakePair(A.incarnation, [FetchResult(5, sender_cached=6, error="the sender died")])
    rig = Rig(first, FakePair(B.incarnation, [FetchResult(9, sender_cached=2)]))
    assert await rig.fetch([A, B]) == Outcome(sender_cached=6, tried=2, complete=True, sender=B.incarnation)
    assert first.asked[0][0].ticket_id != rig.pairs[B.incarnation].asked[0][0].ticket_id


async def test_when_all_fail_the_request_goes_on_without_them() -> None:
    rig = Rig(
        FakePair(A.incarnation, refuse=Unavailable("gone")),
        FakePair(B.incarnation, [FetchResult(3, error="digest", link_failed=True)]),
        FakePair(C.incarnation, [FetchResult(0, error="refused")]),
    )
    assert await rig.fetch([A, B, C]) == Outcome(0, 3, complete=False, sender=C.incarnation)
    assert rig.failures == ["hand_over"] * 3
    assert rig.broken == [A.incarnation, B.incarnation], "a refusal is no broken link"


async def test_a_pair_is_used_again_and_a_broken_one_made_anew() -> None:
    rig = Rig(FakePair(A.incarnation))
    await rig.fetch([A])
    await rig.fetch([A])
    assert len(rig.made) == 1
    await rig.pairs[A.incarnation].close()
    rig.pairs[A.incarnation] = FakePair(A.incarnation)
    assert (await rig.fetch([A])).complete
    assert len(rig.made) == 2


async def test_requests_share_one_connection_and_one_s_end_is_not_the_other_s() -> None:
    pair = FakePair(A.incarnation)
    pair.gate.clear()
    rig = Rig(pair)
    given_up, patient = (asyncio.create_task(rig.fetch([A])) for _ in range(2))
    while not pair.connected:
        await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.wait([given_up])
    pair.gate.set()
    assert (await patient).complete
    assert given_up.cancelled()
    assert (pair.connected, len(pair.asked)) == (1, 1)


async def test_discovered_workers_are_connected_once_and_failures_are_borne() -> None:
    rig = Rig(FakePair(A.incarnation), FakePair(B.incarnation, refuse=Unavailable("starting")))
    named = [(target.incarnation, target.address) for target in (A, B)]
    rig.pool.discovered(named)
    rig.pool.discovered(named)
    while not all(pair.connected for pair in rig.pairs.values()):
        await asyncio.sleep(0)
    assert (await rig.fetch([A])).complete
    assert rig.made == [A.address, B.address]
    assert rig.pool.leaks() == [f"pair {A.incarnation} leaks"]
    await rig.pool.close()
    assert rig.pairs[A.incarnation].closed


async def test_a_connection_under_way_is_closed_with_the_client() -> None:
    pair = FakePair(A.incarnation)
    pair.gate.clear()
    rig = Rig(pair)
    rig.pool.discovered([(A.incarnation, A.address)])
    while not pair.connected:
        await asyncio.sleep(0)
    await rig.pool.close()
    assert pair.closed
    assert rig.pool.leaks() == []


async def test_pairs_that_are_over_are_forgotten_once_they_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill worker that is restarted again and again must not leave a landing slab each time."""
    dead, still_closing, new = (FakePair(target.incarnation) for target in (A, B, C))
    rig = Rig(dead, still_closing, new)
    for target in (A, B):
        await rig.fetch([target])
        await rig.pairs[target.incarnation].close()
    monkeypatch.setattr(still_closing, "leaks", lambda: ["the landing is not closed"])
    await rig.fetch([C])
    assert set(rig.pool._pairs) == {C.incarnation}
    assert rig.pool.leaks() == ["the landing is not closed", f"pair {C.incarnation} leaks"]
