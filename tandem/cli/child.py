"""A process of `tandem up`.

`python -m tandem.cli.child PARENT COMMAND ...` is `tandem COMMAND ...` that ends with its parent, process PARENT.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from tandem.cli.app import EXIT_FAILED, main

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends a process when its parent dies."""


def end_with(parent: int) -> None:
    """Lets the kernel kill this process when its parent, process `parent`, has ended, however that happens."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(EXIT_FAILED)  # it ended before it was asked for


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    main(sys.argv[2:])
