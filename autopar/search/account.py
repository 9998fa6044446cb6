"""Adding up a decided plan, term by term, on the unfolded graph: the judge of what the solver claims.

It starts from an `Assignment` and knows nothing of tables or folding; equal terms are computed once and added as often as they occur.
Beside the sum it finds what does not add up over operations: the workspace of the one operation that needs most (`workspace_bytes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.ir.assignment import Assignment, Choice, Storage
from autopar.search.build import target_states
from autopar.search.collectives import BUCKET_BYTES
from autopar.search.costs import Costs, Move, Term
from autopar.search.structure import OpClass, Structure

KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True, slots=True)
class Run:
    """A collective and what it serves: operation at position `op` (or -1), parameter `parameter` (or -1), moving value `value`."""

    move: Move
    op: int
    parameter: int
    value: str


@dataclass(frozen=True, slots=True)
class Account:
    """`cost_s = compute_s + exposed_s` of one step, `summed` memory by kind, the workspace on top, and every collective in order."""

    compute_s: float
    exposed_s: float
    summed: dict[str, float]
    workspace_bytes: float
    runs: tuple[Run, ...]

    @property
    def cost_s(self) -> float:
        return self.compute_s + self.exposed_s

    def memory_bytes(self) -> dict[str, int]:
        """Peak by kind in whole bytes, rounded up."""
        total = {kind: self.summed.get(kind, 0.0) for kind in KINDS}
        total["buffers"] += self.workspace_bytes
        return {kind: math.ceil(size) for kind, size in total.items()}


def account(structure: Structure, costs: Costs, assignment: Assignment) -> Account:
    """Add up what `assignment` costs."""
    graph = structure.graph
    values = graph.values
    terms: dict[object, Term] = {}
    compute: list[float] = []
    exposed: list[float] = []
    summed: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    runs: list[Run] = []
    owner = {item.value: index for index, item in enumerate(graph.parameters)}
    gathered: dict[int, float] = {}
    workspaces: dict[object, float] = {}

    def add(term: Term, op: int, parameter: int, value: str) -> None:
        compute.append(term.compute_s)
        exposed.append(term.exposed_s)
        for kind, size in term.memory:
            summed[kind] += size
        for move in term.moves:
            runs.append(Run(move, op, parameter, value))

    def edges(position: int, row: OpClass, choice: Choice) -> None:
        for edge in structure.edges_into[position]:
            if edge.slot >= 0:
                source = chosen[structure.order[edge.source][1]]
                # Choices are kept alive by the assignment, so an id means one of them; hashing them takes longer than pricing them.
                key: object = (edge.kind, id(source), id(choice))
                if key not in terms:
                    state = tuple(split.outputs[edge.slot] for split in source)
                    terms[key] = costs.edge_term(values[edge.value], state, target_states(choice, edge.slots), edge.keeps)
                add(terms[key], position, -1, edge.value)
                continue
            value = values[edge.value]
            index = owner[edge.value]
            storage = storages.setdefault(assignment.storage[graph.parameters[index].fqn], assignment.storage[graph.parameters[index].fqn])
            targets = target_states(choice, edge.slots)
            regather = edge.keeps == "target"
            key = ("use", edge.kind, id(storage), structure.class_of[position], id(choice))
            if key not in terms:
                times_s = costs.op_times(row.work, row.operands, row.outputs, choice)
                terms[key] = costs.use_term(value, storage, targets, times_s, regather)
            add(terms[key], position, index, edge.value)
            if storage.gather == "use":
                # The gathered parameter and, before it is scattered, its whole gradient.
                whole = sum(costs.of(value, target) for target in targets) * (2 if value.requires_grad and graph.training else 1)
                gathered[position] = gathered.get(position, 0.0) + whole

    chosen = [assignment.choices[op.name] for op in graph.ops]
    storages: dict[Storage, Storage] = {}
    key: object
    for index, parameter in enumerate(graph.parameters):
        value = values[parameter.value]
        storage = assignment.storage[parameter.fqn]
        key = ("parameter", value.shape, value.dtype, value.requires_grad, storage.stored)
        if key not in terms:
            terms[key] = costs.parameter_term(value, storage)
        add(terms[key], -1, index, parameter.value)
    workspace = 0.0
    for position, op in enumerate(graph.ops):
        row = structure.classes[structure.class_of[position]]
        choice = chosen[position]
        key = ("op", structure.class_of[position], id(choice))
        if key not in terms:
            terms[key] = costs.op_term(row.work, row.operands, row.outputs, choice, row.kept, row.returned)
            workspaces[key] = costs.workspace_bytes(row.work, row.operands, row.outputs, choice)
        add(terms[key], position, -1, op.outputs[0] if op.outputs else "")
        edges(position, row, choice)
        workspace = max(workspace, workspaces[key] + gathered.get(position, 0.0))
    bucketed = any(run.parameter >= 0 for run in runs)
    workspace += min(summed["gradients"], BUCKET_BYTES) if bucketed else 0.0
    return Account(math.fsum(compute), math.fsum(exposed), summed, workspace + resident_bytes(structure), tuple(runs))


def resident_bytes(structure: Structure) -> int:
    """Inputs, buffers and constants: whole on every rank."""
    return sum(structure.graph.values[name].size_bytes for name, kind in structure.graph.source_kind.items() if kind != "parameter")


def least_workspace_bytes(structure: Structure, costs: Costs, options: Mapping[int, Sequence[Choice]]) -> float:
    """A lower bound on the workspace of any plan: of the operation that needs most when each uses the choice that needs least.

    `options` by operation class."""
    least = 0.0
    for number, choices in options.items():
        row = structure.classes[number]
        least = max(least, min(costs.workspace_bytes(row.work, row.operands, row.outputs, choice) for choice in choices))
    return least + resident_bytes(structure)
