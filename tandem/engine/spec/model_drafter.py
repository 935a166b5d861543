"""Drafts by a model: a small one, or a head over the target's hidden states, with KV beside the target's own.

A *slot* is a position of the drafter's KV. What a head computes in slot i takes the target's feature of position i - 1
(see `tandem.engine.model.draft_head`), so slots of prompts are computed behind each of the target's passes, on prefill
workers too, and are cached and handed over with the target's KV. Slots of the output are made up for when the next
draft begins, in one pass with the last token. Where a feature is not at hand (behind a cached prefix or a hand-over,
behind steps that nobody drafted for) nothing stands in its place, and the draft is a little worse.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tandem.engine.attention.base import AttentionBackend, AttentionBatch, IntArray
from tandem.engine.kv_pool import KvPool
from tandem.engine.sequence import ROOT, Batch, Draft, Row, Seq
from tandem.engine.spec.draft_net import DraftNet
from tandem.engine.spec.draft_tree import GrowingTree
from tandem.obs import about

log = logging.getLogger(__name__)

CATCH_UP = 64
"""Slots of the output that are made up for at most when a draft begins; those before stay as they are."""


@dataclass(slots=True)
class _Track:
    """What is known of one sequence's slots."""

    valid: int
    """Slots `[0, valid)` are as good as they get."""
    features: deque[tuple[int, torch.Tensor]] = field(default_factory=deque)
    """Runs of the target's last positions, one behind another: where each begins, and its `[positions, features]`.

    They are for slots that are still to be computed.
    """
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    """By the start of rows that are not committed, what their step gave: `[tokens of the row, features]`."""

    def between(self, start: int, end: int, nothing: torch.Tensor) -> torch.Tensor:
        """Features of positions `[start, end)`. nothing: `[end - start, features]`, what stands where none is known."""
        parts, at = list[torch.Tensor](), start
        for first, run in self.features:
            known = range(max(at, first), min(first + len(run), end))
            if known:
                parts += [nothing[: known.start - at], run[known.start - first : known.stop - first]]
                at = known.stop
        return torch.cat((*parts, nothing[: end - at])) if parts else nothing

    def keep(self, start: int, fresh: torch.Tensor | None) -> None:
        """Takes in the features of positions from `start` on; those that no slot is waiting for are dropped."""
        if fresh is None or (self.features and self._end() != start):
            self.features.clear()
        if fresh is None:
            return
        start, fresh = start + max(len(fresh) - CATCH_UP, 0), fresh[-CATCH_UP:]
        if fresh.untyped_storage().nbytes() > CATCH_UP * fresh.nbytes or len(fresh) == CATCH_UP:
            fresh = fresh.clone()  # a view keeps its whole
        self.features.append((start, fresh))
        wanted = max(self.valid - 1, self._end() - CATCH_UP)
        while len(self.features) > 1 and self.features[1][0] <= wanted:
            self.features.popleft()

    def _end(self) -> int:
        first, run = self.features[-1]
        return first + len(run)


@dataclass(slots=True)
class _Slots:
    """Slots to be computed of some sequences, `counts[r]` from `starts[r]` on."""

    seqs: Sequence[Seq]
    starts: Sequence[int]
    counts: Sequence[int]
    tokens: torch.Tensor
    """`[slots]`"""
    features: torch.Tensor
    """`[slots, features]`: of the positions before them."""
    trees: Sequence[GrowingTree] = ()
    """Of each sequence, whose nodes that are taken further are its slots but the first."""
    kept: Sequence[int] | None = None
    """The slots whose states are wanted; None: each sequence's last."""


@dataclass(slots=True)
class _Growth:
    """One sequence's tree while it grows."""

    seq: Seq
    tree: GrowingTree
    last: torch.Tensor
    """`[features]`: what the sequence's last token was computed with."""
    states: dict[int, torch.Tensor]
    """`[hidden]` behind the root and behind each node that is taken further."""


class ModelDrafter:
    """A `Drafter` and `Observer`. Its KV lies in the last layer groups of the engine's pool."""

    free = False

    def __init__(
        self, net: DraftNet, pool: KvPool, attention: AttentionBackend, first_group: int, branches: int = 1
    ) -> None:
        """pool: of the drafter's own groups, which are those of a sequence from `first_group` on.

        branches: likeliest tokens that are drafted for a place; more than 1 make trees, which `attention` must serve.
        """
        self.branches = branches
        self.name = net.name
        self.layers = net.layers
        self._net = net
        self._pool = pool
        self._attention = attention
        self._groups = range(first_group, first_group + len(pool.layout.groups))
        self._tracks: dict[Seq, _Track] = {}

    @torch.inference_mode()
    def observe(self, batch: Batch, tokens: torch.Tensor, hidden: torch.Tensor | None) -> None:
        """See `Observer`. Computes the slots of prompts."""
        fused = self._net.fuse(hidden) if self.layers and hidden is not None else None
        rows, parts, features, end = list[Row](), list[torch.Tensor](), list[torch.Tensor](), 0
        for row in batch.rows:
            start, end = end, end + row.count
            track = self._tracks.setdefault(row.seq, _Track(row.start))
            if fused is not None:
                track.rows[row.start] = fused[start:end]
            if _in_prompt(row):
                rows.append(row)
                parts.append(tokens[start : start + row.own])
                inside = self._net.nothing(row.own - 1) if fused is None else fused[start : start + row.own - 1]
                features += [track.between(row.start - 1, row.start, self._net.nothing(1)), inside]
                track.valid = row.start + row.own
                track.keep(row.start, None if fused is None else fused[start : start + row.own])
        if rows:
            seqs, starts, counts = zip(*((row.seq, row.start, row.own) for row in rows), strict=True)
            self._compute(_Slots(seqs, starts, counts, torch.cat(parts), torch.cat(features)))

    def committed(self, row: Row, accepted: Sequence[int]) -> None:
        """See `Drafter`. Keeps the features of what is real now, for slots that are still to be computed."""
        track, end = self._tracks.setdefault(row.seq, _Track(row.start)), row.start + row.own
        found = track.rows.pop(row.start, None)
        if _in_prompt(row) and not accepted:
            return
        track.valid = min(track.valid, end + len(accepted))
        if found is not None and len(accepted) + row.own < len(found):
            nodes = [*range(row.own), *(row.own + node for node in accepted)]
            found = found[torch.tensor(nodes, device=found.device)]
        track.keep(row.start, found)

    @torch.inference_mode()
    def forget(self, seq: Seq) -> None:
        """See `Drafter`. Makes up for slots of whole pages, which the prefix cache may keep."""
        track = self._tracks.get(seq)
        whole = seq.computed // self._pool.page_size * self._pool.page_size
        try:
            if track is not None and track.valid < whole and self._first(seq) < whole:
                self._compute(self._made_up([seq], [whole]))
        except Exception:  # a worse draft one day is no reason to keep the pages of a sequence that ends
            log.exception("the last slots of %s were not computed", seq.seq_id, extra=about(seq.request_id))
        self._tracks.pop(seq, None)

    @torch.inference_mode()
    def propose(self, seqs: Sequence[Seq], limits: Sequence[int]) -> list[Draft]:
        """See `Drafter`. The likeliest tokens, as chains or trees."""
        made_up = self._made_up(seqs, [len(seq.tokens) for seq in seqs])
        states = self._compute(made_up)
        if self.branches > 1:
            return self._trees(made_up, limits, states)
        return self._chains(seqs, limits, states)

    def _chains(self, seqs: Sequence[Seq], limits: Sequence[int], states: torch.Tensor) -> list[Draft]:
        columns: list[tuple[list[int], torch.Tensor]] = []
        alive = [index for index, limit in enumerate(limits) if limit > 0]
        states = states[alive]
        while alive:
            chosen = self._net.token_ids(self._net.logits(states).argmax(-1))
            columns.append((alive, chosen))
            going = [place for place, index in enumerate(alive) if len(columns) < limits[index]]
            if len(going) < len(alive):
                where = torch.tensor(going, device=states.device, dtype=torch.int64)
                alive, states, chosen = [alive[place] for place in going], states[where], chosen[where]
            if alive:
                states = self._step([seqs[index] for index in alive], len(columns) - 1, chosen, states)
        chains: list[list[int]] = [[] for _ in seqs]
        for rows, tokens in columns:  # read only here: until then a GPU goes on by itself
            for index, token in zip(rows, tokens.tolist(), strict=True):
                chains[index].append(token)
        return [Draft(tuple(chain)) for chain in chains]

    def _trees(self, slots: _Slots, limits: Sequence[int], states: torch.Tensor) -> list[Draft]:
        """Level by level. The whole tree is computed at each: attention takes trees that end a row's new tokens."""
        lasts = slots.features[np.cumsum(slots.counts) - 1]
        rows = zip(slots.seqs, limits, lasts, states, strict=True)
        growing = [_Growth(seq, GrowingTree(limit, self.branches), last, {ROOT: s}) for seq, limit, last, s in rows]
        while alive := [each for each in growing if each.tree.level]:
            children = self._children(torch.stack([each.states[node] for each in alive for node in each.tree.level]))
            for each in alive:
                each.tree.extend([next(children) for _ in each.tree.level])
            alive = [each for each in alive if each.tree.level]
            found = iter(self._compute(self._tree_slots(alive)) if alive else ())
            for each in alive:
                each.states |= {node: next(found) for node in each.tree.level}
        return [each.tree.draft() for each in growing]

    def _children(self, states: torch.Tensor) -> Iterator[list[tuple[int, float]]]:
        """The likeliest tokens behind each state, with their log-probabilities."""
        best = self._net.logits(states).log_softmax(-1).topk(self.branches)
        pairs = zip(self._net.token_ids(best.indices).tolist(), best.values.tolist(), strict=True)
        return (list(zip(tokens, scores, strict=True)) for tokens, scores in pairs)

    def _tree_slots(self, growing: Sequence[_Growth]) -> _Slots:
        """Each sequence's last token, and behind it the nodes that are taken further."""
        starts, tokens, kept, features = list[int](), list[int](), list[int](), list[torch.Tensor]()
        for each in growing:
            tree, real = each.tree, each.seq.tokens
            starts.append(len(real) - 1)
            tokens += [real[-1], *(tree.tokens[node] for node in tree.taken)]
            # What a head makes of a token is the feature for the next; a draft model reads none.
            features += [each.last, *(each.states[tree.parents[node]][: len(each.last)] for node in tree.taken)]
            kept += range(len(tokens) - len(tree.level), len(tokens))
        trees = [each.tree for each in growing]
        counts = [1 + len(tree.taken) for tree in trees]
        ids = torch.tensor(tokens, device=self._pool.device)
        return _Slots([each.seq for each in growing], starts, counts, ids, torch.stack(features), trees, kept)

    def _made_up(self, seqs: Sequence[Seq], ends: Sequence[int]) -> _Slots:
        """The slots of real tokens before `ends` that are still to be computed, each sequence's last one at least."""
        starts, tokens, features = list[int](), list[int](), list[torch.Tensor]()
        for seq, end in zip(seqs, ends, strict=True):
            track = self._tracks.setdefault(seq, _Track(seq.computed))
            start = max(min(track.valid, end - 1), end - CATCH_UP, min(self._first(seq), end - 1))
            starts.append(start)
            tokens += seq.tokens[start:end]
            features.append(track.between(start - 1, end - 1, self._net.nothing(end - start)))
            track.valid = end
        counts = [end - start for end, start in zip(ends, starts, strict=True)]
        return _Slots(seqs, starts, counts, torch.tensor(tokens, device=self._pool.device), torch.cat(features))

    def _first(self, seq: Seq) -> int:
        """The first position whose slot sees nothing that layers with a window have given up."""
        first = 0
        for group, layers in zip(self._groups, self._pool.layout.groups, strict=True):
            if layers.window is None:
                continue
            gone = next((page for page in range(len(seq.pages[group]), 0, -1) if seq.pages[group][page - 1] < 0), 0)
            if gone:
                first = max(first, gone * self._pool.page_size + layers.window - 1)
        return first

    def _step(self, seqs: Sequence[Seq], depth: int, chosen: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Takes in one drafted token of each sequence, its `depth`-th: the states behind it."""
        for seq in seqs:
            if self._net.lasting:
                self._tracks[seq].valid += 1
        starts = [len(seq.tokens) + depth for seq in seqs]
        return self._compute(_Slots(seqs, starts, [1] * len(seqs), chosen, states))

    def _compute(self, slots: _Slots) -> torch.Tensor:
        """Writes the KV of slots; the states of those that are wanted, `[wanted, hidden]`."""
        starts, counts = np.array(slots.starts, dtype=np.int64), np.array(slots.counts, dtype=np.int64)
        ends = counts.cumsum()
        positions = np.arange(ends[-1]) - np.repeat(ends - counts - starts, counts)
        trees = dict[int, IntArray]()
        for row, tree in enumerate(slots.trees):
            positions[ends[row] - len(tree.taken) : ends[row]] = [starts[row] + tree.depth(node) for node in tree.taken]
            trees[row] = np.array(tree.lineage(), dtype=np.int64)
        plan = self._attention.plan(AttentionBatch(starts, counts, self._pages(slots.seqs, starts + counts), trees))
        kept = ends - 1 if slots.kept is None else np.array(slots.kept, dtype=np.int64)
        where = [torch.from_numpy(each).to(self._pool.device) for each in (positions, kept)]
        return self._net.forward(slots.tokens, where[0], slots.features, plan, where[1])

    def _pages(self, seqs: Sequence[Seq], ends: IntArray) -> list[list[IntArray]]:
        needed = (-(-ends // self._pool.page_size)).tolist()
        return [
            [np.array(seq.pages[group][:size], dtype=np.int64) for seq, size in zip(seqs, needed, strict=True)]
            for group in self._groups
        ]


def _in_prompt(row: Row) -> bool:
    """Whether a row's slots are computed at once: those of prompts, of what is recomputed, of forced text."""
    return row.own > 1 or row.start < row.seq.prompt_len
