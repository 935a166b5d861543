"""Typed access to the JSON files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.errors import CheckpointError

MOST = 2**31 - 1
"""The largest integer that any field may hold."""


def _is_number(value: object, low: float) -> bool:
    """JSON as Python reads it also has NaN, infinity and integers beyond any float: they are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low < value < 1e30


class Fields:
    """Typed access to one JSON object of a checkpoint; raises CheckpointError naming file, field and what is wrong."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    @classmethod
    def read(cls, path: Path) -> Fields:
        """Parses a JSON file that holds one object."""
        try:
            raw = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path} holds a {type(raw).__name__}; an object is needed")
        return cls(raw, str(path))

    def over(self, **defaults: Any) -> Fields:
        """The same fields, with values for those that are missing; a field that is there and null stays null."""
        return Fields(defaults | self.raw, self.where)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.raw.get(name) is not None

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = MOST) -> int:
        """An integer from `low` to `high`; required when there is no default."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            most = f" and at most {high}" if isinstance(value, int) and value > high else ""
            raise self._wrong(name, value, f"an integer of at least {low}{most}")
        return value

    def number(self, name: str, default: float | None = None, low: float = 0.0) -> float:
        """A finite number greater than `low`, unless it is the default."""
        value = self._value(name, default)
        if not _is_number(value, low) and (value != default or isinstance(value, bool)):
            raise self._wrong(name, value, f"a number greater than {low:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def optional_number(self, name: str) -> float | None:
        """A number greater than 0, or None where the field is null or missing."""
        return self.number(name) if self.has(name) else None

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of exactly `count` numbers greater than 0."""
        value = self._value(name, None)
        items = value if isinstance(value, list) else []
        if len(items) != count or not all(_is_number(item, 0.0) for item in items):
            raise self._wrong(name, value, f"a list of {count} numbers greater than 0")
        return tuple(float(item) for item in items)

    def choices(self, name: str, allowed: Sequence[Any], count: int) -> tuple[Any, ...] | None:
        """The first `count` items of a list, each one of `allowed`; None where the field is null or missing."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < count or any(item not in allowed for item in value[:count]):
            names = ", ".join(map(str, allowed))
            raise self._wrong(name, value, f"a list of {count}, one for each layer, of {names}")
        return tuple(value[:count])

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id or a list of ids; empty when the field is missing."""
        value = self.raw.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
            raise self._wrong(name, value, "a token id or a list of token ids")
        return tuple(ids)

    def nested(self, name: str) -> Fields | None:
        """The object under `name`; None when it is missing."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Fields(value, f"{self.where}: {name}")

    def unsupported(self, name: str, why: str) -> CheckpointError:
        """The error for a field whose value is valid but not served."""
        return CheckpointError(f"{self.where}: {name} is {self.raw.get(name)!r}: {why}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self.where}: {name} is missing")
        return default if value is None else value

    def _wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {value!r}; {expected} is needed")
