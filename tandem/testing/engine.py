"""A model and its KV memory in a few lines: every next token depends on all KV that is read through the page table.

A slot stores the token, its position and a chain over all tokens before, taken from the slot before. So a wrong page, a
missing copy or a stale slot changes the output, and equalities such as "cached == computed" are tested token for token,
without torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.engine.radix import Pages
from tandem.engine.sequence import ROOT, Batch, Picked, Row, Sampled, Seq
from tandem.kv import KvLayout, LayerGroup, Plane, Span
from tandem.types import SamplingParams, TokenLogprob

VOCAB = 50
_PRIME = 2_147_483_629
_EMPTY = -7
LAYOUT = KvLayout(planes=(Plane("fake", heads=1, head_dim=6, dtype="float32"),), groups=(LayerGroup((0,)),))
"""24 bytes a token: token, position and chain as three 64-bit numbers."""


def windowed_layout(*windows: int | None) -> KvLayout:
    """A layer group of one layer for each window."""
    return KvLayout(LAYOUT.planes, tuple(LayerGroup((layer,), window) for layer, window in enumerate(windows)))


class FakePool:
    """Pages of (token, position, chain) for each layer group, with the interface of KvPool."""

    def __init__(self, num_pages: int | Sequence[int], page_size: int, layout: KvLayout = LAYOUT) -> None:
        """num_pages: of each group, or one number for all. A group is one layer."""
        self.layout = layout
        self.group_pages = tuple([num_pages] * len(layout.groups) if isinstance(num_pages, int) else num_pages)
        self.page_size = page_size
        self.slots: list[NDArray[np.int64]] = [
            np.full((count * page_size, 3), _EMPTY, dtype=np.int64) for count in self.group_pages
        ]
        self.copies: list[tuple[int, int, int]] = []
        """(source page, target page, tokens) of every copy in the first group."""

    def slots_of(self, pages: Sequence[int], start: int, end: int) -> NDArray[np.int64]:
        """Slot numbers of tokens [start, end) of the sequence that owns `pages`, a group's."""
        positions = np.arange(start, end)
        numbers: NDArray[np.int64] = np.asarray(pages, dtype=np.int64)[positions // self.page_size]
        assert (numbers >= 0).all(), f"tokens {start}..{end} are read or written where there is no page"
        return numbers * self.page_size + positions % self.page_size

    def gather(self, pages: Pages, span: Span, total: int, out: Any) -> None:
        """Copies what moves of a span into `out`."""
        shares = self.layout.shares(span, total)
        parts = [
            slots[self.slots_of(run, share.start, share.end)]
            for slots, run, share in zip(self.slots, pages, shares, strict=True)
        ]
        data = np.concatenate(parts).tobytes()
        target = memoryview(out).cast("B")
        if len(target) != len(data):
            raise ValueError(f"out has {len(target)} bytes; the span has {len(data)}")
        target[:] = data

    def scatter(self, pages: Pages, span: Span, total: int, data: Any) -> None:
        """The inverse of `gather`."""
        values = np.frombuffer(bytes(memoryview(data).cast("B")), dtype=np.int64).reshape(-1, 3)
        expected = self.layout.span_bytes(span, total)
        if values.nbytes != expected:
            raise ValueError(f"data has {values.nbytes} bytes; the span has {expected}")
        at = 0
        for slots, run, share in zip(self.slots, pages, self.layout.shares(span, total), strict=True):
            slots[self.slots_of(run, share.start, share.end)] = values[at : at + share.count]
            at += share.count

    def move_tokens(self, pages: Pages, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies positions of a sequence to others of it, in all groups."""
        for slots, run in zip(self.slots, pages, strict=True):
            numbers = np.asarray(run, dtype=np.int64)
            before, after = (
                numbers[np.array(where) // self.page_size] * self.page_size + np.array(where) % self.page_size
                for where in (sources, targets)
            )
            slots[after] = slots[before]

    def digest(self, group: int, page: int) -> int:
        """Of a page's slots."""
        return zlib.crc32(self.slots[group][page * self.page_size : (page + 1) * self.page_size].tobytes())

    def copy_tokens(self, group: int, source_page: int, target_page: int, count: int) -> None:
        """Copies the first `count` tokens of one page of a group to another."""
        source, target, slots = source_page * self.page_size, target_page * self.page_size, self.slots[group]
        slots[target : target + count] = slots[source : source + count]
        if group == 0:
            self.copies.append((source_page, target_page, count))


@dataclass(frozen=True, slots=True, eq=False)
class FakeFlight:
    """A step whose results are not to be looked at yet."""

    batch: Batch
    sampled: list[Sampled]

    def token_of(self, seq: Seq) -> int:
        """What was sampled for a sequence; another token where nothing could be, as a device would have it."""
        (token,) = (each.token for row, each in zip(self.batch.rows, self.sampled, strict=True) if row.seq is seq)
        return 0 if token is None else token


class FakeRunner:
    """Writes the KV of a batch and samples from nothing but the KV.

    Every group's pages are read as far as the group's window reaches, and must hold the sequence's own tokens there.
    """

    def __init__(self, pool: FakePool) -> None:
        self._pool = pool
        self.batches: list[tuple[tuple[str, int, int], ...]] = []
        """(seq_id, start, count) of every row of every batch."""
        self._flying: list[FakeFlight] = []

    def launch(self, batch: Batch, after: FakeFlight | None = None) -> FakeFlight:
        """Computes the batch at once; only `collect` says what came of it."""
        assert self._flying == ([] if after is None else [after]), "steps are not launched in order"
        self.batches.append(tuple((row.seq.seq_id, row.start, row.count) for row in batch.rows))
        flight = FakeFlight(batch, [self._row(row, after) for row in batch.rows])
        self._flying.append(flight)
        return flight

    def collect(self, flight: FakeFlight) -> list[Sampled]:
        """One entry for each row, in order."""
        assert self._flying.pop(0) is flight, "steps are not collected in order"
        return flight.sampled

    def _row(self, row: Row, after: FakeFlight | None) -> Sampled:
        seq, start, end, samples = row.seq, row.start, row.start + row.own, row.samples
        tokens = list(seq.tokens)
        if row.future:
            assert after is not None
            tokens.append(after.token_of(seq))
        assert end <= len(tokens), f"{seq.seq_id}: {end} of {len(tokens)} tokens are to be computed"
        seen = [self._compute(seq, tokens, group, start, end) for group in range(len(self._pool.slots))]
        nodes = self._nodes(row, seen)
        prompt = tuple(TokenLogprob(token, -1.0) for token in tokens[start + 1 : end + 1])
        asked = seq.sampling.prompt_logprobs is not None
        token = _next(seen) if samples else None
        wants = samples and seq.sampling.logprobs is not None and token is not None
        logprob = TokenLogprob(token, -0.5) if wants and token is not None else None
        return Sampled(token, logprob, prompt if asked else (), nodes)

    def _nodes(self, row: Row, seen: Sequence[NDArray[np.int64]]) -> tuple[Picked, ...]:
        """Writes the KV of a draft and samples behind every node. seen: of each group, by the last own token."""
        behind = {ROOT: list(seen)}
        for node, (token, depth) in enumerate(zip(row.draft.tokens, row.draft.depths(), strict=True)):
            behind[node] = []
            for number, before in enumerate(behind[row.draft.parent(node)]):
                group, position = self._pool.layout.groups[number], row.start + row.own - 1 + depth
                chain = _chain(int(before[-1, 2]), token) if group.window != 1 else token
                slot = self._pool.slots_of(
                    row.seq.pages[number], row.start + row.own + node, row.start + row.own + node + 1
                )
                self._pool.slots[number][slot] = (token, position, chain)
                seen_here = np.concatenate([before, self._pool.slots[number][slot]])
                behind[node].append(seen_here[len(seen_here) - (position + 1 - group.seen_from(position)) :])
        wants = row.seq.sampling.logprobs is not None
        found = [_next(behind[node]) for node in range(len(row.draft))]
        return tuple((token, TokenLogprob(token, -0.5) if wants else None) for token in found)

    def _compute(self, seq: Seq, tokens: Sequence[int], number: int, start: int, end: int) -> NDArray[np.int64]:
        """Writes a group's KV of positions [start, end); what the last of them sees."""
        group, values = self._pool.layout.groups[number], self._pool.slots[number]
        first = group.seen_from(start)
        slots = self._pool.slots_of(seq.pages[number], first, end)
        known, expected = values[slots[: start - first]], np.arange(first, start)
        assert (known[:, 1] == expected).all(), f"{seq.seq_id}: group {number} has other positions than {first}.."
        assert known[:, 0].tolist() == tokens[first:start], f"{seq.seq_id}: group {number} has others' tokens"
        # A window of one token leaves no chain to go on with.
        chain = int(known[-1, 2]) if len(known) else 1
        for position in range(start, end):
            chain = _chain(chain, tokens[position]) if group.window != 1 else tokens[position]
            values[slots[position - first]] = (tokens[position], position, chain)
        return values[slots[group.seen_from(end - 1) - first :]]


def _chain(chain: int, token: int) -> int:
    return (chain * 1_000_003 + token + 1) % _PRIME


def _next(seen: Sequence[NDArray[np.int64]]) -> int:
    """A number below VOCAB from every entry of all slots that are seen, weighed by place."""
    total = 0
    for slots in seen:
        weights = np.arange(1, len(slots) + 1)
        mixed = (slots[:, 0] * 31 + slots[:, 1] * 17 + slots[:, 2]) % _PRIME
        total = total * 7 + int((mixed * weights % _PRIME).sum())
    return total % _PRIME % VOCAB


def naive_continuation(
    prompt: Sequence[int],
    sampling: SamplingParams,
    eos_ids: frozenset[int] = frozenset(),
    layout: KvLayout = LAYOUT,
) -> list[int]:
    """The output tokens without any cache, paging or batching: all KV is made anew for each token."""
    tokens = list(prompt)
    if sampling.max_tokens == 0:
        return []
    while True:
        chain, rows = 1, []
        for position, token in enumerate(tokens):
            chain = _chain(chain, token)
            rows.append((token, position, chain))
        entries = np.asarray(rows, dtype=np.int64)
        alone = np.stack([entries[:, 0], entries[:, 1], entries[:, 0]], axis=1)
        last = len(tokens) - 1
        groups = layout.groups
        tokens.append(_next([(alone if g.window == 1 else entries)[g.seen_from(last) :] for g in groups]))
        output = len(tokens) - len(prompt)
        if output >= sampling.max_tokens or (tokens[-1] in eos_ids and output > sampling.min_tokens):
            return tokens[len(prompt) :]


def make_seq(seq_id: str, prompt: Sequence[int], max_tokens: int = 8, prefill_only: bool = False, **fields: Any) -> Seq:
    """A greedy sequence with few words; `fields` are Seq's other ones."""
    fields.setdefault("sampling", SamplingParams(temperature=0.0, max_tokens=max_tokens))
    fields.setdefault("eos_ids", frozenset())
    fields.setdefault("root", b"root")
    return Seq(seq_id=seq_id, tokens=list(prompt), prompt_len=len(prompt), prefill_only=prefill_only, **fields)
