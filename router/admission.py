"""How many requests the router lets in at once."""

from __future__ import annotations

from tandem.errors import Overloaded


class Admission:
    """A bound on open requests. Workers, who see every router's requests, do the ordering; here more are refused."""

    def __init__(self, max_inflight: int) -> None:
        self._max_inflight = max_inflight
        self._inflight: set[str] = set()

    @property
    def inflight(self) -> int:
        """Requests admitted and not yet ended."""
        return len(self._inflight)

    def enter(self, request_id: str) -> None:
        """Admits a request. Raises Overloaded at the bound, and ValueError if the id is already in."""
        if request_id in self._inflight:
            raise ValueError(f"request_id {request_id} is already in flight")
        if len(self._inflight) >= self._max_inflight:
            raise Overloaded(
                f"{len(self._inflight)} requests are in flight and at most {self._max_inflight} are admitted; "
                "try again later"
            )
        self._inflight.add(request_id)

    def leave(self, request_id: str) -> None:
        """The request ended; a second time does nothing."""
        self._inflight.discard(request_id)
