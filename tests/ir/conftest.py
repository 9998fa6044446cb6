"""Counts what the numerical checks of the sharding rules have checked, and says so at the end of the run."""

from __future__ import annotations

from collections import Counter
from typing import Any

from autopar.ir.rules.table import RULES

CHECKED: Counter[str] = Counter()
"""Checked splits by operator."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if CHECKED:
        terminalreporter.write_line(
            f"sharding rules: {len(RULES)} operators have one; {CHECKED.total()} splits of {len(CHECKED)} operators checked numerically"
        )
