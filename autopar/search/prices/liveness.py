"""What a rank holds for a moment, beside what autograd keeps: which values and gradients are alive while an operation runs.

Per operation, in bytes on one rank: `forward[i]`, values that nobody keeps, from the operation that makes them to their last reader;
`backward[i]`, gradients of values, from the first reader that has one (the last in forward order) back to the operation that made the
value. Views share the storage of what they view, and so do their gradients. Where an operand is converted first, what arrives lives
while the operation runs. An operation whose backward pass goes through something kept in an operand's stead (the log-softmax) holds
that one's gradient as well. From these and from what each operation keeps follows the largest moment of a row of operations
(`forward_peak`, `backward_peak`).

Where the step keeps other values than the account of operation i says, `corrected[i]` is the difference: it drops what the model returns
beside its loss (`ParallelModule.step`), and a stage holds what it received until the backward pass of the microbatch, and during that
pass the gradients that it starts from (`autopar.runtime.pipelining.pipeline_stage`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from autopar.ir.assignment import Choice
from autopar.search.build import target_states
from autopar.search.prices.costs import Costs
from autopar.search.prices.work import RECEIVE, SEND
from autopar.search.solver.problem import Floats
from autopar.search.solver.rows import Bools, Ints, groups_of
from autopar.search.structure import Structure


@dataclass(frozen=True, slots=True)
class Sent:
    """A value that operation `at` sends to the next stage, made by operation `made`: `kept` for the backward pass as what is sent."""

    at: int
    made: int
    bytes: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Alive:
    """`(operations,)` each; see the module's docstring. `size`: of the results that have storage (`lives`). `beside`: the part of `forward`
    that arrives for one operation alone."""

    forward: Floats
    backward: Floats
    corrected: Floats
    size: Floats
    beside: Floats
    sent: tuple[Sent, ...]


class Lives(NamedTuple):
    """Rows of `(operation, slot)`: results that have storage of their own, and where it begins and ends to be alive.

    `names`: of the value and of its views; `readers`: of any of them; `received`: whether it comes from another stage. `read`, `graded`:
    first position after its last reader, and after its last reader with a gradient (its own where there is none). `counted`: where it is
    counted as kept (-1: nowhere); `correct`: -1 where that is only for being returned, 1 where it is kept though it is not counted, else 0.
    """

    at: Ints
    slot: Ints
    read: Ints
    graded: Ints
    counted: Ints
    correct: Ints
    received: Bools
    names: tuple[tuple[str, ...], ...]
    readers: tuple[tuple[int, ...], ...]


_LIVES: WeakKeyDictionary[Structure, Lives] = WeakKeyDictionary()


def lives(structure: Structure) -> Lives:
    """Of a graph, whatever is decided."""
    if structure in _LIVES:
        return _LIVES[structure]
    graph = structure.graph
    needs, needed = structure.needs, structure.needs_of_training
    root: dict[str, str] = {}
    readers: dict[str, list[int]] = {}
    views: dict[str, list[str]] = {}
    graded: dict[str, int] = {}
    for at, op in enumerate(graph.ops):
        work = structure.work_of(at)
        for name in op.operands:
            base = root.get(name, name)
            readers.setdefault(base, []).append(at)
            if work.trains and graph.values[name].requires_grad:
                graded[base] = at
        if work.view and op.operands:
            base = root.get(op.operands[0], op.operands[0])
            root.update(dict.fromkeys(op.outputs, base))
            views.setdefault(base, []).extend(op.outputs)
    rows, names, read_at = [], [], []
    for at, op in enumerate(graph.ops):
        row = structure.classes[structure.class_of[at]]
        for slot, name in enumerate(op.outputs):
            if name in root:
                continue
            needing = needs.get(name, ())
            counted = at if slot in row.kept else needing[0][0] if len(needing) == 1 else -1
            keeps = bool(needed.get(name)) or slot in row.work.keeps_outputs or op.target == RECEIVE
            trained = graded.get(name, at) + 1 if graph.training and graph.values[name].requires_grad else at
            read_at.append(tuple(readers.get(name, ())))
            names.append((name, *views.get(name, ())))
            rows.append((at, slot, max(read_at[-1], default=at) + 1, trained, counted, keeps - (counted >= 0), op.target == RECEIVE))
    at_, slot_, read, grad, count, correct, received = np.array(rows, np.int64).reshape(-1, 7).T
    found = Lives(at_, slot_, read, grad, count, correct, received > 0, tuple(names), tuple(read_at))
    _LIVES[structure] = found
    return found


def alive(structure: Structure, costs: Costs, chosen: Sequence[Choice], choice: Ints) -> Alive:
    """What is alive beside what is kept, under the `chosen` splits of each operation, equal ones having equal numbers in `choice`."""
    count = len(chosen)
    facts = lives(structure)
    forward, backward, corrected = np.zeros(count + 1), np.zeros(count + 1), np.zeros(count)
    beside_forward, beside_backward = np.zeros(count), np.zeros(count)
    place = np.full((count, max([len(row.outputs) for row in structure.classes], default=0)), -1, np.int64)
    place[facts.at, facts.slot] = np.arange(len(facts.at))
    size = np.zeros(len(facts.at))
    for members in groups_of(np.array(structure.class_of, np.int64), choice):
        row, splits = structure.classes[structure.class_of[members[0]]], chosen[int(members[0])]
        for slot, value in enumerate(row.outputs):
            rows = place[members, slot]
            size[rows[rows >= 0]] = costs.of(value, tuple(split.outputs[slot] for split in splits))
        held = costs.held_bytes(row.work, row.operands, row.outputs, splits)
        beside_forward[members] += held[0]
        beside_backward[members] += held[1]
        if row.work.extra and not row.work.extra.output and row.work.trains:
            slot = row.work.extra.slot
            state = tuple(split.inputs[slot] for split in splits)
            beside_backward[members] += row.work.extra.bytes * costs.of(row.operands[slot], state) / max(row.operands[slot].size_bytes, 1)
    drops, holds = facts.correct < 0, facts.correct > 0
    np.add.at(corrected, facts.counted[drops], -size[drops])
    np.add.at(corrected, facts.at[holds], size[holds])
    until = np.where(holds, facts.at, np.where((facts.counted < 0) | drops, facts.read, facts.counted))
    np.add.at(forward, facts.at, size)
    np.add.at(forward, np.maximum(until, facts.at), -size)
    np.add.at(backward, facts.at, size)
    np.add.at(backward, facts.graded, -size)
    sent = _sent(structure, costs, chosen, facts)
    for item in sent:
        if structure.graph.values[structure.graph.ops[item.at].operands[0]].requires_grad:
            backward[0] += item.bytes
            backward[item.at + 1] -= item.bytes
    _conversions(structure, costs, chosen, choice, beside_forward, beside_backward)
    return Alive(
        np.cumsum(forward[:-1]) + beside_forward, np.cumsum(backward[:-1]) + beside_backward, corrected, size, beside_forward, sent
    )  # fmt: skip


def _sent(structure: Structure, costs: Costs, chosen: Sequence[Choice], facts: Lives) -> tuple[Sent, ...]:
    """What a stage sends. It is kept where the value it is made from is kept, and no conversion makes another of it."""
    graph = structure.graph
    if not any(op.target == SEND for op in graph.ops):
        return ()
    home = {name: index for index, names in enumerate(facts.names) for name in names}
    found = []
    for at, op in enumerate(graph.ops):
        if op.target != SEND or op.operands[0] not in home:
            continue
        index = home[op.operands[0]]
        kept = facts.correct[index] > 0 or (facts.counted[index] >= 0 and facts.correct[index] == 0)
        size = costs.of(graph.values[op.operands[0]], tuple(split.inputs[0] for split in chosen[at]))
        found.append(Sent(at, int(facts.at[index]), float(size), bool(kept) and not _moved(structure, costs, chosen, at)))
    return tuple(found)


def _moved(structure: Structure, costs: Costs, chosen: Sequence[Choice], at: int) -> bool:
    """Whether a conversion makes what operation `at` reads first."""
    source, target, slots, _ = structure.edge_ends
    for number in np.flatnonzero((target == at) & (slots >= 0)).tolist():
        edge = structure.edges[number]
        value = structure.graph.values[edge.value]
        state = tuple(split.outputs[edge.slot] for split in chosen[int(source[number])])
        if any(
            costs.conversion(value.shape, value.dtype, value.requires_grad, state, wanted).moved
            for wanted in target_states(chosen[at], edge.slots)
        ):
            return True
    return False


def _conversions(structure: Structure, costs: Costs, chosen: Sequence[Choice], choice: Ints, forward: Floats, backward: Floats) -> None:
    """Adds what arrives at operations that want a value in another placement than it was made in."""
    if not structure.edges:
        return
    source, target, slot, kind = structure.edge_ends
    made = slot >= 0
    for members in groups_of(kind, np.where(made, choice[np.where(made, source, 0)], -1), choice[target]):
        edge, at = structure.edges[int(members[0])], int(target[members[0]])
        if edge.slot < 0 or structure.work_of(at).view:
            continue
        value = structure.graph.values[edge.value]
        state = tuple(split.outputs[edge.slot] for split in chosen[int(source[members[0]])])
        for wanted in target_states(chosen[at], edge.slots):
            if wanted != state and costs.conversion(value.shape, value.dtype, value.requires_grad, state, wanted).moved:
                arrives = costs.of(value, wanted)
                np.add.at(forward, target[members], 0 if edge.keeps else arrives)
                np.add.at(backward, target[members], arrives if value.requires_grad and costs.training else 0)


def forward_peak(kept: Floats, held: Floats) -> float:
    """The most that a forward pass adds at a moment: what is `kept` adds up, `held` is there for a moment. `(operations,)` each."""
    return float((np.cumsum(kept) + held).max(initial=0.0))


def backward_peak(kept: Floats, held: Floats, stays: Floats) -> float:
    """The most that a backward pass has at a moment beyond what was there when it began: operation by operation from the last one, what
    was `kept` goes and what `stays` (gradients of parameters) comes. `(operations,)` each."""
    gone = np.cumsum(kept[::-1])[::-1] - kept
    come = np.cumsum(stays[::-1])[::-1]
    return float((held + come - gone).max(initial=0.0))
