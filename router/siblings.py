"""What the processes of one router ask each other: a client does not know which of them has what it asks for."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

ASK_S = 2.0
"""A process that does not answer within this is left out."""

Answer = Callable[[list[str]], Awaitable[bytes]]


class Siblings:
    """The other processes of this router, by Unix sockets in a folder that only its user can read."""

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self.index = index
        self._folder = folder
        self._others = [other for other in range(count) if other != index]

    def _path(self, index: int) -> str:
        return str(self._folder / f"ask-{index}")

    async def serve(self, answer: Answer) -> asyncio.Server:
        """Answers what others ask, until the server is closed."""

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                asked = json.loads(await reader.readline())
                writer.write(await answer(asked))
                await writer.drain()
            finally:
                writer.close()

        return await asyncio.start_unix_server(handle, self._path(self.index))

    async def ask(self, *words: str) -> dict[int, bytes]:
        """What each of the others answers; those that do not are left out."""
        answers = await asyncio.gather(*(self._ask(other, words) for other in self._others))
        return {index: said for index, said in zip(self._others, answers, strict=True) if said is not None}

    async def _ask(self, other: int, words: tuple[str, ...]) -> bytes | None:
        try:
            async with asyncio.timeout(ASK_S):
                reader, writer = await asyncio.open_unix_connection(self._path(other))
                try:
                    writer.write(json.dumps(words).encode() + b"\n")
                    return await reader.read()
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            log.warning("router process %d does not answer: %r", other, error)
            return None


def merged(pages: Mapping[int, bytes]) -> bytes:
    """The Prometheus pages of several processes as one: every sample says which process it is from."""
    families: dict[str, Metric] = {}
    for index, page in sorted(pages.items()):
        for family in text_string_to_metric_families(page.decode()):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.samples.append(sample._replace(labels={**sample.labels, "process": str(index)}))
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return list(self._families.values())

    def describe(self) -> list[Metric]:
        return []
