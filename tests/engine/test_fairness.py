"""Tenants take turns by what their requests cost, and low priorities are not forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine import scheduler
from tandem.engine.engine import Engine
from tandem.engine.fairness import MOST, QUANTUM, fair_order, present, rounds, served
from tandem.engine.policy import PASSES, STARVED_AGES, EngineConfig
from tandem.engine.sequence import Seq, SeqState
from tandem.testing.engine import FakePool, FakeRunner, make_seq


@dataclass(frozen=True)
class Item:
    tenant: str
    cost: int
    priority: int = 0
    number: int = 0


COSTS = st.integers(1, 3 * QUANTUM)
ITEMS = st.lists(st.builds(Item, st.sampled_from("abc"), COSTS, st.integers(0, 2), st.integers()), max_size=25)
SPENT = st.dictionaries(st.sampled_from("abc"), st.integers(0, QUANTUM - 1).map(float))


@settings(max_examples=100)
@given(ITEMS, SPENT)
def test_an_order_keeps_priorities_and_each_tenants_own_order(items: list[Item], spent: dict[str, float]) -> None:
    items = sorted(items, key=lambda item: -item.priority)
    order = fair_order(items, present(spent, (item.tenant for item in items)))
    assert Counter(order) == Counter(items)
    assert [item.priority for item in order] == [item.priority for item in items]
    for tenant in "abc":
        assert [i for i in order if i.tenant == tenant] == [i for i in items if i.tenant == tenant]


@settings(max_examples=100)
@given(st.lists(COSTS, min_size=30, max_size=30), st.lists(COSTS, min_size=30, max_size=30), SPENT)
def test_backlogged_tenants_get_the_same_within_a_round_and_a_request(
    left: list[int], right: list[int], spent: dict[str, float]
) -> None:
    items = [Item("a", cost) for cost in left] + [Item("b", cost) for cost in right]
    got = {"a": 0, "b": 0}
    todo = Counter(item.tenant for item in items)
    for item in fair_order(items, present(spent, "ab")):
        got[item.tenant] += item.cost
        todo[item.tenant] -= 1
        assert abs(got["a"] - got["b"]) <= 2 * QUANTUM + 3 * QUANTUM
        if not all(todo.values()):
            break


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("abc"), COSTS), max_size=40))
def test_balances_stay_bounded_and_who_is_served_can_pay(steps: list[tuple[str, int]]) -> None:
    balances = present({}, "abc")
    for tenant, cost in steps:
        balances = served(balances, tenant, cost)
        assert 0 <= balances[tenant] < max(QUANTUM, MOST)
        assert all(0 <= balance <= MOST for balance in balances.values())
        assert list(balances)[-1] == tenant
    assert rounds(1, 1.0) == 0
    assert rounds(QUANTUM + 1, 0.0) == 2


def test_leaving_loses_the_credit_and_newcomers_go_before_who_was_served() -> None:
    assert present({"a": 100.0, "b": 5.0}, ["b", "c"]) == {"c": 0.0, "b": 5.0}
    assert list(present({"a": 100.0, "b": 5.0}, ["b", "c"])) == ["c", "b"]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """An engine that runs one sequence at a time, so that the order of admission is the order of the queue."""

    def __init__(self) -> None:
        pool = FakePool(64, 4)
        self.clock = Clock()
        config = EngineConfig(max_batch_tokens=8, max_running=1, prefix_cache=False)
        self.engine = Engine(FakeRunner(pool), pool, config, self.clock)
        self._added = 0

    def add(self, name: str, tenant: str = "", cost: int = QUANTUM, priority: int = 0) -> Seq:
        self._added += 1
        seq = make_seq(name, [1, 2, self._added], 1, order=self._added, arrival=self.clock.now, priority=priority)
        seq.tenant, seq.cost = tenant, cost
        self.engine.add(seq)
        return seq

    def finished(self, steps: int) -> list[str]:
        names: list[str] = []
        for _ in range(steps):
            if self.engine.has_work():
                output = self.engine.step()
                self.engine.check_integrity()
                names += [made.seq.seq_id for made in output.outputs if made.finish is not None]
        return names


def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    bench = Bench()
    for number in range(20):
        bench.add(f"flood{number}", "flood")
    for number in range(3):
        bench.add(f"small{number}", "small")
    assert [name[:5] for name in bench.finished(6)] == ["flood", "small"] * 3
    assert len(bench.finished(50)) == 17


def test_a_sequence_that_gave_way_is_paid_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    charged: list[str] = []

    def noting(balances: Mapping[str, float], tenant: str, cost: int) -> dict[str, float]:
        charged.append(tenant)
        return served(balances, tenant, cost)

    monkeypatch.setattr(scheduler, "served", noting)
    bench = Bench()
    first = bench.add("first", "a")
    first.sampling = replace(first.sampling, max_tokens=6)
    for number in range(3):
        bench.add(f"other{number}", "b")
    bench.finished(2)
    assert (first.state, charged) == (SeqState.RUNNING, ["a"])
    bench.engine.scheduler.retract(first, scheduler.Plan(8))
    assert len(bench.finished(50)) == 4
    assert first.retractions == 1
    assert charged.count("a") == 1


def test_who_asks_for_more_gets_fewer_turns() -> None:
    bench = Bench()
    for number in range(8):
        bench.add(f"large{number}", "large", cost=3 * QUANTUM)
        bench.add(f"small{number}", "small", cost=QUANTUM)
    first = bench.finished(8)
    assert sum(name.startswith("small") for name in first) == 6


def test_priority_comes_before_fairness() -> None:
    bench = Bench()
    bench.add("low", "a")
    bench.add("high", "b", priority=1)
    bench.add("high2", "b", priority=1)
    assert bench.finished(9) == ["high", "high2", "low"]


def test_low_priority_is_let_past_now_and_then_once_it_starves() -> None:
    bench = Bench()
    bench.add("low", priority=-1)
    bench.add("low2", priority=-1)
    names: list[str] = []
    for number in range(3 * PASSES):
        bench.add(f"high{number}")
        names += bench.finished(1)
    assert not any(name.startswith("low") for name in names)
    bench.clock.now += STARVED_AGES * bench.engine.config.ageing_s
    names = []
    for number in range(3 * PASSES):
        bench.add(f"again{number}")
        names += bench.finished(1)
    places = [place for place, name in enumerate(names) if name.startswith("low")]
    assert [names[place] for place in places] == ["low", "low2"]
    assert places[1] - places[0] == PASSES + 1
