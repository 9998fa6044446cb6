"""In which states over time every value of a graph can be made, and which of these a body of microbatches needs (see `microbatch`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from autopar.errors import PlanError
from autopar.ir.graph import Graph, Op, Output, Value
from autopar.ir.placement import Kind, P, Placement, R, S
from autopar.ir.rules import splits, unruled
from autopar.ir.rules.nest import FLOATS
from autopar.ir.rules.split import Split
from autopar.ir.rules.table import RANDOM

DROPOUT = "autopar.dropout"
CROSS_ENTROPY = "autopar.cross_entropy"
MEAN, SQUEEZE = "mean_of_part", "squeeze_part"
"""Implementations of splits that talk to no other rank, so that a microbatch can do alike."""
_DTYPE_ONLY = {f"aten.{name}.default": 0 for name in ("new_full", "new_zeros", "new_ones", "new_empty")}
"""Operands of which an operator reads nothing but dtype and device: any part will do."""
_ELEMENTWISE_RANDOM = frozenset(
    f"aten.{name}"
    for name in (
        "bernoulli.default", "bernoulli.p", "rand_like.default", "randn_like.default", "randint_like.default", "randint_like.low_dtype",
        "native_dropout.default", "dropout.default", "exponential.default", "uniform.default", "normal_functional.default",
    )
)  # fmt: skip
"""Random operators that draw for every element of their operand: a microbatch draws for its part."""


def draws(op: Op) -> bool:
    """Whether `op` draws random numbers."""
    if op.target == "aten.scaled_dot_product_attention.default":
        return bool(op.arg(4, "dropout_p", 0.0))
    return op.target == DROPOUT or op.target in RANDOM


@dataclass(frozen=True, slots=True)
class Made:
    """One way to make a value: by its operation in `split` (None: whole) from operands in the states `reads`; or with `how`."""

    how: str  # "op", "source", "term" (R divided by the number of microbatches) or "prologue"
    cost: int
    split: Split | None = None
    reads: tuple[Placement, ...] = ()


Ways = dict[Placement, Made]
_IN_PROLOGUE_COST, _IN_PARTS_COST, _TERM_COST = 4, 5, 1


class Choices:
    """First, forwards, all states in which every value can be made; then, backwards, those that are wanted.

    `ways`: by value, how it can be made in each state. After `decide`: `wanted`, by value the states that the body has it in; `instances`,
    by operation the splits that it runs in (None: whole) and the states that it then reads; `joined`, the states of the outputs.
    """

    def __init__(self, graph: Graph, count: int, batch: int) -> None:
        self.graph, self.count, self.batch = graph, count, batch
        self.free = self._find_free()
        self.shared = self._find_shared()
        self.ways: dict[str, Ways] = {}
        self._numbers: dict[tuple[tuple[Placement, int], ...], int] = {}
        self._number: dict[str, int] = {}
        self._known: dict[tuple[object, ...], tuple[tuple[Split, ...], list[Ways], list[int]]] = {}

    # ---- forwards: in which states can every value be made? -----------------------------------------------------------------------

    def _find_free(self) -> set[str]:
        """Values that depend on no parameter and carry no gradient: what the prologue can compute."""
        values = self.graph.values
        updated = {item.value for item in self.graph.buffers if item.updated is not None}
        free = {
            name
            for name, kind in self.graph.source_kind.items()
            if kind != "parameter" and name not in updated and not values[name].requires_grad
        }
        for op in self.graph.ops:
            if all(name in free for name in op.operands):
                free.update(name for name in op.outputs if not values[name].requires_grad)
        return free

    def _find_shared(self) -> set[str]:
        """Free values that no row of the batch has a part in, such as a table of positions, though dropout may have drawn a mask for it."""
        rows = {item.value for item in self.graph.inputs}
        shared = {name for name in self.graph.source_kind if name in self.free and name not in rows}
        for op in self.graph.ops:
            if all(name in shared for name in op.operands):
                shared.update(name for name in op.outputs if name in self.free)
        return shared

    def _explore(self) -> None:
        graph = self.graph
        for name, kind in graph.source_kind.items():
            ways: Ways = {R: Made("source", 0)}
            value = graph.values[name]
            if value.dtype in FLOATS and kind != "input":
                ways[P] = Made("term", _TERM_COST)
            if kind == "input" and value.shape[:1] == (self.batch,):
                ways = {S(0): Made("source", 0)}
            self._keep(name, self._with_prologue(ways, value) if name in self.free else ways)
        for op in graph.ops:
            free = [name in self.free for name in op.outputs]
            options = splits(graph, op)
            weight_free = op.target == CROSS_ENTROPY and len(op.outputs) > 1 and op.operands[1] in self.free
            key = (
                id(options), draws(op), weight_free, *free,
                *[(self._number[name], graph.values[name].requires_grad, name in self.free) for name in op.operands],
            )  # fmt: skip
            known = self._known.get(key)
            if known is None:
                found = self._ways_of(op, options, weight_free)
                known = self._known[key] = (
                    options,
                    found,
                    [self._number_of(ways) for ways in found],
                )  # holds the options: their id is theirs
            for name, ways, number in zip(op.outputs, *known[1:], strict=True):
                self.ways[name], self._number[name] = ways, number

    def _keep(self, name: str, ways: Ways) -> None:
        self.ways[name], self._number[name] = ways, self._number_of(ways)

    def _number_of(self, ways: Ways) -> int:
        key = tuple((state, made.cost) for state, made in ways.items())
        return self._numbers.setdefault(key, len(self._numbers))

    def _with_prologue(self, ways: Ways, value: Value) -> Ways:
        """`ways`, and those through the prologue where they are the only or the cheaper ones."""
        found = dict(ways)
        if R not in found or found[R].cost >= _IN_PROLOGUE_COST:  # what is made of the whole batch is made once, as far as it goes
            found[R] = Made("prologue", _IN_PROLOGUE_COST)
        for dim, size in enumerate(value.shape):
            if size and size % self.batch == 0 and (S(dim) not in found or found[S(dim)].cost > _IN_PARTS_COST):
                found[S(dim)] = Made("prologue", _IN_PARTS_COST)
        return found

    def _ways_of(self, op: Op, options: tuple[Split, ...], weight_free: bool) -> list[Ways]:
        graph = self.graph
        found: list[Ways] = [{} for _ in op.outputs]

        def offer(split: Split | None, reads: tuple[Placement, ...], outputs: Iterable[Placement]) -> None:
            cost = sum(self.ways[name][state].cost for name, state in dict(zip(op.operands, reads, strict=True)).items())
            for ways, name, state in zip(found, op.outputs, outputs, strict=True):
                # Behind parameters there is one way to be at a state, what it costs no longer matters; equal layers look equal.
                price = cost if name in self.free else 0
                if state not in ways or ways[state].cost > price:
                    ways[state] = Made("op", price, split, reads)

        whole = self._reads(op, tuple(R for _ in op.operands))
        if whole is not None and self._worth_repeating(op, whole):
            offer(None, whole, (R for _ in op.outputs))
        once = draws(op) and all(name in self.free for name in op.outputs)  # or two readers would see different numbers
        for split in () if once else (*options, *self._random_splits(op)):
            if split.implementation not in ("", MEAN, SQUEEZE):
                continue
            if split.size % self.count or not any(not state.is_replicated for state in split.outputs):
                continue
            reads = self._reads(op, split.inputs)
            if reads is None:
                continue
            if all(state == R for state in reads) and split.size % self.batch:
                continue  # parts of something else than the batch
            offer(split, reads, split.outputs)
        for slot, name in enumerate(op.outputs):
            value = graph.values[name]
            ways = found[slot]
            if R in ways and P not in ways and value.dtype in FLOATS and self._small(name, ways[R]):
                ways[P] = Made("term", ways[R].cost + _TERM_COST if name in self.free else 0)
            if name in self.free:
                found[slot] = self._with_prologue(ways, value)
            elif weight_free and slot == 1:
                ways.setdefault(R, Made("prologue", 0))
        return found

    def _worth_repeating(self, op: Op, reads: tuple[Placement, ...]) -> bool:
        """Whether every microbatch may run `op` whole: not where that would draw other random numbers, nor compute the whole batch.
        An operand that `reads` has otherwise than whole is read for its dtype alone."""
        if all(name in self.free for name in op.operands):
            return not draws(op)
        if draws(op) and op.target != DROPOUT:
            return False
        return all(self._small(name, self.ways[name][R]) for name, state in zip(op.operands, reads, strict=True) if state == R)

    def _small(self, name: str, whole: Made) -> bool:
        """Whether a value that is whole in every microbatch is not made of the whole batch, or is but one number."""
        return whole.cost < _IN_PROLOGUE_COST or not self.graph.values[name].shape or name in self.shared

    def _reads(self, op: Op, wanted: tuple[Placement, ...]) -> tuple[Placement, ...] | None:
        """The states in which the operands would be read by a split that wants them so; None if one cannot be made so."""
        reads = []
        ignored = _DTYPE_ONLY.get(op.target)
        for slot, (name, state) in enumerate(zip(op.operands, wanted, strict=True)):
            ways = self.ways[name]
            state = R if state.is_replicated else state
            if slot == ignored and ways:
                state = min(ways, key=lambda item: ways[item].cost)
            if state not in ways:
                return None
            if state == R and wanted[slot] == R and self.graph.values[name].requires_grad and not all(item == R for item in wanted):
                return None  # its gradient would be complete in every microbatch, and counted in each
            reads.append(state)
        return tuple(reads)

    def _random_splits(self, op: Op) -> tuple[Split, ...]:
        if op.target not in _ELEMENTWISE_RANDOM or not op.operands:
            return ()
        shapes = {self.graph.values[name].shape for name in (*op.operands, *op.outputs)}
        if len(shapes) != 1:
            return ()
        return tuple(
            Split(f"d{dim}", tuple(S(dim) for _ in op.operands), tuple(S(dim) for _ in op.outputs), size)
            for dim, size in enumerate(shapes.pop())
            if size > 1
        )

    # ---- backwards: which of them are wanted? -------------------------------------------------------------------------------------

    def decide(self) -> None:
        """Raises `PlanError` where there is no way."""
        self._explore()
        graph = self.graph
        self.joined = tuple(self._join(item) for item in graph.outputs)
        for buffer in graph.buffers:
            if buffer.updated is not None:
                self._refuse_update(buffer.fqn, buffer.updated)
        self.wanted: dict[str, dict[Placement, None]] = {}
        self.instances: dict[str, dict[Split | None, tuple[Placement, ...]]] = {}
        for item, state in zip(graph.outputs, self.joined, strict=True):
            self.wanted.setdefault(item.value, {})[state] = None
        for op in reversed(graph.ops):
            self._choose(op)

    def _join(self, output: Output) -> Placement:
        """The state in which microbatches return a value: the loss as a term, others in parts if they can."""
        ways = self.ways[output.value]
        value = self.graph.values[output.value]
        loss = value.shape == () and value.requires_grad
        if not ways or (loss and P not in ways):
            self._refuse(output.value)
        if loss:
            return P

        def rank(state: Placement) -> tuple[int, ...]:
            return ways[state].cost, (Kind.SHARD, Kind.REPLICATE, Kind.PARTIAL).index(state.kind), state.dim, state.blocks

        return min(ways, key=rank)

    def _choose(self, op: Op) -> None:
        """The splits that `op` runs in for its results to be there in all wanted states, and what they read."""
        instances: dict[Split | None, tuple[Placement, ...]] = {}
        for name in op.outputs:
            ways, states = self.ways[name], self.wanted.get(name, {})
            if P in states and ways[P].how == "term":
                states[R] = None
            for state in states:
                made = ways[state]
                if made.how == "op":
                    instances.setdefault(made.split, made.reads)
        if draws(op) and len(instances) > 1:
            self._refuse_op(op)
        for reads in instances.values():
            for name, state in zip(op.operands, reads, strict=True):
                self.wanted.setdefault(name, {})[state] = None
        self.instances[op.name] = instances

    # ---- what cannot be done ------------------------------------------------------------------------------------------------------

    def _refuse(self, value: str) -> NoReturn:
        producers = self.graph.producers
        op = producers.get(value)
        while op is not None and (dead := next((name for name in op.operands if not self.ways[name]), None)) is not None:
            op = producers[dead]
        if op is None:
            raise PlanError(f"microbatches={self.count}: output `{value}` is no sum or row of the batch; use microbatches=1")
        self._refuse_op(op)

    def _refuse_op(self, op: Op) -> NoReturn:
        if op.target in unruled(self.graph):
            why = "autopar has no sharding rule for it and cannot tell whether it does"
        elif op.target == "autopar.batch_norm":
            why = "batch norm in training mode takes its statistics from all rows"
        elif draws(op):
            why = "it draws random numbers that all rows share"
        else:
            why = "its result for one row of the batch depends on the others"
        raise PlanError(
            f"{where(op)}: needs the whole batch, which {self.count} microbatches of {self.batch // self.count} rows do not have ({why}); "
            "use microbatches=1"
        )

    def _refuse_update(self, fqn: str, value: str) -> NoReturn:
        op = self.graph.producers.get(value)
        raise PlanError(
            f"{where(op) + ': ' if op else ''}updates buffer `{fqn}` in every forward pass, which is once a step for the whole batch and "
            f"would be {self.count} times with microbatches={self.count}; use microbatches=1"
        )


def where(op: Op) -> str:
    """`op` in the user's terms."""
    return f"{op.module or 'the model'}: operation `{op.name}` ({op.target}{f', {op.source}' if op.source else ''})"
