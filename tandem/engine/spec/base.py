"""What a drafter is: it guesses how sequences go on, and the target model checks the guesses in one pass.

Noise is Philox(seed, output index, choice), so a token depends on what stands before it and on nothing else. The target
therefore samples its own token behind every drafted one, with that position's noise, penalties and masks, and drafted
tokens are accepted as long as they are what was sampled: the output is, token for token, that of plain decoding. A
drafted token x is accepted with the target's probability p(x), just as rejection sampling accepts a draft that is
certain of it (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318). Drafters must not draw:
what they propose is what they hold likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from tandem.engine.sequence import Batch, Draft, Row, Seq

MOST_NODES = 63
"""Tokens of one draft: what a node sees of its draft are the bits of one word."""


class Drafter(Protocol):
    """Guesses continuations. Everything is called by the engine's thread."""

    name: str
    """For metrics."""
    free: bool
    """Whether proposing costs next to nothing: how long drafts may be is then decided once they are known, and no room
    is made before."""

    branches: int
    """Tokens at most that are drafted for one place; 1: all drafts are chains."""

    def propose(self, seqs: Sequence[Seq], limits: Sequence[int]) -> list[Draft]:
        """A draft for each sequence, of at most `limits` nodes; an empty one where nothing is likely.

        A sequence that decodes has one token, its last, that is not computed; after a grammar's forced text it has
        more. Its pages have room for `len(tokens) + limit` tokens, so that a drafter with KV in planes of its own may
        write behind `computed`. What lies there is not kept from step to step.
        """

    def committed(self, row: Row, accepted: Sequence[int]) -> None:
        """A row of the batch was taken in. accepted: the nodes of its draft that are real tokens now, a path.

        `row.seq` has its new tokens, and `computed` counts the accepted ones; of a tree, their KV was moved to the
        slots of their positions. Called for every row, prefill chunks included, before anything is proposed for it.
        """

    def forget(self, seq: Seq) -> None:
        """The sequence ends or loses its pages; its tokens and `computed` are still what they were."""


class Observer(Protocol):
    """A drafter that reads what the target computes: a head over its hidden states, or a model with KV of its own."""

    layers: tuple[int, ...]
    """The layers after which hidden states are wanted, by index; none: tokens alone."""

    def observe(self, batch: Batch, tokens: torch.Tensor, hidden: torch.Tensor | None) -> None:
        """Called after every forward pass of the target, before sampling, on prefill workers too.

        tokens: `[tokens]` of all rows, one after another, drafted ones included. hidden: `[tokens, len(layers) *
        hidden]`, the residual stream after each of `layers`, side by side; None without layers. A draft head with KV in
        planes of its own writes that of these positions here.
        """
