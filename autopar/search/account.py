"""Adding up a decided plan, term by term, on the unfolded graph: the judge of what the solver claims.

It starts from an `Assignment` and knows nothing of tables or folding; equal terms are computed once and added as often as they occur.
Beside the sum it finds what does not add up over operations: the workspace of the one operation that needs most (`workspace_bytes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import itemgetter

import numpy as np

from autopar.ir.assignment import Assignment, Choice, Storage
from autopar.search.build import target_states
from autopar.search.prices.collectives import BUCKET_BYTES
from autopar.search.prices.costs import AGAIN, WAYS, Costs, Move, Term
from autopar.search.solver.problem import Floats
from autopar.search.solver.rows import groups_of
from autopar.search.structure import Structure

KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True, slots=True)
class Run:
    """Collectives and what they serve: operation at position `op` (or -1), parameter `parameter` (or -1), moving value `value`."""

    moves: tuple[Move, ...]
    op: int
    parameter: int
    value: str


@dataclass(frozen=True, slots=True)
class Account:
    """`cost_s = compute_s + exposed_s` of one step, `summed` memory by kind, on top the workspace and what is resident (inputs, buffers,
    constants), and every collective in order."""

    compute_s: float
    exposed_s: float
    summed: dict[str, float]
    workspace_bytes: float
    resident_bytes: int
    runs: tuple[Run, ...]

    @property
    def cost_s(self) -> float:
        return self.compute_s + self.exposed_s

    def memory_bytes(self) -> dict[str, int]:
        """Peak by kind in whole bytes, rounded up."""
        return memory_bytes((self,))


def memory_bytes(accounts: Sequence[Account]) -> dict[str, int]:
    """Peak by kind of stages on the same ranks, in whole bytes: they work in turns, so that only the largest workspace counts."""
    total = {kind: sum(one.summed.get(kind, 0.0) for one in accounts) for kind in KINDS}
    total["buffers"] += max(one.workspace_bytes for one in accounts) + sum(one.resident_bytes for one in accounts)
    return {kind: math.ceil(size) for kind, size in total.items()}


def account(structure: Structure, costs: Costs, assignment: Assignment, recompute: tuple[int, ...] = ()) -> Account:
    """Add up what `assignment` costs: a term for every parameter, operation and edge of the whole graph, of which the first `recompute`
    repeats of every segment are computed again."""
    return _Accountant(structure, costs, assignment, recompute).account()


class _Accountant:
    """`terms[number]` are the distinct terms, `counts[number]` says how many parameters, operations or edges have it."""

    def __init__(self, structure: Structure, costs: Costs, assignment: Assignment, recompute: tuple[int, ...]) -> None:
        self.structure, self.costs = structure, costs
        again = structure.recomputed(recompute)
        self.ways = structure.ways(again)
        numbers = {way: number for number, way in enumerate(WAYS)}
        self.way = np.array([numbers[way] for way in self.ways] if again is not None else [0] * len(self.ways), np.int64)
        self.again = np.zeros(len(structure.graph.ops), np.int64) if again is None else (again >= 0).astype(np.int64)
        graph = structure.graph
        # Choices are kept alive by the assignment, so an id means one of them; hashing them takes longer than pricing them.
        self.chosen = [assignment.choices[op.name] for op in graph.ops]
        self.choice = np.array([id(choice) for choice in self.chosen], np.int64)
        storages: dict[Storage, int] = {}
        self.stored = [assignment.storage[item.fqn] for item in graph.parameters]
        self.storage = np.array([storages.setdefault(storage, len(storages)) for storage in self.stored], np.int64)
        self.terms: list[Term] = []
        self.counts: list[int] = []
        self.runs: list[tuple[int, int, Run]] = []  # (position of the operation, place among its edges, run)

    def account(self) -> Account:
        graph, structure = self.structure.graph, self.structure
        self._parameters()
        workspace = self._operations() + self._edges()
        summed = dict.fromkeys(KINDS, 0.0)
        for kind in KINDS:
            sizes = [
                (size, count) for term, count in zip(self.terms, self.counts, strict=True) for name, size in term.memory if name == kind
            ]
            summed[kind] = _sum(sizes)
        self.runs.sort(key=itemgetter(0, 1))
        runs = tuple([run for _, _, run in self.runs])
        bucketed = any(run.parameter >= 0 for run in runs)
        peak = float(workspace.max()) if len(graph.ops) else 0.0
        # Buckets travel while activations are given back: never both at their largest.
        peak = max(peak, min(summed["gradients"], BUCKET_BYTES) if bucketed else 0.0)
        compute_s = _sum([(term.compute_s, count) for term, count in zip(self.terms, self.counts, strict=True)])
        exposed_s = _sum([(term.exposed_s, count) for term, count in zip(self.terms, self.counts, strict=True)])
        return Account(compute_s, exposed_s, summed, peak, resident_bytes(structure, self.costs.microbatches), runs)

    def _add(self, term: Term, count: int) -> Term:
        self.terms.append(term)
        self.counts.append(count)
        return term

    def _parameters(self) -> None:
        graph = self.structure.graph
        kinds: dict[object, list[int]] = {}
        for index, item in enumerate(graph.parameters):
            value = graph.values[item.value]
            kinds.setdefault((value.shape, value.dtype, value.requires_grad, int(self.storage[index])), []).append(index)
        for members in kinds.values():
            value = graph.values[graph.parameters[members[0]].value]
            term = self._add(self.costs.parameter_term(value, self.stored[members[0]]), len(members))
            if term.moves:
                self.runs += [(-1, index, Run(term.moves, -1, index, graph.parameters[index].value)) for index in members]

    def _operations(self) -> Floats:
        """Adds the operations; returns the workspace of each in bytes."""
        structure, ops = self.structure, self.structure.graph.ops
        workspace = np.zeros(len(ops))
        for members in groups_of(np.array(structure.class_of, np.int64), self.choice, self.again):
            at = int(members[0])
            row, choice = structure.classes[structure.class_of[at]], self.chosen[at]
            again = bool(self.again[at])
            term = self._add(self.costs.op_term(row.work, row.operands, row.outputs, choice, row.kept, row.returned, again), len(members))
            workspace[members] = self.costs.workspace_bytes(row.work, row.operands, row.outputs, choice)
            if term.moves:
                self.runs += [(at, -1, Run(term.moves, at, -1, (ops[at].outputs or ("",))[0])) for at in members.tolist()]
        return workspace

    def _edges(self) -> Floats:
        """Adds the edges; returns what each operation needs for parameters that are gathered for it alone, in bytes."""
        structure, costs, graph = self.structure, self.costs, self.structure.graph
        gathered = np.zeros(len(graph.ops))
        if not structure.edges:
            return gathered
        source, target, slot, kind = structure.edge_ends
        reads_parameter = slot < 0
        made = np.where(reads_parameter, 0, source)
        owner = np.where(reads_parameter, source, 0)
        start = self.choice[made]
        if len(self.storage):
            start = np.where(reads_parameter, self.storage[owner], start)
        # Traffic of parameters hides behind the operation's computing, so there the operation's class counts too.
        behind = np.where(reads_parameter, np.array(structure.class_of, np.int64)[target], -1)
        for members in groups_of(kind, start, self.choice[target], behind, self.way):
            edge, position, way = structure.edges[members[0]], int(target[members[0]]), self.ways[members[0]]
            value, choice = graph.values[edge.value], self.chosen[position]
            targets = target_states(choice, edge.slots)
            if edge.slot >= 0:
                state = tuple(split.outputs[edge.slot] for split in self.chosen[int(source[members[0]])])
                term = costs.edge_term(value, state, targets, edge.keeps, way)
            else:
                row, storage = structure.classes[structure.class_of[position]], self.stored[int(source[members[0]])]
                times_s = costs.op_times(row.work, row.operands, row.outputs, choice)
                term = costs.use_term(value, storage, targets, times_s, edge.keeps == "target" or way in AGAIN)
                if storage.gather == "use":
                    # The gathered parameter and, before it is scattered, its whole gradient (kept all step with several microbatches).
                    twice = value.requires_grad and graph.training and costs.microbatches == 1
                    whole = sum(costs.of(value, target) for target in targets) * (2 if twice else 1)
                    np.add.at(gathered, target[members], whole)
            self._add(term, len(members))
            if term.moves:
                self.runs += [
                    (at, number, Run(term.moves, at, source_ if reads else -1, structure.edges[number].value))
                    for number, at, source_, reads in zip(
                        members.tolist(), target[members].tolist(), source[members].tolist(), reads_parameter[members].tolist(), strict=True
                    )
                ]
        return gathered


def _sum(terms: list[tuple[float, int]]) -> float:
    """The sum of every number as often as it counts, rounded once."""
    return math.fsum(chain.from_iterable(repeat(number, count) for number, count in terms))


def resident_bytes(structure: Structure, microbatches: int = 1) -> int:
    """Inputs of all microbatches, buffers and constants: whole on every rank."""
    graph = structure.graph
    times = {item.value: 1 if item.path.startswith("@") else microbatches for item in graph.inputs}  # "@": what the prologue makes
    return sum(graph.values[name].size_bytes * times.get(name, 1) for name, kind in graph.source_kind.items() if kind != "parameter")


def least_workspace_bytes(structure: Structure, costs: Costs, options: Mapping[int, Sequence[Choice]]) -> float:
    """A lower bound on the workspace of any plan: of the operation that needs most when each uses the choice that needs least.

    `options` by operation class."""
    least = 0.0
    for number, choices in options.items():
        row = structure.classes[number]
        least = max(least, min(costs.workspace_bytes(row.work, row.operands, row.outputs, choice) for choice in choices))
    return least
