"""Pairs that fail are avoided for a while, whatever the policy, and used again once they work."""

from __future__ import annotations

from router.workers.pairs import FIRST_S, LONGEST_S, PENALTY_MS, PairHealth, avoiding
from tandem.cluster import EARLIER, Candidate, MoveStat, Plan, Status


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def told(failures: int, tickets: int = 0, sender: str = "p", receiver: str = "d") -> Status:
    tcp = MoveStat(sender, receiver, "tcp", tickets=tickets)
    return Status(receiver, moves=(tcp, MoveStat(sender, receiver, "nixl", failures=failures)))


def test_a_pair_that_fails_is_avoided_longer_each_time_and_forgiven_once_it_works() -> None:
    clock = Clock()
    health = PairHealth(clock)
    health.observe(told(7))
    assert health.broken() == frozenset()
    waits = []
    for failures in range(8, 18):
        health.observe(told(failures))
        health.observe(told(failures))
        assert health.broken() == {("p", "d")}
        started = clock.now
        while health.broken():
            clock.now += FIRST_S / 2
        waits.append(clock.now - started)
    assert waits[:4] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S, 8 * FIRST_S]
    assert waits[-1] == LONGEST_S
    health.observe(told(18))
    health.observe(told(18, tickets=1))
    assert health.broken() == frozenset()
    health.observe(told(19, tickets=1))
    clock.now += FIRST_S
    assert health.broken() == frozenset()


def test_a_new_worker_s_first_failure_counts_and_the_gone_are_forgotten() -> None:
    health = PairHealth(Clock())
    health.observe(Status("d"))
    health.observe(told(1))
    health.observe(Status("e"))
    health.observe(told(1, receiver="e"))
    assert health.broken() == {("p", "d"), ("p", "e")}
    health.forget("e")
    assert health.broken() == {("p", "d")}
    health.forget("p")
    assert health.broken() == frozenset()


def test_senders_that_are_no_longer_told_apart_are_no_pair() -> None:
    health = PairHealth(Clock())
    health.observe(told(1))
    health.observe(told(9, sender=EARLIER))
    health.observe(told(10, sender=EARLIER))
    assert health.broken() == frozenset()
    health.observe(told(1))
    assert health.broken() == {("p", "d")}, "it failed anew"


def candidate(decode: str, prefill: str | None) -> Candidate:
    return Candidate(decode, prefill, 0, 0, {"queue": 1.0})


def test_broken_pairs_go_last_and_say_why() -> None:
    pairs = [candidate("d", "p"), candidate("d", "q"), candidate("e", "p"), candidate("d", None)]
    plan = Plan(tuple(pairs), "any")
    assert avoiding(plan, frozenset()) is plan
    assert avoiding(plan, {("p", "f")}) is plan
    avoided = avoiding(plan, {("p", "d")})
    assert avoided.candidates[:3] == (pairs[1], pairs[2], pairs[3])
    assert avoided.candidates[3].costs == {"queue": 1.0, "pair": PENALTY_MS}
    assert avoided.prefill_alternatives == ("q", "p")
    assert len(avoiding(plan, {("p", "d"), ("q", "d"), ("p", "e")}).candidates) == 4
