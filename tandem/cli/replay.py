"""`tandem replay`: what policies would have done with a recorded load, by simulation, as table, JSON and plot."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from router.simulation.setting import Objective, Setting, blocks_in, working_set
from tandem.errors import ConfigError
from tandem.traces import read_trace

LOAD = "share of what the prefill workers can compute, nothing cached; 0 keeps the trace's own times"
MACHINE = "name=number, or a JSON file of such; repeatable: the machine's coefficients (router/simulation/setting.py)"
SHARE = "caches of all prefill workers over the trace's working set"


def replay(
    trace: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSONL; see tandem/traces.py")],
    policy: Annotated[
        list[str] | None, typer.Option(help="name or module:attribute; repeatable; default: cost")
    ] = None,
    prefill: Annotated[list[int] | None, typer.Option(min=0, help="prefill workers; repeatable; default: 8")] = None,
    decode_per_prefill: Annotated[float, typer.Option(help="decode workers for each prefill worker")] = 0.5,
    load: Annotated[list[float] | None, typer.Option(help=f"{LOAD}; repeatable; default: 0.8")] = None,
    cache_share: Annotated[list[float] | None, typer.Option(help=f"{SHARE}; repeatable; default: 0.5")] = None,
    requests: Annotated[int, typer.Option(min=0, help="of the trace, from its start; 0: all")] = 0,
    skip: Annotated[int, typer.Option(min=0, help="first requests, which fill caches and are not reported")] = 0,
    seed: int = 0,
    noise: Annotated[float, typer.Option(min=0, help="relative deviation of step times")] = 0.05,
    machine: Annotated[list[str] | None, typer.Option(help=MACHINE)] = None,
    slots: Annotated[int, typer.Option(min=0, help="cores that all processes share; 0: each worker has its own")] = 0,
    pool: Annotated[bool, typer.Option(help="caches take the machine's kv_tokens, as sequences do")] = False,
    block_tokens: Annotated[int, typer.Option(min=1, help="tokens in a block of caches and index")] = 512,
    scale: Annotated[float, typer.Option(help="factor of the trace's lengths")] = 1.0,
    max_inflight: Annotated[int, typer.Option(min=1, help="requests admitted at once; more are rejected")] = 1 << 20,
    slo_ttft_ms: Annotated[float, typer.Option(min=0)] = Objective().ttft_ms,
    slo_tpot_ms: Annotated[float, typer.Option(min=0)] = Objective().tpot_ms,
    jobs: Annotated[int, typer.Option(min=1, help="simulations at once")] = 1,
    merge: Annotated[list[Path] | None, typer.Option(help="earlier --json; what is there is not run again")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every result here")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a picture here; needs matplotlib")] = None,
) -> None:
    """Simulates every policy in every cell: prefill workers x load x cache share."""
    from tandem.cli import replay_cells

    replay_cells.check_wishes(policies := policy or ["cost"], plot)
    fitted = replay_cells.read_machine(machine or [])
    try:
        entries = list(read_trace(trace, requests or 1 << 62))
        size = working_set(entries) * blocks_in(block_tokens, scale)
        basis = Setting(1, 1, fitted, 0, block_tokens, seed, noise, pool, slots, max_inflight=max_inflight)
        cells = [
            replay_cells.Cell(_sized(basis, workers, decode_per_prefill, share * size), offered, share, skip, scale)
            for workers, offered, share in product(prefill or [8], load or [0.8], cache_share or [0.5])
        ]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    known = replay_cells.read_results(merge or [])
    found = list(replay_cells.run_cells(entries, cells, policies, Objective(slo_ttft_ms, slo_tpot_ms), jobs, known))
    if json_file:
        replay_cells.write_json(json_file, found)
    if plot:
        replay_cells.draw(plot, found)


def _sized(basis: Setting, prefill: int, decode_per_prefill: float, blocks: float) -> Setting:
    """blocks: what all prefill workers keep; a decode worker keeps as much as one of them."""
    one = max(prefill, 1)
    decode = max(1, round(one * decode_per_prefill))
    return replace(basis, prefill=prefill, decode=decode, cache_blocks=max(1, round(blocks / one)))
