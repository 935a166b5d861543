"""Commands and their exit codes: 0 ended as asked, 1 failed at work, 2 wrong settings, 3 a checkpoint that cannot be served."""

from __future__ import annotations

import sys

import typer

from tandem.cli.options import command
from tandem.config import DecodeConfig, PrefillConfig, RouterConfig, UpConfig
from tandem.errors import CheckpointError, ConfigError, TandemError

EXIT_FAILED, EXIT_SETTINGS, EXIT_CHECKPOINT = 1, 2, 3


def _up(config: UpConfig) -> None:
    from tandem.cli.up import up

    raise typer.Exit(up(config))


# The processes import their packages late: `tandem router` must not import torch, and `tandem --help` must be quick.
def _router(config: RouterConfig) -> None:
    from router.main import run

    raise typer.Exit(run(config))


def _prefill(config: PrefillConfig) -> None:
    from prefill_worker.main import run

    raise typer.Exit(run(config))


def _decode(config: DecodeConfig) -> None:
    from decode_worker.main import run

    raise typer.Exit(run(config))


def make_app() -> typer.Typer:
    """The command tree."""
    app = typer.Typer(
        name="tandem",
        help="A disaggregated LLM serving cluster with a cache-aware router.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command("up", help="Start a whole cluster on this machine.")(command(UpConfig, _up))
    app.command("router", help="Start one router.")(command(RouterConfig, _router))
    app.command("prefill", help="Start one prefill worker.")(command(PrefillConfig, _prefill))
    app.command("decode", help="Start one decode worker.")(command(DecodeConfig, _decode))
    return app


def main() -> None:
    """Entry point of the `tandem` script."""
    try:
        make_app()()
    except (TandemError, OSError) as error:
        sys.stderr.write(f"tandem: {error}\n")
        codes = {CheckpointError: EXIT_CHECKPOINT, ConfigError: EXIT_SETTINGS}
        sys.exit(next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_FAILED))
