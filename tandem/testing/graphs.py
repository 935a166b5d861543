"""A capture without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


class FakeCapture:
    """Keeps the function and calls it again; what it gives lands where its first result did, as a graph's would."""

    def __init__(self, fails_at: int | None = None) -> None:
        """fails_at: the capture, counted from 0, that raises RuntimeError."""
        self.captured = 0
        self.launched = 0
        self.fails_at = fails_at

    @property
    def memory_bytes(self) -> int:
        """See `Capture`."""
        return self.captured << 20

    def capture(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """See `Capture`."""
        if self.captured == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        function()
        result = function().clone()
        self.captured += 1

        def launch() -> None:
            self.launched += 1
            result.copy_(function())

        return launch, result
