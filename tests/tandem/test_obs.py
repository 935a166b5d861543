"""Log records in both forms, with the request's id."""

from __future__ import annotations

import gc
import json
import logging
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from io import StringIO

import pytest

from tandem import obs
from tandem.log_repeats import MAX_CAUSES, WINDOW_S, CountingHandler

pytestmark = pytest.mark.usefixtures("logging_as_it_was")


def test_text_records_end_with_the_request_id(capfd: pytest.CaptureFixture[str]) -> None:
    obs.setup_logging("info", "text")
    log = logging.getLogger("part")
    log.debug("not shown")
    log.info("outside")
    with obs.request_context("ab" * 16):
        log.warning("inside %d", 7)
    outside, inside = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    part: outside", outside)
    assert inside.endswith("WARNING part: inside 7 [" + "ab" * 16 + "]")


def test_json_records_are_objects_of_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    obs.setup_logging("debug", "json")
    log = logging.getLogger("part")
    with obs.request_context("r1"):
        log.debug("two\nlines — é")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    first, second = map(json.loads, capfd.readouterr().err.splitlines())
    assert first["message"] == "two\nlines — é"
    assert first["request_id"] == "r1"
    assert first["level"] == "debug"
    assert first["time"].endswith("+00:00")
    assert "ValueError: broken" in second["exception"]
    assert "request_id" not in second


def test_metric_names_follow_the_conventions() -> None:
    names = [value for name, value in vars(obs).items() if name.isupper() and isinstance(value, str)]
    assert len(names) > 10
    for name in names:
        assert re.fullmatch(r"tandem(_[a-z]+)+", name)
        assert not name.endswith(("_ms", "_kb", "_millis"))


PARENT = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


def test_a_traced_request_has_its_traces_id_in_both_forms(capfd: pytest.CaptureFixture[str]) -> None:
    for style in ("json", "text"):
        obs.setup_logging("info", style)
        with obs.request_context("r1"):
            obs.tell_trace("ab" * 16)
            logging.getLogger("part").info("here")
        with obs.request_context("r2", PARENT):
            logging.getLogger("part").info("there")
        logging.getLogger("part").info("elsewhere", extra=obs.about("r3", (PARENT, "")))
        logging.getLogger("part").info("nowhere")
    lines = capfd.readouterr().err.splitlines()
    records = [json.loads(line) for line in lines[:4]]
    told = [(record.get("request_id"), record.get("trace_id")) for record in records]
    assert told == [("r1", "ab" * 16), ("r2", "ab" * 16), ("r3", "ab" * 16), (None, None)]
    assert [line.endswith(f"[r{n} trace {'ab' * 16}]") for n, line in enumerate(lines[4:7], 1)] == [True] * 3


def test_a_tasks_own_request_is_told_over_what_it_inherited(capfd: pytest.CaptureFixture[str]) -> None:
    obs.setup_logging("info", "json")
    with obs.request_context("r1", PARENT):
        obs.tell_request("r1")
        logging.getLogger("part").info("the same")
        obs.tell_request("r2")
        logging.getLogger("part").info("another")
    same, another = map(json.loads, capfd.readouterr().err.splitlines())
    assert (same["request_id"], same["trace_id"]) == ("r1", "ab" * 16)
    assert (another["request_id"], "trace_id" in another) == ("r2", False)


def test_libraries_warnings_and_what_nobody_caught_are_objects_too(capfd: pytest.CaptureFixture[str]) -> None:
    obs.setup_logging("info", "json")
    logging.getLogger("uvicorn.error").warning("a library's\nlines")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)

    def fail() -> None:
        raise ValueError("in a thread")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        raise ValueError("at the top")
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    library, warned, threads, top = map(json.loads, capfd.readouterr().err.splitlines())
    assert (library["logger"], library["message"]) == ("uvicorn.error", "a library's\nlines")
    assert (warned["logger"], "careful" in warned["message"]) == ("py.warnings", True)
    assert threads["level"] == top["level"] == "critical"
    assert "ValueError: in a thread" in threads["exception"] and "ValueError: at the top" in top["exception"]


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def counted() -> Iterator[tuple[logging.Logger, StringIO, _Clock]]:
    out, clock, log = StringIO(), _Clock(), logging.getLogger("counted")
    handler = CountingHandler(out, clock)
    log.addHandler(handler)
    log.propagate, level = False, log.level
    log.setLevel("INFO")
    yield log, out, clock
    log.removeHandler(handler)
    handler.close()
    log.propagate = True
    log.setLevel(level)


Counted = tuple[logging.Logger, StringIO, _Clock]


def test_what_repeats_with_every_request_is_told_once_and_counted(counted: Counted) -> None:
    log, out, clock = counted
    for n in range(100):
        name = f"{n:032x}"
        log.warning("request %s failed after %d ms: no route to 10.0.0.1:80", name, n, extra=obs.about(name))
    log.warning("request %s failed after %d ms: no route to 10.0.0.2:80", name, 7, extra=obs.about(name))
    assert [line[-11:] for line in out.getvalue().splitlines()] == ["10.0.0.1:80", "10.0.0.2:80"]
    clock.now = WINDOW_S
    log.info("of no request")
    lines = out.getvalue().splitlines()
    assert lines[2].endswith("no route to 10.0.0.1:80 (and 99 more like it in 10 s)")
    assert (len(lines), lines[3]) == (4, "of no request")
    log.warning("request %s failed after %d ms: no route to 10.0.0.1:80", name, 1, extra=obs.about(name))
    assert len(out.getvalue().splitlines()) == 5, "a new window shows the next one"


def test_kinds_of_errors_levels_and_loggers_are_causes_of_their_own(counted: Counted) -> None:
    log, out, _ = counted
    for kind in (ValueError, ValueError, TypeError):
        try:
            raise kind("the same text")
        except (ValueError, TypeError):
            log.exception("failed", extra=obs.about("r"))
    log.warning("failed", extra=obs.about("r"))
    assert out.getvalue().count("Traceback") == 2
    assert out.getvalue().splitlines().count("failed") == 3


def test_what_is_about_no_request_is_never_counted(counted: Counted) -> None:
    log, out, _ = counted
    for _ in range(3):
        log.warning("worker at 10.0.0.1:80 is gone")
    assert len(out.getvalue().splitlines()) == 3


def test_causes_are_bounded_and_the_last_counts_are_told_at_the_end(counted: Counted) -> None:
    log, out, _ = counted
    for n in range(MAX_CAUSES + 10):
        for _ in range(2):
            log.warning("cause %s", chr(ord("a") + n % 26) * (1 + n // 26), extra=obs.about("r"))
    told = out.getvalue().splitlines()
    assert sum("(and 1 more" in line for line in told) == 10
    log.handlers[0].close()
    assert sum("(and 1 more" in line for line in out.getvalue().splitlines()) == MAX_CAUSES + 10


@pytest.mark.parametrize("about", [obs.about("r"), {}])
def test_arguments_that_do_not_fit_the_text_fail_no_caller(
    about: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = StringIO()
    handler = CountingHandler(out)
    for text, args in (("took %d of %d", (1,)), ("goes on", ())):
        handler.handle(logging.makeLogRecord({"msg": text, "args": args, **about}))
    assert out.getvalue() == "goes on\n"
    assert "not enough arguments" in capsys.readouterr().err, "logging says where it was"


def test_what_is_counted_keeps_nothing_of_the_request_alive() -> None:
    class Request:
        def __str__(self) -> str:
            return "it"

    out = StringIO()
    handler = CountingHandler(out, _Clock())

    def fail() -> weakref.ref[Request]:
        request = Request()
        try:
            raise ValueError(request)
        except ValueError:
            about = {"args": (request,), "exc_info": sys.exc_info(), **obs.about("r")}
            handler.handle(logging.makeLogRecord({"msg": "%s failed", **about}))
        return weakref.ref(request)

    kept = fail(), fail()
    gc.collect()
    assert [each() for each in kept] == [None, None]
    handler.close()
    assert out.getvalue().endswith("it failed (and 1 more like it in 0 s)\n")


def test_with_level_debug_everything_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    obs.setup_logging("debug", "json")
    with obs.request_context("r1"):
        for _ in range(3):
            logging.getLogger("part").warning("again")
    assert len(capfd.readouterr().err.splitlines()) == 3
    obs.setup_logging("info", "json")
    with obs.request_context("r1"):
        for _ in range(3):
            logging.getLogger("part").warning("again")
    assert len(capfd.readouterr().err.splitlines()) == 1
