"""From decisions to a `Plan`: repeats folded, names written once, everything that follows from the decisions beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, Literal, TypeVar, cast

from autopar.ir import folded_names
from autopar.ir.assignment import Assignment
from autopar.ir.cluster import Cluster
from autopar.ir.conversion import State
from autopar.ir.experts import capacity_of
from autopar.ir.graph import Graph
from autopar.ir.placement import R
from autopar.ir.plan import (
    Axes,
    ClusterInfo,
    CollectivePlan,
    InputPlan,
    ModelInfo,
    OpPlan,
    OutputPlan,
    ParameterPlan,
    Plan,
    Predicted,
    RulePlan,
    SegmentCost,
    SegmentPlan,
)
from autopar.ir.rules import unruled
from autopar.ir.rules.neighbours import LEAF
from autopar.search.account import Account, Run
from autopar.search.prices.costs import Costs, home
from autopar.search.prices.segments import Row, decided_rows, segment_costs
from autopar.search.structure import Structure

T = TypeVar("T", bound=Hashable)
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


@dataclass(frozen=True)
class Part:
    """A stage as it is decided: `structure` of its graph, `costs` on its ranks, the `assignment`, and what it adds up to: in all, and for
    a repeat of every row of the plan. `recompute`: of how many repeats, the first ones, of every segment of the graph."""

    structure: Structure
    costs: Costs
    assignment: Assignment
    account: Account
    recompute: tuple[int, ...] = ()

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return decided_rows(self.structure, self.assignment, self.recompute)

    @cached_property
    def row_costs(self) -> tuple[SegmentCost, ...]:
        return segment_costs(self.structure, self.costs, self.assignment, self.rows)


@dataclass(frozen=True, slots=True)
class Rows:
    """What a plan says of its stages."""

    inputs: tuple[InputPlan, ...]
    outputs: tuple[OutputPlan, ...]
    parameters: tuple[ParameterPlan, ...]
    segments: tuple[SegmentPlan, ...]
    collectives: tuple[CollectivePlan, ...]


def describe(graph: Graph, cluster: Cluster, rows: Rows, predicted: Predicted, **fields: Any) -> Plan:
    """The plan for the traced `graph` that says `rows`; `fields` are the others of `Plan`."""
    device = cluster.device
    return Plan(
        model=ModelInfo(
            name=graph.name, fingerprint=graph.fingerprint(), training=graph.training,
            parameters=sum(graph.values[item.value].numel for item in graph.parameters), operations=len(graph.ops),
        ),
        cluster=ClusterInfo(
            name=cluster.name, device=device.name, devices_per_node=cluster.devices_per_node, nodes=cluster.nodes,
            memory_bytes=device.memory_bytes, felt_share=device.felt_share, expert_imbalance=cluster.expert_imbalance,
        ),
        leaf_modules=tuple(dict.fromkeys(op.module for op in graph.ops if op.target == LEAF)),
        expert_capacity=capacity_of(graph), predicted=predicted, replicated=unruled(graph), rules=tuple(map(RulePlan.of, graph.rules)),
        inputs=rows.inputs, outputs=rows.outputs, parameters=rows.parameters, segments=rows.segments, collectives=rows.collectives,
        **fields,
    )  # fmt: skip


def rows_of(graph: Graph, parts: Sequence[Part]) -> Rows:
    """Rows of all stages, in order; shapes of inputs and outputs are those of the traced `graph`."""
    writers = [_Writer(part, stage, graph) for stage, part in enumerate(parts)]
    inputs = tuple(row for writer in writers for row in writer.inputs())
    return Rows(
        inputs + _unread(graph, inputs, parts[0].assignment.axes),
        tuple(row for writer in writers for row in writer.outputs()),
        tuple(row for writer in writers for row in writer.parameters()),
        tuple(row for writer in writers for row in writer.segments()),
        tuple(row for writer in writers for row in writer.collectives()),
    )


def _unread(graph: Graph, inputs: tuple[InputPlan, ...], axes: tuple[str, ...]) -> tuple[InputPlan, ...]:
    """Inputs that no stage reads: the whole batch's prologue does, or nobody."""
    known = {row.path for row in inputs}
    values = [(item.path, graph.values[item.value]) for item in graph.inputs if item.path not in known]
    return tuple(
        InputPlan(path=path, shape=value.shape, dtype=value.dtype, placement={axis: str(R) for axis in axes}) for path, value in values
    )


class _Writer:
    """Rows of one stage."""

    def __init__(self, part: Part, stage: int, whole: Graph) -> None:
        self.part, self.stage = part, stage
        self.structure, self.assignment = part.structure, part.assignment
        self.graph: Graph = part.structure.graph
        self.input_shapes = {item.path: whole.values[item.value].shape for item in whole.inputs}
        self.output_shapes = {item.path: whole.values[item.value].shape for item in whole.outputs}

    def _axes(self, state: Sequence[object]) -> Axes:
        return {axis: str(item) for axis, item in zip(self.assignment.axes, state, strict=True)}

    def _first_use(self, value: str) -> State | None:
        for op in self.graph.consumers[value][:1]:
            return self.assignment.operand_states(op)[op.operands.index(value)]
        return None

    def _widest_use(self, value: str) -> State | None:
        """Of the states in which a parameter is read, the one that is whole on most axes: what it is gathered for."""
        wanted = [
            self.assignment.operand_states(op)[slot]
            for op in self.graph.consumers[value]
            for slot, name in enumerate(op.operands)
            if name == value
        ]
        return max(wanted, key=lambda state: sum(placement.is_replicated for placement in state), default=None)

    # ---- inputs, outputs, parameters --------------------------------------------------------------------------------------------

    def inputs(self) -> tuple[InputPlan, ...]:
        rows = []
        for item in self.graph.inputs:
            if item.path not in self.input_shapes:  # of the prologue
                continue
            value = self.graph.values[item.value]
            state = self._first_use(item.value) or (R,) * len(self.assignment.mesh)
            state = tuple(placement if placement.is_shard else R for placement in state)
            shape = self.input_shapes[item.path]
            rows.append(InputPlan(stage=self.stage, path=item.path, shape=shape, dtype=value.dtype, placement=self._axes(state)))
        return tuple(rows)

    def outputs(self) -> tuple[OutputPlan, ...]:
        rows = []
        for item in self.graph.outputs:
            value = self.graph.values[item.value]
            op = self.graph.producers.get(item.value)
            made = self.assignment.output_states(op)[op.outputs.index(item.value)] if op else (R,) * len(self.assignment.mesh)
            state = home(made, self.structure.whole(item.value))
            shape = self.output_shapes[item.path]
            rows.append(OutputPlan(stage=self.stage, path=item.path, shape=shape, dtype=value.dtype, placement=self._axes(state)))
        return tuple(rows)

    def parameters(self) -> tuple[ParameterPlan, ...]:
        """One row for parameters that are decided alike and whose names differ in numbers only."""
        groups: dict[Hashable, list[str]] = {}
        example: dict[Hashable, tuple[str, State]] = {}
        for item in self.graph.parameters:
            value = self.graph.values[item.value]
            storage = self.assignment.storage[item.fqn]
            used = self._widest_use(item.value) or storage.stored
            key: Hashable = (_NUMBER.sub("#", item.fqn), value.shape, value.dtype, value.requires_grad, storage, used)
            groups.setdefault(key, []).append(item.fqn)
            example.setdefault(key, (item.value, used))
        rows = []
        for key, names in ((key, names) for key, group in groups.items() for names in _foldable(group)):
            value, used = self.graph.values[example[key][0]], example[key][1]
            storage = self.assignment.storage[names[0]]
            rows.append(
                ParameterPlan(
                    stage=self.stage, name=folded_names.fold(names), shape=value.shape, dtype=value.dtype, trainable=value.requires_grad,
                    stored=self._axes(storage.stored), gather=cast(Literal["never", "step", "use"], storage.gather), used=self._axes(used),
                )
            )  # fmt: skip
        return tuple(rows)

    # ---- segments ---------------------------------------------------------------------------------------------------------------

    def segments(self) -> tuple[SegmentPlan, ...]:
        """Repeats that are decided alike stand together; where k of the repeats differ, they are a segment of their own."""
        graph, choices = self.graph, self.assignment.choices
        rows: list[tuple[str, Row, tuple[OpPlan, ...]]] = []
        names: Counter[str] = Counter()
        for row in self.part.rows:
            ops = []
            for op in graph.ops[row.start : row.start + row.length]:
                split = {axis: item.name for axis, item in zip(self.assignment.axes, choices[op.name], strict=True)}
                output = self._axes(self.assignment.output_states(op)[0]) if op.outputs else self._axes((R,) * len(split))
                ops.append(OpPlan(name=op.name, target=op.target, module=op.module, split=split, output=output))
            name = self._name(row.start, row.length, row.count)
            names[name] += 1
            name += f" ({names[name]})" if names[name] > 1 else ""
            rows.append((name, row, tuple(ops)))
        return tuple(
            SegmentPlan(
                stage=self.stage,
                name=name,
                start=row.start,
                length=row.length,
                count=row.count,
                recompute=row.recompute,
                cost=cost,
                ops=ops,
            )
            for (name, row, ops), cost in zip(rows, self.part.row_costs, strict=True)
        )

    def _name(self, start: int, length: int, count: int) -> str:
        """Module paths of the repeats with their numbers as a range; for what does not repeat the path that its modules share."""
        if count == 1:
            paths = [op.module.split(".") for op in self.graph.ops[start : start + length] if op.module]
            shared = []
            for parts in zip(*paths, strict=False):
                if len(set(parts)) > 1:
                    break
                shared.append(parts[0])
            return ".".join(shared) or self.graph.name
        names = []
        for repeat in range(count):
            first = start + repeat * length
            modules = Counter(op.module for op in self.graph.ops[first : first + length])
            heads: Counter[str] = Counter()
            for module, often in modules.items():
                heads[_head(module)] += often
            names.append(heads.most_common(1)[0][0] or self.graph.name)
        return _folded(names)

    # ---- collectives ------------------------------------------------------------------------------------------------------------

    def collectives(self) -> tuple[CollectivePlan, ...]:
        """Equal collectives of repeated operations as one row, in order of first occurrence."""
        runs = self.part.account.runs
        groups: dict[Hashable, list[Run]] = {}
        first: dict[int, int] = {}
        seen: dict[str, str] = {}

        def numberless(name: str) -> str:
            found = seen.get(name)
            if found is None:
                found = seen[name] = _NUMBER.sub("#", name)
            return found

        for index, run in enumerate(runs):
            # By names and not by segment: a layer that the fold leaves outside of its repeats communicates as they do.
            op = self.graph.ops[run.op] if run.op >= 0 else None
            where = (op.target, numberless(op.module)) if op is not None else ()
            groups.setdefault((where, numberless(self._value_name(run)), numberless(self._op_name(run))), []).append(run)
            first[id(run)] = index
        rows: list[tuple[tuple[int, int], CollectivePlan]] = []
        for group in groups.values():
            often = Counter([id(run.moves) for run in group])
            kinds = {id(run.moves): run.moves for run in group}
            names: dict[tuple[int, ...], tuple[str, str]] = {}  # by the kinds of runs that have the collective
            for move in dict.fromkeys(move for moves in kinds.values() for move in moves):
                having = tuple([number for number, moves in kinds.items() if move in moves])
                members = group if len(having) == len(kinds) else [run for run in group if id(run.moves) in having]
                if having not in names:
                    names[having] = (_folded([self._value_name(run) for run in members]), _folded([self._op_name(run) for run in members]))
                row = CollectivePlan(
                    stage=self.stage, kind=cast(Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shift"], move.kind),
                    axis=self.assignment.axes[move.axis], phase=cast(Literal["forward", "backward", "gradient"], move.phase),
                    value=names[having][0], op=names[having][1], bytes=move.bytes,
                    count=sum(often[number] * kinds[number].count(move) for number in having) * move.times,
                    time_s=move.time_s, exposed_s=move.exposed_s,
                )  # fmt: skip
                rows.append(((first[id(members[0])], members[0].moves.index(move)), row))
        return tuple([row for _, row in sorted(rows, key=itemgetter(0))])

    def _value_name(self, run: Run) -> str:
        return self.graph.parameters[run.parameter].fqn if run.parameter >= 0 else run.value

    def _op_name(self, run: Run) -> str:
        return self.graph.ops[run.op].name if run.op >= 0 else self.graph.parameters[run.parameter].fqn


def _head(module: str) -> str:
    """The path up to its first number: the layer that it is in."""
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return module


def _foldable(names: list[str]) -> list[list[str]]:
    """Names that differ in their numbers, in groups that differ in one number only: the one that takes most values."""
    numbers = [tuple(int(item) for item in _NUMBER.findall(name)) for name in names]
    varying = [len(set(column)) for column in zip(*numbers, strict=True)]
    if sum(count > 1 for count in varying) <= 1:
        return [names]
    ranged = varying.index(max(varying))
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, row in zip(names, numbers, strict=True):
        groups.setdefault(row[:ranged] + row[ranged + 1 :], []).append(name)
    return list(groups.values())


def _folded(names: list[str]) -> str:
    """One name for all, or the first with how many more there are."""
    unique = list(dict.fromkeys(names))
    parts = [folded_names.parts(name) for name in unique]
    numbers = [column for column in zip(*[part[1::2] for part in parts], strict=False) if len(set(column)) > 1]
    if len({tuple(part[::2]) for part in parts}) == 1 and len(numbers) <= 1:
        return folded_names.fold(unique)
    return f"{unique[0]} (and {len(unique) - 1} more)"
