"""How long simulating a step takes.

    python benchmarks/simulate.py [--devices 16384] [--layers 128] [--microbatches 64] [--groups 16] [--repeats 3]

The plan of a transformer of `--layers` layers in `--groups` groups of ranks (mesh: data x 8 tensor), each layer with blocking
collectives on the tensor axis and gradients reduced on the data axis; every schedule. Prints JSON: by schedule the least CPU seconds of
the repeats for the whole simulation (events, memory over time) and for the search's inner loop (`autopar.search.simulator.quick`), with the
number of events and the simulated step. `rows` beyond the asked number of groups show how time grows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from autopar.ir.pipelining.schedules import SCHEDULES, Schedule
from autopar.search.simulator.quick import StageTime, quick
from autopar.search.simulator.simulate import run
from autopar.search.simulator.workload import Flow, Piece, Stage, Workload


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=16_384)
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--groups", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def workload(schedule: Schedule, options: argparse.Namespace, groups: int) -> Workload:
    """Layers dealt out over the stages; times in the proportions of a large transformer on H100s."""
    per_group = schedule.stages_per_group or 2
    count = groups * per_group
    size = options.devices // groups
    stages: list[Stage] = []
    for index in range(count):
        group = schedule.group_of(index, groups)
        inside = tuple((f"group {group} inside {way}", 1.0) for way in ("out", "in"))
        outside = tuple((f"group {group} {way}", 1.0) for way in ("out", "in"))
        tensor = (Flow(3e-4, inside, "tp"),)
        layer = Piece(
            f"layer of stage {index}", 2e-3, 4e-3, 2e-3, tensor, tensor, reduce=(Flow(5e-3, outside, "dp"),), optimizer_s=1e-4,
            activation_bytes=2e8, parameter_bytes=4e8, gradient_bytes=4e8, optimizer_bytes=8e8, workspace_bytes=1e8,
        )  # fmt: skip
        number = options.layers * (index + 1) // count - options.layers * index // count
        receive = returns = None
        if stages and (before := stages[-1].group) != group:
            receive = Flow(4e-4, ((f"group {before} out", 1.0), (f"group {group} in", 1.0)))
            returns = Flow(4e-4, ((f"group {group} out", 1.0), (f"group {before} in", 1.0)))
        stages.append(Stage(f"stage {index}", group, (layer,) * number, receive, returns))
    orders = schedule.orders(groups, per_group, options.microbatches)
    return Workload(tuple(stages), orders, 20 / 132, ranks=tuple(range(group * size, (group + 1) * size) for group in range(groups)))


def least_s(repeats: int, call: Callable[[], Any]) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(repeats):
        started = time.process_time()
        result = call()
        best = min(best, time.process_time() - started)
    return best, result


def main() -> None:
    options = arguments()
    rows = []
    for groups in options.groups:
        for schedule in SCHEDULES.values():
            work = workload(schedule, options, groups)
            seconds, simulation = least_s(options.repeats, lambda work=work: run(work))
            sums = [
                StageTime(sum(p.forward_s for p in s.pieces), sum(p.backward_s for p in s.pieces), sum(p.weight_s for p in s.pieces))
                for s in work.stages
            ]
            name, count = schedule.name, options.microbatches
            quick(name, groups, sums, count)  # lays out the actions, once
            quick_s, _ = least_s(10, lambda name=name, groups=groups, sums=sums, count=count: quick(name, groups, sums, count))
            rows.append(
                {
                    "schedule": name,
                    "groups": groups,
                    "stages": len(work.stages),
                    "simulate_cpu_s": round(seconds, 3),
                    "quick_cpu_ms": round(quick_s * 1e3, 3),
                    "events": len(simulation.events),
                    "step_s": round(simulation.step_s, 4),
                    "bubble": round(simulation.bubble, 4),
                }
            )
    about = {"devices": options.devices, "layers": options.layers, "microbatches": options.microbatches}
    print(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
