"""A sender in a process of its own: `sender_process.py TRANSPORT INCARNATION CACHED_TOKENS`.

Writes its port to stdout, then serves until stdin ends; each line read is a number of tokens to which every open prompt
is computed. What is in use at the end is written to stdout.
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


async def main(transport: str, incarnation: str, cached: int) -> None:
    layout = small_layout()
    source = FakeSource(layout, cached=cached)
    thread = TransferThread()
    thread.start()
    me = Identity(incarnation, layout, "model-fingerprint")
    service = HandOverService(me, source, choose(transport).all, thread, OutboundSettings(staging_mib=0.25))
    server = grpc.aio.server()
    rpc.add_HandOverServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    while line := await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        for ticket in list(source.prompts):
            source.advance(ticket, int(line))
    left = service.leaks()
    await server.stop(None)
    await service.close()
    thread.close()
    sys.stdout.write(f"{left}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
