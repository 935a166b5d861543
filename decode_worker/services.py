"""What a decode worker does beside what every worker does: own requests, fetch KV, and give what it has to others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from decode_worker.grammars import Grammars
from decode_worker.prefill_client import PrefillClient
from decode_worker.service import attach
from decode_worker.worker import DecodeWorker
from kvtransfer.backends import Chosen
from kvtransfer.base import MIB, Hooks, Identity
from kvtransfer.inbound import InboundSettings
from kvtransfer.measure import HandOverMetrics
from kvtransfer.pairs import PairPool, pair_maker, probe_pair_maker
from kvtransfer.replicas import ReplicationService
from kvtransfer.service import HandOverService, OutboundSettings
from kvtransfer.slab import SlabBudget
from kvtransfer.transfer_thread import TransferThread
from tandem.config import DecodeConfig
from tandem.engine.grammar.compiler import CompilerSettings
from tandem.engine.output import StepOutput
from tandem.types import GenerateRequest, ModelInfo
from tandem.worker.kv_sink import cache_sinks
from tandem.worker.kv_source import EngineKvSource
from tandem.worker.moves import MoveLedger, WriteRate
from tandem.worker.process import Parts, Report, RoleServices
from tandem.worker.transfer_probe.service import ProbingService

if TYPE_CHECKING:
    from decode_worker.tracing import RequestSpans

SLAB_CHECK_S = 1.0
SLAB_CHECKS = 2


class DecodeServices:
    """`RoleServices` of a decode worker."""

    def __init__(self, config: DecodeConfig, transports: Chosen, parts: Parts) -> None:
        self._give_up = parts.give_up
        self._traces = parts.traces
        me = Identity.of(parts.info)
        self._transfers = TransferThread()
        self._transfers.start()
        self._writes = WriteRate()
        self._moves = MoveLedger(parts.info.incarnation)
        self._budget = SlabBudget(int(config.slabs_max_mib * MIB))
        metrics = HandOverMetrics(*parts.metrics.of_hand_overs)
        hooks = metrics.receiver(self._moves.add)
        settings = InboundSettings.of(config)
        self._pairs = PairPool(pair_maker(me, transports.preferred, self._transfers, self._budget, settings, hooks))
        client = PrefillClient(
            parts.info.incarnation,
            parts.info.layout.digest(),
            self._pairs,
            config.queue_deadline_s,
            config.transfer_deadline_s,
            metrics.failed,
            lambda sender: self._moves.failed(sender, transports.preferred.name),
        )
        self._grammars = Grammars(_compiler_settings(config, parts.info.model))
        self.worker = DecodeWorker(
            parts.info, config, parts.engine, parts.thread, client, parts.metrics, parts.publisher, self._grammars
        )
        self.worker.trace = _trace(parts)
        # Generated tokens live here: what another worker asks for and is cached here, it gets.
        capacity, freed = parts.engine.capacity_tokens, self.worker.pages_freed
        self._source = EngineKvSource(parts.engine, parts.thread, parts.root, capacity, computes=False, released=freed)
        self._handover = HandOverService(
            me,
            self._source,
            transports.all,
            self._transfers,
            OutboundSettings(config.staging_mib, quiesce_s=config.quiesce_s),
            hooks=_watched(metrics.sender(self._writes.add), parts),
            clock=asyncio.get_running_loop().time,
        )
        attach(parts.server, self.worker)
        self._handover.attach(parts.server)
        sinks = cache_sinks(parts.engine, parts.thread, parts.root)
        self._replicas = ReplicationService(
            me, self._pairs, sinks, config.queue_deadline_s, config.transfer_deadline_s, self.worker.pages_freed
        )
        self._replicas.attach(parts.server)
        root, draining = parts.root.digest(), lambda: self.worker.draining
        probe_pair = probe_pair_maker(me, transports.preferred, self._transfers, self._budget, settings)
        self._probing = ProbingService(me.incarnation, root, probe_pair, draining)
        self._probing.attach(parts.server)

    def on_step(self, output: StepOutput) -> None:
        """Tokens to the outboxes, progress to tickets."""
        if self._traces is not None:
            self._traces.steps.on_step(output)
        self.worker.on_step(output)
        self._source.on_step(output)

    def report(self) -> Report:
        """What routers are told beyond the engine's load."""
        worker = self.worker
        return Report(
            dict(worker.dispatches),
            self._moves.stats(),
            self._writes.bytes_per_ms(),
            worker.draining,
            worker.siblings_waiting,
            worker.tenants.uses(),
        )

    def discovered(self, workers: Sequence[tuple[str, str]]) -> None:
        """Warms the pairs."""
        self._pairs.discovered(workers)

    def background(self) -> Sequence[asyncio.Task[None]]:
        """Lease keeping."""
        return (asyncio.create_task(self.worker.sweep()), asyncio.create_task(self._watch_slabs()))

    async def _watch_slabs(self) -> None:
        """Drains and gives up when quarantined slabs leave no room for new ones: only a new process has new memory.

        Every slab whose pair is closed is quarantined for a moment; only what lasts counts.
        """
        checks = 0
        while True:
            await asyncio.sleep(SLAB_CHECK_S)
            if checks <= SLAB_CHECKS:  # afterwards it is decided, and the worker does not come back
                checks = checks + 1 if self._budget.stuck else 0
            if checks > SLAB_CHECKS:
                self.worker.draining = True
                if not self.worker.open_requests:
                    self._give_up(f"{self._budget.quarantined_bytes} bytes of landing slabs are quarantined")
                    await asyncio.Event().wait()

    def drain(self) -> None:
        """Refuses what is submitted from now on."""
        self.worker.draining = self._replicas.draining = True

    def busy(self) -> bool:
        """Whether a request is open, a router lacks tokens of one, or somebody reads KV from here."""
        return bool(self.worker.open_requests or self.worker.unsent or self._source.leaks())

    async def finish(self) -> None:
        """Ends every request."""
        await self.worker.close()

    async def close(self) -> None:
        """Ends every pair and ticket, and compiling."""
        await self._grammars.close()
        await self._pairs.close()
        await self._handover.close()
        self._transfers.close()

    def leaks(self) -> list[str]:
        """Requests, tickets and pages still held."""
        own = self.worker.leaks() + self._handover.leaks() + self._source.leaks()
        return own + self._pairs.leaks() + self._replicas.leaks() + self._probing.leaks()


def _compiler_settings(config: DecodeConfig, model: ModelInfo) -> CompilerSettings:
    return CompilerSettings(
        folder=model.path,
        vocab_size=model.vocab_size,
        stop_ids=model.eos_token_ids,
        seconds=config.grammar_compile_s,
        memory_mib=config.grammar_memory_mib,
        cache_mib=config.grammar_cache_mib,
        any_whitespace=config.json_any_whitespace,
    )


def _watched(sending: Hooks, parts: Parts) -> Hooks:
    return sending if parts.traces is None else replace(sending, watch=parts.traces.watch)


def _trace(parts: Parts) -> Callable[[GenerateRequest, str, float], RequestSpans] | None:
    """Makes the spans of traced requests; None, and nothing is imported, where this worker traces nothing."""
    if parts.traces is None:
        return None
    from decode_worker.tracing import RequestSpans

    return partial(RequestSpans, parts.traces)


def build(config: DecodeConfig, transports: Chosen) -> Callable[[Parts], RoleServices]:
    """For `WorkerProcess`."""
    return lambda parts: DecodeServices(config, transports, parts)
