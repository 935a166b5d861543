"""The router of `benchmarks.up`: a process of `tandem up` in which a re-created policy stands in for one of Tandem's.

`python -m benchmarks.baselines.child POLICY PARENT router ...`
"""

from __future__ import annotations

import signal
import sys

from benchmarks.baselines import BASELINES
from router.policies import POLICIES
from tandem.cli.app import main
from tandem.parent import end_with

STAND_IN = "longest_prefix"
"""The name under which the re-created policy runs."""

if __name__ == "__main__":
    end_with(int(sys.argv[2]), signal.SIGKILL)
    POLICIES[STAND_IN] = BASELINES[sys.argv[1]]
    main(sys.argv[3:])
