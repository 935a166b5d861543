"""Where the CRDs of other projects are, if anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic_settings import BaseSettings


class Outside(BaseSettings):
    """What a test run may be given."""

    crd_dir: Path | None = None


@pytest.fixture(scope="session")
def crds() -> Path | None:
    """The folder that `CRD_DIR` names, or None."""
    folder = Outside().crd_dir
    assert folder is None or folder.is_dir(), f"CRD_DIR is {folder}; there is no such folder"
    return folder
