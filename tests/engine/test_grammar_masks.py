"""Masks: filled at once or on a thread they are the same, and what they forbid cannot be sampled."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.grammar.masks import Allowed, Filled, MaskFiller
from tandem.engine.sequence import Draft, Seq
from tandem.testing.engine import make_seq
from tandem.types import SamplingParams

VOCABULARY, END = 70, 3
NO_END = frozenset[int]()


class Fixed:
    """A grammar that always allows the same tokens, and whose library sets bits behind the vocabulary too."""

    active, stuck, finished, ends = True, False, False, frozenset({END})

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def fill(self, mask: Any, row: int) -> None:
        for token in (*self.tokens, VOCABULARY + 1):
            mask.view(np.uint32)[row, token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token: int) -> None:
        raise AssertionError("never told")

    def force(self, limit: int) -> list[int]:
        raise AssertionError("never asked")

    def prune(self, draft: Draft) -> Draft:
        return draft

    def fill_draft(self, draft: Draft, mask: Any, row: int) -> None:
        for at in range(len(draft)):
            self.fill(mask, row + at)


def sequence(*tokens: int, eos: frozenset[int] = NO_END, **params: Any) -> Seq:
    return make_seq("a", [1, 2], 9, constraint=Fixed(*tokens), eos_ids=eos, sampling=SamplingParams(**params))


def left(allowed: Allowed, rows: int) -> list[set[int]]:
    """What may still be sampled from equal logits."""
    hidden = allowed.applied(torch.zeros(rows, VOCABULARY))
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in hidden]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_exactly_what_is_not_allowed_is_hidden(data: st.DataObject) -> None:
    vocab, rows = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 6))
    bound = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
    source = np.random.default_rng(data.draw(st.integers(0, 999)))
    shares = source.choice([0.0, 0.03, 0.5, 1.0], len(bound))
    tokens = source.random((len(bound), vocab)) < shares[:, None]
    padded = np.pad(tokens, ((0, 0), (0, -vocab % 32)))
    bits = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    wide = torch.from_numpy(source.random((rows, vocab + 5), dtype=np.float32))
    for logits in (wide[:, :vocab].clone(), wide[:, :vocab]):
        expected = logits.clone()
        expected[torch.tensor(bound)] = expected[torch.tensor(bound)].masked_fill(~torch.from_numpy(tokens), -torch.inf)
        assert torch.equal(Allowed(bound, bits).applied(logits), expected)


def test_slow_masks_are_filled_on_a_thread_and_are_the_same() -> None:
    quick, slow = MaskFiller(VOCABULARY, quick_s=9.0), MaskFiller(VOCABULARY, quick_s=0.0)
    seqs = [sequence(1, 69), make_seq("free", [1], 9), sequence(*range(60))]
    for turn in range(3):
        at_once, later = quick.start(seqs), slow.start(seqs)
        assert isinstance(at_once, Filled)
        assert isinstance(later, Future if turn else Filled), "nothing is known of the first ones"
        assert left(at_once.result(), 3) == left(later.result(), 3) == [{1, 69}, set(range(70)), set(range(60))]
    assert quick.start([seqs[1]]) is None


def test_an_end_is_hidden_while_a_text_is_to_go_on_and_can() -> None:
    def of(seq: Seq) -> set[int]:
        filled = MaskFiller(VOCABULARY).start([seq])
        assert filled is not None and seq.constraint is not None
        tokens = left(filled.result(), 1)[0]
        assert seq.constraint.stuck is (not tokens)
        return tokens

    assert of(sequence(1, END)) == {1, END}
    assert of(sequence(1, END, min_tokens=1)) == {1}
    assert of(sequence(END, min_tokens=1)) == {END}
    assert of(sequence(1, END, ignore_eos=True)) == {1}
    assert of(sequence(END, ignore_eos=True)) == {END}
    assert of(sequence(1, 5, END, eos=frozenset({5, 999}), min_tokens=1)) == {1}
    assert of(sequence(1, 5, END, eos=frozenset({5}), ignore_eos=True)) == {1, 5}, "a client's own stop id is text"
    assert of(sequence()) == set()
