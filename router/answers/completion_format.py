"""Answers of `/v1/completions`, in OpenAI's older form: text, the echo of the prompt, parallel lists of logprobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from router.answers.answer import TotalUsage
from router.answers.responses import Format, Json, finish_word, finite, first_prompt_logprobs, string_json, to_json
from router.answers.stream import Piece, PlacedLogprob
from router.requests.job import Job
from tandem.text.tokenizer import Tokenizer
from tandem.types import TokenLogprob


@dataclass(slots=True)
class Scores:
    """The parallel lists of a choice's log-probabilities; entries of the first prompt token are None."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def json(self) -> Json:
        """OpenAI's `logprobs`."""
        return {name: getattr(self, name) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}


class CompletionFormat(Format):
    """`/v1/completions`"""

    prefix = "cmpl"
    stream_object = "text_completion"
    whole_object = "text_completion"

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        super().__init__(job, tokenizer)
        self._head = self.before_choice()
        self._text_head = [self._head + b'{"index":%d,"text":' % index for index in range(self.choices)]
        self._text_tail = b',"logprobs":null,"finish_reason":null}' + self.after_choice()
        self._prompt_of = [rank for rank, request in enumerate(job.requests) for _ in range(request.choices)]
        """The prompt each choice belongs to."""
        self._prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = {}
        """By prompt; they come with its first choice."""
        scored = any(echo.offsets is not None for echo in job.echo)
        self._unechoed = set(range(self.choices)) if scored else set()
        """Choices of a stream whose echo waits for the prompt's log-probabilities."""
        self._untold = set(range(len(job.requests))) if job.options.prompt_logprobs is not None else set()
        """Prompts of a whole answer whose own log-probabilities no choice has told yet."""

    def opening(self) -> list[bytes]:
        """The prompts, when they are to be echoed and nothing has to be known of them."""
        if self._unechoed:
            return []
        echoes = ((index, self.job.echo[prompt].text) for index, prompt in enumerate(self._prompt_of))
        return [self._chunk(index, text, None, None) for index, text in echoes if text]

    def chunk(self, piece: Piece) -> bytes:
        """See `Format`."""
        if piece.prompt_logprobs:
            self._prompt_logprobs[self._prompt_of[piece.choice]] = piece.prompt_logprobs
        if piece.finish is None and not (piece.logprobs or piece.prompt_logprobs or self._unechoed):
            return self._text_head[piece.choice] + string_json(piece.text).encode() + self._text_tail
        before = b""
        if piece.choice in self._unechoed:
            self._unechoed.remove(piece.choice)
            echo = self.job.echo[self._prompt_of[piece.choice]]
            before = self._chunk(piece.choice, echo.text, self._logprobs((), piece.choice, True), None)
        logprobs = self._logprobs(piece.logprobs, piece.choice) if piece.logprobs else None
        extra: Json = {"stop_reason": piece.stop} if piece.stop is not None else {}
        if piece.prompt_logprobs and self.job.options.prompt_logprobs is not None:
            extra["prompt_logprobs"] = self.prompt_logprobs(piece.prompt_logprobs)
        return before + self._chunk(piece.choice, piece.text, logprobs, finish_word(piece), extra)

    def text_chunk(self, choice: int, text: str) -> bytes:
        """See `Format`."""
        return self.chunk(Piece(choice, text))

    def whole(self, pieces: list[list[Piece]], usage: TotalUsage) -> Json:
        """See `Format`. Of more choices than are to be answered (`best_of`) it takes each prompt's best."""
        for mine in pieces:
            if prompt := first_prompt_logprobs(mine):
                self._prompt_logprobs[self._prompt_of[mine[0].choice]] = prompt
        return super().whole(list(self._kept(pieces)), usage)

    def whole_choice(self, pieces: list[Piece], text: str, placed: tuple[PlacedLogprob, ...]) -> Json:
        """See `Format`."""
        choice, prompt = pieces[0].choice, self._prompt_of[pieces[0].choice]
        echo = self.job.echo[prompt]
        wanted = self.job.options.logprobs is not None
        logprobs = self._logprobs(placed, choice, echo.offsets is not None) if wanted else None
        extra: Json = {}
        if prompt in self._untold:
            self._untold.remove(prompt)
            extra["prompt_logprobs"] = self.prompt_logprobs(self._prompt_logprobs.get(prompt, ()))
        return {"text": echo.text + text, "logprobs": logprobs, **extra}

    def _kept(self, pieces: list[list[Piece]]) -> Iterator[list[Piece]]:
        keep, start = self.job.keep, 0
        for request in self.job.requests:
            mine = pieces[start : start + request.choices]
            start += request.choices
            yield from mine if len(mine) <= keep else sorted(mine, key=mean_logprob, reverse=True)[:keep]

    def _chunk(
        self, index: int, text: str, logprobs: Json | None, finish: str | None, extra: Json | None = None
    ) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish, **(extra or {})}
        return self._head + to_json(choice) + self.after_choice()

    def _logprobs(self, placed: tuple[PlacedLogprob, ...], choice: int, echoed: bool = False) -> Json:
        """Of output tokens; echoed: of the prompt's tokens before them."""
        scores, prompt = Scores(), self._prompt_of[choice]
        echo = self.job.echo[prompt]
        if echoed:
            ids, entries = self.job.requests[prompt].prompt, self._prompt_logprobs.get(prompt, ())
            start = next((at for at, token in enumerate(ids) if token not in self.tokenizer.special_ids), None)
            for at, (token, offset, entry) in enumerate(zip(ids, echo.offsets or (), entries, strict=True)):
                self._append(scores, token, entry, offset, at == start)
        for each in placed:
            self._append(scores, each.entry.token, each.entry, len(echo.text) + each.offset, each.first)
        return scores.json()

    def _append(self, scores: Scores, token: int, entry: TokenLogprob | None, offset: int, first: bool) -> None:
        text = self.token_text(token, first)
        scores.tokens.append(text)
        scores.text_offset.append(offset)
        scores.token_logprobs.append(None if entry is None else finite(entry.logprob))
        if entry is None:
            scores.top_logprobs.append(None)
            return
        best: dict[str, float] = {}
        for rival, logprob in entry.top[: self.job.options.logprobs or 0]:
            best.setdefault(self.token_text(rival, first), finite(logprob))
        # OpenAI's lists hold the token itself, too, however unlikely it was.
        best.setdefault(text, finite(entry.logprob))
        scores.top_logprobs.append(best)


def mean_logprob(pieces: Sequence[Piece]) -> float:
    """What `best_of` compares: the mean log-probability of a choice's tokens; minus infinity without any."""
    found = [placed.entry.logprob for piece in pieces for placed in piece.logprobs]
    return sum(found) / len(found) if found else float("-inf")
