"""What a prefill worker does beside what every worker does: it serves hand-overs from its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvtransfer.backends import Chosen
from kvtransfer.base import MIB, Identity
from kvtransfer.inbound import InboundSettings
from kvtransfer.measure import HandOverMetrics
from kvtransfer.pairs import PairPool, pair_maker, probe_pair_maker
from kvtransfer.replicas import ReplicationService
from kvtransfer.service import HandOverService, OutboundSettings
from kvtransfer.slab import SlabBudget
from kvtransfer.transfer_thread import TransferThread
from prefill_worker.source import PromisingSource
from tandem.config import PrefillConfig
from tandem.engine.output import StepOutput
from tandem.worker.kv_sink import cache_sinks
from tandem.worker.kv_source import EngineKvSource
from tandem.worker.moves import MoveLedger, WriteRate
from tandem.worker.process import Parts, Report, RoleServices
from tandem.worker.transfer_probe.service import ProbingService


class PrefillServices:
    """`RoleServices` of a prefill worker."""

    def __init__(self, config: PrefillConfig, transports: Chosen, parts: Parts) -> None:
        self._engine_source = EngineKvSource(
            parts.engine, parts.thread, parts.root, parts.engine.capacity_tokens, computes=True
        )
        source = PromisingSource(self._engine_source, parts, config.max_waiting, config.prefix_cache)
        self._traces = parts.traces
        self._writes = WriteRate()
        self._moves = MoveLedger(parts.info.incarnation)
        self._draining = False
        self._transfers = TransferThread()
        self._transfers.start()
        me, metrics = Identity.of(parts.info), HandOverMetrics(*parts.metrics.of_hand_overs)
        sending = metrics.sender(self._writes.add)
        if parts.traces is not None:
            sending = replace(sending, watch=parts.traces.watch)
        self._handover = HandOverService(
            me,
            source,
            transports.all,
            self._transfers,
            OutboundSettings(config.staging_mib, quiesce_s=config.quiesce_s),
            hooks=sending,
            clock=asyncio.get_running_loop().time,
        )
        self._handover.attach(parts.server)
        # Nobody hands prompts over to a prefill worker; prefixes that are asked for often come from others.
        self._budget, settings = SlabBudget(int(config.slabs_max_mib * MIB)), InboundSettings.of(config)
        hooks = metrics.receiver(self._moves.add)
        self._pairs = PairPool(pair_maker(me, transports.preferred, self._transfers, self._budget, settings, hooks))
        sinks = cache_sinks(parts.engine, parts.thread, parts.root)
        self._replicas = ReplicationService(
            me, self._pairs, sinks, config.queue_deadline_s, config.transfer_deadline_s, parts.publisher.poke
        )
        self._replicas.attach(parts.server)
        root, draining = parts.root.digest(), lambda: self._draining
        probe_pair = probe_pair_maker(me, transports.preferred, self._transfers, self._budget, settings)
        self._probing = ProbingService(me.incarnation, root, probe_pair, draining)
        self._probing.attach(parts.server)

    def on_step(self, output: StepOutput) -> None:
        """Passes on how far each prompt has come."""
        if self._traces is not None:
            self._traces.steps.on_step(output)
        self._engine_source.on_step(output)

    def report(self) -> Report:
        """How fast its writes land, which are counted there, and what landed here."""
        return Report(moves=self._moves.stats(), move_bytes_per_ms=self._writes.bytes_per_ms(), draining=self._draining)

    def discovered(self, workers: Sequence[tuple[str, str]]) -> None:
        """Prefill workers connect to nobody."""

    def background(self) -> Sequence[asyncio.Task[None]]:
        """None."""
        return ()

    def drain(self) -> None:
        """Routers plan without it. A ticket that comes all the same is served: refused, it would be computed anew."""
        self._draining = self._replicas.draining = True

    def busy(self) -> bool:
        """Whether a ticket is open."""
        return bool(self._engine_source.leaks())

    async def finish(self) -> None:
        """Nothing: the end of the server's streams ends the tickets."""

    async def close(self) -> None:
        """Ends every ticket and link."""
        await self._pairs.close()
        await self._handover.close()
        self._transfers.close()

    def leaks(self) -> list[str]:
        """Tickets, staging and pages still held."""
        sending = self._handover.leaks() + self._engine_source.leaks()
        return sending + self._pairs.leaks() + self._replicas.leaks() + self._probing.leaks()


def build(config: PrefillConfig, transports: Chosen) -> Callable[[Parts], RoleServices]:
    """For `WorkerProcess`."""
    return lambda parts: PrefillServices(config, transports, parts)
