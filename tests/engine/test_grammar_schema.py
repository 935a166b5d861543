"""JSON schemas as grammars: no grammar accepts what the schema does not, and what cannot be held to is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import xgrammar

from tandem.engine.grammar.schema.document import Unfit
from tandem.engine.grammar.schema.lower import lower
from tandem.testing.any_schema import any_schema, any_value

COMPILER = xgrammar.GrammarCompiler(
    xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)], xgrammar.VocabType.RAW, stop_token_ids=[0]),
    max_threads=1,
    cache_enabled=False,
)
TEXT: dict[str, Any] = {"type": "string"}
WHOLE: dict[str, Any] = {"type": "integer"}
SCHEMAS, VALUES = 250, 40


def accepts(schema: Any, *values: Any) -> list[bool]:
    grammar = COMPILER.compile_json_schema(json.dumps(lower(schema)), any_whitespace=False)
    found = []
    for value in values:
        matcher = xgrammar.GrammarMatcher(grammar)
        text = json.dumps(value, ensure_ascii=False)
        found.append(matcher.accept_string(text) and matcher.is_completed())
    return found


def test_no_random_schema_accepts_an_invalid_value() -> None:
    served = valid = 0
    for seed in range(SCHEMAS):
        source = random.Random(seed)
        schema = any_schema(source)
        values = [any_value(source, 2) for _ in range(VALUES)]
        try:
            found = accepts(schema, *values)
        except Unfit:
            continue
        served += 1
        checker = jsonschema.Draft202012Validator(schema)
        for value, accepted in zip(values, found, strict=True):
            assert not accepted or checker.is_valid(value), (seed, schema, lower(schema), value)
            valid += accepted
    assert served > SCHEMAS // 3 and valid > 5 * served


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string", "enum": ["a", "abc", 1], "maxLength": 2}, ["a"], ["abc", 1]),
        ({"anyOf": [WHOLE, TEXT], "minimum": 3}, [3, "a"], [2]),
        ({"allOf": [{"maximum": 30}, {"minimum": 20}]}, [25], [35, 15, 19.5]),
        ({"$ref": "#/$defs/a", "maxLength": 1, "$defs": {"a": TEXT}}, ["x"], ["xy", 1]),
        ({"type": "object", "properties": {"a": WHOLE}, "required": ["b"]}, [{"a": 1, "b": None}], [{"a": 1}]),
        ({"properties": {"a": WHOLE}, "allOf": [{"properties": {"a": {"minimum": 2}}}]}, [{"a": 2}], [{"a": 1}]),
        ({"type": "integer", "minimum": 1.5, "multipleOf": 1}, [2], [1]),
        ({"type": "number", "multipleOf": 2}, [2, 40], [1, 1.5]),
        ({"type": "array", "minItems": 1, "maxItems": 2}, [[1], [1, "a"]], [[], [1, 2, 3]]),
        ({"type": "array", "prefixItems": [WHOLE, TEXT], "maxItems": 1}, [[1], []], [[1, "a"], ["a"]]),
        ({"type": "object", "minProperties": 1}, [{"x": 1}], [{}]),
        ({"propertyNames": {"enum": ["a"]}, "type": "object"}, [{"a": 1}, {}], [{"b": 1}]),
        ({"unevaluatedProperties": False, "allOf": [{"properties": {"a": WHOLE}}]}, [{"a": 1}], [{"b": 1}]),
        ({"oneOf": [{"type": "null"}, {"enum": ["a"]}]}, [None, "a"], ["b", 1]),
        ({"pattern": '^"a$', "type": "string"}, ['"a'], ["a"]),
        ({"pattern": "^\\\\\\n$", "type": "string"}, ["\\\n"], ["\\n", "\n"]),
        ({"pattern": r'^\x22\u001b\t"+$', "type": "string"}, ['"\x1b\t""'], ["x"]),
        ({"type": "string", "pattern": "^a{2,3}$", "maxLength": 5}, ["aa"], ["a"]),
        ({"$ref": "#tree", "$defs": {"t": {"$anchor": "tree", "items": {"$ref": "#/$defs/t"}}}}, [[], [[]]], [1]),
        ({"type": "string", "format": "time"}, ["12:00:00Z", "23:59:59.5+01:00"], ["24:00:00Z", "12:00:00"]),
        ({"type": "string", "format": "date"}, ["2024-02-29", "2023-04-30"], ["2023-02-29", "2023-04-31"]),
    ],
)  # fmt: skip
def test_what_xgrammar_would_pass_over_is_held_to(schema: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(accepts(schema, *good)) and not any(accepts(schema, *bad))
    checker = jsonschema.Draft202012Validator(schema)
    assert all(map(checker.is_valid, good))


TAGGED = [
    {"type": "object", "properties": {"kind": {"const": kind}, "x": WHOLE}, "required": ["kind"]} for kind in "ab"
]


def test_alternatives_of_which_exactly_one_holds() -> None:
    assert accepts({"oneOf": TAGGED}, {"kind": "a", "x": 1}, {"kind": "c"}) == [True, False]
    keyed = [{"properties": {name: WHOLE}, "required": [name]} for name in "ab"]
    assert accepts({"oneOf": keyed}, {"a": 1}, {"b": 1}, {"a": 1, "b": 1}) == [True, True, False]
    also = {"oneOf": keyed, "properties": {"a": True, "b": True}}
    with pytest.raises(Unfit, match="/oneOf: its options may overlap"):
        lower(also)
    with pytest.raises(Unfit, match="may overlap"):
        lower({"oneOf": [TEXT, {"minimum": 2}]})  # a text fits the second, too: it says nothing of texts


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"properties": {"a/b": {"not": TEXT}}}, "/properties/a~1b/not: not is not supported"),
        ({"items": {"uniqueItems": True}}, "/items/uniqueItems: uniqueItems is not supported"),
        ({"contains": {}}, "/contains: contains is not supported"),
        ({"if": {}, "then": {}}, "/if: if is not supported"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired is not supported"),
        ({"multipleOf": 0.01}, "multipleOf 0.01 is not supported"),
        ({"multipleOf": 2, "minimum": 0}, "multipleOf beside one of minimum"),
        ({"pattern": "a+", "maxLength": 3}, "maxLength beside pattern"),
        ({"pattern": "^(?!a)"}, "no lookaround"),
        ({"pattern": "a^b"}, "'^' is only supported at the beginning"),
        ({"pattern": "(a$)b"}, "'$' at the end"),
        ({"$ref": "https://example.org/s"}, "$ref to 'https://example.org/s' is not supported"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"$ref": "#"}, "leads to itself"),
        ({"$dynamicRef": "#a"}, "$dynamicRef is not supported"),
        ({"allOf": [TEXT, WHOLE]}, "no value can satisfy it"),
        (False, "no value can satisfy it"),
        ({"required": ["a"], "properties": {"a": {"$ref": "#"}}, "type": "object"}, "no finite value"),
        ({"allOf": [{"anyOf": [{"minimum": i}, {"maximum": i}]} for i in range(20)]}, "more than 256 alternatives"),
        ({"type": "wat"}, 'Unsupported type "wat"'),
        ({"minLength": -1}, "minLength must be a whole number"),
        ({"properties": {"a": 1}}, "a schema must be an object, true or false"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_to_is_refused_by_name(schema: Any, why: str) -> None:
    with pytest.raises(Unfit) as refusal:
        lower(schema)
    assert why in str(refusal.value)


def test_deep_schemas_are_refused_before_anything_recurses() -> None:
    schema: Any = TEXT
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(Unfit, match="more than 64 deep"):
        lower(schema)


@pytest.mark.parametrize("harmless", [{"uniqueItems": False}, {"if": {}}, {"dependentRequired": {"a": []}}, {"x": 1}])
def test_keywords_that_ask_for_nothing_are_taken(harmless: dict[str, Any]) -> None:
    assert accepts({"type": "object", **harmless}, {"b": 1}) == [True]
