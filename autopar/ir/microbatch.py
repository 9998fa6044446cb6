"""Microbatches: from the graph of a global batch to the graph of one of `count` equal parts of it, and what joins their results.

Microbatching is one more split, over time instead of over ranks, so the sharding rules say how every operation takes part in it, and their
numerical proof covers it. Over time a value is `S(d)` (each microbatch has its part), `P(sum)` (each has a term of a sum) or `R` (the
same in each). Gradients of what is `R` are always terms of a sum over the microbatches, because every microbatch runs its own backward
pass; so an operand in state `R` that requires a gradient meets splits that read `R/P`, or is read by an operation that runs whole.

Nothing is sent between microbatches, so a value has only the states in which it can be *made*:

* by its operation, in a split that reads its operands in states they can be made in;
* as a term of a sum of equal terms, `x / count`, where it is `R`;
* in the *prologue*, where it depends on no parameter: computed once from the whole batch and handed to every microbatch, whole (`R`) or
  cut in parts (`S(d)`). So what needs to know the whole batch (the number of tokens that count in the loss) knows the whole batch.

What is made is decided from the results backwards: a value that different readers need in different states is made once in each.
Where there is no way, rows of the batch depend on each other through parameters (batch norm in training, a contrastive loss): `PlanError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NoReturn

from autopar.errors import PlanError
from autopar.ir.graph import Arg, Graph, Input, Op, Output, Ref, Symbol, Value
from autopar.ir.placement import Kind, P, Placement, R, S
from autopar.ir.rules import has_rule, splits, unruled
from autopar.ir.rules.local_args import LOCAL_ARGS, local_args
from autopar.ir.rules.nest import FLOATS
from autopar.ir.rules.split import Split
from autopar.ir.rules.table import RANDOM

__all__ = ["PROLOGUE", "Microbatched", "draws", "microbatched"]

PROLOGUE = "@"
"""First letter of the paths of inputs that the prologue computes."""

DROPOUT = "autopar.dropout"
_CROSS_ENTROPY, _TARGET_WEIGHT = "autopar.cross_entropy", "autopar.target_weight"
_MEANS = frozenset(("mean_of_part", "mean_loss_of_part"))
_SQUEEZE = "squeeze_part"
_DTYPE_ONLY = {f"aten.{name}.default": 0 for name in ("new_full", "new_zeros", "new_ones", "new_empty")} | {"aten.type_as.default": 1}
"""Operands of which an operator reads nothing but dtype and device: any part will do."""
_ELEMENTWISE_RANDOM = frozenset(
    f"aten.{name}"
    for name in (
        "bernoulli.default", "bernoulli.p", "rand_like.default", "randn_like.default", "randint_like.default", "randint_like.low_dtype",
        "native_dropout.default", "dropout.default", "exponential.default", "uniform.default", "normal_functional.default",
    )
)  # fmt: skip
"""Random operators that draw for every element of their operand: a microbatch draws for its part."""


@dataclass(frozen=True, slots=True)
class Microbatched:
    """`count` runs of `body`, one a microbatch, do what one run of the graph does.

    `prologue`, if any, runs first, once, on the whole batch; its outputs have the paths (`"@..."`) of the inputs of `body` that take them.
    `inputs`: by path, how microbatches take the inputs of `body`, the user's and the prologue's: `S(d)` in `count` equal parts along dim
    `d`, `R` whole. `outputs`: per output of `body`, how the whole is joined: `S(d)` concatenated, `P(sum)` summed, `R` equal in all.
    Gradients of the parameters are summed.
    """

    count: int
    prologue: Graph | None
    body: Graph
    inputs: dict[str, Placement]
    outputs: tuple[Placement, ...]


def microbatched(graph: Graph, count: int) -> Microbatched:
    """The graph of one of `count` equal parts of the batch; with `count` 1 the graph itself.

    Values and operations keep their names and order. A value made in a second state, and what is made for the prologue, gets a name of
    its own. The batch is the leading dim of the inputs (the most frequent size, should they differ).
    Raises `PlanError` where the batch cannot be divided, where its rows depend on each other, and where buffers are updated.
    """
    if count < 1:
        raise PlanError(f"microbatches={count}: a batch has at least one microbatch")
    if count == 1:
        return Microbatched(1, None, graph, {item.path: R for item in graph.inputs}, (R,) * len(graph.outputs))
    kept: dict[int, Microbatched | PlanError] = graph.__dict__.setdefault("_microbatched", {})
    found = kept.get(count)
    if found is None:
        try:
            found = _microbatched(graph, count)
        except PlanError as error:
            found = error
        kept[count] = found
    if isinstance(found, PlanError):
        raise found
    return found


def _microbatched(graph: Graph, count: int) -> Microbatched:
    first: PlanError | None = None
    sizes = _batch_sizes(graph)
    if not sizes:
        raise PlanError(f"microbatches={count}: no input has a batch dim; use microbatches=1")
    for batch in sizes:
        if batch % count:
            error = PlanError(
                f"microbatches={count}: the batch has {batch} rows, which {count} equal microbatches cannot share; use a divisor of {batch}"
            )
        else:
            try:
                return _Body(graph, count, batch).build()
            except PlanError as raised:
                error = raised
        first = first or error
    assert first is not None
    raise first


def _batch_sizes(graph: Graph) -> list[int]:
    """Leading dims of inputs that may be the batch, the likeliest first: the most frequent, then the first."""
    sizes = [graph.values[item.value].shape[0] for item in graph.inputs if graph.values[item.value].shape]
    likely = sorted(dict.fromkeys(sizes), key=lambda size: -sizes.count(size))
    return [size for size in likely if size > 1] or likely


def draws(op: Op) -> bool:
    """Whether `op` draws random numbers."""
    if op.target == "aten.scaled_dot_product_attention.default":
        return bool(op.arg(4, "dropout_p", 0.0))
    return op.target == DROPOUT or op.target in RANDOM


@dataclass(frozen=True, slots=True)
class _Made:
    """One way to make a value: by its operation in `split` (None: whole) from operands in the states `reads`; or with `how`."""

    how: str  # "op", "source", "term" (R divided by the number of microbatches) or "prologue"
    cost: int
    split: Split | None = None
    reads: tuple[Placement, ...] = ()


Ways = dict[Placement, _Made]
_IN_PROLOGUE_COST, _IN_PARTS_COST, _TERM_COST = 4, 5, 1


class _Body:
    """Builds the body: first, forwards, all states in which every value can be made; then, backwards, those that are wanted."""

    def __init__(self, graph: Graph, count: int, batch: int) -> None:
        self.graph, self.count, self.batch = graph, count, batch
        self.free = self._find_free()
        self.ways: dict[str, Ways] = {}
        self._numbers: dict[tuple[tuple[Placement, int], ...], int] = {}
        self._number: dict[str, int] = {}
        self._known: dict[tuple[object, ...], tuple[list[Ways], list[int]]] = {}

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

    def _explore(self) -> None:
        graph = self.graph
        for name, kind in graph.source_kind.items():
            ways: Ways = {R: _Made("source", 0)}
            value = graph.values[name]
            if value.dtype in FLOATS and kind != "input":
                ways[P] = _Made("term", _TERM_COST)
            if kind == "input" and value.shape[:1] == (self.batch,):
                ways = {S(0): _Made("source", 0)}
            self._keep(name, self._with_prologue(ways, value) if name in self.free else ways)
        for op in graph.ops:
            free = [name in self.free for name in op.outputs]
            options = splits(graph, op)
            weight_free = op.target == _CROSS_ENTROPY and len(op.outputs) > 1 and op.operands[1] in self.free
            key = (
                id(options), draws(op), weight_free, *free,
                *[(self._number[name], graph.values[name].requires_grad, name in self.free) for name in op.operands],
            )  # fmt: skip
            known = self._known.get(key)
            if known is None:
                found = self._ways_of(op, options, weight_free)
                known = self._known[key] = (found, [self._number_of(ways) for ways in found])
            for name, ways, number in zip(op.outputs, *known, strict=True):
                self.ways[name], self._number[name] = ways, number

    def _keep(self, name: str, ways: Ways) -> None:
        self.ways[name], self._number[name] = ways, self._number_of(ways)

    def _number_of(self, ways: Ways) -> int:
        key = tuple((state, made.cost) for state, made in ways.items())
        return self._numbers.setdefault(key, len(self._numbers))

    def _with_prologue(self, ways: Ways, value: Value) -> Ways:
        """`ways`, and those through the prologue where they are the only or the cheaper ones."""
        found = dict(ways)
        through = {R: _Made("prologue", _IN_PROLOGUE_COST)} | {
            S(dim): _Made("prologue", _IN_PARTS_COST) for dim, size in enumerate(value.shape) if size and size % self.batch == 0
        }
        for state, made in through.items():
            if state not in found or found[state].cost > made.cost:
                found[state] = made
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
                    ways[state] = _Made("op", price, split, reads)

        whole = self._reads(op, tuple(R for _ in op.operands))
        if whole is not None and self._worth_repeating(op):
            offer(None, whole, (R for _ in op.outputs))
        for split in (*options, *self._random_splits(op)):
            if split.implementation and split.implementation not in _MEANS and split.implementation != _SQUEEZE:
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
            if R in ways and P not in ways and value.dtype in FLOATS:
                ways[P] = _Made("term", ways[R].cost + _TERM_COST if name in self.free else 0)
            if name in self.free:
                found[slot] = self._with_prologue(ways, value)
            elif weight_free and slot == 1:
                ways.setdefault(R, _Made("prologue", 0))
        return found

    def _worth_repeating(self, op: Op) -> bool:
        """Whether every microbatch may run `op` whole: not where that would draw other random numbers, nor compute the whole batch."""
        if all(name in self.free for name in op.operands):
            return not draws(op)
        if draws(op) and op.target != DROPOUT:
            return False
        return all(self.ways[name][R].cost == 0 or not self.graph.values[name].shape for name in op.operands if name in self.free)

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

    def build(self) -> Microbatched:
        self._explore()
        graph = self.graph
        joined = tuple(self._join(item) for item in graph.outputs)
        for buffer in graph.buffers:
            if buffer.updated is not None:
                self._refuse_update(buffer.fqn, buffer.updated)
        self.wanted: dict[str, dict[Placement, None]] = {}
        self.instances: dict[str, dict[Split | None, tuple[Placement, ...]]] = {}
        for item, state in zip(graph.outputs, joined, strict=True):
            self.wanted.setdefault(item.value, {})[state] = None
        for op in reversed(graph.ops):
            self._choose(op)
        return _Writer(self).write(joined)

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
        if not has_rule(op.target) or op.target in unruled(self.graph):
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


class _Writer:
    """Writes down what was decided: the body's and the prologue's graph."""

    def __init__(self, body: _Body) -> None:
        self.body, self.graph, self.count = body, body.graph, body.count
        self.taken = set(body.graph.values) | {op.name for op in body.graph.ops}
        self.names: dict[tuple[str, Placement], str] = {}
        self.values: dict[str, Value] = {}
        self.inputs: list[Input] = []
        self.placed: dict[str, Placement] = {}
        self.ops: list[Op] = []
        self.prologue = _Prologue(body.graph)

    def write(self, joined: tuple[Placement, ...]) -> Microbatched:
        graph, body = self.graph, self.body
        for name, kind in graph.source_kind.items():
            if kind != "input":
                self.define(name, name, R)
        for item in graph.inputs:
            self.take(item, next(iter(body.ways[item.value])))
        for name in graph.source_kind:
            self.further(name, "the model", "")
        for op in graph.ops:
            for split, reads in body.instances[op.name].items():
                self.run(op, split, reads)
            for name in op.outputs:
                self.further(name, op.module, op.source)
        outputs = tuple(Output(self.names[item.value, state], item.path) for item, state in zip(graph.outputs, joined, strict=True))
        written = replace(graph, values=self.values, inputs=tuple(self.inputs), ops=tuple(self.ops), outputs=outputs)
        return Microbatched(self.count, self.prologue.graph(), written, self.placed, joined)

    def fresh(self, name: str) -> str:
        """`name`, or the first free name made of it."""
        found, number = name, 2
        while found in self.taken:
            found, number = f"{name}{number}", number + 1
        self.taken.add(found)
        return found

    def define(self, value: str, name: str, state: Placement) -> str:
        """The graph's `value` in `state` goes by `name` in the body."""
        whole = self.graph.values[value]
        if state.is_shard:
            shape = tuple(size // self.count if dim == state.dim else size for dim, size in enumerate(whole.shape))
            self.values[name] = Value(name, shape, whole.dtype, whole.requires_grad)
        else:
            self.values[name] = whole if name == value else replace(whole, name=name)
        self.names.setdefault((value, state), name)
        return name

    def name(self, value: str, state: Placement) -> str:
        """A name for `value` in `state`: its own, if that is free."""
        if value not in self.values:
            return self.define(value, value, state)
        suffix = {Kind.SHARD: "part", Kind.PARTIAL: "term"}.get(state.kind, "whole")
        return self.define(value, self.fresh(f"{value}.{suffix}"), state)

    def take(self, item: Input, state: Placement) -> None:
        self.define(item.value, item.value, state)
        self.inputs.append(item)
        self.placed[item.path] = state

    def further(self, value: str, module: str, source: str) -> None:
        """`value` in those wanted states that no operation of the model gives: from the prologue, and as terms."""
        wanted, ways = self.body.wanted.get(value, {}), self.body.ways[value]
        for state in wanted:
            if (value, state) not in self.names and ways[state].how == "prologue":
                name = self.name(value, state)
                self.enter(value, name, state)
        if P in wanted and (value, P) not in self.names:
            whole = self.names[value, R]
            name = self.name(value, P)
            self.ops.append(Op(name, "aten.div.Tensor", (Ref(whole), float(self.count)), (), (name,), module, source))

    def enter(self, value: str, name: str, state: Placement) -> None:
        """Body input `name` takes the prologue's `value`."""
        path = PROLOGUE + name
        self.inputs.append(Input(name, path))
        self.placed[path] = state
        self.prologue.give(value, path)

    # ---- operations ---------------------------------------------------------------------------------------------------------------

    def run(self, op: Op, split: Split | None, reads: tuple[Placement, ...]) -> None:
        states = (R,) * len(op.outputs) if split is None else split.outputs
        operands = [self.names[name, state] for name, state in zip(op.operands, reads, strict=True)]
        outputs = tuple(self.name(name, state) for name, state in zip(op.outputs, states, strict=True))
        own = outputs == op.outputs
        name = op.name if own else outputs[0] if len(outputs) == 1 else self.fresh(f"{op.name}.again")
        written = op if tuple(operands) == op.operands and name == op.name else _rewired(op, name, operands, outputs)
        if split is None:
            if op.target == DROPOUT:
                written = self._masked(op, written)
            self.ops.append(written)
            return
        shapes = tuple(self.values[item].shape for item in outputs)
        if split.implementation == _SQUEEZE:
            self.ops.append(replace(written, target="aten.view.default", args=(Ref(operands[0]), shapes[0]), kwargs=()))
            return
        if split.implementation in _MEANS:
            part = self.fresh(f"{outputs[0]}.mean")
            self.values[part] = replace(self.values[outputs[0]], name=part)
            self.ops.append(replace(written, name=part, outputs=(part,)))
            self.ops.append(replace(written, target="aten.div.Tensor", args=(Ref(part), float(self.count)), kwargs=()))
            return
        if op.target in LOCAL_ARGS:
            args, kwargs = local_args(written, tuple(self.values[item].shape for item in operands), shapes)
            written = replace(written, args=args, kwargs=kwargs)
        self.ops.append(written)

    def _masked(self, op: Op, written: Op) -> Op:
        """Dropout of what all rows share: the mask is drawn once, in the prologue."""
        (result,) = op.outputs
        whole = replace(self.graph.values[result], requires_grad=False)
        ones, mask = self.fresh(f"{result}.ones"), self.fresh(f"{result}.mask")
        self.prologue.add(
            Op(ones, "aten.full.default", (whole.shape, 1.0), (("dtype", Symbol(f"torch.{whole.dtype}")),), (ones,), op.module, op.source),
            replace(whole, name=ones),
        )
        self.prologue.add(Op(mask, DROPOUT, (Ref(ones), op.args[1]), (), (mask,), op.module, op.source), replace(whole, name=mask))
        self.values[mask] = replace(whole, name=mask)
        self.enter(mask, mask, R)
        return replace(written, target="aten.mul.Tensor", args=(written.args[0], Ref(mask)), kwargs=())


class _Prologue:
    """Collects what is computed once for all microbatches."""

    def __init__(self, graph: Graph) -> None:
        self.whole = graph
        self.added: dict[str, tuple[Op, Value]] = {}
        self.outputs: list[Output] = []
        self.needed: set[str] = set()

    def add(self, op: Op, value: Value) -> None:
        """An operation that the graph has not."""
        self.added[value.name] = (op, value)

    def give(self, value: str, path: str) -> None:
        producer = self.whole.producers.get(value)
        if producer is not None and producer.target == _CROSS_ENTROPY and value == producer.outputs[1]:
            given = self.whole.values[value]
            ignored = producer.arg(2, "ignore_index", -100)
            args = (Ref(producer.operands[1]), ignored, Symbol(f"torch.{given.dtype}"))
            self.add(Op(value, _TARGET_WEIGHT, args, (), (value,), producer.module, producer.source), given)
        self.outputs.append(Output(value, path))

    def graph(self) -> Graph | None:
        if not self.outputs:
            return None
        whole = self.whole
        ops: dict[str, Op] = {}
        values: dict[str, Value] = {}
        waiting = [item.value for item in reversed(self.outputs)]
        extra: list[Op] = []
        while waiting:
            name = waiting.pop()
            if name in values:
                continue
            if name in self.added:
                op, values[name] = self.added[name]
                extra.append(op)
            else:
                values[name] = whole.values[name]
                producer = whole.producers.get(name)
                if producer is None:
                    continue
                op = ops[producer.name] = producer
                values |= {item: whole.values[item] for item in producer.outputs}
            waiting += reversed(op.operands)
        ordered = [op for op in whole.ops if op.name in ops]
        known = {name for op in ordered for name in op.outputs} | set(whole.source_kind)
        added = [op for op, _ in self.added.values() if op in extra]
        assert all(name in known or name in self.added for op in added for name in op.operands)
        return Graph(
            whole.name,
            values,
            tuple(item for item in whole.inputs if item.value in values),
            (),
            tuple(replace(item, updated=None) for item in whole.buffers if item.value in values),
            tuple(item for item in whole.constants if item.value in values),
            (*ordered, *added),
            tuple(self.outputs),
            whole.training,
        )


def _rewired(op: Op, name: str, operands: list[str], outputs: tuple[str, ...]) -> Op:
    """`op` under another name with other values in the same places."""
    given = iter(operands)

    def new(arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return Ref(next(given))
        return tuple([new(item) for item in arg]) if isinstance(arg, tuple) else arg

    args = tuple([new(arg) for arg in op.args])
    kwargs = tuple([(key, new(arg)) for key, arg in op.kwargs])
    return Op(name, op.target, args, kwargs, outputs, op.module, op.source)
