"""What occurred before, and what followed it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.spec.ngram import NgramDrafter, RootTexts
from tandem.engine.spec.text_index import LENGTHS, TextIndex
from tandem.testing.engine import make_seq


def ends(text: Sequence[int], length: int) -> list[int]:
    """Where the last `length` tokens of a text occur in it, with something behind them."""
    return [end for end in range(length, len(text)) if text[end - length : end] == text[len(text) - length :]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=90), min_size=1, max_size=5), st.integers(1, 12))
def test_what_is_found_did_follow_however_the_text_came(parts: list[list[int]], limit: int) -> None:
    index, text = TextIndex(), list[int]()
    for part in parts:
        index.extend(part)
        text += part
        length, found = index.find(text[-16:], limit)
        assert length in (0, *LENGTHS)
        if length:
            followed = [[text[end + at % (len(text) - end)] for at in range(limit)] for end in ends(text, length)]
            assert found in followed
    assert len(index) == len(text)


def test_long_texts_and_large_ids_are_found() -> None:
    text = random.Random(1).choices(range(200_000), k=5000)
    index = TextIndex()
    index.extend(text)
    for at in (16, 100, 4000):
        assert index.find(text[at - 16 : at], 5) == (16, text[at : at + 5])
        assert index.find([1, 2, *text[at - 5 : at]], 5) == (5, text[at : at + 5])
    assert index.find([200_001] * 16, 5) == (0, [])
    assert index.find([1, 2], 5) == (0, [])


def test_a_text_that_repeats_itself_goes_on_so() -> None:
    index = TextIndex()
    index.extend([1, 2, 3] * 3)
    assert index.find(([1, 2, 3] * 3)[-16:], 7) == (5, [1, 2, 3, 1, 2, 3, 1])


def test_nothing_is_continued_with_another_text() -> None:
    texts = RootTexts(100)
    texts.add([1, 2, 3, 4])
    texts.add([5, 6, 7, 8])
    assert texts.find([1, 2, 3], 5) == (3, [4])
    for value in range(40):
        texts.add([value + 100] * 10)
        assert len(texts) <= 2 * 101 + 11
    assert texts.find([1, 2, 3], 5) == (0, [])
    assert texts.find([139] * 3, 1) == (3, [139])


# The drafter --------------------------------------------------------------------------------------------------------


def proposed(drafter: NgramDrafter, tokens: list[int], limit: int = 4, root: bytes = b"root") -> tuple[int, ...]:
    seq = make_seq("asks", tokens, root=root)
    draft = drafter.propose([seq], [limit])[0]
    drafter.forget(seq)  # with nothing computed
    return draft.tokens


def test_a_sequence_is_continued_by_its_own_text() -> None:
    drafter = NgramDrafter()
    seq = make_seq("a", [5, 6, 7, 8, 9, 1, 5, 6, 7])
    assert drafter.propose([seq], [2])[0].tokens == (8, 9)
    seq.tokens += [8, 9, 1]
    assert drafter.propose([seq], [4])[0].tokens == (5, 6, 7, 8)
    assert proposed(NgramDrafter(), [1, 2, 3, 4, 5]) == ()


def test_texts_of_others_are_found_within_their_root_alone() -> None:
    drafter = NgramDrafter()
    seq = make_seq("a", [*range(20, 40)], root=b"one", computed=19)
    drafter.forget(seq)
    assert proposed(drafter, [1, 22, 23, 24], root=b"one") == (25, 26, 27, 28)
    assert proposed(drafter, [1, 35, 36, 37], root=b"one") == (38,)  # what has no KV was not cached
    assert proposed(drafter, [1, 22, 23, 24], root=b"two") == ()
    uncached = NgramDrafter(caching=False)
    uncached.forget(seq)
    assert proposed(uncached, [1, 22, 23, 24], root=b"one") == ()


def test_the_longer_match_counts() -> None:
    drafter = NgramDrafter()
    drafter.forget(make_seq("a", [1, 2, 3, 4, 5, 6, 7, 8], computed=8))
    assert proposed(drafter, [3, 4, 5, 9, 1, 2, 3, 4, 5], 2) == (6, 7)
    assert proposed(drafter, [1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5], 2) == (9, 1)


def test_memory_is_bounded() -> None:
    drafter = NgramDrafter(root_tokens=50)
    for number in range(40):
        seq = make_seq(f"s{number}", [number] * 20, root=bytes([number]), computed=20)
        drafter.propose([seq], [1])
        drafter.forget(seq)
    inside = vars(drafter)
    assert (len(inside["_own"]), len(inside["_roots"])) == (0, 16)
    assert proposed(drafter, [39] * 3, root=bytes([39])) == (39,)
    assert proposed(drafter, [1, 3, 3, 3], root=bytes([3])) == ()
