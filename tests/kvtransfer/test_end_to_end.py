from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.backends.tcp import TcpBackend
from kvtransfer.base import Backend, FetchResult, Identity
from kvtransfer.inbound import PairClient
from kvtransfer.manifest import parse
from kvtransfer.service import HandOverService
from tandem.cluster import Ticket, new_id
from tandem.errors import Fenced, Overloaded, Unavailable
from tandem.kv import Span
from tandem.testing.kv import Buffer, FakeSink
from tandem.testing.polling import eventually
from tests.kvtransfer.rig import SETTINGS, TOKENS, FaultyBackend, make_rig


@pytest.fixture(params=[InprocBackend, TcpBackend])
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.param()
    return made


def start(client: PairClient, ticket: Ticket, sink: FakeSink) -> asyncio.Task[FetchResult]:
    return asyncio.create_task(client.fetch(ticket, TOKENS, "salt", "", 0, sink))


async def test_every_span_lands_with_equal_bytes(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        client = await rig.connected()
        sink = FakeSink(first=48)
        result = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, sink)
        assert (result.error, result.landed_until, result.sender_cached) == ("", len(TOKENS), len(TOKENS))
        assert result.bytes == (len(TOKENS) - 48) * rig.layout.token_bytes
        assert sink.holds(rig.layout, TOKENS, 48, len(TOKENS))
        await rig.quiet(client)
        assert rig.moved == [(rig.sender.incarnation, backend.name, result.bytes, result.seconds)]
        assert rig.failures == []


@pytest.mark.parametrize(
    ("windows", "first", "moved"),
    [((None, 100), 48, (1337 - 48) + (1337 - 1152)), ((100, 100), 1152, 2 * (1337 - 1152))],
)
async def test_of_layers_with_a_window_only_its_blocks_are_moved(
    backend: Backend, windows: tuple[int | None, ...], first: int, moved: int
) -> None:
    """1280 tokens are whole blocks; position 1280 sees from 1181 on, which is in the block that begins at 1152."""
    async with make_rig(backend, windows=windows) as rig:
        client = await rig.connected()
        sink = FakeSink(first=48)
        result = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, sink)
        assert (result.error, result.landed_until) == ("", len(TOKENS))
        assert result.bytes == moved * rig.layout.token_bytes // 2
        assert sum(data.nbytes for data in sink.spans.values()) == result.bytes
        assert sink.holds(rig.layout, TOKENS, first, len(TOKENS))
        await rig.quiet(client)
        assert rig.failures == []


async def test_many_fetches_share_one_slab_and_staging(backend: Backend) -> None:
    async with make_rig(backend, staging_mib=0.03) as rig:
        client = await rig.connected()
        sinks = [FakeSink() for _ in range(8)]
        results = await asyncio.gather(*(start(client, rig.ticket(), sink) for sink in sinks))
        assert [result.error for result in results] == [""] * 8
        assert all(sink.holds(rig.layout, TOKENS, 0, len(TOKENS)) for sink in sinks)
        await rig.quiet(client)


async def test_spans_come_as_they_are_computed_even_before_there_is_room(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        rig.source.cached = 64
        client = await rig.connected()
        ticket, sink = rig.ticket(), FakeSink()
        sink.room.clear()
        fetch = start(client, ticket, sink)
        await eventually(lambda: ticket.ticket_id in rig.source.prompts)
        rig.source.advance(ticket.ticket_id, 500)
        sink.room.set()
        await eventually(lambda: len(sink.spans) == 500 // 32)
        assert not fetch.done()
        rig.source.advance(ticket.ticket_id, len(TOKENS))
        assert (await fetch).landed_until == len(TOKENS)
        assert sink.holds(rig.layout, TOKENS, 0, len(TOKENS))
        await rig.quiet(client)


async def test_cancelling_a_fetch_quiesces_and_gives_its_ranges_back() -> None:
    backend = FaultyBackend()
    async with make_rig(backend) as rig:
        client = await rig.connected()
        backend.flowing.clear()
        fetch = start(client, rig.ticket(), FakeSink())
        await eventually(lambda: backend.posted > 4)
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        client.check_integrity()
        assert any("bytes of the slab" in line for line in client.leaks()), "its write is under way"
        backend.flowing.set()
        await rig.quiet(client)
        sink = FakeSink()
        assert (await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, sink)).error == ""
        assert sink.holds(rig.layout, TOKENS, 0, len(TOKENS))


async def test_cancelling_while_the_source_has_not_computed_anything(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        rig.source.cached = 0
        client = await rig.connected()
        ticket = rig.ticket()
        fetch = start(client, ticket, FakeSink())
        await eventually(lambda: ticket.ticket_id in rig.source.prompts and client.leaks() != [])
        fetch.cancel()
        await rig.quiet(client)
        assert rig.source.closed == [ticket.ticket_id]
        assert not client.closed


async def test_a_sink_that_gives_up_or_wants_nothing_is_no_error(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        client = await rig.connected()
        given_up = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink(first=None), start=16)
        nothing = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink(first=len(TOKENS)))
        assert (given_up.error, given_up.landed_until, given_up.bytes) == ("", 16, 0)
        assert (nothing.error, nothing.landed_until, nothing.bytes) == ("", len(TOKENS), 0)
        await rig.quiet(client)


async def test_a_span_whose_bytes_changed_on_the_way_is_never_landed() -> None:
    backend = FaultyBackend()

    def corrupt(sequence: int, manifest: bytes) -> list[bytes]:
        changed = replace(parse(manifest), digest=bytes(16)).pack()
        return [changed if sequence == 3 else manifest]

    backend.tamper = corrupt
    async with make_rig(backend) as rig:
        client = await rig.connected()
        sink = FakeSink()
        result = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, sink)
        assert "digest" in result.error
        assert result.link_failed
        assert result.landed_until <= 96
        assert Span(96, 32) not in sink.spans
        assert rig.failures == ["digest"]
        await rig.quiet(client)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("duplicate", lambda manifest: [manifest, manifest]),
        ("foreign", lambda manifest: [replace(parse(manifest), sequence=99).pack()]),
        ("foreign", lambda manifest: [replace(parse(manifest), start=64).pack()]),
        ("foreign", lambda manifest: [replace(parse(manifest), attempt=7).pack()]),
    ],
)
async def test_a_manifest_that_fits_no_grant_fails_the_ticket(kind: str, change: object) -> None:
    backend = FaultyBackend()
    backend.tamper = lambda sequence, manifest: change(manifest) if sequence == 1 else [manifest]  # type: ignore[operator]
    async with make_rig(backend) as rig:
        client = await rig.connected()
        result = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink())
        assert kind in result.error
        assert rig.failures == [kind]
        await rig.quiet(client)


async def test_a_manifest_of_an_unknown_ticket_is_dropped() -> None:
    backend = FaultyBackend()
    backend.tamper = lambda sequence, manifest: [replace(parse(manifest), ticket_id="f" * 32).pack(), manifest]
    async with make_rig(backend) as rig:
        client = await rig.connected()
        sink = FakeSink()
        assert (await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, sink)).error == ""
        await rig.quiet(client)


async def test_a_span_that_never_arrives_runs_into_the_transfer_deadline() -> None:
    backend = FaultyBackend()
    backend.tamper = lambda sequence, manifest: [] if sequence == 2 else [manifest]
    async with make_rig(backend) as rig:
        client = await rig.connected()
        result = await client.fetch(rig.ticket(transfer_s=0.3), TOKENS, "salt", "", 0, FakeSink())
        assert "transfer_deadline_s" in result.error
        assert result.link_failed
        assert result.landed_until == 64
        await rig.quiet(client)


async def test_a_manifest_that_cannot_be_read_closes_the_pair() -> None:
    backend = FaultyBackend()
    backend.tamper = lambda sequence, manifest: [b"nonsense"]
    async with make_rig(backend) as rig:
        client = await rig.connected()
        result = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink())
        assert "manifest has 8 bytes" in result.error
        await eventually(lambda: not client.leaks())
        assert client.closed
        assert rig.budget.used_bytes == 0


async def test_a_sender_that_does_not_start_runs_into_the_queue_deadline(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        rig.source.cached = 0
        client = await rig.connected()
        result = await client.fetch(rig.ticket(queue_s=0.2), TOKENS, "salt", "", 0, FakeSink())
        assert "queue_deadline_s" in result.error
        assert not result.link_failed, "the sender is busy, and reached"
        await rig.quiet(client)
        assert not client.closed


async def test_waiting_for_room_is_not_held_against_the_sender(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        client = await rig.connected()
        sink = FakeSink()
        sink.room.clear()
        fetch = start(client, rig.ticket(queue_s=0.2, transfer_s=0.2), sink)
        await asyncio.wait({fetch}, timeout=0.5)
        assert not fetch.done()
        sink.room.set()
        assert (await fetch).error == ""
        await rig.quiet(client)


async def test_a_slow_sink_holds_the_sender_back_and_fails_nothing(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        client = await rig.connected()
        sink = FakeSink()
        sink.gate.clear()
        fetch = start(client, rig.ticket(transfer_s=0.2), sink)
        await sink.landing.wait()
        await asyncio.wait({fetch}, timeout=0.5)
        assert not fetch.done()
        assert len(rig.source.exported) * 32 * rig.layout.token_bytes <= rig.settings.slab_bytes
        sink.gate.set()
        assert (await fetch).error == ""
        await rig.quiet(client)


async def test_prompts_that_wait_to_be_computed_leave_room_for_one_that_is_cached() -> None:
    async with make_rig(InprocBackend()) as rig:
        client = await rig.connected()
        spans = rig.settings.slab_bytes // (32 * rig.layout.token_bytes)
        rig.source.cached = 0
        waiting = [start(client, rig.ticket(), FakeSink()) for _ in range(spans + 8)]
        await eventually(lambda: len(rig.source.prompts) == len(waiting))
        rig.source.cached = 1 << 40
        async with asyncio.timeout(5.0):
            assert (await client.fetch(rig.ticket(), TOKENS, "", "", 9, FakeSink())).landed_until == len(TOKENS)
        for fetch in waiting:
            fetch.cancel()
        await rig.quiet(client)


async def test_a_sink_that_fails_ends_its_own_ticket_only(backend: Backend) -> None:
    class Broken(FakeSink):
        async def land(self, span: Span, data: Buffer) -> None:
            raise RuntimeError("no such page")

    async with make_rig(backend) as rig:
        client = await rig.connected()
        sink = FakeSink()
        bad, good = await asyncio.gather(start(client, rig.ticket(), Broken()), start(client, rig.ticket(), sink))
        assert "no such page" in bad.error
        assert good.error == ""
        assert sink.holds(rig.layout, TOKENS, 0, len(TOKENS))
        await rig.quiet(client)


async def test_a_source_that_refuses_or_fails_says_so(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        client = await rig.connected()
        rig.source.refuse = "too many prompts wait"
        refused = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink())
        assert (refused.error, refused.link_failed) == ("too many prompts wait", False)
        rig.source.refuse = ""

        def explode(span: Span, out: Buffer) -> None:
            raise RuntimeError("secret detail")

        rig.source.tamper = explode
        failed = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink())
        assert (failed.error, failed.link_failed) == ("internal error of the sender", False)
        await rig.quiet(client)
        assert len(rig.source.closed) == 2


async def test_a_write_that_fails_closes_the_pair_on_both_sides() -> None:
    backend = FaultyBackend()
    async with make_rig(backend) as rig:
        client = await rig.connected()
        backend.fail = True
        result = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink())
        assert result.error != ""
        assert result.link_failed
        await eventually(lambda: client.closed and not client.leaks() and not rig.service.leaks())
        assert backend.closed_links == 1
        backend.fail = False
        again = await rig.connected()
        assert (await again.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink())).error == ""
        await rig.quiet(again)


async def test_a_ticket_that_does_not_quiesce_closes_the_pair() -> None:
    backend = FaultyBackend()
    async with make_rig(backend) as rig:
        client = await rig.connected(quiesce_s=0.2)
        backend.flowing.clear()
        fetch = start(client, rig.ticket(), FakeSink())
        await eventually(lambda: backend.posted > 2)
        fetch.cancel()
        await eventually(lambda: client.closed and not client.leaks())
        assert "quiesce_s" in client.reason
        assert rig.budget.used_bytes == 0
        await eventually(lambda: not rig.service.leaks())


async def test_closing_a_receiver_voids_its_tickets_at_the_sender() -> None:
    backend = FaultyBackend()
    async with make_rig(backend) as rig:
        client = await rig.connected()
        backend.flowing.clear()
        fetch = start(client, rig.ticket(), FakeSink())
        await eventually(lambda: backend.posted > 2)
        await client.close()
        assert "closed by this end" in (await fetch).error
        assert client.leaks() == []
        await rig.quiet(client)


async def test_the_end_of_the_sender_ends_fetches_at_once(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        rig.source.cached = 100
        client = await rig.connected()
        sink = FakeSink()
        fetch = start(client, rig.ticket(), sink)
        await sink.landing.wait()
        await rig.service.close()
        result = await fetch
        assert "the sender is closing" in result.error
        assert result.landed_until <= 100
        await eventually(lambda: client.closed and not client.leaks())
        refused = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink())
        assert refused.error == client.reason


@pytest.mark.parametrize("field", ["incarnation", "fingerprint", "layout"])
async def test_a_pair_that_does_not_mean_the_same_is_refused(backend: Backend, field: str) -> None:
    async with make_rig(backend) as rig:
        from tandem.testing.kv import small_layout

        me = rig.receiver
        other = {
            "incarnation": me,
            "fingerprint": Identity(me.incarnation, me.layout, "another"),
            "layout": Identity(me.incarnation, small_layout(layers=3), me.fingerprint),
        }[field]
        client = rig.client(other, new_id() if field == "incarnation" else "")
        with pytest.raises(Fenced, match={"incarnation": "sender is", "layout": "layout_digest"}.get(field, field)):
            await client.connect()
        assert client.leaks() == []
        assert rig.budget.used_bytes == 0


async def test_ends_without_a_common_transport_refuse() -> None:
    async with make_rig(InprocBackend(), senders=TcpBackend()) as rig:
        with pytest.raises(Fenced, match="offers inproc; this worker speaks tcp"):
            await rig.client().connect()


async def test_connecting_to_nobody_is_unavailable(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        rig.address = "127.0.0.1:1"
        client = rig.client()
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
            await client.connect()
        assert client.leaks() == []


async def test_a_landing_over_the_cap_is_refused(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        rig.budget.max_bytes = SETTINGS.slab_bytes
        client = await rig.connected()
        with pytest.raises(Overloaded, match="slabs_max_mib"):
            await rig.client(Identity(new_id(), rig.layout, rig.sender.fingerprint)).connect()
        await client.close()
        await rig.connected()


async def test_a_second_stream_of_one_receiver_replaces_the_first(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        rig.source.cached = 100
        first = await rig.connected()
        fetch = start(first, rig.ticket(), FakeSink())
        await eventually(lambda: len(rig.source.prompts) == 1)
        second = await rig.connected()
        assert "replaced" in (await fetch).error
        rig.source.cached = 1 << 40
        assert (await second.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink())).error == ""
        await rig.quiet(second)


async def test_a_silent_sender_is_given_up(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(*_: object) -> None:
        await asyncio.Event().wait()

    async with make_rig(backend) as rig:
        monkeypatch.setattr(HandOverService, "_tick", silent)
        rig.source.cached = 0
        client = await rig.connected(lease_s=0.5)
        result = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink())
        assert "lease_s = 0.5" in result.error
        assert rig.failures.count("lease") == 1
        await eventually(lambda: not client.leaks())


async def test_a_silent_receiver_is_given_up(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(*_: object) -> None:
        await asyncio.Event().wait()

    async with make_rig(backend) as rig:
        monkeypatch.setattr(PairClient, "_tick", silent)
        rig.source.cached = 0
        client = await rig.connected(lease_s=1.5)  # its own would end unseen
        result = await client.fetch(rig.ticket(), TOKENS, "salt", "", 0, FakeSink())
        assert "the receiver was silent" in result.error
        assert rig.sender_failures.count("lease") == 1
        await eventually(lambda: not rig.service.leaks())
        assert not rig.source.prompts


async def test_tickets_of_another_pair_are_refused_without_asking(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        client = await rig.connected()
        good = rig.ticket()
        for bad, text in (
            (replace(good, sender=new_id()), "another pair"),
            (replace(good, receiver=new_id()), "another pair"),
            (replace(good, layout_digest="0"), "another KV layout"),
            (replace(good, ticket_id="0" * 32), "already in use"),
        ):
            assert text in (await client.fetch(bad, TOKENS, "salt", "", 0, FakeSink())).error
        assert "empty" in (await client.fetch(good, (), "salt", "", 0, FakeSink())).error
        rig.source.cached = 0
        running = start(client, good, FakeSink())
        await eventually(lambda: good.ticket_id in rig.source.prompts)
        assert "in use" in (await client.fetch(good, TOKENS, "salt", "", 0, FakeSink())).error
        running.cancel()
        await rig.quiet(client)


async def test_a_storm_of_cancels_leaves_nothing_behind(backend: Backend) -> None:
    async with make_rig(backend) as rig:
        rig.source.cached = 400
        client = await rig.connected()
        sinks = [FakeSink() for _ in range(36)]
        fetches = [start(client, rig.ticket(), sink) for sink in sinks]
        await sinks[0].landing.wait()
        for index, fetch in enumerate(fetches):
            if index % 9:
                fetch.cancel()
        for ticket in list(rig.source.prompts):
            rig.source.advance(ticket, len(TOKENS))
        rig.source.cached = 1 << 40
        results = await asyncio.gather(*fetches, return_exceptions=True)
        await eventually(lambda: not client.leaks())
        await rig.quiet(client)
        assert all(isinstance(result, FetchResult | asyncio.CancelledError) for result in results)
        assert all(isinstance(result, FetchResult) for result in results[::9])
