"""From logits to tokens, for a whole batch at once, without a look at what lies on the device.

Order: repetition, frequency and presence penalties, bias, the mask of `min_tokens` or that of a grammar; then, unless
greedy, temperature, top-k, top-p (of what top-k left) and min-p; then one Philox uniform through the inverse of the
cumulative distribution, whose order is that of the token ids. Log-probabilities are those of the model's own
distribution, before all of this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from tandem.device import HostCopy, upload
from tandem.engine.grammar.masks import Allowed
from tandem.engine.philox import uniform, uniforms
from tandem.engine.sequence import Picked, Seq
from tandem.types import TokenIds, TokenLogprob

TOP_CANDIDATES = 1024
"""Top-p looks at so many of the likeliest tokens first."""
WIDENING = 16
"""Rows whose mass reaches further are looked at again with so many times as many."""
FEW_DRAWS = 16
"""Up to so many numbers are drawn one at a time, which is faster then."""
TINIEST = torch.finfo(torch.float32).tiny
"""Least divisor: smaller ones may be 0 in float32, and 0 / 0 is no number."""
LARGEST = torch.finfo(torch.float32).max


class Filters(NamedTuple):
    """What is kept of each row's distribution; tensors `[rows]`, neutral values where a filter is off."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    """int64; the vocabulary's size keeps all"""
    top_p: torch.Tensor
    """float64"""
    min_p: torch.Tensor
    best: int
    """So many of a row's likeliest tokens are looked at first; 0: of no row."""
    nucleus: bool
    """Whether these may be too few: some row is cut by top-p alone."""
    floored: bool
    """Whether some row is cut by min-p."""


class Scores:
    """Log-probabilities on their way to the host: of each row's token and of its likeliest alternatives."""

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int]) -> None:
        """logits: `[rows, vocabulary]`. tokens: `[rows]`. counts: alternatives of each row."""
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        own = (logits.gather(1, tokens[:, None]) - normaliser)[:, 0]
        best = logits.topk(min(max(counts), logits.shape[1]), dim=-1)
        self._counts = counts
        self._copy = HostCopy(tokens, own, best.indices, best.values - normaliser)

    def read(self) -> list[TokenLogprob]:
        """Each row's token with its log-probability and alternatives, best first. Waits for the device."""
        tokens, own, ids, values = (part.tolist() for part in self._copy.wait())
        return [
            TokenLogprob(token, own[row], tuple(zip(ids[row][:count], values[row][:count], strict=True)))
            for row, (token, count) in enumerate(zip(tokens, self._counts, strict=True))
        ]


class Drawn:
    """The tokens of one batch, on the device and on their way to the host."""

    def __init__(self, tokens: torch.Tensor, largest: torch.Tensor, scores: Scores | None, scored: list[int]) -> None:
        """largest: each row's largest logit. scored: the rows that `scores` are of."""
        self.tokens = tokens
        """`[rows]`, int64, on the device. Some token of the vocabulary even where a row yields none."""
        self._copy = HostCopy(tokens, largest)
        self._scores = scores
        self._scored = scored

    def read(self) -> list[Picked]:
        """One entry for each row. Waits for the device."""
        tokens, largest = (part.tolist() for part in self._copy.wait())
        picked: list[Picked] = [(token, None) for token in tokens]
        if self._scores is not None:
            for row, score in zip(self._scored, self._scores.read(), strict=True):
                picked[row] = (tokens[row], score)
        for row, value in enumerate(largest):
            if not math.isfinite(value):
                picked[row] = (None, None)
        return picked


def sample(
    logits: torch.Tensor,
    seqs: Sequence[Seq],
    allowed: Allowed | None = None,
    places: Sequence[int] | None = None,
    ahead: Sequence[TokenIds] = (),
) -> Drawn:
    """The next token of each sequence; one may occur several times, with different drafted tokens ahead.

    allowed: what grammars leave of some rows. A row of which nothing is left yields no token either.
    logits: `[len(seqs), vocabulary]`, float32; not changed. A row that holds a NaN or an infinity yields no token: that
    sequence cannot go on, and the others must not notice.
    places: where each token will stand in its sequence's output; by default behind what that has now, and `ahead`.
    ahead: for each row the tokens that would follow its sequence's own before it; for none at all by default.
    """
    ahead = ahead or [()] * len(seqs)
    if places is None:
        places = [seq.output_len + len(drafted) for seq, drafted in zip(seqs, ahead, strict=True)]
    adjusted = logits
    if any(_adjusts(*each) for each in zip(seqs, places, strict=True)):
        adjusted = logits.clone()
        _penalise(adjusted, seqs, ahead)
        _bias(adjusted, seqs, places)
    if allowed is not None:
        adjusted = allowed.applied(adjusted)
    # A NaN is larger than any number here, so the largest logit tells for its whole row.
    largest, tokens = adjusted.max(dim=-1)
    drawing = [row for row, seq in enumerate(seqs) if not seq.sampling.greedy]
    if drawing:
        chosen, noise = [seqs[row] for row in drawing], _noise([(seqs[row], places[row]) for row in drawing])
        filters, noise = _filters(chosen, logits), upload(noise, logits.device)
        if len(drawing) == len(seqs):
            tokens = draw(adjusted, filters, noise)
        else:
            rows = _on(logits.device, drawing)
            tokens[rows] = draw(adjusted[rows], filters, noise)
    scored = [row for row, seq in enumerate(seqs) if seq.sampling.logprobs is not None]
    return Drawn(tokens, largest, _scores(logits, tokens, seqs, scored), scored)


def draw(logits: torch.Tensor, filters: Filters, noise: torch.Tensor) -> torch.Tensor:
    """One token per row `[rows]` by inverse CDF; `noise` `[rows]` is float64 in [0, 1)."""
    # The best logit is 0 before the division, so that however small a temperature is, nothing overflows into a NaN.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(filters.temperature[:, None])
    weights = scaled.exp()
    floor = _floor(scaled, filters)
    if floor is not None:
        weights.masked_fill_(scaled < floor[:, None], 0.0)
    cumulative = weights.double().cumsum_(dim=-1)
    # Noise of at most 1 - 2^-53 keeps the product below the total. `right` passes over tokens of no weight.
    target = noise * cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return drawn.clamp_(max=logits.shape[1] - 1)  # behind all tokens where a row's logits are no numbers


def _floor(scaled: torch.Tensor, filters: Filters) -> torch.Tensor | None:
    """Least logit each row keeps, or None when all keep everything. Tokens equal to the last one kept are kept too.

    scaled: each row's largest is 0.
    """
    vocab, size, floor = scaled.shape[1], filters.best, None
    if size:
        floor, settled = _floor_of_best(scaled.topk(size, dim=-1).values, scaled, filters)
        while filters.nucleus and size < vocab and not bool(settled.all()):
            size = min(vocab, size * WIDENING)
            rows = torch.nonzero(~settled)[:, 0]
            part, kept = scaled[rows], filters._replace(top_k=filters.top_k[rows], top_p=filters.top_p[rows])
            floor[rows], settled[rows] = _floor_of_best(part.topk(size, dim=-1).values, part, kept)
    if filters.floored:
        least = filters.min_p.log()
        floor = least if floor is None else torch.maximum(floor, least)
    return floor


def _floor_of_best(best: torch.Tensor, scaled: torch.Tensor, filters: Filters) -> tuple[torch.Tensor, torch.Tensor]:
    """The floor by top-k and top-p from each row's likeliest logits `[rows, n]`, and whether n were enough for it."""
    size, vocab = best.shape[1], scaled.shape[1]
    by_k = filters.top_k < vocab
    behind = torch.arange(size, device=best.device) >= filters.top_k[:, None]
    best = best.masked_fill(behind, -torch.inf)
    normaliser = torch.where(by_k, best.logsumexp(dim=-1), scaled.logsumexp(dim=-1))
    mass = (best - normaliser[:, None]).double().exp()
    before = mass.cumsum(dim=-1) - mass
    kept = ((before < filters.top_p[:, None]) & ~behind).sum(dim=-1).clamp_(min=1)
    floor = best.gather(1, kept[:, None] - 1)[:, 0]
    everything = ~by_k & (filters.top_p >= 1.0)
    settled = by_k | everything | (kept < size) | (size == vocab)
    return floor.masked_fill(everything, -torch.inf), settled


def _filters(seqs: Sequence[Seq], logits: torch.Tensor) -> Filters:
    vocab, device = logits.shape[1], logits.device
    params = [seq.sampling for seq in seqs]
    top_k = [min(p.top_k or vocab, vocab) for p in params]
    nucleus = any(p.top_p < 1.0 and k == vocab for p, k in zip(params, top_k, strict=True))
    # To see whether a nucleus is wider than the first candidates would be to wait for a GPU, which sorts them all.
    candidates = (TOP_CANDIDATES if device.type == "cpu" else vocab) if nucleus else 0
    return Filters(
        temperature=_on(device, [max(p.temperature, TINIEST) for p in params]),
        top_k=_on(device, top_k),
        top_p=_on(device, [p.top_p for p in params], torch.float64),
        min_p=_on(device, [p.min_p for p in params]),
        best=min(vocab, max(candidates, *(k for k in top_k if k < vocab), 0)),
        nucleus=nucleus,
        floored=any(p.min_p > 0.0 for p in params),
    )


def _on(device: torch.device, values: Sequence[float], dtype: torch.dtype | None = None) -> torch.Tensor:
    return upload(torch.tensor(values, dtype=dtype), device)


def _noise(seqs: Sequence[tuple[Seq, int]]) -> torch.Tensor:
    """One uniform per sequence, keyed by its seed, the token's place in the output, and its choice."""
    draws = [(seq.sampling.seed, place, seq.choice) for seq, place in seqs]
    if len(draws) <= FEW_DRAWS:
        return torch.tensor([uniform(*each) for each in draws], dtype=torch.float64)
    words = np.array(draws, dtype=np.uint64)
    return torch.from_numpy(uniforms(words[:, 0], words[:, 1], words[:, 2]))


def _adjusts(seq: Seq, place: int) -> bool:
    params = seq.sampling
    return bool(params.logit_bias) or params.penalised or place < params.min_tokens


def _penalise(logits: torch.Tensor, seqs: Sequence[Seq], ahead: Sequence[TokenIds]) -> None:
    """Repetition (CTRL: Keskar et al. 2019, arXiv:1909.05858), then OpenAI's frequency and presence; in place."""
    for row, (seq, drafted) in enumerate(zip(seqs, ahead, strict=True)):
        params = seq.sampling
        if not params.penalised:
            continue
        before = np.array([*seq.tokens, *drafted], dtype=np.int64)
        if params.repetition_penalty != 1.0:
            seen = torch.from_numpy(np.unique(before)).to(logits.device)
            old, penalty = logits[row, seen], max(params.repetition_penalty, TINIEST)
            # At a penalty near 0 a quotient may be infinite, and two of them have no difference.
            logits[row, seen] = torch.where(old > 0, old / penalty, old * penalty).clamp_(max=LARGEST)
        output, counts = np.unique(before[seq.prompt_len :], return_counts=True)
        ids = torch.from_numpy(output).to(logits.device)
        logits[row, ids] -= torch.from_numpy(counts * params.frequency_penalty + params.presence_penalty).to(logits)


def _bias(logits: torch.Tensor, seqs: Sequence[Seq], places: Sequence[int]) -> None:
    """Adds the biases, then hides the ids that would end a sequence before its `min_tokens`; in place.

    Ids outside the vocabulary can never be sampled, so that there is nothing to do for them.
    """
    vocab = range(logits.shape[1])
    biases = [
        (row, token, bias) for row, seq in enumerate(seqs) for token, bias in seq.sampling.logit_bias if token in vocab
    ]
    if biases:
        rows, tokens, values = zip(*biases, strict=True)
        where = (_on(logits.device, rows), _on(logits.device, tokens))
        logits.index_put_(where, _on(logits.device, values, logits.dtype), accumulate=True)
    early = [row for row, seq in enumerate(seqs) if places[row] < seq.sampling.min_tokens and not _bound(seq)]
    ends = [(row, token) for row in early for token in seqs[row].eos_ids if token in vocab]
    if ends:
        rows, tokens = zip(*ends, strict=True)
        least = logits.new_full((len(ends),), -torch.inf)
        logits.index_put_((_on(logits.device, rows), _on(logits.device, tokens)), least)


def _bound(seq: Seq) -> bool:
    return seq.constraint is not None and seq.constraint.active


def _scores(logits: torch.Tensor, tokens: torch.Tensor, seqs: Sequence[Seq], asked: list[int]) -> Scores | None:
    if not asked:
        return None
    if len(asked) < len(seqs):
        rows = _on(logits.device, asked)
        logits, tokens = logits[rows], tokens[rows]
    return Scores(logits, tokens, [seqs[row].sampling.logprobs or 0 for row in asked])
