"""What a soak's report rests on: slopes, who is to blame for an error, and what counts as lost."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from itertools import combinations, permutations
from pathlib import Path

import httpx
import pytest

from benchmarks import soak_clients
from benchmarks.soak import SPARED, Fault, Report, Soak
from benchmarks.soak_clients import Clients, End, Reply
from benchmarks.soak_watch import (
    FLAT,
    GROWS,
    LEAST_POINTS,
    NOT_JUDGED,
    NOT_SHOWN,
    Sample,
    Slope,
    slope,
    theil_sen,
    verdict,
)
from tandem.testing.cluster import Cluster, Process


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


def test_the_interval_has_sens_ranks() -> None:
    """Ten points: C = 1.96 * sqrt(125) = 21.91, M1 = 11.54 and M2 = 33.46 of 45 slopes, rounded outward."""
    source = random.Random(3)
    points = [(float(at), source.gauss(0, 1)) for at in range(10)]
    slopes = sorted((b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2))
    found = theil_sen(points)
    assert (found.low, found.slope, found.high) == (slopes[11 - 1], statistics.median(slopes), slopes[35 - 1])
    mirrored = theil_sen([(at, -value) for at, value in points])
    assert (mirrored.low, mirrored.high) == (-found.high, -found.low)


@pytest.mark.parametrize("count", [LEAST_POINTS, 6, 7])
def test_an_interval_of_few_points_holds_with_95_percent(count: int) -> None:
    """Over all orders of the noise, which are equally likely, for a true slope of nothing."""
    orders = list(permutations(range(count)))
    found = [theil_sen([(float(at), float(value)) for at, value in enumerate(order)]) for order in orders]
    assert sum(each.low <= 0 <= each.high for each in found) >= 0.95 * len(orders)


@pytest.mark.parametrize(
    ("slopes", "shown"),
    [
        ([Slope(-0.1, 0.0, 0.1), Slope(-0.3, -0.2, -0.1)], FLAT),
        ([Slope(-0.1, 0.0, 0.1), Slope(-0.1, 0.05, 0.11)], NOT_SHOWN),
        ([Slope(-5.0, 0.3, 9.0), Slope(0.0, 0.0, 0.0)], NOT_SHOWN),
        ([Slope(-0.1, 0.0, 0.1), Slope(0.11, 0.2, 0.3)], GROWS),
        ([None, None], NOT_JUDGED),
        ([Slope(0.0, 0.0, 0.0), None], NOT_JUDGED),
        ([], NOT_JUDGED),
    ],
)
def test_noise_is_not_flat(slopes: list[Slope | None], shown: str) -> None:
    assert verdict(slopes) == shown


def spare(folder: Path) -> Soak:
    """A soak that has no processes yet."""
    return Soak([Cluster(Process("router-0", [], 9, folder / "log"))], "even", 1)


def life(growth: Callable[[int], float], minutes: float = 10.0) -> list[Sample]:
    """MiB by seconds."""
    figures = ("rss", "pss", "own", "descriptors", "threads")
    return [Sample(float(at), dict.fromkeys(figures, growth(at))) for at in range(0, int(minutes * 60), 5)]


def test_each_process_has_a_verdict_and_a_soak_fails_for_growth_and_for_none(tmp_path: Path) -> None:
    lives = {
        "router-0": life(lambda at: 100.0),
        "prefill-0": life(lambda at: 100.0 + random.Random(at).gauss(0, 20)),
        "decode-0": life(lambda at: 100.0),
        "decode-1": life(lambda at: 100.0, minutes=1),
    }
    expected = {"router-0": FLAT, "prefill-0": NOT_SHOWN, "decode-0": FLAT, "decode-1": NOT_JUDGED}
    # The one that is struck may live too short to be judged; a spared one may not, nor be unseen.
    for name, other, wrong in (
        ("decode-0", lives["decode-0"], ""),
        ("decode-0", life(lambda at: 100.0 + at / 60), GROWS),
        ("decode-1", life(lambda at: 100.0 + at / 60), GROWS),
        ("decode-0", life(lambda at: 100.0, minutes=2), NOT_JUDGED),
        ("decode-0", [], NOT_JUDGED),
    ):
        soak = spare(tmp_path)
        for each, samples in (lives | {name: other}).items():
            if samples:
                soak.watch.lives[each, 1] = samples
        soak._judge(60.0)
        assert soak.report.verdicts == expected | ({name: wrong} if wrong else {})
        assert soak.report.failed() == bool(wrong)
        words = soak.report.text()
        assert "neither that nor flat is shown: prefill-0\n" in words
        if wrong:
            assert name in next(line for line in words.splitlines() if line.startswith(f"- {wrong}"))


async def test_who_began_must_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = spare(tmp_path)
    soak.report.verdicts = dict.fromkeys(SPARED, FLAT)

    async def ask() -> End:
        if soak.report.begun == 2:
            raise LookupError("whoever asked is gone")
        return End("chat", "answered", "", 0, 1, 2)

    monkeypatch.setattr(soak._clients, "ask", ask)
    await soak._one()
    assert not soak.report.failed()
    with pytest.raises(LookupError):
        await soak._one()
    assert soak.report.failed() and "2 requests (0 more not begun), of which 1 ended" in soak.report.text()
    await soak._clients.close()


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
    ("text", "cause"),
    [
        ('data: {"choices":[{"index":0,"te\n\n', "JSONDecodeError"),
        ("data: [1]\n\ndata: [DONE]\n\n", "AttributeError"),
        ('data: {"choices":[{"text":"a","finish_reason":"length"}]}\n\ndata: [DONE]\n\n', "KeyError"),
        ('data: {"error":"worker_lost"}\n\n', "AttributeError"),
        ("data: [DONE]\n\n", "a clean end with 0 of 1"),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "long", "leaves"])
async def test_what_no_client_foresees_is_lost(kind: str, text: str, cause: str) -> None:
    clients = Clients(["http://127.0.0.1:9"], "model", "even", 1)
    await clients.close()
    clients._mix = {kind: 1.0}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=text))
    clients._doors = [httpx.AsyncClient(transport=transport, base_url="http://router")]
    end = await clients.ask()
    assert end.outcome == "lost" and end.cause.startswith(cause)
    assert Report([end], [Fault("router-0", "SIGKILL", 0.0, end.ended)]).unexplained() == [end]
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
