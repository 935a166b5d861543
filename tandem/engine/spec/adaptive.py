"""How long drafts are: from how many of their tokens were accepted, and from what steps were measured to cost.

A step over t tokens takes T(t), which grows slowly while memory sets the pace, and in proportion once arithmetic does.
A chain whose tokens are each accepted with probability p brings p + p^2 + ... + p^n more tokens (Leviathan et al. 2023,
arXiv:2211.17192). So the drafts of a batch are as long as makes tokens a second most, down to none. What was found not
to pay is tried again now and then, ever more rarely.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

FIRST_GUESS = 0.6
"""Acceptance of a drafter that nothing is known of."""
GUESS_WEIGHT = 2.0
"""Tested tokens that an estimate's starting value counts as."""
MARGIN = 1.1
"""Drafts must promise so many times the speed of a plain step: estimates err, and new sizes of steps cost at first."""
LATEST = 5
"""Measurements of a size that count; of five the second least, of three the least: disturbed steps take longer."""
GUESSED_SLOPE = 0.03
"""Of a step's time, what one more token adds, as far as it was not measured."""
LASTING_STEPS = 512
"""Measured steps after which the time of a size that did not occur again is forgotten."""
LASTING_LONGER = 8
"""Times as many where it was measured often enough: what was found not to pay is not asked again so soon."""
ENOUGH = 3
"""Steps of about a size to measure before their time is believed."""
HOPEFUL = 0.95
"""Acceptance of the best drafts there are. A draft that would not pay at that rate is not tried."""
FIRST_PAUSE, LONGEST_PAUSE = 8, 256
"""Steps without a draft before a sequence gets one again, to see whether it pays now."""


@dataclass(slots=True)
class Rate:
    """Share of tested draft tokens that were accepted. A token is tested when all before it were accepted."""

    accepted: float = 0.0
    tested: float = 0.0

    def add(self, accepted: int, tested: int, kept: float) -> None:
        """One draft's outcome. kept: weight of what was before."""
        self.accepted = self.accepted * kept + accepted
        self.tested = self.tested * kept + tested

    def value(self, guess: float) -> float:
        """The share, drawn towards `guess` where little was tested."""
        return (self.accepted + guess * GUESS_WEIGHT) / (self.tested + GUESS_WEIGHT)


@dataclass(slots=True)
class _Measured:
    latest: deque[float]
    """Seconds of the last steps."""
    seconds: float
    count: int
    step: int

    def add(self, seconds: float, step: int) -> None:
        self.latest.append(seconds)
        self.seconds = sorted(self.latest)[(len(self.latest) - 1) // 3]
        self.count, self.step = self.count + 1, step


@dataclass(slots=True)
class Costs:
    """Seconds of steps by their number of tokens, as measured lately; lines between the sizes that occurred."""

    sizes: list[int] = field(default_factory=list)
    _known: dict[int, _Measured] = field(default_factory=dict)
    _steps: int = 0

    def add(self, tokens: int, seconds: float) -> None:
        """A step's measurement. Sizes above 64 tokens are rounded."""
        size = _rounded(tokens)
        self._steps += 1
        known = self._known.get(size)
        if known is None:
            insort(self.sizes, size)
            known = self._known[size] = _Measured(deque(maxlen=LATEST), seconds, 0, self._steps)
        known.add(seconds, self._steps)
        if self._steps % LASTING_STEPS == 0:
            self._forget()

    def _forget(self) -> None:
        def lasts(known: _Measured) -> int:
            return LASTING_STEPS * (LASTING_LONGER if known.count >= ENOUGH else 1)

        kept = [size for size in self.sizes if self._known[size].step > self._steps - lasts(self._known[size])]
        self.sizes = kept
        self._known = {size: self._known[size] for size in self.sizes}

    def knows(self, tokens: int) -> bool:
        """Whether steps of about so many tokens were measured often enough."""
        near = (size for size in self.sizes if 3 * tokens <= 4 * size <= 5 * tokens)
        return sum(self._known[size].count for size in near) >= ENOUGH

    def expire(self) -> None:
        """A step passed that was none of these: what is known of them becomes older."""
        self._steps += 1
        if self._steps % LASTING_STEPS == 0:
            self._forget()

    def estimate(self, tokens: int) -> float | None:
        """Seconds of a step; None when none was measured."""
        if not self.sizes:
            return None
        at = bisect_left(self.sizes, tokens)
        if at == 0:
            least = self.sizes[0]
            return self._known[least].seconds / (1.0 + GUESSED_SLOPE * (least - tokens))
        below = self.sizes[at - 1]
        if at == len(self.sizes):
            return self._known[below].seconds * (1.0 + GUESSED_SLOPE * (tokens - below))
        above = self.sizes[at]
        share = (tokens - below) / (above - below)
        return self._known[below].seconds * (1.0 - share) + self._known[above].seconds * share


def _rounded(tokens: int) -> int:
    shift = max(tokens.bit_length() - 6, 0)
    return tokens >> shift << shift


@dataclass(frozen=True, slots=True)
class Offer:
    """A row that may have a draft."""

    chance: float
    """Estimated probability that a token of it is accepted when all before it are; of a tree, some token of a level."""
    limit: int
    """Tokens at most."""
    branches: int = 1
    """Tokens of a level of a tree, which share what the level is worth."""

    def gain(self, place: int) -> float:
        """What its `place`-th token, from 1 on, brings."""
        return self.chance ** -(-place // self.branches) / self.branches


@dataclass(frozen=True, slots=True)
class Load:
    """A step as it would be without drafts."""

    rows: int
    """That sample."""
    tokens: int
    budget: int
    """Draft tokens that it has room for."""


def choose_lengths(offers: Sequence[Offer], load: Load, plain: Costs, drafted: Costs) -> list[int]:
    """Draft tokens of each row such that sampled tokens a second are most; all 0 where that is without drafts.

    plain, drafted: steps without and with drafts.
    """
    lengths = [0] * len(offers)
    without = plain.estimate(load.tokens)
    if without is None or not plain.knows(load.tokens):
        return lengths  # a plain step is measured first
    gains = [(offer.gain(place), row) for row, offer in enumerate(offers) for place in range(1, offer.limit + 1)]
    gains.sort(key=lambda each: -each[0])
    costs, base, gained = drafted if drafted.sizes else plain, load.rows, 0.0
    best, best_count = base / without * MARGIN, 0
    for count, (gain, _) in enumerate(gains[: load.budget], 1):
        gained += gain
        seconds = costs.estimate(load.tokens + count)
        if seconds is not None and (base + gained) / seconds > best:
            best, best_count = (base + gained) / seconds, count
    for _, row in gains[:best_count]:
        lengths[row] += 1
    return lengths


@dataclass(slots=True)
class Pause:
    """When a sequence whose drafts do not pay is given one again."""

    length: int = FIRST_PAUSE
    waited: int = 0

    def wait(self, steps: int = 1) -> bool:
        """Steps without a draft; whether the pause is over with them."""
        self.waited += steps
        return self.waited >= self.length

    def probe(self) -> None:
        """A draft is tried: the pause after it is twice as long, unless it is worth something."""
        self.waited, self.length = 0, min(2 * self.length, LONGEST_PAUSE)

    def end(self) -> None:
        """Drafts pay again."""
        self.waited, self.length = 0, FIRST_PAUSE
