"""What the tests of each vulnerability class share."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.security.rig import KEYS, METRICS, TOKEN, Authority, Front, caller, front


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(json.dumps(KEYS))
    return path


@pytest.fixture
def opened() -> Front:
    """Without keys."""
    return front()


@pytest.fixture
def locked(keys: Path) -> Front:
    """With keys."""
    return front(keys, TOKEN, METRICS)


@pytest_asyncio.fixture
async def anyone(opened: Front) -> AsyncIterator[httpx.AsyncClient]:
    async with caller(opened) as client:
        yield client
