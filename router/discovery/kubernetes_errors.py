"""What can go wrong with Kubernetes' API, as far as it makes a difference to the one who watches."""

from __future__ import annotations


class ApiAway(Exception):
    """The API server does not answer, or not as one. It may be back soon."""


class ApiRefused(Exception):
    """The API server answered with an error."""

    def __init__(self, status: int, message: str, retry_s: float = 0.0) -> None:
        super().__init__(f"{status} {message}")
        self.status = status
        """Of HTTP."""
        self.retry_s = retry_s
        """Seconds after which it wants to be asked again."""

    @property
    def busy(self) -> bool:
        """Whether the same question may be answered later."""
        return self.status in (408, 429) or self.status >= 500


class Expired(Exception):
    """The watch cannot go on from where it was: a whole list is needed."""
