"""What the verify benchmarks share: a case is run and told in a line, all of them in JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import autopar


def verified(case: str, labels: dict[str, Any], verify: Callable[[], autopar.VerifyReport]) -> dict[str, Any]:
    """The row of a case: `labels` and what `verify()` says or why it cannot. Prints a line to stderr."""
    start = time.perf_counter()
    row = dict(labels)
    try:
        report = verify()
        row |= {"ok": report.ok, "max_relative_error": report.max_relative_error}
        detail = f"{report.max_relative_error:.1e}"
    except autopar.AutoparError as error:
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
        detail = str(row["error"]).splitlines()[0]
    row["seconds"] = round(time.perf_counter() - start, 2)
    print(f"{case:55} {'ok' if row['ok'] else 'NOT OK':6} {detail}  ({row['seconds']} s)", file=sys.stderr, flush=True)
    return row


def finish(benchmark: str, rows: list[dict[str, Any]]) -> None:
    """Print all rows as JSON; exit with 1 if any case is not ok."""
    failed = sum(not row["ok"] for row in rows)
    print(json.dumps({"benchmark": benchmark, "cases": len(rows), "failed": failed, "results": rows}, indent=2))
    sys.exit(1 if failed else 0)
