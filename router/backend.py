"""What the HTTP side of the router needs of its cluster side. `router.dispatch` fulfils it; tests use a small fake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tandem.cluster import Incarnation, Plan
from tandem.types import Delta, GenerateRequest, ModelInfo


class Reply(Protocol):
    """A decode worker's answer to a submission."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens it had cached."""
        ...

    @property
    def prefill(self) -> Incarnation | None:
        """The prefill worker it asked; None: it prefills itself."""
        ...


class Reader(Protocol):
    """Who a request's tokens are for."""

    def tokens(self, choice: int, first_index: int, tokens: Sequence[int]) -> None:
        """New tokens of a choice of which nothing else is to be told, as of most: they follow those it has had."""
        ...

    def delta(self, delta: Delta) -> None:
        """New tokens of a choice and what is told of them."""
        ...


class Accepted(Protocol):
    """A request that a decode worker has taken."""

    async def follow(self, reader: Reader) -> None:
        """Tells `reader` of all choices, in order within a choice, until each choice has had a delta with `finish` set.

        The reader is called as tokens come, not in the task that awaits this. What it raises is raised here.
        """
        ...

    @property
    def plan(self) -> Plan:
        """Where it was sent, and why."""
        ...

    @property
    def reply(self) -> Reply:
        """What the decode worker said when it took the request."""
        ...

    async def cancel(self) -> None:
        """Ends all open choices; may be called any number of times, also after the end."""
        ...


class Dispatcher(Protocol):
    """The cluster as one endpoint."""

    @property
    def model(self) -> ModelInfo | None:
        """The model served; None until a decode worker is known."""
        ...

    def address_of(self, incarnation: Incarnation) -> str | None:
        """host:port of a worker; None when it is gone."""
        ...

    def ready(self) -> bool:
        """Whether a request could be served now."""
        ...

    async def submit(self, request: GenerateRequest) -> Accepted:
        """Returns when a decode worker has taken it. Raises TandemError (Overloaded, Unavailable, ContextTooLong)."""
        ...
