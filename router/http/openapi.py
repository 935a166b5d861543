"""The OpenAPI document of the router, at /openapi.json: every route, field and answer that there is, and no other.

Request bodies come from the models that validate them. A test sends what the document allows, and what it does not, and
holds every answer against it.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from router.answers.responses import Json
from router.requests.fields import IGNORED, INERT
from router.requests.openai import (
    MAX_STOP_CHARS,
    MAX_STOPS,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
)
from tandem import __version__

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
REF = "#/components/schemas/"

STRING: Json = {"type": "string"}
INTEGER: Json = {"type": "integer"}
NUMBER: Json = {"type": "number"}
ANY: Json = {}
NULL: Json = {"type": "null"}
IDS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}


def _between(low: float, high: float, low_too: bool = True) -> Json:
    least = {"minimum": low} if low_too else {"exclusiveMinimum": low}
    return {"anyOf": [{"type": "number", "maximum": high} | least, NULL]}


SOME: Json = {"type": "string", "minLength": 1}
PROMPT_IDS: Json = IDS | {"minItems": 1}
PROMPTS: Json = _array({"anyOf": [STRING, PROMPT_IDS]}) | {"minItems": 1, "maxItems": 128}
STOP: Json = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
TEXT_PART: Json = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": STRING},
    "required": ["type", "text"],
}
FUNCTION: Json = {"type": "object", "properties": {"name": STRING}, "required": ["name"]}
TOOL: Json = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": FUNCTION},
    "required": ["type", "function"],
}
FORMAT: Json = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema", "structural_tag", "regex", "ebnf", "grammar"]}
    },
    "required": ["type"],
}
FIELDS: dict[str, Json] = {
    "prompt": {
        "anyOf": [STRING, PROMPT_IDS, _array({"anyOf": [STRING, PROMPT_IDS]}) | {"minItems": 1, "maxItems": 128}]
    },
    "stop": {"anyOf": [STOP, _array(STOP) | {"maxItems": MAX_STOPS}, NULL]},
    "temperature": _between(0, 100),
    "top_p": _between(0, 1, low_too=False),
    "min_p": _between(0, 1),
    "frequency_penalty": _between(-2, 2),
    "presence_penalty": _between(-2, 2),
    "repetition_penalty": _between(0, 10, low_too=False),
    "response_format": {"anyOf": [FORMAT, NULL]},
    "tools": {"anyOf": [_array(TOOL), NULL]},
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required", None]}, TOOL]},
    "guided_choice": {"anyOf": [_array(SOME) | {"minItems": 1}, NULL]},
    "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
    "content": {"anyOf": [STRING, _array(TEXT_PART), NULL]},
}
FIELDS |= {name: {"anyOf": [SOME, NULL]} for name in ("regex", "ebnf", "guided_regex", "guided_grammar")}
"""Schemas of fields that are validated by hand."""

STATUSES = {
    400: "The request is wrong; `param` names the field.",
    401: "No API key, or one that is not known.",
    404: "What the path or `model` names is not here.",
    413: "The body is too large.",
    429: "A limit was reached; `retry-after` says when to come back.",
    500: "A defect of the router's.",
    502: "The worker that had the request died.",
    503: "Nothing can serve this now; `retry-after` says when to come back.",
}
READY = "Whether a request could be served now"
READING = (401, 500)
PARSING = (400, 401, 404, 413, 429, 500, 503)
WORKING = (400, 401, 404, 413, 429, 500, 502, 503)


def document(title: str, keys: bool, model: str | None = None) -> Json:
    """The whole document. keys: whether requests need an API key. model: the name served, when it is known."""
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": _paths(keys),
        "components": {"schemas": _schemas(model), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _paths(keys: bool) -> Json:
    def post(body: str, answer: str, summary: str, statuses: tuple[int, ...], streams: bool = False) -> Json:
        content = {JSON: {"schema": _ref(body)}}
        operation = _operation(summary, {JSON: _ref(answer)} | ({EVENTS: STRING} if streams else {}), statuses, keys)
        return {"post": operation | {"requestBody": {"required": True, "content": content}}}

    def get(content: Json, summary: str, statuses: tuple[int, ...], path: str = "", locked: bool = False) -> Json:
        operation = _operation(summary, content, statuses, locked and keys)
        if path:
            operation["parameters"] = [{"name": path, "in": "path", "required": True, "schema": STRING}]
        return {"get": operation}

    return {
        "/v1/chat/completions": post("ChatBody", "ChatCompletion", "Go on with a conversation", WORKING, True),
        "/v1/completions": post("CompletionBody", "Completion", "Go on with texts", WORKING, True),
        "/v1/models": get({JSON: _ref("ModelList")}, "Models served", READING, locked=True),
        "/v1/models/{name}": get({JSON: _ref("Model")}, "One model", (*READING, 404, 503), "name", True),
        "/v1/explain/{id}": get({JSON: _ref("Explanation")}, "Why a request went there", (*READING, 404), "id", True),
        "/tokenize": post("TokenizeBody", "Tokens", "Token ids of a text or of messages", PARSING),
        "/detokenize": post("DetokenizeBody", "Text", "Text of token ids", PARSING),
        "/health": get({JSON: _ref("State")}, "Whether the process lives", (500,)),
        "/ready": get({JSON: _ref("State")}, READY, (500,)),
        "/metrics": get({TEXT: STRING}, "For Prometheus", READING, locked=True),
        "/metrics/{page}": get({TEXT: STRING, JSON: ANY}, "More for Prometheus", (*READING, 404), "page", True),
        "/openapi.json": get({JSON: ANY}, "This document", (500,)),
    }


def _operation(summary: str, content: Json, statuses: tuple[int, ...], keys: bool) -> Json:
    answers: Json = {
        "200": {"description": "As asked.", "content": {kind: {"schema": s} for kind, s in content.items()}}
    }
    for status in statuses:
        answers[str(status)] = {"description": STATUSES[status], "content": {JSON: {"schema": _ref("Error")}}}
    if summary == READY:
        answers["503"] = {"description": "Not now.", "content": {JSON: {"schema": _ref("State")}}}
    for code, answer in answers.items():
        answer["headers"] = _headers(code)
    return {"summary": summary, "responses": answers} | ({"security": [{"key": []}]} if keys else {})


def _headers(status: str) -> Json:
    names = {"x-request-id": True}
    if status in ("429", "503"):
        names["retry-after"] = False
    if status == "401":
        names["www-authenticate"] = True
    return {name: {"required": needed, "schema": STRING} for name, needed in names.items()}


def _ref(name: str) -> Json:
    return {"$ref": REF + name}


def _schemas(served: str | None) -> Json:
    found: Json = {}
    for model in (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody):
        found |= _body(model, served)
    return found | _answers()


def _body(model: type[BaseModel], served: str | None) -> Json:
    schema = model.model_json_schema(ref_template=REF + "{model}")
    found: Json = schema.pop("$defs", {})
    found |= {model.__name__: schema}
    for each in found.values():
        properties: dict[str, Any] = each["properties"]
        properties |= {name: FIELDS[name] for name in properties.keys() & FIELDS.keys()}
    properties = schema["properties"]
    if model is TokenizeBody:
        properties["prompt"] = {"anyOf": [STRING, NULL]}
        schema["oneOf"] = [{"required": ["prompt"]}, {"required": ["messages"]}]
    if served is not None:
        properties["model"] = {"enum": [served, None]}
    if issubclass(model, GenerationBody):
        schema["additionalProperties"] = False
        properties |= {name: {"enum": [None, *inert]} for name, inert in model.not_served.items()}
        properties |= {name: ANY for name in IGNORED if name not in properties}
        properties |= {name: {"enum": [None, *INERT[name]]} for name in INERT if name not in properties}
    return found


def _object(required: dict[str, Json], optional: dict[str, Json] | None = None) -> Json:
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, NULL]}


def _answers() -> Json:
    usage = _object(
        {
            "prompt_tokens": INTEGER,
            "completion_tokens": INTEGER,
            "total_tokens": INTEGER,
            "prompt_tokens_details": _object({"cached_tokens": INTEGER}),
        },
        {"completion_tokens_details": _object({"reasoning_tokens": INTEGER})},
    )
    stop: Json = {"stop_reason": {"type": ["string", "integer", "null"]}}
    index: Json = {"index": INTEGER, "finish_reason": {"enum": ["stop", "length", "tool_calls"]}}
    scores = _array({"anyOf": [NULL, {"type": "object"}]})
    message = _object(
        {"role": {"const": "assistant"}, "content": _or_null(STRING)},
        {"refusal": NULL, "reasoning_content": _or_null(STRING), "tool_calls": _or_null(_array({"type": "object"}))},
    )
    chat = _object(index | {"message": message, "logprobs": _or_null({"type": "object"})}, stop)
    text = _object(
        index | {"text": STRING, "logprobs": _or_null({"type": "object"})}, stop | {"prompt_logprobs": scores}
    )

    def completion(kind: str, choice: Json, optional: dict[str, Json]) -> Json:
        head = {"id": STRING, "object": {"const": kind}, "created": INTEGER, "model": STRING}
        return _object(head | {"system_fingerprint": STRING, "choices": _array(choice), "usage": usage}, optional)

    card = {"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING}
    error = {"message": STRING, "type": STRING, "param": _or_null(STRING), "code": _or_null(STRING)}
    tokens = {"count": INTEGER, "max_model_len": INTEGER, "tokens": IDS}
    return {
        "Error": _object({"error": _object(error)}),
        "ChatCompletion": completion("chat.completion", chat, {"prompt_logprobs": scores}),
        "Completion": completion("text_completion", text, {}),
        "Model": _object(card | {"max_model_len": INTEGER}),
        "ModelList": _object({"object": {"const": "list"}, "data": _array(_ref("Model"))}),
        "Tokens": _object(tokens, {"token_strs": _array(STRING)}),
        "Text": _object({"prompt": STRING}),
        "State": _object({"status": STRING}, {"reason": STRING}),
        "Explanation": _object(
            {"object": {"const": "tandem.explanation"}, "id": STRING, "requests": _array(_ref("Story"))}
        ),
        "Story": _story(),
    }


def _story() -> Json:
    worker = _or_null(_object({"id": STRING}, {"address": _or_null(STRING)}))
    number, integer = _or_null(NUMBER), _or_null(INTEGER)
    counts = ("decode_cached_tokens", "decode_matched_blocks", "prefill_cached_tokens", "prefill_matched_blocks")
    candidate = _object(
        {"decode": worker, "prefill": worker, "cost": NUMBER}
        | {"costs": {"type": "object", "additionalProperties": NUMBER}}
        | dict.fromkeys(counts, INTEGER)
    )
    attempt = _object(
        {"at_ms": NUMBER, "policy": STRING, "workers_matched": INTEGER, "best_match_tokens": INTEGER}
        | {"refusal": _or_null(STRING), "candidates": _array(candidate)}
    )
    predicted = {"cached_tokens": INTEGER, "decode_cached_tokens": INTEGER}
    happened = dict.fromkeys(("cached_tokens_at_start", "cached_tokens", "decode_cached_tokens"), integer)
    happened |= dict.fromkeys(("hand_over_ms", "accepted_ms", "first_token_ms", "end_ms"), number)
    happened |= {"state": STRING, "moved_tokens": integer, "completion_tokens": INTEGER, "finish": _array(STRING)}
    copy = _object(
        {"source": worker, "target": worker, "state": STRING, "error": _or_null(STRING), "ms": NUMBER}
        | {"terms": {"type": "object", "additionalProperties": NUMBER}}
        | dict.fromkeys(("tokens", "moved_tokens", "bytes"), INTEGER)
    )
    return _object(
        {
            "id": STRING,
            "received": NUMBER,
            "prompt_tokens": INTEGER,
            "max_tokens": INTEGER,
            "choices": INTEGER,
            "attempts": _array(attempt),
            "copies": _array(copy),
            "predicted": _or_null(_object(predicted | {"first_token_ms": number, "hand_over_ms": number})),
            "happened": _object(happened | {"error": _or_null(STRING), "prefill": worker, "decode": worker}),
        }
    )
