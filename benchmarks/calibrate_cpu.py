"""Measures what the CPU preset of `autopar/ir/cluster.py` says: rates of computing and of gloo, with all ranks at work at once.

    python benchmarks/calibrate_cpu.py [--ranks 4] [--rounds 9]

Starts `--ranks` local processes (gloo, one thread each). Every figure is what the slowest rank sees while all others do the same: where
ranks share cores, that is their share. Of several rounds the fastest counts, as others on the machine only add. Prints JSON:

| key                  | how                                                                                               |
|----------------------|---------------------------------------------------------------------------------------------------|
| `flops_per_s`        | products of (1024, 1024) matrices                                                                 |
| `memory_bytes_per_s` | sums of two tensors of 4 MiB into a third, new one                                               |
| `launch_s`           | additions of 16 numbers, with autograd                                                            |
| `start_s`, `latency_s`, `bytes_per_s` | least squares of `start + hops * (latency + size / ranks / bytes_per_s)` (see           |
|                      | `autopar/search/collectives.py`), weighted to relative errors, over collectives, sizes and groups |
| `hidden_share`       | `(both - computing) / collective` for products beside an asynchronous all-reduce                  |
| `collectives`        | what was fitted: measured and modelled seconds                                                    |
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SIZES_BYTES = (4 * 2**10, 64 * 2**10, 512 * 2**10, 2 * 2**20, 8 * 2**20)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def timed(run: Callable[[], object], times: int, rounds: int) -> float:
    """Seconds of one `run()` on the slowest rank: from a barrier on, `times` calls a round, of the fastest round."""
    import torch
    import torch.distributed as dist

    run()
    found = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(times):
            run()
        spent = torch.tensor((time.perf_counter() - start) / times, dtype=torch.float64)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        found.append(spent.item())
    return min(found)


def collective(kind: str, size_bytes: int, group: Any) -> Callable[[], object]:
    """One collective of autopar's runtime on `size_bytes` of the whole value (what one rank holds, for all-to-all)."""
    import torch

    from autopar.runtime import collectives

    x = torch.zeros(group.size(), size_bytes // 4 // group.size())
    row = x[0].clone()
    if kind == "all_reduce":
        return lambda: collectives.all_reduce(x, group.group_name)
    if kind == "all_gather":
        return lambda: collectives.all_gather(row, 0, 1, x.numel(), group.group_name)
    if kind == "reduce_scatter":
        return lambda: collectives.reduce_scatter(x, 0, 1, group.group_name)
    columns = x.view(-1, group.size())
    return lambda: collectives.all_to_all(columns, 0, 1, 1, 1, columns.shape[0] * group.size(), group.group_name)


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """`start_s`, `latency_s` and `bytes_per_s` of least relative error, none below zero."""
    import numpy as np

    terms = np.array([(1.0, row["hops"], row["hops"] * row["bytes"] / row["ranks"]) for row in rows])
    measured = np.array([row["measured_s"] for row in rows])
    used = [0, 1, 2]
    while True:
        found, *_ = np.linalg.lstsq(terms[:, used] / measured[:, None], np.ones(len(rows)), rcond=None)
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    start_s, latency_s, per_byte_s = (found[used.index(k)] if k in used else 0.0 for k in range(3))
    for row, line in zip(rows, terms, strict=True):
        row["modelled_s"] = float(line @ (start_s, latency_s, per_byte_s))
    return {"start_s": float(start_s), "latency_s": float(latency_s), "bytes_per_s": float(1 / per_byte_s)}


def worker(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rounds = options.rounds
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    product_s = timed(lambda: a @ b, 5, rounds)
    x, y = torch.zeros(2**20), torch.zeros(2**20)
    sum_s = timed(lambda: x + y, 10, rounds)
    small = torch.zeros(16, requires_grad=True)
    launch_s = timed(lambda: small + 1.0, 2000, rounds)

    whole = dist.group.WORLD
    half = [dist.new_group(list(range(start, start + 2))) for start in range(0, options.ranks, 2)][dist.get_rank() // 2]
    rows: list[dict[str, Any]] = []
    for group in (whole, half) if options.ranks > 2 else (whole,):
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
            for size in SIZES_BYTES:
                seconds = timed(collective(kind, size, group), 20 if size < 2**20 else 3, rounds)
                hops = (2 if kind == "all_reduce" else 1) * (group.size() - 1)
                rows.append({"kind": kind, "ranks": group.size(), "bytes": size, "hops": hops, "measured_s": seconds})

    message = torch.zeros(2**21)
    repeats = 1 + int(timed(lambda: dist.all_reduce(message), 2, rounds) / product_s)

    def computing() -> None:
        for _ in range(repeats):
            a @ b

    def both() -> None:
        work = dist.all_reduce(message, async_op=True)
        computing()
        work.wait()

    alone_s, message_s, both_s = (timed(run, 2, rounds) for run in (computing, lambda: dist.all_reduce(message), both))
    if dist.get_rank() == 0:
        found = {
            "ranks": options.ranks,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "flops_per_s": 2 * 1024**3 / product_s,
            "memory_bytes_per_s": 3 * 4 * 2**20 / sum_s,
            "launch_s": launch_s,
            **fit(rows),
            "hidden_share": (both_s - alone_s) / message_s,
            "collectives": rows,
        }
        print(json.dumps(found, indent=2))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    options = arguments()
    if "LOCAL_RANK" in os.environ:
        worker(options)
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    sys.exit(subprocess.run([*launcher, __file__, *sys.argv[1:]], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
