"""What every process does alike to be observed: log records as text or JSON with the request's id, and metric names.

Metric names are Prometheus': prefix `tandem_`, base units, `_total` on counters. They stand here so that dashboards,
rules and tests have one list to agree with.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

REQUESTS_TOTAL = "tandem_requests_total"
FAILURES_TOTAL = "tandem_request_failures_total"
REQUESTS_MOVED_TOTAL = "tandem_requests_moved_total"
REPLICAS_TOTAL = "tandem_replicas_total"
REPLICAS_RUNNING = "tandem_replicas_running"
REPLICA_BYTES_TOTAL = "tandem_replica_bytes_total"
REQUESTS_RUNNING = "tandem_requests_running"
REQUESTS_QUEUED = "tandem_requests_queued"
QUEUE_SECONDS = "tandem_request_queue_seconds"
FIRST_TOKEN_SECONDS = "tandem_time_to_first_token_seconds"  # noqa: S105 - a name, not a secret
INTER_TOKEN_SECONDS = "tandem_inter_token_latency_seconds"  # noqa: S105 - a name, not a secret
REQUEST_SECONDS = "tandem_request_duration_seconds"
PROMPT_TOKENS_TOTAL = "tandem_prompt_tokens_total"
CACHED_TOKENS_TOTAL = "tandem_cached_prompt_tokens_total"
COMPLETION_TOKENS_TOTAL = "tandem_completion_tokens_total"
SPLICED_TOKENS_TOTAL = "tandem_spliced_prompt_tokens_total"
ENCODED_TOKENS_TOTAL = "tandem_encoded_prompt_tokens_total"

_request_id: ContextVar[str] = ContextVar("request_id", default="")


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Log records made inside, in this task and those it starts, carry the request's id."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


class _WithRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = _request_id.get()
        return True


class TextFormatter(logging.Formatter):
    """`time level logger message [request id]`, one line a record but for tracebacks."""

    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Adds the request's id where there is one."""
        line = super().formatMessage(record)
        request_id = getattr(record, "request_id", "")
        return f"{line} [{request_id}]" if request_id else line


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time (UTC, ISO 8601), level, logger, message, request_id, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            entry["request_id"] = request_id
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def setup_logging(level: str, style: Literal["text", "json"]) -> None:
    """Sends all records of this process from `level` up to standard error. Calling it again replaces what was set."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    handler.addFilter(_WithRequestId())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
