"""`tandem --help=KEYWORD`: the settings that a word finds, with every way to set them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic_settings import BaseSettings

from tandem.cli.groups import group_of
from tandem.cli.options import described, is_secret
from tandem.errors import ConfigError
from tandem.units import quantity_of

FLAG = "--help="
EVERYTHING = "all"
WIDTH = 100
UNITS = (
    "<count> is a number such as 32768, 32K or 1.5M (K is 1024, k is 1000); <memory> a number of MiB, or 512MiB, "
    "80GiB; <duration> a number in the unit that the name ends in, or 250ms, 30s, 5m."
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A setting of one or several commands."""

    name: str
    """As on the command line: `--kv-mib`, `MODEL`; of secrets, which have no flag, the variable."""
    value: str
    group: str
    text: str
    elsewhere: str
    """Other ways to set it."""


def epilog(schema: type[BaseSettings]) -> str:
    """What stands under a command's `--help`: units, and where secrets come from."""
    secrets = [f"TANDEM_{name.upper()}" for name, field in schema.model_fields.items() if is_secret(field)]
    given = f" Secrets have no flag, but variables: {', '.join(secrets)}." if secrets else ""
    return f"{UNITS}{given} `--help=KEYWORD` searches, `--help=all` shows the variables of all settings."


def find(app: Any, arguments: Sequence[str]) -> str | None:
    """What is to be printed, if the command line asks for it. Raises ConfigError when nothing is found.

    app: the command tree as click has it.
    """
    asked = next((each for each in arguments if each.startswith(FLAG)), None)
    if asked is None:
        return None
    chosen = next((each for each in arguments if each in app.commands), None)
    keyword = asked.removeprefix(FLAG).strip()
    where: dict[Entry, list[str]] = {}
    for name, command in app.commands.items():
        if chosen in (None, name):
            for entry in entries(command):
                where.setdefault(entry, []).append(name)
    found = [entry for entry in where if matches(entry, keyword)]
    exact = [entry for entry in found if _bare(entry.name) == _bare(keyword)]
    if not found:
        of = f"tandem {chosen}" if chosen else "tandem"
        groups = ", ".join(dict.fromkeys(entry.group for entry in where))
        raise ConfigError(f"--help: no setting of {of} has to do with {keyword!r}; all shows all, groups are: {groups}")
    return _page({entry: where[entry] if chosen is None else [] for entry in exact or found})


def entries(command: Any) -> Iterator[Entry]:
    """The settings of one command: its schema's, or else its parameters."""
    schema: type[BaseSettings] | None = getattr(command.callback, "schema", None)
    # typer wraps what it was given.
    schema = schema or getattr(getattr(command.callback, "__wrapped__", None), "schema", None)
    if schema is not None:
        yield from _of_schema(schema)
        return
    for param in command.params:
        if (name := max(param.opts, key=len)) != "--help":
            yield Entry(
                name if name.startswith("-") else name.upper(), param.metavar or "", "Options", param.help or "", ""
            )


def _of_schema(schema: type[BaseSettings]) -> Iterator[Entry]:
    for name, field in schema.model_fields.items():
        variable, text = f"TANDEM_{name.upper()}", described(field)
        if is_secret(field):
            yield Entry(variable, "", group_of(name), text, f"{name} in YAML; no flag")
            continue
        shown = name.upper() if field.is_required() else "--" + name.replace("_", "-")
        quantity = quantity_of(field.annotation, field.metadata)
        words = [each for each in get_args(field.annotation) if isinstance(each, str | int)]
        value = quantity.metavar if quantity else "|".join(map(str, words))
        yield Entry(shown, value, group_of(name), text, f"{variable}, {name} in YAML")


def matches(entry: Entry, keyword: str) -> bool:
    """Whether a word finds a setting: in its name, its group or its text."""
    word = keyword.lower()
    if word == EVERYTHING:
        return True
    return _bare(word) in _bare(entry.name) or word in entry.group.lower() or word in entry.text.lower()


def _bare(name: str) -> str:
    """A name however it is written: `--kv-mib`, `kv_mib` and `TANDEM_KV_MIB` are one."""
    return name.lower().lstrip("-").replace("-", "_").removeprefix("tandem_")


def _page(found: dict[Entry, list[str]]) -> str:
    lines: list[str] = []
    for group in dict.fromkeys(entry.group for entry in found):
        lines += ["", group]
        for entry, commands in found.items():
            if entry.group == group:
                of = f"  ({', '.join(commands)})" if commands else ""
                lines.append(f"  {entry.name} {entry.value}".rstrip() + of)
                for text in filter(None, (entry.text, entry.elsewhere)):
                    lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([f"{len(found)} found", *lines, "", *textwrap.wrap(UNITS, WIDTH)])
