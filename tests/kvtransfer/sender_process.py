"""A sender in a process of its own: `sender_process.py TRANSPORT INCARNATION [LAYERS HEADS HEAD_DIM STAGING_MIB CACHED]`.

Writes its port to stdout, then serves until stdin ends; a line "advance N" computes N tokens of every open prompt.
"""

from __future__ import annotations

import asyncio
import logging
import sys

import grpc.aio

from kvtransfer.backends import choose
from kvtransfer.base import Identity
from kvtransfer.service import HandOverService, OutboundSettings
from kvtransfer.transfer_thread import TransferThread
from tandem.testing.kv import FakeSource, small_layout
from tandem.wire.v1 import handover_pb2_grpc as rpc


async def main(transport: str, incarnation: str, layers: int, heads: int, dim: int, staging: float, cached: int) -> None:
    layout = small_layout(layers, heads, dim)
    source = FakeSource(layout, cached=cached)
    thread = TransferThread()
    thread.start()
    me = Identity(incarnation, layout, "model-fingerprint")
    service = HandOverService(me, source, choose(transport).all, thread, OutboundSettings(staging_mib=staging))
    server = grpc.aio.server()
    rpc.add_HandOverServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        for ticket in list(source.prompts):
            source.advance(ticket, int(line.split()[1]))
    await server.stop(None)
    await service.close()
    thread.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    name, who, *numbers = sys.argv[1:]
    shape = [int(number) for number in (numbers[:3] or ["2", "2", "8"])]
    staging_mib = float(numbers[3]) if len(numbers) > 3 else 0.25
    tokens = int(numbers[4]) if len(numbers) > 4 else 1 << 40
    asyncio.run(main(name, who, shape[0], shape[1], shape[2], staging_mib, tokens))
