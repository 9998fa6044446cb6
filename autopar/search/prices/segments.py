"""What one repeat of every segment takes on one rank for one microbatch: `SegmentCost`s of a decided plan, the simulator's input.

Times here are before overlap: what hides behind what is for the simulator to say. Repeats that are decided alike may still differ at
their ends (the first converts what enters), so a row has their mean, and a row's cost times its count is their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopar.ir.assignment import Assignment, Choice, Storage
from autopar.ir.graph import Graph
from autopar.ir.plan import SegmentCost
from autopar.search.build import target_states
from autopar.search.prices.collectives import BUCKET_BYTES
from autopar.search.prices.costs import Costs, Move, Traffic
from autopar.search.prices.liveness import alive, backward_peak, forward_peak
from autopar.search.prices.regions import regions
from autopar.search.solver.problem import Floats
from autopar.search.solver.rows import Bools, groups_of
from autopar.search.structure import Structure

_SCALARS = (
    "forward_s", "backward_s", "weight_s", "optimizer_s", "activation_bytes", "parameter_bytes", "gradient_bytes", "optimizer_bytes",
)  # fmt: skip
_BY_AXIS = ("forward_comm_s", "backward_comm_s", "gather_s", "regather_s", "step_gather_s", "reduce_s")


@dataclass(frozen=True, slots=True)
class Row:
    """`count` repeats of `length` operations from position `start` on, of which the first `recompute` run again."""

    start: int
    length: int
    count: int
    recompute: int = 0


def decided_rows(structure: Structure, assignment: Assignment, recompute: tuple[int, ...] = ()) -> tuple[Row, ...]:
    """The segments of the graph; where repeats are decided differently, each run of equal ones is a row of its own.

    `recompute`: how many repeats of every segment of the graph, the first ones, are computed again."""
    ops, choices = structure.graph.ops, assignment.choices
    found: list[Row] = []
    for number, segment in enumerate(structure.op_segments):
        left = recompute[number] if recompute else 0
        starts = range(segment.start, segment.stop, segment.length)
        bodies = [[choices[op.name] for op in ops[start : start + segment.length]] for start in starts]
        first = 0
        for repeat in range(1, segment.count + 1):
            if repeat < segment.count and _same(bodies[repeat], bodies[repeat - 1]):
                continue
            count = repeat - first
            found.append(Row(starts[first], segment.length, count, min(left, count)))
            left -= min(left, count)
            first = repeat
    return tuple(found)


def _same(one: list[Choice], other: list[Choice]) -> bool:
    """Choices are mostly the same objects; comparing those that are not takes long."""
    return all(a is b for a, b in zip(one, other, strict=True)) or one == other


def segment_costs(structure: Structure, costs: Costs, assignment: Assignment, rows: Sequence[Row]) -> tuple[SegmentCost, ...]:
    """Costs of the `rows` of a graph under `assignment`."""
    return OpCosts(structure, costs, assignment).rows(rows)


class OpCosts:
    """Numbers per operation, of shape `(operations,)` or `(operations, axes)`; parameters count for the first operation to read them."""

    def __init__(self, structure: Structure, costs: Costs, assignment: Assignment) -> None:
        self.structure, self.costs, self.graph = structure, costs, structure.graph
        self.chosen = [assignment.choices[op.name] for op in self.graph.ops]
        self.stored = [assignment.storage[item.fqn] for item in self.graph.parameters]
        self.choice = np.array([id(choice) for choice in self.chosen], np.int64)
        size = len(self.graph.ops)
        self.scalars: dict[str, Floats] = {name: np.zeros(size) for name in _SCALARS}
        self.by_axis: dict[str, Floats] = {name: np.zeros((size, len(costs.mesh))) for name in _BY_AXIS}
        self.workspace, self.gathered = np.zeros(size), np.zeros(size)
        # Gradients of parameters as their readers make them; results whose gradients wait for those of weights; what is reduced away.
        self.graded, self.postponed, self.unreduced = np.zeros(size), np.zeros(size), np.zeros(size)
        self.message, self.scattered = np.zeros(size), np.zeros(size)
        self._operations()
        self._edges()
        self._parameters()
        self.alive = alive(structure, costs, self.chosen, self.choice)
        self.scalars["activation_bytes"] += self.alive.corrected

    def _add_moves(self, members: Sequence[int] | np.ndarray, moves: Sequence[Move]) -> None:
        for move in moves:
            row = self.by_axis["forward_comm_s" if move.phase == "forward" else "backward_comm_s"]
            # What an operation hides behind its own computing is decided here; the simulator only sees what is waited for.
            np.add.at(row[:, move.axis], members, move.exposed_s * (move.times // self.costs.microbatches))

    def _operations(self) -> None:
        structure, costs = self.structure, self.costs
        of_weights = weight_side(self.graph)
        for members in groups_of(np.array(structure.class_of, np.int64), self.choice):
            row, choice = structure.classes[structure.class_of[members[0]]], self.chosen[members[0]]
            forward_s, backward_s = costs.op_times(row.work, row.operands, row.outputs, choice)
            term = costs.op_term(row.work, row.operands, row.outputs, choice, row.kept, row.returned)
            # Copies on the way out are forward.
            self.scalars["forward_s"][members] += max(forward_s, term.compute_s / costs.microbatches - backward_s)
            self.scalars["backward_s"][members] += backward_s
            if row.work.backward_flops:
                # Products make one gradient after the other; what is fused makes all at once.
                trained = [value.requires_grad for value in row.operands[:2]]
                weights = [value.requires_grad and value.name in of_weights for value in row.operands[:2]]
                self.scalars["weight_s"][members] += backward_s * sum(weights) / max(1, sum(trained))
            self.scalars["activation_bytes"][members] += term.memory_bytes / costs.live
            self.workspace[members] = costs.workspace_bytes(row.work, row.operands, row.outputs, choice)
            self._add_moves(members, term.moves)

    def _edges(self) -> None:
        structure, costs, values = self.structure, self.costs, self.graph.values
        if not structure.edges:
            return
        source, target, slot, kind = structure.edge_ends
        storages: dict[Storage, int] = {}
        stored = np.array([storages.setdefault(item, len(storages)) for item in self.stored] or [0], np.int64)
        reads = slot < 0
        start = np.where(reads, stored[np.where(reads, source, 0)], self.choice[np.where(reads, 0, source)])
        for members in groups_of(kind, start, self.choice[target]):
            edge, ends = structure.edges[members[0]], target[members]
            value, choice = values[edge.value], self.chosen[int(ends[0])]
            targets = target_states(choice, edge.slots)
            if edge.slot >= 0:
                state = tuple(split.outputs[edge.slot] for split in self.chosen[int(source[members[0]])])
                copies_s = [0.0, 0.0]
                for wanted in targets:
                    conversion = costs.conversion(value.shape, value.dtype, value.requires_grad, state, wanted)
                    copies_s = [copies_s[0] + conversion.copy_s[0], copies_s[1] + conversion.copy_s[1]]
                term = costs.edge_term(value, state, targets, edge.keeps)
                np.add.at(self.scalars["forward_s"], ends, copies_s[0])
                np.add.at(self.scalars["backward_s"], ends, copies_s[1])
                np.add.at(self.scalars["activation_bytes"], ends, term.memory_bytes / costs.live)
                self._add_moves(ends, term.moves)
            else:
                storage = self.stored[int(source[members[0]])]
                traffic = costs.traffic(value, storage, targets, edge.keeps == "target")
                whole = sum(costs.of(value, target) for target in targets)
                self._add_use(ends, storage, traffic, whole, costs.shares(value, storage, targets))
                if value.requires_grad and costs.training:
                    self.graded[ends] += whole
                    if costs.microbatches == 1:
                        self.unreduced[ends] += max(0, whole - costs.stored_bytes(value, storage.stored))
                    if costs.precision is not None:
                        message = sum(costs.reduced_bytes(value, target) for target in targets)
                        self.message[ends] += message
                        self.scattered[ends] += message if costs.of(value, storage.stored) < whole else 0
                    results = structure.classes[structure.class_of[int(ends[0])]].outputs
                    states = [tuple(split.outputs[slot] for split in choice) for slot in range(len(results))]
                    sizes = [costs.of(result, state) for result, state in zip(results, states, strict=True)]
                    self.postponed[ends] = np.maximum(self.postponed[ends], sum(sizes))

    def _add_use(self, ends: np.ndarray, storage: Storage, traffic: Traffic, whole_bytes: int, shares: tuple[Floats, Floats]) -> None:
        """A parameter read by the operations at `ends`. `shares`: by axis, of gathering and of reducing, in seconds."""
        gather_s, reduce_s = shares
        np.add.at(self.by_axis["gather_s" if storage.gather == "use" else "step_gather_s"], ends, gather_s)
        if traffic.regather_s:
            np.add.at(self.by_axis["regather_s"], ends, gather_s)
        np.add.at(self.by_axis["reduce_s"], ends, reduce_s)
        np.add.at(self.scalars["forward_s"], ends, traffic.copy_s / self.costs.microbatches)
        np.add.at(self.scalars["parameter_bytes"], ends, traffic.gathered_bytes)
        np.add.at(self.scalars["gradient_bytes"], ends, traffic.gradient_bytes)
        if storage.gather == "use":
            np.add.at(self.gathered, ends, whole_bytes)

    def _parameters(self) -> None:
        graph = self.graph
        for index, item in enumerate(graph.parameters):
            readers = graph.consumers[item.value]
            at = graph.op_index[readers[0].name] if readers else 0
            term = self.costs.parameter_term(graph.values[item.value], self.stored[index])
            self.scalars["optimizer_s"][at : at + 1] += term.compute_s
            for kind, size in term.memory:
                name = {"parameters": "parameter_bytes", "gradients": "gradient_bytes", "optimizer": "optimizer_bytes"}[kind]
                self.scalars[name][at : at + 1] += size

    # ---- rows -------------------------------------------------------------------------------------------------------------------

    def rows(self, rows: Sequence[Row]) -> tuple[SegmentCost, ...]:
        names = self.costs.names
        again = regions(self.structure, self.alive, rows) if self.structure.graph.training else None
        found = []
        for row in rows:
            here = slice(row.start, row.start + row.length * row.count)
            means = {name: float(column[here].sum()) / row.count for name, column in self.scalars.items()}
            by_axis = {
                name: {axis: float(total) / row.count for axis, total in zip(names, table[here].sum(0), strict=True) if total}
                for name, table in self.by_axis.items()
            }
            fields: dict[str, Any] = {name: round(mean) if name.endswith("_bytes") else mean for name, mean in means.items()}
            fields |= {name: round(size) for name, size in self._moments(row).items()}
            fields |= by_axis
            if again:
                repeats = row.recompute or row.count
                span = slice(row.start, row.start + row.length * repeats)
                fields["checkpoint_bytes"] = round(again.checkpoint_bytes(span.start, span.stop) / repeats)
                fields["unkept_bytes"] = round(float(again.unkept[span].max(initial=0.0)))
                dropped = again.again if any(other.recompute for other in rows) else None
                fields["sent_bytes"] = round(self._sent_bytes(here, dropped) / row.count)
            found.append(SegmentCost(**fields))
        return tuple(found)

    def _moments(self, row: Row) -> dict[str, float]:
        """Bytes that are there for a while, of the repeat that has most."""
        forward, backward, apart = [0.0], [0.0], [0.0]
        for start in range(row.start, row.start + row.length * row.count, row.length):
            body = slice(start, start + row.length)
            kept, gradients = self.scalars["activation_bytes"][body], self.scalars["gradient_bytes"][body]
            forward.append(forward_peak(kept, self.alive.forward[body]) - float(kept.sum()))
            apart.append(backward_peak(0.0 * kept, self.alive.backward[body] - self.postponed[body], self.postponed[body]))
            if self.costs.microbatches == 1:
                backward.append(backward_peak(kept, self.alive.backward[body], gradients))
            else:  # gradients of parameters add up from one microbatch to the next: each comes beside what is there
                backward.append(backward_peak(kept, self.alive.backward[body] + self.graded[body], 0.0 * gradients))
        here = slice(row.start, row.start + row.length * row.count)
        # What repeats is gathered repeat by repeat; elsewhere as much at once as fits in a bucket, and the next.
        gathered = float(self.gathered[here].sum()) / row.count
        if row.count == 1:
            gathered = min(gathered, max(2 * BUCKET_BYTES, float(self.gathered[here].max(initial=0.0))))
        return {
            "workspace_bytes": max(forward),
            "backward_workspace_bytes": max(backward),
            "input_workspace_bytes": max(apart),
            "gathered_bytes": gathered,
            "postponed_bytes": float(self.postponed[here].sum()) / row.count,
            "unreduced_bytes": float(self.unreduced[here].sum()) / row.count,
            "message_bytes": float(self.message[here].sum()) / row.count,
            "scattered_bytes": float(self.scattered[here].sum()) / row.count,
        }

    def _sent_bytes(self, here: slice, dropped: Bools | None) -> float:
        """What operations `here` send beyond what is kept anyway. `dropped`: the operations whose results are not."""
        found = 0.0
        for sent in self.alive.sent:
            if here.start <= sent.at < here.stop and not (sent.kept and (dropped is None or not dropped[sent.made])):
                found += sent.bytes
        return found


def weight_side(graph: Graph) -> set[str]:
    """Values made of parameters alone."""
    found = {item.value for item in graph.parameters}
    for op in graph.ops:
        if op.operands and all(name in found for name in op.operands):
            found.update(op.outputs)
    return found
