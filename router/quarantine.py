"""Requests that ended workers: after the second one nobody is asked to run them for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b

from tandem.errors import Quarantined
from tandem.types import GenerateRequest

MAX_ENTRIES = 1024
SECONDS = 600.0


class Quarantine:
    """Fingerprints of such requests, for ten minutes each. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, request: GenerateRequest) -> None:
        """Two workers died while they ran it."""
        self._until[fingerprint(request)] = self._clock() + SECONDS
        while len(self._until) > MAX_ENTRIES:
            self._until.popitem(last=False)

    def check(self, request: GenerateRequest) -> None:
        """Raises Quarantined for a request like one of those."""
        if not self._until:
            return
        key = fingerprint(request)
        left = self._until.get(key, 0.0) - self._clock()
        if left <= 0:
            self._until.pop(key, None)
            return
        raise Quarantined(f"workers were lost over a request like this one; it is not taken for {left:.0f} s")


def fingerprint(request: GenerateRequest) -> bytes:
    """What is asked, whoever asks it and whatever noise it draws."""
    sampling = replace(request.sampling, seed=0)
    digest = blake2b(digest_size=16)
    for part in (request.prompt, sampling, request.choices, request.adapter):
        digest.update(repr(part).encode())
    return digest.digest()
