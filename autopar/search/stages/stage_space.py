"""The space of the stage search: states of devices, the groups that lead from one to the next, and stages priced once each."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from autopar.search.stages.stage_bounds import Array, Ways
from autopar.search.stages.stage_costs import Devices, Group, Policy, StageCost, StageCosts

_MOST_KEPT = 4_000_000  # entries of all tables together, each 100 bytes; beyond, they are made anew where they are needed
_Devices = tuple[tuple[int, int], ...]


class Space:
    """Which groups stages may have: states of devices in use, numbered, the empty one first. By state: the groups that may come next and
    the state then (`groups`), and those that may have come last (`before`). `full`: the state with all devices in use, if it is reached."""

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


class _Option(NamedTuple):
    """The first, second, ... option of every stage on groups of one shape, by (start, stop)."""

    exists: Array
    times: Array
    """`(5, units, units + 1)`: forward, backward, gradients of weights, before, after."""
    fixed_bytes: Array
    live_bytes: Array


@dataclass(frozen=True)
class Table:
    """`ways` as the bounds see them; `groups[state][edge]` is the group of an entry with that `edge`."""

    ways: Ways
    groups: tuple[tuple[Group, ...], ...]
    arrivals: dict[tuple[_Devices, int], Array] = field(default_factory=dict)


class Pricing:
    """Answers of `costs`, asked once, as arrays."""

    def __init__(self, costs: StageCosts, limit_bytes: float) -> None:
        self.costs, self.limit_bytes = costs, limit_bytes
        self.units = costs.units
        self._live_matters = getattr(costs, "live_matters", True)
        kinds: dict[Hashable, int] = {}
        self._kinds = tuple(kinds.setdefault(costs.kind(unit), len(kinds)) for unit in range(self.units))
        self._asked: dict[Hashable, tuple[StageCost, ...]] = {}
        self._options: dict[Hashable, list[_Option]] = {}
        self._tables: dict[Hashable, Table] = {}
        self._transfers: dict[Hashable, Array] = {}

    def every(self, start: int, stop: int, group: Group, microbatches: int, live: int) -> tuple[StageCost, ...]:
        """All options, also those that do not fit."""
        key = (self._kinds[start:stop], group.shape, microbatches, live if self._live_matters else 0)
        if key not in self._asked:
            self._asked[key] = self.costs.options(start, stop, group, microbatches, live)
        return self._asked[key]

    def fits(self, cost: StageCost, live: int) -> bool:
        return needed_bytes(cost, live) <= self.limit_bytes

    def options(self, group: Group, microbatches: int, live: int) -> list[_Option]:
        key = (group.shape, microbatches, live if self._live_matters else 0)
        if key not in self._options and (grid := getattr(self.costs, "grid", None)) is not None:
            table = grid(group, microbatches, live)
            exists = np.isfinite(table).all(1)
            table = np.where(exists[:, None], table, 0.0)
            self._options[key] = [
                _Option(there, row[:5], row[5] + row[7], row[6]) for there, row in zip(exists, table, strict=True)
            ]  # fmt: skip
        if key not in self._options:
            rows: list[tuple[int, int, int, StageCost]] = []
            for start in range(self.units):
                for stop in range(start + 1, self.units + 1):
                    every = self.every(start, stop, group, microbatches, live)
                    rows += [(slot, start, stop, cost) for slot, cost in enumerate(every)]
            slots = 1 + max((slot for slot, *_ in rows), default=-1)
            data = np.zeros((8, slots, self.units, self.units + 1))
            if rows:
                at = tuple(np.array([row[:3] for row in rows]).T)
                data[(slice(None), *at)] = np.array([
                    (1.0, cost.forward_s, cost.backward_s, cost.weight_s, cost.before_s, cost.after_s,
                     cost.fixed_bytes + cost.workspace_bytes, cost.live_bytes) for *_, cost in rows
                ]).T  # fmt: skip
            self._options[key] = [_Option(part[0] > 0, part[1:6], part[6], part[7]) for part in np.moveaxis(data, 1, 0)]
        return self._options[key]

    def transfers(self, sender: Group, receiver: Group, microbatches: int) -> Array:
        """(2, units): seconds into a stage that starts at a unit, and back; 0 at unit 0."""
        first = min(sender.devices[0][0], receiver.devices[0][0])
        key = (_moved(sender, first), _moved(receiver, first), microbatches)
        if key not in self._transfers:
            rows = [(0.0, 0.0), *(self.costs.transfer(cut, sender, receiver, microbatches) for cut in range(1, self.units))]
            self._transfers[key] = np.array(rows).T
        return self._transfers[key]

    def arrivals(self, table: Table, sender: Group, state: int, microbatches: int) -> Array:
        """(2, edges, units): `transfers` from `sender` to each group that may come next."""
        if (key := (sender.devices, state)) not in table.arrivals:
            table.arrivals[key] = np.stack([self.transfers(sender, group, microbatches) for group in table.groups[state]], axis=1)
        return table.arrivals[key]

    def table(self, space: Space, microbatches: int, live: int, most_s: float, again: bool) -> Table:
        """The ways to go on from each state of devices, with stages that a microbatch takes at most `most_s`. `again`: not with new
        groups but, where all devices are taken, with one more stage on a group of each shape there is."""
        asked = (id(space), microbatches, live, most_s, again)
        if asked not in self._tables:
            self._tables[asked] = self._table_of(space, microbatches, live, most_s, again)
        return self._tables[asked]

    def _table_of(self, space: Space, microbatches: int, live: int, most_s: float, again: bool) -> Table:
        groups = space.groups
        if again:
            shapes = {group.shape: group for found in space.groups for group, _ in found}
            groups = [
                [(group, state) for group in shapes.values()] if state == space.full else [] for state in range(space.states)
            ]  # fmt: skip
        fitting: dict[tuple[int, ...], list[Array]] = {}
        for group in {group.shape: group for found in groups for group, _ in found}.values():
            fitting[group.shape] = [
                option.exists
                & (option.fixed_bytes + live * option.live_bytes <= self.limit_bytes)
                & (option.times[0] + option.times[1] <= most_s)
                for option in self.options(group, microbatches, live)
            ]
        digest = tuple(hash(mask.tobytes()) for masks in fitting.values() for mask in masks)
        # Most limits leave the same stages.
        key = (id(space), microbatches, live if self._live_matters else 0, again, digest)
        if key not in self._tables:
            if sum(len(table.ways.to) for table in self._tables.values()) > _MOST_KEPT:
                self._tables.clear()
            places = {shape: [np.nonzero(mask) for mask in masks] for shape, masks in fitting.items()}
            self._tables[key] = self._table(space, groups, microbatches, live, places, again)
        return self._tables[key]

    def _table(
        self, space: Space, groups: Sequence[Sequence[tuple[Group, int]]], microbatches: int, live: int,
        places: dict[tuple[int, ...], list[tuple[Array, ...]]], again: bool,
    ) -> Table:  # fmt: skip
        columns: list[Array] = []
        for state, found in enumerate(groups):
            for edge, (group, after) in enumerate(found):
                least = np.zeros((2, self.units))
                if not again and space.before[state]:
                    least = np.min([self.transfers(sender, group, microbatches) for sender in space.before[state]], axis=0)
                for slot, (option, (start, stop)) in enumerate(
                    zip(self.options(group, microbatches, live), places[group.shape], strict=True)
                ):
                    named = np.broadcast_to(np.array([[state], [after], [edge], [slot]]), (4, len(start)))
                    columns.append(np.vstack([start, stop, named, option.times[:, start, stop], least[:, start]]))
        every = np.concatenate(columns, axis=1) if columns else np.zeros((13, 0))
        every = every[:, np.lexsort((every[0], every[2]))]
        start, stop, state_of, to, edges, slots = every[:6].astype(np.int64)
        first = np.searchsorted(state_of * self.units + start, np.arange(space.states * self.units + 1))
        ways = Ways(first, stop, to, edges, slots, *every[6:])
        return Table(ways, tuple(tuple(group for group, _ in found) for found in groups))


def _moved(group: Group, nodes: int) -> _Devices:
    return group.devices if nodes == 0 else tuple((node - nodes, count) for node, count in group.devices)


def needed_bytes(cost: StageCost, live: int) -> float:
    """What a device holds that runs the stage, and nothing else, with `live` microbatches."""
    return cost.fixed_bytes + live * cost.live_bytes + cost.workspace_bytes


def least_needed_bytes(pricing: Pricing, group: Group, microbatches: int, live: int) -> Array:
    """By (start, stop) of a stage; infinite where there is no option."""
    found = np.full((pricing.units, pricing.units + 1), np.inf)
    for option in pricing.options(group, microbatches, live):
        need = option.fixed_bytes + live * option.live_bytes
        found = np.minimum(found, np.where(option.exists, need, math.inf))
    return found
