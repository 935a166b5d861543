"""Decode steps as recordings: every native call of a forward pass, made again by one call.

What CUDA graphs are to a GPU (Gray 2019, "Getting started with CUDA graphs"), against the same cost: a step of a small
model is some forty kernels of ten microseconds, and each costs Python as much again. A recording is made for a number
of tokens when that has been seen a few times, by running the model as it is. Memory is fixed then; what changes from
step to step, the tokens, positions and pages, lies where the recorded calls read it. The model knows nothing of this:
if it computes anything that is not a recorded kernel, which is watched for, or if the replay does not give the very
same logits, there is no recording, and steps go on as before.
"""

from __future__ import annotations

import ctypes
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.engine.attention.base import AttentionPlan, IntArray
from tandem.engine.inputs import InputTokens
from tandem.engine.kernels.native import NativeLibrary, Tape
from tandem.engine.taps import HiddenTaps

log = logging.getLogger(__name__)

ARENA_BYTES = 64 << 20
"""Results of one recorded step at most; memory is only taken as it is written."""
SEEN_BEFORE = 3
"""Steps of so many tokens before one is recorded."""
VIEWS = frozenset(
    {
        "aten.view", "aten._unsafe_view", "aten.slice", "aten.select", "aten.alias", "aten.detach", "aten.unsqueeze",
        "aten.transpose", "aten.t", "aten.permute", "aten.expand", "aten.as_strided", "aten.split",
        "aten.split_with_sizes",
    }
)  # fmt: skip
"""Operations that compute nothing, only other views of memory."""
PERHAPS_VIEWS = frozenset({"aten.reshape", "aten.contiguous", "aten.to", "aten.flatten"})
"""These give a view where they can, and else a copy."""

Forward = Callable[[torch.Tensor, torch.Tensor, AttentionPlan, HiddenTaps], torch.Tensor]
"""Tokens and positions `[tokens]`, and the plan, to logits `[tokens, vocabulary]`. Fills the taps."""


class Replayed(NamedTuple):
    """What a step gave; valid until the next one."""

    logits: torch.Tensor
    """`[tokens, vocabulary]` float32"""
    taps: HiddenTaps
    """The hidden states that are read along."""


class _Watch(TorchDispatchMode):
    """Notes the torch operations that a recording would miss."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.missed: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would load its whole compiler to skip it: a second and 150 MB, in the midst of serving."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See torch."""
        name = str(func).rpartition(".")[0]
        out = func(*args, **(kwargs or {}))
        if name not in VIEWS and not (name in PERHAPS_VIEWS and out.data_ptr() == args[0].data_ptr()):
            self.missed.add(str(func))
        return out


class _Recording:
    """The step of so many tokens."""

    def __init__(self, count: int, layers: tuple[int, ...], arena: torch.Tensor) -> None:
        self.tokens = torch.zeros(count, dtype=torch.int64)
        self.positions = torch.zeros(count, dtype=torch.int64)
        self.taps = HiddenTaps(layers)
        self._inputs: tuple[IntArray, IntArray] = (self.tokens.numpy(), self.positions.numpy())
        self.tape = Tape(arena)
        self.logits = torch.empty(0)
        self.calls = (ctypes.c_int64 * 0)()

    def load(self, tokens: InputTokens, positions: IntArray) -> None:
        """Takes in one step."""
        self._inputs[0][:], self._inputs[1][:] = tokens.known, positions
        tokens.fill(self.tokens)

    def close(self, logits: torch.Tensor) -> None:
        """Ends the recording whose result is `logits`."""
        words = [word for address, block in self.tape.calls for word in (address, ctypes.addressof(block))]
        self.logits, self.calls = logits, (ctypes.c_int64 * len(words))(*words)


class Replay:
    """Steps of few tokens, each of which one is sampled behind. Used by the engine thread only.

    How the tokens are spread over rows makes no difference: that is part of the plan, which recorded calls read anew.
    """

    drafts = True
    """Whether a row may have several tokens: its own and a draft's."""

    def __init__(self, forward: Forward, library: NativeLibrary, most_tokens: int, layers: tuple[int, ...]) -> None:
        """layers: those whose hidden states are read along."""
        self._forward = forward
        self._library = library
        self._most_tokens = most_tokens
        self._layers = layers
        self._seen: Counter[int] = Counter()
        self._recordings: dict[int, _Recording] = {}
        self._arena = torch.empty(0, dtype=torch.uint8)

    def run(self, tokens: InputTokens, positions: IntArray, plan: AttentionPlan) -> Replayed | None:
        """A step that `plan` was made for. None when it has to be computed in the usual way."""
        count = len(tokens)
        if count > self._most_tokens:
            return None
        recording = self._recordings.get(count)
        if recording is None:
            self._seen[count] += 1
            return self._record(tokens, positions, plan) if self._seen[count] > SEEN_BEFORE else None
        recording.load(tokens, positions)
        self._library.replay(recording.calls)
        return Replayed(recording.logits, recording.taps)

    def _record(self, tokens: InputTokens, positions: IntArray, plan: AttentionPlan) -> Replayed | None:
        if not self._arena.numel():
            self._arena = torch.empty(ARENA_BYTES, dtype=torch.uint8)
        recording = _Recording(len(tokens), self._layers, self._arena)
        recording.load(tokens, positions)
        watch = _Watch()
        try:
            with self._library.recording(recording.tape), watch:
                logits = self._forward(recording.tokens, recording.positions, plan, recording.taps)
        except MemoryError as error:
            self._give_up(len(tokens) - 1, str(error))
            return None
        if watch.missed:
            self._give_up(0, f"the model uses {', '.join(sorted(watch.missed))}")
            return None
        recording.close(logits)
        expected = logits.clone()
        self._library.replay(recording.calls)
        if not torch.equal(logits.view(torch.int32), expected.view(torch.int32)):
            log.warning("a recorded step of %d tokens differs from the step itself; none is recorded", len(tokens))
            self._most_tokens = 0
            return Replayed(expected, recording.taps)
        self._recordings[len(tokens)] = recording
        return Replayed(recording.logits, recording.taps)

    def _give_up(self, most_tokens: int, reason: str) -> None:
        log.info("steps of more than %d tokens are not recorded: %s", most_tokens, reason)
        self._most_tokens = most_tokens
