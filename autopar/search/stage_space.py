"""The space of the stage search: states of devices, the groups that lead from one to the next, and stages priced once each."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from autopar.search.stage_bounds import Prices, Way
from autopar.search.stage_costs import Devices, Group, Policy, StageCost, StageCosts

Options = dict[tuple[int, int], StageCost]
"""(start, stop) -> what runs these units."""


@dataclass(frozen=True, slots=True)
class Step:
    """A way to go on from a state of devices: the `group`, the bounds' view of it, and what each stage there would be."""

    group: Group
    way: Way
    options: Options


class Space:
    """Which groups stages may have: states of devices in use, numbered, the empty one first."""

    def __init__(self, devices: Devices, sizes: tuple[int, ...], policies: tuple[Policy, ...]) -> None:
        self.devices, self.sizes, self.policies = devices, sizes, policies
        empty = (0,) * devices.nodes
        number = {empty: 0}
        self.groups: list[list[tuple[Group, int]]] = []
        self.before: list[list[Group]] = [[]]
        for used in (order := [empty]):
            found = []
            for size in sizes:
                if size > devices.count - sum(used):
                    continue
                for group, after in devices.choices(used, size, policies):
                    if after not in number:
                        number[after] = len(order)
                        order.append(after)
                        self.before.append([])
                    found.append((group, number[after]))
                    self.before[number[after]].append(group)
            self.groups.append(found)
        self.full = number.get((devices.per_node,) * devices.nodes)
        self.states = len(order)


class Pricing:
    """Answers of `costs`, asked once, as arrays."""

    def __init__(self, costs: StageCosts, limit_bytes: float) -> None:
        self.costs, self.limit_bytes = costs, limit_bytes
        self.units = costs.units
        kinds: dict[Hashable, int] = {}
        self._kinds = tuple(kinds.setdefault(costs.kind(unit), len(kinds)) for unit in range(self.units))
        self._asked: dict[tuple[tuple[int, ...], tuple[int, ...], int, int], tuple[StageCost, ...]] = {}
        self._stages: dict[tuple[tuple[int, ...], int, int], list[tuple[Prices, Options]]] = {}
        self._steps: dict[tuple[int, int, int], tuple[tuple[Step, ...], ...]] = {}
        self._transfers: dict[tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...], int], np.ndarray] = {}

    def every(self, start: int, stop: int, group: Group, microbatches: int, live: int) -> tuple[StageCost, ...]:
        """All options, also those that do not fit."""
        key = (self._kinds[start:stop], group.shape, microbatches, live)
        if key not in self._asked:
            self._asked[key] = self.costs.options(start, stop, group, microbatches, live)
        return self._asked[key]

    def fits(self, cost: StageCost, live: int) -> bool:
        return needed_bytes(cost, live) <= self.limit_bytes

    def stages(self, group: Group, microbatches: int, live: int) -> list[tuple[Prices, Options]]:
        """For the first, second, ... option that fits: every stage's."""
        key = (group.shape, microbatches, live)
        if key in self._stages:
            return self._stages[key]
        slots: list[Options] = []
        for start in range(self.units):
            for stop in range(start + 1, self.units + 1):
                fitting = [cost for cost in self.every(start, stop, group, microbatches, live) if self.fits(cost, live)]
                for slot, cost in enumerate(fitting):
                    if slot == len(slots):
                        slots.append({})
                    slots[slot][start, stop] = cost
        self._stages[key] = [(self._prices(options), options) for options in slots]
        return self._stages[key]

    def needed(self, group: Group, microbatches: int, live: int) -> np.ndarray:
        """What a device holds at least, by (start, stop) of a stage; infinite where there is no option."""
        found = np.full((self.units, self.units + 1), np.inf)
        for start in range(self.units):
            for stop in range(start + 1, self.units + 1):
                options = self.every(start, stop, group, microbatches, live)
                found[start, stop] = min((needed_bytes(cost, live) for cost in options), default=math.inf)
        return found

    def _prices(self, options: Options) -> Prices:
        arrays = np.zeros((6, self.units, self.units + 1))
        if options:
            where = tuple(np.array(list(options)).T)
            rows = [(1.0, cost.forward_s, cost.backward_s, cost.weight_s, cost.before_s, cost.after_s) for cost in options.values()]
            arrays[:, where[0], where[1]] = np.array(rows).T
        return Prices(arrays[0] > 0, *arrays[1:])

    def transfers(self, sender: Group, receiver: Group, microbatches: int) -> np.ndarray:
        """(2, units): seconds into a stage that starts at a unit, and back; 0 at unit 0."""
        first = min(sender.devices[0][0], receiver.devices[0][0])
        key = (_moved(sender, first), _moved(receiver, first), microbatches)
        if key not in self._transfers:
            rows = [(0.0, 0.0), *(self.costs.transfer(cut, sender, receiver, microbatches) for cut in range(1, self.units))]
            self._transfers[key] = np.array(rows).T
        return self._transfers[key]

    def steps(self, space: Space, microbatches: int, live: int) -> tuple[tuple[Step, ...], ...]:
        """From each state of devices, the ways to go on."""
        if (key := (id(space), microbatches, live)) in self._steps:
            return self._steps[key]
        found = []
        for state, groups in enumerate(space.groups):
            steps = []
            for group, after in groups:
                arrivals = [self.transfers(sender, group, microbatches) for sender in space.before[state]]
                least = np.min(arrivals, axis=0) if arrivals else np.zeros((2, self.units))
                steps += [Step(group, Way(after, prices, least), options) for prices, options in self.stages(group, microbatches, live)]
            found.append(tuple(steps))
        self._steps[key] = tuple(found)
        return self._steps[key]

    def again(self, space: Space, microbatches: int, live: int) -> tuple[Step, ...]:
        """The ways of one more stage on devices that all have one already: a group of each shape there is."""
        shapes = {group.shape: group for groups in space.groups for group, _ in groups}
        free = np.zeros((2, self.units))  # which groups neighbours have is not known here
        assert space.full is not None
        return tuple(
            Step(group, Way(space.full, prices, free), options)
            for group in shapes.values()
            for prices, options in self.stages(group, microbatches, live)
        )


def _moved(group: Group, nodes: int) -> tuple[tuple[int, int], ...]:
    return group.devices if nodes == 0 else tuple((node - nodes, count) for node, count in group.devices)


def needed_bytes(cost: StageCost, live: int) -> float:
    return cost.fixed_bytes + live * cost.live_bytes + cost.workspace_bytes
