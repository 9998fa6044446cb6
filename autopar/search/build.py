"""Graph, mesh and prices become a `Problem`: a table per class of equal nodes or edges, and the choices its rows stand for.

Its time has two steps. `AT_LOSS`, between the passes: what is kept for the backward pass is all there. `AT_END` of the backward pass:
that has gone, and gradients have come. Parameters, optimizer state and what is gathered for the whole step are there at both, and so
are gradients that add up over several microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from autopar.ir.assignment import Assignment, Choice, Storage
from autopar.ir.conversion import State
from autopar.ir.graph import Value
from autopar.ir.placement import Placement
from autopar.search.prices.costs import AGAIN, ENTERS, LEAVES, Costs, Term, Traffic
from autopar.search.solver.problem import Problem, Segment, Table
from autopar.search.strategies import Allowed, storages, strategies
from autopar.search.structure import Edge, Structure

AT_LOSS, AT_END = 0, 1
_ALWAYS, _KEPT, _LATE = (AT_LOSS, AT_END + 1), (AT_LOSS, AT_END), (AT_END, AT_END + 1)  # intervals: all the time, activations, gradients
T = TypeVar("T", bound=Hashable)
Options = tuple[Choice, ...] | tuple[Storage, ...]


@dataclass(frozen=True, slots=True)
class Restriction:
    """What a baseline or pins leave to choose from.

    `splits[position]`: names per axis that operation `position` may use. `pins[index]`: placement per axis that parameter `index` is
    stored in, `stored[index]` the placements to choose from. `gathers`: times of gathering to choose from. `gather`: whether
    parameters may be used in another split than they are stored in.
    """

    splits: Mapping[int, Allowed] = field(default_factory=dict)
    pins: Mapping[int, tuple[Placement | None, ...]] = field(default_factory=dict)
    stored: Mapping[int, tuple[tuple[Placement, ...] | None, ...]] = field(default_factory=dict)
    gathers: tuple[str, ...] = ("step", "use")
    gather: bool = True


FREE = Restriction()


@dataclass(frozen=True, slots=True)
class Built:
    """A problem and what its rows mean: `options[node]` are choices for an operation, storages for a parameter."""

    problem: Problem
    options: tuple[Options, ...]
    structure: Structure
    costs: Costs
    restriction: Restriction = FREE
    recompute: tuple[int, ...] = ()
    builder: _Builder | None = field(default=None, compare=False, repr=False)
    """What made it, with all its tables."""

    def recomputing(self, counts: tuple[int, ...]) -> Built:
        """The same with the first `counts` repeats of every segment of the graph recomputed."""
        assert self.builder is not None
        return self.builder.build(counts)

    def switched(self, counts: tuple[int, ...]) -> Problem:
        """The problem whose regions are those repeats, each computed once or again. What leaves a region that is computed again counts as
        if the region were kept: a little less than it takes, at the few places where such regions end."""
        assert self.builder is not None
        once, again = self.builder.build(), self.builder.build(counts)
        of_op = self.structure.recomputed(counts)
        if of_op is None:
            return once.problem
        regions = [-1] * len(self.structure.order)
        for position, node in enumerate(self.structure.node_of_op):
            regions[node] = int(of_op[position])
        read_in: dict[int, set[int]] = {}
        for edge in self.structure.parameter_edges:
            read_in.setdefault(edge.source, set()).add(regions[edge.target])
        for node, found in read_in.items():
            regions[node] = found.pop() if len(found) == 1 else -1
        tables: list[Table] = []
        numbers: dict[tuple[int, int], int] = {}

        def number(first: int, second: int) -> int:
            if (first, second) not in numbers:
                numbers[first, second] = len(tables)
                table, other = once.problem.tables[first], again.problem.tables[second]
                same = table is other or second < 0
                tables.append(table if same else replace(table, again=other))
            return numbers[first, second]

        pairs = zip(once.problem.nodes, again.problem.nodes, strict=True)
        nodes = tuple([number(a, b if region >= 0 else -1) for (a, b), region in zip(pairs, regions, strict=True)])
        edges = tuple([
            (i, j, number(a, b if regions[j] >= 0 else -1))
            for (i, j, a), (_, _, b) in zip(once.problem.edges, again.problem.edges, strict=True)
        ])  # fmt: skip
        also = tuple([(node, number(table, -1), lo, hi) for node, table, lo, hi in once.problem.also])
        segments = _equal_runs(self.structure.segments, list(nodes))
        return replace(once.problem, nodes=nodes, edges=edges, tables=tuple(tables), segments=segments, also=also, regions=tuple(regions))

    def like(self, structure: Structure, costs: Costs) -> Built:
        """The same for a graph that differs in names alone, with other numbers of live microbatches: activations take so much more."""
        assert self.builder is not None and costs.prices == self.costs.prices
        return self.builder.like(structure, costs).build(self.recompute)

    def op_choices(self) -> dict[int, list[Choice]]:
        """Choices by class of operation; those of equal operations under different restrictions together."""
        found: dict[int, dict[Choice, None]] = {}
        seen: set[tuple[int, int]] = set()
        for position, number in enumerate(self.structure.class_of):
            options = self.options[self.structure.node_of_op[position]]
            if (number, id(options)) not in seen:
                seen.add((number, id(options)))
                found.setdefault(number, {}).update((option, None) for option in options if not isinstance(option, Storage))
        return {number: list(choices) for number, choices in found.items()}

    def relaxed_bound_s(self) -> float:
        """A bound without solving: every node takes its cheapest strategy and no edge costs anything."""
        least = [float(table.cost_s.min()) if table.cost_s.size and table.cost_s.ndim == 1 else 0.0 for table in self.problem.tables]
        return sum(least[table] for table in self.problem.nodes)

    def assignment(self, choice: tuple[int, ...]) -> Assignment:
        """What a solution decides. `gather` becomes `"never"` where a parameter is used as it is stored."""
        structure, costs = self.structure, self.costs
        graph = structure.graph
        choices: dict[str, Choice] = {}
        storage: dict[str, Storage] = {}
        for node, (kind, index) in enumerate(structure.order):
            option = self.options[node][choice[node]]
            if isinstance(option, Storage):
                storage[graph.parameters[index].fqn] = option
            else:
                choices[graph.ops[index].name] = option
            assert isinstance(option, Storage) == (kind == "parameter")
        moved: set[int] = set()
        for edge in structure.parameter_edges:
            stored = self.options[edge.source][choice[edge.source]]
            target = self.options[edge.target][choice[edge.target]]
            assert isinstance(stored, Storage) and not isinstance(target, Storage)
            value = graph.values[edge.value]
            for state in target_states(target, edge.slots):
                if costs.conversion(value.shape, value.dtype, value.requires_grad, stored.stored, state).gathers:
                    moved.add(edge.source)
        for index, parameter in enumerate(graph.parameters):
            if structure.node_of_parameter[index] not in moved:
                storage[parameter.fqn] = Storage(storage[parameter.fqn].stored, "never")
        return Assignment(costs.names, costs.mesh, choices, storage)


def target_states(choice: Choice, slots: tuple[int, ...]) -> tuple[State, ...]:
    """In which states an operation wants the value that it reads at `slots`, each once."""
    return tuple(dict.fromkeys(tuple(split.inputs[slot] for split in choice) for slot in slots))


def build(structure: Structure, costs: Costs, restriction: Restriction = FREE, recompute: tuple[int, ...] = ()) -> Built:
    """The problem of planning `structure` on the mesh of `costs`. A node without any option has an empty table: see `empty_nodes`.

    `recompute`: of how many repeats, the first ones, of every segment the backward pass runs the forward pass again."""
    return _Builder(structure, costs, restriction).build(recompute)


def empty_nodes(built: Built) -> list[int]:
    """Nodes for which a restriction leaves nothing to choose."""
    return [node for node, options in enumerate(built.options) if not options]


class _Builder:
    """Tables are made once each, whatever is recomputed. `_activations`: those whose memory is that of live microbatches."""

    def __init__(self, structure: Structure, costs: Costs, restriction: Restriction) -> None:
        self.structure, self.costs, self.restriction = structure, costs, restriction
        self.again: np.ndarray | None = None
        self.tables: list[Table] = []
        self._activations: set[int] = set()
        self._gradients: dict[int, int] = {}  # of parameters' tables, where gradients come late
        self._table_of: dict[object, int] = {}
        self._options_of: dict[object, tuple[int, Options]] = {}
        self._edge_tables: dict[tuple[int, int, int, str], int] = {}
        self._times: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def like(self, structure: Structure, costs: Costs) -> _Builder:
        """With the same tables; see `Built.like`."""
        other = _Builder(structure, costs, self.restriction)
        times = costs.live / self.costs.live
        other.tables = [
            Table(table.cost_s, table.memory_bytes * times) if times != 1 and number in self._activations else table
            for number, table in enumerate(self.tables)
        ]
        other._activations, other._gradients = set(self._activations), dict(self._gradients)
        other._table_of, other._options_of = dict(self._table_of), dict(self._options_of)
        other._edge_tables, other._times = dict(self._edge_tables), dict(self._times)
        return other

    def build(self, recompute: tuple[int, ...] = ()) -> Built:
        """The problem with so many repeats of every segment recomputed."""
        structure = self.structure
        self.again = structure.recomputed(recompute)
        count = len(structure.order)
        options: list[Options] = [()] * count
        keys: list[int] = [0] * count  # which set of options
        nodes: list[int] = [0] * count
        for node, (kind, index) in enumerate(structure.order):
            if kind == "op":
                keys[node], options[node] = self._op_options(index)
                nodes[node] = self._op_table(index, keys[node], options[node])
        readers: dict[int, list[Edge]] = {node: [] for node in structure.node_of_parameter}
        for edge in structure.parameter_edges:
            readers[edge.source].append(edge)
        for index, node in enumerate(structure.node_of_parameter):
            keys[node], options[node] = self._storages(index, readers[node], keys, options)
            nodes[node] = self._parameter_table(index, keys[node], options[node])
        edges = []
        ways = structure.ways(self.again)
        for number, edge in enumerate(structure.edges):
            ends = keys[edge.source], keys[edge.target], edge.kind, ways[number]
            table = self._edge_tables.get(ends)
            if table is None:
                table = self._edge_tables[ends] = self._edge_table(edge, options[edge.source], options[edge.target], *ends[1::2])
            edges.append((edge.source, edge.target, table))
        late = [(node, self._gradients[table]) for node, table in enumerate(nodes) if table in self._gradients]
        used = sorted({*nodes, *(table for *_, table in edges), *(table for _, table in late)})
        number_of = {table: number for number, table in enumerate(used)}
        problem = Problem(
            tuple([number_of[table] for table in nodes]),
            tuple([(source, target, number_of[table]) for source, target, table in edges]),
            tuple([self.tables[table] for table in used]),
            _equal_runs(structure.segments, nodes),
            live=tuple([_KEPT if kind == "op" else _ALWAYS for kind, _ in structure.order]),
            edges_live=tuple([_ALWAYS if edge.slot < 0 else _KEPT for edge in structure.edges]),
            also=tuple([(node, number_of[table], *_LATE) for node, table in late]),
        )
        return Built(problem, tuple(options), structure, self.costs, self.restriction, recompute if any(recompute) else (), self)

    def _intern(self, key: object, options: Options) -> tuple[int, Options]:
        return self._options_of.setdefault(key, (len(self._options_of), options))

    def _add(self, cost_s: np.ndarray, memory_bytes: np.ndarray, activations: bool = False) -> int:
        self.tables.append(Table(cost_s, memory_bytes))
        if activations:
            self._activations.add(len(self.tables) - 1)
        return len(self.tables) - 1

    # ---- operations -------------------------------------------------------------------------------------------------------------

    def _op_options(self, position: int) -> tuple[int, Options]:
        structure, costs = self.structure, self.costs
        allowed = self.restriction.splits.get(position, (None,) * len(costs.mesh))
        # Two sets of choices are the same when splits are: equal tokens, whatever is kept of the results.
        key = ("op", structure.split_class[position], allowed)
        found = self._options_of.get(key)
        if found is None:
            op = structure.graph.ops[position]
            found = self._intern(key, strategies(structure.graph, op, costs.names, costs.mesh, allowed))
        return found

    def _op_table(self, position: int, key: int, options: Options) -> int:
        number = self.structure.class_of[position]
        again = self.again is not None and int(self.again[position]) >= 0
        found = self._table_of.get(("op", key, number, again))
        if found is None:
            row = self.structure.classes[number]
            terms = [
                self.costs.op_term(row.work, row.operands, row.outputs, choice, row.kept, row.returned, again)
                for choice in options if not isinstance(choice, Storage)
            ]  # fmt: skip
            found = self._add(np.array([term.cost_s for term in terms]), np.array([term.memory_bytes for term in terms]), True)
            self._table_of["op", key, number, again] = found
            if key not in self._times:
                times = [self.costs.op_times(row.work, row.operands, row.outputs, c) for c in options if not isinstance(c, Storage)]
                self._times[key] = (np.array([forward for forward, _ in times]), np.array([backward for _, backward in times]))
        return found

    # ---- parameters -------------------------------------------------------------------------------------------------------------

    def _storages(self, index: int, readers: list[Edge], keys: list[int], options: list[Options]) -> tuple[int, Options]:
        restriction, costs, graph = self.restriction, self.costs, self.structure.graph
        value = graph.values[graph.parameters[index].value]
        free = (None,) * len(costs.mesh)
        pinned, stored = restriction.pins.get(index, free), restriction.stored.get(index, free)
        key = ("parameter", _kind(value), tuple((keys[edge.target], edge.slots) for edge in readers), pinned, stored)
        found = self._options_of.get(key)
        if found is None:
            wanted = dict.fromkeys(
                state for edge in readers for choice in options[edge.target] if not isinstance(choice, Storage)
                for state in target_states(choice, edge.slots)
            )  # fmt: skip
            trains = value.requires_grad and graph.training
            found = self._intern(key, storages(value, costs.mesh, wanted, trains, pinned, stored, restriction.gathers))
        return found

    def _parameter_table(self, index: int, key: int, options: Options) -> int:
        found = self._table_of.get(("parameter", key))
        if found is None:
            graph = self.structure.graph
            value = graph.values[graph.parameters[index].value]
            terms = [self.costs.parameter_term(value, storage) for storage in options if isinstance(storage, Storage)]
            # With one microbatch, gradients come as activations go.
            late = ("gradients",) if self.costs.microbatches == 1 else ()
            cost_s = np.array([term.cost_s for term in terms])
            found = self._add(cost_s, _bytes(terms, lambda kind: kind not in late))
            if (gradients := _bytes(terms, lambda kind: kind in late)).any():
                self._gradients[found] = self._add(np.zeros_like(cost_s), gradients)
            self._table_of["parameter", key] = found
        return found

    # ---- edges ------------------------------------------------------------------------------------------------------------------

    def _edge_table(self, edge: Edge, source: Options, target: Options, target_key: int, way: str) -> int:
        value = self.structure.graph.values[edge.value]
        wanted = [target_states(choice, edge.slots) for choice in target if not isinstance(choice, Storage)]
        if edge.slot < 0:
            return self._use_table(value, edge.keeps == "target" or way in AGAIN, source, wanted, target_key)
        return self._value_table(value, edge, source, wanted, way)

    def _value_table(self, value: Value, edge: Edge, source: Options, wanted: list[tuple[State, ...]], way: str) -> int:
        made = [tuple(split.outputs[edge.slot] for split in choice) for choice in source if not isinstance(choice, Storage)]
        rows, row_of = _distinct(made)
        columns, column_of = _distinct(wanted)
        numbers = [self._number(state) for state in rows]
        prices = self.costs.edge_prices.setdefault(_kind(value), {})
        cost, memory = np.zeros((len(columns), len(rows))), np.zeros((len(columns), len(rows)))
        for j, targets in enumerate(columns):
            for target in targets:
                number = self._number(target)
                # Keyed by numbers, since hashing states is what building spends its time on.
                keys = [own << 20 | number for own in numbers]
                found = [prices.get(key) or self._price(value, prices, key, state, target) for key, state in zip(keys, rows, strict=True)]
                price_s, forward_s, moved = np.array(found, np.float64).T
                cost[j] += price_s + forward_s if way in AGAIN else price_s
                if edge.keeps and way not in AGAIN:
                    size = self.costs.of(value, target) * self.costs.live
                    memory[j] += size if edge.keeps == "target" or way == LEAVES else size * moved
        cost, memory = cost.T, memory.T
        if way == ENTERS:
            memory = memory + np.array([[self.costs.of(value, state) * self.costs.live] for state in rows], np.float64)
        return self._add(cost[np.ix_(row_of, column_of)], memory[np.ix_(row_of, column_of)], True)

    def _number(self, state: State) -> int:
        return self.costs.state_numbers.setdefault(state, len(self.costs.state_numbers))

    def _price(
        self, value: Value, prices: dict[int, tuple[float, float, bool]], key: int, source: State, target: State
    ) -> tuple[float, float, bool]:
        """Time of a conversion, of its forward part, and whether it makes a new tensor."""
        step = self.costs.conversion(*_kind(value), source, target)
        times = self.costs.microbatches
        found = times * (step.copy_s[0] + step.copy_s[1] + step.exposed_s), times * (step.copy_s[0] + step.forward_s), step.moved
        prices[key] = found
        return found

    def _use_table(self, value: Value, regather: bool, source: Options, wanted: list[tuple[State, ...]], target_key: int) -> int:
        """Exposed traffic depends on the operation's computing as well, so rows of distinct traffic meet columns of all choices."""
        columns, column_of = _distinct(wanted)
        forward_s, backward_s = self._times[target_key]
        cost, memory = np.zeros((len(source), len(column_of))), np.zeros((len(source), len(column_of)))
        for i, storage in enumerate(source):
            assert isinstance(storage, Storage)
            traffic = [self.costs.traffic(value, storage, targets, regather) for targets in columns]
            columns_of: list[Any] = [np.array(column)[column_of] for column in zip(*traffic, strict=True)]
            all_ = Traffic(*columns_of)
            cost[i] = all_.copy_s
            for *_, exposed_s in self.costs.phases(all_, storage, (forward_s, backward_s)):
                cost[i] += exposed_s
            memory[i] = all_.gathered_bytes + all_.gradient_bytes
            if not self.restriction.gather:
                gathers = [
                    any(move[0] in ("all_gather", "all_to_all") for state in targets for move in self._moves(value, storage, state))
                    for targets in columns
                ]
                cost[i][np.array(gathers)[column_of]] = np.inf
        return self._add(cost, memory)

    def _moves(self, value: Value, storage: Storage, state: State) -> tuple[tuple[str, int, str, int], ...]:
        return self.costs.conversion(*_kind(value), storage.stored, state).moves


def _bytes(terms: list[Term], counts: Callable[[str], bool]) -> np.ndarray:
    """By term, memory of the kinds that count."""
    return np.array([sum(size for kind, size in term.memory if counts(kind)) for term in terms], np.float64)


def _kind(value: Value) -> tuple[tuple[int, ...], str, bool]:
    return value.shape, value.dtype, value.requires_grad


def _distinct(items: list[T]) -> tuple[list[T], list[int]]:
    """Each item once, and for every item which of those it is."""
    number: dict[T, int] = {}
    places = [number.setdefault(item, len(number)) for item in items]
    return list(number), places


def _equal_runs(segments: list[Segment], nodes: list[int]) -> tuple[Segment, ...]:
    """Segments cut where a repeat's tables differ from those of the repeat before it (the last layer's result may be returned)."""
    found: list[Segment] = []
    for segment in segments:
        starts = range(segment.start, segment.stop, segment.length)
        bodies = [nodes[start : start + segment.length] for start in starts]
        first = 0
        for repeat in range(1, segment.count + 1):
            if repeat == segment.count or bodies[repeat] != bodies[first]:
                found.append(Segment(segment.start + first * segment.length, segment.length, repeat - first))
                first = repeat
    return tuple(found)
