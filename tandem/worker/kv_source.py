"""What a worker offers to senders of KV: compute (or only look up) a prompt's KV and copy spans out of the pages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tandem.engine.engine import Engine
from tandem.engine.output import StepOutput
from tandem.engine.sequence import Seq
from tandem.errors import ContextTooLong, Unavailable
from tandem.kv import HashRoot, Span
from tandem.types import SamplingParams
from tandem.worker.engine_thread import EngineThread


@dataclass(slots=True)
class _Held:
    seq: Seq
    on_progress: Callable[[int], None]
    computes: bool
    """Whether what is missing is computed; otherwise only what was cached is given."""
    reported: int = 0
    """The most ever told; it never goes back."""
    computed: int = 0
    """What can be exported now."""
    lost: bool = False
    """Nothing is exported any more: nobody wants it, or its pages were needed and nobody computes them again."""
    advanced: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the next change; then another takes its place, so that no export clears what another still waits for."""

    def wake(self) -> None:
        """Something changed for the exports."""
        self.advanced.set()
        self.advanced = asyncio.Event()


class EngineKvSource:
    """A `kvtransfer.KvSource` on an engine. A prefill-only sequence per open ticket keeps its pages until `close`.

    computes: a prefill worker computes what is missing; a decode worker only gives what it has.
    released: called when a ticket has let go of its pages.
    """

    def __init__(
        self,
        engine: Engine,
        thread: EngineThread,
        root: HashRoot,
        capacity: int,
        computes: bool,
        released: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._thread = thread
        self._root = root
        self._capacity = capacity
        self._computes = computes
        self._released = released
        self._held: dict[str, _Held] = {}

    async def open(
        self,
        ticket_id: str,
        tokens: Sequence[int],
        salt: str,
        adapter: str,
        priority: int,
        on_progress: Callable[[int], None],
        tenant: str = "",
        cached_only: bool = False,
    ) -> int:
        """Starts computing the KV of `tokens`; how many of them are cached. Raises ContextTooLong, Unavailable.

        cached_only: computes nothing.
        """
        if len(tokens) > self._capacity:
            raise ContextTooLong(f"the prompt has {len(tokens)} tokens; this worker's pages hold {self._capacity}")
        seq = Seq(
            seq_id=ticket_id,
            tokens=list(tokens),
            prompt_len=len(tokens),
            sampling=SamplingParams(),
            root=HashRoot(
                self._root.cluster_key, self._root.model_fingerprint, self._root.kv_dtype, adapter, salt
            ).digest(),
            eos_ids=frozenset(),
            prefill_only=True,
            priority=priority,
            tenant=tenant,
            arrival=asyncio.get_running_loop().time(),
        )
        computes = self._computes and not cached_only
        self._held[ticket_id] = _Held(seq, on_progress, computes)
        try:
            cached = await self._thread.call(self._begin, seq, computes)
        except BaseException:
            # The engine may have it already: a cancelled call still runs.
            await asyncio.shield(self.close(ticket_id))
            raise
        asyncio.get_running_loop().call_soon(self._report, ticket_id, cached)
        return cached

    def _begin(self, seq: Seq, computes: bool) -> int:
        if not computes and (cached := self._engine.exportable(seq)) < len(seq.tokens):
            raise Unavailable(f"only {cached} of {len(seq.tokens)} tokens are cached here")
        self._engine.add(seq)
        # What is cached can be sent before the rest had its turn.
        return self._engine.open_cached(seq)

    def on_step(self, output: StepOutput) -> None:
        """Passes on how far each open ticket has come; called on the event loop after every step."""
        for seq in output.retracted:
            # It gave its pages to an older sequence and is computed again in its turn.
            if (held := self._held.get(seq.seq_id)) is not None:
                held.computed = 0
                if not held.computes:
                    self.give_up(seq.seq_id)
        for progress in output.progress:
            self._report(progress.seq.seq_id, progress.computed)

    def _report(self, ticket_id: str, computed: int) -> None:
        held = self._held.get(ticket_id)
        if held is None:
            return
        held.computed = max(held.computed, computed)
        held.wake()
        if computed > held.reported:
            held.reported = computed
            held.on_progress(computed)

    async def export(self, ticket_id: str, span: Span, out: np.ndarray | memoryview) -> None:
        """Copies what moves of a computed span into `out`, `layout.span_bytes(span, len(tokens))` bytes.

        Raises Unavailable when the ticket is closed or given up, or when what was only cached is gone.
        """
        while (held := self._held.get(ticket_id)) is not None:
            if held.lost:
                raise Unavailable(f"the pages of ticket {ticket_id} are given away")
            advanced = held.advanced  # from before the engine looks: what it computes again behind that is heard of
            if held.computed >= span.end and await self._thread.call(self._export, held.seq, span, out):
                return
            await advanced.wait()
        raise Unavailable(f"ticket {ticket_id} is closed")

    def _export(self, seq: Seq, span: Span, out: np.ndarray | memoryview) -> bool:
        """False when the pages were given away in this moment: they will be computed again."""
        if seq.computed < span.end:
            return False
        self._engine.export_span(seq, span, out)
        return True

    def give_up(self, ticket_id: str) -> None:
        """Computes and exports no more of the ticket; who waits for an export hears of it. `close` must follow."""
        held = self._held.get(ticket_id)
        if held is not None and not held.lost:
            held.lost = True
            held.wake()
            self._thread.post(self._engine.cancel, ticket_id)

    async def close(self, ticket_id: str) -> None:
        """Lets go of the ticket's pages, whatever its state; idempotent."""
        held = self._held.pop(ticket_id, None)
        if held is not None:
            held.wake()
            await self._thread.call(self._engine.cancel, ticket_id)
            if self._released is not None:
                self._released()

    def leaks(self) -> list[str]:
        """Tickets still open."""
        return [f"ticket {ticket_id} still holds pages" for ticket_id in self._held]
