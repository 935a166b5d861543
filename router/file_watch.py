"""Reads a file again whenever it changes, by asking for its state: it works on every file system, mounted maps too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from tandem.errors import TandemError

log = logging.getLogger(__name__)

INTERVAL_S = 1.0

State = tuple[int, int, int, int] | None


class FileWatch:
    """Applies a file's content when it changes. What cannot be read or is wrong is logged, and changes nothing.

    apply: reads the file and takes it over; raises TandemError when it is wrong.
    """

    def __init__(self, path: Path, apply: Callable[[Path], None], interval_s: float = INTERVAL_S) -> None:
        self._path = path
        self._apply = apply
        self._interval_s = interval_s
        self._seen: State = None

    def read(self) -> None:
        """Reads it for the first time. Raises TandemError when it is wrong."""
        self._seen = self._state()
        self._apply(self._path)

    async def run(self) -> None:
        """Follows the file until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            self.look()

    def look(self) -> None:
        """Reads the file if it has changed since the last time."""
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            self._apply(self._path)
        except TandemError as error:
            log.error("what was read before stays in force: %s", error)
        except Exception:  # a parser's, perhaps: what ends here would end the watch
            log.exception("%s cannot be read; what was read before stays in force", self._path)
        else:
            log.info("%s was read again", self._path)

    def _state(self) -> State:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
