"""Settings with units: `32K` tokens, `80GiB`, `30s`. Plain numbers have the unit that the setting's name ends in.

One pattern serves the parser and the JSON schema, which other checkers of settings read (a chart's, for instance): what
the one refuses, the other does too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

_WHOLE = "[0-9](?:_?[0-9]){0,17}"
_FRACTION = "[0-9](?:_?[0-9]){0,19}"
NUMBER = rf"(?:{_WHOLE}(?:\.(?:{_FRACTION})?)?|\.{_FRACTION})(?:[eE][+-]?[0-9]{{1,2}})?"
"""As in Python: `.5`, `5.` and `4_000_000`, too."""
THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
"""As other servers have it: `32k` is 32,000 and `32K` 32,768."""
BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BYTES = BINARY | {f"{name}b": size for name, size in (BINARY | DECIMAL).items()}
"""`Gi` is Kubernetes' `GiB`; upper and lower case are the same."""
SECONDS = {
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86_400),
}
SIZES = "[kmgtKMGT][iI][bB]?|[kmgtKMGT][bB]"
TIMES = "us|ms|s|m|h|d"


@dataclass(frozen=True, slots=True, eq=False)
class Quantity:
    """An annotation of a number that may be written with a unit. Put it behind the bounds, which it then obeys."""

    what: str
    """What is expected, with examples; for error messages."""
    metavar: str
    """What `--help` shows for a value."""
    pattern: str
    """Of the texts that are taken, without anchors; in the dialect that JSON Schema, Go and Python share."""
    scale: dict[str, Fraction]
    """Unit (in lower case, unless `cased`) -> how many of the setting's own units it is."""
    cased: bool = False

    def parse(self, value: object) -> object:
        """Numbers of texts with units; all else as it is. Raises ValueError that shows an example."""
        if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(self.what)
        if not isinstance(value, str):
            return value
        if not re.fullmatch(self.pattern, text := value.strip()):
            raise ValueError(self.what)
        parts = re.findall(f"({NUMBER})([a-zA-Z]*)", text)
        total = sum((Fraction(number.replace("_", "")) * self._factor(unit) for number, unit in parts), Fraction(0))
        return int(total) if total.denominator == 1 else float(total)

    def _factor(self, unit: str) -> Fraction:
        return self.scale[unit if self.cased else unit.lower()]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """See pydantic: parses before the number is checked."""
        return core_schema.no_info_before_validator_function(self.parse, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """See pydantic: the number with its bounds, or a text."""
        return {"anyOf": [handler(schema), {"type": "string", "pattern": f"^(?:{self.pattern})$"}]}


def _sizes(unit: int) -> dict[str, Fraction]:
    return {"": Fraction(1)} | {name: Fraction(size, unit) for name, size in BYTES.items()}


def _times(unit: Fraction) -> dict[str, Fraction]:
    return {"": Fraction(1)} | {name: seconds / unit for name, seconds in SECONDS.items()}


def _durations(setting: str, unit: Fraction) -> Quantity:
    what = f"a duration is expected, such as 250ms, 30s, 5m or 1h30m; plain numbers are {setting}"
    return Quantity(what, "<duration>", rf"{NUMBER}|(?:{NUMBER}(?:{TIMES}))+", _times(unit), cased=True)


COUNT = Quantity(
    "a number is expected, such as 32768, 32K or 1.5M; K and M are 1024 and 1024², k and m 1000 and 1000²",
    "<count>",
    f"{NUMBER}[kmgKMG]?",
    {name: Fraction(size) for name, size in THOUSANDS.items()},
    cased=True,
)
"""Of tokens, blocks, connections."""
MEBIBYTES = Quantity(
    "memory is expected, such as 512MiB, 80GiB or 1.5GB; plain numbers are MiB",
    "<memory>",
    f"{NUMBER}(?:{SIZES})?",
    _sizes(1 << 20),
)
"""Of fields that end in `_mib`."""
MEBIBYTES_A_SECOND = Quantity(
    "a rate is expected, such as 256MiB or 1GiB/s; plain numbers are MiB a second",
    "<memory/s>",
    rf"{NUMBER}(?:(?:{SIZES})(?:/s)?)?",
    _sizes(1 << 20),
)
IN_SECONDS = _durations("seconds", Fraction(1))
"""Of fields that end in `_s`."""
IN_MILLISECONDS = _durations("milliseconds", Fraction(1, 1000))
"""Of fields that end in `_ms`."""


def quantity_of(annotation: object, metadata: Sequence[object] = ()) -> Quantity | None:
    """What a field's annotation says of units, wherever it stands in it."""
    found = next((each for each in metadata if isinstance(each, Quantity)), None)
    if found is not None or not (arguments := get_args(annotation)):
        return found
    inner = getattr(annotation, "__metadata__", ())
    return next(filter(None, (quantity_of(each, inner) for each in arguments if not isinstance(each, str))), None)
