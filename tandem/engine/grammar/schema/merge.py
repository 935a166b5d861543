"""Several schemas that hold at the same time, as one: merged until no keyword applies another schema in place.

A merged schema ("flat") has the keywords of a schema with these differences: `type` is a set, `enum` takes in `const`,
`pattern` and `format` are lists, and `integer` tells that numbers must be whole. `allOf`, `anyOf`, `oneOf` and `$ref`
are gone: alternatives are several flat schemas.
"""

from __future__ import annotations

import json
import math
from typing import Any

from tandem.engine.grammar.schema.document import Unfit

Flat = dict[str, Any]

TYPES = frozenset({"null", "boolean", "object", "array", "number", "string"})
LARGER = frozenset({"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"})
SMALLER = frozenset({"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"})
COUNTS = frozenset({"minLength", "minItems", "minProperties", "maxLength", "maxItems", "maxProperties"})
OF_TYPE = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset(
        {"properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
         "maxProperties"}
    ),
}  # fmt: skip
"""Which keywords are about which type."""


def key_of(value: Any) -> str:
    """The same text for values that JSON Schema holds equal."""
    if isinstance(value, float) and value.is_integer():
        return key_of(int(value))
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{json.dumps(name)}:{key_of(each)}" for name, each in value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(key_of, value)) + "]"
    return json.dumps(value)


def both(one: Flat, other: Flat, path: str) -> Flat | None:
    """What holds where both do; None where nothing can. Raises Unfit."""
    merged = {**one, **other}
    for name in one.keys() & other.keys():
        first, second = one[name], other[name]
        match name:
            case "type":
                merged[name] = first & second
                if not merged[name]:
                    return None
            case "enum":
                keys = {key_of(value) for value in second}
                merged[name] = [value for value in first if key_of(value) in keys]
                if not merged[name]:
                    return None
            case "pattern" | "format":
                merged[name] = [*first, *(each for each in second if each not in first)]
            case "multipleOf":
                merged[name] = _common_multiple(first, second, path)
            case "required":
                merged[name] = [*first, *(each for each in second if each not in first)]
            case "propertyNames" | "items":
                merged[name] = {"allOf": [first, second]}
            case _ if name in LARGER:
                merged[name] = max(first, second)
            case _ if name in SMALLER:
                merged[name] = min(first, second)
    if OF_TYPE["object"] & one.keys() and OF_TYPE["object"] & other.keys():
        merged |= _objects(one, other, path)
    if {"items", "prefixItems"} & one.keys() and {"items", "prefixItems"} & other.keys():
        merged |= _arrays(one, other)
    return merged


def _common_multiple(first: float, second: float, path: str) -> float:
    if first == second:
        return first
    if float(first).is_integer() and float(second).is_integer():
        return math.lcm(int(first), int(second))
    raise Unfit(path, "several multipleOf that are not whole are not supported")


def _objects(one: Flat, other: Flat, path: str) -> Flat:
    merged: Flat = {}
    for name in ("additionalProperties", "patternProperties"):
        if name in one or name in other:
            differ = one.get(name) != other.get(name)
            if differ and ("patternProperties" in one or "patternProperties" in other):
                raise Unfit(path, "patternProperties cannot be combined with another schema of the same object")
    extra = [side["additionalProperties"] for side in (one, other) if "additionalProperties" in side]
    if extra:
        merged["additionalProperties"] = extra[0] if len(extra) == 1 else {"allOf": extra}
        if False in extra:
            merged["additionalProperties"] = False
    if "properties" in one or "properties" in other:
        properties: dict[str, Any] = {}
        sides = (one.get("properties", {}), one), (other.get("properties", {}), other)
        for name in [*sides[0][0], *(name for name in sides[1][0] if name not in sides[0][0])]:
            said = [has[name] if name in has else side.get("additionalProperties", True) for has, side in sides]
            said = [each for each in said if each is not True]
            properties[name] = said[0] if len(said) == 1 else {"allOf": said} if said else True
        merged["properties"] = properties
    return merged


def _arrays(one: Flat, other: Flat) -> Flat:
    firsts = one.get("prefixItems", []), other.get("prefixItems", [])
    rests = one.get("items", True), other.get("items", True)

    def at(side: int, index: int) -> Any:
        return firsts[side][index] if index < len(firsts[side]) else rests[side]

    merged: Flat = {"prefixItems": [{"allOf": [at(0, i), at(1, i)]} for i in range(max(map(len, firsts)))]}
    if "items" in one or "items" in other:
        merged["items"] = {"allOf": list(rests)}
    return merged


def disjoint(one: Flat, other: Flat, same: Any) -> bool:
    """Whether no value can fit both, as far as that is plain. same(a, b): the same of two schemas of a property."""
    if "enum" in one and "enum" in other:
        return not {key_of(value) for value in one["enum"]} & {key_of(value) for value in other["enum"]}
    types = [_types(side) for side in (one, other)]
    if not types[0] & types[1]:
        return True
    if types[0] & types[1] == {"number"} and _apart(one, other):
        return True
    if types[0] & types[1] != {"object"} or "enum" in one or "enum" in other:
        return False
    return any(_told_apart(*pair, same) for pair in ((one, other), (other, one)))


def closed_form(flat: Flat) -> Flat:
    """With the properties alone that it declares, where it declares some and says nothing of others."""
    if flat.get("type") != frozenset({"object"}) or "additionalProperties" in flat or "patternProperties" in flat:
        return flat
    if not flat.get("properties"):
        return flat
    declared = dict.fromkeys(flat.get("required", ()), True) | flat["properties"]
    return {**flat, "properties": declared, "additionalProperties": False}


def _types(flat: Flat) -> frozenset[str]:
    if "enum" in flat:
        return frozenset(type_of(value) for value in flat["enum"])
    return flat.get("type") or TYPES


def _apart(one: Flat, other: Flat) -> bool:
    for low, high in ((one, other), (other, one)):
        if low.get("maximum", math.inf) < high.get("minimum", -math.inf):
            return True
        if low.get("exclusiveMaximum", math.inf) <= high.get("minimum", -math.inf):
            return True
        if low.get("maximum", math.inf) <= high.get("exclusiveMinimum", -math.inf):
            return True
    return False


def _told_apart(one: Flat, other: Flat, same: Any) -> bool:
    """Whether a property that `one` requires cannot be in `other` with such a value."""
    for name in one.get("required", ()):
        mine = one.get("properties", {}).get(name, True)
        declared = other.get("properties", {})
        if name in declared:
            if same(mine, declared[name]):
                return True
        elif other.get("additionalProperties") is False and "patternProperties" not in other:
            return True
    return False


def type_of(value: Any) -> str:
    """The type of a value, `number` for integers, too."""
    names = ((bool, "boolean"), ((int, float), "number"), (str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in names if isinstance(value, kind)), "null")
