"""What stages cost, for the stage search: `StageCosts` of a graph.

Of every mesh and size of microbatch the shortened model (`autopar.search.stages.short`) is solved as a whole, at some prices of memory.
Each
solution gives every operation its time and memory; a stage is the sum over its operations, with as many units recomputed as memory asks
for. That is what the search compares; what it proposes is then solved stage by stage, exactly.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from autopar.errors import InfeasibleError, PlanError
from autopar.ir.fold import fold
from autopar.ir.graph import Graph
from autopar.ir.pipelining.microbatch import microbatched
from autopar.ir.pipelining.stages import candidates, crossing
from autopar.ir.precision import stored_bytes
from autopar.search.build import FREE, Built, Restriction, build
from autopar.search.follow import batch_size
from autopar.search.meshes import AXES, Mesh
from autopar.search.pins import Pins, apply_pins, pins_for
from autopar.search.prices.collectives import between
from autopar.search.prices.costs import OPTIMIZER_STATES, Costs
from autopar.search.prices.segments import OpCosts
from autopar.search.solver.problem import Floats
from autopar.search.solver.solve import solve_with
from autopar.search.stages.place import Recompute, Settings, alone
from autopar.search.stages.short import shortened
from autopar.search.stages.stage_costs import Group, StageCost
from autopar.search.structure import Structure

_MANY = 16  # repeats from which on one place to cut in each will do
_PRICES = (0.0, 1.0)
"""Of memory: what the whole of a device's limit is worth, in parts of the time of a step."""


Ints = np.ndarray[Any, np.dtype[np.int64]]
_FIELDS = (
    "forward_s", "backward_s", "weight_s", "before_s", "after_s", "fixed_bytes", "live_bytes", "workspace_bytes", "optimizer_s",
)  # fmt: skip
_COLUMNS = (
    "forward_s", "backward_s", "weight_s", "forward_comm_s", "backward_comm_s", "gather_s", "regather_s", "step_gather_s", "reduce_s",
    "optimizer_s", "parameter_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class _Priced:
    """One solution. `sums`: of `_COLUMNS` over the units before each place, `(units + 1, columns)`; by unit: `workspace_bytes`, and
    `enters_bytes` that are left of it where it is recomputed."""

    mesh: tuple[int, ...]
    sums: Floats
    workspace_bytes: Floats
    enters_bytes: Floats
    felt_share: float
    resident_bytes: float

    def stages(self, start: Ints, stop: Ints, shared_bytes: Any, live: int, recompute: Recompute, limit_bytes: float) -> Floats:
        """Stages of units `start` to `stop`, two rows of places: `_FIELDS` of each, with every number of units recomputed that is worth
        looking at. Shape `(ways, fields, places)`; infinite bytes where a way is none.

        Recomputed are no units, just so many that the stage fits in `limit_bytes`, or all."""
        forward, backward, weight, comm, back_comm, gather, regather, step_gather, reduce, optimizer, *sizes, kept = (
            self.sums[stop] - self.sums[start]
        ).T
        forward_s, backward_s = forward + comm + self._exposed(gather, forward), backward + back_comm + self._exposed(regather, backward)
        before_s, after_s = self._exposed(step_gather, forward), self._exposed(reduce, backward) + optimizer
        fixed = sum(sizes) + shared_bytes + self.resident_bytes
        workspace = self._most[start, stop]
        entering = self._enters[stop] - self._enters[start]
        # While a unit is computed again its activations are there once more.
        again = self._most_kept[start, stop]
        units = stop - start
        missing = fixed + workspace + again + live * kept - limit_bytes
        saved = live * np.maximum(kept - entering, 1e-9)
        with np.errstate(over="ignore"):
            enough = np.ceil(np.clip(missing / saved, 0.0, 2.0) * units - 1e-9) / units
        fits = fixed + workspace + live * kept <= limit_bytes
        found = []
        for way, share in (("none", np.zeros(len(units))), ("some", enough), ("all", np.ones(len(units)))):
            if recompute in ("none", "all") and way != recompute:
                continue
            some = share > 0.0
            left = (1.0 - share) * kept + share * entering
            absent = np.full(len(units), False) if way != "some" else fits | (share <= 0.0) | (share >= 1.0)
            found.append(np.stack([
                forward_s, backward_s + share * (forward + comm), np.where(some, 0.0, np.minimum(weight, backward)), before_s, after_s,
                np.where(absent, np.inf, fixed), left, workspace + some * again, optimizer,
            ]))  # fmt: skip
        return np.stack(found)

    def _exposed(self, traffic_s: Floats, computing_s: Floats) -> Floats:
        return np.maximum(0.0, traffic_s - computing_s) + self.felt_share * np.minimum(traffic_s, computing_s)

    @cached_property
    def _most(self) -> Floats:
        return _most_between(self.workspace_bytes)

    @cached_property
    def _most_kept(self) -> Floats:
        return _most_between(np.diff(self.sums[:, -1]))

    @cached_property
    def _enters(self) -> Floats:
        return np.concatenate([[0.0], np.cumsum(self.enters_bytes)])

    @cached_property
    def all_units(self) -> StageCost:
        """All units as one stage, of which nothing is recomputed."""
        start, stop = np.array([0]), np.array([len(self.workspace_bytes)])
        return self.cost(self.stages(start, stop, 0.0, 1, "none", np.inf)[0, :, 0])

    @cached_property
    def longest_unit_s(self) -> float:
        """Forward and backward pass of a microbatch."""
        start = np.arange(len(self.workspace_bytes))
        fields = self.stages(start, start + 1, 0.0, 1, "none", np.inf)[0]
        return float((fields[0] + fields[1]).max())

    @cached_property
    def whole(self) -> tuple[float, ...]:
        """What says whether another solution is better in all: times of a microbatch and of a step, bytes held and for each live one."""
        cost = self.all_units
        return (
            cost.forward_s, cost.backward_s, cost.before_s + cost.after_s, cost.fixed_bytes, cost.live_bytes, cost.workspace_bytes
        )  # fmt: skip

    def cost(self, fields: Floats) -> StageCost:
        forward_s, backward_s, weight_s, before_s, after_s, fixed, left, workspace, optimizer_s = fields.tolist()
        return StageCost(forward_s, backward_s, weight_s, before_s, after_s, fixed, left, workspace, self.mesh, optimizer_s)


def _most_between(values: Floats) -> Floats:
    """The largest of `values[start:stop]`; shape `(units, units + 1)`."""
    units = len(values)
    rows = np.where(np.arange(units) >= np.arange(units)[:, None], values, 0.0)
    return np.concatenate([np.zeros((units, 1)), np.maximum.accumulate(rows, 1)], 1)


class StagePrices:
    """`StageCosts` of the traced `graph`; units are what lies between its cut candidates.

    `tensor`: the sizes of the inner axis to look at; `starts[unit]`: where a unit begins in the graph. `together`: how many stages share
    a device's memory in what is searched now."""

    def __init__(self, graph: Graph, settings: Settings, pins: Pins, tensor: Sequence[int], restriction: Restriction = FREE) -> None:
        self.graph, self.settings, self.pins, self.tensor, self.restriction = graph, settings, pins, tuple(tensor), restriction
        self.starts = (0, *_places(graph))
        self.together = 1
        self.short = shortened(graph)
        self._priced: dict[tuple[Mesh, int], tuple[_Priced, ...]] = {}
        self._on_ranks: dict[Hashable, tuple[_Priced, ...]] = {}
        self._only: dict[tuple[int, int], tuple[int, ...]] = {}
        self._structures: dict[int, Structure | PlanError] = {}
        self._wires: dict[int, int] = {}
        self._kinds = self._find_kinds()
        self.solves = 0

    # ---- units ------------------------------------------------------------------------------------------------------------------

    @property
    def units(self) -> int:
        return len(self.starts)

    def kind(self, unit: int) -> Hashable:
        return self._kinds[unit]

    @cached_property
    def _bounds(self) -> list[int]:
        return [*self.starts, len(self.graph.ops)]

    def _find_kinds(self) -> list[Hashable]:
        bounds = [*self.starts, len(self.graph.ops)]
        numbers: dict[tuple[str, ...], int] = {}
        like = self.short.like
        shared = self._shared_units
        return [
            (numbers.setdefault(like[start:stop], len(numbers)), shared.get(unit, ()))
            for unit, (start, stop) in enumerate(pairwise(bounds))
        ]

    @cached_property
    def _shared(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Parameters that several units read, by name in the graph, with these units."""
        unit_of = np.searchsorted(np.array(self.starts), np.arange(len(self.graph.ops)), side="right") - 1
        found = []
        for item in self.graph.parameters:
            units = dict.fromkeys(int(unit_of[self.graph.op_index[op.name]]) for op in self.graph.consumers[item.value])
            if len(units) > 1:
                found.append((item.value, tuple(units)))
        return tuple(found)

    @cached_property
    def _shared_units(self) -> dict[int, tuple[str, ...]]:
        found: dict[int, tuple[str, ...]] = {}
        for name, units in self._shared:
            for unit in units:
                found[unit] = (*found.get(unit, ()), name)
        return found

    @cached_property
    def batch(self) -> int:
        return batch_size(self.graph)

    def in_body(self, starts: Sequence[int], microbatches: int) -> tuple[int, ...]:
        """Positions in the graph as positions in the graph of one microbatch: of the same operation, or the next that is still there."""
        body = microbatched(self.graph, microbatches).body
        found = []
        for start in starts:
            names = (op.name for op in self.graph.ops[start:])
            found.append(0 if start == 0 else next(body.op_index[name] for name in names if name in body.op_index))
        return tuple(found)

    # ---- prices -----------------------------------------------------------------------------------------------------------------

    def only(self, size: int, microbatches: int, tensor: Sequence[int]) -> None:
        """Of groups of `size` ranks with so many microbatches, look at these sizes of the inner axis."""
        self._only[size, microbatches] = tuple(tensor)

    def options(self, start: int, stop: int, group: Group, microbatches: int, live: int) -> tuple[StageCost, ...]:
        found = []
        for priced, fields in self._ways(np.array([start]), np.array([stop]), group, microbatches, live):
            found += [priced.cost(row[:, 0]) for row in fields]
        return tuple(found)

    def grid(self, group: Group, microbatches: int, live: int) -> Floats:
        """`options` of all stages at once: `(options, fields, units, units + 1)`, fields as `StageCost` has them from `forward_s` to
        `workspace_bytes`; infinite times where a stage has no unit."""
        start, stop = np.nonzero(np.arange(self.units + 1) > np.arange(self.units)[:, None])
        rows = [row for _, fields in self._ways(start, stop, group, microbatches, live) for row in fields]
        found = np.full((len(rows), len(_FIELDS) - 1, self.units, self.units + 1), np.inf)
        for number, row in enumerate(rows):
            found[number, :, start, stop] = row[:-1].T
        return found

    def _ways(self, start: Ints, stop: Ints, group: Group, microbatches: int, live: int) -> Iterator[tuple[_Priced, Floats]]:
        shared = self._shared_bytes(start, stop)
        limit = self.settings.limit_bytes / self.together
        for priced in self.on_ranks(group.size, microbatches, live):
            yield priced, priced.stages(start, stop, shared / priced.mesh[1], live, self.settings.recompute, limit)

    def on_ranks(self, size: int, microbatches: int, live: int) -> tuple[_Priced, ...]:
        """Solutions for groups of `size` ranks that are not worse than another in all."""
        tensor = self._only.get((size, microbatches), self.tensor)
        key = size, microbatches, tensor
        if key not in self._on_ranks:
            rows = [one for tp in tensor if size % tp == 0 for one in self.solved((size // tp, tp), microbatches, live)]
            self._on_ranks[key] = tuple(
                one for at, one in enumerate(rows) if not any(_beats(other, one, at < number) for number, other in enumerate(rows))
            )
        return self._on_ranks[key]

    def _shared_bytes(self, start: Ints, stop: Ints) -> Floats:
        """Bytes of state of parameters that are counted with a unit before these stages, and that they read too (a tied embedding)."""
        states = 2 + OPTIMIZER_STATES[self.settings.optimizer]
        found = np.zeros(len(start))
        for name, units in self._shared:
            reads = np.any([(start <= unit) & (unit < stop) for unit in units], axis=0)
            found += np.where((units[0] < start) & reads, states * stored_bytes(self.graph.values[name], self.settings.precision), 0.0)
        return found

    def transfer(self, cut: int, sender: Group, receiver: Group, microbatches: int) -> tuple[float, float]:
        """As if what travels were cut among all ranks that receive it; where they want copies, links inside a machine make them."""
        if cut not in self._wires:
            values = [self.graph.values[name] for name in crossing(self.graph, self.starts[cut])]
            self._wires[cut] = sum(value.size_bytes for value in values)
        cluster = self.settings.cluster
        link = between(cluster, (sender.first_rank, sender.size), (receiver.first_rank, receiver.size))
        seconds = self._wires[cut] / microbatches / receiver.size / link.bytes_per_s + link.latency_s + link.start_s
        return seconds, seconds

    def _structure(self, microbatches: int) -> Structure:
        """Of the shortened model's microbatch. Raises `PlanError` where the batch cannot be divided so."""
        known = self._structures.get(microbatches)
        if known is None:
            try:
                known = Structure(microbatched(self.short.graph, microbatches).body)
            except PlanError as error:
                known = error
            self._structures[microbatches] = known
        if isinstance(known, PlanError):
            raise known
        return known

    def divides(self, microbatches: int) -> bool:
        try:
            self._structure(microbatches)
        except PlanError:
            return False
        return True

    def built(self, mesh: Mesh, microbatches: int, live: int) -> Built:
        structure, settings = self._structure(microbatches), self.settings
        body = structure.graph
        costs = Costs(
            settings.cluster, mesh, AXES, settings.optimizer, body.training, microbatches=microbatches, live=min(live, microbatches),
            precision=settings.precision,
        )  # fmt: skip
        pins = pins_for(self.pins, self.graph, body)
        return build(structure, costs, apply_pins(pins, body, self.restriction))

    def solved(self, mesh: Mesh, microbatches: int, live: int) -> tuple[_Priced, ...]:
        """Solutions on one mesh."""
        key = mesh, microbatches
        found = self._priced.get(key)
        if found is None:
            found = self._priced[key] = tuple(self._solve(mesh, microbatches, live))
        return found

    def _solve(self, mesh: Mesh, microbatches: int, live: int) -> list[_Priced]:
        built = self.built(mesh, microbatches, live)
        if any(not options for options in built.options):
            return []
        self.solves += 1
        found: list[_Priced] = []
        seen: set[tuple[int, ...]] = set()
        scale = 0.0
        try:
            ready = alone(built).ready
        except InfeasibleError:
            return []
        for price in _PRICES:
            solution = solve_with(built.problem, {}, price * scale, ready)
            if solution.choice not in seen:
                seen.add(solution.choice)
                found.append(self._sums(built, solution.choice))
            if not scale:
                # The shortened model stands for a part of the whole, and the limit is for a stage of it.
                scale = solution.cost_s / self.settings.limit_bytes
        return found

    def _sums(self, built: Built, choice: tuple[int, ...]) -> _Priced:
        per_op = OpCosts(built.structure, built.costs, built.assignment(choice))
        position = built.structure.graph.op_index
        at = np.array([position.get(name, -1) for name in self.short.like])
        bounds = np.array(self._bounds)

        columns = per_op.scalars | {name: table.sum(1) for name, table in per_op.by_axis.items()}
        table = np.stack([columns[name] for name in _COLUMNS], 1)
        # What the prologue does is no stage's.
        table = np.concatenate([table, np.zeros((1, len(_COLUMNS)))])[at]
        sums = np.concatenate([np.zeros((1, len(_COLUMNS))), np.cumsum(table, 0)])[bounds]
        workspace = np.append(per_op.workspace + per_op.gathered, 0.0)[at]
        graph = built.structure.graph
        resident = sum(graph.values[item.value].size_bytes for item in graph.inputs) * built.costs.microbatches
        return _Priced(
            built.costs.mesh, sums, np.maximum.reduceat(workspace, bounds[:-1]), self._entering(per_op), built.costs.felt_share,
            float(resident),
        )  # fmt: skip

    def _entering(self, per_op: OpCosts) -> Floats:
        """By unit, bytes on a rank of what it reads of the units before, of one microbatch."""
        graph, known = per_op.graph, self._crossing
        sizes: dict[tuple[str, int], float] = {}
        found = np.zeros(self.units)
        for unit, ends in enumerate(known):
            for name, slot in ends:
                if (name, slot) not in sizes:
                    at = graph.op_index.get(name, -1)
                    size = 0.0
                    if at >= 0:
                        state = tuple(split.outputs[slot] for split in per_op.chosen[at])
                        size = float(per_op.costs.of(graph.values[graph.ops[at].outputs[slot]], state))
                    sizes[name, slot] = size
                found[unit] += sizes[name, slot]
        return found

    @cached_property
    def _crossing(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """By unit, what it would receive: the operations that make it, as they are priced, and which of their results."""
        found = []
        for start in self.starts:
            names = crossing(self.graph, start) if start else ()
            makers = [(name, self.graph.producers.get(name)) for name in names]
            ends = [(self.short.like[self.graph.op_index[op.name]], op.outputs.index(name)) for name, op in makers if op is not None]
            found.append(tuple(ends))
        return tuple(found)


def _beats(one: _Priced, other: _Priced, first: bool) -> bool:
    """Whether `one` is better than `other` in something and worse in nothing; of equals the first."""
    return one is not other and all(a <= b for a, b in zip(one.whole, other.whole, strict=True)) and (first or one.whole != other.whole)


def _places(graph: Graph) -> tuple[int, ...]:
    """Where to cut: at all candidates; of a long row of repeats at one place in each, the one that fewest bytes cross."""
    found = candidates(graph)
    for segment in fold(graph):
        inside = [at for at in found if segment.start <= at < segment.stop]
        if segment.count < _MANY or len(inside) <= segment.count:
            continue
        middle = segment.start + segment.length * (segment.count // 2)
        offsets = [at - middle for at in inside if middle <= at < middle + segment.length]
        if offsets:
            best = min(offsets, key=lambda offset: sum(graph.values[name].size_bytes for name in crossing(graph, middle + offset)))
            found = tuple(at for at in found if at not in inside or (at - segment.start) % segment.length == best)
    return found
