"""Writes down the body of microbatches and the prologue, as `microbatch_ways` chose them."""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph import Arg, Graph, Input, Op, Output, Ref, Symbol, Value
from autopar.ir.pipelining.microbatch_ways import CROSS_ENTROPY, DROPOUT, MEAN, SQUEEZE, Choices
from autopar.ir.placement import Kind, P, Placement, R
from autopar.ir.rules.local_args import LOCAL_ARGS, local_args
from autopar.ir.rules.split import Split

PROLOGUE = "@"
"""First letter of the paths of inputs that the prologue computes."""

TARGET_WEIGHT = "autopar.target_weight"


class Writer:
    """Writes down what was decided: the body's and the prologue's graph."""

    def __init__(self, choices: Choices) -> None:
        self.choices, self.graph, self.count = choices, choices.graph, choices.count
        self.taken = set(choices.graph.values) | {op.name for op in choices.graph.ops}
        self.names: dict[tuple[str, Placement], str] = {}
        self.values: dict[str, Value] = {}
        self.inputs: list[Input] = []
        self.placed: dict[str, Placement] = {}
        self.ops: list[Op] = []
        self.prologue = _Prologue(choices.graph)

    def write(self) -> tuple[Graph | None, Graph, dict[str, Placement]]:
        """The prologue, the body, and how microbatches take the body's inputs."""
        graph, choices = self.graph, self.choices
        for name, kind in graph.source_kind.items():
            if kind != "input":
                self.define(name, name, R)
        for item in graph.inputs:
            self.take(item, next(iter(choices.ways[item.value])))
        for name in graph.source_kind:
            self.further(name, "the model", "")
        for op in graph.ops:
            for split, reads in choices.instances[op.name].items():
                self.run(op, split, reads)
            for name in op.outputs:
                self.further(name, op.module, op.source)
        outputs = tuple(Output(self.names[item.value, state], item.path) for item, state in zip(graph.outputs, choices.joined, strict=True))
        written = replace(graph, values=self.values, inputs=tuple(self.inputs), ops=tuple(self.ops), outputs=outputs)
        return self.prologue.graph(), written, self.placed

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
        wanted, ways = self.choices.wanted.get(value, {}), self.choices.ways[value]
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
        if split.implementation == SQUEEZE:
            self.ops.append(replace(written, target="aten.view.default", args=(Ref(operands[0]), shapes[0]), kwargs=()))
            return
        if split.implementation == MEAN:
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
        if producer is not None and producer.target == CROSS_ENTROPY and value == producer.outputs[1]:
            given = self.whole.values[value]
            ignored = producer.arg(2, "ignore_index", -100)
            args = (Ref(producer.operands[1]), ignored, Symbol(f"torch.{given.dtype}"))
            self.add(Op(value, TARGET_WEIGHT, args, (), (value,), producer.module, producer.source), given)
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
            whole.rules,
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
