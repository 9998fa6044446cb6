"""The sharding rules: `autopar rules`."""

from __future__ import annotations

from fnmatch import fnmatchcase

from rich.console import Console

from autopar.ir.rules.given import operator_name
from autopar.ir.rules.remembered import all_filed
from autopar.ir.rules.table import LINES, RULES
from autopar.report.terminal import heading, table


def rules(console: Console, pattern: str = "*") -> None:
    """Print autopar's own rules and those that were found by trial on this machine, for operators whose name fits the glob `pattern`."""
    own = [target for target in sorted(RULES) if fnmatchcase(operator_name(target), pattern)]
    found = [rule for rule in all_filed() if fnmatchcase(operator_name(rule.target), pattern)]
    console.print(heading("rules", f"{len(RULES)} operators have one"))
    rows = table("operator", "rule")
    for target in own:
        rows.add_row(operator_name(target), LINES.get(target, "depends on its arguments"))
    console.print(rows)
    if found:
        console.print()
        console.print(heading("found by trial", "on this machine; checked again before they are used"))
        rows = table("call", "what is split")
        for rule in found:
            rows.add_row(rule.form, rule.words())
        console.print(rows)
