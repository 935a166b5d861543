"""Makes of any JSON schema (draft 2020-12) one that XGrammar enforces, or says which keyword it cannot hold to.

XGrammar passes over much in silence: whatever stands beside `enum`, `anyOf` or `$ref`, several schemas in `allOf`,
required properties that are not declared, `uniqueItems`, lengths beside a pattern. Here keywords that apply schemas in
place are merged away (`merge.py`), alternatives become one `anyOf` of schemas of one type with only its keywords, and
what remains unenforced is refused. Where a schema leaves open what nobody means, less is allowed than JSON Schema does:
a schema without `type` is of the types that its keywords are about, an object has the declared properties in their
order and no others unless `additionalProperties` says so, and a pattern matches the whole string.
"""

from __future__ import annotations

import math
from typing import Any

from tandem.engine.grammar.schema.document import Document, Schema, Unfit
from tandem.engine.grammar.schema.finite import check_finite
from tandem.engine.grammar.schema.merge import (
    COUNTS,
    OF_TYPE,
    TYPES,
    Flat,
    both,
    closed_form,
    disjoint,
    key_of,
    type_of,
)
from tandem.engine.grammar.schema.numbers import number_fits, number_schema
from tandem.engine.grammar.schema.objects import object_schema
from tandem.engine.grammar.schema.strings import matches, string_schema

MAX_DEPTH = 64
"""Schemas within schemas."""
MAX_ALTERNATIVES = 256
"""Of one place, after `anyOf`, `oneOf` and `allOf` are merged."""
UNENFORCED = (
    "not", "if", "contains", "uniqueItems", "dependentRequired", "dependentSchemas", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
IN_PLACE = ("$ref", "allOf", "anyOf", "oneOf")
KEPT = frozenset().union(*OF_TYPE.values()) - {"items"}


def lower(root: Any) -> Schema:
    """The schema for XGrammar. Raises Unfit naming keyword and place."""
    lowered = _Lowering(Document(root)).whole()
    check_finite(lowered)
    return lowered


class _Lowering:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._names: dict[str, str] = {}
        """Of what references lead to, by its path."""
        self._made: dict[str, Schema] = {}

    def whole(self) -> Schema:
        """The root, and all that it refers to."""
        root = self._required(self._document.root, "", 0)
        todo = dict(self._names)
        while todo:
            for path, name in todo.items():
                self._made[name] = self._required(self._document.at(path, path), path, 0)
            todo = {path: name for path, name in self._names.items() if name not in self._made}
        if not self._made:
            return root
        # A reference at the root is one alternative of one: XGrammar takes no definitions beside it.
        return {**({"anyOf": [root]} if "$ref" in root else root), "$defs": self._made}

    def _required(self, schema: Any, path: str, depth: int) -> Schema:
        lowered = self.schema(schema, path, depth)
        if lowered is None:
            raise Unfit(path, "no value can satisfy it")
        return lowered

    def schema(self, schema: Any, path: str, depth: int) -> Schema | None:
        """One schema; None where no value fits."""
        if depth > MAX_DEPTH:
            raise Unfit("", f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(schema, dict) and "$ref" in schema and not self._constrains(schema, "$ref"):
            return self._reference(schema, path)
        flats = self._flats(schema, path, frozenset(), depth)
        made = [each for flat in flats for each in self._typed(flat, path, depth)]
        unique = list({key_of(each): each for each in made}.values())
        if not unique:
            return None
        return unique[0] if len(unique) == 1 else {"anyOf": unique}

    def _constrains(self, schema: Schema, but: str) -> bool:
        names = KEPT | {*UNENFORCED} | {*IN_PLACE, "type", "enum", "const", "items", "unevaluatedItems"}
        return bool((names | {"unevaluatedProperties"}) - {but} & schema.keys())

    def _reference(self, schema: Any, path: str) -> Schema:
        seen: list[str] = []
        while isinstance(schema, dict) and "$ref" in schema and not self._constrains(schema, "$ref"):
            target = self._document.target(schema["$ref"], path)
            if target in seen:
                raise Unfit(path, f"$ref {schema['$ref']!r} leads to itself")
            seen.append(target)
            schema = self._document.at(target, path)
        return {"$ref": f"#/$defs/{self._names.setdefault(seen[-1], f'd{len(self._names)}')}"}

    # What holds at one place.

    def _flats(self, schema: Any, path: str, within: frozenset[str], depth: int) -> list[Flat]:
        """The alternatives of a schema. within: references that are being followed."""
        if isinstance(schema, bool):
            return [{}] if schema else []
        if not isinstance(schema, dict):
            raise Unfit(path, "a schema must be an object, true or false")
        if depth > MAX_DEPTH:
            raise Unfit("", f"it is nested more than {MAX_DEPTH} deep")
        self._refuse_unenforced(schema, path)
        flats = [_own(schema, path)]
        if "$ref" in schema:
            target = self._document.target(schema["$ref"], path)
            if target in within:
                raise Unfit(path, f"$ref {schema['$ref']!r} leads to itself")
            more = self._flats(self._document.at(target, path), target, within | {target}, depth + 1)
            flats = _product(flats, more, path)
        for index, each in enumerate(_list(schema, "allOf", path)):
            flats = _product(flats, self._flats(each, f"{path}/allOf/{index}", within, depth + 1), path)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                options = [
                    self._flats(each, f"{path}/{name}/{index}", within, depth + 1)
                    for index, each in enumerate(_list(schema, name, path))
                ]
                if name == "oneOf":
                    options = self._exclusive([_product(flats, each, path) for each in options], path, depth)
                flats = _product(flats, [flat for option in options for flat in option], path)
        return [_closed(flat, schema) for flat in flats]

    def _refuse_unenforced(self, schema: Schema, path: str) -> None:
        void = (
            schema.get("not") is False,
            "then" not in schema and "else" not in schema,
            schema.get("minContains") == 0 and "maxContains" not in schema,
            schema.get("uniqueItems") is False or schema.get("maxItems", 2) < 2,
            not any(schema.get("dependentRequired", {}).values())
            or all(set(names) <= set(schema.get("required", ())) for names in schema["dependentRequired"].values()),
            not any(each is not True and each != {} for each in schema.get("dependentSchemas", {}).values()),
            False,
            False,
        )
        for name, harmless in zip(UNENFORCED, void, strict=True):
            if name in schema and not harmless:
                raise Unfit(f"{path}/{name}", f"{name} is not supported")

    def _exclusive(self, options: list[list[Flat]], path: str, depth: int) -> list[list[Flat]]:
        """The options, closed so that no value of one fits another. Raises Unfit where that cannot be shown."""

        def apart(one: Any, other: Any) -> bool:
            sides = [self._flats(each, path, frozenset(), depth + 1) for each in (one, other)]
            return all(disjoint(a, b, apart) for a in sides[0] for b in sides[1])

        closed = [[closed_form(_inferred(flat)) for flat in option] for option in options]
        for index, option in enumerate(closed):
            for other in [*options[:index], *options[index + 1 :]]:
                if not all(disjoint(a, b, apart) for a in option for b in other):
                    why = "its options may overlap, so that 'exactly one' cannot be held to: use anyOf, or tell them"
                    raise Unfit(f"{path}/oneOf", f"{why} apart by type or by a required property with a constant value")
        return closed

    # What is made of it.

    def _typed(self, flat: Flat, path: str, depth: int) -> list[Schema]:
        if "enum" in flat:
            values = [value for value in flat["enum"] if _fits(flat, value, path)]
            return [{"enum": values}] if values else []
        keywords = flat.keys() & frozenset().union(*OF_TYPE.values())
        if "type" not in flat and not keywords:
            return [{}]
        made = []
        for name in sorted(_inferred(flat)["type"]):
            match name:
                case "string":
                    each = string_schema(flat, path)
                case "number":
                    each = number_schema(flat, path)
                case "array":
                    each = self._array(flat, path, depth)
                case "object":
                    each = object_schema(flat, path, lambda schema, where: self.schema(schema, where, depth + 1))
                case _:
                    each = {"type": name}
            made += [] if each is None else [each]
        return made

    def _array(self, flat: Flat, path: str, depth: int) -> Schema | None:
        least, most = flat.get("minItems", 0), flat.get("maxItems")
        firsts = [
            self.schema(each, f"{path}/prefixItems/{index}", depth + 1)
            for index, each in enumerate(flat.get("prefixItems", []))
        ]
        rest = flat.get("items", not firsts or least > len(firsts))
        items = self.schema(rest, f"{path}/items", depth + 1)
        if None in firsts:
            firsts, items = firsts[: firsts.index(None)], None
        if items is None:
            most = len(firsts) if most is None else min(most, len(firsts))
        if most is not None and least > most:
            return None
        if most is not None and most <= len(firsts):
            firsts, items = firsts[:most], None
        made: Schema = {"type": "array", "items": False if items is None else items, "minItems": least}
        return (
            made
            | ({"prefixItems": firsts} if firsts else {})
            | ({"maxItems": most} if most is not None and items is not None else {})
        )


def _own(schema: Schema, path: str) -> Flat:
    """A schema's own keywords."""
    flat: Flat = {name: schema[name] for name in KEPT & schema.keys()}
    for name in COUNTS & flat.keys():
        flat[name] = _whole(flat[name], name, path)
    for name in OF_TYPE["number"] & flat.keys():
        if type_of(flat[name]) != "number":
            raise Unfit(path, f"{name} must be a number")
    for name in ("pattern", "format"):
        if name in flat:
            if not isinstance(flat[name], str):
                raise Unfit(path, f"{name} must be a string")
            flat[name] = [flat[name]]
    for name, kind in (("properties", dict), ("patternProperties", dict), ("required", list), ("prefixItems", list)):
        if name in flat and not isinstance(flat[name], kind):
            raise Unfit(path, f"{name} must be {'an object' if kind is dict else 'a list'}")
    if isinstance(schema.get("items"), list):  # as it was before draft 2020-12
        flat["prefixItems"] = schema["items"]
        flat["items"] = schema.get("additionalItems", True)
    elif "items" in schema:
        flat["items"] = schema["items"]
    if "type" in schema:
        flat |= _type(schema["type"], path)
    if "enum" in schema and (not isinstance(schema["enum"], list) or not schema["enum"]):
        raise Unfit(path, "enum must be a list of values")
    values = [[schema["const"]]] if "const" in schema else []
    values += [schema["enum"]] if "enum" in schema else []
    if values:
        kept = {key_of(value) for value in values[-1]}
        flat["enum"] = [value for value in values[0] if key_of(value) in kept]
    return flat


def _type(named: Any, path: str) -> Flat:
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not names:
        raise Unfit(path, "type must be a name or a list of names")
    for name in names:
        if not isinstance(name, str) or name not in TYPES | {"integer"}:
            raise Unfit(path, f'Unsupported type "{name}"')
    types = frozenset("number" if name == "integer" else name for name in names)
    return {"type": types} | ({"integer": True} if "integer" in names and "number" not in names else {})


def _whole(value: Any, name: str, path: str) -> int:
    if type_of(value) != "number" or value < 0 or not float(value).is_integer():
        raise Unfit(path, f"{name} must be a whole number of at least 0")
    return int(value)


def _list(schema: Schema, name: str, path: str) -> list[Any]:
    value = schema.get(name, [])
    if not isinstance(value, list):
        raise Unfit(path, f"{name} must be a list of schemas")
    return value


def _product(some: list[Flat], others: list[Flat], path: str) -> list[Flat]:
    if len(some) * len(others) > MAX_ALTERNATIVES:
        raise Unfit(path, f"anyOf, oneOf and allOf make more than {MAX_ALTERNATIVES} alternatives")
    pairs = (both(one, other, path) for one in some for other in others)
    return [flat for flat in pairs if flat is not None]


def _closed(flat: Flat, schema: Schema) -> Flat:
    """With what the schema says of properties and items that nothing in it has evaluated."""
    if "unevaluatedProperties" in schema and "additionalProperties" not in flat:
        flat = {**flat, "additionalProperties": schema["unevaluatedProperties"]}
    if "unevaluatedItems" in schema and "items" not in flat:
        flat = {**flat, "items": schema["unevaluatedItems"]}
    return flat


def _inferred(flat: Flat) -> Flat:
    """With the types that its keywords are about, where it names none."""
    if "type" in flat or "enum" in flat:
        return flat
    about = frozenset(name for name, keywords in OF_TYPE.items() if keywords & flat.keys())
    return {**flat, "type": about or TYPES}


def _fits(flat: Flat, value: Any, path: str) -> bool:
    """Whether one of an enum's values fits the keywords beside it. Raises Unfit for those that are not looked at."""
    kind = type_of(value)
    if kind not in flat.get("type", TYPES):
        return False
    if kind == "number":
        return number_fits(flat, value)
    if kind == "string":
        size, least, most = len(value), flat.get("minLength", 0), flat.get("maxLength", math.inf)
        return least <= size <= most and all(matches(each, value, path) for each in flat.get("pattern", ()))
    if kind in OF_TYPE and OF_TYPE[kind] & flat.keys():
        (name, *_) = sorted(OF_TYPE[kind] & flat.keys())
        raise Unfit(path, f"{name} beside an enum or const with an {kind} is not supported")
    return True
