"""Decode steps as CUDA graphs: what a forward pass launches is captured once for a size and launched again by one call.

A step of many small kernels is bound by the time that Python and the driver take to launch them (Gray 2019, "Getting
started with CUDA graphs"). A graph's sizes and addresses are fixed: a batch is padded to the next size of a list, and
its tokens, positions and pages lie in memory that does not move. Padded rows touch nothing that is not theirs.

Not measured: checked with a stand-in for the capture on a CPU; no GPU has run it yet.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from tandem.device import upload
from tandem.engine.attention.base import AttentionPlan, IntArray
from tandem.engine.attention.triton_fixed import DoesNotFit, FixedDecodePlan
from tandem.engine.attention.triton_paged import TritonPagedAttention, TritonPagedPlan
from tandem.engine.inputs import InputTokens
from tandem.engine.kernels.replay import Forward, Replayed
from tandem.engine.taps import HiddenTaps

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sizes that are captured, beside the largest there can be."""
MOST_GRAPHS = 64
MIB = 1 << 20


class Capture(Protocol):
    """Captures what a device is told to do. One for all graphs of a model: they share memory."""

    def capture(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Runs the function until it has settled, then captures it. Gives what does it again, and where its result is.

        The function's inputs must lie where they will be found each time. Raises RuntimeError when that is impossible.
        """

    @property
    def memory_bytes(self) -> int:
        """What all graphs hold."""


@dataclass(frozen=True, slots=True)
class _Graph:
    launch: Callable[[], None]
    logits: torch.Tensor
    taps: HiddenTaps


def captured_rows(most: int) -> tuple[int, ...]:
    """The sizes for batches of up to `most` rows."""
    return (*(size for size in ROWS if size < most), most)


class GraphReplay:
    """See `kernels.replay.Replay`, whose place this takes on a GPU. Used by the engine thread only."""

    drafts = False
    """Whether a row may have several tokens: its own and a draft's."""

    def __init__(
        self,
        forward: Forward,
        attention: TritonPagedAttention,
        capture: Capture,
        most_rows: int,
        layers: tuple[int, ...] = (),
    ) -> None:
        """Captures every size up to `most_rows` for short contexts; sizes for longer ones when they are first met.

        layers: those whose hidden states are read along.
        """
        self.sizes = captured_rows(most_rows)
        device = attention.pool.device
        self._forward = forward
        self._capture = capture
        self._layers = layers
        self._plan = FixedDecodePlan(attention, self.sizes[-1])
        self._tokens = torch.zeros(self.sizes[-1], dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._graphs: dict[tuple[int, tuple[int, ...]], _Graph] = {}
        self._working = True
        # The largest first: the others then fit into its memory.
        for rows in reversed(self.sizes):
            self._graph(rows, self._plan.load(None, rows))

    def run(self, tokens: InputTokens, positions: IntArray, plan: AttentionPlan) -> Replayed | None:
        """A step that `plan` was made for. None when it has to be computed in the usual way."""
        count = len(tokens)
        if not self._working or count > self.sizes[-1] or not isinstance(plan, TritonPagedPlan):
            return None
        rows = self.sizes[bisect_left(self.sizes, count)]
        try:
            graph = self._graph(rows, self._plan.load(plan, rows))
        except DoesNotFit:
            return None
        if graph is None:
            return None
        # What is behind the batch's own rows stays from earlier steps: real tokens, and nobody looks at what they give.
        self._tokens[:count].copy_(tokens.on(self._tokens.device))
        self._positions[:count].copy_(upload(torch.from_numpy(positions), self._tokens.device))
        graph.launch()
        states = {layer: state[:count] for layer, state in graph.taps.states.items()}
        return Replayed(graph.logits[:count], HiddenTaps(self._layers, states))

    @torch.inference_mode()
    def _graph(self, rows: int, parts: tuple[int, ...]) -> _Graph | None:
        """The graph of a size, captured now if need be; None when there is none and there will be none."""
        graph = self._graphs.get((rows, parts))
        if graph is not None or not self._working or len(self._graphs) >= MOST_GRAPHS:
            return graph
        started, tokens, positions = time.monotonic(), self._tokens[:rows], self._positions[:rows]
        taps = HiddenTaps(self._layers)
        try:
            # It runs several times; what the taps have at last is what the captured run wrote.
            launch, logits = self._capture.capture(lambda: self._forward(tokens, positions, self._plan, taps))
        except RuntimeError as error:
            log.warning("decode steps are not captured: a graph of %d rows failed: %s", rows, error)
            self._working = False
            return None
        graph = self._graphs[rows, parts] = _Graph(launch, logits, taps)
        text = "CUDA graph %d: %d rows, %s parts of context, %.1f s; all hold %.1f MiB"
        shown, seconds = "+".join(map(str, parts)), time.monotonic() - started
        log.info(text, len(self._graphs), rows, shown, seconds, self._capture.memory_bytes / MIB)
        return graph
