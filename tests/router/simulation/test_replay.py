"""Whole simulated runs: one seed gives one run, every request ends once, and time passes as the model says."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.policies import POLICIES
from router.simulation.replay import Replay
from router.simulation.result import Result, summarize
from router.simulation.setting import Arrival, Machine, Objective, Setting, arrivals, ideal_share
from tandem.traces import TraceEntry

EXACT = Machine(base_ms=10.0, per_token_ms=0.1, per_context_ms=1e-3, max_batch_tokens=1024, hand_over_ms=2.0)
SMALL = Setting(prefill=3, decode=2, machine=EXACT, cache_blocks=40, block_tokens=64, noise=0.0)


def block(name: int) -> bytes:
    return name.to_bytes(2, "big") * 8


def one(at: float, names: list[int], output: int = 4, extra: int = 10) -> Arrival:
    return Arrival(at, len(names) * SMALL.block_tokens + extra, output, tuple(block(name) for name in names))


def some_load(seed: int, count: int = 40) -> list[Arrival]:
    """Conversations that grow, and a first block that all share."""
    rng = random.Random(seed)
    threads: list[list[int]] = [[0]]
    fresh, at, load = 1, 0.0, []
    for _ in range(count):
        names = [*rng.choice(threads)]
        for _ in range(rng.randint(1, 6)):
            names.append(fresh)
            fresh += 1
        threads.append(names)
        at += rng.expovariate(20.0)
        load.append(one(at, names, rng.randint(1, 30), rng.randint(1, 63)))
    return load


def run(load: list[Arrival], setting: Setting = SMALL, policy: str = "cost") -> Replay:
    replay = Replay(setting, POLICIES[policy](), load)
    replay.run()
    replay.check()
    return replay


def result(replay: Replay) -> dict[str, object]:
    """All but the real time that plans took."""
    found = summarize(replay, "p", Objective())
    return {f.name: getattr(found, f.name) for f in fields(Result) if not f.name.startswith("plan_ms")}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_seed_gives_the_same_run(policy: str) -> None:
    setting = replace(SMALL, noise=0.1, seed=3)
    first, second = (result(run(some_load(1), setting, policy)) for _ in range(2))
    assert first == second
    assert first != result(run(some_load(1), replace(setting, seed=4), policy))


@settings(max_examples=15)
@given(
    st.integers(0, 10**6), st.sampled_from(sorted(POLICIES)), st.integers(0, 3), st.integers(0, 60), st.integers(1, 40)
)
def test_every_request_ends_exactly_once_and_nothing_is_left(
    seed: int, policy: str, prefill: int, cache_blocks: int, max_inflight: int
) -> None:
    setting = replace(
        SMALL, prefill=prefill, cache_blocks=cache_blocks, max_inflight=max_inflight, noise=0.2, seed=seed
    )
    ends: dict[int, int] = {}
    replay = Replay(setting, POLICIES[policy](), some_load(seed, 25))
    for flight in replay.flights:
        before = flight.on_end
        flight.on_end = lambda f, then=before: (ends.update({f.number: ends.get(f.number, 0) + 1}), then(f))[-1]  # type: ignore[misc]
    replay.run()
    replay.check()
    served = {flight.number for flight in replay.flights if not flight.rejected}
    assert ends == dict.fromkeys(served, 1)
    assert served, "the first request always finds room"
    for flight in replay.flights:
        if not flight.rejected:
            assert 0 < flight.computed <= flight.prompt_tokens


def test_an_unloaded_request_takes_what_its_steps_and_its_hand_over_take() -> None:
    load = [one(0.0, [1, 2], output=3, extra=12)]  # 140 tokens
    flight = run(load, replace(SMALL, prefill=1, decode=1), "round_robin").flights[0]
    prefill_ms = 10 + 139 * 0.1
    move_ms = 139 * EXACT.kv_bytes / EXACT.link_bytes_per_ms + EXACT.hand_over_ms
    first_ms = 10 + 0.1 + 1e-3 * 140
    messages_ms = 2 * SMALL.delay_s * 1e3
    assert flight.ttft_s * 1e3 == pytest.approx(messages_ms + prefill_ms + move_ms + first_ms)
    assert flight.tpot_s * 1e3 == pytest.approx(10 + 0.1 + 1e-3 * 141.5)
    assert (flight.computed, flight.local) == (139, False)


def test_prompts_are_computed_in_chunks_of_the_token_budget() -> None:
    load = [one(0.0, list(range(1, 41)), output=1)]  # 2570 tokens in three steps
    flight = run(load, replace(SMALL, prefill=0, decode=1)).flights[0]
    assert flight.ttft_s * 1e3 == pytest.approx(SMALL.delay_s * 1e3 + 3 * 10 + 2570 * 0.1)


def test_what_a_prompt_looks_back_on_before_its_step_has_a_price() -> None:
    machine = replace(EXACT, per_prefix_ms=1e-3)
    setting = replace(SMALL, prefill=0, decode=1, machine=machine)
    long = run([one(0.0, list(range(1, 41)), output=1)], setting).flights[0]  # in three steps
    prefix = 1024 * 1024 + (2570 - 2048) * 2048
    assert long.ttft_s * 1e3 == pytest.approx(SMALL.delay_s * 1e3 + 3 * 10 + 2570 * 0.1 + prefix * 1e-3)
    turns = [one(0.0, [1, 2], output=1), one(9.0, [1, 2, 3], output=1)]
    second = run(turns, setting).flights[1]
    assert second.computed == 74
    assert second.ttft_s * 1e3 == pytest.approx(SMALL.delay_s * 1e3 + 10 + 74 * 0.1 + 74 * 128 * 1e-3)


def test_the_next_turn_finds_its_history_where_it_was_computed() -> None:
    turns = [one(0.0, [1, 2, 3]), one(5.0, [1, 2, 3, 4, 5])]
    first, second = run(turns).flights
    assert first.computed == first.prompt_tokens - 1 if not first.local else first.prompt_tokens
    assert second.computed <= 2 * SMALL.block_tokens + 10
    cold = run(turns, replace(SMALL, cache_blocks=0)).flights[1]
    assert cold.computed >= cold.prompt_tokens - 1


def test_requests_over_the_bound_are_rejected() -> None:
    load = [one(0.0, [n]) for n in range(1, 6)]
    replay = run(load, replace(SMALL, max_inflight=2))
    assert [flight.rejected for flight in replay.flights] == [False, False, True, True, True]
    assert result(replay)["rejected_share"] == pytest.approx(0.6)


def test_memory_of_a_decode_worker_holds_requests_back() -> None:
    machine = replace(EXACT, kv_tokens=400)
    load = [one(0.0, [n, 100 + n, 200 + n], output=20) for n in range(1, 4)]
    replay = run(load, replace(SMALL, decode=1, machine=machine), "round_robin")
    spans = sorted((flight.first_at, flight.ended_at) for flight in replay.flights)
    assert all(later[0] > earlier[1] for earlier, later in pairwise(spans))


def test_identical_prompts_that_arrive_together_follow_the_first() -> None:
    """They go where it is promised, whatever else is idle, and find it computed when their turn comes."""
    names = list(range(1, 33))
    load = [one(0.03 * n, names) for n in range(6)]
    replay = run(load, replace(SMALL, prefill=4, decode=1, cache_blocks=200), "longest_prefix")
    assert len({flight.prefill for flight in replay.flights}) == 1
    assert sum(flight.computed for flight in replay.flights) < 1.2 * replay.flights[0].prompt_tokens
    # By cost, a decode worker may compute it too, but nobody else.
    mixed = run(load, replace(SMALL, prefill=4, decode=1, cache_blocks=200))
    assert len({flight.prefill for flight in mixed.flights if flight.prefill}) <= 1
    assert sum(flight.computed for flight in mixed.flights) < 2.2 * mixed.flights[0].prompt_tokens


def test_time_is_compressed_to_the_load_asked_for() -> None:
    entries = [TraceEntry(1000.0 * n, 1024, 5, (0, n)) for n in range(1, 101)]
    setting = Setting(prefill=4, machine=EXACT, block_tokens=512)
    made = arrivals(entries, 20, 0.5, setting)
    counted = [arrival for arrival in made if arrival.reported]
    assert len(counted) == 80 and len(made[0].hashes) == 2
    rate = sum(arrival.prompt_tokens for arrival in counted) / (counted[-1].at - counted[0].at)
    assert rate == pytest.approx(0.5 * 4 * 1024 / 0.1124)
    assert ideal_share(made, 512) == pytest.approx(0.5)
    for skip, load, text in ((100, 0.5, "at least one must be left"), (0, -1.0, "at least 0 is needed")):
        with pytest.raises(ValueError, match=text):
            arrivals(entries, skip, load, setting)
    with pytest.raises(ValueError, match="decode is 0; it must be at least 1"):
        Setting(decode=0)


def test_a_summary_counts_what_it_says() -> None:
    replay = run(
        [one(0.0, [1, 2]), one(3.0, [1, 2, 3]), one(6.0, [9])], replace(SMALL, prefill=2, decode=1), "round_robin"
    )
    found = result(replay)
    prompts = sum(flight.prompt_tokens for flight in replay.flights)
    assert found["hit_share"] == pytest.approx(1 - sum(flight.computed for flight in replay.flights) / prompts)
    assert found["requests"] == 3 and found["goodput_share"] == 1.0 and found["local_share"] == 0.0
    assert found["goodput_per_s"] == pytest.approx(3 / 6.0)
    strict = summarize(replay, "p", Objective(ttft_ms=0.001))
    assert strict.goodput_share == 0.0
    busy = [replay.busy[1][name] - replay.busy[0][name] for name in replay.busy[0]]
    assert found["busiest"] == pytest.approx(max(busy) / (sum(busy) / 2))


def test_workers_of_one_machine_take_turns() -> None:
    """With one slot, two prompts on two workers take twice as long as beside each other."""
    load = [one(0.0, [1, 2]), one(0.0, [3, 4])]
    apart = replace(SMALL, prefill=2, decode=2)
    alone = [flight.ttft_s for flight in run(load, apart, "round_robin").flights]
    turns = [flight.ttft_s for flight in run(load, replace(apart, slots=1), "round_robin").flights]
    assert alone[0] == pytest.approx(alone[1])
    prefill_s = (10 + 137 * 0.1) / 1e3
    assert max(turns) > max(alone) + 0.9 * prefill_s
    two = [flight.ttft_s for flight in run(load, replace(apart, slots=2), "round_robin").flights]
    assert two == pytest.approx(alone)


def test_overhead_is_time_before_the_router_hears_of_a_request() -> None:
    load = [one(0.0, [1, 2])]
    slow = replace(SMALL, machine=replace(EXACT, overhead_ms=7.0))
    before, after = (run(load, setting).flights[0].ttft_s for setting in (SMALL, slow))
    assert after - before == pytest.approx(0.007)


def test_work_beside_the_steps_takes_the_same_cores() -> None:
    """A request's own work is part of its overhead; that on the tokens of one answer holds up another's prompt."""
    shared = replace(SMALL, prefill=1, decode=1, slots=1)
    alone = [one(0.0, [1, 2])]
    machine = replace(EXACT, overhead_ms=7.0, request_cpu_ms=7.0)
    before, after = (run(alone, each).flights[0].ttft_s for each in (shared, replace(shared, machine=machine)))
    assert after - before == pytest.approx(0.007)
    load = [one(0.0, [1, 2], output=100), one(0.5, [3, 4])]
    tokens = replace(shared, machine=replace(EXACT, token_cpu_ms=5.0))
    before, after = (run(load, each).flights[1].ttft_s for each in (shared, tokens))
    assert after > 1.1 * before
    apart = replace(tokens, slots=0)
    assert run(load, apart).flights[1].ttft_s == run(load, replace(apart, machine=EXACT)).flights[1].ttft_s


def test_steps_on_shared_cores_take_as_long_as_they_take_there() -> None:
    """Two prompts at once, on two cores that are half as fast while both are busy."""
    load = [one(0.0, [1, 2], output=5), one(0.0, [3, 4], output=5)]
    setting = replace(SMALL, prefill=0, decode=2, slots=2)
    crowded = replace(setting, machine=replace(EXACT, crowding=1.0))
    found, slow = (summarize(run(load, each, "round_robin"), "p", Objective()) for each in (setting, crowded))
    assert found.step_s * 1e3 == pytest.approx(2 * (10 + 138 * 0.1 + 4 * (10 + 0.1 + 1e-3 * 140.5)))
    assert slow.step_s == pytest.approx(2 * found.step_s)
    assert found.tpot_p50 == pytest.approx(10 + 0.1 + 1e-3 * 140.5)
    assert slow.tpot_p50 == pytest.approx(2 * found.tpot_p50)
    assert slow.itl_p50 == pytest.approx(2 * found.itl_p50)


def test_clients_are_told_the_better_of_both_caches() -> None:
    """The second turn goes to the other prefill worker, which computes what the decode worker already had."""
    replay = run([one(0.0, [1, 2]), one(3.0, [1, 2, 3])], replace(SMALL, prefill=2, decode=1), "round_robin")
    second = replay.flights[1]
    assert second.computed == second.prompt_tokens - 1
    assert second.cached_tokens == 128
    found = summarize(replay, "p", Objective())
    assert found.cached_share == pytest.approx(128 / sum(flight.prompt_tokens for flight in replay.flights))
    assert found.hit_share < found.cached_share


def pooled(tokens: int) -> Setting:
    return replace(SMALL, prefill=0, decode=1, pool=True, machine=replace(EXACT, kv_tokens=tokens), block_tokens=16)


def test_a_pool_gives_sequences_room_that_the_cache_had() -> None:
    entries = [TraceEntry(1000.0 * n, 2560, 256, tuple(range(5 * n, 5 * n + 5))) for n in range(4)]
    entries += [TraceEntry(1000.0 * (4 + n), 2560, 256, tuple(range(5 * n, 5 * n + 5))) for n in range(4)]
    found = {}
    for tokens in (4 * 352, 3 * 352):
        setting = pooled(tokens)
        replay = run(arrivals(entries, 0, 0.0, setting, 0.125), setting)
        found[tokens] = [flight.computed for flight in replay.flights[4:]]
    # 320 prompt tokens and 32 of the answer each: all four just fit; where three do, none outlives the next three.
    assert found[4 * 352] == [0] * 4
    assert min(found[3 * 352]) > 0


def test_generated_tokens_stay_where_the_trace_names_them() -> None:
    first = TraceEntry(0.0, 1100, 1000, (1, 2, 3), (4, 5))
    unnamed = replace(first, output_hash_ids=())
    second = TraceEntry(90_000.0, 2200, 10, (1, 2, 3, 4, 5))
    setting = replace(SMALL, prefill=0, decode=1, block_tokens=64, cache_blocks=100)
    computed = {}
    for name, turn in (("named", first), ("unnamed", unnamed)):
        load = arrivals([turn, second], 0, 0.0, setting)
        computed[name] = run(load, setting).flights[1].computed
    assert computed["named"] == 2200 - (1100 + 1000 - 1) // 64 * 64
    assert computed["unnamed"] == 2200 - 1100 // 64 * 64


def test_blocks_smaller_than_the_traces_match_within_them() -> None:
    """What a prompt has of the block it ends in is cached for the next one, as in workers that match tokens."""
    entries = [TraceEntry(0.0, 700, 8, (1, 2)), TraceEntry(5000.0, 1500, 8, (1, 2, 3))]
    for block_tokens, cached in ((512, 512), (64, 640), (4, 700)):
        setting = replace(SMALL, prefill=0, decode=1, block_tokens=block_tokens, cache_blocks=1000)
        assert run(arrivals(entries, 0, 0.0, setting), setting).flights[1].computed == 1500 - cached
    with pytest.raises(ValueError, match=r"block_tokens is 48; the trace's blocks of 512 tokens must be a multiple"):
        arrivals(entries, 0, 0.0, replace(SMALL, block_tokens=48))
