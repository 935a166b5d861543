"""Writes the dashboards. `make dashboards` runs it, and then has them copied into the chart.

`python -m deploy.grafana.generate [FOLDER]` from the repository's root; FOLDER is written to instead of
`deploy/grafana/dashboards`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.boards import decode, handover, overview, prefill, routing
from deploy.grafana.panels import Board, made

BOARDS: tuple[Board, ...] = (overview.BOARD, routing.BOARD, prefill.BOARD, decode.BOARD, handover.BOARD)
FOLDER = Path(__file__).resolve().parent / "dashboards"


def text(board: Board) -> str:
    """The dashboard as Grafana imports it."""
    return JSONEncoder(sort_keys=True, indent=2).encode(made(board)) + "\n"


def write(folder: Path) -> None:
    """Writes one file for each dashboard, named by its uid."""
    folder.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        (folder / f"{board.uid}.json").write_text(text(board))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
