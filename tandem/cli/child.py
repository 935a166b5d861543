"""A process of `tandem up`.

`python -m tandem.cli.child PARENT COMMAND ...` is `tandem COMMAND ...` that ends with its parent, process PARENT.
"""

from __future__ import annotations

import signal
import sys

from tandem.cli.app import main
from tandem.parent import end_with

if __name__ == "__main__":
    end_with(int(sys.argv[1]), signal.SIGKILL)
    main(sys.argv[2:])
