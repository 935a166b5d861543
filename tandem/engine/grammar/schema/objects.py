"""The schema of objects."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tandem.engine.grammar.schema.document import Schema, Unfit, escaped
from tandem.engine.grammar.schema.merge import Flat
from tandem.engine.grammar.schema.strings import literal_start, matches, said

Lower = Callable[[Any, str], Schema | None]


def object_schema(flat: Flat, path: str, lower: Lower) -> Schema | None:
    """The schema of objects for merged keywords; None when there is no such object. Raises Unfit.

    lower: of a schema and its path, as XGrammar takes it; None where no value fits.
    """
    patterns = _patterns(flat, path, lower)
    extra = _extra(flat, path, lower)
    names = _names(flat, path, lower)
    properties = _declared(flat, path, lower, names, extra)
    for name in flat.get("required", []):
        if name not in properties and name not in flat.get("properties", {}) and _fits(names, name, path):
            if extra is not None:
                properties[name] = extra
            elif "additionalProperties" not in flat and not patterns:
                properties[name] = {}
        if name not in properties:
            return None
    if names is None:
        extra = None
    elif "enum" in names and extra is not None:
        properties = dict.fromkeys(names["enum"], extra) | properties
        extra = None
    elif names and extra is not None and properties:
        why = "propertyNames beside properties or required is only supported with additionalProperties false"
        raise Unfit(f"{path}/propertyNames", why)
    return _assembled(flat, properties, patterns, extra, names or {})


def _assembled(
    flat: Flat, properties: dict[str, Schema], patterns: dict[str, Schema], extra: Schema | None, names: Schema
) -> Schema | None:
    required = flat.get("required", [])
    least, most = flat.get("minProperties", 0), flat.get("maxProperties")
    closed = extra is None and not patterns
    if (closed and least > len(properties)) or (most is not None and max(least, len(required)) > most):
        return None
    made: Schema = {"type": "object", "properties": properties, "required": required}
    made["additionalProperties"] = False if extra is None else extra
    if patterns:
        made["patternProperties"] = patterns
    if names and extra is not None:
        made["propertyNames"] = names
    if least > len(required):
        made["minProperties"] = least
    if most is not None and not (closed and most >= len(properties)):
        made["maxProperties"] = most
    return made


def _extra(flat: Flat, path: str, lower: Lower) -> Schema | None:
    """What properties that are not declared may be; None when there are none."""
    declares = bool(flat.get("properties") or flat.get("patternProperties"))
    allowed = flat.get("additionalProperties", not declares)
    extra = lower(allowed, f"{path}/additionalProperties")
    if extra is not None and flat.get("patternProperties"):
        why = "patternProperties is only supported with additionalProperties false"
        raise Unfit(f"{path}/patternProperties", why)
    return extra


def _patterns(flat: Flat, path: str, lower: Lower) -> dict[str, Schema]:
    patterns = flat.get("patternProperties", {})
    where = f"{path}/patternProperties"
    starts = [literal_start(pattern) for pattern in patterns]
    for index, start in enumerate(starts):
        if any(not start or start.startswith(other) or other.startswith(start) for other in starts[index + 1 :]):
            raise Unfit(where, "several patterns are only supported if each begins with '^' and a text of its own")
    for name in flat.get("properties", {}):
        if any(matches(pattern, name, where) for pattern in patterns):
            raise Unfit(where, f"the declared property {name!r} matches a pattern; this is not supported")
    if patterns and "propertyNames" in flat:
        raise Unfit(where, "patternProperties beside propertyNames is not supported")
    made = {said(pattern, where): lower(schema, f"{where}/{escaped(pattern)}") for pattern, schema in patterns.items()}
    return {pattern: schema for pattern, schema in made.items() if schema is not None}


def _names(flat: Flat, path: str, lower: Lower) -> Schema | None:
    """What names may be; an empty schema allows all, None no name at all."""
    if "propertyNames" not in flat:
        return {}
    return lower({"allOf": [{"type": "string"}, flat["propertyNames"]]}, f"{path}/propertyNames")


def _fits(names: Schema | None, name: str, path: str) -> bool:
    if names is None:
        return False
    if "anyOf" in names:
        return any(_fits(each, name, path) for each in names["anyOf"])
    if "enum" in names:
        return name in names["enum"]
    if "format" in names or "$ref" in names:
        raise Unfit(f"{path}/propertyNames", "format and $ref are not supported here")
    if "pattern" in names:
        return re.fullmatch(names["pattern"].removeprefix("^").removesuffix("$"), name) is not None
    return bool(names.get("minLength", 0) <= len(name) <= names.get("maxLength", len(name)))


def _declared(flat: Flat, path: str, lower: Lower, names: Schema | None, extra: Schema | None) -> dict[str, Schema]:
    properties: dict[str, Schema] = {}
    for name, schema in flat.get("properties", {}).items():
        where = f"{path}/properties/{escaped(name)}"
        made = lower(schema, where) if _fits(names, name, path) else None
        if made is not None:
            properties[name] = made
        elif extra is not None:
            raise Unfit(where, "a property that must not be there is only supported with additionalProperties false")
    return properties
