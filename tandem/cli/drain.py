"""`tandem drain`: ends one worker in order, as SIGTERM does, from wherever its gRPC port can be reached."""

from __future__ import annotations

import asyncio

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from tandem.cluster import WorkerInfo
from tandem.config import DrainConfig, client_key
from tandem.errors import BadRequest, ConfigError, TandemError, Unavailable
from tandem.obs import setup_logging
from tandem.trust import Trust
from tandem.wire import probe

TIMEOUT_S = 10.0
POLL_S = 0.1
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
            while await _lives(worker, trust):  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise Unavailable(f"{name} was told to end and still answers after {limit_s + EXIT_S:g} s") from None
    console.print("it has ended")


async def _lives(worker: WorkerInfo, trust: Trust) -> bool:
    try:
        return (await probe.identify(worker.address, trust)).incarnation == worker.incarnation
    except Unavailable:
        return False


async def _by_incarnation(config: DrainConfig, trust: Trust) -> WorkerInfo:
    """The only worker of a router's whose incarnation begins so."""
    wanted = config.worker
    if len(wanted) < SHORTEST:
        text = f"WORKER is {wanted!r}; give host:port, or at least {SHORTEST} characters of an incarnation"
        raise ConfigError(text, "worker")
    addresses = await _addresses(config, trust)
    found = await asyncio.gather(*(probe.identify(each, trust) for each in addresses), return_exceptions=True)
    refused = [each for each in found if isinstance(each, ConfigError)]
    if refused:
        raise refused[0]
    workers = [each for each in found if isinstance(each, WorkerInfo)]
    matching = [each for each in workers if each.incarnation.startswith(wanted)]
    if len(matching) == 1:
        return matching[0]
    fault = "no worker's incarnation begins so" if not matching else "more than one incarnation begins so"
    known = ", ".join(f"{each.incarnation[:8]} ({each.role.value} {each.address})" for each in matching or workers)
    raise BadRequest(f"WORKER is {wanted}; {fault}: {known or 'the router knows of no worker'}", "worker")


async def _addresses(config: DrainConfig, trust: Trust) -> list[str]:
    """Of the workers on a router's metrics page."""
    url = config.router if "://" in config.router else f"http://{config.router}"
    secret = client_key() or trust.token
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    try:
        async with httpx.AsyncClient(headers=headers, timeout=TIMEOUT_S, trust_env=False) as client:
            answer = await client.get(url.rstrip("/") + "/metrics")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"--router is {config.router}; no router answers there: {error}", "router") from None
    if answer.status_code != httpx.codes.OK:
        raise _refused(config, answer)
    families = text_string_to_metric_families(answer.text)
    samples = (sample for family in families if family.name == "tandem_fleet_pages" for sample in family.samples)
    return sorted({sample.labels["worker"] for sample in samples})


def _refused(config: DrainConfig, answer: httpx.Response) -> TandemError:
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        need = "set TANDEM_TOKEN to the cluster's, or TANDEM_API_KEY to an operator's"
        return ConfigError(f"--router is {config.router}; its /metrics needs a key: {need}", "router")
    return BadRequest(f"--router is {config.router}; its /metrics answers {answer.status_code}", "router")
