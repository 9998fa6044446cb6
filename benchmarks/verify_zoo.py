"""Is it still my model? Every small model, under the searched plan and every baseline, on 2 and 4 ranks, in float64.

    python benchmarks/verify_zoo.py [--models gpt2 llama ...] [--plans searched ddp ...] [--ranks 2 4] [--all]

`autopar.verify` compares losses, gradients and parameters after 3 optimizer steps with one device. Prints a line per case to stderr as it
goes and JSON at the end; the exit code is 1 if any case is not ok.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import autopar
from autopar.runtime.launch import RankPool

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.zoo import ZOO

SEVEN = ("gpt2", "llama", "qwen3", "bert", "t5", "vit", "resnet")
PLANS = ("searched", "ddp", "zero1", "fsdp", "tp", "tp-sp")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SEVEN), choices=list(ZOO))
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--all", action="store_true", help="also the models that the project's own tests add")
    return parser.parse_args()


def case(name: str, plan_name: str, ranks: int, pool: RankPool) -> dict[str, Any]:
    """Plan and verify one model; `pool` has as many `ranks`."""
    entry = ZOO[name]
    model = entry.build().double()
    example = entry.inputs(model)
    start = time.perf_counter()
    found: dict[str, Any] = {"model": name, "plan": plan_name, "ranks": ranks}
    try:
        plan = autopar.plan(model, example, f"cpu:{ranks}", baseline=None if plan_name == "searched" else plan_name)
        report = autopar.verify(model, example, plan, ranks=pool)
        found |= {"ok": report.ok, "max_relative_error": report.max_relative_error, "mesh": dict(plan.mesh)}
    except autopar.AutoparError as error:
        found |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return found | {"seconds": round(time.perf_counter() - start, 2)}


def line(row: dict[str, Any]) -> str:
    error = row.get("max_relative_error")
    detail = f"{error:.1e}" if error is not None else str(row["error"]).splitlines()[0]
    outcome = "ok" if row["ok"] else "NOT OK"
    return f"{row['model']:8} {row['plan']:9} {row['ranks']} ranks  {outcome:6} {detail}  ({row['seconds']} s)"


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    models = list(ZOO) if options.all else options.models
    rows = []
    for ranks in options.ranks:
        with RankPool(ranks) as pool:
            for name in models:
                for plan_name in options.plans:
                    rows.append(case(name, plan_name, ranks, pool))
                    print(line(rows[-1]), file=sys.stderr, flush=True)
    failed = sum(not row["ok"] for row in rows)
    print(json.dumps({"benchmark": "verify_zoo", "cases": len(rows), "failed": failed, "results": rows}, indent=2))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
