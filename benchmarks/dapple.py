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
from itertools import pairwise, product

from autopar.errors import AutoparError, PlanError
from autopar.search.profile import Profile, read_profile
from autopar.search.stage_costs import Devices, Group, Policy, StageCost
from autopar.search.stage_search import Pipeline, PlacedStage, Row, Simulated, StageSearch, search_stages
from autopar.search.stage_workload import simulated

NVLINK_BYTES_PER_S = 25e9
ETHERNET_BYTES_PER_S = 1e9  # point to point, at 25 Gbps
ETHERNET_RING_BYTES_PER_S = 3e9  # collectives, at 25 Gbps
DEVICE_BYTES = 16e9
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


@dataclass(frozen=True)
class ProfiledCosts:
    """`StageCosts` of a profile; see the module for the formulas."""

    profile: Profile
    machines: Machines
    global_batch: int
    whole_samples: bool
    parameter_copies: float

    @property
    def units(self) -> int:
        return len(self.profile.layers)

    def kind(self, unit: int) -> int:
        return unit

    @cache  # noqa: B019 (as long-lived as the search)
    def _stage(self, start: int, stop: int) -> tuple[float, float, float, float]:
        """For one sample: seconds forward and backward, bytes of results; and bytes of parameters."""
        layers = [self.profile.layers[place] for place in (*self.profile.again(start, stop), *range(start, stop))]
        return (
            math.fsum(layer.forward_s for layer in layers),
            math.fsum(layer.backward_s for layer in layers),
            math.fsum(layer.activation_bytes for layer in layers),
            math.fsum(layer.parameter_bytes for layer in layers),
        )

    @cache  # noqa: B019
    def _crossing_bytes(self, cut: int) -> float:
        return math.fsum(self.profile.layers[place].activation_bytes for place in self.profile.crossing(cut))

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


def microbatch_counts(global_batch: int, profile_batch: int) -> tuple[int, ...]:
    """Into how many microbatches of equal size, of at least `profile_batch` samples, the batch can be divided."""
    return tuple(count for count in range(1, global_batch + 1) if global_batch % count == 0 and global_batch // count >= profile_batch) or (
        1,
    )


def plan(
    costs: ProfiledCosts, counts: Sequence[int], tolerance: float, groups: Sequence[int] | None = None, sizes: str = "all"
) -> StageSearch:
    return search_stages(
        costs, costs.machines.devices, limit_bytes=DEVICE_BYTES, microbatches=counts, schedules=("1f1b",), stages_per_group=(1,),
        groups=groups, sizes="all" if sizes == "all" else (1,), policies=POLICIES, simulate=simulated, tolerance=tolerance,
    )  # fmt: skip
