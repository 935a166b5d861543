"""The tokeniser and the chat template of a checkpoint, without torch.

Loading goes through transformers' `AutoTokenizer`, so that what a checkpoint's configuration says about special tokens
and templates holds here too. Encoding and decoding then go straight to the Rust tokeniser inside it: the wrapper costs
more than short texts do.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem.config import set_before_import
from tandem.errors import BadRequest
from tandem.text.byte_tokens import BYTE_TOKEN, byte_level_bytes
from tandem.text.decoder_parser import Decoding, NotStreamed, parse
from tandem.text.loading import load_wrapped, one_line
from tandem.text.time_limit import within

log = logging.getLogger(__name__)

LONG_TEXT = 8192
"""Characters from which encoding leaves the event loop (about a millisecond of work)."""
HUGE_TEXT = 1 << 18
"""Characters from which texts take turns: they keep a thread for tenths of a second, up to seconds."""
HUGE_AT_ONCE = 2
"""Of those at once: chat templates, and other texts, need the loop's threads too."""
MANY_IDS = 4096
"""Ids from which decoding does."""
TEMPLATE_S = 5.0
"""Seconds for rendering one conversation; thousands of turns take tenths of one."""
TEMPLATE_OWN = frozenset({"messages", "raise_exception", "strftime_now"})
"""Names that every chat template can use."""

Message = Mapping[str, Any]


def import_transformers_without_torch() -> None:
    """Imports transformers such that it takes torch for absent, which saves a second and 200 MB.

    For processes that never compute, called before anything else imports transformers; it has no effect afterwards.
    transformers 5 reads no variable for this: it asks `importlib` whether torch can be found, and an entry of None in
    `sys.modules` is the documented way to say no.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    set_before_import({"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"})  # it would advise to install torch
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import transformers.utils.import_utils as answers

        answers.is_torch_available()  # the answer is kept
        from transformers import AutoTokenizer  # noqa: F401
    finally:
        del sys.modules["torch"]


class Tokenizer:
    """A checkpoint's tokeniser. Safe to use from several threads."""

    def __init__(self, wrapped: Any) -> None:
        """wrapped: a transformers tokeniser with a Rust backend (`PreTrainedTokenizerFast`)."""
        self._wrapped = wrapped
        self.backend: Any = wrapped.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self._huge: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None
        """Turns of huge texts, and the loop that they are of."""
        added = self.backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        """Ids that decoding skips by default."""
        self._clean_up: bool = _cleans_up(wrapped)
        self.decoding: Decoding | None = _decoding(self.backend, self._clean_up)
        """How tokens become text, for streams; None if only whole texts can be decoded."""
        self.byte_level: bool = self.decoding is not None and self.decoding.byte_level
        """Every token is a string of bytes (GPT-2's scheme)."""
        self.size: int = self.backend.get_vocab_size(with_added_tokens=True)
        """Number of tokens. Ids may have gaps, and the model's own vocabulary may be padded to more."""
        self._bytes: dict[tuple[int, bool], bytes] = {}
        """Memory of `token_bytes`; at most two entries for each token that there is."""
        self._whole: dict[int, str] = {}
        """Memory of `whole_text`."""

    @classmethod
    def load(cls, path: str, chat_template: Path | None = None) -> Tokenizer:
        """Loads from a folder or a hub id, see `load_wrapped`. Raises CheckpointError."""
        return cls(load_wrapped(path, chat_template))

    @property
    def has_chat_template(self) -> bool:
        """Whether chat completions can be served."""
        return bool(self._wrapped.chat_template)

    @property
    def knows_developer(self) -> bool:
        """Whether the chat template tells the `developer` role from `system`."""
        return "developer" in str(self._wrapped.chat_template)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids."""
        if len(text) < LONG_TEXT:
            encoded = self.backend.encode(text, add_special_tokens=add_special_tokens)
        else:
            # The Rust tokeniser releases the interpreter lock for batches only.
            (encoded,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded.ids
        return ids

    async def encode_rendered(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of what a chat template wrote; its own BOS stays the only one where special tokens are added."""
        ids = await self.encode_async(text, add_special_tokens)
        bos: int | None = self._wrapped.bos_token_id
        return ids[1:] if add_special_tokens and bos is not None and ids[:2] == [bos, bos] else ids

    async def encode_async(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """As `encode`; long texts are encoded in threads, huge ones only `HUGE_AT_ONCE`: the others wait.

        Not for use from several loops at once.
        """
        if len(text) < LONG_TEXT:
            return self.encode(text, add_special_tokens)
        if len(text) < HUGE_TEXT:
            return await asyncio.to_thread(self.encode, text, add_special_tokens)
        loop = asyncio.get_running_loop()
        if self._huge is None or self._huge[0] is not loop:
            self._huge = loop, asyncio.Semaphore(HUGE_AT_ONCE)
        turns = self._huge[1]
        await turns.acquire()
        work = loop.run_in_executor(None, self.encode, text, add_special_tokens)
        work.add_done_callback(lambda _: turns.release())
        # A thread goes on when its caller is cancelled, and keeps its turn.
        return await asyncio.shield(work)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token are skipped."""
        text: str
        if len(ids) < MANY_IDS:
            text = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        else:
            (text,) = self.backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        return self._wrapped.clean_up_tokenization(text) if self._clean_up else text

    async def decode_async(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """As `decode`; many ids are decoded in a thread."""
        if len(ids) < MANY_IDS:
            return self.decode(ids, skip_special_tokens)
        return await asyncio.to_thread(self.decode, ids, skip_special_tokens)

    @property
    def template_text(self) -> str:
        """The source of the chat template, of all of them if there are several; empty if there is none."""
        template = self._wrapped.chat_template or ""
        return template if isinstance(template, str) else "\n".join(map(str, template.values()))

    @property
    def template_names(self) -> frozenset[str]:
        """What a chat template sees that a request may not replace."""
        parameters = inspect.signature(self._wrapped.apply_chat_template).parameters
        return frozenset(parameters) | frozenset(self._wrapped.special_tokens_map) | TEMPLATE_OWN

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the model expects it, in transformers' jinja sandbox.

        tools: declarations of functions, as OpenAI has them. values: further names that the template may know.
        Raises BadRequest when the template refuses the messages or the checkpoint has no template.
        """
        if not self.has_chat_template:
            raise BadRequest("this model has no chat template; use /v1/completions", "messages")
        try:
            rendered: str = self._wrapped.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(values or {}),
            )
        except Exception as error:  # a template may raise anything: it is a program of the checkpoint's author
            raise BadRequest(f"the chat template refused the messages: {one_line(error)}", "messages") from error
        return rendered

    async def render_async(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        values: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """As `render`, in a thread: a template is a program, and how long it runs is not known from the messages.

        Raises BadRequest when it takes longer than `TEMPLATE_S`, too.
        """
        try:
            return await within(TEMPLATE_S, lambda: self.render(messages, add_generation_prompt, tools, values))
        except TimeoutError:
            raise BadRequest(
                f"the chat template took longer than {TEMPLATE_S:g} seconds over the messages", "messages"
            ) from None

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id; None for an id without a token."""
        spelling: str | None = self.backend.id_to_token(token_id)
        return spelling

    def token_bytes(self, token_id: int, first: bool = False) -> bytes:
        """The bytes an id stands for, for reports on single tokens; empty for an id without a token.

        Those of a text's tokens concatenate to its UTF-8, characters that are cut into several tokens included; they
        do not where a decoder changes text across tokens (clean-up), nor where U+FFFD stands for invalid bytes.
        first: the id is the text's first one; some decoders drop the space before it.
        """
        known = self._bytes.get((token_id, first))
        if known is None:
            spelling = self.token(token_id)
            if spelling is None:
                return b""
            known = self._bytes[token_id, first] = self._bytes_of(spelling, first)
        return known

    def whole_text(self, token_id: int) -> str:
        """The text of a byte-level token that is whole characters, wherever it stands; empty for another."""
        text = self._whole.get(token_id)
        if text is None:
            try:
                text = self.token_bytes(token_id).decode()
            except UnicodeDecodeError:
                text = ""
            if self.token(token_id) is not None:
                self._whole[token_id] = text
        return text

    def _bytes_of(self, spelling: str, first: bool) -> bytes:
        if self.decoding is None:
            return str(self.backend.decoder.decode([spelling])).encode()
        if self.decoding.byte_level:
            return byte_level_bytes(spelling)
        if self.decoding.byte_fallback and (match := BYTE_TOKEN.fullmatch(spelling)):
            return bytes([int(match[1], 16)])
        return self.decoding.start().spell(spelling, first).encode()


def _cleans_up(wrapped: Any) -> bool:
    """Whether transformers removes spaces before punctuation: where the checkpoint asks for it, but not for BPE."""
    if not wrapped.clean_up_tokenization_spaces:
        return False
    is_bpe = type(wrapped.backend_tokenizer.model).__name__ == "BPE"
    return not is_bpe or bool(wrapped.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output)


def _decoding(backend: Any, clean_up: bool) -> Decoding | None:
    try:
        return parse(backend.decoder, clean_up)
    except NotStreamed as error:
        log.warning("the tokenizer's decoder cannot be streamed, answers come whole at their end: %s", error)
        return None
