"""Grammars compiled in real processes: what is served, what is refused, and what a hostile one costs the others."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import xgrammar

from tandem.engine.grammar.compiler import MAX_TEXTS, CompilerSettings, GrammarCompiler, _Cached
from tandem.engine.grammar.compiler_process import schema_grammar
from tandem.engine.grammar.constraint import GrammarConstraint, Vocabulary
from tandem.engine.grammar.schema.lower import lower
from tandem.errors import BadRequest, Overloaded, Unavailable
from tandem.text.tokenizer import Tokenizer
from tandem.types import Grammar, GrammarKind

MODEL = Path(__file__).parents[2] / "tandem" / "demo" / "model"
TOKENIZER = Tokenizer.load(str(MODEL))
VOCABULARY, END = 2048, 2
SETTINGS = CompilerSettings(str(MODEL), VOCABULARY, (END,), seconds=3.0, memory_mib=160)
TAG = {"type": "structural_tag", "format": {"type": "const_string", "value": "yes"}}
HUGE_ENUM = json.dumps({"enum": [f"value {i} of a very long list" for i in range(7000)]})
RULES = 2000
SLOW = (
    "root ::= r0\n"
    + "\n".join(f'r{rule} ::= ("a" | "") r{rule + 1} ("b" | "")' for rule in range(RULES))
    + f'\nr{RULES} ::= "x"'
)
"""Takes XGrammar 0.2 longer than half a minute."""


@asynccontextmanager
async def running(settings: CompilerSettings) -> AsyncIterator[GrammarCompiler]:
    compiler = GrammarCompiler(settings)
    try:
        yield compiler
    finally:
        compiler.check_integrity()
        await compiler.close()
    assert not psutil.Process().children()


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


def allowed(constraint: GrammarConstraint) -> set[int]:
    mask = np.zeros((1, VOCABULARY // 32), dtype=np.int32)
    constraint.fill(mask, 0)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


async def test_what_is_served() -> None:
    async with running(replace(SETTINGS, cache_mib=0)) as compiler:
        for kind, source in (
            (GrammarKind.JSON_OBJECT, ""),
            (GrammarKind.JSON_SCHEMA, '{"type": "integer"}'),
            (GrammarKind.REGEX, "[0-9]+"),
            (GrammarKind.EBNF, 'root ::= "yes" | "no"'),
            (GrammarKind.STRUCTURAL_TAG, json.dumps(TAG)),
        ):
            assert allowed(GrammarConstraint(await compiler.compile(Grammar(kind, source)))), kind

        first, second = await asyncio.gather(compiler.compile(regex("a+")), compiler.compile(regex("a+")))
        assert first is second
        assert await compiler.compile(regex("a+")) is not first, "a cache of no size keeps nothing"

        masks_know_special_tokens(GrammarConstraint(await compiler.compile(regex(".+"))))
        thoughts_are_free(GrammarConstraint(await compiler.compile(regex("[0-9]")), after=(7, 8)))
        vocabulary = Vocabulary(compiler.vocabulary, TOKENIZER.encode)
        fixed = GrammarConstraint(await compiler.compile(regex(r'\{"colour": "red"\}')), vocabulary)
        assert TOKENIZER.decode(fixed.force(99)) == '{"colour": "red"}' and fixed.force(99) == []
        cut = GrammarConstraint(await compiler.compile(regex(r'\{"colour": "red"\}')), vocabulary)
        assert TOKENIZER.decode([*cut.force(2), *cut.force(99)]) == '{"colour": "red"}'
        # What follows the forced text may be one token with its end, which is the model's to choose.
        open_end = GrammarConstraint(await compiler.compile(regex(r"the answer(s are| is) .*")), vocabulary)
        assert "the answer".startswith(TOKENIZER.decode(open_end.force(99)))
        characters_stay_whole(GrammarConstraint(await compiler.compile(regex("the (é|è)😀!")), vocabulary))


def masks_know_special_tokens(constraint: GrammarConstraint) -> None:
    special = TOKENIZER.special_ids
    first = allowed(constraint)
    assert len(first) > 1000 and not first & special
    constraint.accept(min(first))
    assert special & allowed(constraint) == {END}
    constraint.accept(END)
    assert constraint.finished


@pytest.mark.parametrize("text", ["école", "größe", "日a", "😀f", "\x1bacid", "\\xe9c", '"é"c', "\x80\x9fab", "]é-a"])
def test_the_schemas_of_tools_are_what_they_were_in_every_language(text: str) -> None:
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)]))
    keys = {"type": "object", "properties": {text: {"const": 1}}, "required": [text], "additionalProperties": False}
    for schema in ({"const": text}, keys, {"type": "string", "pattern": f"^{re.escape(text)}$"}):
        direct = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(lower(schema)), any_whitespace=False))
        through = xgrammar.GrammarMatcher(compiler.compile_grammar(schema_grammar(schema, "", False)))
        said = direct.find_jump_forward_string() or json.dumps(text, ensure_ascii=False)
        assert direct.accept_string(said) and through.accept_string(said)
        assert direct.is_completed() == through.is_completed()


def characters_stay_whole(constraint: GrammarConstraint) -> None:
    """A model may write a character byte by byte, and the bytes that two characters share are forced."""
    assert "the ".startswith(TOKENIZER.decode(constraint.force(99)))
    chosen: list[int] = []
    while not constraint.finished:
        chosen.append(min(allowed(constraint) - {END} or {END}, key=lambda token: len(TOKENIZER.token_bytes(token))))
        constraint.accept(chosen[-1])
        constraint.force(0)
    assert len(chosen) > len("è😀!") and chosen[-1] == END


def thoughts_are_free(constraint: GrammarConstraint) -> None:
    for token in (7, 7, 9, 8, 7):
        constraint.accept(token)
        assert not constraint.active and constraint.force(9) == []
    constraint.accept(8)
    assert constraint.active
    with pytest.raises(ValueError, match="not allowed"):
        constraint.accept(7)


async def test_what_is_refused_and_that_it_holds_up_nobody_else() -> None:
    async with running(SETTINGS) as compiler:
        for kind, source, why in (
            (GrammarKind.REGEX, "(a", "Regex parsing error at position 3: The parenthesis is not closed."),
            (GrammarKind.EBNF, "root ::= missing", 'Rule "missing" is not defined'),
            (GrammarKind.JSON_SCHEMA, '{"type": "wat"}', 'Unsupported type "wat"'),
            (GrammarKind.JSON_SCHEMA, "nope", "Expecting value"),
            (GrammarKind.STRUCTURAL_TAG, "{}", "structural"),
        ):
            with pytest.raises(BadRequest, match=kind.value) as refusal:
                await compiler.compile(Grammar(kind, source))
            assert why.lower() in str(refusal.value).lower()
            assert "/project/" not in str(refusal.value) and "\n" not in str(refusal.value)

        with pytest.raises(BadRequest, match=r"too much memory|longer than 3 s"):
            await compiler.compile(Grammar(GrammarKind.JSON_SCHEMA, HUGE_ENUM))
        hostile = asyncio.create_task(compiler.compile(Grammar(GrammarKind.EBNF, SLOW)))
        await asyncio.sleep(0)
        for digit in range(3):
            await compiler.compile(regex(f"[0-{digit}]+"))
        with pytest.raises(BadRequest, match=r"longer than 3 s|ended the compiler"):
            await hostile
        with pytest.raises(BadRequest):
            await asyncio.wait_for(compiler.compile(Grammar(GrammarKind.EBNF, SLOW)), 0.5)
        assert allowed(GrammarConstraint(await compiler.compile(regex("x+"))))


@pytest.mark.parametrize(("again_s", "complaint"), [(0.0, "of its own"), (99.0, "longer than")])
async def test_what_took_too_long_is_tried_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch, again_s: float, complaint: str
) -> None:
    """The machine may only have been busy."""
    compiler = GrammarCompiler(replace(SETTINGS, seconds=0.01, again_s=again_s))
    hangs = iter([True, False])

    async def ask(process: object, key: object) -> _Cached:
        if next(hangs):
            await asyncio.Event().wait()
        return _Cached(None, "a complaint of its own", 1)

    monkeypatch.setattr(compiler, "_kept", object)
    monkeypatch.setattr(compiler, "_ask", ask)
    monkeypatch.setattr(compiler, "_kill", lambda process: None)
    with pytest.raises(BadRequest, match=r"longer than 0\.01 s"):
        await compiler.compile(regex("a"))
    with pytest.raises(BadRequest, match=complaint):
        await compiler.compile(regex("a"))
    compiler.check_integrity()


class Stubborn:
    """Compiles nothing until it is let; what was asked and what was killed is seen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiler = GrammarCompiler(replace(SETTINGS, seconds=60.0))
        self.asked: list[str] = []
        self.killed: list[object] = []
        self.go = asyncio.Event()
        monkeypatch.setattr(self.compiler, "_kept", object)
        monkeypatch.setattr(self.compiler, "_ask", self.ask)
        monkeypatch.setattr(self.compiler, "_kill", self.killed.append)

    async def ask(self, process: object, key: tuple[str, str]) -> _Cached:
        self.asked.append(key[1])
        await self.go.wait()
        return _Cached(None, "a complaint of its own", 1)

    def want(self, source: str) -> asyncio.Task[xgrammar.CompiledGrammar]:
        return asyncio.create_task(self.compiler.compile(regex(source)))

    @property
    def held(self) -> tuple[int, int]:
        """Texts that can be joined, and tasks."""
        return len(vars(self.compiler)["_running"]), len(vars(self.compiler)["_tasks"])


async def settle() -> None:
    """Lets every task come to where it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def give_up(waiters: list[asyncio.Task[xgrammar.CompiledGrammar]]) -> None:
    await settle()
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)


async def test_a_text_that_nobody_waits_for_any_more_is_compiled_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = Stubborn(monkeypatch)
    await give_up([stubborn.want(f"a{number}") for number in range(100)])
    assert stubborn.held[0] == 0
    await settle()
    assert stubborn.held == (0, 0)
    assert stubborn.asked == ["a0", "a1"] and len(stubborn.killed) == SETTINGS.processes

    first, second = stubborn.want("b"), stubborn.want("b")
    await give_up([first])
    assert not second.done() and stubborn.held == (1, 1)
    second.cancel()
    await asyncio.sleep(0)
    third = stubborn.want("b")  # in the moment in which that of the second ends
    await settle()
    stubborn.go.set()
    with pytest.raises(BadRequest, match="of its own"):
        await third
    assert stubborn.asked == ["a0", "a1", "b", "b"] and second.cancelled()
    await asyncio.sleep(0)
    assert stubborn.held == (0, 0)
    stubborn.compiler.check_integrity()


async def test_no_more_texts_wait_than_can_be_compiled_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = Stubborn(monkeypatch)
    waiters = [stubborn.want(f"a{number}") for number in range(MAX_TEXTS)]
    await settle()
    with pytest.raises(Overloaded, match=f"{MAX_TEXTS} grammars are being compiled"):
        await asyncio.wait_for(stubborn.want("b"), 5)
    joined = stubborn.want("a5")
    await settle()
    assert not joined.done(), "it costs nothing more"
    await give_up([waiters.pop()])
    again = stubborn.want("b")
    await settle()
    assert not again.done()
    stubborn.go.set()
    done = await asyncio.gather(*waiters, joined, again, return_exceptions=True)
    assert {type(each) for each in done} == {BadRequest}


async def test_a_real_process_ends_with_the_last_who_waited_for_its_text() -> None:
    async with running(replace(SETTINGS, seconds=60.0)) as compiler:
        hostile = asyncio.create_task(compiler.compile(Grammar(GrammarKind.EBNF, SLOW)))
        await compiler.compile(regex("a+"))
        (idle,) = vars(compiler)["_idle"]
        (other,) = vars(compiler)["_processes"] - {idle}
        await give_up([hostile])
        await asyncio.wait_for(other.wait(), 10)
        assert idle.returncode is None


async def test_a_compiler_that_was_ended_while_idle_is_no_fault_of_the_next_text() -> None:
    async with running(SETTINGS) as compiler:
        await compiler.compile(regex("a+"))
        (idle,) = vars(compiler)["_idle"]
        idle.kill()
        await idle.wait()
        assert allowed(GrammarConstraint(await compiler.compile(regex("b+"))))


def test_a_compiler_whose_worker_was_killed_ends_itself() -> None:
    arguments = [str(MODEL), str(VOCABULARY), str(END), "4096", "0.05"]
    command = [sys.executable, "-m", "tandem.engine.grammar.compiler_process", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        request = {"kind": "json_schema", "source": HUGE_ENUM}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        assert process.wait(60) == -signal.SIGALRM


async def test_a_tokeniser_that_is_missing_is_no_fault_of_the_client(tmp_path: Path) -> None:
    async with running(replace(SETTINGS, folder=str(tmp_path))) as compiler:
        with pytest.raises(Unavailable, match="did not start"):
            await compiler.compile(regex("a"))
