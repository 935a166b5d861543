"""What every process does alike to be observed: log records as text or JSON with the request's id, and metric names.

Metric names are Prometheus': prefix `tandem_`, base units, `_total` on counters. They stand here so that dashboards,
rules and tests have one list to agree with.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from tandem.log_repeats import CountingHandler

if TYPE_CHECKING:
    from tandem.config.process import TracedSettings
    from tandem.tracing.otel import Tracer

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


@dataclass(frozen=True, slots=True)
class _About:
    """What the code that runs is about."""

    request_id: str = ""
    trace_id: str = ""


_about: ContextVar[_About] = ContextVar("about", default=_About())  # noqa: B039 - it is frozen


@contextmanager
def request_context(request_id: str, traceparent: str = "") -> Iterator[None]:
    """Log records made inside, in this task and those it starts, carry the request's id, and its trace's if it has one.

    traceparent: W3C's, empty where the request is not traced.
    """
    token = _about.set(_About(request_id, trace_of(traceparent)))
    try:
        yield
    finally:
        _about.reset(token)


def tell_request(request_id: str, traceparent: str = "") -> None:
    """As `request_context`, to the end of the task that runs."""
    known = _about.get()
    inherited = known.trace_id if known.request_id == request_id else ""
    _about.set(_About(request_id, trace_of(traceparent) or inherited))


def tell_trace(trace_id: str) -> None:
    """From here to the end of the `request_context`, log records carry this trace's id, too."""
    _about.set(_About(_about.get().request_id, trace_id))


def trace_of(traceparent: str) -> str:
    """The trace's id in a `traceparent`; empty for none."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) > 1 else ""


def about(request_id: str, trace: tuple[str, str] | None = None) -> dict[str, str]:
    """`extra` of a log record about a request, where the code that runs is about more than that.

    trace: `traceparent` and `tracestate` where it is traced.
    """
    return {"request_id": request_id, "trace_id": trace_of(trace[0]) if trace else ""}


class _WithRequest(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not getattr(record, "request_id", ""):
            told = _about.get()
            record.request_id, record.trace_id = told.request_id, told.trace_id
        return True


class TextFormatter(logging.Formatter):
    """`time level logger message [request id]`, one line a record but for tracebacks."""

    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Adds the request's id where there is one, and its trace's."""
        line = super().formatMessage(record)
        request_id, trace_id = getattr(record, "request_id", ""), getattr(record, "trace_id", "")
        return f"{line} [{request_id}{' trace ' if trace_id else ''}{trace_id}]" if request_id else line


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time (UTC, ISO 8601), level, logger, message, request_id, trace_id, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in ("request_id", "trace_id"):
            if told := getattr(record, name, ""):
                entry[name] = told
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = self.formatStack(record.stack_info)
        return json.dumps(entry, ensure_ascii=False)


def setup_logging(level: str, style: Literal["text", "json"]) -> None:
    """Sends all records of this process from `level` up to standard error. Calling it again replaces what was set.

    Libraries' records go the same way, and Python's warnings. As JSON, so do exceptions that nobody caught. What
    repeats request after request is told once and counted, unless `level` is debug.
    """
    handler = logging.StreamHandler() if level == "debug" else CountingHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    handler.addFilter(_WithRequest())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    if style == "json":
        sys.excepthook = _uncaught
        threading.excepthook = lambda thrown: _uncaught(thrown.exc_type, thrown.exc_value, thrown.exc_traceback)


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is None or issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    logging.getLogger("tandem").critical("nobody caught this", exc_info=(kind, error, trace))


def warn_untraced(config: TracedSettings) -> None:
    """Says why nothing is traced where a platform's variable, which is no setting of Tandem's, asks for it in vain."""
    if reason := config.untraced():
        logging.getLogger("tandem").warning("%s", reason)


def tracer_of(config: TracedSettings, service: str, instance: str) -> Tracer | None:
    """What sends this process's spans; None, and nothing is imported, where the settings name no collector.

    service: the process's role.
    """
    warn_untraced(config)
    if not config.otlp_endpoint:
        return None
    from tandem.tracing.otel import Tracer

    return Tracer(config.otlp_endpoint, config.trace_share, service, instance, config.trace_prompts)
