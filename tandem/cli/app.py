"""The commands, and how they end.

Exit codes: 0 ended as asked, 1 failed at work (`doctor`: found an error), 2 wrong settings, 3 a checkpoint that cannot
be served.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console

from tandem import __version__
from tandem.cli.find_help import epilog, find
from tandem.cli.options import build, command
from tandem.cli.replay import replay
from tandem.config import (
    DecodeConfig,
    DrainConfig,
    PrefillConfig,
    ProcessConfig,
    RouterConfig,
    Settings,
    TrainDraftConfig,
    UpConfig,
    WorkerConfig,
)
from tandem.errors import CheckpointError, ConfigError, TandemError
from tandem.hub import resolve_drafter, resolve_model, served_name
from tandem.units import IN_SECONDS

EXIT_FAILED, EXIT_SETTINGS, EXIT_CHECKPOINT = 1, 2, 3

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for an unknown flag or command; the class itself has moved between its versions."""

EPILOG = (
    "`--help=KEYWORD` searches all settings, `--help=all` shows them with their variables. Exit codes: 0 ended as "
    "asked; 1 failed at work, or `doctor` found an error; 2 wrong settings; 3 a checkpoint that cannot be served."
)

W = TypeVar("W", bound=WorkerConfig)
S = TypeVar("S", bound=Settings)


# Packages are imported late: `tandem router` must not import torch, and `tandem --help` must be quick.
def _up(config: UpConfig) -> None:
    if reason := config.untraced():  # its children are told what counts, and do not know why
        Console(stderr=True).print(f"tandem: {reason}", markup=False, soft_wrap=True)
    if config.on == "ray":
        from tandem.cli.on_ray.launch import up_on_ray

        raise typer.Exit(up_on_ray(config))
    from tandem.cli.up import up

    raise typer.Exit(up(config))


def _router(config: RouterConfig) -> None:
    from router.main import run as run_router

    # The router needs the tokenizer alone.
    model = None if config.model is None else resolve_model(config.model, weights=False)
    raise typer.Exit(run_router(config.model_copy(update={"model": model})))


def _prefill(config: PrefillConfig) -> None:
    config = _with_folder(config)
    from prefill_worker.main import run as run_prefill

    raise typer.Exit(run_prefill(config))


def _decode(config: DecodeConfig) -> None:
    config = _with_folder(config)
    from decode_worker.main import run as run_decode

    raise typer.Exit(run_decode(config))


def _train_draft(config: TrainDraftConfig) -> None:
    from tandem.cli.train_draft import train_draft

    train_draft(config)


def _drain(config: DrainConfig) -> None:
    from tandem.cli.drain import drain

    drain(config)


Routers = Annotated[
    list[str] | None, typer.Option("--router", help="HOST:PORT of a router's HTTP port (default: 127.0.0.1:8000)")
]
HERE = ["127.0.0.1:8000"]


def _doctor(
    model: Annotated[str, typer.Option("--model", help="folder or hub id of a model to check as well")] = "",
    cluster: Annotated[bool, typer.Option("--cluster", help="check a running cluster, not this machine")] = False,
    router: Routers = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object in place of a tree")] = False,
) -> None:
    from tandem.cli.doctor import doctor, doctor_of_cluster

    if not cluster and router:
        raise ConfigError("--router: it is for --cluster; without, this machine is checked")
    if cluster and model:
        raise ConfigError("--model: it is checked on a machine, not with --cluster")
    config = build(ProcessConfig, {})
    raise typer.Exit(doctor_of_cluster(router or HERE, config, as_json) if cluster else doctor(model, as_json))


def _top(
    router: Annotated[str, typer.Option("--router", help="HOST:PORT of the router's HTTP port")] = HERE[0],
    every: Annotated[str, typer.Option("--every", metavar="<duration>", help="between two pictures")] = "2s",
    once: Annotated[bool, typer.Option("--once", help="one picture as text")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one picture as a JSON object")] = False,
) -> None:
    from tandem.cli.fleet_client import FleetClient
    from tandem.cli.top import top

    client = FleetClient(router, build(ProcessConfig, {}))
    top(client, seconds(every, "--every"), once, as_json)


def _explain(
    request_id: Annotated[str, typer.Argument(help="the answer's x-tandem-request-id, or else x-request-id")] = "",
    router: Annotated[str, typer.Option("--router", "--url", help="HOST:PORT of the router's HTTP port")] = HERE[0],
    ladder: Annotated[bool, typer.Option("--ladder", help="the hit ladder of all requests so far")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of tables")] = False,
) -> None:
    from tandem.cli.explain import explain
    from tandem.cli.fleet_client import FleetClient

    explain(request_id, FleetClient(router, build(ProcessConfig, {})), ladder, as_json)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit()


def _tandem(
    # Eager: it is answered before a command is missed.
    version: Annotated[
        bool, typer.Option("--version", help="show the version and end", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a command; all of it is done once it is read."""


def _with_folder(config: W) -> W:
    """The settings with folders in place of the models' names, and the name that was lost by that."""
    name = config.served_model_name or served_name(config.model)
    drafter = None if config.draft_model is None else resolve_drafter(config.draft_model)
    folders = {"model": resolve_model(config.model), "draft_model": drafter}
    return config.model_copy(update={**folders, "served_model_name": name})


def seconds(text: str, flag: str) -> float:
    """A duration of a command line. Raises ConfigError naming the flag."""
    try:
        value = float(str(IN_SECONDS.parse(text)))
    except ValueError as error:
        raise ConfigError(f"{flag}: {error} (got {text!r})") from None
    if value <= 0:
        raise ConfigError(f"{flag}: must be more than 0 (got {text!r})")
    return value


def settings(app: typer.Typer, name: str, text: str, schema: type[S], run: Callable[[S], None]) -> None:
    """Adds a command with the flags of a schema."""
    app.command(name, help=text, epilog=epilog(schema))(command(schema, run))


def make_app() -> typer.Typer:
    """The command tree."""
    app = typer.Typer(
        name="tandem",
        help="A disaggregated LLM serving cluster with a cache-aware router.",
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_tandem)
    settings(app, "up", "Start a whole cluster, on this machine or on Ray.", UpConfig, _up)
    settings(app, "router", "Start one router.", RouterConfig, _router)
    settings(app, "prefill", "Start one prefill worker.", PrefillConfig, _prefill)
    settings(app, "decode", "Start one decode worker.", DecodeConfig, _decode)
    about = "Train a draft head for a model, for speculative decoding."
    settings(app, "train-draft", about, TrainDraftConfig, _train_draft)
    settings(app, "drain", "End one worker once what it has under way is finished.", DrainConfig, _drain)
    app.command("replay", help="Simulate policies on a recorded load.")(replay)
    app.command("doctor", help="Check this machine, or a running cluster, and say how to mend it.")(_doctor)
    app.command("top", help="Watch a running cluster: workers, pairs, queue, first tokens.")(_top)
    app.command("explain", help="Say why a request went where it went, or where cache hits are lost.")(_explain)
    return app


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `tandem` script."""
    status = run(sys.argv[1:] if arguments is None else arguments)
    # Everything is closed. What is left of Python's way out is to take torch apart, which keeps a core busy for a third
    # of a second in each process: a cluster that stops at once would take seconds on a small machine.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(arguments: Sequence[str]) -> int:
    """Runs a command; returns its exit code. Failures that are known are one line on stderr."""
    try:
        app = make_app()
        if (found := find(typer.main.get_command(app), arguments)) is not None:
            print(found)
            return 0
        status = app(arguments, standalone_mode=False, prog_name="tandem")
    except USAGE_ERROR as error:
        _say(error.format_message() if isinstance(error, typer.BadParameter) else str(error))
        return EXIT_SETTINGS
    except (TandemError, OSError) as error:
        _say(str(error))
        codes = {CheckpointError: EXIT_CHECKPOINT, ConfigError: EXIT_SETTINGS}
        return next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_FAILED)
    return int(status or 0)


def _say(text: str) -> None:
    """One line, whatever a library's message looks like."""
    if line := " ".join(text.split()):
        sys.stderr.write(f"tandem: {line}\n")
