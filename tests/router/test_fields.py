"""What becomes of each field of a request is written down."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from router.requests.fields import IGNORED, INERT
from router.requests.openai import ChatBody, CompletionBody, StreamOptions, parse
from tandem.errors import BadRequest

FIELDS = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *StreamOptions.model_fields, *IGNORED, *INERT})


def test_every_field_is_in_the_compatibility_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
    section = text[text.index("\n## Fields\n") :].split("\n## ", 2)[1]
    assert [field for field in FIELDS if f"`{field}`" not in section] == []
    known = {*FIELDS, "null", "text", "developer", "system", "max_token"}
    named = re.findall(r"`([a-z_]+)`", section.split("Any other field")[0])
    assert sorted(set(named) - known) == []


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_ignored_fields_may_say_anything(name: str) -> None:
    for value in (b"null", b"true", b'"x"', b'{"a":[1]}'):
        assert parse(CompletionBody, b'{"prompt":"a","%s":%s}' % (name.encode(), value)).prompt == "a"


@pytest.mark.parametrize("name", sorted(set(INERT) - set(CompletionBody.model_fields)))
def test_fields_of_others_may_only_ask_for_nothing(name: str) -> None:
    for value in (None, *INERT[name]):
        assert parse(CompletionBody, body(name, value)).prompt == "a"
    with pytest.raises(BadRequest, match=f"{name} is not supported") as refused:
        parse(CompletionBody, body(name, "something"))
    assert refused.value.param == name


def body(name: str, value: object) -> bytes:
    return json.dumps({"prompt": "a", name: value}).encode()
