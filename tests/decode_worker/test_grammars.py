"""The first grammar of a worker, while it serves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from decode_worker.grammars import _encoder, continuation
from tandem.text.tokenizer import Tokenizer

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
