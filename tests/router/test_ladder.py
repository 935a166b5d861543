"""The hit ladder: each rung against a naive model, and its bounds."""

from __future__ import annotations

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from router.explain.ladder import HitLadder, Rungs
from tandem.kv import BLOCK_TOKENS

CAPACITY = 4


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def chain(*names: int) -> list[bytes]:
    """Block hashes of a prompt whose blocks are called so; equal prefixes have equal hashes."""
    hashes, parent = [], b""
    for name in names:
        parent = hashlib.blake2b(parent + bytes([name]), digest_size=16).digest()
        hashes.append(parent)
    return hashes


class NaiveLru:
    """Least recently used first; a prompt's last block is older than its first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.blocks: list[bytes] = []

    def use(self, hashes: list[bytes]) -> int:
        known = 0
        while known < len(hashes) and hashes[known] in self.blocks:
            known += 1
        for block in reversed(hashes):
            if block in self.blocks:
                self.blocks.remove(block)
            self.blocks.append(block)
        self.blocks = self.blocks[-self.size :]
        return known


@settings(max_examples=100)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=5), st.integers(0, 400)), max_size=20))
def test_every_rung_is_what_it_is_said_to_be(prompts: list[tuple[list[int], int]]) -> None:
    ladder = HitLadder(1000, 1e9, Clock())
    seen: set[bytes] = set()
    lru = NaiveLru(CAPACITY)
    total = Rungs()
    for names, best in prompts:
        hashes = chain(*names)
        tokens = len(hashes) * BLOCK_TOKENS + 1
        ideal = next((i for i, block in enumerate(hashes) if block not in seen), len(hashes))
        seen.update(hashes)
        found = ladder.planned(hashes, tokens, best, CAPACITY * BLOCK_TOKENS)
        expected = Rungs(
            len(hashes) * BLOCK_TOKENS,
            ideal * BLOCK_TOKENS,
            lru.use(hashes) * BLOCK_TOKENS,
            min(best // BLOCK_TOKENS, len(hashes)) * BLOCK_TOKENS,
        )
        assert found == expected
        ladder.ended(found, best)
        total += Rungs(found.prompt, found.ideal, found.capacity, found.perfect_routing, found.perfect_routing)
        assert ladder.total == total
        ladder.check_integrity()


def test_the_last_prompt_token_is_never_cached_so_its_block_does_not_count() -> None:
    ladder = HitLadder(10, 1e9, Clock())
    for _ in range(2):
        found = ladder.planned(chain(1, 2), 2 * BLOCK_TOKENS, 0, 1 << 20)
    assert (found.prompt, found.ideal) == (BLOCK_TOKENS, BLOCK_TOKENS)
    assert ladder.planned(chain(1, 2), 2 * BLOCK_TOKENS + 1, 0, 1 << 20).ideal == 2 * BLOCK_TOKENS


def test_answers_can_be_reused_too() -> None:
    ladder = HitLadder(10, 1e9, Clock())
    ladder.planned(chain(1), BLOCK_TOKENS + 1, 0, 1 << 20)
    ladder.stored(chain(1, 2)[1:], 1 << 20)
    assert ladder.planned(chain(1, 2, 3), 3 * BLOCK_TOKENS + 1, 0, 1 << 20).ideal == 2 * BLOCK_TOKENS


def test_infinite_ends_at_a_number_and_at_an_age() -> None:
    clock = Clock()
    ladder = HitLadder(3, 10.0, clock)
    ladder.planned(chain(1, 2), 1000, 0, 1 << 20)
    ladder.planned(chain(3, 4), 1000, 0, 1 << 20)
    assert ladder.planned(chain(1, 2), 1000, 0, 1 << 20).ideal == BLOCK_TOKENS
    ladder.check_integrity()
    clock.now = 11.0
    ladder.planned(chain(5), 1000, 0, 1 << 20)
    assert ladder.planned(chain(1), 1000, 0, 1 << 20).ideal == 0


def test_prometheus_gets_every_rung() -> None:
    ladder = HitLadder(10, 1e9, Clock())
    ladder.ended(ladder.planned(chain(1), BLOCK_TOKENS + 1, 0, 0), 64)
    tokens, blocks = ladder.collect()
    values = {sample.labels["rung"]: sample.value for sample in tokens.samples}
    assert values == {"prompt": 64, "ideal": 0, "capacity": 0, "perfect_routing": 0, "achieved": 64}
    assert blocks.samples[0].value == 1
