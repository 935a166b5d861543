"""The generator's known answers, and that its numbers are independent along every axis of the counter and the key."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from tandem.engine.philox import philox4x32, uniform, uniforms

# From the authors' Random123 distribution (kat_vectors).
KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
COUNT = 20_000


def words(values: list[int]) -> list[NDArray[np.uint64]]:
    return [np.array([value], dtype=np.uint64) for value in values]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: str) -> None:
    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    assert " ".join(f"{int(word[0]):08x}" for word in philox4x32((c0, c1, c2, c3), (k0, k1))) == expected


def axis(name: str) -> NDArray[np.float64]:
    """COUNT numbers that differ in one coordinate only."""
    count, zero = np.arange(COUNT, dtype=np.uint64), np.zeros(COUNT, dtype=np.uint64)
    seed = zero + np.uint64(0x1234_5678_9ABC_DEF0)
    return {
        "position": lambda: uniforms(seed, count, zero),
        "choice": lambda: uniforms(seed, zero, count),
        "seed": lambda: uniforms(count, zero, zero),
        "seed's high half": lambda: uniforms(count << np.uint64(32), zero, zero),
    }[name]()


AXES = ("position", "choice", "seed", "seed's high half")


def chi_square_limit(degrees: int) -> float:
    """The value exceeded with probability 1e-4 (Wilson and Hilferty 1931)."""
    spread = 2.0 / (9.0 * degrees)
    return degrees * (1.0 - spread + 3.719 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("name", AXES)
def test_numbers_are_uniform(name: str) -> None:
    numbers = axis(name)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = np.bincount((numbers * 100).astype(int), minlength=100)
    assert ((counts - COUNT / 100) ** 2 / (COUNT / 100)).sum() < chi_square_limit(99)


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("lag", [1, 2, 16])
def test_neighbours_are_independent(name: str, lag: int) -> None:
    numbers = axis(name)
    cells = (numbers[:-lag] * 8).astype(int) * 8 + (numbers[lag:] * 8).astype(int)
    expected = (COUNT - lag) / 64
    assert ((np.bincount(cells, minlength=64) - expected) ** 2 / expected).sum() < chi_square_limit(63)


def test_a_number_depends_on_its_own_coordinates_only() -> None:
    source = np.random.default_rng(0)
    seeds = source.integers(0, 1 << 64, 200, dtype=np.uint64)
    positions, choices = (source.integers(0, 1 << 20, 200, dtype=np.uint64) for _ in range(2))
    together = uniforms(seeds, positions, choices)
    alone = [uniforms(seeds[i : i + 1], positions[i : i + 1], choices[i : i + 1])[0] for i in range(200)]
    assert together.tolist() == alone
    assert len(set(together.tolist())) == 200
    one_by_one = [uniform(*map(int, each)) for each in zip(seeds, positions, choices, strict=True)]
    assert together.tolist() == one_by_one


def test_bits_reach_down_to_the_last_of_53() -> None:
    bits = (axis("position") * 2.0**53).astype(np.uint64)
    shares = [float(((bits >> np.uint64(bit)) & np.uint64(1)).mean()) for bit in range(53)]
    assert all(abs(share - 0.5) < 0.02 for share in shares)
