"""Log records that repeat request after request: the first is shown, the others are counted."""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from typing import TextIO

WINDOW_S = 10.0
MAX_CAUSES = 256
"""Causes remembered; the oldest is forgotten first."""
_OWN = re.compile(r"\b[0-9a-f]{16,}\b|(?<![\w.:-])\d+(?:\.\d+)?(?![\w:-])")
"""What differs between two requests that failed alike: ids, counts and times; not addresses."""


@dataclass(slots=True)
class _Repeated:
    since: float
    count: int = 0
    last: logging.LogRecord | None = None


class CountingHandler(logging.StreamHandler[TextIO]):
    """Shows the first of each cause, and after ten seconds how many more there were.

    Only records about a request are counted, those with a `request_id`: what else happens has no flood. A cause is a
    logger, a level, the text without ids and numbers, and the kind of an exception. The count comes with the first
    record of any kind after that time, or at the end.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._clock = clock
        self._causes: OrderedDict[tuple[object, ...], _Repeated] = OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        """Shows or counts a record, and never raises. Called under the handler's lock."""
        try:
            self._emit(record)
        except Exception:  # noqa: BLE001 - arguments that do not fit the text, say
            self.handleError(record)

    def _emit(self, record: logging.LogRecord) -> None:
        now = self._clock()
        while self._causes and next(iter(self._causes.values())).since <= now - WINDOW_S:
            self._tell(self._causes.popitem(last=False)[1], now)
        if not getattr(record, "request_id", ""):
            super().emit(record)
            return
        text = record.getMessage()
        cause = _cause(record, text)
        known = self._causes.get(cause)
        if known is not None:
            known.count, known.last = known.count + 1, _bare(record, text)
            return
        if len(self._causes) >= MAX_CAUSES:
            self._tell(self._causes.popitem(last=False)[1], now)
        self._causes[cause] = _Repeated(now)
        super().emit(record)

    def _tell(self, repeated: _Repeated, now: float) -> None:
        if repeated.last is None:
            return
        summary = copy(repeated.last)
        summary.msg = f"{summary.msg} (and {repeated.count} more like it in {now - repeated.since:.0f} s)"
        super().emit(summary)

    def close(self) -> None:
        """Tells what was counted."""
        with self.lock or nullcontext():
            now = self._clock()
            while self._causes:
                self._tell(self._causes.popitem()[1], now)
        super().close()


def _cause(record: logging.LogRecord, text: str) -> tuple[object, ...]:
    kind = record.exc_info[0] if record.exc_info else None
    return record.name, record.levelno, kind, _OWN.sub("#", text)


def _bare(record: logging.LogRecord, text: str) -> logging.LogRecord:
    """A copy to keep: without an exception's frames and the arguments, and all that these hold."""
    kept = copy(record)
    kept.msg, kept.args, kept.exc_info, kept.exc_text = text, None, None, None
    return kept
