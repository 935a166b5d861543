"""Where a struck process is: from what its worker says it holds, and what the router has counted."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from tandem.obs import FIRST_TOKEN_SECONDS
from tandem.testing.cluster import Cluster, Process

EARLY = 1 / 3
"""Of a prompt: up to here a hand-over is in its prefill, from here on in its transfer. Really they overlap."""
SENDING = re.compile(r"of receiver (\w+) has not quiesced: token (\d+) of (\d+) is computed, (\d+) spans are sent")
LANDING = re.compile(r"of sender (\w+) is not quiesced: (\d+) of (\d+) spans have landed")
MOVED = re.compile(r"^tandem_kv_moved_bytes_total\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="(\w*)"')

Pair = tuple[str, str]
"""Incarnations of sender and receiver."""


@dataclass(frozen=True)
class HandOver:
    """One that a worker has open."""

    peer: str
    """Incarnation of the other end."""
    share: float
    """Of the prompt that is computed, at a sender, or of its spans that have landed, at a receiver."""
    moved: bool
    """Whether a span was sent, or has landed."""

    def in_phase(self, phase: str) -> bool:
        """Whether it is mid-prefill or mid-transfer."""
        if phase == "mid-prefill":
            return self.share <= EARLY
        return self.moved and EARLY <= self.share < 1


def hand_overs(lines: Sequence[str]) -> list[HandOver]:
    """Those in a worker's audit. A sender's that wait for their turn to be computed are left out."""
    found = []
    for line in lines:
        if (sending := SENDING.search(line)) and int(sending[2]):
            found.append(HandOver(sending[1], int(sending[2]) / int(sending[3]), int(sending[4]) > 0))
        elif landing := LANDING.search(line):
            found.append(HandOver(landing[1], int(landing[2]) / max(int(landing[3]), 1), int(landing[2]) > 0))
    return found


async def audit(running: Cluster, process: Process) -> list[str]:
    """What a worker holds; a word of its own for one that does not answer."""
    try:
        return await asyncio.to_thread(running.audit, process)
    except grpc.RpcError:
        return ["it does not answer"]


async def moved(running: Cluster) -> dict[Pair, float]:
    """KV bytes by pair; nothing while the router does not answer."""
    found: dict[Pair, float] = defaultdict(float)
    with contextlib.suppress(OSError):
        page = await asyncio.to_thread(running.get, "/metrics")
        for listed, size in MOVED.findall(page):
            labels = dict(LABEL.findall(listed))
            found[labels["sender"], labels["receiver"]] += float(size)
    return found


async def first_tokens(running: Cluster) -> float:
    """Those that clients were sent; 0 while the router does not answer, or knows of none."""
    with contextlib.suppress(OSError, AssertionError):
        return await asyncio.to_thread(running.metric, FIRST_TOKEN_SECONDS + "_count")
    return 0.0


async def met(running: Cluster, victim: Process, phase: str, begun: float) -> list[str] | None:
    """Peers of a worker's hand-overs in this phase; None while it is not in it. begun: first tokens by which all have.

    mid-decode has no peers; the router is in it when all streams have begun, as a prefill worker is.
    """
    if phase != "mid-decode":
        found = [each.peer for each in hand_overs(await audit(running, victim)) if each.in_phase(phase)]
        return found or None
    if await first_tokens(running) < begun:
        return None
    if victim.name.startswith("decode") and not any("RUNNING" in line for line in await audit(running, victim)):
        return None
    return []
