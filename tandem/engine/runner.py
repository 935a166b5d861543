"""One step on the device: a batch's forward pass, and the tokens sampled from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import NamedTuple

import numpy as np
import torch

from tandem.device import upload
from tandem.engine.attention.base import AttentionBackend, AttentionBatch, AttentionPlan, IntArray
from tandem.engine.attention.torch_paged import TorchPagedAttention
from tandem.engine.grammar.masks import Allowed, MaskFiller
from tandem.engine.inputs import InputTokens
from tandem.engine.kernels.choose import Kernels
from tandem.engine.kv_pool import TORCH_DTYPES, KvPool
from tandem.engine.model.family import CausalLM
from tandem.engine.sampler import Drawn, Scores, sample
from tandem.engine.sequence import ROOT, Batch, Row, Sampled, Seq
from tandem.engine.spec.base import Observer
from tandem.engine.taps import HiddenTaps

LOGIT_ROWS = 64
"""Prompt positions whose logits are held at once: a vocabulary is large."""


class _Wanted(NamedTuple):
    """The tokens of a batch whose hidden states are looked at."""

    tokens: list[int]
    """Indices into the batch's tokens."""
    firsts: list[int]
    """Where each row's begin among them, and where the last row's end."""

    def sampled(self, batch: Batch) -> IntArray:
        """Which of them tokens are sampled behind, row by row."""
        ends = zip(batch.rows, self.firsts[1:], strict=True)
        return np.array([at for row, end in ends if row.samples for at in range(end - 1 - len(row.draft), end)])


def _wanted(batch: Batch) -> _Wanted:
    """Each sampling row's last own token and its draft, and all tokens of rows that score their prompt."""
    tokens, firsts, end = list[int](), [0], 0
    for row in batch.rows:
        end += row.count
        scored = row.seq.sampling.prompt_logprobs is not None
        first = row.count if scored else 1 + len(row.draft) if row.samples else 0
        tokens += range(end - first, end)
        firsts.append(len(tokens))
    return _Wanted(tokens, firsts)


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that the device was told to do; what it gives is looked at by `Runner.collect` alone."""

    batch: Batch
    sampling: list[int]
    """Indices of the rows that sample."""
    drawn: Drawn | None
    """Their tokens; None where no row samples."""
    prompts: dict[int, list[Scores]]
    """By index, of rows that score their prompt."""

    def places(self) -> dict[Seq, int]:
        """Where each sequence's token is among those that were drawn; a draft's stand behind it."""
        rows = [self.batch.rows[index] for index in self.sampling]
        ends = accumulate(1 + len(row.draft) for row in rows)
        return {row.seq: end - 1 - len(row.draft) for row, end in zip(rows, ends, strict=True)}


def _sample_rows(logits: torch.Tensor, rows: Sequence[Row], allowed: Allowed | None) -> Drawn:
    """A token for each row, and behind it one for each node of its draft."""
    if not any(row.draft.tokens for row in rows):
        return sample(logits, [row.seq for row in rows], allowed, [row.place for row in rows])
    nodes = [(row, node) for row in rows for node in range(ROOT, len(row.draft))]
    ahead = [row.draft.ahead(node) for row, node in nodes]
    return sample(logits, [row.seq for row, _ in nodes], allowed, ahead=ahead)


def _known(row: Row) -> Sequence[int]:
    """The input tokens of a row; a 0 stands in the place of a future one."""
    if row.future:
        return (0,)
    own = row.seq.tokens[row.start : row.start + row.own]
    return [*own, *row.draft.tokens] if row.draft.tokens else own


def _place_trees(rows: Sequence[Row], positions: IntArray, counts: IntArray) -> dict[int, IntArray]:
    """The lineages of rows whose drafts are trees, whose positions are made those of their depths."""
    trees = {index: row.draft for index, row in enumerate(rows) if row.draft.parents is not None}
    ends = counts.cumsum() if trees else counts
    for index, draft in trees.items():
        first = rows[index].start + rows[index].own - 1
        positions[ends[index] - len(draft) : ends[index]] = first + np.array(draft.depths())
    return {index: np.array(draft.lineage(), dtype=np.int64) for index, draft in trees.items()}


class Runner:
    """Runs batches. Used by the engine thread only; reads sequences and never changes them."""

    def __init__(
        self,
        model: CausalLM,
        pool: KvPool,
        vocab_size: int,
        device: torch.device,
        attention: AttentionBackend | None = None,
        kernels: Kernels | None = None,
        observer: Observer | None = None,
    ) -> None:
        """attention: over the pool; by default that of `kernels`, and without these, torch's. observer: reads along."""
        self.model = model
        self.pool = pool
        self.vocab_size = vocab_size
        self.device = device
        self._masks = MaskFiller(vocab_size)
        self._observer = observer
        if attention is None:
            attention = kernels.attention(pool) if kernels else TorchPagedAttention(pool)
        self.attention: AttentionBackend = attention
        dtype = TORCH_DTYPES[pool.layout.planes[0].dtype]
        self._taps = () if observer is None else observer.layers
        self._replay = kernels.replay(self._step, attention, dtype, self._taps) if kernels else None

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, taps: HiddenTaps
    ) -> torch.Tensor:
        return self.model.logits(self.model.forward(tokens, positions, plan, taps=taps if taps.layers else None))

    def run(self, batch: Batch) -> list[Sampled]:
        """Launches one step and waits for it."""
        return self.collect(self.launch(batch))

    @torch.inference_mode()
    def launch(self, batch: Batch, after: InFlight | None = None) -> InFlight:
        """Tells the device to compute every position of every row, to write its KV, and to sample where asked.

        after: the step in flight, whose tokens are the inputs of rows with a future token; they never leave the device.
        Nothing is waited for but the masks of grammars, which this processor fills.
        """
        sampling = [index for index, row in enumerate(batch.rows) if row.samples]
        rows = [batch.rows[index] for index in sampling]
        masks = self._masks.start([row.seq for row in rows], [row.draft for row in rows])
        inputs = self._inputs(batch, after)
        logits, drawn, prompts = self._replayed(batch, *inputs), None, dict[int, list[Scores]]()
        if logits is None:
            wanted = _wanted(batch)
            hidden = self._observed(batch, *inputs, wanted)
            logits = self._logits_of(hidden, wanted.sampled(batch)) if sampling else None
            for index, row in enumerate(batch.rows):
                if row.seq.sampling.prompt_logprobs is not None:
                    prompts[index] = self._prompt_scores(row, hidden[wanted.firsts[index] : wanted.firsts[index + 1]])
        if logits is not None:
            allowed = masks.result() if masks is not None else None
            drawn = _sample_rows(logits[:, : self.vocab_size], rows, allowed)
        return InFlight(batch, sampling, drawn, prompts)

    def collect(self, flight: InFlight) -> list[Sampled]:
        """Waits for a step; one result per row."""
        results = [Sampled(None)] * len(flight.batch.rows)
        if flight.drawn is not None:
            picked = iter(flight.drawn.read())
            for index in flight.sampling:
                token, logprob = next(picked)
                nodes = tuple(islice(picked, len(flight.batch.rows[index].draft)))
                results[index] = Sampled(token, logprob, nodes=nodes)
        for index, parts in flight.prompts.items():
            found = tuple(score for part in parts for score in part.read())
            results[index] = replace(results[index], prompt_logprobs=found)
        return results

    def forward(self, batch: Batch) -> torch.Tensor:
        """The forward pass alone: `[tokens, hidden]` of all rows, one after another."""
        return self._hidden(*self._inputs(batch))

    def _inputs(self, batch: Batch, after: InFlight | None = None) -> tuple[InputTokens, IntArray, AttentionPlan]:
        """Tokens, their positions, and where their KV is."""
        rows, page = batch.rows, self.pool.page_size
        starts = np.array([row.start for row in rows], dtype=np.int64)
        counts = np.array([row.count for row in rows], dtype=np.int64)
        known = [token for row in rows for token in _known(row)]
        needed = (-(-(starts + counts) // page)).tolist()
        pages = [
            [np.array(row.seq.pages[group][:size], dtype=np.int64) for row, size in zip(rows, needed, strict=True)]
            for group in range(len(self.pool.layout.groups))
        ]
        before = np.cumsum(counts) - counts
        positions = np.arange(len(known)) - np.repeat(before - starts, counts)
        trees = _place_trees(rows, positions, counts)
        plan = self.attention.plan(AttentionBatch(starts, counts, pages, trees))
        if after is None or after.drawn is None:
            return InputTokens(known), positions, plan
        sampled = after.places()
        moves = [(sampled[row.seq], at) for row, at in zip(rows, before.tolist(), strict=True) if row.future]
        return InputTokens(known, after.drawn.tokens, moves), positions, plan

    def _observed(
        self, batch: Batch, tokens: InputTokens, positions: IntArray, plan: AttentionPlan, wanted: _Wanted
    ) -> torch.Tensor:
        """As `_hidden`; the observer gets what it reads."""
        taps = HiddenTaps(self._taps) if self._taps else None
        hidden = self._hidden(tokens, positions, plan, wanted, taps)
        self._observe(batch, tokens, taps)
        return hidden

    def _observe(self, batch: Batch, tokens: InputTokens, taps: HiddenTaps | None) -> None:
        if self._observer is not None:
            self._observer.observe(batch, tokens.on(self.device), None if taps is None else taps.joined())

    def _hidden(
        self,
        tokens: InputTokens,
        positions: IntArray,
        plan: AttentionPlan,
        wanted: _Wanted | None = None,
        taps: HiddenTaps | None = None,
    ) -> torch.Tensor:
        keep = None
        if wanted is not None and len(wanted.tokens) < len(tokens):
            keep = upload(torch.tensor(wanted.tokens, dtype=torch.int64), self.device)
        ids = tokens.on(self.device)
        return self.model.forward(ids, upload(torch.from_numpy(positions), self.device), plan, keep, taps)

    def _logits_of(self, hidden: torch.Tensor, rows: IntArray) -> torch.Tensor:
        return self.model.logits(hidden.index_select(0, upload(torch.from_numpy(rows), self.device)))

    def _replayed(
        self, batch: Batch, tokens: InputTokens, positions: IntArray, plan: AttentionPlan
    ) -> torch.Tensor | None:
        """The logits of a step that can be replayed: a token is sampled behind each of its tokens."""
        replay, rows = self._replay, batch.rows
        if replay is None or (len(tokens) != len(rows) and not replay.drafts):
            return None
        if not all(row.samples and row.own == 1 and row.seq.sampling.prompt_logprobs is None for row in rows):
            return None
        step = replay.run(tokens, positions, plan)
        if step is None:
            return None
        self._observe(batch, tokens, step.taps if self._taps else None)
        return step.logits

    def _prompt_scores(self, row: Row, hidden: torch.Tensor) -> list[Scores]:
        """Of prompt tokens `start + 1 .. start + count`: the logits at a position are those of the token behind it."""
        seq, alternatives = row.seq, row.seq.sampling.prompt_logprobs or 0
        targets = seq.tokens[row.start + 1 : min(row.start + row.count + 1, seq.prompt_len)]
        found: list[Scores] = []
        for first in range(0, len(targets), LOGIT_ROWS):
            part = targets[first : first + LOGIT_ROWS]
            logits = self.model.logits(hidden[first : first + len(part)])[:, : self.vocab_size]
            found.append(Scores(logits, upload(torch.tensor(part), self.device), [alternatives] * len(part)))
        return found
