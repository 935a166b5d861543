"""Policies as pure functions: what wins, what is explained, and what never happens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.policies import POLICIES, RequestInfo
from router.policies.base import KEPT
from router.policies.cost import OTHERS, PAUSE, CostPolicy
from router.policies.least_loaded import LeastLoadedPolicy
from router.policies.longest_prefix import LongestPrefixPolicy
from router.policies.round_robin import RoundRobinPolicy
from router.workers.snapshot import FleetSnapshot, Load, WorkerView
from tandem.cluster import Plan, Role, Status, StepTiming
from tandem.errors import Unavailable
from tandem.kv import BLOCK_TOKENS
from tandem.testing.workers import fake_info

TIMING = StepTiming(base_ms=10.0, per_token_ms=0.2)
FAST_LINK = 1e6


def view(name: str, role: Role, pending: Load | None = None, **status: Any) -> WorkerView:
    fields: dict[str, Any] = {"free_pages": 256, "total_pages": 256, "timing": TIMING, "move_bytes_per_ms": FAST_LINK}
    info = fake_info(role, incarnation=name)
    draining = status.pop("draining", False)
    return WorkerView(info, Status(name, **{**fields, **status}), pending or Load(), draining)


def decode(name: str, **status: Any) -> WorkerView:
    return view(name, Role.DECODE, **status)


def prefill(name: str, **status: Any) -> WorkerView:
    return view(name, Role.PREFILL, **status)


def request(blocks: int = 10, request_id: str = "r", **fields: Any) -> RequestInfo:
    return RequestInfo(request_id, blocks * BLOCK_TOKENS + 1, fields.pop("max_tokens", 64), **fields)


def in_tokens(blocks: dict[str, int]) -> dict[str, int]:
    return {worker: count * BLOCK_TOKENS for worker, count in blocks.items()}


def cost_plan(fleet: FleetSnapshot, matches: dict[str, int] | None = None, **fields: Any) -> Plan:
    return CostPolicy().plan(request(**fields), fleet, in_tokens(matches or {}), 0.0)


def same_load_fleet(names: list[str], **status: Any) -> FleetSnapshot:
    return FleetSnapshot(tuple(prefill(name, **status) for name in names), (decode("d", running=30),))


@settings(max_examples=40)
@given(
    cached=st.lists(st.integers(0, 10), min_size=1, max_size=6),
    queued=st.integers(0, 5000),
    base=st.floats(0, 50),
    per_token=st.floats(0.01, 5),
    on_decode=st.integers(0, 9),
)
def test_with_equal_load_the_longest_cached_prefix_wins(
    cached: list[int], queued: int, base: float, per_token: float, on_decode: int
) -> None:
    names = [f"p{i}" for i in range(len(cached))]
    fleet = same_load_fleet(names, queued_tokens=queued, timing=StepTiming(base, per_token))
    plan = cost_plan(fleet, {**dict(zip(names, cached, strict=True)), "d": on_decode})
    best = plan.prefill_alternatives[0]
    assert cached[names.index(best)] == max(cached)
    if plan.prefill is not None:
        assert plan.prefill == best


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    running=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    queued=st.lists(st.integers(0, 4000), max_size=8),
    blocks=st.integers(0, 40),
    data=st.data(),
)
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_plan_is_sound(
    name: str, seed: int, running: list[int], queued: list[int], blocks: int, data: st.DataObject
) -> None:
    decoders = tuple(decode(f"d{i}", running=n, draining=data.draw(st.booleans())) for i, n in enumerate(running))
    prefillers = tuple(
        prefill(f"p{i}", queued_tokens=n, draining=data.draw(st.booleans())) for i, n in enumerate(queued)
    )
    fleet = FleetSnapshot(prefillers, decoders)
    matches = {v.incarnation: data.draw(st.integers(0, 60)) * BLOCK_TOKENS for v in (*decoders, *prefillers)}
    asked = request(blocks, request_id=str(seed), ordinal=seed)
    policy = POLICIES[name]()
    if all(v.draining for v in decoders):
        with pytest.raises(Unavailable, match="every decode worker is draining"):
            policy.plan(asked, fleet, matches, 0.0)
        return
    plan = policy.plan(asked, fleet, matches, 0.0)
    assert plan == policy.plan(asked, fleet, matches, 0.0)
    assert plan.policy == name
    usable = {v.incarnation for v in (*decoders, *prefillers) if not v.draining}
    for candidate in plan.candidates:
        assert candidate.decode in usable
        assert candidate.prefill is None or candidate.prefill in usable
        assert 0 <= candidate.decode_cached <= asked.computable
        assert candidate.prefill_cached <= asked.computable
        assert candidate.costs
    assert len({(c.decode, c.prefill) for c in plan.candidates}) == len(plan.candidates)
    assert len({c.decode for c in plan.candidates}) <= KEPT
    if all(v.draining for v in prefillers):
        assert plan.prefill is None


def test_cost_is_the_sum_of_terms_and_the_least_wins() -> None:
    fleet = FleetSnapshot((prefill("p0"), prefill("p1", queued_tokens=900)), (decode("d0", running=3), decode("d1")))
    plan = cost_plan(fleet, {"p1": 4, "d0": 2})
    costs = [candidate.cost for candidate in plan.candidates]
    assert costs == sorted(costs)
    assert len(costs) == 6
    for candidate in plan.candidates:
        assert set(candidate.costs) == {"queue", "prefill", "others", "recent", "move", "admission", "slowdown"}
    pair = next(c for c in plan.candidates if (c.decode, c.prefill) == ("d0", "p1"))
    computable = 10 * BLOCK_TOKENS
    assert pair.costs["queue"] == pytest.approx(4 * 10 + 900 * 0.2)
    assert pair.costs["prefill"] == pytest.approx(2 * 10 + (computable - 256) * 0.2)
    assert pair.costs["others"] == pytest.approx(OTHERS * pair.costs["prefill"])
    assert pair.costs["move"] == pytest.approx(3.0 + (computable - 128) * fleet.decode[0].info.layout.token_bytes / 1e6)
    assert pair.costs["slowdown"] == pytest.approx(3 * 0.2 * 64)
    local = next(c for c in plan.candidates if (c.decode, c.prefill) == ("d0", None))
    assert local.costs["move"] == 0
    prefill_here = 2 * 10 + (computable - 128) * 0.2
    assert local.costs["slowdown"] == pytest.approx(3 * 0.2 * 64 + PAUSE * 3 * prefill_here)


def test_a_shared_first_block_does_not_draw_everything_to_one_worker() -> None:
    """The trap of the longest prefix: each prompt shares its first block, and only one worker has it."""
    taken: dict[str, Counter[str | None]] = {}
    for policy in (CostPolicy(), LongestPrefixPolicy()):
        loads = {f"p{i}": Load() for i in range(4)}
        counts: Counter[str | None] = Counter()
        for number in range(80):
            views = tuple(view(name, Role.PREFILL, pending=load) for name, load in loads.items())
            fleet = FleetSnapshot(views, (decode("d", running=60),))
            plan = policy.plan(request(20, request_id=str(number)), fleet, {"p0": 1}, 0.0)
            counts[plan.prefill] += 1
            if plan.prefill is not None:
                loads[plan.prefill] += Load(1, 19 * BLOCK_TOKENS)
        taken[policy.name] = counts
    assert taken["longest_prefix"] == {"p0": 80}
    assert max(taken["cost"].values()) <= 25


def test_equal_workers_share_requests() -> None:
    fleet = FleetSnapshot((), tuple(decode(f"d{i}") for i in range(4)))
    for policy in (CostPolicy(), LongestPrefixPolicy(), LeastLoadedPolicy()):
        plans = [policy.plan(request(request_id=str(n)), fleet, {}, 0.0) for n in range(200)]
        assert min(Counter(plan.decode for plan in plans).values()) > 20


def test_without_prefill_workers_decode_workers_prefill() -> None:
    plan = cost_plan(FleetSnapshot((), (decode("d0"), decode("d1"))), {"d1": 8})
    assert (plan.decode, plan.prefill, plan.prefill_alternatives) == ("d1", None, ())


def test_a_small_miss_is_computed_locally_and_a_large_one_beside_a_busy_batch_is_not() -> None:
    fleet = FleetSnapshot((prefill("p"),), (decode("d", running=8),))
    assert cost_plan(fleet, {"d": 10}).prefill is None
    assert cost_plan(fleet).prefill == "p"
    assert cost_plan(fleet, {"d": 10}).prefill_alternatives == ("p",)


def test_a_long_queue_on_the_prefill_side_makes_local_prefill_cheaper() -> None:
    fleet = FleetSnapshot((prefill("p", queued_tokens=50_000),), (decode("d", running=2),))
    assert cost_plan(fleet).prefill is None


def test_load_sent_since_the_last_status_counts() -> None:
    busy = Load(sequences=10, prefill_tokens=4000, kv_tokens=4000)
    fleet = FleetSnapshot((), (decode("d0", pending=busy), decode("d1")))
    assert cost_plan(fleet).decode == "d1"
    assert LeastLoadedPolicy().plan(request(), fleet, {}, 0.0).decode == "d1"


def test_a_worker_short_of_pages_waits_for_admission() -> None:
    fleet = FleetSnapshot((), (decode("d0", free_pages=1), decode("d1", free_pages=100)))
    plan = cost_plan(fleet)
    assert plan.decode == "d1"
    short = next(c for c in plan.candidates if c.decode == "d0")
    assert short.costs["admission"] > 0


def test_an_unmeasured_worker_is_judged_by_the_mean_of_the_others() -> None:
    fleet = FleetSnapshot((), (decode("d0"), decode("d1", timing=None)))
    first, second = sorted(cost_plan(fleet).candidates, key=lambda c: c.decode)
    assert first.costs == second.costs
    nobody = FleetSnapshot((prefill("p", timing=None),), (decode("d", timing=None, move_bytes_per_ms=0.0),))
    assert all(candidate.cost > 0 for candidate in cost_plan(nobody).candidates)


def test_the_decode_worker_with_the_conversation_wins_over_an_idle_one() -> None:
    fleet = FleetSnapshot((prefill("p"),), (decode("d0", running=2), decode("d1")))
    plan = cost_plan(fleet, {"d0": 10})
    assert (plan.decode, plan.prefill, plan.expected_cached) == ("d0", None, 10 * BLOCK_TOKENS)


def test_round_robin_takes_turns_on_both_ends() -> None:
    fleet = FleetSnapshot((prefill("p0"), prefill("p1")), tuple(decode(f"d{i}") for i in range(3)))
    plans = [RoundRobinPolicy().plan(request(ordinal=n), fleet, {}, 0.0) for n in range(6)]
    assert [(p.decode, p.prefill) for p in plans] == [
        ("d0", "p0"), ("d1", "p1"), ("d2", "p0"), ("d0", "p1"), ("d1", "p0"), ("d2", "p1"),
    ]  # fmt: skip


def test_nobody_there() -> None:
    with pytest.raises(Unavailable, match="no decode worker is connected"):
        cost_plan(FleetSnapshot((prefill("p"),), ()))


def test_workers_that_refused_are_left_out() -> None:
    fleet = FleetSnapshot((prefill("p"),), (decode("d0"), decode("d1")))
    assert [v.incarnation for v in fleet.without({"d0"}).decode] == ["d1"]
    assert replace(fleet, decode=()).without({"p"}).prefill == ()


@settings(max_examples=40)
@given(st.data())
def test_noise_in_measured_times_does_not_outweigh_a_cached_prefix(data: st.DataObject) -> None:
    """Equal machines never measure the same step time; that alone must not move a conversation elsewhere."""
    noisy = st.builds(StepTiming, base_ms=st.floats(7.0, 14.0), per_token_ms=st.floats(0.15, 0.29))
    rate = st.floats(FAST_LINK * 0.7, FAST_LINK * 1.4)
    decoders = tuple(decode(f"d{i}", timing=data.draw(noisy), move_bytes_per_ms=data.draw(rate)) for i in range(3))
    prefillers = tuple(prefill(f"p{i}", timing=data.draw(noisy), move_bytes_per_ms=data.draw(rate)) for i in range(3))
    plan = cost_plan(FleetSnapshot(prefillers, decoders), {"d1": 9, "p2": 9}, request_id=data.draw(st.text(max_size=4)))
    assert plan.decode == "d1" and plan.prefill in (None, "p2")


def test_a_machine_of_another_kind_is_believed() -> None:
    slow = StepTiming(base_ms=100.0, per_token_ms=2.0)
    fleet = FleetSnapshot((), (decode("d0"), decode("d1"), decode("d2", timing=slow)))
    assert cost_plan(fleet, {"d2": 8}).decode != "d2"
    assert cost_plan(fleet, {"d2": 10}).decode == "d2"
