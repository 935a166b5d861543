"""Each re-created rule on hand-made cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import baselines
from benchmarks.baselines.disaggregated import DisaggregatedPolicy
from router.policies import RequestInfo
from router.workers.snapshot import FleetSnapshot, Load, WorkerView
from tandem.cluster import Role, Status, StepTiming
from tandem.testing.workers import fake_info

PAGES = 1000
TOKENS = 16 * PAGES


def worker(name: str, role: Role = Role.PREFILL, **status: Any) -> WorkerView:
    fields = {"free_pages": PAGES, "total_pages": PAGES, **status}
    return WorkerView(fake_info(role, incarnation=name, total_pages=PAGES), Status(name, **fields), Load())


def chosen(
    policy: DisaggregatedPolicy, prefill: Sequence[WorkerView], matches: dict[str, int], number: int = 0
) -> str | None:
    fleet = FleetSnapshot(tuple(prefill), (worker("d", Role.DECODE),))
    return policy.plan(RequestInfo(str(number), 1000, 100, ordinal=number), fleet, matches, 0.0).prefill


def drawn(policy: DisaggregatedPolicy, prefill: Sequence[WorkerView], matches: dict[str, int]) -> Counter[str | None]:
    return Counter(chosen(policy, prefill, matches, number) for number in range(200))


def test_sglang_follows_a_match_above_three_tenths_whatever_the_load() -> None:
    busy, idle = worker("busy", running=60, queued_tokens=50_000), worker("idle")
    for policy in (baselines.sglang(), baselines.sglang_events()):
        assert chosen(policy, [busy, idle], {"busy": 301}) == "busy"
        assert chosen(policy, [busy, idle], {"busy": 300}) == "idle"


def test_sglang_gives_affinity_up_when_request_counts_differ_by_64_and_half() -> None:
    policy = baselines.sglang()
    assert chosen(policy, [worker("a", running=65), worker("b")], {"a": 900}) == "b"
    assert chosen(policy, [worker("a", running=64), worker("b")], {"a": 900}) == "a"
    assert chosen(policy, [worker("a", running=240), worker("b", running=161)], {"a": 900}) == "a"


def test_sglang_counts_requests_not_tokens() -> None:
    heavy, light = worker("heavy", running=1, queued_tokens=90_000), worker("light", running=2)
    assert chosen(baselines.sglang(), [heavy, light], {}) == "heavy"


def test_of_equal_matches_sglang_takes_any_and_its_successor_the_lightest() -> None:
    views = [worker("a", running=9), worker("b", running=3), worker("c")]
    matches = {"a": 800, "b": 800}
    assert min(drawn(baselines.sglang(), views, matches)[name] for name in ("a", "b")) > 60
    assert drawn(baselines.sglang_events(), views, matches) == {"b": 200}


def test_sglang_takes_the_less_loaded_of_two_decode_workers() -> None:
    decode = tuple(worker(f"d{n}", Role.DECODE, running=n) for n in range(3))
    fleet = FleetSnapshot((worker("p"),), decode)
    policy = baselines.sglang()
    taken = Counter(policy.plan(RequestInfo(str(n), 1000, 100), fleet, {}, 0.0).decode for n in range(300))
    assert set(taken) == {"d0", "d1"} and 60 < taken["d1"] < 140


def test_dynamo_adds_prompt_blocks_to_compute_and_blocks_in_use() -> None:
    policy = baselines.dynamo()
    queued, holding = worker("queued", queued_tokens=640), worker("holding", free_pages=PAGES - 39)
    assert chosen(policy, [queued, holding], {}) == "holding"
    assert chosen(policy, [queued, holding], {"queued": 17}) == "queued"
    # Credit never makes a cost negative.
    assert chosen(policy, [worker("a"), worker("b", queued_tokens=0)], {"a": 999}) == "a"


def test_dynamo_chooses_decode_workers_by_blocks_in_use_alone() -> None:
    decode = (worker("full", Role.DECODE, free_pages=10), worker("free", Role.DECODE, running=50))
    plan = baselines.dynamo().plan(
        RequestInfo("r", 1000, 100), FleetSnapshot((worker("p"),), decode), {"full": 999}, 0.0
    )
    assert (plan.decode, plan.prefill) == ("free", "p")


def test_llmd_keeps_sticky_endpoints_until_they_cost_18_seconds_more() -> None:
    policy, timing = baselines.llmd(), StepTiming(0.0, 1.0)  # 1,000 tokens a second
    sticky = worker("sticky", queued_tokens=17_900, timing=timing)
    other = worker("other", timing=timing)
    assert chosen(policy, [sticky, other], {"sticky": 800}) == "sticky"
    assert chosen(policy, [sticky, other], {"sticky": 799}) == "other"
    late = worker("sticky", queued_tokens=18_100, timing=timing)
    assert chosen(policy, [late, other], {"sticky": 800}) == "other"


def test_llmd_spreads_over_sticky_endpoints_by_tokens_in_flight() -> None:
    views = [worker("a", queued_tokens=500), worker("b", queued_tokens=100), worker("c")]
    assert chosen(baselines.llmd(), views, {"a": 900, "b": 850}) == "b"


def test_llmds_scorers_add_queue_memory_and_prefix() -> None:
    policy = baselines.llmd_scorers()
    # 2 for the shortest queue against 3 x the prefix.
    assert chosen(policy, [worker("a", running=5), worker("b")], {"a": 700}) == "a"
    assert chosen(policy, [worker("a", running=5), worker("b")], {"a": 600}) == "b"
    assert chosen(policy, [worker("a", free_pages=PAGES // 2), worker("b")], {"a": 300}) == "b"


@pytest.mark.parametrize("name", ["sglang", "sglang_events", "dynamo", "llmd", "llmd_scorers"])
def test_every_rule_makes_sound_plans(name: str) -> None:
    policy = getattr(baselines, name)()
    assert policy.name == name
    prefill = tuple(worker(f"p{n}", running=n) for n in range(6))
    decode = tuple(worker(f"d{n}", Role.DECODE, running=n) for n in range(6))
    request = RequestInfo("r", 1000, 100)
    plan = policy.plan(request, FleetSnapshot(prefill, decode), {"p3": 900, "d2": 500}, 0.0)
    assert plan.policy == name and plan.prefill is not None
    assert all(candidate.prefill and candidate.costs for candidate in plan.candidates)
    alone = policy.plan(request, FleetSnapshot((), decode), {"d2": 900}, 0.0)
    assert alone.prefill is None and alone.candidates[0].decode.startswith("d")
    assert len(drawn(policy, (prefill[0], worker("q")), {})) == 2
