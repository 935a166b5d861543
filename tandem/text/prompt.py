"""Prompts: a conversation rendered and tokenised once for the whole cluster, with what is known from earlier turns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.errors import BadRequest
from tandem.text.detokenizer import CONTEXT_TOKENS
from tandem.text.tokenizer import Message, Tokenizer
from tandem.text.turns import Boundaries, Boundary, Turn, TurnCache
from tandem.types import TokenIds

log = logging.getLogger(__name__)

_PROBE = "tandemprobe"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Where a chat prompt ends, so that its answer can be remembered after it."""

    boundaries: Boundaries
    after: tuple[Turn, int] | None
    """The last remembered end of turn in the prompt, and the number of ids up to there."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt."""

    ids: TokenIds
    reused: int = 0
    """Ids at the start that came from earlier turns and were not tokenised again."""
    conversation: Conversation | None = None
    """Only for chats that may be remembered, and whose template ends turns with a special token."""


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The special token by which the chat template ends the assistant's turns."""

    token: int
    text: str


class PromptTokenizer:
    """Tokenises prompts for one model and remembers conversations. Not for use from several threads."""

    def __init__(self, tokenizer: Tokenizer, turns: TurnCache | None = None) -> None:
        self.tokenizer = tokenizer
        self.turns = TurnCache() if turns is None else turns
        self.turn_end = find_turn_end(tokenizer)
        """None: nothing can be remembered, and every prompt is tokenised whole."""

    async def chat(self, messages: Sequence[Message], salt: str = "") -> Prompt:
        """A conversation that the model is to go on with. Raises BadRequest when the template refuses it."""
        return await self.rendered(await self.tokenizer.render_async(messages), salt)

    async def rendered(self, text: str, salt: str = "", limit: int | None = None) -> Prompt:
        """A conversation as the template wrote it. The ids decode to the same text as those of a plain encoding.

        limit: ids of one that may be remembered, at most. Who is refused has paid for nothing, and must not make this
        forget what others said.
        """
        if self.turn_end is None:
            return Prompt(tuple(await self.tokenizer.encode_async(text)))
        boundaries = Boundaries(text, self.turn_end.text, salt)
        match = self.turns.longest(boundaries.found)
        if match is not None:
            boundary, turn = match
            # Encoded behind the end-of-turn token, as it will stand: some tokenisers treat a text's start specially.
            rest = await self.tokenizer.encode_async(self.turn_end.text + text[boundary.position :])
            if rest and rest[0] == self.turn_end.token:
                known = turn.all_ids()
                ids = (*known, *rest[1:])
                new = [each for each in boundaries.found if each.position > boundary.position]
                if limit is not None and len(ids) > limit:
                    return Prompt(ids, len(known))
                last = self._add_turns(ids, text[boundary.position :], new, (turn, len(known)))
                return Prompt(ids, len(known), Conversation(boundaries, last))
        ids = tuple(await self.tokenizer.encode_async(text))
        if limit is not None and len(ids) > limit:
            return Prompt(ids)
        return Prompt(ids, 0, Conversation(boundaries, self._add_turns(ids, text, boundaries.found, None)))

    async def plain(self, text: str, add_special_tokens: bool = True) -> Prompt:
        """A text to be completed, with the special tokens that the tokeniser puts around texts if they are wanted."""
        return Prompt(tuple(await self.tokenizer.encode_async(text, add_special_tokens)))

    def remember(self, prompt: Prompt, answer: Sequence[int], text: str) -> bool:
        """Keeps an answer's own ids, for when its text comes back as a turn. Returns whether it was kept.

        answer: sampled ids without the token that ended it. text: what the client was given. Nothing is kept unless
        the ids, special tokens included, decode to exactly this text where they stand.
        """
        if prompt.conversation is None or self.turn_end is None or not answer:
            return False
        context = list(prompt.ids[-CONTEXT_TOKENS:])
        before = self.tokenizer.decode(context, skip_special_tokens=False)
        after = self.tokenizer.decode([*context, *answer, self.turn_end.token], skip_special_tokens=False)
        if after != before + text + self.turn_end.text:
            return False
        key = prompt.conversation.boundaries.extended(text + self.turn_end.text)
        # Of the prompt only what follows its last boundary is copied, which each of many choices would do.
        end = (*answer, self.turn_end.token)
        self.turns.add(key, prompt.ids, len(prompt.ids), prompt.conversation.after, end)
        return True

    def _add_turns(
        self, ids: TokenIds, text: str, boundaries: Sequence[Boundary], after: tuple[Turn, int] | None
    ) -> tuple[Turn, int] | None:
        """Remembers `ids` at each of the `boundaries`, which lie in `text`, what follows the turn `after`.

        Nothing new is remembered when the token's spellings in the text and its ids do not correspond one to one.
        """
        assert self.turn_end is not None
        start = after[1] if after is not None else 0
        ends = [index + 1 for index in range(start, len(ids)) if ids[index] == self.turn_end.token]
        if len(ends) != text.count(self.turn_end.text):
            return after
        for boundary, end in zip(boundaries, ends[len(ends) - len(boundaries) :], strict=True):
            after = (self.turns.add(boundary.key, ids, end, after), end)
        return after


def find_turn_end(tokenizer: Tokenizer) -> TurnEnd | None:
    """The special token that the chat template writes right after an assistant's text; None if there is none."""
    if not tokenizer.has_chat_template:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    try:
        rendered = tokenizer.render(messages, add_generation_prompt=False)
    except BadRequest as error:
        log.warning("turns will not be remembered: %s", error)
        return None
    _, found, after = rendered.partition(_PROBE)
    specials = {token: tokenizer.token(token) or "" for token in tokenizer.special_ids}
    ends = [TurnEnd(token, text) for token, text in specials.items() if text and after.startswith(text)]
    if not found or not ends:
        log.info("the chat template ends turns without a special token: turns will not be remembered")
        return None
    return max(ends, key=lambda end: len(end.text))
