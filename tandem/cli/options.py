"""Turns a settings schema into a typer command: one flag for each field, with its type, default and description."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from tandem.cli.groups import group_of, rank
from tandem.config.fields import http_url
from tandem.errors import ConfigError
from tandem.units import quantity_of

S = TypeVar("S", bound=BaseSettings)


def command(schema: type[S], run: Callable[[S], None]) -> Callable[..., None]:
    """A function that typer can register: what has no default is a positional argument, everything else a flag.

    Secrets have none: command lines are for all to see.

    A flag that was not given is left to the environment, the YAML file and the default. Wrong values end with exit
    code 2 and one line that names the flag.
    """

    def invoke(**given: Any) -> None:
        run(build(schema, {name: value for name, value in given.items() if value is not None and value != []}))

    shown = [(name, field) for name, field in schema.model_fields.items() if not is_secret(field)]
    shown.sort(key=lambda each: (not each[1].is_required(), rank(each[0])))
    parameters = [_parameter(name, field) for name, field in shown]
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__doc__ = schema.__doc__
    invoke.schema = schema  # type: ignore[attr-defined]
    return invoke


def build(schema: type[S], given: dict[str, Any]) -> S:
    """The settings, or ConfigError with one line for each wrong one."""
    try:
        return schema(**given)
    except ValidationError as error:
        raise ConfigError("; ".join(_explained(schema, fault) for fault in error.errors())) from None


def _explained(schema: type[BaseSettings], fault: Any) -> str:
    """One of pydantic's complaints, with the name that the setting has on the command line."""
    text = str(fault["msg"]).removeprefix("Value error, ")
    if not fault["loc"]:
        return text
    name = str(fault["loc"][0])
    field = schema.model_fields.get(name)
    if field is None:  # flags and variables are made from the fields: only the YAML file can have others
        return f"--config: the file sets {name}, which is no setting of {(schema.__doc__ or '').strip()}"
    if is_secret(field):
        return f"TANDEM_{name.upper()}: {text}"
    shown = name.upper() if field.is_required() else "--" + name.replace("_", "-")
    untold = fault["type"] == "missing" or any(getattr(each, "func", None) is http_url for each in field.metadata)
    return f"{shown}: {text}" + ("" if untold else f" (got {fault['input']!r})")


def is_secret(field: FieldInfo) -> bool:
    """Whether a setting must not be shown."""
    return "Secret" in str(field.annotation)


def described(field: FieldInfo) -> str:
    """What a setting is, and its default."""
    has_default = not field.is_required() and field.default not in (None, (), "")
    return (field.description or "") + (f" (default: {_shown(field.default)})" if has_default else "")


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    quantity = quantity_of(field.annotation, field.metadata)
    kind: Any
    if field.is_required():
        kind = typer.Argument(help=described(field), show_default=False)
    else:
        kind = typer.Option(
            "--" + name.replace("_", "-"),
            help=described(field),
            show_default=False,
            metavar=None if quantity is None else quantity.metavar,
            rich_help_panel=group_of(name),
        )
    # What may have a unit is the schema's to read.
    annotation = str | None if quantity is not None else _plain(field.annotation)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, kind])


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(annotation: Any) -> Any:
    """What typer should parse; ranges are the schema's to check.

    A choice of words stays one, so that `--help` lists them.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        return _plain(get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return _plain(next(arg for arg in get_args(annotation) if arg is not type(None)))
    if origin is Literal:
        return (annotation if isinstance(get_args(annotation)[0], str) else int) | None
    if origin is tuple:
        return list[str] | None
    if annotation in (int, float, bool, str, Path):
        return annotation | None
    raise TypeError(f"no flag for {annotation!r}")
