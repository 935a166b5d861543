"""What a plan puts on the two workers it names: load until they report it, and the blocks they should soon hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router.policies import RequestInfo
from router.policies.cost import EXPECTED_OUTPUT
from router.workers.load import Booking
from router.workers.members import Members
from router.workers.snapshot import Load
from tandem.cluster import Candidate
from tandem.kv import BLOCK_TOKENS, BlockHash


def book(
    members: Members[Any],
    request: RequestInfo,
    chosen: Candidate,
    hashes: Sequence[BlockHash],
    block_tokens: int = BLOCK_TOKENS,
) -> tuple[Booking | None, Booking | None]:
    """Books a request on the decode worker of a pair and on its prefill worker, if it has one.

    hashes: of the prompt's whole blocks, of `block_tokens` tokens each.
    """
    output = request.choices * min(request.max_tokens, EXPECTED_OUTPUT)
    here = request.computable - chosen.decode_cached if chosen.prefill is None else 0
    decode = members.book(chosen.decode, Load(request.choices, here, request.prompt_tokens + output), hashes)
    if chosen.prefill is None:
        return decode, None
    load = Load(1, request.computable - chosen.prefill_cached, request.computable)
    return decode, members.book(chosen.prefill, load, hashes[: request.computable // block_tokens])
