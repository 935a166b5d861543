"""What other routers are reported to get wrong, as tests of the cost policy and of what it is told.

Where a complaint is about a product, its public issue is named.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.cache.prefix_index import PrefixIndex
from router.policies import RequestInfo
from router.policies.cost import BUSY, HAND_OVER_MS, IDLE, OTHERS, PAUSE, RECENT, CostPolicy
from router.simulation.replay import Replay
from router.simulation.setting import Arrival, Machine, Setting
from router.workers.members import Member, Members
from router.workers.snapshot import RECENT_S, FleetSnapshot, Load, WorkerView
from tandem.cluster import Plan, Role, Status, StepTiming, WorkerUpdate
from tandem.testing.workers import fake_info

TIMING = StepTiming(base_ms=10.0, per_token_ms=0.2)
LATER = 100.0
"""Nobody is a newcomer."""


def seen(known_s: float) -> float:
    """Share that a router knows of the work that counts, when it has known the workers for so long."""
    return -math.expm1(-known_s / RECENT_S)


KNOWN_MS = RECENT_S * 1e3 * seen(LATER)
"""Time of a worker's that its recent work is of."""


def worker(
    name: str, role: Role = Role.PREFILL, *, load: Load = Load(), since: float = 0.0, **status: Any
) -> WorkerView:
    fields: dict[str, Any] = {"free_pages": 2048, "total_pages": 2048, "timing": TIMING, "move_bytes_per_ms": 1e6}
    info = fake_info(role, incarnation=name, total_pages=2048)
    recent = status.pop("recent_tokens", 0.0)
    return WorkerView(
        info, Status(name, **{**fields, **status}), load, recent_tokens=recent, recent_at=LATER, since=since
    )


BUSY_DECODE = worker("d", Role.DECODE, running=60)


def plan(prefill: list[WorkerView], matches: dict[str, int], tokens: int = 2001, number: int = 0) -> Plan:
    request = RequestInfo(str(number), tokens, 64, ordinal=number)
    return CostPolicy().plan(request, FleetSnapshot(tuple(prefill), (BUSY_DECODE,)), matches, LATER)


def test_a_burst_at_one_moment_is_spread() -> None:
    """sglang: load that counts only after prefill lets bursts pile up on one worker. Here a plan is booked at once."""
    made: Members[Member] = Members("me", PrefixIndex(1000, 60.0, lambda: LATER), lambda: LATER)
    for n in range(4):
        member = Member(fake_info(Role.PREFILL, incarnation=f"p{n}"), made.booking_closed, 0.0)
        made.add(member)
        made.observe(member, WorkerUpdate(f"p{n}", 0, snapshot=True, status=Status(f"p{n}", timing=TIMING)))
    taken: Counter[str] = Counter()
    for number in range(16):
        chosen = plan(list(made.snapshot().prefill), {}, number=number).prefill
        assert chosen is not None
        made.book(chosen, Load(1, 2000, 2000), ())
        taken[chosen] += 1
    assert set(taken.values()) == {4}


def test_ties_on_the_prefill_side_are_spread() -> None:
    """sglang#32983."""
    taken = Counter(plan([worker(f"p{n}") for n in range(4)], {}, number=number).prefill for number in range(400))
    assert min(taken.values()) > 60


def test_load_is_work_not_requests() -> None:
    """smg#1621: one long prompt is more than many short ones."""
    long, short = worker("long", running=1, queued_tokens=8000), worker("short", running=9, queued_tokens=900)
    assert plan([long, short], {}).prefill == "short"


def test_imbalance_does_not_discard_a_large_match() -> None:
    """sglang#32195: a hundred requests of difference are no reason to compute again what is cached."""
    crowded = worker("crowded", running=100, queued_tokens=1500)
    assert plan([crowded, worker("idle")], {"crowded": 1900}).prefill == "crowded"


def test_absolute_tokens_count_not_shares() -> None:
    """sglang: a ratio calls 25 % of a long prompt nothing, though it is more than all of a short one."""
    busy = worker("busy", queued_tokens=3000)
    assert plan([busy, worker("idle")], {"busy": 5000}, tokens=20_001).prefill == "busy"
    assert plan([busy, worker("idle")], {"busy": 80}, tokens=101).prefill == "idle"


def test_a_hot_prompt_moves_on_to_a_second_worker_before_the_first_is_swamped() -> None:
    """dynamo#737, and the thrash when stickiness ignores load."""
    hot = {"hot": 1900}
    waits = [
        n
        for n in range(0, 60_000, 500)
        if plan([worker("hot", queued_tokens=n), worker("idle")], hot).prefill == "idle"
    ]
    assert waits, "never"
    # As long as computing it again would take, counted with those who would wait for that.
    again_ms = (1 + OTHERS) * (1900 * 0.2 + 8 * 10)
    assert waits[0] * 0.2 + waits[0] / 256 * 10 == pytest.approx(again_ms, rel=0.15)


def test_copies_of_a_hot_prompt_share_its_load() -> None:
    """sglang: one tenant for each prefix. Here every worker that has it counts."""
    views = [worker("a", queued_tokens=4000), worker("b"), worker("c")]
    assert plan(views, {"a": 1900, "b": 1900}).prefill == "b"


def test_recent_work_decides_between_idle_workers() -> None:
    views = [worker("a", recent_tokens=9000), worker("b", recent_tokens=200), worker("c", recent_tokens=5000)]
    assert {plan(views, {}, number=number).prefill for number in range(20)} == {"b"}
    # But it is no reason to compute again.
    assert plan(views, {"a": 1900}).prefill == "a"


def test_an_idle_cluster_fills_all_its_caches_and_a_busy_one_follows_prefixes() -> None:
    """Computing again delays others only where somebody waits."""
    full = BUSY * KNOWN_MS / TIMING.per_token_ms  # tokens of a worker that is just busy

    def chosen(both: float) -> str | None:
        views = [worker("has a part", recent_tokens=both + 4500), worker("b", recent_tokens=both)]
        return plan(views, {"has a part": 64}, tokens=301).prefill

    assert chosen(0.0) == "b"
    assert chosen(full) == chosen(3 * full) == "has a part"


@pytest.mark.parametrize("known_s", [2.0, 3.0, 8.0, 1000.0])
def test_a_router_that_just_started_decides_like_one_that_has_long_seen_the_same(known_s: float) -> None:
    """It has seen little work because it has looked for a moment: the cluster is not idle, nor are workers alike."""
    busy = 2 * BUSY * RECENT_S * 1e3 / TIMING.per_token_ms
    decode = worker("d", Role.DECODE, running=60, since=LATER - known_s)

    def chosen(more: float) -> str | None:
        views = [
            worker(name, recent_tokens=work * seen(known_s), since=LATER - known_s)
            for name, work in (("has a part", busy + more), ("b", busy))
        ]
        fleet = FleetSnapshot(tuple(views), (decode,))
        return CostPolicy().plan(RequestInfo("r", 301, 64), fleet, {"has a part": 64}, LATER).prefill

    assert (chosen(16_000), chosen(25_000)) == ("has a part", "b")


def test_a_decode_worker_that_computed_more_than_prefill_workers_did_computes_less() -> None:
    prefill = [worker("p", recent_tokens=20_000.0)]

    def local(recent: float) -> float:
        decode = [worker("d", Role.DECODE, recent_tokens=recent)]
        found = CostPolicy().plan(RequestInfo("r", 500, 64), FleetSnapshot(tuple(prefill), tuple(decode)), {}, LATER)
        return next(each for each in found.candidates if each.prefill is None).costs["recent"]

    assert local(0.0) == local(20_000.0) == 0.0
    share = 50_000 * TIMING.per_token_ms / KNOWN_MS
    assert share > BUSY
    assert local(30_000.0) == pytest.approx(RECENT * 10_000 * TIMING.per_token_ms / seen(LATER))


def test_a_newcomer_starts_slowly_and_then_counts_like_the_others() -> None:
    old = [worker(f"p{n}", queued_tokens=700) for n in range(3)]
    assert plan([*old, worker("new", since=LATER)], {}).prefill != "new"
    assert plan([*old, worker("new", since=LATER - 9.0)], {}).prefill == "new"
    # Where all have just begun, nobody is new.
    young = [worker("p", queued_tokens=300, since=LATER - 1), worker("new", since=LATER)]
    assert plan(young, {}).prefill == "new"


def test_a_newcomer_is_not_given_all_the_work_that_others_did_before() -> None:
    made: Members[Member] = Members("me", PrefixIndex(1000, 60.0, lambda: LATER), lambda: LATER)
    for name, tokens in (("a", 1000), ("b", 3000)):
        made.add(Member(fake_info(Role.PREFILL, incarnation=name), made.booking_closed, 0.0))
        made.book(name, Load(1, tokens, tokens), ())
    newcomer = Member(fake_info(Role.PREFILL, incarnation="c"), made.booking_closed, LATER)
    made.add(newcomer)
    assert newcomer.recent(LATER) == pytest.approx((4000 + 500) / 2, rel=0.2)


def test_all_decode_workers_are_used() -> None:
    """dynamo#7836: two of five stayed idle."""
    rng = random.Random(0)
    load = [Arrival(n * 0.02, 64 * 20 + 5, 40, tuple(rng.randbytes(16) for _ in range(20))) for n in range(120)]
    setting = Setting(5, 5, Machine(5.0, 0.05, 1e-4, 1024), 500, 64)
    replay = Replay(setting, CostPolicy(), load)
    replay.run()
    taken = Counter(flight.decode for flight in replay.flights)
    assert len(taken) == 5 and min(taken.values()) >= 12


def test_hits_do_not_collapse_under_overload() -> None:
    """prime-rl#3255: 98 to 5 %."""
    rng = random.Random(1)
    systems = [tuple(rng.randbytes(16) for _ in range(30)) for _ in range(8)]
    shares = []
    for gap in (0.05, 0.005):
        load = [
            Arrival(n * gap, 64 * 32 + 5, 4, (*systems[n % 8], rng.randbytes(16), rng.randbytes(16)))
            for n in range(300)
        ]
        replay = Replay(Setting(4, 2, Machine(5.0, 0.1, 1e-4, 1024), 150, 64), CostPolicy(), load)
        replay.run()
        replay.check()
        shares.append(1 - sum(f.computed for f in replay.flights) / sum(f.prompt_tokens for f in replay.flights))
    assert shares[1] > shares[0] - 0.1 and shares[1] > 0.7


def _pair_cost(
    request: RequestInfo,
    d: WorkerView,
    p: WorkerView | None,
    matches: dict[str, int],
    least: float,
    level: float,
) -> float:
    """The formula of router/policies/cost.py for one pair, without columns. All workers measure TIMING."""

    def prefill_ms(tokens: float) -> float:
        return -(-tokens // 256) * TIMING.base_ms + tokens * TIMING.per_token_ms

    computable = request.prompt_tokens - 1
    here = computable - min(matches.get(d.incarnation, 0), computable)
    output = min(request.max_tokens, 128)
    short = max(request.prompt_tokens + output - d.free_tokens, 0)
    step = TIMING.base_ms + max(d.sequences, 1) * TIMING.per_token_ms
    cost = 128 * step * short / max(d.info.capacity_tokens - d.free_tokens, 1)
    cost += d.sequences * TIMING.per_token_ms * output
    if p is None:
        local = prefill_ms(here)
        cost += level * TIMING.per_token_ms * max(d.recent_tokens - least, 0.0)
        return cost + prefill_ms(d.queued_tokens) + (1 + OTHERS + PAUSE * max(d.sequences, 1)) * local
    there = prefill_ms(computable - min(matches.get(p.incarnation, 0), computable))
    cost += prefill_ms(p.queued_tokens) + (1 + OTHERS) * there
    cost += level * TIMING.per_token_ms * (p.recent_tokens - least)
    return cost + (HAND_OVER_MS + here * d.info.layout.token_bytes / 1e6 if here else 0.0)


@settings(max_examples=60)
@given(st.data())
def test_the_plan_is_the_cheapest_of_all_pairs(data: st.DataObject) -> None:
    """The fast way, in columns and with few pairs looked at, against the formula for every pair."""
    counts, tokens, recent = st.integers(0, 30), st.integers(0, 4000), st.integers(0, 40_000)
    prefill = [
        worker(f"p{n}", queued_tokens=data.draw(tokens), recent_tokens=float(data.draw(recent)))
        for n in range(data.draw(st.integers(0, 9)))
    ]
    decode = [
        worker(
            f"d{n}",
            Role.DECODE,
            running=data.draw(counts),
            queued_tokens=data.draw(tokens),
            free_pages=data.draw(tokens),
            recent_tokens=float(data.draw(recent)),
        )
        for n in range(data.draw(st.integers(1, 9)))
    ]
    matches = {view.incarnation: data.draw(tokens) for view in (*prefill, *decode)}
    request = RequestInfo("r", data.draw(st.integers(1, 4000)), data.draw(st.integers(1, 300)))
    first = prefill or decode
    least = min(view.recent_tokens for view in first)
    done_ms = sum(view.recent_tokens for view in (*prefill, *decode)) * TIMING.per_token_ms
    share = done_ms / len(first) / KNOWN_MS
    level = RECENT * min(IDLE, max(1 / seen(LATER), BUSY / share if share else IDLE))
    costs = {
        (d.incarnation, p.incarnation if p else None): _pair_cost(request, d, p, matches, least, level)
        for d in decode
        for p in (None, *prefill)
    }
    found = CostPolicy().plan(request, FleetSnapshot(tuple(prefill), tuple(decode)), matches, LATER)
    best = found.candidates[0]
    assert best.cost == pytest.approx(min(costs.values()), abs=2e-3)
    for candidate in found.candidates:
        assert candidate.cost == pytest.approx(costs[candidate.decode, candidate.prefill], abs=2e-3)


def test_recent_work_fades() -> None:
    made: Members[Member] = Members("me", PrefixIndex(1000, 60.0, lambda: 0.0), lambda: 0.0)
    member = Member(fake_info(Role.PREFILL, incarnation="a"), made.booking_closed, 0.0)
    member.worked(1000, 0.0)
    assert member.recent(RECENT_S) == pytest.approx(1000 / 2.718, rel=0.01)
    view = replace(worker("x"), recent_tokens=1.0)
    assert view.row != worker("x").row
