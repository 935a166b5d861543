"""`tandem up` with a re-created policy in its router: `python -m benchmarks.up sglang MODEL --prefill 4 --decode 2`.

The router's process takes it in place of a policy that the product has; nothing of it is in the product.
"""

from __future__ import annotations

import sys
from functools import partial

import typer

from benchmarks.baselines import BASELINES
from benchmarks.baselines.child import STAND_IN
from tandem.cli.options import command
from tandem.cli.up import up
from tandem.config import UpConfig


def _up(name: str, config: UpConfig) -> None:
    if name not in BASELINES:
        raise typer.BadParameter(f"policy is {name}; it must be one of {', '.join(BASELINES)}")
    raise typer.Exit(up(config.model_copy(update={"policy": STAND_IN}), ("benchmarks.baselines.child", name)))


def main(arguments: list[str]) -> None:
    """The policy's name, then what `tandem up` takes."""
    app = typer.Typer(add_completion=False)
    app.command()(command(UpConfig, partial(_up, arguments[0] if arguments else "")))
    app(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
