"""Fits a worker's step time from the steps it ran: `base + per_token * tokens`, by least squares with forgetting."""

from __future__ import annotations

from tandem.cluster import StepTiming

FORGET = 0.98
"""Weight of the past per step: about the last 50 steps count."""
ENOUGH = 8
"""Steps before a fit is reported."""


class TimingFit:
    """Exponentially weighted moments of (tokens, milliseconds). Numbers only; no clock of its own."""

    def __init__(self) -> None:
        self._steps = 0
        self._weight = 0.0
        self._x = self._y = self._xx = self._xy = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One step of `tokens` tokens that took `seconds`."""
        ms = seconds * 1e3
        self._steps += 1
        self._weight = self._weight * FORGET + 1.0
        self._x = self._x * FORGET + tokens
        self._y = self._y * FORGET + ms
        self._xx = self._xx * FORGET + tokens * tokens
        self._xy = self._xy * FORGET + tokens * ms

    def fit(self) -> StepTiming | None:
        """The line through the steps, or None until there are enough. Both coefficients are at least 0."""
        if self._steps < ENOUGH:
            return None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance < 1e-9:
            return StepTiming(base_ms=0.0, per_token_ms=mean_y / max(mean_x, 1.0))
        slope = (self._xy / self._weight - mean_x * mean_y) / variance
        slope = min(max(slope, 0.0), mean_y / max(mean_x, 1.0))
        return StepTiming(base_ms=max(mean_y - slope * mean_x, 0.0), per_token_ms=slope)
