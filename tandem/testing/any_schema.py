"""Random JSON schemas with any keyword in any place, and values that may fit them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

NAMES = ("a", "b", "ab", "c", "x-1")
TYPES: tuple[Any, ...] = (
    "string", "integer", "number", "object", "array", "boolean", "null", ["string", "null"], ["integer", "string"],
    ["object", "array"],
)  # fmt: skip
CONSTANTS: tuple[Any, ...] = (1, 2, 1.5, "a", "b", "aa", None, True, False, 0, {}, [], {"a": 1}, [1])
PATTERNS = ("^a+$", "b", "^[a-c]*$", "^a|b$", "x", "^.$", '^"a$', r"^\w{2}$")


def any_schema(make: random.Random) -> dict[str, Any]:
    """A schema with two definitions to refer to."""
    schema = _schema(make, 2)
    schema = schema if isinstance(schema, dict) else {}
    return {**schema, "$defs": {"p": _schema(make, 1), "q": _schema(make, 1)}}


def any_value(make: random.Random, depth: int) -> Any:
    """A value of at most so many levels of objects and arrays."""
    kind = make.random()
    if depth == 0 or kind < 0.55:
        return make.choice((0, 1, 2, 3, -1, 1.5, 2.5, "", "a", "b", "aa", "ab", "abc", "x", '"a', None, True, False))
    if kind < 0.8:
        return {name: any_value(make, depth - 1) for name in make.sample(NAMES, make.randint(0, 3))}
    return [any_value(make, depth - 1) for _ in range(make.randint(0, 3))]


def _schema(make: random.Random, depth: int) -> Any:
    if make.random() < 0.06:
        return make.choice((True, False, {}))
    flat = (_type, _string, _number, _enum)
    deep = (*flat, _type, _array, _object, _object, _applied, _applied, _reference)
    schema: dict[str, Any] = {}
    for _ in range(make.choice((1, 1, 2, 2, 3))):
        schema |= make.choice(deep if depth else flat)(make, depth - 1)
    return schema


def _type(make: random.Random, depth: int) -> dict[str, Any]:
    return {"type": make.choice(TYPES)}


def _string(make: random.Random, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {make.choice(("minLength", "maxLength")): make.randint(0, 3)}
    return made if make.random() < 0.5 else {"pattern": make.choice(PATTERNS)}


def _number(make: random.Random, depth: int) -> dict[str, Any]:
    bound = make.choice(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
    factor = {"multipleOf": make.choice((1, 2, 3, 1.5))} if make.random() < 0.3 else {}
    return {bound: make.choice((-1, 0, 1, 2, 1.5, 3))} | factor


def _enum(make: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": make.sample(CONSTANTS, make.randint(1, 4))}


def _array(make: random.Random, depth: int) -> dict[str, Any]:
    parts: dict[str, Callable[[], Any]] = {
        "items": lambda: _schema(make, depth),
        "prefixItems": lambda: [_schema(make, depth) for _ in range(make.randint(1, 2))],
        "minItems": lambda: make.randint(0, 2),
        "maxItems": lambda: make.randint(0, 2),
        "uniqueItems": lambda: make.random() < 0.2,
        "unevaluatedItems": lambda: make.random() < 0.5,
    }
    return {name: part() for name, part in parts.items() if make.random() < (0.6 if name == "items" else 0.3)}


def _object(make: random.Random, depth: int) -> dict[str, Any]:
    parts: dict[str, tuple[float, Callable[[], Any]]] = {
        "properties": (0.8, lambda: {name: _schema(make, depth) for name in make.sample(NAMES, make.randint(1, 3))}),
        "required": (0.5, lambda: make.sample(NAMES, make.randint(1, 2))),
        "additionalProperties": (0.5, lambda: make.choice((False, True, _schema(make, depth)))),
        "patternProperties": (0.2, lambda: {make.choice(("^a", "b", "^x-", "^x-[0-9]$")): _schema(make, depth)}),
        "propertyNames": (0.15, lambda: make.choice(({"maxLength": 1}, {"pattern": "^a"}, {"enum": ["a", "b"]}))),
        "minProperties": (0.2, lambda: make.randint(0, 2)),
        "maxProperties": (0.2, lambda: make.randint(0, 2)),
        "unevaluatedProperties": (0.15, lambda: make.choice((False, _schema(make, depth)))),
        "dependentRequired": (0.1, lambda: {"a": ["b"]}),
    }
    return {name: part() for name, (share, part) in parts.items() if make.random() < share}


def _applied(make: random.Random, depth: int) -> dict[str, Any]:
    options = [_schema(make, depth) for _ in range(make.randint(1, 3))]
    return {make.choice(("allOf", "anyOf", "oneOf", "anyOf")): options}


def _reference(make: random.Random, depth: int) -> dict[str, Any]:
    return {"$ref": make.choice(("#/$defs/p", "#/$defs/q", "#"))}
