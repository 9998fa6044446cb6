"""Routed experts, recognised by what they compute, as one operation `autopar.experts` (see `autopar.ir.experts`).

What libraries write: sort the ids of the experts, take the token of every row in that order, count rows, one grouped product a layer of
the experts, and bring the rows back in their order to add up those of a token. Sorting couples all tokens, so that as written nothing
but replicas can run it. But rows that are sorted and brought back by one permutation are independent of each other, which is what the
operation says.

Here every operation behind a `sort` is interpreted as a step of this, and whatever is not one leaves the graph as it was: the permutation
must be undone by its own inverse, the counted ids must be those that were sorted, and between taking and bringing back every operation
must treat each row alone, which its sharding rule tells. Weights may be applied anywhere on the way, or after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autopar.ir import experts
from autopar.ir.graph import Arg, Graph, Input, Op, Output, Ref, Value
from autopar.ir.rules.local_args import LOCAL_ARGS
from autopar.ir.rules.nest import FLOATS, Call
from autopar.ir.rules.table import RANDOM, RULES
from autopar.ir.tracing.canonical_rows import counts_up
from autopar.ir.tracing.rewriter import Rewriter

SORTS = {"aten.sort.default": (1, 2), "aten.sort.stable": (2, 3), "aten.argsort.default": (1, 2), "aten.argsort.stable": (2, 3)}
"""Operators that sort, with the positions of `dim` and `descending`."""
PRODUCTS = frozenset({"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"})
ZEROS = frozenset({"aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default"})
_PARTS = frozenset({"aten.split.Tensor", "aten.split_with_sizes.default", "aten.split.sizes"})
_CASTS = frozenset({"aten._to_copy.default", "aten.to.dtype"})


def recognise(graph: Graph) -> Graph:
    """`graph` with an `autopar.experts` in place of every sum over the rows of routed experts; what led there is left to who removes
    dead code."""
    found: dict[str, _Found] = {}
    for index, op in enumerate(graph.ops):
        if op.target in SORTS:
            match = _Reading(graph, op).run(graph.ops[index + 1 :])
            if match is not None:
                found[match.result] = match
    if not found:
        return graph
    rewriter = Rewriter(graph)
    for op in graph.ops:
        op = rewriter.read(op)
        match = found.get(op.outputs[0]) if op.outputs else None
        if match is None:
            rewriter.ops.append(op)
        else:
            match.write(rewriter, op)
    return rewriter.done()


@dataclass(frozen=True, slots=True)
class _Found:
    """`result` is what the experts give for `x` and `ids` `(n k,)` or `(n, k)`, and `weights` likewise."""

    result: str
    x: str
    ids: str
    weights: str | None
    tensors: tuple[str, ...]
    body: Graph
    slots: int
    module: str
    source: str

    def write(self, rewriter: Rewriter, op: Op) -> None:
        def in_slots(name: str, what: str) -> Ref:
            name = rewriter.stands_for.get(name, name)
            value = rewriter.values[name]
            if len(value.shape) == 2:
                return Ref(name)
            shape = (value.shape[0] // self.slots, self.slots)
            new = f"{self.result}.{what}"
            rewriter.values[new] = Value(new, shape, value.dtype, value.requires_grad)
            rewriter.ops.append(Op(f"{op.name}.{what}", "aten.view.default", (Ref(name), shape), (), (new,), self.module, self.source))
            return Ref(new)

        ids = in_slots(self.ids, "ids")
        weights = None if self.weights is None else in_slots(self.weights, "weights")
        args: tuple[Arg, ...] = (Ref(self.x), ids, weights, tuple(Ref(name) for name in self.tensors), experts.write(self.body))
        args = tuple(rewriter.resolved(arg) for arg in args)
        rewriter.ops.append(Op(op.name, experts.EXPERTS, args, (), (self.result,), self.module, self.source))


class _NotExperts(Exception):
    """Rows are read by something that is no step of routed experts."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A value of rows: the `body`'s value of one row, and in which order rows lie: sorted by expert, or again as they came, as `(n k)`
    rows or, `in_slots`, as `(n, k)`."""

    body: str
    sorted: bool
    in_slots: bool = False


@dataclass
class _Body:
    """A body while it is written."""

    values: dict[str, Value] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    inputs: dict[str, None] = field(default_factory=dict)

    def input(self, name: str, shape: tuple[int, ...], dtype: str) -> str:
        self.inputs[name] = None
        self.values[name] = Value(name, shape, dtype, dtype in FLOATS)
        return name

    def put(self, target: str, args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...], outputs: Sequence[Value]) -> tuple[str, ...]:
        """A new operation, whose results are as `outputs`, but with one row."""
        name = f"v{len(self.ops)}"
        names = (name,) if len(outputs) == 1 else tuple(f"{name}.{index}" for index in range(len(outputs)))
        for new, value in zip(names, outputs, strict=True):
            self.values[new] = Value(new, (1, *value.shape[1:]), value.dtype, value.dtype in FLOATS)
        self.ops.append(Op(name, target, args, kwargs, names))
        return names

    def done(self, result: str, tensors: Sequence[Value]) -> Graph:
        fixed = [name for name in (experts.X, experts.WEIGHT, experts.EXPERT) if name in self.inputs]
        names = [*fixed, *(experts.tensor(index) for index in range(len(tensors)))]
        inputs = tuple(Input(name, name) for name in names)
        live, ops = {result}, []
        for op in reversed(self.ops):
            if not live.isdisjoint(op.outputs):
                live.update(op.operands)
                ops.append(op)
        values = {name: self.values[name] for name in (*names, *(name for op in reversed(ops) for name in op.outputs))}
        return Graph("experts", values, inputs, (), (), (), tuple(reversed(ops)), (Output(result, "0"),)).verify()


class _Reading:
    """Interprets what follows a `sort` of ids. Names of kinds: `sorted` ids, the `permutation`, the `token` of every sorted row, the
    `inverse` permutation, `counts` and `ends` of the experts' rows, `hot` ids."""

    def __init__(self, graph: Graph, sort: Op) -> None:
        self.graph, self.sort = graph, sort
        self.kinds: dict[str, str] = {}
        self.rows: dict[str, _Row] = {}
        self.body = _Body()
        self.x: str | None = None
        self.weights: str | None = None
        self.tensors: dict[str, str] = {}  # by value: the body's name
        self.experts: int | None = None
        self.slots = 0
        self.at: Op | None = None
        self.ids = sort.operands[0]
        self.count = graph.values[self.ids].shape[0] if graph.values[self.ids].shape else 0

    def run(self, following: Sequence[Op]) -> _Found | None:
        sort, values = self.sort, self.graph.values
        dim, descending = SORTS[sort.target]
        if len(values[self.ids].shape) != 1 or sort.arg(dim, "dim", -1) not in (0, -1) or sort.arg(descending, "descending", False):
            return None
        if values[self.ids].dtype not in ("int64", "int32"):
            return None
        self.kinds[self.ids] = "ids"
        self.kinds |= zip(sort.outputs, ("permutation",) if "argsort" in sort.target else ("sorted", "permutation"), strict=True)
        self.slots = next((slots for op in following if (slots := self.divided_by(op)) and self.count % slots == 0), 0)
        if not self.slots:
            return None
        try:
            result = self.interpret(following)
        except _NotExperts:
            return None
        if result is None or self.x is None or self.at is None:
            return None
        returned = {item.value for item in self.graph.outputs}
        if any(name in returned for name in self.rows):
            return None
        name, row = result
        listed = tuple(self.tensors)
        body = self.body.done(row.body, [values[item] for item in listed])
        ids = self.unmerged(self.ids)
        weights = None if self.weights is None else self.unmerged(self.weights)
        return _Found(name, self.x, ids, weights, listed, body, self.slots, self.at.module, self.at.source)

    def interpret(self, following: Sequence[Op]) -> tuple[str, _Row] | None:
        result = None
        for op in following:
            reads_rows = any(name in self.rows for name in op.operands)
            if not reads_rows and not any(name in self.kinds for name in op.operands):
                continue
            if self.indices(op):
                continue
            row = self.summed(op)
            if row is not None:
                if result is not None:
                    raise _NotExperts
                result = op.outputs[0], row
            elif not (self.taken(op) or self.brought_back(op) or self.product(op) or (reads_rows and self.on_rows(op))) and reads_rows:
                raise _NotExperts
        return result

    def divided_by(self, op: Op) -> int:
        """By what the permutation is divided to give the token of a row: so many experts a token."""
        if op.target not in ("aten.floor_divide.default", "aten.div.Tensor_mode") or self.kind(op.args[0]) != "permutation":
            return 0
        floor = op.target == "aten.floor_divide.default" or op.arg(2, "rounding_mode") == "floor"
        return op.args[1] if floor and isinstance(op.args[1], int) else 0

    # ---- what is known of values ---------------------------------------------------------------------------------------------------

    def kind(self, arg: Arg) -> str:
        return self.kinds.get(arg.name, "") if isinstance(arg, Ref) else ""

    def row(self, arg: Arg) -> _Row | None:
        return self.rows.get(arg.name) if isinstance(arg, Ref) else None

    def shape(self, arg: Arg) -> tuple[int, ...]:
        return self.graph.values[arg.name].shape if isinstance(arg, Ref) else ()

    def made_by(self, arg: Arg, targets: frozenset[str]) -> bool:
        producer = self.graph.producers.get(arg.name) if isinstance(arg, Ref) else None
        return producer is not None and producer.target in targets

    def zeros(self, arg: Arg) -> bool:
        producer = self.graph.producers.get(arg.name) if isinstance(arg, Ref) else None
        if producer is None:
            return False
        return producer.target in ZEROS or (producer.target in ("aten.full.default", "aten.full_like.default") and producer.args[1] == 0)

    def unmerged(self, name: str) -> str:
        """The value `(n, k)` of which `name` is all rows, or `name` itself."""
        producer = self.graph.producers.get(name)
        if producer is not None and producer.target in ("aten.view.default", "aten.unsqueeze.default"):
            source = producer.operands[0]
            shape = self.graph.values[source].shape
            if shape == (self.count // self.slots, self.slots):
                return source
            if len(shape) < len(self.graph.values[name].shape) and shape[:1] == (self.count,):
                return self.unmerged(source)
        return name

    def known_experts(self, count: int) -> bool:
        self.experts = count if self.experts is None else self.experts
        return self.experts == count

    # ---- steps ----------------------------------------------------------------------------------------------------------------------

    def indices(self, op: Op) -> bool:
        """Arithmetic on ids and positions."""
        args, target = op.args, op.target
        kind = self.kind(args[0]) if args else ""
        found = ""
        if target == "aten.index.Tensor" and kind == "ids" and self.index(op) == "permutation":
            found = "sorted"
        elif slots := self.divided_by(op):
            found = "token" if slots == self.slots else ""
        elif target in _CASTS and kind in ("ids", "sorted", "counts", "ends"):
            found = kind
        elif target == "aten.histc.default" and kind in ("ids", "sorted"):
            bins, low, high = op.arg(1, "bins", 100), op.arg(2, "min", 0), op.arg(3, "max", 0)
            if isinstance(bins, int) and (low, high) == (0, bins - 1) and self.known_experts(bins):
                found = "counts"
        elif target == "aten.one_hot.default" and kind in ("ids", "sorted"):
            found = "hot" if isinstance(args[1], int) and self.known_experts(args[1]) else ""
        elif target == "aten.sum.dim_IntList" and kind == "hot" and op.arg(1, "dim") == (0,) and not op.arg(2, "keepdim", False):
            found = "counts"
        elif target == "aten.cumsum.default" and kind == "counts" and op.arg(1, "dim") in (0, -1):
            found = "ends"
        elif target in SORTS and kind == "permutation" and not op.arg(SORTS[target][1], "descending", False):
            self.kinds[op.outputs[-1]] = "inverse"
            return True
        elif self.inverts(op):
            found = "inverse"
        if found:
            self.kinds[op.outputs[0]] = found
        return bool(found)

    def inverts(self, op: Op) -> bool:
        """Whether `op` writes 0, 1, ... at the places that the permutation says."""
        if op.target == "aten.index_put.default" and self.index(op) == "permutation" and not op.arg(3, "accumulate", False):
            numbers = op.args[2]
        elif op.target == "aten.scatter.src" and op.args[1] in (0, -1) and self.kind(op.args[2]) == "permutation":
            numbers = op.args[3]
        else:
            return False
        return isinstance(numbers, Ref) and counts_up(self.graph, numbers.name, self.count) and self.shape(op.args[0]) == (self.count,)

    def index(self, op: Op) -> str:
        """The kind of the only index of `index(x, [index])` or `index_put`."""
        places = op.args[1]
        return self.kind(places[0]) if isinstance(places, tuple) and len(places) == 1 else ""

    def picks(self, op: Op) -> tuple[Arg, str]:
        """What is picked along the leading dim, and by which kind of index."""
        if op.target == "aten.index.Tensor":
            return op.args[0], self.index(op)
        if op.target == "aten.index_select.default" and op.args[1] == 0:
            return op.args[0], self.kind(op.args[2])
        return None, ""

    def taken(self, op: Op) -> bool:
        """Rows of tokens, weights or experts in the order of the experts."""
        source, by = self.picks(op)
        if not by or not isinstance(source, Ref) or source.name in self.rows:
            return False
        value, result = self.graph.values[source.name], self.graph.values[op.outputs[0]]
        if by == "token" and len(value.shape) == 2 and value.shape[0] * self.slots == self.count:
            if self.x not in (None, source.name):
                raise _NotExperts
            self.x = source.name
            name = self.body.input(experts.X, (1, value.shape[1]), value.dtype)
        elif by == "permutation" and value.shape in ((self.count,), (self.count, 1)):
            name = self.weight(source.name)
            if len(value.shape) == 2:
                (name,) = self.body.put("aten.unsqueeze.default", (Ref(name), -1), (), (result,))
        elif by == "sorted" and len(value.shape) == 2 and self.known_experts(value.shape[0]):
            args = (Ref(self.tensor(source.name)), self.expert())
            (name,) = self.body.put(experts.ROWS, args, (), (result,))
        else:
            return False
        self.rows[op.outputs[0]] = _Row(name, sorted=True)
        return True

    def weight(self, name: str) -> str:
        name = self.unmerged(name)
        if self.weights not in (None, name):
            raise _NotExperts
        self.weights = name
        return self.body.input(experts.WEIGHT, (1,), self.graph.values[name].dtype)

    def tensor(self, name: str) -> str:
        if name not in self.tensors:
            value = self.graph.values[name]
            self.tensors[name] = self.body.input(experts.tensor(len(self.tensors)), value.shape, value.dtype)
        return self.tensors[name]

    def expert(self) -> Ref:
        return Ref(self.body.input(experts.EXPERT, (1,), "int64"))

    def product(self, op: Op) -> bool:
        """One product an expert."""
        if op.target not in PRODUCTS:
            return False
        row, matrix, ends = self.row(op.args[0]), op.args[1], op.arg(2, "offs")
        if row is None or not row.sorted or not isinstance(matrix, Ref) or self.kind(ends) != "ends" or op.arg(3, "bias") is not None:
            return False
        shape = self.shape(matrix)
        if len(shape) != 3 or not self.known_experts(shape[0]):
            return False
        producer, transposed = self.graph.producers.get(matrix.name), False
        if producer is not None and producer.target == "aten.transpose.int":
            transposed = {dim % 3 for dim in producer.args[1:3] if isinstance(dim, int)} == {1, 2}
        name = producer.operands[0] if transposed and producer is not None else matrix.name
        args = (Ref(row.body), Ref(self.tensor(name)), self.expert(), transposed)
        (made,) = self.body.put(experts.LINEAR, args, (), (self.graph.values[op.outputs[0]],))
        self.rows[op.outputs[0]] = _Row(made, sorted=True)
        self.at = self.at or op
        return True

    def brought_back(self, op: Op) -> bool:
        """Rows in the order in which they came."""
        if op.target == "aten.view.default" and (row := self.row(op.args[0])) and not row.sorted:
            before, after = self.shape(op.args[0]), self.graph.values[op.outputs[0]].shape
            if row.in_slots or before[0] != self.count or after[2:] != before[1:] or len(after) < 2 or after[1] != self.slots:
                return False
            self.rows[op.outputs[0]] = replace(row, in_slots=True)
            return True
        source, by = self.picks(op)
        row = self.row(source)
        if op.target == "aten.index_put.default" and self.index(op) == "permutation" and not op.arg(3, "accumulate", False):
            row, by = self.row(op.args[2]), "inverse"
            if row is None or self.shape(op.args[0]) != self.shape(op.args[2]):
                return False
        if by != "inverse" or row is None or not row.sorted:
            return False
        self.rows[op.outputs[0]] = replace(row, sorted=False)
        return True

    def summed(self, op: Op) -> _Row | None:
        """The sum over the rows of every token."""
        if op.target == "aten.sum.dim_IntList":
            row = self.row(op.args[0])
            if row is None or not row.in_slots or op.kwarg("dtype") is not None or op.arg(2, "keepdim", False):
                return None
            return row if op.arg(1, "dim") in ((1,), (-2,)) and len(self.shape(op.args[0])) == 3 else None
        if op.target == "aten.index_add.default" and self.zeros(op.args[0]) and op.args[1] == 0 and op.arg(4, "alpha", 1) == 1:
            row = self.row(op.args[3])
            tokens = self.count // self.slots
            if row is not None and row.sorted and self.kind(op.args[2]) == "token" and self.shape(op.args[0])[0] == tokens:
                return row if len(self.shape(op.args[3])) == 2 else None
        return None

    def on_rows(self, op: Op) -> bool:
        """An operation that treats every row alone, written into the body."""
        if op.target.startswith("autopar.") or op.target in RANDOM or op.target not in RULES:
            return False
        rows = [self.rows[name] for name in op.operands if name in self.rows]
        order = {(row.sorted, row.in_slots) for row in rows}
        if len(order) > 1:
            return False
        in_slots = rows[0].in_slots
        if any(name not in self.rows for name in op.operands):
            return self.weighted(op)
        if in_slots:
            return False
        outputs = [self.graph.values[name] for name in op.outputs]
        if not self.row_by_row(op, outputs):
            return False
        target, args = op.target, op.args
        if (
            target in ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.split.sizes")
            and len({item.shape for item in outputs}) == 1
        ):
            target, args = "aten.chunk.default", (args[0], len(outputs), op.arg(2, "dim", 0))
        elif target in LOCAL_ARGS and target not in (*_PARTS, "aten.slice.Tensor"):
            return False
        kwargs = op.kwargs if target == op.target else ()
        made = self.body.put(target, tuple(map(self.in_body, args)), tuple((key, self.in_body(arg)) for key, arg in kwargs), outputs)
        for name, new in zip(op.outputs, made, strict=True):
            self.rows[name] = _Row(new, rows[0].sorted)
        return True

    def in_body(self, arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return Ref(self.rows[arg.name].body)
        return tuple(map(self.in_body, arg)) if isinstance(arg, tuple) else arg

    def row_by_row(self, op: Op, outputs: Sequence[Value]) -> bool:
        operands = tuple(self.graph.values[name] for name in op.operands)
        if any(value.shape[:1] != (self.count,) for value in (*operands, *outputs)):
            return False
        nest = RULES[op.target](Call(op, operands, tuple(outputs)))
        if nest is None:
            return False
        leading = {term[0] for term in (*nest.operands, *nest.outputs)}
        group = leading.pop()
        return not leading and len(group) == 1 and group[0] not in nest.whole

    def weighted(self, op: Op) -> bool:
        """Rows that are back in their order, times the weights in that order: `(n k, 1)`, or `(n, k, 1)` where rows are `(n, k, ...)`."""
        if op.target != "aten.mul.Tensor" or len(op.operands) != 2:
            return False
        first = op.operands[0] in self.rows
        mine, other = op.operands if first else op.operands[::-1]
        row, shape = self.rows[mine], self.graph.values[other].shape
        if row.sorted or self.graph.values[op.outputs[0]].shape != self.graph.values[mine].shape:
            return False
        if shape != ((self.count // self.slots, self.slots, 1) if row.in_slots else (self.count, 1)):
            return False
        producer = self.graph.producers.get(other)
        if producer is None or producer.target not in ("aten.unsqueeze.default", "aten.view.default"):
            return False
        source = producer.operands[0]
        if self.graph.values[source].shape not in ((self.count // self.slots, self.slots), (self.count,)):
            return False
        result = self.graph.values[op.outputs[0]]
        weight = self.weight(source)
        given = self.body.values[weight]
        (column,) = self.body.put("aten.unsqueeze.default", (Ref(weight), -1), (), (Value("", (1, 1), given.dtype),))
        flat = Value("", (1, *result.shape[2 if row.in_slots else 1 :]), result.dtype)
        (made,) = self.body.put("aten.mul.Tensor", (Ref(row.body), Ref(column)), (), (flat,))
        self.rows[op.outputs[0]] = replace(row, body=made)
        return True
