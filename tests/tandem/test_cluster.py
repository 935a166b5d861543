"""What a plan says of itself, and ids."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from tandem.cluster import Candidate, Plan, Role, WorkerInfo, new_id
from tandem.kv import KvLayout, LayerGroup, Plane
from tandem.types import ModelInfo

names = st.sampled_from(["a", "b", "c"])
candidates = st.builds(
    Candidate,
    decode=names,
    prefill=st.none() | names,
    decode_cached=st.integers(0, 100),
    prefill_cached=st.integers(0, 100),
    costs=st.dictionaries(st.sampled_from(["queue", "move"]), st.integers(0, 100)),
)
plans = st.builds(Plan, candidates=st.lists(candidates, min_size=1).map(tuple), policy=st.just("cost"))


def candidate(decode: str, prefill: str | None, cached: int = 0) -> Candidate:
    return Candidate(decode, prefill, decode_cached=cached, prefill_cached=0, costs={"queue": 1.0, "move": 2.5})


def test_a_plan_speaks_of_its_first_candidate() -> None:
    plan = Plan((candidate("d1", "p1", 64), candidate("d2", None, 128)), "cost")
    assert (plan.decode, plan.prefill, plan.expected_cached) == ("d1", "p1", 64)


def test_a_plan_may_prefill_locally() -> None:
    plan = Plan((candidate("d1", None), candidate("d1", "p1")), "cost")
    assert plan.prefill is None
    assert plan.prefill_alternatives == ("p1",)


def test_alternatives_are_those_of_the_chosen_decode_worker_best_first() -> None:
    pairs = [("d1", "p2"), ("d2", "p3"), ("d1", "p1"), ("d1", None), ("d1", "p2")]
    plan = Plan(tuple(candidate(*pair) for pair in pairs), "cost")
    assert plan.prefill_alternatives == ("p2", "p1")


@given(plans)
def test_alternatives_begin_with_the_chosen_worker_and_repeat_none(plan: Plan) -> None:
    found = plan.prefill_alternatives
    assert len(set(found)) == len(found)
    assert set(found) <= {c.prefill for c in plan.candidates if c.decode == plan.decode}
    if plan.prefill is not None:
        assert found[0] == plan.prefill


def test_the_cost_is_the_sum_of_its_terms() -> None:
    assert candidate("d", None).cost == 3.5
    assert Candidate("d", None, 0, 0, {}).cost == 0


def test_ids_are_128_random_bits() -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("[0-9a-f]{32}", i) for i in ids)


def test_capacity_is_pages_times_their_size() -> None:
    worker = WorkerInfo(
        incarnation=new_id(),
        role=Role.DECODE,
        address="127.0.0.1:1",
        model=ModelInfo("m", "path", "00", 10, 100),
        layout=KvLayout((Plane("k", 1, 8, "float32"),), (LayerGroup((0,)),)),
        kv_dtype="float32",
        page_size=16,
        total_pages=10,
        max_batch_tokens=512,
        transport="tcp",
    )
    assert worker.capacity_tokens == 160
