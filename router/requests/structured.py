"""What an answer's text must be: `response_format`, and the fields by which vLLM and SGLang ask for the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

from router.requests.openai import GenerationBody, plain_text
from tandem.errors import BadRequest
from tandem.types import MAX_GRAMMAR_BYTES, Grammar, GrammarKind, TokenIds

MAX_CHOICE_TEXTS = 1024

JSON_OBJECT = Grammar(GrammarKind.JSON_OBJECT)


def grammar_of(body: GenerationBody, after: TokenIds = ()) -> Grammar | None:
    """The grammar that a request asks for; None leaves the text free.

    after: see `Grammar.after`. Raises BadRequest naming the field; whether the grammar compiles is the decode worker's
    to say.
    """
    found = {name: made for name, read in FIELDS.items() if (made := read(getattr(body, name), name)) is not None}
    if len(found) > 1:
        first, second, *_ = found
        raise BadRequest(f"{second} and {first} exclude each other: a text has one grammar", second)
    for name, (kind, source) in found.items():
        if len(source.encode()) > MAX_GRAMMAR_BYTES:
            raise BadRequest(f"{name} has {len(source.encode())} bytes; at most {MAX_GRAMMAR_BYTES} are allowed", name)
        return Grammar(kind, source, after)
    return None


def grammar_field(body: GenerationBody) -> str | None:
    """Where a request that `grammar_of` takes asks for its grammar."""
    asked = [name for name in FIELDS if getattr(body, name) is not None and getattr(body, name) != {"type": "text"}]
    return asked[0] if asked else None


Read = tuple[GrammarKind, str] | None


def _response_format(value: Any, field: str) -> Read:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "text":
            return None
        case "json_object":
            return GrammarKind.JSON_OBJECT, ""
        case "json_schema":
            schema = value.get("json_schema")
            if not isinstance(schema, dict) or "schema" not in schema:
                raise BadRequest(f"{field}.json_schema must be an object with a 'schema'", field)
            return _schema(schema["schema"], f"{field}.json_schema.schema", field)
        case "structural_tag":
            return GrammarKind.STRUCTURAL_TAG, _json(value, field)
        case "regex":
            return GrammarKind.REGEX, _named_text(value, "pattern", field)
        case "ebnf" | "grammar":
            return GrammarKind.EBNF, _named_text(value, "grammar", field)
    kinds = "text, json_object, json_schema, structural_tag, regex, ebnf"
    raise BadRequest(f"{field}.type must be one of {kinds}", field)


def _named_text(value: dict[str, Any], name: str, field: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise BadRequest(f"{field}.{name} must be a string that is not empty", field)
    return plain_text(text, field)


def _any_schema(value: Any, field: str) -> Read:
    return None if value is None else _schema(value, field, field)


def _schema(value: Any, where: str, field: str) -> Read:
    """A schema as an object, or as JSON text."""
    if isinstance(value, str):
        try:
            value = from_json(value)  # which bounds the depth
        except ValueError as error:
            raise BadRequest(f"{where} is not JSON: {error}", field) from None
    if not isinstance(value, dict | bool):
        raise BadRequest(f"{where} must be a JSON schema: an object, true or false", field)
    return GrammarKind.JSON_SCHEMA, _json(value, field)


def _json(value: Any, field: str) -> str:
    return plain_text(json.dumps(value, ensure_ascii=False), field)


def _text(kind: GrammarKind) -> Callable[[Any, str], Read]:
    def read(value: Any, field: str) -> Read:
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            raise BadRequest(f"{field} must be a string that is not empty", field)
        return kind, plain_text(value, field)

    return read


def _choices(value: Any, field: str) -> Read:
    if value is None:
        return None
    texts = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
    if not texts or not 1 <= len(value) <= MAX_CHOICE_TEXTS:
        raise BadRequest(f"{field} must be a list of 1 to {MAX_CHOICE_TEXTS} strings that are not empty", field)
    alternatives = " | ".join(json.dumps(plain_text(text, field), ensure_ascii=False) for text in value)
    return GrammarKind.EBNF, f"root ::= {alternatives}"


VLLM_FORMS: dict[str, Callable[[Any, str], Read]] = {
    "json": _any_schema,
    "regex": _text(GrammarKind.REGEX),
    "choice": _choices,
    "grammar": _text(GrammarKind.EBNF),
    "json_object": lambda value, _: (GrammarKind.JSON_OBJECT, "") if value is True else None,
    "structural_tag": lambda value, field: None if value is None else _tag(value, field),
}
"""What `structured_outputs` may hold, one of them."""


def _tag(value: Any, field: str) -> Read:
    if isinstance(value, str):
        return GrammarKind.STRUCTURAL_TAG, plain_text(value, field)
    return GrammarKind.STRUCTURAL_TAG, _json(value, field)


def _structured_outputs(value: Any, field: str) -> Read:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadRequest(f"{field} must be an object", field)
    for name, each in value.items():
        if name not in VLLM_FORMS and each not in (None, False):
            raise BadRequest(f"{field}.{name[:80]} is not supported: it takes {', '.join(VLLM_FORMS)}", field)
    found = [
        made for name, read in VLLM_FORMS.items() if (made := read(value.get(name), f"{field}.{name}")) is not None
    ]
    if len(found) != 1:
        raise BadRequest(f"{field} must have exactly one of {', '.join(VLLM_FORMS)}", field)
    return found[0]


FIELDS: dict[str, Callable[[Any, str], Read]] = {
    "response_format": _response_format,
    "json_schema": _any_schema,
    "regex": _text(GrammarKind.REGEX),
    "ebnf": _text(GrammarKind.EBNF),
    "guided_json": _any_schema,
    "guided_regex": _text(GrammarKind.REGEX),
    "guided_choice": _choices,
    "guided_grammar": _text(GrammarKind.EBNF),
    "structured_outputs": _structured_outputs,
}
"""OpenAI's field first, then SGLang's, then vLLM's."""
