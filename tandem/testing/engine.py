"""A model and its KV memory in a few lines: every next token depends on all KV that is read through the page table.

A slot stores the token, its position and a chain over all tokens before, taken from the slot before. So a wrong page, a
missing copy or a stale slot changes the output, and equalities such as "cached == computed" are tested token for token,
without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.engine.sequence import Batch, Sampled, Seq
from tandem.kv import KvLayout, LayerGroup, Plane, Span
from tandem.types import SamplingParams, TokenLogprob

VOCAB = 50
_PRIME = 2_147_483_629
_EMPTY = -7
LAYOUT = KvLayout(planes=(Plane("fake", heads=1, head_dim=6, dtype="float32"),), groups=(LayerGroup((0,)),))
"""24 bytes a token: token, position and chain as three 64-bit numbers."""


class FakePool:
    """Pages of (token, position, chain), with the interface of KvPool."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.layout = LAYOUT
        self.num_pages = num_pages
        self.page_size = page_size
        self.slots: NDArray[np.int64] = np.full((num_pages * page_size, 3), _EMPTY, dtype=np.int64)
        self.copies: list[tuple[int, int, int]] = []
        """(source page, target page, tokens) of every copy."""

    def slots_of(self, pages: Sequence[int], start: int, end: int) -> NDArray[np.int64]:
        """Slot numbers of tokens [start, end) of the sequence that owns `pages`."""
        positions = np.arange(start, end)
        numbers: NDArray[np.int64] = np.asarray(pages, dtype=np.int64)
        return numbers[positions // self.page_size] * self.page_size + positions % self.page_size

    def gather(self, pages: Sequence[int], span: Span, out: Any) -> None:
        """Copies the KV of a span into `out`."""
        data = self.slots[self.slots_of(pages, span.start, span.end)].tobytes()
        target = memoryview(out).cast("B")
        if len(target) != len(data):
            raise ValueError(f"out has {len(target)} bytes; the span has {len(data)}")
        target[:] = data

    def scatter(self, pages: Sequence[int], span: Span, data: Any) -> None:
        """The inverse of `gather`."""
        values = np.frombuffer(bytes(memoryview(data).cast("B")), dtype=np.int64)
        if values.nbytes != self.layout.span_bytes(span.count):
            raise ValueError(f"data has {values.nbytes} bytes; the span has {self.layout.span_bytes(span.count)}")
        self.slots[self.slots_of(pages, span.start, span.end)] = values.reshape(-1, 3)

    def copy_tokens(self, source_page: int, target_page: int, count: int) -> None:
        """Copies the first `count` tokens of one page to another."""
        source, target = source_page * self.page_size, target_page * self.page_size
        self.slots[target : target + count] = self.slots[source : source + count]
        self.copies.append((source_page, target_page, count))


class FakeRunner:
    """Writes the KV of a batch and samples from nothing but the KV."""

    def __init__(self, pool: FakePool) -> None:
        self._pool = pool
        self.batches: list[tuple[tuple[str, int, int], ...]] = []
        """(seq_id, start, count) of every row of every batch."""

    def run(self, batch: Batch) -> list[Sampled]:
        """One entry for each row, in order."""
        self.batches.append(tuple((row.seq.seq_id, row.start, row.count) for row in batch.rows))
        return [self._row(row.seq, row.start, row.start + row.count, row.samples) for row in batch.rows]

    def _row(self, seq: Seq, start: int, end: int, samples: bool) -> Sampled:
        slots = self._pool.slots_of(seq.pages, 0, end)
        chain = int(self._pool.slots[slots[start - 1], 2]) if start else 1
        for position in range(start, end):
            chain = _chain(chain, seq.tokens[position])
            self._pool.slots[slots[position]] = (seq.tokens[position], position, chain)
        prompt = tuple(TokenLogprob(token, -1.0) for token in seq.tokens[start + 1 : end + 1])
        asked = seq.sampling.prompt_logprobs is not None
        token = _next(self._pool.slots[slots]) if samples else None
        wants = samples and seq.sampling.logprobs is not None and token is not None
        logprob = TokenLogprob(token, -0.5) if wants and token is not None else None
        return Sampled(token, logprob, prompt if asked else ())


def _chain(chain: int, token: int) -> int:
    return (chain * 1_000_003 + token + 1) % _PRIME


def _next(slots: NDArray[np.int64]) -> int:
    """A number below VOCAB from every entry of all slots, weighed by place."""
    weights = np.arange(1, len(slots) + 1)
    mixed = (slots[:, 0] * 31 + slots[:, 1] * 17 + slots[:, 2]) % _PRIME
    return int((mixed * weights % _PRIME).sum() % _PRIME % VOCAB)


def naive_continuation(
    prompt: Sequence[int], sampling: SamplingParams, eos_ids: frozenset[int] = frozenset()
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
        tokens.append(_next(np.asarray(rows, dtype=np.int64)))
        output = len(tokens) - len(prompt)
        if output >= sampling.max_tokens or (tokens[-1] in eos_ids and output > sampling.min_tokens):
            return tokens[len(prompt) :]


def make_seq(seq_id: str, prompt: Sequence[int], max_tokens: int = 8, prefill_only: bool = False, **fields: Any) -> Seq:
    """A greedy sequence with few words; `fields` are Seq's other ones."""
    fields.setdefault("sampling", SamplingParams(temperature=0.0, max_tokens=max_tokens))
    fields.setdefault("eos_ids", frozenset())
    fields.setdefault("root", b"root")
    return Seq(seq_id=seq_id, tokens=list(prompt), prompt_len=len(prompt), prefill_only=prefill_only, **fields)
