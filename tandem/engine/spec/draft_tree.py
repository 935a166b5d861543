"""A draft that grows as a tree, by the drafter's own confidence (EAGLE-2: Li et al. 2024, arXiv:2406.16858).

A node's score is the log-probability of all tokens on its path, as the drafter gives it. Of each level the likeliest
nodes are taken further, and of all nodes the likeliest are the draft: paths of equal worth share its places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tandem.engine.sequence import ROOT, Draft


class GrowingTree:
    """One sequence's tree. A node is named by its index; parents come before their children."""

    def __init__(self, limit: int, branches: int) -> None:
        """limit: nodes of the draft, and nodes that are taken further. branches: of each level, and of each node."""
        self._limit = limit
        self._branches = branches
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._scores: list[float] = []
        self._depths: list[int] = []
        self.taken: list[int] = []
        """Nodes that are taken further, in the order of their slots."""
        self.level: list[int] = [ROOT] if limit else []
        """Those of `taken` whose children are not known yet."""

    def extend(self, children: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Takes in the children of each node of `level`, likeliest first, with their log-probabilities.

        `level` is made the best of them: those whose own children may get into the draft, as far as there is room.
        """
        first = len(self.tokens)
        for parent, found in zip(self.level, children, strict=True):
            before = 0.0 if parent == ROOT else self._scores[parent]
            depth = 1 if parent == ROOT else self._depths[parent] + 1
            for token, score in found[: self._branches]:
                self.tokens.append(token)
                self.parents.append(parent)
                self._scores.append(-math.inf if math.isnan(score) else before + score)
                self._depths.append(depth)
        fresh = [node for node in self._best() if node >= first]
        room = min(self._branches, self._limit - len(self.taken))
        self.level = [node for node in fresh if self._scores[node] >= self._last_score(fresh[0])][:room]
        self.taken += self.level

    def _last_score(self, node: int) -> float:
        """Of the draft's last node if the path to `node` went on as it began, and was all of it."""
        depth = self._depths[node]
        return self._scores[node] * self._limit / depth if depth < self._limit else math.inf

    def depth(self, node: int) -> int:
        """Tokens on the path to a node."""
        return self._depths[node]

    def lineage(self) -> list[int]:
        """Of each node that is taken further, those of them on the path to it, itself among them: bit n is the n-th."""
        words: dict[int, int] = {ROOT: 0}
        for place, node in enumerate(self.taken):
            words[node] = words[self.parents[node]] | 1 << place
        return [words[node] for node in self.taken]

    def draft(self) -> Draft:
        """The likeliest nodes; no node without its parent, which is never less likely."""
        kept = sorted(self._best())
        places = {ROOT: ROOT, **{node: place for place, node in enumerate(kept)}}
        return Draft(
            tuple(self.tokens[node] for node in kept), tuple(places[self.parents[node]] for node in kept)
        ).as_chain()

    def _best(self) -> list[int]:
        """The nodes of the draft if it ended now, likeliest first; of equals, the one nearer to the root."""
        return sorted(range(len(self.tokens)), key=lambda node: (-self._scores[node], node))[: self._limit]
