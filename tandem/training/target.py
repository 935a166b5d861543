"""The target as a trainer reads it: hidden states and distributions of whole texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tandem.engine.attention.base import AttentionBatch
from tandem.engine.kv_pool import KvPool
from tandem.engine.model import LoadedModel
from tandem.engine.taps import HiddenTaps

PAGE = 16


class TargetReader:
    """Computes texts with the engine's own model and kernels, over KV that is forgotten at once."""

    def __init__(self, loaded: LoadedModel, layers: tuple[int, ...]) -> None:
        """layers: after which hidden states are read."""
        self.loaded = loaded
        self.layers = layers

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """`[texts, longest, layers * hidden]` after the layers, and `[texts, longest, hidden]` for `logits`.

        Float32 and the model's dtype; zeros behind the end of a text.
        """
        loaded, lengths = self.loaded, [len(text) for text in texts]
        counts = [-(-length // PAGE) for length in lengths]
        pool = KvPool(loaded.layout, sum(counts), PAGE, loaded.device)
        numbers = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
        batch = AttentionBatch(
            np.zeros(len(texts), dtype=np.int64), np.array(lengths), [numbers] * len(pool.group_pages)
        )
        tokens = torch.tensor([token for text in texts for token in text], device=loaded.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(loaded.device)
        taps = HiddenTaps(self.layers)
        last = loaded.module.forward(tokens, positions, loaded.kernels.attention(pool).plan(batch), None, taps)
        return self._padded(taps.joined().float(), lengths), self._padded(last, lengths)

    def _padded(self, flat: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden] -> [rows, vocabulary]`, float32."""
        return self.loaded.module.logits(states)
