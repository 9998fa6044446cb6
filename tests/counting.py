"""What the numerical checks of the sharding rules have checked in this process, and in all processes of a test run."""

from __future__ import annotations

from collections import Counter

from autopar.ir.rules import register, remembered
from autopar.ir.rules.table import RULES

CHECKED: Counter[str] = Counter()
"""Checked splits by operator."""

REGISTERED: set[str] = set()
"""Operators with a registered rule that was checked."""


Count = dict[str, dict[str, int]]


def count() -> Count:
    """Checked splits by operator, and checks of every rule that was found by trial, as a dict that can be sent."""
    found = {key: rule.checks for key, rule in remembered._KNOWN.items() if not rule.whole}
    return {"checked": dict(CHECKED), "found": found, "registered": dict.fromkeys([*REGISTERED, *register.ALL], 1)}


def words(counts: list[Count]) -> str:
    """One line for the end of a run; empty where nothing was checked."""
    checked: Counter[str] = Counter()
    found: dict[str, int] = {}
    registered: set[str] = set()
    for each in counts:
        checked.update(each["checked"])
        found |= each["found"]
        registered |= each["registered"].keys()
    if not checked and not found:
        return ""
    return (
        f"sharding rules: {len(RULES)} operators have one; {checked.total()} splits of {len(checked)} operators checked numerically; "
        f"{len(found)} rules found by trial ({sum(found.values())} checks), {len(registered)} registered"
    )
