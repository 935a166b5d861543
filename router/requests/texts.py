"""The tokeniser of the model that the cluster serves, loaded once for each model, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from router.requests.defaults import GenerationDefaults, read_defaults
from tandem.errors import TandemError, Unavailable
from tandem.text.prompt import PromptTokenizer
from tandem.text.tokenizer import Tokenizer
from tandem.text.turns import DEFAULT_TURN_BYTES, TurnCache
from tandem.types import ModelInfo

log = logging.getLogger(__name__)


class ModelTexts:
    """A `TextSource`. path: folder or hub id to load from; None takes what the workers report.

    use_defaults: whether the model's `generation_config.json` counts. chat_template: a file to take the chat template
    from; None takes the checkpoint's. turn_bytes: memory for what conversations were tokenised to.
    """

    def __init__(
        self,
        path: str | None,
        use_defaults: bool = True,
        chat_template: Path | None = None,
        turn_bytes: int = DEFAULT_TURN_BYTES,
    ) -> None:
        self._path = path
        self._turn_bytes = turn_bytes
        self._chat_template = chat_template
        self._use_defaults = use_defaults
        self._defaults = GenerationDefaults()
        self._loading: asyncio.Task[PromptTokenizer] | None = None
        self._fingerprint = ""
        """Of the model that it is, or was, loaded for."""

    async def get(self, model: ModelInfo) -> PromptTokenizer:
        """The tokeniser; the first caller loads it and all wait. Raises Unavailable when it cannot be loaded."""
        if self._loading is None or self._fingerprint != model.fingerprint:
            self._fingerprint = model.fingerprint
            self._loading = asyncio.create_task(self._load(self._path or model.path))
        task = self._loading
        try:
            return await asyncio.shield(task)
        finally:
            # After a failure the next request tries again: a shared folder may appear later.
            if self._loading is task and task.done() and (task.cancelled() or task.exception() is not None):
                self._loading = None

    async def defaults(self, model: ModelInfo) -> GenerationDefaults:
        """The model's own sampling defaults. Raises as `get`: both come from one folder."""
        await self.get(model)
        return self._defaults

    async def _load(self, path: str) -> PromptTokenizer:
        try:
            text = await asyncio.to_thread(self._build, path)
        except TandemError as error:
            log.error("the tokeniser cannot be loaded: %s", error)
            raise Unavailable(f"the tokeniser cannot be loaded: {error}") from error
        if self._use_defaults:
            self._defaults = await asyncio.to_thread(read_defaults, Path(path))
        return text

    def _build(self, path: str) -> PromptTokenizer:
        return PromptTokenizer(Tokenizer.load(path, self._chat_template), TurnCache(self._turn_bytes))
