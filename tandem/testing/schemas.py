"""Random JSON schemas that a model can be held to: nested objects, arrays, enums, formats, references, unions."""

from __future__ import annotations

import random
from typing import Any

FORMATS = ("date", "time", "uuid", "ipv4")
"""Those whose texts are bounded."""
WORDS = ("red", "green", "blue", "north", "south", "low", "high")


def random_schema(seed: int) -> dict[str, Any]:
    """An object schema; the same for the same seed. Every string and array is bounded, so that texts end."""
    make = random.Random(seed)
    schema = _object(make, 2)
    if make.random() < 0.3:
        schema["$defs"] = {"leaf": _leaf(make)}
        schema["properties"]["shared"] = {"$ref": "#/$defs/leaf"}
        schema["required"].append("shared")
    return schema


def _any(make: random.Random, depth: int) -> dict[str, Any]:
    kind = make.random()
    if depth == 0 or kind < 0.5:
        return _leaf(make)
    if kind < 0.7:
        return _object(make, depth - 1)
    if kind < 0.85:
        low = make.randint(0, 1)
        return {"type": "array", "items": _any(make, depth - 1), "minItems": low, "maxItems": low + make.randint(1, 2)}
    return {"anyOf": [_leaf(make), _object(make, 0)]}


def _object(make: random.Random, depth: int) -> dict[str, Any]:
    names = make.sample(("name", "size", "colour", "parts", "where", "when", "note"), make.randint(1, 3))
    properties = {name: _any(make, depth) for name in names}
    required = [name for name in names if make.random() < 0.8]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _leaf(make: random.Random) -> dict[str, Any]:
    return make.choice(
        [
            {"type": "string", "maxLength": make.randint(1, 12)},
            {"type": "string", "format": make.choice(FORMATS)},
            {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
            {"type": "integer", "minimum": 0, "maximum": make.choice((9, 100, 5000))},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": make.sample(WORDS, make.randint(1, 4))},
            {"const": make.choice(WORDS)},
        ]
    )
