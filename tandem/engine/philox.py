"""The counter-based random number generator Philox4x32-10, over arrays.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11.

A number depends on its key and counter alone: no state, no order. A request that is retracted, migrated or speculated
draws what it would have drawn, whatever batch it is in.
"""

from __future__ import annotations

import numpy as np

Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
"""32-bit words, kept in 64 bits so that products do not overflow."""
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
ROUNDS = 10


Block = tuple[Words, Words, Words, Words]


def philox4x32(counter: Block, key: tuple[Words, Words]) -> Block:
    """Four random words for each (counter, key); all arrays have one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> _SHIFT) ^ c1 ^ k0, second & _LOW, (first >> _SHIFT) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: Words, positions: Words, choices: Words) -> Floats:
    """One number in [0, 1) with 53 random bits for each (64-bit seed, output index, choice)."""
    zero = np.zeros_like(positions)
    high, low, _, _ = philox4x32((positions, choices, zero, zero), (seeds & _LOW, seeds >> _SHIFT))
    bits = (high >> np.uint64(5) << np.uint64(26)) | (low >> np.uint64(6))
    return bits.astype(np.float64) * 2.0**-53


def uniform(seed: int, position: int, choice: int) -> float:
    """One number of `uniforms`, by Python's integers: for a few numbers they are faster than numpy's calls."""
    c0, c1, c2, c3, k0, k1 = position, choice, 0, 0, seed & 0xFFFFFFFF, seed >> 32
    for _ in range(ROUNDS):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (second >> 32) ^ c1 ^ k0, second & 0xFFFFFFFF
        c2, c3 = (first >> 32) ^ c3 ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return ((c0 >> 5 << 26) | (c1 >> 6)) * 2.0**-53
