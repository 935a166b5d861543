"""A choice's token deltas become pieces of text: detokenised, cut at stop strings, with their log-probabilities."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from router.requests.job import OutputOptions
from tandem.errors import Internal
from tandem.text.detokenizer import detokenizer
from tandem.text.formats.answer import AnswerParser
from tandem.text.formats.parts import Part, joined
from tandem.text.stop import StopStrings
from tandem.text.tokenizer import Tokenizer
from tandem.types import Delta, FinishReason, TokenIds, TokenLogprob, Usage


@dataclass(frozen=True, slots=True)
class PlacedLogprob:
    """A token's log-probability and where its text starts in the choice's text, in characters."""

    entry: TokenLogprob
    offset: int
    first: bool = False
    """No token's text stands before it, in the prompt neither: some tokenisers drop its space there."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What can be given to the client now. Text never ends inside a character or a possible stop string."""

    choice: int
    text: str
    """As the model wrote it."""
    logprobs: tuple[PlacedLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None
    """The stop string or the client's own stop token that ended the choice."""
    error: str = ""
    parts: tuple[Part, ...] | None = None
    """What the text says, as far as it is certain; None where all of it is text."""
    called: bool = False
    """The choice has called a tool, in this piece or before."""


class ChoiceStream:
    """State of one choice on its way to the client. It ends exactly once; later deltas only bring the usage."""

    def __init__(
        self, choice: int, tokenizer: Tokenizer, options: OutputOptions, context: TokenIds, eos: TokenIds
    ) -> None:
        """context: the prompt's last tokens. eos: the model's own end-of-sequence ids, which never become text."""
        self.choice = choice
        self.tokens: list[int] = []
        """Output tokens up to the end, stop token included."""
        self.text: list[str] = []
        """Text given out so far."""
        self.usage: Usage | None = None
        self.finish: FinishReason | None = None
        self.stop_token: int | None = None
        asked = options.stop or options.form is not None or options.logprobs is not None or options.continuous_usage
        self.plain = not asked
        """Its tokens become text, and nothing else is asked of them."""
        self._options = options
        self._eos = frozenset(eos)
        self._detokenizer = detokenizer(tokenizer, context, keep=options.special)
        self._parser = AnswerParser(options.form) if options.form is not None else None
        self._starts: list[int] = []
        """Where each token's text starts; kept only for counting reasoning."""
        self._stops = StopStrings(options.stop)
        self._position = 0
        """Characters detokenised, given out or held back."""
        self._given = 0
        self._logprobs: deque[PlacedLogprob] = deque()

    def feed(self, delta: Delta) -> Piece | None:
        """The piece that `delta` completes; None when there is nothing to give yet, or the choice had ended before.

        Raises Internal when tokens are missing in between; tokens that were seen before are dropped.
        """
        self.usage = delta.usage or self.usage
        if self.finish is not None:
            return None
        seen = len(self.tokens) - delta.first_index
        if seen < 0:
            raise Internal(f"choice {delta.choice} goes on at token {delta.first_index} after {len(self.tokens)}")
        text = ""
        for index in range(seen, len(delta.tokens)):
            text += self._token(delta, index)
            if self._stops.hit is not None:
                return self._end(FinishReason.STOP, text, self._stops.hit, delta)
        if delta.finish is not None:
            self.stop_token = delta.stop_token
            tail = self._through_stops(self._detokenizer.finish())
            if self._stops.hit is not None:
                return self._end(FinishReason.STOP, text + tail, self._stops.hit, delta)
            named = None if delta.stop_token in self._eos else delta.stop_token
            return self._end(delta.finish, text + tail + self._stops.finish(), named, delta)
        prompt_logprobs = delta.prompt_logprobs
        if not text and not prompt_logprobs:
            return None
        piece = self._piece(text, prompt_logprobs=prompt_logprobs)
        return piece if piece.parts is None or piece.parts or prompt_logprobs else None

    def plain_text(self, tokens: Sequence[int]) -> str:
        """What `feed` would make of a plain choice's next tokens, before its end."""
        self.tokens += tokens
        feed = self._detokenizer.feed
        text = feed(tokens[0]) if len(tokens) == 1 else "".join([feed(token) for token in tokens])
        if text:
            self._position += len(text)
            self._given += len(text)
            self.text.append(text)
        return text

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens spent on reasoning up to now; None when it is not looked for."""
        if self._parser is None or self._options.form is None or self._options.form.reasoning is None:
            return None
        end = self._parser.reasoning_end
        return len(self.tokens) if end is None else bisect_left(self._starts, end)

    def whole_answer(self) -> list[int] | None:
        """The ids of the answer's text, without the token that ended it; None when a stop string cut into them."""
        if self._stops.hit is not None or self.finish is None:
            return None
        if self.stop_token is not None and self.tokens and self.tokens[-1] == self.stop_token:
            return self.tokens[:-1]
        return self.tokens

    def _token(self, delta: Delta, index: int) -> str:
        token = delta.tokens[index]
        self.tokens.append(token)
        start = self._position + self._detokenizer.held
        if self._parser is not None:
            self._starts.append(start)
        if delta.logprobs:
            self._logprobs.append(PlacedLogprob(delta.logprobs[index], start, not self._detokenizer.started))
        if token == delta.stop_token and token in self._eos and index + 1 == len(delta.tokens):
            return ""
        return self._through_stops(self._detokenizer.feed(token))

    def _through_stops(self, text: str) -> str:
        self._position += len(text)
        if len(self.tokens) <= self._options.min_tokens:
            return text
        return self._stops.feed(text)

    def _end(self, finish: FinishReason, text: str, stop: str | int | None, delta: Delta) -> Piece:
        self.finish = finish
        cut = self._given + len(text)
        if self._stops.hit is not None:
            self._logprobs = deque(placed for placed in self._logprobs if placed.offset < cut)
        error = ""
        if finish is FinishReason.ERROR or finish is FinishReason.CANCELLED:
            error = delta.error or "the request was cancelled by the cluster"
        return self._piece(text, finish, stop, error, delta.prompt_logprobs)

    def _piece(
        self,
        text: str,
        finish: FinishReason | None = None,
        stop: str | int | None = None,
        error: str = "",
        prompt_logprobs: tuple[TokenLogprob | None, ...] = (),
    ) -> Piece:
        self.text.append(text)
        self._given += len(text)
        parts = self._parsed(text, finish is not None)
        ready = []
        # Text that the parser holds back takes its log-probabilities with it.
        given = self._given if parts is None or parts else 0
        while self._logprobs and (finish is not None or self._logprobs[0].offset < given):
            ready.append(self._logprobs.popleft())
        if self._parser is not None and self._options.form is not None and self._options.form.hide_reasoning:
            # Nothing is given out before hidden reasoning is over, so that its end, if it has one, is known here.
            end = self._parser.reasoning_end
            ready = [placed for placed in ready if end is not None and placed.offset >= end]
        called = self._parser is not None and self._parser.called
        return Piece(self.choice, text, tuple(ready), prompt_logprobs, finish, stop, error, parts, called)

    def _parsed(self, text: str, last: bool) -> tuple[Part, ...] | None:
        if self._parser is None:
            return None
        parts = self._parser.feed(text)
        return tuple(joined([*parts, *self._parser.finish()]) if last else parts)
