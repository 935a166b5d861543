"""KV that changed after it was computed is found when it is hit, dropped with all behind it, and never used."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tandem.cluster import EventKind
from tandem.engine.engine import Engine
from tandem.engine.kv_pool import KvPool
from tandem.engine.policy import EngineConfig
from tandem.engine.sequence import Seq, SeqState
from tandem.engine.verification import MOST_AT_ONCE, CorruptKv, PageChecks
from tandem.kv import KvLayout, LayerGroup, Plane
from tandem.testing.engine import FakePool, FakeRunner, make_seq, naive_continuation

PAGE = 4
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]
OTHER = [31, 41, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64]


class Rig:
    """An engine over fakes whose pages say which token of which text they are of."""

    def __init__(self, share: float, pages: int = 64) -> None:
        self.pool = FakePool(pages, PAGE)
        self.engine = Engine(FakeRunner(self.pool), self.pool, EngineConfig(verify_share=share))

    def run(self, name: str, tokens: list[int]) -> Seq:
        seq = make_seq(name, tokens)
        self.engine.add(seq)
        self.finish()
        return seq

    def finish(self) -> None:
        while self.engine.has_work():
            self.engine.step()
            self.engine.check_integrity()

    def cached_pages(self, tokens: list[int]) -> list[int]:
        """Where the whole pages of a text are."""
        root = next(root for root, _ in self.engine.memory.cache.nodes())
        packed = np.array(tokens, dtype=np.uint32).tobytes()
        return list(self.engine.memory.cache.match(root, packed, len(tokens)).pages[0])

    def slots(self, page: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        return self.pool.slots[0][page * PAGE : (page + 1) * PAGE]


def given_to_another(rig: Rig, page: int) -> None:
    """Freed too early: another sequence computed its tokens into it."""
    rig.run("other", OTHER)
    rig.slots(page)[:] = rig.slots(rig.cached_pages(OTHER)[0])


def torn(rig: Rig, page: int) -> None:
    """Half of a late write landed."""
    rig.slots(page)[PAGE // 2 :] += 1


def bit_flip(rig: Rig, page: int) -> None:
    rig.slots(page)[1, 0] ^= 1


Fault = Callable[[Rig, int], None]
FAULTS = (given_to_another, torn, bit_flip)


def right(seq: Seq) -> bool:
    return seq.tokens[seq.prompt_len :] == naive_continuation(seq.tokens[: seq.prompt_len], seq.sampling, seq.eos_ids)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_changed_page_is_dropped_and_computed_again(fault: Fault, place: int) -> None:
    rig = Rig(share=1.0)
    rig.run("first", PROMPT)
    rig.engine.drain_events()
    before = rig.engine.memory.cached_pages
    fault(rig, rig.cached_pages(PROMPT)[place])
    again = rig.run("again", PROMPT)
    assert right(again) and again.cached_tokens == place * PAGE
    checks = rig.engine.memory.checks
    assert (checks.corrupt, rig.engine.status().corrupt_pages) == (1, 1) and checks.checked > place
    third = rig.run("third", PROMPT)
    assert right(third) and third.cached_tokens == len(PROMPT) - 1 and checks.corrupt == 1
    assert rig.engine.memory.cached_pages >= before and rig.engine.idle_leaks() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_without_checks_it_would_have_been_used(fault: Fault) -> None:
    """The faults are real ones: nothing else notices them in time."""
    rig = Rig(share=0.0)
    rig.run("first", PROMPT)
    fault(rig, rig.cached_pages(PROMPT)[1])
    try:
        wrong = not right(rig.run("again", PROMPT))
    except AssertionError:
        wrong = True  # the fake looks at what real KV does not say
    assert wrong and rig.engine.memory.checks.checked == 0


def test_routers_hear_that_its_blocks_are_gone() -> None:
    rig, prompt = Rig(share=1.0, pages=128), [(at * 7) % 50 for at in range(200)]
    rig.run("first", prompt)
    stored = [name for event in rig.engine.drain_events() if event.kind is EventKind.STORED for name in event.hashes]
    assert len(stored) == 3
    torn(rig, rig.cached_pages(prompt)[20])
    rig.engine.add(make_seq("again", prompt))
    rig.engine.step()
    gone = [name for event in rig.engine.drain_events() if event.kind is EventKind.EVICTED for name in event.hashes]
    assert gone == stored[1:]


def test_a_partly_matching_page_is_looked_at_before_it_is_copied() -> None:
    rig = Rig(share=1.0)
    rig.run("first", PROMPT)
    torn(rig, rig.cached_pages(PROMPT)[2])
    branch = rig.run("branch", [*PROMPT[:11], 50, 51, 52])
    assert right(branch) and branch.cached_tokens == 8
    assert rig.engine.memory.checks.corrupt == 1


def test_a_page_in_use_ends_the_engine() -> None:
    """What computes with it cannot be mended: a supervisor starts the worker anew, and requests go on elsewhere."""
    rig = Rig(share=1.0)
    rig.run("first", PROMPT)
    running = make_seq("running", PROMPT)
    rig.engine.add(running)
    rig.engine.step()
    torn(rig, rig.cached_pages(PROMPT)[1])
    rig.engine.add(make_seq("next", PROMPT))
    with pytest.raises(CorruptKv, match="from token 4 on has changed while"):
        rig.finish()


def test_a_page_in_use_is_refused_as_often_as_it_is_asked_for() -> None:
    """Hand-overs open pages by commands, and ask again when one has failed."""
    rig = Rig(share=1.0)
    rig.run("first", PROMPT)
    rig.engine.add(make_seq("running", PROMPT))
    rig.engine.step()
    torn(rig, rig.cached_pages(PROMPT)[1])
    for again in range(3):
        waiting = make_seq(f"next {again}", PROMPT)
        waiting.state = SeqState.WAITING_KV
        with pytest.raises(CorruptKv, match="from token 4 on has changed while"):
            rig.engine.reserve(waiting)


def test_a_page_that_is_evicted_and_filled_anew_is_no_fault() -> None:
    for share in (0.5, 1.0):
        rig = Rig(share, pages=16)
        for round_ in range(40):
            text = [(round_ // 2 % 5) * 10 + at % 10 for at in range(22)]
            assert right(rig.run(f"s{round_}", text))
        assert rig.engine.memory.checks.corrupt == 0
        assert rig.engine.memory.checks.checked > 0


class Counting:
    def __init__(self) -> None:
        self.digested = 0

    def digest(self, group: int, page: int) -> int:
        self.digested += 1
        return page


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_share_is_that_of_the_pages(share: float) -> None:
    pool = Counting()
    checks = PageChecks(pool, share)
    checks.entered(0, range(2000))
    assert abs(pool.digested - 2000 * share) <= 60
    digested = pool.digested
    assert checks.spoiled([range(2000)]) is None
    assert checks.checked == pool.digested - digested == min(digested, MOST_AT_ONCE)


def test_a_digest_sees_every_byte_of_its_page_and_no_other() -> None:
    layout = KvLayout((Plane("k", 2, 3, "bfloat16"), Plane("v", 2, 4, "float32")), (LayerGroup((0, 1)),))
    pool = KvPool(layout, 3, 2, torch.device("cpu"))
    before = [pool.digest(0, page) for page in range(3)]
    for name, width in (("k", 3), ("v", 4)):
        for layer in (0, 1):
            for slot, head, dim in ((2, 0, 0), (3, 1, width - 1)):
                place = pool.plane(name, layer)
                place[slot, head, dim] = 1
                now = [pool.digest(0, page) for page in range(3)]
                assert now[1] != before[1] and (now[0], now[2]) == (before[0], before[2])
                place[slot, head, dim] = 0
    assert [pool.digest(0, page) for page in range(3)] == before
