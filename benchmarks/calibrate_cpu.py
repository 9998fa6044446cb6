"""Measures what the CPU preset of `autopar/ir/cluster.py` says: rates of computing and of gloo, with all ranks at work at once.

    python benchmarks/calibrate_cpu.py [--ranks 4] [--rounds 9]

Starts `--ranks` local processes (gloo, one thread each). Every figure is CPU time of a rank, of all its threads, times the ranks that
share a core: what a step takes on a machine that does nothing else, since while one rank waits another one computes. Wall time says the
same on a quiet machine and less on a busy one. Of several rounds the fastest counts, of the ranks the slowest. Prints JSON:

| key                  | how                                                                                                |
|----------------------|----------------------------------------------------------------------------------------------------|
| `flops_per_s`        | products of (1024, 1024) matrices                                                                  |
| `memory_bytes_per_s` | sums of two tensors of 4 MiB into a third, new one                                                 |
| `launch_s`           | additions of 16 numbers, with autograd                                                             |
| `start_s`, `latency_s`, `bytes_per_s` | least squares of `start + hops * (latency + size / ranks / bytes_per_s)` (see             |
|                      | `autopar/search/prices/collectives.py`), weighted to relative errors, over collectives, sizes and groups  |
| `gather_factor`      | median over the all-gathers of 512 KiB and more: measured bytes' time against that formula's       |
| `felt_share`         | wall time: `(both - computing) / collective` for products beside an asynchronous all-reduce        |
| `collectives`        | what was fitted: measured and modelled seconds                                                     |
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


def timed(run: Callable[[], object], times: int, rounds: int, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of one `run()` by `clock` on the slowest rank: `times` calls a round, of the fastest round."""
    import torch
    import torch.distributed as dist

    run()
    found = []
    for _ in range(rounds):
        dist.barrier()
        start = clock()
        for _ in range(times):
            run()
        spent = torch.tensor((clock() - start) / times, dtype=torch.float64)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        found.append(spent.item())
    return min(found) * (max(1.0, dist.get_world_size() / cores()) if clock is time.process_time else 1.0)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    """`start_s`, `latency_s` and `bytes_per_s` of least relative error, none below zero, and the `gather_factor` that is left."""
    import numpy as np

    terms = np.array([(1.0, row["hops"], row["hops"] * row["bytes"] / row["ranks"]) for row in rows])
    measured = np.array([row["measured_s"] for row in rows])
    gathers = np.array([row["kind"] == "all_gather" for row in rows])
    used = [0, 1, 2]
    while True:
        weighted = terms[:, used] / measured[:, None]
        found, *_ = np.linalg.lstsq(weighted[~gathers], np.ones(int((~gathers).sum())), rcond=None)
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    prices = np.array([found[used.index(column)] if column in used else 0.0 for column in range(3)])
    large = gathers & np.array([row["bytes"] >= 2**19 for row in rows])
    factor = float(np.median((measured - terms[:, :2] @ prices[:2])[large] / (terms[:, 2] * prices[2])[large]))
    for row, line in zip(rows, terms, strict=True):
        row["modelled_s"] = float(line @ (prices * (1.0, 1.0, factor if row["kind"] == "all_gather" else 1.0)))
    return {"start_s": float(prices[0]), "latency_s": float(prices[1]), "bytes_per_s": float(1 / prices[2]), "gather_factor": factor}


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
    wall = time.perf_counter
    repeats = 1 + int(timed(lambda: dist.all_reduce(message), 2, rounds, wall) / product_s)

    def computing() -> None:
        for _ in range(repeats):
            a @ b

    def both() -> None:
        work = dist.all_reduce(message, async_op=True)
        computing()
        work.wait()

    alone_s, message_s, both_s = (timed(run, 2, rounds, wall) for run in (computing, lambda: dist.all_reduce(message), both))
    if dist.get_rank() == 0:
        found = {
            "ranks": options.ranks,
            "cores": cores(),
            "flops_per_s": 2 * 1024**3 / product_s,
            "memory_bytes_per_s": 3 * 4 * 2**20 / sum_s,
            "launch_s": launch_s,
            **fit(rows),
            "felt_share": (both_s - alone_s) / message_s,
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
