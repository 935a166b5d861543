"""Trees that grow by confidence, against all that could have been drafted."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.sequence import ROOT, Draft
from tandem.engine.spec.draft_tree import GrowingTree


def scores_of(path: tuple[int, ...], width: int, seed: int) -> list[tuple[int, float]]:
    """The children behind a path, likeliest first, with log-probabilities that depend on it alone."""
    weights = [1 + hash((seed, path, token)) % 97 for token in range(width)]
    total = sum(weights)
    return sorted(((token, math.log(weights[token] / total)) for token in range(width)), key=lambda each: -each[1])


def grow(limit: int, branches: int, width: int, seed: int) -> GrowingTree:
    tree = GrowingTree(limit, branches)
    paths: dict[int, tuple[int, ...]] = {ROOT: ()}
    while tree.level:
        tree.extend([scores_of(paths[node], width, seed) for node in tree.level])
        for node in tree.level:
            paths[node] = (*paths[tree.parents[node]], tree.tokens[node])
    return tree


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 20), st.integers(1, 4), st.integers(4, 6), st.integers(0, 999))
def test_a_draft_is_a_tree_of_the_likeliest(limit: int, branches: int, width: int, seed: int) -> None:
    tree = grow(limit, branches, width, seed)
    draft = tree.draft()  # its own checks: parents first, no two brothers alike
    assert len(draft) <= limit
    assert len(tree.taken) <= limit
    assert max(draft.depths(), default=0) <= limit
    assert all(len(draft.children(node)) <= branches for node in range(ROOT, len(draft)))
    for node in range(ROOT, len(draft)):
        best = [token for token, _ in scores_of(draft.ahead(node) if node != ROOT else (), width, seed)]
        chosen = [draft.tokens[child] for child in draft.children(node)]
        assert set(chosen) == set(best[: len(chosen)]), "of brothers the likeliest are drafted"
    if branches == 1:
        assert draft.parents is None


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 15), st.integers(1, 3), st.integers(0, 999))
def test_what_is_taken_further_sees_its_own_path(limit: int, branches: int, seed: int) -> None:
    tree = grow(limit, branches, 4, seed)
    for place, word in enumerate(tree.lineage()):
        seen = [tree.taken[bit] for bit in range(len(tree.taken)) if word >> bit & 1]
        assert tuple(sorted(seen)) == tuple(sorted(path_of(tree, tree.taken[place])))


def path_of(tree: GrowingTree, node: int) -> Iterator[int]:
    while node != ROOT:
        yield node
        node = tree.parents[node]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([math.nan, -math.inf, -0.5, -1.0, -2.0]), min_size=60, max_size=60))
def test_scores_that_are_no_numbers_end_nothing(scores: list[float]) -> None:
    tree, drawn = GrowingTree(8, 3), iter(scores * 4)
    while tree.level:
        tree.extend([[(token, next(drawn)) for token in range(3)] for _ in tree.level])
    assert len(tree.draft()) <= 8


def test_likely_paths_go_deep_and_doubtful_places_go_wide() -> None:
    sure, doubtful = GrowingTree(6, 3), GrowingTree(6, 3)
    while sure.level:
        sure.extend([[(1, -0.01), (2, -5.0), (3, -6.0)] for _ in sure.level])
    while doubtful.level:
        doubtful.extend([[(1, -1.0), (2, -1.1), (3, -1.2)] for _ in doubtful.level])
    assert sure.draft() == Draft((1,) * 6)
    assert len(doubtful.draft().children(ROOT)) == 3
