"""Fixtures that several test files of the router share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.router.http_client import Served, serving


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """An HTTP door on a free port, before a dispatcher that echoes prompts."""
    async with serving(tmp_path) as one:
        yield one
