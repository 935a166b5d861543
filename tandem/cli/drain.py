"""`tandem drain`: ends one worker in order, as SIGTERM does, from wherever its gRPC port can be reached."""

from __future__ import annotations

import asyncio

from rich.console import Console

from tandem.cli.fleet_client import FleetClient
from tandem.cluster import WorkerInfo
from tandem.config import DrainConfig
from tandem.errors import BadRequest, ConfigError, Fenced, Unavailable
from tandem.obs import setup_logging
from tandem.trust import Trust
from tandem.wire import probe

POLL_S = 0.1
REFUSALS = 5
"""So many in a row say that nobody is there any more; one may be the network's."""
EXIT_S = 15.0
"""Between the end of what was under way and the process's own."""
SHORTEST = 4
"""Characters of an incarnation."""


def drain(config: DrainConfig) -> None:
    """Returns when the worker has ended. Raises ConfigError, BadRequest, Unavailable, Fenced."""
    setup_logging(config.log_level, config.log_format)
    asyncio.run(drained(config, Console(soft_wrap=True, highlight=False)))


async def drained(config: DrainConfig, console: Console) -> None:
    """See `drain`; what happens is said on `console`."""
    trust = Trust.of(config)
    worker = await (probe.identify(config.worker, trust) if ":" in config.worker else _by_incarnation(config, trust))
    limit_s = await probe.drain(worker, trust)
    name = f"{worker.role.value} worker {worker.incarnation} at {worker.address}"
    console.print(f"{name} takes nothing more; what is under way gets {limit_s:g} s", markup=False)
    try:
        async with asyncio.timeout(limit_s + EXIT_S):
            await _end(worker, trust)
    except TimeoutError:
        text = f"{name} was told to end and was not seen to do so in {limit_s + EXIT_S:g} s"
        raise Unavailable(text) from None
    console.print("it has ended")


async def _end(worker: WorkerInfo, trust: Trust) -> None:
    """Returns when another incarnation answers, or again and again nobody listens. One that is slow is alive."""
    refusals = 0
    while refusals < REFUSALS:
        try:
            if (await probe.identify(worker.address, trust)).incarnation != worker.incarnation:
                return
            refusals = 0
        except probe.Silent:
            refusals = 0
        except Unavailable:
            refusals += 1
        await asyncio.sleep(POLL_S)


async def _by_incarnation(config: DrainConfig, trust: Trust) -> WorkerInfo:
    """The only worker of a router's whose incarnation begins so."""
    wanted = config.worker
    if len(wanted) < SHORTEST:
        text = f"WORKER is {wanted!r}; give host:port, or at least {SHORTEST} characters of an incarnation"
        raise ConfigError(text, "worker")
    workers = (await asyncio.to_thread(FleetClient(config.router, config).fleet))["workers"]
    matching = [each for each in workers if each["incarnation"].startswith(wanted)]
    if len(matching) != 1:
        fault = "no worker's incarnation begins so" if not matching else "more than one incarnation begins so"
        listed = (f"{each['incarnation'][:8]} ({each['role']} {each['address']})" for each in matching or workers)
        known = ", ".join(listed) or "the router knows of no worker"
        raise BadRequest(f"WORKER is {wanted}; {fault}: {known}", "worker")
    incarnation, address = matching[0]["incarnation"], matching[0]["address"]
    worker = await probe.identify(address, trust)
    if worker.incarnation != incarnation:
        raise Fenced(f"{incarnation} is no more; {worker.incarnation} answers at {address}")
    return worker
