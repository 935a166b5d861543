"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import sys

EXIT_ORPHAN = 1
PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends a process when its parent dies."""


def end_with(parent: int, number: int) -> None:
    """Lets the kernel signal this process when its parent, process `parent`, has ended, however that happens."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(EXIT_ORPHAN)  # it ended before it was asked for
