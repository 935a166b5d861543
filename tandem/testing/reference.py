"""What `transformers` would have answered in float32, and whether a greedy answer agrees with it.

The reference is teacher-forced: it reads the prompt and the answer's own tokens in one forward pass, and each step is
judged by what the reference says after the same tokens. So a near tie that went the other way voids no later step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tandem.types import TokenLogprob

MARGIN = 1e-3
"""Between the reference's two best logits; at a smaller one either token is right."""
TOLERANCE = 1e-3
"""Of log-probabilities, absolute."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an answer compares. Steps are output indices."""

    flips: tuple[int, ...]
    """Steps whose token is not the reference's best, though that one leads by more than `MARGIN`."""
    near_ties: int
    """Steps at which the reference leads by `MARGIN` or less: nothing is asked of their tokens."""
    worst_logprob: float
    """Largest difference of a reported log-probability, of a token or of an alternative, from the reference's."""

    @property
    def agrees(self) -> bool:
        """Whether no token is wrong and every log-probability is within `TOLERANCE`."""
        return not self.flips and self.worst_logprob <= TOLERANCE


class Reference:
    """A `transformers` model, to be in float32 on the CPU. Remembers what it computed."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    @classmethod
    def load(cls, path: Path) -> Reference:
        """That of a checkpoint."""
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """`[len(tokens), vocabulary]`, float32: what the model says after each token."""
        key = tuple(tokens)
        if key not in self._known:
            with torch.inference_mode():
                self._known[key] = self._model(torch.tensor([key])).logits[0].float()
        return self._known[key]

    def judge(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob] | None = None,
        allowed: torch.Tensor | None = None,
    ) -> Verdict:
        """Compares a greedy answer, and its log-probabilities where it has them (one for each token).

        allowed: `[len(tokens), vocabulary]`, bool: the tokens among which each was chosen. Raises ValueError when there
        is no token, or not one log-probability for each.
        """
        if not tokens or (logprobs is not None and len(logprobs) != len(tokens)):
            raise ValueError(f"{len(tokens)} tokens and {len(logprobs or ())} log-probabilities")
        logits = self.logits((*prompt, *tokens[:-1]))[len(prompt) - 1 :]
        best = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).topk(2)
        margins = (best.values[:, 0] - best.values[:, 1]).tolist()
        leaders = best.indices[:, 0].tolist()
        flips = tuple(step for step, token in enumerate(tokens) if margins[step] > MARGIN and token != leaders[step])
        return Verdict(
            flips=flips,
            near_ties=sum(margin <= MARGIN for margin in margins),
            worst_logprob=_worst(logits.log_softmax(-1), tokens, logprobs or ()),
        )

    def judge_prompt(self, prompt: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> float:
        """Largest difference of the prompt's reported log-probabilities; the first token has none.

        Raises ValueError when they do not name the prompt's tokens.
        """
        reported = [entry for entry in logprobs[1:] if entry is not None]
        if logprobs[0] is not None or len(reported) != len(prompt) - 1:
            raise ValueError(f"{len(reported)} log-probabilities for a prompt of {len(prompt)} tokens")
        return _worst(self.logits(prompt)[:-1].log_softmax(-1), prompt[1:], reported)


def _worst(expected: torch.Tensor, tokens: Sequence[int], reported: Sequence[TokenLogprob]) -> float:
    """The largest error against `expected[step]`, `[vocabulary]`: of tokens, of alternatives by token and by rank."""
    worst = 0.0
    for row, token, entry in zip(expected, tokens, reported, strict=False):
        if entry.token != token:
            raise ValueError(f"log-probability of token {entry.token} at token {token}")
        pairs = [(entry.logprob, row[token])]
        if entry.top:
            best = row.topk(len(entry.top)).values
            pairs += [(value, row[rival]) for rival, value in entry.top]
            pairs += [(value, best[rank]) for rank, (_, value) in enumerate(entry.top)]
        worst = max(worst, *(abs(value - float(want)) for value, want in pairs))
    return worst
