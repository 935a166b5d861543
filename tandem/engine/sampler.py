"""From logits to tokens, for a whole batch at once.

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

from tandem.engine.grammar.masks import Allowed
from tandem.engine.philox import uniform, uniforms
from tandem.engine.sequence import Seq
from tandem.types import SamplingParams, TokenLogprob

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


Picked = tuple[int | None, TokenLogprob | None]
"""A token and its log-probability where that was asked for; no token where the model gave no numbers."""


def sample(logits: torch.Tensor, seqs: Sequence[Seq], allowed: Allowed | None = None) -> list[Picked]:
    """The next token of each sequence.

    allowed: what grammars leave of some rows. A row of which nothing is left yields no token either.
    logits: `[len(seqs), vocabulary]`, float32; not changed. A row that holds a NaN or an infinity yields no token: that
    sequence cannot go on, and the others must not notice.
    """
    adjusted = logits
    if allowed is not None or any(_adjusts(seq) for seq in seqs):
        adjusted = logits.clone()
        _penalise(adjusted, seqs)
        _bias(adjusted, seqs)
        if allowed is not None:
            allowed.apply(adjusted)
    # A NaN is larger than any number here, so the largest logit tells for its whole row.
    largest, tokens = adjusted.max(dim=-1)
    lost = [row for row, value in enumerate(largest.tolist()) if not math.isfinite(value)]
    if lost:
        broken = ~largest.isfinite()[:, None]
        adjusted, logits = adjusted.masked_fill(broken, 0.0), logits.masked_fill(broken, 0.0)
    drawing = [row for row, seq in enumerate(seqs) if not seq.sampling.greedy]
    if drawing:
        rows = torch.tensor(drawing, device=logits.device)
        chosen = [seqs[row] for row in drawing]
        part = adjusted if len(drawing) == len(seqs) else adjusted[rows]
        tokens[rows] = draw(part, _filters(chosen, logits), _noise(chosen).to(logits.device))
    picked: list[Picked] = list(zip(tokens.tolist(), _output_logprobs(logits, tokens, seqs), strict=True))
    for row in lost:
        picked[row] = (None, None)
    return picked


def top_logprobs(logits: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int]) -> list[TokenLogprob]:
    """Each row's token with its log-probability and the row's `counts[row]` likeliest alternatives, best first."""
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    own: list[float] = (logits.gather(1, tokens[:, None]) - normaliser)[:, 0].tolist()
    most = min(max(counts), logits.shape[1])
    best = logits.topk(most, dim=-1)
    values, ids = (best.values - normaliser).tolist(), best.indices.tolist()
    return [
        TokenLogprob(token, own[row], tuple(zip(ids[row][: counts[row]], values[row][: counts[row]], strict=True)))
        for row, token in enumerate(tokens.tolist())
    ]


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
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _floor(scaled: torch.Tensor, filters: Filters) -> torch.Tensor | None:
    """Least logit each row keeps, or None when all keep everything. Tokens equal to the last one kept are kept too.

    scaled: each row's largest is 0.
    """
    vocab = scaled.shape[1]
    by_k = filters.top_k < vocab
    by_p_alone = (filters.top_p < 1.0) & ~by_k
    sizes = torch.where(by_k, filters.top_k, by_p_alone * TOP_CANDIDATES)
    size = min(vocab, int(sizes.max()))
    floor = None
    if size:
        floor, settled = _floor_of_best(scaled.topk(size, dim=-1).values, scaled, filters)
        while not bool(settled.all()):
            size = min(vocab, size * WIDENING)
            rows = torch.nonzero(~settled)[:, 0]
            part, kept = scaled[rows], Filters(*(values[rows] for values in filters))
            floor[rows], settled[rows] = _floor_of_best(part.topk(size, dim=-1).values, part, kept)
    if bool((filters.min_p > 0.0).any()):
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
    return Filters(
        temperature=torch.tensor([max(p.temperature, TINIEST) for p in params], device=device),
        top_k=torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=device),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
        min_p=torch.tensor([p.min_p for p in params], device=device),
    )


def _noise(seqs: Sequence[Seq]) -> torch.Tensor:
    """One uniform per sequence, keyed by its seed, the index of the output token, and its choice."""
    draws = [(seq.sampling.seed, seq.output_len, seq.choice) for seq in seqs]
    if len(draws) <= FEW_DRAWS:
        return torch.tensor([uniform(*each) for each in draws], dtype=torch.float64)
    words = np.array(draws, dtype=np.uint64)
    return torch.from_numpy(uniforms(words[:, 0], words[:, 1], words[:, 2]))


def _penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _adjusts(seq: Seq) -> bool:
    params = seq.sampling
    return bool(params.logit_bias) or _penalised(params) or seq.output_len < params.min_tokens


def _penalise(logits: torch.Tensor, seqs: Sequence[Seq]) -> None:
    """Repetition (CTRL: Keskar et al. 2019, arXiv:1909.05858), then OpenAI's frequency and presence; in place."""
    for row, seq in enumerate(seqs):
        params = seq.sampling
        if not _penalised(params):
            continue
        if params.repetition_penalty != 1.0:
            seen = torch.from_numpy(np.unique(np.array(seq.tokens, dtype=np.int64))).to(logits.device)
            old, penalty = logits[row, seen], max(params.repetition_penalty, TINIEST)
            # At a penalty near 0 a quotient may be infinite, and two of them have no difference.
            logits[row, seen] = torch.where(old > 0, old / penalty, old * penalty).clamp_(max=LARGEST)
        output, counts = np.unique(np.array(seq.tokens[seq.prompt_len :], dtype=np.int64), return_counts=True)
        ids = torch.from_numpy(output).to(logits.device)
        logits[row, ids] -= torch.from_numpy(counts * params.frequency_penalty + params.presence_penalty).to(logits)


def _bias(logits: torch.Tensor, seqs: Sequence[Seq]) -> None:
    """Adds the biases, then hides the ids that would end a sequence before its `min_tokens`; in place.

    Ids outside the vocabulary can never be sampled, so that there is nothing to do for them.
    """
    vocab = range(logits.shape[1])
    biases = [
        (row, token, bias) for row, seq in enumerate(seqs) for token, bias in seq.sampling.logit_bias if token in vocab
    ]
    if biases:
        rows, tokens, values = zip(*biases, strict=True)
        where = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
        logits.index_put_(where, torch.tensor(values, dtype=logits.dtype, device=logits.device), accumulate=True)
    early = [row for row, seq in enumerate(seqs) if seq.output_len < seq.sampling.min_tokens and not _bound(seq)]
    ends = [(row, token) for row in early for token in seqs[row].eos_ids if token in vocab]
    if ends:
        rows, tokens = zip(*ends, strict=True)
        logits[torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)] = -torch.inf


def _bound(seq: Seq) -> bool:
    return seq.constraint is not None and seq.constraint.active


def _output_logprobs(logits: torch.Tensor, tokens: torch.Tensor, seqs: Sequence[Seq]) -> list[TokenLogprob | None]:
    asked = {row: seq.sampling.logprobs for row, seq in enumerate(seqs) if seq.sampling.logprobs is not None}
    found: list[TokenLogprob | None] = [None] * len(seqs)
    if asked:
        rows = torch.tensor(list(asked), device=logits.device)
        for row, logprob in zip(asked, top_logprobs(logits[rows], tokens[rows], list(asked.values())), strict=True):
            found[row] = logprob
    return found
