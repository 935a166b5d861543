"""The first grammar of a worker, while it serves."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from decode_worker import grammars as module
from decode_worker.grammars import Grammars, _encoder, continuation
from tandem.engine.grammar.compiler import CompilerSettings
from tandem.text.tokenizer import Tokenizer
from tandem.types import Grammar, GrammarKind

MODEL = Path(__file__).parents[2] / "tandem" / "demo" / "model"
SCRIPT = """
import asyncio, sys
from decode_worker.grammars import Grammars
from tandem.engine.grammar.compiler import CompilerSettings
from tandem.types import Grammar, GrammarKind

async def main():
    grammars = Grammars(CompilerSettings(sys.argv[1], 2048, (2,)))
    make = await grammars.compile(Grammar(GrammarKind.REGEX, "the answer is 42"))
    forced = make().force(99)
    await grammars.close()
    print(len(forced) > 2, "torch._dynamo" in sys.modules, "sympy" in sys.modules)

asyncio.run(main())
"""


def test_it_loads_no_compiler_of_torchs_into_the_worker() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(MODEL)], capture_output=True, text=True, check=True)
    assert done.stdout == "True False False\n"


def test_forced_text_is_tokenised_as_prompts_are() -> None:
    encode, tokenizer = _encoder(str(MODEL)), Tokenizer.load(str(MODEL))
    for text in ("\n", '{"colour": "red"}', " two  words\n\n", "naïve 日本語 😀", "<|im_end|>"):
        assert encode(text) == tokenizer.encode(text)
        assert continuation(encode)(text) == continuation(tokenizer.encode)(text)


async def test_a_vocabulary_that_could_not_be_loaded_is_loaded_by_the_next_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = [OSError(24, "Too many open files"), MemoryError()]
    loads = 0

    def encoder(folder: str) -> module.Encode:
        nonlocal loads
        loads += 1
        if failures:
            raise failures.pop(0)
        return _encoder(folder)

    monkeypatch.setattr(module, "_encoder", encoder)
    grammars = Grammars(CompilerSettings(str(MODEL), 2048, (2,)))
    wanted = Grammar(GrammarKind.REGEX, "the answer is 42")
    try:
        for error in (OSError, MemoryError):
            with pytest.raises(error):
                await grammars.compile(wanted)
        makers = await asyncio.gather(*(grammars.compile(wanted) for _ in range(3)))
        assert len(makers[0]().force(99)) > 2
        await grammars.compile(wanted)
        assert loads == 3
    finally:
        await grammars.close()
