"""OpenAI's answers: whole ones as dictionaries, streamed ones as preformatted SSE chunks.

A streamed chunk is bytes around the one thing that changes, the JSON string of the new text: everything else of it is
formatted once for each choice.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from router.answers.answer import TotalUsage
from router.answers.deltas import delta, message
from router.answers.stream import Piece, PlacedLogprob
from router.requests.job import Job
from tandem.text.formats.parts import Part, Text
from tandem.text.tokenizer import Tokenizer
from tandem.types import FinishReason, TokenLogprob

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
LIST_PART = 4096
LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON has not."""

string_json = json.encoder.encode_basestring
"""A string's JSON, as `to_json` writes it."""
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return _encode(value).encode()


def list_json(values: Sequence[Any]) -> bytes:
    """A long list's JSON, a few thousand values at a time: the encoder holds the interpreter's lock."""
    parts = (to_json(values[start : start + LIST_PART])[1:-1] for start in range(0, len(values), LIST_PART))
    return b"[" + b",".join(parts) + b"]"


def event(value: Json) -> bytes:
    """One SSE event."""
    return b"data: " + to_json(value) + b"\n\n"


NO_USAGE = b',"usage":null}\n\n'
"""How a chunk ends when usage was asked for; JSON holds no bare newline, so it stands nowhere else."""


def with_usage(chunks: bytes, usage: TotalUsage) -> bytes:
    """The same chunks with the usage so far instead of none."""
    return chunks.replace(NO_USAGE, b',"usage":' + to_json(usage_json(usage)) + b"}\n\n")


def usage_json(usage: TotalUsage) -> Json:
    """OpenAI's `usage`."""
    told: Json = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens is not None:
        told["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return told


class Format(ABC):
    """One API's way to write an answer; what chat completions and completions have in common is here."""

    prefix: str
    stream_object: str
    whole_object: str

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self.job = job
        self.tokenizer = tokenizer
        self.created = int(time.time())
        self.choices = sum(request.choices for request in job.requests)
        self._tail = NO_USAGE if job.options.include_usage else b"}\n\n"

    def head(self, object_name: str) -> Json:
        """The fields that every object of this answer starts with."""
        return {
            "id": f"{self.prefix}-{self.job.job_id}",
            "object": object_name,
            "created": self.created,
            "model": self.job.served_name,
            "system_fingerprint": f"fp_{self.job.model.fingerprint[:12]}",
        }

    @abstractmethod
    def opening(self) -> list[bytes]:
        """Events that are sent before any text."""

    @abstractmethod
    def chunk(self, piece: Piece) -> bytes:
        """The events for a piece."""

    @abstractmethod
    def text_chunk(self, choice: int, text: str) -> bytes:
        """The event for a piece that is text and nothing else."""

    @abstractmethod
    def whole_choice(self, pieces: list[Piece], text: str, placed: tuple[PlacedLogprob, ...]) -> Json:
        """What a choice of a whole answer says beside its index and its end. text, placed: those of all its pieces."""

    def whole(self, pieces: list[list[Piece]], usage: TotalUsage) -> Json:
        """The answer in one object; pieces: those of each choice, in order."""
        choices = []
        for index, mine in enumerate(pieces):
            text = "".join(piece.text for piece in mine)
            placed = tuple(entry for piece in mine for entry in piece.logprobs)
            finish = {"finish_reason": finish_word(mine[-1]), "stop_reason": mine[-1].stop}
            choices.append({"index": index, **self.whole_choice(mine, text, placed), **finish})
        return {**self.head(self.whole_object), "choices": choices, "usage": usage_json(usage)}

    def usage_chunk(self, usage: TotalUsage) -> bytes:
        """The last event before [DONE], when the client asked for usage."""
        return event({**self.head(self.stream_object), "choices": [], "usage": usage_json(usage)})

    def before_choice(self) -> bytes:
        """A chunk up to its only choice."""
        return b"data: " + to_json(self.head(self.stream_object))[:-1] + b',"choices":['

    def after_choice(self) -> bytes:
        """A chunk from after its only choice."""
        return b"]" + self._tail

    def token_text(self, token: int, first: bool = False) -> str:
        """Text of one token by itself; bytes of an incomplete character as U+FFFD. first: see `PlacedLogprob`."""
        return self.tokenizer.token_bytes(token, first).decode("utf-8", "replace")

    def prompt_logprobs(self, entries: tuple[TokenLogprob | None, ...]) -> list[Json | None]:
        """In vLLM's form: for each prompt token but the first, its own and its likeliest rivals' by id."""
        wanted = self.job.options.prompt_logprobs or 0
        return [None if entry is None else self._ranked(entry, wanted) for entry in entries]

    def _ranked(self, entry: TokenLogprob, wanted: int) -> Json:
        rivals = dict(entry.top[:wanted])
        rivals.setdefault(entry.token, entry.logprob)
        return {
            str(token): {"logprob": finite(logprob), "decoded_token": self.token_text(token)}
            for token, logprob in rivals.items()
        }


class ChatFormat(Format):
    """`/v1/chat/completions`"""

    prefix = "chatcmpl"
    stream_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        super().__init__(job, tokenizer)
        head, tail = self.before_choice(), self.after_choice()
        self._head = head
        self._text_head = [head + b'{"index":%d,"delta":{"content":' % index for index in range(self.choices)]
        self._text_tail = b'},"logprobs":null,"finish_reason":null}' + tail

    def opening(self) -> list[bytes]:
        """A chunk with the role for each choice."""
        form = self.job.options.form
        # As OpenAI does: where calls may come, text may not.
        first = {"role": "assistant", "content": "" if form is None or form.tools is None else None}
        return [self._chunk(index, first, None, None) for index in range(self.choices)]

    def chunk(self, piece: Piece) -> bytes:
        """See `Format`. The end is an event of its own, after the last text."""
        out = b""
        if piece.parts is not None:
            out = self._part_chunks(piece, piece.parts)
        elif piece.text or piece.logprobs:
            if piece.logprobs:
                out = self._chunk(piece.choice, {"content": piece.text}, self._logprobs(piece.logprobs), None)
            else:
                out = self.text_chunk(piece.choice, piece.text)
        if piece.prompt_logprobs:
            extra: Json = {"prompt_logprobs": self.prompt_logprobs(piece.prompt_logprobs)}
            out = self._chunk(piece.choice, {}, None, None, extra) + out
        if piece.finish is not None:
            extra = {"stop_reason": piece.stop} if piece.stop is not None else {}
            out += self._chunk(piece.choice, {}, None, finish_word(piece), extra)
        return out

    def text_chunk(self, choice: int, text: str) -> bytes:
        """See `Format`."""
        return self._text_head[choice] + string_json(text).encode() + self._text_tail

    def whole_choice(self, pieces: list[Piece], text: str, placed: tuple[PlacedLogprob, ...]) -> Json:
        """See `Format`."""
        logprobs = self._logprobs(placed) if self.job.options.logprobs is not None else None
        parts = [part for piece in pieces for part in ((Text(piece.text),) if piece.parts is None else piece.parts)]
        return {"message": message(parts), "logprobs": logprobs}

    def whole(self, pieces: list[list[Piece]], usage: TotalUsage) -> Json:
        """See `Format`."""
        prompt = first_prompt_logprobs(pieces[0])
        extra = {"prompt_logprobs": self.prompt_logprobs(prompt)} if prompt else {}
        return {**super().whole(pieces, usage), **extra}

    def _part_chunks(self, piece: Piece, parts: tuple[Part, ...]) -> bytes:
        """A chunk for each part; the first brings the log-probabilities of all."""
        if not piece.logprobs and len(parts) == 1 and isinstance(parts[0], Text):
            return self.text_chunk(piece.choice, parts[0].text)
        logprobs = self._logprobs(piece.logprobs) if piece.logprobs else None
        deltas = [delta(part) for part in parts] or ([{}] if logprobs else [])
        return b"".join(
            self._chunk(piece.choice, each, logprobs if not index else None, None) for index, each in enumerate(deltas)
        )

    def _chunk(
        self, index: int, said: Json, logprobs: Json | None, finish: str | None, extra: Json | None = None
    ) -> bytes:
        choice = {"index": index, "delta": said, "logprobs": logprobs, "finish_reason": finish, **(extra or {})}
        return self._head + to_json(choice) + self.after_choice()

    def _logprobs(self, placed: tuple[PlacedLogprob, ...]) -> Json:
        wanted = self.job.options.logprobs or 0
        content = []
        for each in placed:
            top = [self._entry(token, logprob, each.first) for token, logprob in each.entry.top[:wanted]]
            content.append({**self._entry(each.entry.token, each.entry.logprob, each.first), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float, first: bool) -> Json:
        data = self.tokenizer.token_bytes(token, first)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


def finish_word(piece: Piece) -> str | None:
    """OpenAI's `finish_reason`; pieces that end otherwise never get here."""
    if piece.called and piece.finish is FinishReason.STOP:
        return "tool_calls"
    return None if piece.finish is None else piece.finish.value


def first_prompt_logprobs(pieces: list[Piece]) -> tuple[TokenLogprob | None, ...]:
    """The prompt's log-probabilities, which come with one of a choice's pieces if they were asked for."""
    return next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs), ())


def finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, LEAST_LOGPROB)
