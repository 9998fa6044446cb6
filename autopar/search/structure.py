"""What planning needs to know of a graph and what does not depend on the mesh: nodes, edges, and which of them are equal.

Nodes are the operations and the parameters; inputs, buffers and constants are whole on every rank, so that reading them in any
placement is free. A parameter stands before its first reader inside the repeat that owns it, or before the segment when repeats share
it, so that segments of operations are segments of nodes. Equal operations, parameters and edges carry equal numbers (*classes*):
everything behind is computed once per class, which makes deep models as cheap as shallow ones.

Storage that autograd keeps is counted once. A view shares its operand's storage, so the need to keep it passes upwards through
views. A value with one reader that needs it is counted on that edge, as it arrives; with several, or when the model returns it, where
it is made, and again on each edge that makes a new tensor of it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from autopar.ir.fold import Ints, Segment, fold, tokens
from autopar.ir.graph import Graph, Op, Value
from autopar.ir.rules import splits
from autopar.ir.rules.split import Split
from autopar.search.prices.costs import ENTERS, ENTERS_TOO, KEPT, LEAVES, WITHIN
from autopar.search.prices.work import Work, work


@dataclass(frozen=True, slots=True)
class OpClass:
    """Equal operations: the first of them, its work, the results whose storage is counted at the operation (`kept`), and those that the
    model returns with whether they must be whole."""

    op: Op
    work: Work
    operands: tuple[Value, ...]
    outputs: tuple[Value, ...]
    kept: frozenset[int]
    returned: tuple[tuple[int, bool], ...]


class Edge(NamedTuple):
    """From node `source` (result `slot` of an operation, or a parameter) to the operation at node `target`, which reads the value at
    positions `slots`. `keeps` as in `Costs.edge_term`; for parameters `"target"` says that the backward pass reads it. `kind` is equal for
    edges that differ in nothing but their ends and the value's name."""

    source: int
    target: int
    slot: int
    slots: tuple[int, ...]
    value: str
    keeps: str
    kind: int


class Structure:
    """`order[node]` is `("op", position)` or `("parameter", index)`; see the module's docstring."""

    def __init__(self, graph: Graph, fused_attention: bool = True) -> None:
        self.graph = graph
        self.op_segments = fold(graph)
        self.tokens: list[int] = tokens(graph).tolist()
        self._works: dict[int, Work] = {}
        self._fused = fused_attention
        self.position = graph.op_index
        self._place_nodes()
        self._returned = self._find_returned()
        self.needs = self._find_needs(self._returned)
        self._classify()
        self._classify_splits()
        self._connect()

    def work_of(self, position: int) -> Work:
        token = self.tokens[position]
        found = self._works.get(token)
        if found is None:
            found = self._works[token] = work(self.graph, self.graph.ops[position], self._fused)
        return found

    # ---- nodes ------------------------------------------------------------------------------------------------------------------

    def _place_nodes(self) -> None:
        graph = self.graph
        self.has_loss = any(_is_loss(graph.values[item.value]) for item in graph.outputs)
        home: list[tuple[int, int]] = []  # (segment, repeat) of each operation
        for number, segment in enumerate(self.op_segments):
            home += [(number, index // segment.length) for index in range(segment.length * segment.count)]
        before: dict[int, list[int]] = {}
        position = self.position
        for index, parameter in enumerate(graph.parameters):
            readers = [position[op.name] for op in graph.consumers[parameter.value]]
            at = readers[0] if readers else 0
            if readers and len({home[reader] for reader in readers}) > 1 and self.op_segments[home[at][0]].count > 1:
                at = self.op_segments[home[at][0]].start
                # Shared by repeats: outside of the segment, as if it ended the one before.
                before.setdefault(-at - 1, []).append(index)
            else:
                before.setdefault(at, []).append(index)
        order: list[tuple[str, int]] = []
        self.segments: list[Segment] = []
        for segment in self.op_segments:
            shared = before.get(-segment.start - 1, [])
            if shared:
                self.segments.append(Segment(len(order), len(shared), 1))
                order += [("parameter", index) for index in shared]
            start = len(order)
            lengths = set()
            for repeat in range(segment.count):
                first = len(order)
                for offset in range(segment.length):
                    at = segment.start + repeat * segment.length + offset
                    order += [("parameter", index) for index in before.get(at, ())]
                    order.append(("op", at))
                lengths.add(len(order) - first)
            if len(lengths) == 1:
                self.segments.append(Segment(start, lengths.pop(), segment.count))
            else:
                self.segments.append(Segment(start, len(order) - start, 1))
        if not order:
            order += [("parameter", index) for index in range(len(graph.parameters))]
            self.segments.append(Segment(0, len(order), 1))
        self.order = order
        self.node_of_op = [0] * len(graph.ops)
        self.node_of_parameter = [0] * len(graph.parameters)
        for node, (kind, index) in enumerate(order):
            (self.node_of_op if kind == "op" else self.node_of_parameter)[index] = node

    # ---- what the model returns, what autograd keeps ----------------------------------------------------------------------------

    def _find_returned(self) -> dict[str, bool]:
        """Returned values, and whether they must be whole: the loss, buffers' new values, and everything when there is no loss."""
        values = self.graph.values
        found = {item.value: not self.has_loss or not values[item.value].shape for item in self.graph.outputs}
        return found | {item.updated: True for item in self.graph.buffers if item.updated is not None}

    def _find_needs(self, returned: Container[str]) -> dict[str, list[tuple[int, int]]]:
        """Per value, its readers (position, operand slot) whose backward pass needs its storage, directly or through views; views that are
        `returned` need it too."""
        graph = self.graph
        needs: dict[str, list[tuple[int, int]]] = {}
        for at in range(len(graph.ops) - 1, -1, -1):
            op = graph.ops[at]
            work_ = self.work_of(at)
            if not work_.keeps and not work_.view:
                continue
            for slot, name in enumerate(op.operands):
                through = work_.view and slot == 0 and any(item in needs or item in returned for item in op.outputs)
                if through or slot in work_.keeps:
                    needs.setdefault(name, []).append((at, slot))
        return needs

    @cached_property
    def needs_of_training(self) -> dict[str, list[tuple[int, int]]]:
        """`needs` where everything returned beside the loss is dropped, as in a training step."""
        return self._find_needs([name for name, whole in self._returned.items() if whole])

    def _classify(self) -> None:
        graph = self.graph
        numbers: dict[object, int] = {}
        self.classes: list[OpClass] = []
        self.class_of: list[int] = []
        for at, op in enumerate(graph.ops):
            work_ = self.work_of(at)
            kept = [] if work_.view else [
                slot for slot, name in enumerate(op.outputs)
                if slot in work_.keeps_outputs or name in self._returned or len(self.needs.get(name, ())) > 1
            ]  # fmt: skip
            returned = tuple((slot, self._returned[name]) for slot, name in enumerate(op.outputs) if name in self._returned)
            key = (self.tokens[at], tuple(kept), returned)
            number = numbers.get(key)
            if number is None:
                number = numbers[key] = len(self.classes)
                values = graph.values
                operands, outputs = tuple(values[name] for name in op.operands), tuple(values[name] for name in op.outputs)
                self.classes.append(OpClass(op, work_, operands, outputs, frozenset(kept), returned))
            self.class_of.append(number)

    def _classify_splits(self) -> None:
        """Number the sets of splits: `splits` hands out one tuple for equal operations in equal surroundings."""
        self._splits: dict[int, tuple[Split, ...]] = {}  # holds them, so that an id means one tuple
        numbers: dict[tuple[int, int], int] = {}
        self.split_class: list[int] = []
        for at, op in enumerate(self.graph.ops):
            options = splits(self.graph, op)
            self._splits[id(options)] = options
            self.split_class.append(numbers.setdefault((self.tokens[at], id(options)), len(numbers)))

    # ---- edges ------------------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        graph = self.graph
        made = {name: (self.node_of_op[at], slot) for at, op in enumerate(graph.ops) for slot, name in enumerate(op.outputs)}
        parameters = {item.value: (self.node_of_parameter[index], -1) for index, item in enumerate(graph.parameters)}
        counted_at_node = {
            op.outputs[slot] for at, op in enumerate(graph.ops) for slot in self.classes[self.class_of[at]].kept
        }  # fmt: skip
        views = {name for at, op in enumerate(graph.ops) if self.work_of(at).view for name in op.outputs}
        needed_at = {place for places in self.needs.values() for place in places}
        self.edges: list[Edge] = []
        kinds: dict[object, int] = {}
        for at, op in enumerate(graph.ops):
            target = self.node_of_op[at]
            slots: dict[str, tuple[int, ...]] = {}
            for slot, name in enumerate(op.operands):
                slots[name] = (*slots[name], slot) if name in slots else (slot,)
            for name, where in slots.items():
                origin = made.get(name) or parameters.get(name)
                if origin is None:
                    continue
                needed = any((at, slot) in needed_at for slot in where)
                copy = name in counted_at_node or name in views
                keeps = "" if not needed else "copy" if copy and name not in parameters else "target"
                value = graph.values[name]
                key = (origin[1], where, value.shape, value.dtype, value.requires_grad, keeps)
                kind = kinds.setdefault(key, len(kinds))
                self.edges.append(Edge(origin[0], target, origin[1], key[1], name, keeps, kind))

    def recomputed(self, counts: tuple[int, ...]) -> Ints | None:
        """Per operation, which recomputed repeat it is in, -1 for none; of every segment the first `counts` repeats are. None where none
        is."""
        if not any(counts):
            return None
        found = np.full(len(self.graph.ops), -1, np.int64)
        number = 0
        for segment, count in zip(self.op_segments, counts, strict=True):
            for repeat in range(count):
                start = segment.start + repeat * segment.length
                found[start : start + segment.length] = number
                number += 1
        return found

    def ways(self, again: Ints | None) -> list[str]:
        """How each edge runs when operations are recomputed as `recomputed` says; see `autopar.search.prices.costs.WAYS`. An edge from a
        parameter to an operation that is recomputed counts as within."""
        if again is None:
            return [KEPT] * len(self.edges)
        source, target, slot, _ = self.edge_ends
        from_op = slot >= 0
        made = np.where(from_op, again[np.where(from_op, source, 0)], -1)
        read = again[target]
        found = np.where(read >= 0, WITHIN, np.where(made >= 0, LEAVES, KEPT)).tolist()
        seen: set[tuple[int, str]] = set()
        for number in np.flatnonzero(from_op & (read >= 0) & (made != read)).tolist():
            key = int(read[number]), self.edges[number].value
            found[number] = ENTERS_TOO if key in seen else ENTERS
            seen.add(key)
        return [str(way) for way in found]

    def whole(self, value: str) -> bool:
        """Whether a returned value is brought home whole; inputs and parameters that are returned are."""
        return self._returned.get(value, True)

    @cached_property
    def edge_ends(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Per edge, `(edges,)` each: number of the operation or parameter it starts at, position of the reader, slot, kind."""
        number = np.array([index for _, index in self.order], np.int64)
        rows = np.array([(edge.source, edge.target, edge.slot, edge.kind) for edge in self.edges], np.int64).reshape(-1, 4)
        return number[rows[:, 0]], number[rows[:, 1]], rows[:, 2], rows[:, 3]

    @cached_property
    def parameter_edges(self) -> tuple[Edge, ...]:
        """The edges that start at parameters."""
        return tuple(edge for edge in self.edges if edge.slot < 0)


def _is_loss(value: Value) -> bool:
    return value.shape == () and value.requires_grad
