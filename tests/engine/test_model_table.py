"""The page about models says what is in the registry and what is compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tandem.engine.model.registry import FAMILIES
from tandem.testing.families import VARIANTS
from tandem.testing.model_table import BEGIN, architecture_of, update

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_is_what_make_docs_writes(tmp_path: Path) -> None:
    copy = Path(shutil.copy(PAGE, tmp_path))
    assert not update(copy), "docs/models.md is stale: run make docs"
    copy.write_text(PAGE.read_text().replace("`llama-gelu`, ", ""))
    assert update(copy)
    assert copy.read_text() == PAGE.read_text()


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(BEGIN)
    with pytest.raises(ValueError, match="lacks"):
        update(page)


def test_every_family_is_compared() -> None:
    compared = {architecture_of(spec) for spec in VARIANTS.values()}
    assert set(FAMILIES) - compared == {"Gemma3ForConditionalGeneration"}, "its decoder is Gemma3ForCausalLM's"
