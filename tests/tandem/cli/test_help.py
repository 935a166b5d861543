"""`--help`, `--help=KEYWORD` and completion."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tandem
from tandem.cli.app import run
from tandem.cli.groups import GROUPS, OTHER, group_of
from tandem.config import DecodeConfig, PrefillConfig, RouterConfig, TrainDraftConfig, UpConfig, child_environment


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) == 0
    return capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version") == f"{tandem.__version__}\n"


def test_a_word_finds_settings_by_name_text_and_group(capsys: pytest.CaptureFixture[str]) -> None:
    page = said(capsys, "decode", "--help=kv")
    assert "--kv-mib <memory>" in page  # by name
    assert "--pages <count>" in page  # by group
    assert "TANDEM_KV_MIB, kv_mib in YAML" in page
    assert "--max-batch-tokens" not in page


@pytest.mark.parametrize(
    "name", ["max-batch-tokens", "--max-batch-tokens", "max_batch_tokens", "TANDEM_MAX_BATCH_TOKENS"]
)
def test_a_name_finds_one_setting_however_it_is_written(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = said(capsys, f"--help={name}")
    assert page.startswith("1 found\n\nEngine\n  --max-batch-tokens <count>  (up, prefill, decode)\n")


def test_all_shows_every_setting_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    page = said(capsys, "router", "--help=all")
    assert page.startswith(f"{len(RouterConfig.model_fields)} found\n")
    for name in RouterConfig.model_fields:
        assert f"TANDEM_{name.upper()}" in page
    assert "TANDEM_TOKEN" in page
    assert "--token" not in page


def test_commands_without_settings_are_searched_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--ladder" in said(capsys, "explain", "--help=ladder")


def test_a_word_that_finds_nothing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["decode", "--help=zebra"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tandem: --help: no setting of tandem decode has to do with 'zebra'; all shows all, ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("schema", [RouterConfig, PrefillConfig, DecodeConfig, UpConfig, TrainDraftConfig])
def test_every_setting_has_a_heading(schema: Any) -> None:
    assert [name for name in schema.model_fields if group_of(name) == OTHER] == []


def test_the_help_of_a_command_has_headings_units_and_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    page = said(capsys, "decode", "--help")
    shown = [group for group in GROUPS if f"─ {group} ─" in page]
    assert {"Model", "Network", "KV memory", "KV hand-over", "Engine"} <= set(shown)
    assert page.index("─ Model ─") < page.index("─ KV memory ─") < page.index("─ Observing ─")
    assert "<memory>" in page
    assert "80GiB" in page
    assert "TANDEM_TOKEN" in page


def test_the_help_names_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Exit codes: 0 ended as" in " ".join(said(capsys, "--help").split())


def test_a_shell_completes_commands_and_flags() -> None:
    code = "from tandem.cli.app import run; run([])"
    for words, found in (("tandem ro", "router"), ("tandem decode --max-b", "--max-batch-tokens")):
        variables = {
            "_TANDEM_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
            "PYTHONPATH": str(Path(tandem.__file__).parents[1]),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=child_environment(variables), capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == [found], done.stderr
