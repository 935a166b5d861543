"""`tandem explain`: why a request went where it went, and on which rung of the hit ladder tokens are lost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from tandem.cli.fleet_client import FleetClient
from tandem.errors import BadRequest, ConfigError

LADDER = "tandem_hit_ladder_tokens"
RUNGS = {
    "prompt": "tokens of whole blocks in prompts",
    "ideal": "an infinite cache shared by all workers would have had",
    "capacity": "one shared cache of the fleet's size would have had",
    "perfect_routing": "some one worker was believed to have",
    "achieved": "were not computed again",
}
SHORT_ID = 8
PROSE = 20
"""Columns that a text which may wrap is left with at least."""
BETWEEN = 3
"""Columns that a table draws between two cells: a rule, and space on both its sides."""


def explain(request_id: str, client: FleetClient, ladder: bool, as_json: bool) -> None:
    """Asks a router and prints. Raises ConfigError for wrong arguments, and what `FleetClient.get` raises."""
    if bool(request_id) == ladder:
        raise ConfigError("give either the id of a request or --ladder")
    response = client.get("/metrics" if ladder else f"/v1/explain/{request_id}")
    # An address such as [fd00::1]:8000 is no markup.
    console = Console(soft_wrap=True, markup=False, emoji=False)
    if ladder:
        rungs = ladder_of(response.text)
        console.print_json(json.dumps(rungs)) if as_json else console.print(fitted(ladder_table(rungs), console.width))
    elif as_json:
        console.print_json(response.text)
    else:
        for request in response.json()["requests"]:
            for part in story_tables(request):
                console.print(fitted(part, console.width))


def ladder_of(page: str) -> dict[str, int]:
    """The rungs in a router's Prometheus page, in tokens. Raises BadRequest when the page has none."""
    families = {family.name: family for family in text_string_to_metric_families(page)}
    if LADDER not in families:
        raise BadRequest("this router's metrics have no hit ladder")
    found = {sample.labels["rung"]: int(sample.value) for sample in families[LADDER].samples}
    return {rung: found.get(rung, 0) for rung in RUNGS}


def ladder_table(rungs: Mapping[str, int]) -> Table:
    """One line for each rung: tokens, share of the prompts, and what was lost from the rung before."""
    table = _table("hit ladder", "rung", "tokens", "share", "lost here")
    table.add_column("what it counts")
    whole, before = max(rungs["prompt"], 1), None
    for rung, text in RUNGS.items():
        tokens = rungs[rung]
        lost = "" if before is None else f"{(before - tokens) / whole:.1%}"
        table.add_row(rung, str(tokens), f"{tokens / whole:.1%}", lost, text)
        before = tokens
    return table


def story_tables(request: Mapping[str, Any]) -> list[Table | str]:
    """What a person wants to see of one request: each attempt's candidates, then expectation beside outcome."""
    parts: list[Table | str] = [
        f"request {request['id']}: {request['prompt_tokens']} prompt tokens, up to {request['max_tokens']} more"
    ]
    for number, attempt in enumerate(request["attempts"], start=1):
        end = f"refused: {attempt['refusal']}" if attempt["refusal"] else "taken by the first"
        title = f"attempt {number} at {attempt['at_ms']:.1f} ms, policy {attempt['policy']}, {end}"
        parts.append(_candidates(attempt["candidates"], title))
    parts += [_copy(copy) for copy in request["copies"]]
    parts.append(_outcome(request["predicted"] or {}, request["happened"]))
    return parts


def _copy(copy: Mapping[str, Any]) -> Table:
    """A prefix that this request let the router copy, and why."""
    end = copy["state"] + (f": {copy['error']}" if copy["error"] else "")
    title = f"{copy['tokens']} tokens of its prefix copied to another worker: {end}"
    table = _table(title, "from", "to", *copy["terms"], "moved tokens", "ms")
    numbers = (f"{value:.2f}" for value in copy["terms"].values())
    table.add_row(
        _name(copy["source"]), _name(copy["target"]), *numbers, str(copy["moved_tokens"]), f"{copy['ms']:.1f}"
    )
    return table


def _candidates(candidates: Sequence[Mapping[str, Any]], title: str) -> Table:
    terms = list(dict.fromkeys(term for each in candidates for term in each["costs"]))
    table = _table(title, "decode", "cached", "prefill", "cached", *terms, "sum")
    for each in candidates:
        table.add_row(
            _name(each["decode"]),
            _cached(each, "decode"),
            "local" if each["prefill"] is None else _name(each["prefill"]),
            "" if each["prefill"] is None else _cached(each, "prefill"),
            *(f"{each['costs'].get(term, 0.0):.2f}" for term in terms),
            f"{each['cost']:.2f}",
        )
    return table


def _outcome(predicted: Mapping[str, Any], happened: Mapping[str, Any]) -> Table:
    ended = happened["state"] + (f": {happened['error']}" if happened["error"] else "")
    table = _table(f"outcome: {ended}", "", "predicted", "happened")
    for key in ("cached_tokens", "decode_cached_tokens", "moved_tokens", "hand_over_ms", "first_token_ms", "end_ms"):
        table.add_row(key, _shown(predicted.get(key)), _shown(happened.get(key)))
    table.add_row("prefill", "", "local" if happened["prefill"] is None else _name(happened["prefill"]))
    return table


def _table(title: str, *columns: str) -> Table:
    """A table whose cells stand whole, each on one line."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def fitted(part: Table | str, width: int) -> Table | str:
    """The table if it fits into `width` columns, else its rows as blocks of `name value`: no number is cut short."""
    if isinstance(part, str):
        return part
    columns = [(str(column.header), [str(cell) for cell in column.cells]) for column in part.columns]
    widths = [
        max(map(cell_len, (header, *cells))) if column.no_wrap else PROSE
        for column, (header, cells) in zip(part.columns, columns, strict=True)
    ]
    if sum(widths) + BETWEEN * len(widths) + 1 <= width:
        return part
    headers = [header for header, _ in columns]
    blocks = (_block(headers, row, width) for row in zip(*(cells for _, cells in columns), strict=True))
    return "\n".join([str(part.title), *blocks])


def _block(headers: Sequence[str], row: Sequence[str], width: int) -> str:
    """One row over as many lines as it takes; a line is longer than `width` only where one cell alone is."""
    lines: list[str] = []
    for pair in (f"{header} {cell}".strip() for header, cell in zip(headers, row, strict=True) if cell):
        if lines and cell_len(lines[-1]) + cell_len(pair) + 2 <= width:
            lines[-1] += f"  {pair}"
        else:
            lines.append(f"    {pair}" if lines else f"  {pair}")
    return "\n".join(lines)


def _name(worker: Mapping[str, Any]) -> str:
    return " ".join(part for part in (worker["id"][:SHORT_ID], worker.get("address")) if part)


def _cached(candidate: Mapping[str, Any], end: str) -> str:
    return f"{candidate[f'{end}_cached_tokens']} ({candidate[f'{end}_matched_blocks']} blocks)"


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
