"""Pages for hand-overs: the oldest request first, whoever asked before whom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tandem.engine.engine import Engine
from tandem.engine.policy import EngineConfig
from tandem.engine.sequence import Seq, SeqState
from tandem.testing.engine import FakePool, FakeRunner, make_seq
from tandem.worker.kv_sink import Reservations


class Inline:
    """An engine thread that answers at once."""

    async def call(self, command: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(0)
        return command(*args)


def waiting(engine: Engine, name: str, length: int) -> Seq:
    seq = make_seq(name, range(length), max_tokens=2)
    seq.state = SeqState.WAITING_KV
    engine.add(seq)
    return seq


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_one_that_comes_back_is_not_held_up_by_younger_ones_that_wait_for_it() -> None:
    pool = FakePool(10, 4)
    engine = Engine(FakeRunner(pool), pool, EngineConfig(prefix_cache=False))
    reservations = Reservations(engine, Inline())  # type: ignore[arg-type]
    running, older, younger = (waiting(engine, name, 24) for name in ("running", "older", "younger"))
    assert await reservations.reserve(running) == 0
    first = asyncio.create_task(reservations.reserve(older))
    await settle()
    first.cancel()  # its sender was lost; the engine keeps pages for it
    await asyncio.gather(first, return_exceptions=True)
    behind = asyncio.create_task(reservations.reserve(younger))
    await settle()
    again = asyncio.create_task(reservations.reserve(older))
    await settle()
    assert not behind.done() and not again.done()
    engine.cancel("running")
    reservations.changed()
    assert await asyncio.wait_for(again, 5) == 0
    engine.cancel("older")
    reservations.changed()
    assert await asyncio.wait_for(behind, 5) == 0
    engine.cancel("younger")
    engine.check_integrity()
