"""What `tandem up` tells the processes that it starts."""

from __future__ import annotations

import itertools
from typing import Any

from tandem.cli.up import plan
from tandem.config import UpConfig


def flags(**settings: Any) -> dict[str, str]:
    """The router's flags and their values."""
    router, _ = plan(UpConfig(model="m", port=1, **settings), "m")
    return dict(itertools.pairwise(router.arguments))


def test_the_router_is_told_which_parsers() -> None:
    usual = flags()
    assert (usual["--tool-parser"], usual["--reasoning-parser"]) == ("auto", "auto")
    named = flags(tool_parser="llama3", reasoning_parser="none")
    assert (named["--tool-parser"], named["--reasoning-parser"]) == ("llama3", "none")
