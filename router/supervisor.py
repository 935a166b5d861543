"""`--processes N`: several router processes on one HTTP port, and the one above them that starts them again.

Each has its own listening socket on the shared port (SO_REUSEPORT), made here and kept here: the kernel spreads new
connections over them, and those that wait for a process that died are served by the one that takes its place. Processes
are forked before anything is started, so a new one is up in the time that it takes to connect to the workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tandem.errors import ConfigError, TandemError
from tandem.parent import end_with

log = logging.getLogger(__name__)

QUICK_S = 10.0
"""A process that ends sooner did not work at all."""
MAX_QUICK = 5
"""So many of these in a row end the router: it would not get better."""
RETRY_S = 0.5
SETTINGS_RETRY_S = 5.0
"""Before another replacement, when one found wrong what was right before: a file, or somebody's answer."""
EXIT_FAILED, EXIT_SETTINGS = 1, 2


@dataclass(frozen=True)
class Place:
    """One of a router's processes."""

    index: int
    count: int
    folder: Path
    """Where the processes find one another's sockets."""
    listener: socket.socket
    replacement: bool
    """It takes the place of one that died: clients wait for it already."""


def supervise(listeners: Sequence[socket.socket], serve: Callable[[Place], int]) -> int:
    """Runs `serve` in a process for each listener until SIGTERM or SIGINT; returns the exit code."""
    with TemporaryDirectory(prefix="tandem-router-") as folder:
        return _Supervisor(listeners, serve, Path(folder)).run()


class _Supervisor:
    def __init__(self, listeners: Sequence[socket.socket], serve: Callable[[Place], int], folder: Path) -> None:
        self._listeners = listeners
        self._serve = serve
        self._folder = folder
        self._running: dict[int, tuple[Place, float]] = {}
        """By process id: its place, and when it began to serve."""
        self._quick = 0
        self._stopping = False
        self._status = 0

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self._stop())
        for index in range(len(self._listeners)):
            self._start(index, replacement=False)
        while self._running:
            pid, status = os.waitpid(-1, 0)
            self._ended(pid, os.waitstatus_to_exitcode(status))
        return self._status

    def _start(self, index: int, replacement: bool, pause_s: float = 0.0) -> None:
        """pause_s: for which the process waits before it serves: here others may end meanwhile."""
        place = Place(index, len(self._listeners), self._folder, self._listeners[index], replacement)
        parent = os.getpid()
        for left in self._folder.glob(f"*-{index}"):
            left.unlink()  # sockets of the one before
        # Until the child has its own handlers, a signal would only set this object's flag in it.
        signals = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        if self._stopping:  # told in this moment: whom nobody knows nobody would stop
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            return
        pid = os.fork()
        if not pid:
            self._become(place, parent, signals, pause_s)
        self._running[pid] = (place, time.monotonic() + pause_s)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def _become(self, place: Place, parent: int, signals: set[signal.Signals], pause_s: float) -> None:
        """In the child: serves, and ends the process."""
        status = EXIT_FAILED
        try:
            for number in signals:
                signal.signal(number, signal.SIG_DFL)
            end_with(parent, signal.SIGTERM)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            for listener in self._listeners:
                if listener is not place.listener:
                    listener.close()
            time.sleep(pause_s)
            status = self._serve(place)
        except TandemError as error:
            self._complain(place, str(error))
            status = EXIT_SETTINGS if isinstance(error, ConfigError) else EXIT_FAILED
        except BaseException:
            log.exception("router process %d failed", place.index)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _complain(self, place: Place, fault: str) -> None:
        """In the child: logs why it cannot serve, unless the one before said the same."""
        said = self._fault(place.index)
        if not said.exists() or said.read_text() != fault:
            log.error("router process %d: %s", place.index, fault)
            said.write_text(fault)

    def _fault(self, index: int) -> Path:
        return self._folder / f"fault.{index}"

    def _ended(self, pid: int, status: int) -> None:
        if pid not in self._running:  # a container's first process inherits the orphans of all others
            return
        place, started = self._running.pop(pid)
        index = place.index
        if self._stopping:
            self._status = self._status or max(status, 0)
            return
        if status == EXIT_SETTINGS and not place.replacement:  # another try would find the same
            self._status = status
            self._stop()
            return
        if status == EXIT_SETTINGS:  # the others go on
            if place.listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                place.listener.shutdown(socket.SHUT_RDWR)  # new clients go to them; who serves next listens again
            self._start(index, replacement=True, pause_s=SETTINGS_RETRY_S)
            return
        self._fault(index).unlink(missing_ok=True)
        quick = time.monotonic() - started < QUICK_S
        self._quick = self._quick + 1 if quick else 0
        log.error("router process %d (pid %d) ended with status %d; it is started again", index, pid, status)
        if self._quick >= MAX_QUICK:
            log.error("%d router processes in a row ended within %g seconds; the router ends", MAX_QUICK, QUICK_S)
            self._status = EXIT_FAILED
            self._stop()
            return
        self._start(index, replacement=True, pause_s=RETRY_S if quick else 0.0)

    def _stop(self) -> None:
        self._stopping = True
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):  # it ended in this moment
                os.kill(pid, signal.SIGTERM)
