"""Prompts: a conversation rendered and tokenised once for the whole cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.text.tokenizer import Message, Tokenizer
from tandem.types import TokenIds


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt."""

    ids: TokenIds


class PromptTokenizer:
    """Tokenises prompts for one model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    async def chat(self, messages: Sequence[Message], salt: str = "") -> Prompt:
        """A conversation that the model is to go on with. Raises BadRequest when the template refuses it."""
        rendered = self.tokenizer.render(messages)
        return Prompt(tuple(await self.tokenizer.encode_async(rendered)))

    async def plain(self, text: str) -> Prompt:
        """A text to be completed, with the special tokens that the tokeniser puts around texts."""
        return Prompt(tuple(await self.tokenizer.encode_async(text, add_special_tokens=True)))
