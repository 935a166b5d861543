"""Pages of KV as a countable resource: who may have one, and who gave one back."""

from __future__ import annotations

from collections.abc import Iterable


class PagesExhausted(RuntimeError):
    """More pages were taken than were free: a defect of the caller, who asks `can_allocate` first."""


class PagePool:
    """Hands out page numbers `0 .. num_pages - 1`. It knows free and used, not who uses a page."""

    def __init__(self, num_pages: int) -> None:
        """Raises ValueError when there is not one page."""
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; it must be at least 1")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._used = bytearray(num_pages)

    @property
    def free_count(self) -> int:
        """Pages nobody has."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count)` would succeed."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages, the most recently freed first (they are the likeliest to be in a processor's cache).

        Raises PagesExhausted, and takes none, when fewer are free.
        """
        if count > len(self._free):
            raise PagesExhausted(f"{count} pages were asked for and {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._used[page] = 1
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Gives pages back. Raises ValueError on a page that is not in use: two owners would share it later."""
        for page in pages:
            if not 0 <= page < self.num_pages or not self._used[page]:
                raise ValueError(f"page {page} is freed but not in use")
            self._used[page] = 0
            self._free.append(page)

    def used(self) -> set[int]:
        """Pages in use, for checks."""
        return {page for page, flag in enumerate(self._used) if flag}

    def check_integrity(self) -> None:
        """Raises AssertionError unless every page is either free, once, or used."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & self.used(), "a page is free and used"
        assert len(free) + len(self.used()) == self.num_pages, "a page is lost"
