"""Drafts by a model: a small one, or a head over the target's hidden states, with KV beside the target's own.

A *slot* is a position of the drafter's KV. What a head computes in slot i takes the target's feature of position i - 1
(see `tandem.engine.model.draft_head`), so slots of prompts are computed behind each of the target's passes, on prefill
workers too, and are cached and handed over with the target's KV. Slots of the output are made up for when the next
draft begins, in one pass with the last token. Where a feature is not at hand (behind a cached prefix or a hand-over,
behind steps that nobody drafted for) nothing stands in its place, and the draft is a little worse.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tandem.engine.attention.base import AttentionBackend, AttentionBatch, IntArray
from tandem.engine.kv_pool import KvPool
from tandem.engine.sequence import Batch, Draft, Row, Seq
from tandem.engine.spec.draft_net import DraftNet

log = logging.getLogger(__name__)

CATCH_UP = 64
"""Slots of the output that are made up for at most when a draft begins; those before stay as they are."""


@dataclass(slots=True)
class _Track:
    """What is known of one sequence's slots."""

    valid: int
    """Slots `[0, valid)` are as good as they get."""
    end: int = 0
    """Position behind the last of `features`."""
    features: torch.Tensor | None = None
    """`[positions, features]` of the target's last positions: for slots that are still to be computed."""
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    """By the start of rows that are not committed, what their step gave: `[tokens of the row, features]`."""

    def between(self, start: int, end: int, nothing: torch.Tensor) -> torch.Tensor:
        """Features of positions `[start, end)`. nothing: `[end - start, features]`, what stands where none is known."""
        if self.features is None:
            return nothing
        first = self.end - len(self.features)
        known = range(max(start, first), min(end, self.end))
        if not known:
            return nothing
        own = self.features[known.start - first : known.stop - first]
        return torch.cat((nothing[: known.start - start], own, nothing[known.stop - start :]))

    def keep(self, start: int, fresh: torch.Tensor | None) -> None:
        """Takes in the features of positions from `start` on; those that no slot is waiting for are dropped."""
        if fresh is None:
            self.features = None
            return
        stop = start + len(fresh)
        if self.features is not None and self.end == start:
            fresh = torch.cat((self.features, fresh))
        wanted = min(stop - self.valid + 1, CATCH_UP)
        self.features, self.end = fresh[len(fresh) - min(wanted, len(fresh)) :].clone(), stop  # a view keeps its whole


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


class ModelDrafter:
    """A `Drafter` and `Observer`. Its KV lies in the last layer groups of the engine's pool."""

    free = False

    def __init__(self, net: DraftNet, pool: KvPool, attention: AttentionBackend, first_group: int) -> None:
        """pool: of the drafter's own groups, which are those of a sequence from `first_group` on."""
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
            log.exception("the last slots of %s were not computed", seq.seq_id)
        self._tracks.pop(seq, None)

    @torch.inference_mode()
    def propose(self, seqs: Sequence[Seq], limits: Sequence[int]) -> list[Draft]:
        """See `Drafter`. Chains of the likeliest tokens."""
        states = self._compute(self._made_up(seqs, [len(seq.tokens) for seq in seqs]))
        columns: list[tuple[list[int], torch.Tensor]] = []
        alive = [index for index, limit in enumerate(limits) if limit > 0]
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
        """Writes the KV of slots; the states of each sequence's last one, `[sequences, hidden]`."""
        starts, counts = np.array(slots.starts, dtype=np.int64), np.array(slots.counts, dtype=np.int64)
        ends = counts.cumsum()
        positions = np.arange(ends[-1]) - np.repeat(ends - counts - starts, counts)
        plan = self._attention.plan(AttentionBatch(starts, counts, self._pages(slots.seqs, starts + counts)))
        where = [torch.from_numpy(each).to(self._pool.device) for each in (positions, ends - 1)]
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
