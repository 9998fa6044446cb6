"""Fixtures for the whole test suite: local gloo ranks that stay up for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from autopar.runtime.launch import RankPool


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two gloo ranks; tests that use them are marked `processes`."""
    with RankPool(2, threads=1, collective_timeout_s=180) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    """Four gloo ranks; tests that use them are marked `processes`."""
    with RankPool(4, threads=1, collective_timeout_s=180) as pool:
        yield pool
