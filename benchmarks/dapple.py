"""Plans pipelines from published profiles of layers, for the clusters of the DAPPLE paper, and compares with the plans of its Table 4.

    python benchmarks/dapple.py bert-48-pbs-2.txt --config A --global-batch 64

The profile goes through autopar's own stage search and simulator; only prices come from here, with the constants of DAPPLE's published
planner (Fan et al. 2021, "DAPPLE: A Pipelined Data Parallel Approach for Training Large Models", PPoPP; github.com/AlibabaPAI/DAPPLE,
`planner/src/environment`): NVLink 25 GB/s; Ethernet of 25 Gbps 1 GB/s from point to point and 3 GB/s in collectives, of 10 Gbps 0.4 of
both; an all-reduce of b bytes over n devices takes 2 b (n - 1) / n / bandwidth; 16 GB a device.

A stage on r devices is replicated: of each microbatch every replica takes 1/r of the samples (as the published planner has it; with
`--whole-samples` the largest replica's), gradients are reduced once, at the end. Times are linear in the samples: the profile has one
batch size. A microbatch has at least as many samples as the profile's batch, since smaller ones would be slower than linear. A device
holds parameters, gradients and two moments of Adam (`--parameter-copies 4`) and for each live microbatch the results of all its layers,
which is all of the activations that a profile tells.

Between machines, a transfer goes as fast as the busiest machine's Ethernet lets it, 1 GB/s a machine however many devices take part.

Layers that a profile lists in any graph are cut where they stand in order; what is read behind a cut crosses it once for each cut. Of more
than 60 layers, the lightest neighbours stay together.

Prints one JSON line: `found` (our plan), `paper` (the paper's for this profile, or `--paper`'s, under its best number of microbatches
and its best placement), `ratio` = paper / found in simulated time, `lower_bound_s` (no plan of the space searched is faster), `seconds`.

`--paper` names devices and first layer of every stage, `8:input_ids,8:layer_23`; or only devices, `15,1`: then the cuts that suit it best;
or `straight`: one device a stage, with the cuts that suit it best; or `data-parallel`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

from autopar.errors import AutoparError, PlanError
from autopar.search.stages.profile import Profile, batch_of, read_profile
from autopar.search.stages.stage_bounds import facts_of
from autopar.search.stages.stage_costs import Devices, Group, Pipeline, PlacedStage, Policy, Simulated, StageCost
from autopar.search.stages.stage_search import StageSearch, search_stages
from autopar.search.stages.stage_space import needed_bytes
from autopar.search.stages.stage_workload import simulated

NVLINK_BYTES_PER_S = 25e9
ETHERNET_BYTES_PER_S = 1e9  # point to point, at 25 Gbps
ETHERNET_RING_BYTES_PER_S = 3e9  # collectives, at 25 Gbps
DEVICE_BYTES = 16e9
MOST_UNITS = 60
SCHEDULES = ("1f1b", "interleaved-1f1b")
"""With one stage on each device, these are the paper's two policies of how many forward passes go ahead (its section 5.2): of n stages
that are left, n (P_A) or, where transfers take long, 2 n - 1 (P_B)."""
POLICIES: tuple[Policy, ...] = ("fresh", "append", "scatter")


@dataclass(frozen=True)
class Machines:
    """`nodes` machines of `per_node` V100s; `ethernet`: speed of the network between them, in parts of 25 Gbps."""

    devices: Devices
    ethernet: float


CONFIGS = {
    "A": Machines(Devices(2, 8), 1.0),
    "B": Machines(Devices(16, 1), 1.0),
    "C": Machines(Devices(16, 1), 10 / 25),
}

# Table 4 of the paper: profile, configuration -> global batch, stages. It counts layers with weights: VGG-19's 13 : 6 cuts before its
# 14th, BERT-48's 23 : 25 before its 24th encoder layer. For a straight pipeline it does not say where it is cut.
PAPER = {
    ("vgg-19", "A"): (2048, "data-parallel"),
    ("vgg-19", "B"): (2048, "data-parallel"),
    ("vgg-19", "C"): (2048, "15:Input,1:Conv2d_5_2"),
    ("bert-48", "A"): (64, "8:input_ids,8:layer_23"),
    ("bert-48", "B"): (64, "straight"),
    ("bert-48", "C"): (64, "straight"),
}


@dataclass(frozen=True, eq=False)
class ProfiledCosts:
    """`StageCosts` of a profile; see the module for the formulas."""

    profile: Profile
    bounds: tuple[int, ...]
    """Unit u is layers `bounds[u]` to `bounds[u + 1]`."""
    machines: Machines
    global_batch: int
    whole_samples: bool
    parameter_copies: float
    live_matters = False

    @property
    def units(self) -> int:
        return len(self.bounds) - 1

    def kind(self, unit: int) -> int:
        return unit

    @cache  # noqa: B019 (lives as long as the program)
    def _stage(self, start: int, stop: int) -> tuple[float, float, float, float]:
        """For one sample: seconds forward and backward, bytes of results; and bytes of parameters."""
        first, behind = self.bounds[start], self.bounds[stop]
        layers = [self.profile.layers[place] for place in (*self.profile.again(first, behind), *range(first, behind))]
        return (
            math.fsum(layer.forward_s for layer in layers),
            math.fsum(layer.backward_s for layer in layers),
            math.fsum(layer.activation_bytes for layer in layers),
            math.fsum(layer.parameter_bytes for layer in layers),
        )

    @cache  # noqa: B019
    def _crossing_bytes(self, cut: int) -> float:
        return math.fsum(self.profile.layers[place].activation_bytes for place in self.profile.crossing(self.bounds[cut]))

    @cache  # noqa: B019
    def _option(self, start: int, stop: int, shape: tuple[int, ...], microbatches: int) -> tuple[StageCost, ...]:
        forward_s, backward_s, activation_bytes, parameter_bytes = self._stage(start, stop)
        size = sum(shape)
        samples = self.global_batch / microbatches / size
        samples = math.ceil(samples) if self.whole_samples else samples
        ring = NVLINK_BYTES_PER_S if len(shape) == 1 else ETHERNET_RING_BYTES_PER_S * self.machines.ethernet
        return (
            StageCost(
                samples * forward_s,
                samples * backward_s,
                after_s=2 * parameter_bytes * (size - 1) / size / ring,
                fixed_bytes=self.parameter_copies * parameter_bytes,
                live_bytes=samples * activation_bytes,
            ),
        )

    def options(self, start: int, stop: int, group: Group, microbatches: int, live: int) -> tuple[StageCost, ...]:
        return self._option(start, stop, group.shape, microbatches)

    def transfer(self, cut: int, sender: Group, receiver: Group, microbatches: int) -> tuple[float, float]:
        size = self._crossing_bytes(cut) * self.global_batch / microbatches
        forward_s, back_s = self._move_s(sender.devices, receiver.devices), self._move_s(receiver.devices, sender.devices)
        return size * forward_s, size * back_s

    @cache  # noqa: B019
    def _move_s(self, sender: tuple[tuple[int, int], ...], receiver: tuple[tuple[int, int], ...]) -> float:
        """Seconds for a byte that is spread evenly over the senders to be spread evenly over the receivers.

        Receivers take from senders on their own machine what these have; of the rest, every machine takes and gives its share.
        """
        has, wants = dict(sender), dict(receiver)
        senders, receivers = sum(has.values()), sum(wants.values())
        inside, out, into = 0.0, 0.0, 0.0
        for node in has.keys() | wants.keys():
            given, taken = has.get(node, 0) / senders, wants.get(node, 0) / receivers
            stays = min(given, taken)
            if stays:
                inside = max(inside, stays / min(has[node], wants[node]))
            out, into = max(out, given - stays), max(into, taken - stays)
        return max(inside / NVLINK_BYTES_PER_S, max(out, into) / (ETHERNET_BYTES_PER_S * self.machines.ethernet))


def units_of(profile: Profile, keep: Sequence[int] = ()) -> tuple[int, ...]:
    """Where a stage may start, and at last the number of layers: everywhere, or of many layers the lightest neighbours stay together
    (of equally light ones those between which most would cross). Layers in `keep` remain places to start."""
    layers = profile.layers
    seconds = [layer.forward_s + layer.backward_s for layer in layers]
    crossing = [math.fsum(layers[place].activation_bytes for place in profile.crossing(cut)) for cut in range(len(layers))]
    bounds = list(range(len(layers) + 1))
    while len(bounds) - 1 > MOST_UNITS:
        inner = [at for at in range(1, len(bounds) - 1) if bounds[at] not in keep]
        if not inner:
            break
        bounds.pop(min(inner, key=lambda at: (math.fsum(seconds[bounds[at - 1] : bounds[at + 1]]), -crossing[bounds[at]])))
    return tuple(bounds)


def microbatch_counts(global_batch: int, profile_batch: int) -> tuple[int, ...]:
    """Into how many microbatches of equal size, of at least `profile_batch` samples, the batch can be divided."""
    return tuple(count for count in range(1, global_batch + 1) if global_batch % count == 0 and global_batch // count >= profile_batch) or (
        1,
    )


def search(costs: ProfiledCosts, counts: Sequence[int], tolerance: float, **options: Any) -> StageSearch:
    """What autopar's stage search finds; `options` are more of its own."""
    chosen = {"sizes": "all", "policies": POLICIES, "simulate": simulated, "tolerance": tolerance, **options}
    return search_stages(
        costs, costs.machines.devices, limit_bytes=DEVICE_BYTES, microbatches=counts, schedules=SCHEDULES, stages_per_group=(1,), **chosen
    )


# ---- plans that are given ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """Devices of each stage, and the layers they start with (None where the plan does not say)."""

    devices: tuple[int, ...]
    starts: tuple[int, ...] | None


def read_stages(text: str, profile: Profile, devices: int) -> Wanted:
    """`data-parallel`, `straight`, `15,1` or `15:first layer,1:first layer`. Raises `PlanError` naming part and remedy."""
    if text == "data-parallel":
        return Wanted((devices,), (0,))
    if text == "straight":
        return Wanted((1,) * devices, None)
    numbers, starts = [], []
    names = [layer.name for layer in profile.layers]
    for part in text.split(","):
        number, _, name = part.strip().partition(":")
        if not number.isdecimal() or int(number) < 1:
            raise PlanError(
                f"stage {part!r}: write devices and first layer, such as `15:{names[0]},1:{names[-1]}`, or only devices, `15,1`"
            )
        if name and name not in names:
            raise PlanError(f"stage {part!r}: the profile has no layer {name!r}; it has {', '.join(names)}")
        numbers.append(int(number))
        starts.append(names.index(name) if name else -1)
    if sum(numbers) != devices:
        raise PlanError(f"stages {text!r} take {sum(numbers)} devices, and there are {devices}")
    if all(start < 0 for start in starts):
        return Wanted(tuple(numbers), None)
    if starts[0] != 0 or sorted(set(starts)) != starts:
        raise PlanError(f"stages {text!r}: give the first layer of every stage, in order, beginning with {names[0]}")
    return Wanted(tuple(numbers), tuple(starts))


def pipelines(wanted: Wanted, costs: ProfiledCosts, counts: Sequence[int]) -> Iterator[Pipeline]:
    """The given stages, as far as they fit, under every number of microbatches and every way to place devices and to schedule."""
    assert wanted.starts is not None
    at = [costs.bounds.index(start) for start in wanted.starts]
    ranges = list(zip(at, (*at[1:], costs.units), strict=True))
    seen = set()
    for chosen in product(POLICIES, repeat=len(wanted.devices)):
        used: tuple[int, ...] = (0,) * costs.machines.devices.nodes
        groups: list[Group] = []
        for number, policy in zip(wanted.devices, chosen, strict=True):
            group, used = costs.machines.devices.take(used, number, policy)
            groups.append(group)
        if tuple(groups) in seen:
            continue
        seen.add(tuple(groups))
        for count, schedule in product(counts, SCHEDULES):
            stages: list[PlacedStage] = []
            for facts, (start, stop), group in zip(facts_of(schedule, len(groups), 1, count), ranges, groups, strict=True):
                (cost,) = costs.options(start, stop, group, count, facts.live)
                if needed_bytes(cost, facts.live) > DEVICE_BYTES:
                    break
                moved = costs.transfer(start, stages[-1].group, group, count) if stages else (0.0, 0.0)
                stages.append(PlacedStage(start, stop, group, cost, moved))
            else:
                yield Pipeline(schedule, count, len(groups), tuple(stages))


def best_of(wanted: Wanted, costs: ProfiledCosts, counts: Sequence[int], tolerance: float) -> tuple[Pipeline, Simulated] | None:
    """The given plan, with all that it leaves open chosen to suit it; None where it does not fit."""
    if wanted.starts is None and len(set(wanted.devices)) == 1:
        row = search(costs, counts, tolerance, groups=(len(wanted.devices),), sizes="equal", most_opened=5_000).best
        return (row.best, row.simulated) if row and row.best and row.simulated else None
    every = [wanted.starts] if wanted.starts else [(0, *cuts) for cuts in combinations(costs.bounds[1:-1], len(wanted.devices) - 1)]
    rows = [(pipeline, simulated(pipeline)) for starts in every for pipeline in pipelines(Wanted(wanted.devices, starts), costs, counts)]
    return min(rows, key=lambda row: row[1].step_s, default=None)


# ---- the report -------------------------------------------------------------------------------------------------------------------


def described(pipeline: Pipeline, said: Simulated, costs: ProfiledCosts) -> dict[str, Any]:
    """A plan and what the simulator says of it, for JSON."""
    layers = costs.profile.layers
    return {
        "step_s": round(said.step_s, 6),
        "bubble": round(said.bubble, 4),
        "communication_s": round(said.communication_s, 6),
        "memory_gb": round(max(said.memory_bytes) / 1e9, 2),
        "microbatches": pipeline.microbatches,
        "samples": costs.global_batch // pipeline.microbatches,
        "schedule": pipeline.schedule,
        "stages": [
            {
                "devices": stage.group.size,
                "machines": len(stage.group.devices),
                "layers": costs.bounds[stage.stop] - costs.bounds[stage.start],
                "first": layers[costs.bounds[stage.start]].name,
                "last": layers[costs.bounds[stage.stop] - 1].name,
            }
            for stage in pipeline.stages
        ],
    }


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """What is printed. Raises `PlanError` where the profile or the options are wrong."""
    profile_batch = options.profile_batch or batch_of(options.profile)
    profile = read_profile(options.profile, profile_batch)
    machines = CONFIGS[options.config]
    counts = tuple(options.microbatches or microbatch_counts(options.global_batch, profile_batch))
    if uneven := [count for count in counts if options.global_batch % count]:
        raise PlanError(f"{uneven[0]} microbatches do not divide a global batch of {options.global_batch} evenly; give a divisor")
    published = PAPER.get((profile.name.split("-pbs")[0], options.config))
    text = options.paper or (published[1] if published and published[0] == options.global_batch else None)
    wanted = read_stages(text, profile, machines.devices.count) if text else None
    bounds = units_of(profile, (wanted and wanted.starts) or ())
    costs = ProfiledCosts(profile, bounds, machines, options.global_batch, options.whole_samples, options.parameter_copies)
    started = time.perf_counter()
    found = search(costs, counts, options.tolerance)
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {"profile": profile.name, "config": options.config, "global_batch": options.global_batch}
    best = found.best
    result["found"] = described(best.best, best.simulated, costs) if best and best.best and best.simulated else None
    if wanted:
        given = best_of(wanted, costs, counts, options.tolerance)
        result["paper_says"] = text
        result["paper"] = described(*given, costs) if given else "does not fit"
        result["ratio"] = round(given[1].step_s / best.step_s, 4) if given and best else None
    result["lower_bound_s"] = round(found.lower_bound_s, 6) if best else None
    result["seconds"] = round(seconds, 2)
    result["by_stages"] = [
        {"stages": row.groups, "step_s": round(row.step_s, 6), "lower_bound_s": round(row.lower_bound_s, 6)}
        if row.best
        else {"stages": row.groups, "why": row.why}
        for row in found.rows
    ]
    return result


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", help="a file of layers and edges, such as bert-48-pbs-2.txt")
    parser.add_argument(
        "--config", choices=sorted(CONFIGS), required=True, help="A: 2 machines of 8; B: 16 of 1; C: 16 of 1, slower Ethernet"
    )
    parser.add_argument("--global-batch", type=positive, required=True)
    parser.add_argument("--profile-batch", type=positive, help="samples of the profile; by default what `pbs-N` in its name says")
    parser.add_argument("--paper", help="the plan to compare with; by default Table 4's")
    parser.add_argument("--microbatches", type=positive, action="append", help="try this number of microbatches; may be given again")
    parser.add_argument("--parameter-copies", type=float, default=4.0, help="parameters, gradients and optimizer state, in parameters")
    parser.add_argument("--whole-samples", action="store_true", help="replicas take whole samples, not 1/r of each microbatch")
    parser.add_argument("--tolerance", type=float, default=0.001, help="how much faster some other plan may be, at most")
    return parser.parse_args(given)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    try:
        print(json.dumps(benchmark(options)))
    except AutoparError as error:
        print(f"dapple: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
