"""What a soak's report rests on: slopes, who is to blame for an error, and what counts as lost."""

from __future__ import annotations

import random

import httpx
import pytest

from benchmarks import soak_clients
from benchmarks.soak import Fault, Report
from benchmarks.soak_clients import Clients, End, Reply
from benchmarks.soak_watch import Sample, slope, theil_sen


def test_a_slope_is_not_moved_by_spikes_and_its_interval_holds_the_truth() -> None:
    source = random.Random(1)
    points = [(float(at), 100 + 0.5 * at + source.gauss(0, 0.3)) for at in range(40)]
    points[7], points[30] = (7.0, 900.0), (30.0, 2.0)
    found = theil_sen(points)
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.1
    with pytest.raises(ValueError, match="2 points"):
        theil_sen(points[:2])


def test_a_constant_is_flat_and_noise_has_an_interval_around_nothing() -> None:
    assert theil_sen([(float(at), 5.0) for at in range(10)]).high == 0
    source = random.Random(2)
    found = theil_sen([(float(at), source.gauss(0, 1)) for at in range(40)])
    assert found.low < 0 < found.high


def test_points_are_half_minutes() -> None:
    life = [Sample(at * 5.0, {"rss": 10 + at * 5 / 60 * 3}) for at in range(60)]
    found = slope(life, "rss")
    assert found is not None
    assert found.slope == pytest.approx(3.0)
    assert slope(life[:12], "rss") is None


def test_an_error_is_explained_by_the_end_of_its_own_router_alone() -> None:
    faults = [Fault("router-1", "SIGKILL", 10, 15), Fault("router-0", "SIGSTOP", 30, 35)]
    ends = [
        End("chat", "error", "ReadError", 1, 9, 11),
        End("chat", "error", "ReadError", 0, 9, 11),
        End("chat", "error", "ReadError", 1, 16, 20),
        End("chat", "error", "ReadTimeout", 0, 29, 36),
        End("chat", "lost", "no end", 1, 9, 11),
        End("chat", "answered", "", 1, 9, 11),
    ]
    assert Report(ends, faults).unexplained() == ends[1:5]


def test_a_request_is_lost_over_two_decode_workers_and_not_over_one() -> None:
    end = End("chat", "error", '502 {"code":"worker_lost"}', 0, 5, 50)
    faults = [Fault("decode-1", "SIGKILL", 6, 9), Fault("decode-2", "restart", 20, 22)]
    assert not Report([end], faults).unexplained()
    assert Report([end], faults[:1]).unexplained() == [end]


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (['data: {"choices":[{"index":0,"text":"ab","finish_reason":"length"}]}', "data: [DONE]"], ""),
        (['data: {"choices":[{"index":0,"text":"ab","finish_reason":"length"}]}'], "a clean end"),
        (['data: {"choices":[{"index":0,"text":"ab"}]}', "data: [DONE]"], "a clean end"),
        (['data: {"choices":[{"index":0,"text":"ab","finish_reason":"stop"}]}', "data: [DONE]"], "ended by"),
        (['data: {"choices":[{"index":0,"text":"ac","finish_reason":"length"}]}', "data: [DONE]"], "another text"),
    ],
)
async def test_a_clean_end_must_be_a_whole_answer(lines: list[str], wrong: str) -> None:
    clients = Clients(["http://127.0.0.1:9"], "model", "even", 1)
    clients._known["it"] = "ab"
    reply = Reply()
    for line in lines:
        reply.take(line)
    found = clients._wrong("known", {"ignore_eos": True, "prompt": "it"}, reply)
    assert found.startswith(wrong) and bool(found) == bool(wrong)
    await clients.close()


@pytest.mark.parametrize(
    ("status", "text", "outcomes"),
    [
        (503, '{"error":{"code":"no_decode_worker"}}', {"error"}),
        (200, 'data: {"error":{"code":"worker_lost"}}\n\n', {"error"}),
        (200, 'data: {"choices":[{"index":0,"text":"a","finish_reason":"length"}]}\n\ndata: [DONE]\n\n', None),
    ],
)
async def test_an_error_told_to_a_slow_reader_is_one(
    monkeypatch: pytest.MonkeyPatch, status: int, text: str, outcomes: set[str] | None
) -> None:
    """Of slow readers some only stall and leave: what they were told before counts as it does for everybody."""
    monkeypatch.setattr(soak_clients, "STALL_S", 0.0)
    monkeypatch.setattr(soak_clients, "SLOW_READ_S", 0.0)
    clients = Clients(["http://127.0.0.1:9"], "model", "even", 1)
    await clients.close()
    clients._mix = {"slow": 1.0}
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=text))
    clients._narrow = [httpx.AsyncClient(transport=transport, base_url="http://router")]
    ends = [await clients.ask() for _ in range(20)]
    assert {end.outcome for end in ends} == (outcomes or {"answered", "left"})
    assert Report(ends, []).unexplained() == (ends if outcomes else [])
    await clients.close()
