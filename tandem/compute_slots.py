"""Slots for computing that all workers of a machine share, so that they never run more steps at once than it has cores.

A System V semaphore fits: it is held across processes, the kernel serves those who wait in order and without their
spinning, and it gives back what a killed process held (semop(2), SEM_UNDO). Linux only. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

PATIENCE_S = 0.5
"""Longest wait for a slot: a holder that was stopped (SIGSTOP) must not stop the others."""

_IPC_PRIVATE, _IPC_CREAT, _IPC_RMID, _SETVAL, _GETVAL = 0, 0o1000, 0, 16, 12
_SEM_UNDO = 0x1000


class _Operation(ctypes.Structure):
    """`struct sembuf`"""

    _fields_ = (("number", ctypes.c_ushort), ("change", ctypes.c_short), ("flags", ctypes.c_short))


class _Time(ctypes.Structure):
    """`struct timespec`"""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class ComputeSlots:
    """A bounded number of slots; `held` takes one for the length of a step."""

    def __init__(self, key: int, patience_s: float = PATIENCE_S) -> None:
        """key: what `create` made, possibly in another process. Raises OSError when there is no such semaphore."""
        self.key = key
        self.overtaken = 0
        """Steps that ran without a slot because none came free in time."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._patience = _Time(int(patience_s), int(patience_s % 1 * 1e9))
        self.free()

    @classmethod
    def create(cls, slots: int, patience_s: float = PATIENCE_S) -> ComputeSlots:
        """Makes `slots` slots that live until `remove`, or until the machine restarts. Raises OSError."""
        libc = ctypes.CDLL(None, use_errno=True)
        key = _checked(libc.semget(_IPC_PRIVATE, 1, 0o600 | _IPC_CREAT), "semget")
        _checked(libc.semctl(key, 0, _SETVAL, ctypes.c_int(slots)), "semctl")
        return cls(key, patience_s)

    def remove(self) -> None:
        """Ends the slots; who waits for one goes on without. Raises OSError if they are gone."""
        _checked(self._libc.semctl(self.key, 0, _IPC_RMID), "semctl")

    def free(self) -> int:
        """Slots that nobody holds now. Raises OSError if they are gone."""
        return _checked(self._libc.semctl(self.key, 0, _GETVAL), "semctl")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Waits for a slot in the order of arrival, and goes on without one when none comes free in time."""
        taken = self._change(-1)
        if not taken:
            self.overtaken += 1
            if self.overtaken == 1:
                patience = self._patience.seconds + self._patience.nanoseconds / 1e9
                log.warning("no compute slot came free in %g s: a worker beside this one is stuck", patience)
        try:
            yield
        finally:
            if taken:
                self._change(1)

    def _change(self, by: int) -> bool:
        operation = _Operation(0, by, _SEM_UNDO)
        one = ctypes.c_size_t(1)
        while self._libc.semtimedop(self.key, ctypes.byref(operation), one, ctypes.byref(self._patience)) != 0:
            if ctypes.get_errno() != errno.EINTR:  # a signal says nothing of the others
                return False
        return True


def _checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result
