"""Fixtures for the whole test suite: local gloo ranks that stay up for the session. And the count of checked rules at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from autopar.runtime.verification.launch import RankPool
from tests import counting

os.environ["AUTOPAR_CACHE_DIR"] = ""  # tests neither read nor fill the user's cache

_COUNTS: list[counting.Count] = []
"""Of the processes that have run tests."""


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


def pytest_sessionfinish(session: Any) -> None:
    worker = getattr(session.config, "workeroutput", None)  # of pytest-xdist
    if worker is not None:
        worker["rules"] = counting.count()
    else:
        _COUNTS.append(counting.count())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _COUNTS.append(getattr(node, "workeroutput", {}).get("rules", {"checked": {}, "found": {}, "registered": {}}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if line := counting.words(_COUNTS):
        terminalreporter.write_line(line)
