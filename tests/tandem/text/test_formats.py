"""Transcripts of each format, and what must hold for every text: no cut changes anything, nothing raises."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.text.formats.answer import AnswerFormat, AnswerParser
from tandem.text.formats.calls import NAME, CallParser
from tandem.text.formats.json_scanner import MAX_DEPTH, JsonScanner
from tandem.text.formats.parts import CallArguments, CallStart, Part, Reasoning, Text
from tandem.text.formats.registry import REASONING_FORMATS, TOOL_FORMATS, choose

DECLARED = frozenset({"get_weather", "add", "now", "f"})
THINK = REASONING_FORMATS["think"]

UGLY = (
    '{"city": "S\\u00e3o \\"Paulo\\" {[}]", "list": [1, -2.5e3, {"a": {"b": []}}], "text": "日本 🙂 \\\\", "n": null}'
)
"""Nested braces, quotes and brackets in strings, escapes, unicode."""


@dataclass
class Answer:
    """Parts put together again."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def add(self, part: Part) -> None:
        match part:
            case Text(text):
                self.text += text
            case Reasoning(text):
                self.reasoning += text
            case CallStart(index, call_id, name):
                assert index == len(self.calls)
                self.calls.append([name, ""])
                self.ids.append(call_id)
            case CallArguments(index, text):
                assert index == len(self.calls) - 1
                self.calls[index][1] += text


def parse(form: AnswerFormat, *chunks: str) -> Answer:
    parser, answer = AnswerParser(form), Answer()
    for parts in (*map(parser.feed, chunks), parser.finish()):
        for part in parts:
            answer.add(part)
    assert parser.called == bool(answer.calls)
    return answer


def tools(name: str, **more: object) -> AnswerFormat:
    return AnswerFormat(tools=TOOL_FORMATS[name], declared=DECLARED, **more)  # type: ignore[arg-type]


SEP = "<｜tool▁sep｜>"


def deepseek(*calls: str) -> str:
    inner = "".join(f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>" for call in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


F = ["f", "{}"]
W = ["get_weather", '{"city": "Paris"}']
W_JSON = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
W_LLAMA = W_JSON.replace("arguments", "parameters")
UGLY_JSON = '{"name": "add", "arguments": ' + UGLY + "}"

# format, answer, text, calls
TRANSCRIPTS: list[tuple[str, str, str, list[list[str]]]] = [
    # One call.
    ("hermes", f"<tool_call>\n{W_JSON}\n</tool_call>", "", [W]),
    ("hermes", f"<tool_call>{W_JSON}</tool_call>\n", "", [W]),
    ("llama3", W_LLAMA, "", [W]),
    ("llama3", f"\n {W_JSON} \n", "", [W]),
    ("llama3", '{"type": "function", "name": "f", "parameters": {}}', "", [F]),
    ("llama3", f"<|python_tag|>{W_LLAMA}", "", [W]),
    ("mistral", f"[TOOL_CALLS] [{W_JSON}]", "", [W]),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", [W]),
    ("mistral", '[TOOL_CALLS]get_weather[CALL_ID]aB3dE6gH9[ARGS]{"city": "Paris"}', "", [W]),
    ("mistral", '[TOOL_CALLS]get_weather{"city": "Paris"}', "", [W]),
    ("mistral", f"[TOOL_CALLS]{W_JSON}", "", [W]),
    ("deepseek", deepseek(f'get_weather{SEP}{{"city": "Paris"}}'), "", [W]),
    ("deepseek", deepseek(f'function{SEP}get_weather\n```json\n{{"city": "Paris"}}\n```'), "", [W]),
    ("pythonic", '[get_weather(city="Paris")]', "", [W]),
    ("pythonic", '<|python_start|>[get_weather(city="Paris")]<|python_end|>', "", [W]),
    # Several calls, and text before and between.
    ("hermes", f"Let me see.\n\n<tool_call>\n{W_JSON}\n</tool_call>\n<tool_call>\n{UGLY_JSON}\n</tool_call>",
     "Let me see.", [W, ["add", UGLY]]),
    ("hermes", f"a <tool_call>{W_JSON}</tool_call>\n b ", "a\n b ", [W]),
    ("llama3", f'{W_LLAMA}; {{"name": "f", "parameters": {{}}}}', "", [W, F]),
    ("llama3", f'{W_LLAMA}\n{{"name": "f", "parameters": {{}}}}\n', "", [W, F]),
    ("llama3", f"Sure: <|python_tag|>{W_LLAMA}", "Sure:", [W]),
    ("mistral", f'I look.[TOOL_CALLS][{W_JSON}, {UGLY_JSON}]', "I look.", [W, ["add", UGLY]]),
    ("mistral", f'[TOOL_CALLS]f[ARGS]{{}}[TOOL_CALLS]add[ARGS]{UGLY}', "", [F, ["add", UGLY]]),
    ("deepseek", "Well.\n" + deepseek(f"f{SEP}{{}}", f"add{SEP}{UGLY}"), "Well.", [F, ["add", UGLY]]),
    ("pythonic", "[now(), add(a=[1, -2.5], b={'k': 'v\\'\\n', \"t\": (1)}, c=None)]", "add(a=[1, -2.5], b={'k': "
     "'v\\'\\n', \"t\": (1)}, c=None)]", [["now", "{}"]]),
    ("pythonic", "[now(), add(a=[1, -2.5,], b={'k': 'v\\'\\u00e9'}, c=None, d=True)]", "",
     [["now", "{}"], ["add", '{"a": [1, -2.5], "b": {"k": "v\'é"}, "c": null, "d": true}']]),
    # Fields in any order, more fields, no arguments, arguments as a string.
    ("hermes", '<tool_call>{"arguments": {"city": "Paris"}, "id": 7, "name": "get_weather"}</tool_call>', "", [W]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [F]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [F]),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', "", [W]),
    # A bracket that small models forget; an end that never comes.
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}\n</tool_call>', "", [W]),
    ("hermes", f"<tool_call>{W_JSON}<tool_call>{W_JSON}", "", [W, W]),
    ("mistral", f"[TOOL_CALLS][{W_JSON}", "", [W]),
    # Cut off: before the call is announced it is text, after it what there is of the arguments.
    ("hermes", "So: <tool_c", "So: <tool_c", []),
    ("hermes", '<tool_call>\n{"name": "get_wea', '<tool_call>\n{"name": "get_wea', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": ', '<tool_call>{"name": "f", "arguments": ', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', "", [["f", '{"a": "b']]),
    ("llama3", '{"name": "f", "param', '{"name": "f", "param', []),
    ("mistral", "[TOOL_CALLS]f[AR", "[TOOL_CALLS]f[AR", []),
    ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call", "<｜tool▁calls▁begin｜><｜tool▁call", []),
    ("pythonic", '[get_weather(city="Par', '[get_weather(city="Par', []),
    # Malformed: text as it stands.
    ("hermes", "<tool_call>get_weather</tool_call>", "<tool_call>get_weather</tool_call>", []),
    ("hermes", "<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    ("hermes", '<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "a b"}</tool_call>', '<tool_call>{"name": "a b"}</tool_call>', []),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}', '<tool_call>{"name": "f", "arguments": [1]}', []),
    ("hermes", "<tool_call>{'name': 'f'}</tool_call> ", "<tool_call>{'name': 'f'}</tool_call> ", []),
    ("hermes", f"x\n<tool_call>oh<tool_call>{W_JSON}</tool_call>", "x\n<tool_call>oh", [W]),
    ("hermes", "</tool_call> <tool_calls>", "</tool_call> <tool_calls>", []),
    # What goes wrong after the announcement stays a call as far as it went; the rest is text.
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>', "}}</tool_call>", [["f", '{"a": 1,']]),
    ("mistral", f"[TOOL_CALLS][{W_JSON}, 5]", "5]", [W]),
    # Llama's calls without a marker must be declared functions with no other fields, and the whole answer.
    ("llama3", '{"name": "Alice", "parameters": {}}', '{"name": "Alice", "parameters": {}}', []),
    ("llama3", '{"name": "f", "age": 3}', '{"name": "f", "age": 3}', []),
    ("llama3", '{"a": {"name": "f"}}', '{"a": {"name": "f"}}', []),
    ("llama3", f"The call is {W_LLAMA}", f"The call is {W_LLAMA}", []),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama3", f'{W_LLAMA}; {{"a": 1}}', '{"a": 1}', [W]),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[unknown(a=1)]", "[unknown(a=1)]", []),
    ("pythonic", "See [f()]", "See [f()]", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "raw", "text", "calls"), TRANSCRIPTS)
def test_transcripts(name: str, raw: str, text: str, calls: list[list[str]]) -> None:
    form = tools(name)
    for chunks in ([raw], list(raw)):
        answer = parse(form, *chunks)
        assert (answer.text, answer.calls, answer.reasoning) == (text, calls, "")
    assert len(set(answer.ids)) == len(calls)


@pytest.mark.parametrize(
    ("raw", "begun", "reasoning", "text", "end"),
    [
        ("<think>\nHm.\n\nSo.\n</think>\n\nYes.\n", "", "Hm.\n\nSo.", "Yes.\n", "<think>\nHm.\n\nSo.\n</think>"),
        ("Hm.\n</think>\n\nYes.", "<think>\n", "Hm.", "Yes.", "Hm.\n</think>"),
        (" \n<think></think>Yes.", "", "", "Yes.", " \n<think></think>"),
        ("Yes.", "", "", "Yes.", ""),
        (" Yes. <think>no</think>", "", "", " Yes. <think>no</think>", ""),
        ("Yes.", "<think>\n\n</think>\n\n", "", "Yes.", ""),
        ("<think>a < b </thin", "", "a < b </thin", "", None),
        ("a\n\n", "<think>", "a", "", None),
        ("<thin", "", "", "<thin", ""),
        ("</think> Yes", "", "", "</think> Yes", ""),
        ("<think>a</think>b</think>", "", "a", "b</think>", "<think>a</think>"),
        ("", "", "", "", ""),
    ],
)
def test_reasoning(raw: str, begun: str, reasoning: str, text: str, end: str | None) -> None:
    for chunks in ([raw], list(raw), []):
        if not chunks and raw:
            continue
        form = AnswerFormat(reasoning=THINK, begun=begun)
        answer = parse(form, *chunks)
        assert (answer.reasoning, answer.text) == (reasoning, text)
        parser = AnswerParser(form)
        for chunk in chunks:
            parser.feed(chunk)
        parser.finish()
        assert parser.reasoning_end == (None if end is None else len(end))
    hidden = parse(AnswerFormat(reasoning=THINK, begun=begun, hide_reasoning=True), raw)
    assert (hidden.reasoning, hidden.text) == ("", text)


def test_reasoning_comes_before_calls_and_its_own_are_thoughts() -> None:
    form = AnswerFormat(THINK, TOOL_FORMATS["hermes"], DECLARED)
    call = f"<tool_call>\n{W_JSON}\n</tool_call>"
    answer = parse(form, f"<think>\nI could {call}\n</think>\n\n{call}")
    assert (answer.reasoning, answer.text, answer.calls) == (f"I could {call}", "", [W])
    magistral = AnswerFormat(REASONING_FORMATS["magistral"], TOOL_FORMATS["mistral"], DECLARED)
    answer = parse(magistral, "[THINK]Hm[/THINK]Wait.[TOOL_CALLS]f[ARGS]{}")
    assert (answer.reasoning, answer.text, answer.calls) == ("Hm", "Wait.", [F])


def test_arguments_come_as_they_are_written() -> None:
    parser = AnswerParser(tools("hermes"))
    assert parser.feed('<tool_call>{"name": "f"') == []
    assert parser.feed(', "arguments": ') == []
    first, second = parser.feed('{"a"')
    assert isinstance(first, CallStart)
    assert second == CallArguments(0, '{"a"')
    assert parser.feed(": [1") == [CallArguments(0, ": [1")]
    assert parser.feed("]}}") == [CallArguments(0, "]}")]
    assert parser.feed("</tool_call>") == parser.finish() == []


def test_text_is_not_held_longer_than_it_must() -> None:
    parser = AnswerParser(tools("hermes"))
    assert parser.feed("a < b") == [Text("a < b")]
    assert parser.feed(" <") == []
    assert parser.feed("t") == []
    assert parser.feed("p") == [Text(" <tp")]


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("before", ["", "Hello"])
def test_whitespace_that_is_held_is_read_once(name: str, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = 0
    find = CallParser._find

    def counted(self: CallParser, text: str, at: int) -> tuple[int, str]:
        nonlocal looked_at
        looked_at += len(text) - at
        return find(self, text, at)

    monkeypatch.setattr(CallParser, "_find", counted)
    assert not any(opening[0].isspace() for opening in TOOL_FORMATS[name].openings)
    parser = CallParser(TOOL_FORMATS[name], DECLARED)
    chunks = [before, *["  \n "] * 1000, "<", "b"]
    parts = [part for chunk in chunks for part in parser.feed(chunk)] + parser.finish()
    assert "".join(part.text for part in parts if isinstance(part, Text)) == "".join(chunks)
    assert looked_at < 2 * sum(map(len, chunks))


def test_one_call_drops_what_follows() -> None:
    raw = f"One.<tool_call>{W_JSON}</tool_call> two <tool_call>{UGLY_JSON}</tool_call> three"
    for chunks in ([raw], list(raw)):
        answer = parse(tools("hermes", one_call=True), *chunks)
        assert (answer.text, answer.calls) == ("One.", [W])


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("template", ["", "```json [ARGS]"])
def test_prefills_lead_into_a_call(name: str, template: str) -> None:
    form = TOOL_FORMATS[name]
    named = form.prefill(template, "f")
    rest = {"pythonic": "a=1)]"}.get(name, ' {"a": 1}')
    answer = parse(tools(name, begun=named), rest)
    assert answer.text == ""
    assert [(call, json.loads(args)) for call, args in answer.calls] == [("f", {"a": 1})]
    assert named.startswith(form.prefill(template, None))
    refused = parse(tools(name, begun=named), "~I will not")
    assert (refused.text, refused.calls) == (named + "~I will not", [])


def test_ids_are_in_the_forms_that_clients_and_templates_know() -> None:
    assert parse(tools("hermes"), f"<tool_call>{W_JSON}").ids[0].startswith("call_")
    (own,) = parse(tools("mistral"), f"[TOOL_CALLS][{W_JSON}]").ids
    assert len(own) == 9 and own.isalnum()


FRAGMENTS = [
    *{token for form in TOOL_FORMATS.values() for token in form.tokens},
    "<think>", "</think>", "[", "]", "{", "}", '"', ":", ",", ";", "\\", "\n", " ", "f", "now", "(", ")", "=", "'",
    '{"name": "f", "arguments": {', '"name": "f"', '"parameters": {}', UGLY, W_JSON, W_LLAMA, "function", "```json",
    "f[ARGS]{", "<tool", "[TOOL_", "</", "-1.5e3", "1" * 5000, "tru", "\\ud800", '"\\ud800"', "🙂", "\0", "[f(a=",
    "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{", '"arguments": "{', "\\x4", "[" * 300, '{"a":' * 150,
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=14).map("".join)
formats = st.builds(
    AnswerFormat,
    reasoning=st.sampled_from([None, THINK]),
    tools=st.sampled_from([None, *TOOL_FORMATS.values()]),
    declared=st.just(DECLARED),
    begun=st.sampled_from(["", "<think>\n", '<tool_call>\n{"name":', '{"name": "f", "parameters":']),
    one_call=st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(formats, texts, st.lists(st.integers(0, 10_000), max_size=8))
@example(tools("hermes"), "\n<tool_call>\n \n", [3, 5])
@example(tools("llama3"), f"{W_LLAMA};\n", [len(W_LLAMA)])
def test_any_text_parses_to_the_same_whatever_the_cuts(form: AnswerFormat, raw: str, cuts: list[int]) -> None:
    whole = parse(form, raw)
    bounds = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    cut = parse(form, *(raw[start:end] for start, end in itertools.pairwise(bounds)))
    assert (cut.text, cut.reasoning, cut.calls) == (whole.text, whole.reasoning, whole.calls)
    for name, arguments in whole.calls:
        assert NAME.fullmatch(name)
        scanner = JsonScanner()
        assert arguments.startswith("{") and scanner.feed(arguments) == len(arguments)
        arguments.encode()
        if scanner.done:
            assert isinstance(json.loads(arguments), dict)
    if not whole.calls and form.reasoning is None:
        assert whole.text == form.begun + raw


names = st.sampled_from(sorted(DECLARED))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8) | st.sampled_from(FRAGMENTS[:24]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.text(max_size=6), values, max_size=3)


def written(name: str, calls: list[tuple[str, str]]) -> str:
    each = [f'{{"name": "{call}", "arguments": {arguments}}}' for call, arguments in calls]
    match name:
        case "hermes":
            return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in each)
        case "llama3":
            return "; ".join(each).replace('"arguments"', '"parameters"', 1)
        case "mistral":
            return f"[TOOL_CALLS][{', '.join(each)}]"
        case _:
            return deepseek(*(f"{call}{SEP}{arguments}" for call, arguments in calls))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["hermes", "llama3", "mistral", "deepseek"]),
    st.lists(st.tuples(names, objects), min_size=1, max_size=3),
    st.booleans(),
    st.lists(st.integers(0, 10_000), max_size=8),
)
def test_what_is_written_is_read(
    name: str, calls: list[tuple[str, dict[str, object]]], ascii_only: bool, cuts: list[int]
) -> None:
    dumped = [(call, json.dumps(given, ensure_ascii=ascii_only)) for call, given in calls]
    raw = written(name, dumped)
    bounds = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    answer = parse(tools(name), *(raw[start:end] for start, end in itertools.pairwise(bounds)))
    assert answer.text == ""
    assert answer.calls == [list(each) for each in dumped]


@settings(max_examples=200, deadline=None)
@given(st.text('{}[]",:\\ntrufalse0123456789.eE+- u', max_size=30) | values.map(json.dumps), st.text(max_size=2))
def test_the_scanner_agrees_with_the_json_module(text: str, more: str) -> None:
    scanner = JsonScanner()
    end = scanner.feed(text + " ")
    try:
        json.JSONDecoder().decode(text)
    except ValueError:
        assert not (scanner.done and text[end:].strip() == "")
    else:
        assert scanner.done and text[end:].strip(" \t\r\n") == ""


def test_depth_is_bounded() -> None:
    for opening in ("[", '{"a":'):
        scanner = JsonScanner()
        assert scanner.feed(opening * (MAX_DEPTH + 1)) == len(opening) * MAX_DEPTH
        assert scanner.failed


def test_auto_chooses_by_the_chat_template() -> None:
    cases = {
        "": (None, None),
        "{{ tools }}<tool_call>{{ x | tojson }}</tool_call>": ("hermes", None),
        "<tool_call> ... <think>": ("hermes", "think"),
        "<tool_call><function=name>": (None, None),
        '"parameters": dictionary of argument name and its value': ("llama3", None),
        "<|python_tag|>": ("llama3", None),
        "[AVAILABLE_TOOLS][TOOL_CALLS]": ("mistral", None),
        "[TOOL_CALLS][ARGS][THINK]": ("mistral", "magistral"),
        "<｜tool▁calls▁begin｜>{% if '</think>' in content %}": ("deepseek", "think"),
    }
    for template, (tool, reasoning) in cases.items():
        chosen = choose(TOOL_FORMATS, "auto", template), choose(REASONING_FORMATS, "auto", template)
        assert [each.name if each else None for each in chosen] == [tool, reasoning]
    assert choose(TOOL_FORMATS, "none", "<tool_call>") is None
    assert choose(TOOL_FORMATS, "llama3", "<tool_call>") is TOOL_FORMATS["llama3"]
