"""Every way to ask for structured output becomes the same grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.requests.openai import CompletionBody
from router.requests.structured import grammar_of
from tandem.errors import BadRequest
from tandem.types import Grammar, GrammarKind

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
AS_TEXT = json.dumps(SCHEMA)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar(GrammarKind.JSON_OBJECT)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            Grammar(GrammarKind.JSON_SCHEMA, AS_TEXT),
        ),
        ({"json_schema": AS_TEXT}, Grammar(GrammarKind.JSON_SCHEMA, AS_TEXT)),
        ({"guided_json": SCHEMA}, Grammar(GrammarKind.JSON_SCHEMA, AS_TEXT)),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar(GrammarKind.JSON_SCHEMA, AS_TEXT)),
        ({"regex": "a+"}, Grammar(GrammarKind.REGEX, "a+")),
        ({"guided_regex": "a+"}, Grammar(GrammarKind.REGEX, "a+")),
        ({"ebnf": 'root ::= "a"'}, Grammar(GrammarKind.EBNF, 'root ::= "a"')),
        ({"guided_grammar": 'root ::= "a"'}, Grammar(GrammarKind.EBNF, 'root ::= "a"')),
        ({"guided_choice": ['say "é"', "b\\"]}, Grammar(GrammarKind.EBNF, r'root ::= "say \"é\"" | "b\\"')),
        ({"structured_outputs": {"choice": ["a"]}}, Grammar(GrammarKind.EBNF, 'root ::= "a"')),
        (
            {"response_format": {"type": "structural_tag", "format": {}}},
            Grammar(GrammarKind.STRUCTURAL_TAG, '{"type": "structural_tag", "format": {}}'),
        ),
    ],
)
def test_each_form(fields: dict[str, Any], expected: Grammar | None) -> None:
    assert grammar_of(CompletionBody.model_validate({"prompt": "x", **fields})) == expected


def test_a_schema_in_text_is_as_deep_as_one_in_the_body_may_be() -> None:
    for depth, said in ((100_000, "recursion limit"), (150, "must be a JSON schema")):
        with pytest.raises(BadRequest, match=said) as refused:
            grammar_of(CompletionBody.model_validate({"prompt": "x", "guided_json": "[" * depth + "]" * depth}))
        assert refused.value.param == "guided_json"


@pytest.mark.parametrize(
    ("kind", "key", "made"),
    [("regex", "pattern", GrammarKind.REGEX), ("ebnf", "grammar", GrammarKind.EBNF),
     ("grammar", "grammar", GrammarKind.EBNF)],
)  # fmt: skip
def test_a_format_without_its_text_is_refused_and_not_free(kind: str, key: str, made: GrammarKind) -> None:
    for fields in ({}, {key: None}, {key: ""}, {key: 1}, {kind + "s": "a"}):
        with pytest.raises(BadRequest, match=f"response_format.{key} must be a string") as refused:
            grammar_of(CompletionBody.model_validate({"prompt": "x", "response_format": {"type": kind, **fields}}))
        assert refused.value.param == "response_format"
    asked = {"type": kind, key: "a"}
    assert grammar_of(CompletionBody.model_validate({"prompt": "x", "response_format": asked})) == Grammar(made, "a")
