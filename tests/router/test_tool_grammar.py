"""Which grammar is asked for when calls are forced or functions are strict, and what it lets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xgrammar

from router.requests.formats import ModelFormats
from router.requests.openai import ChatBody
from router.requests.tool_grammar import calls_grammar
from router.requests.tools import tool_use
from tandem.engine.grammar.compiler_process import UnfitSchema, compile_one, with_grammars
from tandem.engine.grammar.vocabulary import load_vocabulary
from tandem.errors import BadRequest
from tandem.testing.tokenizer import END, byte_level_tokenizer
from tandem.text.formats.held import TAG_START
from tandem.text.formats.registry import TOOL_FORMATS
from tandem.text.tokenizer import Tokenizer
from tandem.types import GrammarKind

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "g_2", "parameters": {"type": "object"}}},
]
F, G = ("f", '{"n": 3}'), ("g_2", '{"any": [1, {"thing": null}]}')
Call = tuple[str, str]

Accepts = Callable[[str], bool]


def hermes(calls: list[Call]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {given}}}\n</tool_call>' for name, given in calls)


def llama3(calls: list[Call]) -> str:
    return "; ".join(f'{{"name": "{name}", "parameters": {given}}}' for name, given in calls)


def mistral(calls: list[Call]) -> str:
    return "[TOOL_CALLS][" + ", ".join(f'{{"name": "{name}", "arguments": {given}}}' for name, given in calls) + "]"


def mistral_named(calls: list[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{given}" for name, given in calls)


def deepseek(calls: list[Call]) -> str:
    said = [f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{given}<｜tool▁call▁end｜>" for name, given in calls]
    return f"<｜tool▁calls▁begin｜>{''.join(said)}<｜tool▁calls▁end｜>"


def deepseek_fenced(calls: list[Call]) -> str:
    said = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{given}\n```<｜tool▁call▁end｜>"
        for name, given in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(said) + "<｜tool▁calls▁end｜>"


CASES: list[tuple[str, str, Callable[[list[Call]], str]]] = [
    ("hermes", "", hermes),
    ("llama3", "", llama3),
    ("mistral", "", mistral),
    ("mistral", "[ARGS]", mistral_named),
    ("deepseek", "", deepseek),
    ("deepseek", "```json", deepseek_fenced),
]


class Model:
    """A tiny vocabulary with a tool format whose markers are special tokens, or are not."""

    def __init__(self, folder: Path, name: str, template: str, special: bool) -> None:
        self.form = TOOL_FORMATS[name]
        wrapped = byte_level_tokenizer()
        if special:
            wrapped.add_special_tokens({"additional_special_tokens": list(self.form.tokens)})
        wrapped.save_pretrained(folder)
        self.tokenizer = Tokenizer(wrapped)
        ids = {text: self.tokenizer.encode(text)[0] for text in self.form.tokens} if special else {}
        self.formats = ModelFormats(tools=self.form, template=template, special=ids)
        (self.end,) = self.tokenizer.encode(END)
        self.vocabulary = load_vocabulary(str(folder), self.tokenizer.size, [self.end])

    def source(self, **fields: Any) -> str:
        body = ChatBody.model_validate({"messages": [{"role": "user", "content": ""}], "tools": TOOLS, **fields})
        grammar = calls_grammar(tool_use(body), self.formats, (7,))
        assert grammar is not None and grammar.kind is GrammarKind.STRUCTURAL_TAG and grammar.after == (7,)
        return grammar.source

    def accepts(self, **fields: Any) -> Accepts:
        """Whether a text is a whole answer."""
        compiler = xgrammar.GrammarCompiler(self.vocabulary, max_threads=1, cache_enabled=False)
        compiled = compile_one(compiler, "structural_tag", self.source(**fields))

        def whole(text: str) -> bool:
            matcher = xgrammar.GrammarMatcher(compiled)
            return all(matcher.accept_token(token) for token in (*self.tokenizer.encode(text), self.end))

        return whole


@pytest.fixture(params=[False, True], ids=["text", "special"])
def special(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize(("name", "template", "write"), CASES)
def test_forced_calls(
    name: str, template: str, write: Callable[[list[Call]], str], special: bool, tmp_path: Path
) -> None:
    model = Model(tmp_path, name, template, special)
    prefill = model.form.prefill(template, None)

    def rest(*calls: Call) -> str:
        return write(list(calls)).removeprefix(prefill)

    accepts = model.accepts(tool_choice="required")
    assert accepts(rest(F)) and accepts(rest(G)) and accepts(rest(G, F, G))
    for wrong in (("h", "{}"), ("f", '{"n": 12}'), ("f", "{}"), ("g_2", "[]"), ("g_2", '{"a": }')):
        assert not accepts(rest(wrong)) and not accepts(rest(G, wrong))
    assert not accepts("") and not accepts(rest(F) + " and text")

    single = model.accepts(tool_choice="required", parallel_tool_calls=False)
    assert single(rest(F)) and not single(rest(F, G))

    named = model.accepts(tool_choice={"type": "function", "function": {"name": "f"}})
    prefill = model.form.prefill(template, "f")
    assert named(rest(F)) and not named(rest(F, F)) and not named(rest(("f", '{"n": "3"}')))


@pytest.mark.parametrize(("name", "template", "write"), CASES)
def test_strict_calls_in_free_text(
    name: str, template: str, write: Callable[[list[Call]], str], special: bool, tmp_path: Path
) -> None:
    model = Model(tmp_path, name, template, special)
    accepts = model.accepts()
    opening = "<|python_tag|>" if name == "llama3" else ""
    for before in ("", "Let me see < [ 1\n"):
        marked = before + opening
        assert accepts(before) and accepts(marked + write([F])) and accepts(marked + write([G, F]))
        assert not accepts(marked + write([("f", '{"n": 12}')])) and not accepts(marked + write([("h", "{}")]))
        assert not accepts(marked + write([G, ("f", "{}")]))
    if name == "llama3":
        assert accepts(write([F])) and accepts(write([F, G])) and not accepts('{"n": 1}') and not accepts(" {")
        assert accepts("<b>") and not accepts(write([F]) + " text")
    else:
        assert accepts(write([F]) + "\n so it is") and not accepts(write([F]) + "\n" + write([("h", "{}")]))
    single = model.accepts(parallel_tool_calls=False)
    assert single(opening + write([F])) and not single(opening + write([F, F]))


def test_python_calls_are_held_to_their_form_and_strict_is_refused(tmp_path: Path) -> None:
    model = Model(tmp_path, "pythonic", "", False)
    accepts = model.accepts(tools=[TOOLS[1]], tool_choice="required")
    assert accepts('g_2(a=[1, -2.5, "x\\""], b={"k": None})]') and accepts("g_2(), g_2(a=True)]")
    assert not accepts("h()]") and not accepts("g_2(1)]") and not accepts("g_2(a=1")
    with pytest.raises(BadRequest, match=r"tools\.0\.function\.parameters cannot be held to: .*'pythonic'"):
        model.source()


def test_nothing_is_held_without_being_asked_for(tmp_path: Path) -> None:
    model = Model(tmp_path, "hermes", "", False)
    use = tool_use(ChatBody.model_validate({"messages": [{"role": "user", "content": ""}], "tools": [TOOLS[1]]}))
    assert calls_grammar(use, model.formats, ()) is None


def test_strict_without_parameters_takes_none(tmp_path: Path) -> None:
    model = Model(tmp_path, "hermes", "", False)
    tools = [{"type": "function", "function": {"name": "f", "strict": True}}]
    accepts = model.accepts(tools=tools, tool_choice={"type": "function", "function": {"name": "f"}})
    assert accepts(" {}}\n</tool_call>") and not accepts(' {"a": 1}}\n</tool_call>')


def test_a_schema_that_does_not_compile_is_named(tmp_path: Path) -> None:
    model = Model(tmp_path, "hermes", "", False)
    bad = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    tools = [TOOLS[0], {"type": "function", "function": {"name": "h", "strict": True, "parameters": bad}}]
    source = model.source(tools=tools)
    assert source.startswith(TAG_START) and json.loads(source)["type"] == "structural_tag"
    with pytest.raises(UnfitSchema) as raised:
        with_grammars(source, any_whitespace=False)
    assert raised.value.field == "tools.1.function.parameters"


def test_schemas_that_are_too_long_are_refused(tmp_path: Path) -> None:
    model = Model(tmp_path, "hermes", "", False)
    long = {"type": "object", "properties": {"a": {"enum": ["x" * 1000] * 300}}}
    with pytest.raises(BadRequest, match=r"tools make a grammar of .* at most 262144"):
        model.source(tools=[{"type": "function", "function": {"name": "f", "strict": True, "parameters": long}}])
