"""Grammars of a decode worker's requests: compiled before a request is admitted, one constraint for each choice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tandem.engine.grammar.compiler import CompilerSettings, GrammarCompiler, refusal
from tandem.engine.grammar.constraint import GrammarConstraint, Vocabulary
from tandem.engine.grammar.masks import fits
from tandem.engine.sequence import TokenConstraint
from tandem.text.tokenizer import Tokenizer
from tandem.types import Grammar, TokenIds

ANCHOR = "\n"
"""Stands before a text that is to be tokenised as a continuation: tokenisers treat the start of a text in ways of
their own."""

MakeConstraint = Callable[[], TokenConstraint]


class Grammars:
    """All methods run on the event loop."""

    def __init__(self, settings: CompilerSettings) -> None:
        self._settings = settings
        self._compiler = GrammarCompiler(settings)
        self._loading: asyncio.Task[Vocabulary] | None = None

    async def compile(self, grammar: Grammar) -> MakeConstraint:
        """What makes a fresh constraint. Raises BadRequest when the grammar cannot be served, Unavailable."""
        compiled = await self._compiler.compile(grammar)
        if not fits(GrammarConstraint(compiled), self._settings.vocab_size):
            raise refusal(grammar, "no token of this model can begin such a text")
        vocabulary = await self._vocabulary()
        return lambda: GrammarConstraint(compiled, vocabulary, grammar.after)

    async def _vocabulary(self) -> Vocabulary:
        if self._loading is None:
            self._loading = asyncio.create_task(asyncio.to_thread(self._load))
        return await asyncio.shield(self._loading)

    def _load(self) -> Vocabulary:
        return Vocabulary(self._compiler.vocabulary, continuation(Tokenizer.load(self._settings.folder)))

    async def close(self) -> None:
        """Ends the compiling processes."""
        await self._compiler.close()


def continuation(tokenizer: Tokenizer) -> Callable[[str], Sequence[int]]:
    """How a text is tokenised behind another one."""
    anchor: TokenIds = tuple(tokenizer.encode(ANCHOR))

    def encode(text: str) -> Sequence[int]:
        whole = tokenizer.encode(ANCHOR + text)
        joined = tuple(whole[: len(anchor)]) != anchor
        return tokenizer.encode(text) if joined else whole[len(anchor) :]

    return encode
