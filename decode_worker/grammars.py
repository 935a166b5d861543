"""Grammars of a decode worker's requests: compiled before a request is admitted, one constraint for each choice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers

from tandem.engine.grammar.compiler import CompilerSettings, GrammarCompiler, refusal
from tandem.engine.grammar.constraint import GrammarConstraint, Vocabulary
from tandem.engine.grammar.masks import fits
from tandem.engine.sequence import TokenConstraint
from tandem.text.tokenizer import Tokenizer
from tandem.types import Grammar, TokenIds

ANCHOR = "\n"
"""Stands before a text that is to be tokenised as a continuation: tokenisers treat the start of a text in ways of
their own."""

Encode = Callable[[str], Sequence[int]]
MakeConstraint = Callable[[], TokenConstraint]


class Grammars:
    """All methods run on the event loop."""

    def __init__(self, settings: CompilerSettings) -> None:
        self._settings = settings
        self._compiler = GrammarCompiler(settings)
        self._loading: asyncio.Task[Vocabulary] | None = None

    async def compile(self, grammar: Grammar) -> MakeConstraint:
        """What makes a fresh constraint. Raises BadRequest if it cannot be served, Unavailable, Overloaded."""
        compiled = await self._compiler.compile(grammar)
        if not fits(GrammarConstraint(compiled), self._settings.vocab_size):
            raise refusal(grammar, "no token of this model can begin such a text")
        vocabulary = await self._vocabulary()
        return lambda: GrammarConstraint(compiled, vocabulary, grammar.after)

    async def _vocabulary(self) -> Vocabulary:
        loading = self._loading
        # What failed is begun anew: the machine may have been short of memory or of files for a moment.
        if loading is None or (loading.done() and (loading.cancelled() or loading.exception() is not None)):
            loading = self._loading = asyncio.create_task(asyncio.to_thread(self._load))
        return await asyncio.shield(loading)

    def _load(self) -> Vocabulary:
        return Vocabulary(self._compiler.vocabulary, continuation(_encoder(self._settings.folder)))

    async def close(self) -> None:
        """Ends the compiling processes."""
        await self._compiler.close()


def _encoder(folder: str) -> Encode:
    """The model's tokeniser for plain text.

    Its own file is enough: transformers would load torch's compiler, seconds of Python beside the engine's.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return Tokenizer.load(folder).encode
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()

    def encode(text: str) -> Sequence[int]:
        # Batches are encoded without Python's lock.
        (encoded,) = backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoded.ids)

    return encode


def continuation(encode: Encode) -> Encode:
    """How a text is tokenised behind another one. encode: without special tokens around it."""
    anchor: TokenIds = tuple(encode(ANCHOR))

    def behind(text: str) -> Sequence[int]:
        whole = encode(ANCHOR + text)
        joined = tuple(whole[: len(anchor)]) != anchor
        return encode(text) if joined else whole[len(anchor) :]

    return behind
