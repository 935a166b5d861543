"""What `tandem up` tells the processes that it starts."""

from __future__ import annotations

import itertools
from typing import Any

from tandem.cli.up import plan
from tandem.config import UpConfig


def flags(**settings: Any) -> tuple[dict[str, str], dict[str, str]]:
    """The router's and a worker's flags and their values."""
    router, (worker, *_) = plan(UpConfig(model="m", port=1, **settings), "m")
    return dict(itertools.pairwise(router.arguments)), dict(itertools.pairwise(worker.arguments))


def test_settings_reach_the_processes_that_have_them() -> None:
    router, worker = flags(
        tool_parser="llama3", generation_config="none", max_context=64, kernels="torch", dtype="float32"
    )
    assert (router["--tool-parser"], router["--generation-config"]) == ("llama3", "none")
    assert (worker["--max-context"], worker["--kernels"], worker["--dtype"]) == ("64", "torch", "float32")
    assert "--max-context" not in router and "--tool-parser" not in worker


def test_a_list_is_one_flag_for_each() -> None:
    router, _ = plan(UpConfig(model="m", port=1, cors_origins=("https://a", "https://b")), "m")
    at = router.arguments.index("--cors-origins")
    assert router.arguments[at : at + 4] == ["--cors-origins", "https://a", "--cors-origins", "https://b"]


def test_settings_of_none_are_left_out() -> None:
    router, worker = flags()
    assert "--chat-template" not in router and worker["--max-batch-tokens"] == "512"
