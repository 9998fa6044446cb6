"""From a graph and the splits chosen for its operations to the straight-line program of one rank.

The program is an `fx.GraphModule` of plain operator calls on local tensors: sizes, parts and groups are constants in it, and
nothing is looked up while it runs. Conversions stand where a reader first needs them, and are shared by all who need the same.

Its arguments are, in order: the tensors of `graph.inputs`, `parameters`, `buffers` and `constants`, what a pipeline stage receives
(in the order of its `autopar.receive` operations), then dropout's `counter`. It returns the tensors of `graph.outputs`, then the new
values of the buffers that are updated, then what a stage sends (in the order of its `autopar.send` operations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import getitem
from typing import Any

import torch
from torch import fx

from autopar.ir.assignment import Assignment
from autopar.ir.conversion import State
from autopar.ir.graph import Arg, Graph, Op, Ref, Symbol
from autopar.ir.placement import RP, Placement, R, local_shape
from autopar.ir.rules import given_rule, has_rule
from autopar.ir.rules.local_args import local_args
from autopar.ir.rules.local_context import AxisContext, LocalContext
from autopar.ir.rules.neighbours import RECEIVE, SEND
from autopar.ir.rules.operators import operator
from autopar.ir.tracing.leaf_modules import LEAF, LeafModule
from autopar.runtime.convert import Place, convert, convert_value, local_steps
from autopar.runtime.operators import dropout, leaf
from autopar.runtime.operators.alike import Draw, draws
from autopar.runtime.operators.local_ops import LOCAL_OPS
from autopar.runtime.recompute import Around, folded

Hook = Callable[[], None]
ATTENTION = "aten.scaled_dot_product_attention.default"


@dataclass(frozen=True, slots=True)
class Hooks:
    """What to call around operations, by their position in the graph: `before` and `after` without arguments, `watch` with each result
    of the operation that may carry a gradient. For regions that are recomputed: `again` as `before`, at all that a recomputation may
    begin with; `recomputing` is entered around every recomputation."""

    before: Mapping[int, tuple[Hook, ...]] = field(default_factory=dict)
    after: Mapping[int, tuple[Hook, ...]] = field(default_factory=dict)
    watch: Mapping[int, tuple[Callable[[Any], None], ...]] = field(default_factory=dict)
    again: Mapping[int, tuple[Hook, ...]] = field(default_factory=dict)
    recomputing: Around | None = None


@dataclass(frozen=True, slots=True)
class Mode:
    """Which behaviour of a traced model to lower: with `dropout` or without, batch norm by the batch's `statistics` or the running ones."""

    dropout: bool = True
    statistics: bool = True


@dataclass(frozen=True, slots=True)
class Borders:
    """The states in which a program's arguments come and its results go. `parameters` by value name; `outputs` by position."""

    inputs: Mapping[str, State]
    parameters: Mapping[str, State]
    outputs: tuple[State, ...]


def lower(
    graph: Graph,
    assignment: Assignment,
    place: Place,
    borders: Borders,
    device: torch.device,
    mode: Mode = Mode(),
    hooks: Hooks = Hooks(),
    recompute: Sequence[range] = (),
    drawn: Mapping[str, Draw] | None = None,
    leaf_modules: Mapping[str, LeafModule] | None = None,
) -> fx.GraphModule:
    """The program of the rank at `place`. `recompute`: positions in the graph of regions whose activations are computed again.

    `drawn`: how operations draw random numbers, by name; by default as `draws(graph)` says. Graphs that are parts of one (the stages of
    a pipeline) need the draws of the whole, or equal positions would draw equal masks. `leaf_modules`: the bodies of the graph's leaves,
    by path.
    """
    lowering = _Lowering(graph, assignment, place, borders, device, mode, hooks, drawn)
    lowering.leaf_modules = leaf_modules or {}
    lowering.region_at = {index: number for number, region in enumerate(recompute) for index in region}
    return lowering.run()


@lru_cache(maxsize=4096)
def _takes_device(target: str) -> bool:
    schema = operator(target)._schema  # type: ignore[attr-defined]
    return any(argument.name == "device" for argument in schema.arguments)


@lru_cache(maxsize=4096)
def _argument_place(target: str, name: str) -> int | None:
    """The position of argument `name` of the operator `target`, if it has one."""
    names = [argument.name for argument in operator(target)._schema.arguments]  # type: ignore[attr-defined]
    return names.index(name) if name in names else None


@lru_cache(maxsize=4096)
def _may_draw(target: str) -> bool:
    return not target.startswith("autopar.") and torch.Tag.nondeterministic_seeded in operator(target).tags  # type: ignore[attr-defined]


def _draws(target: str, args: tuple[Any, ...]) -> bool:
    """Whether the operator draws from the default generator with these arguments. Attention and recurrent layers do for dropout alone."""
    if not _may_draw(target) or target == ATTENTION:
        return False
    place = _argument_place(target, "dropout")
    return place is None or args[place] > 0


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        assignment: Assignment,
        place: Place,
        borders: Borders,
        device: torch.device,
        mode: Mode,
        hooks: Hooks,
        drawn: Mapping[str, Draw] | None,
    ) -> None:
        self.graph, self.assignment, self.place, self.borders = graph, assignment, place, borders
        self.device, self.mode, self.hooks = device, mode, hooks
        self.drawn = draws(graph) if drawn is None else drawn
        self.sent: list[fx.Node] = []
        self.fx = fx.Graph()
        self.nodes: dict[tuple[str, State], fx.Node] = {}
        self.home: dict[str, State] = {}
        self.leaf_modules: Mapping[str, LeafModule] = {}
        self.region_at: dict[int, int] = {}
        self.region: dict[fx.Node, int] = {}
        self.position = -1

    def run(self) -> fx.GraphModule:
        graph, whole = self.graph, (R,) * len(self.place.mesh)
        for index, item in enumerate(graph.inputs):
            self.define(item.value, self.borders.inputs.get(item.value, whole), self.fx.placeholder(f"input_{index}"))
        for index, parameter in enumerate(graph.parameters):
            self.define(parameter.value, self.borders.parameters[parameter.value], self.fx.placeholder(f"parameter_{index}"))
        for index, buffer in enumerate(graph.buffers):
            self.define(buffer.value, whole, self.fx.placeholder(f"buffer_{index}"))
        for index, constant in enumerate(graph.constants):
            self.define(constant.value, whole, self.fx.placeholder(f"constant_{index}"))
        received = [op for op in graph.ops if op.target == RECEIVE]
        for index, op in enumerate(received):
            self.define(op.outputs[0], self.assignment.output_states(op)[0], self.fx.placeholder(f"received_{index}"))
        self.counter = self.fx.placeholder("counter")
        for buffer in graph.buffers:
            if buffer.updated is not None and self.region_at:  # what is computed again must find it as it was
                self.define(buffer.value, whole, self.call(torch.clone, self.nodes[buffer.value, whole]))
        for index, op in enumerate(graph.ops):
            self.position = index
            for hook in self.hooks.before.get(index, ()):
                self.call(hook)
            for hook in self.hooks.again.get(index, ()) if index in self.region_at else ():
                self.call(hook)
            self.operation(index, op)
            for watch in self.hooks.watch.get(index, ()):
                for name in op.outputs:
                    if graph.values[name].requires_grad:
                        self.call(watch, self.nodes[name, self.home[name]])
            for hook in self.hooks.after.get(index, ()):
                self.call(hook)
        self.position = len(graph.ops)
        results = [self.read(item.value, state) for item, state in zip(graph.outputs, self.borders.outputs, strict=True)]
        results += [self.read(buffer.updated, whole) for buffer in graph.buffers if buffer.updated is not None]
        self.fx.output((*results, *self.sent))
        if self.region:
            return folded(self.fx, self.region, self.hooks.recomputing)
        return fx.GraphModule(torch.nn.Module(), self.fx)

    # ---- values ---------------------------------------------------------------------------------------------------------------

    def plain(self, value: str, state: State) -> State:
        """`state` without differences that mean nothing: on axes of size 1, and between `R` and `R/P` where there is no gradient."""
        differentiable = self.graph.values[value].requires_grad

        def one(placement: Placement, size: int) -> Placement:
            return R if size == 1 or (placement == RP and not differentiable) else placement

        return tuple(one(placement, size) for placement, size in zip(state, self.place.mesh, strict=True))

    def define(self, value: str, state: State, node: fx.Node) -> None:
        state = self.plain(value, state)
        self.home[value] = state
        self.nodes[value, state] = node

    def read(self, value: str, state: State) -> fx.Node:
        """The node of `value` in `state`; converted, once, where it is not defined so."""
        state = self.plain(value, state)
        if (value, state) not in self.nodes:
            home, found = self.home[value], self.graph.values[value]
            node = self.nodes[value, home]
            for step in local_steps(home, state, found.shape, self.place):
                if found.requires_grad:
                    node = self.call(convert, node, *step.arguments())
                elif step.forward != "nothing":
                    node = self.call(convert_value, node, *step.arguments())
            self.nodes[value, state] = node
        return self.nodes[value, state]

    def shape(self, value: str, state: State) -> tuple[int, ...]:
        return self.place.local_shape(self.graph.values[value].shape, state)

    # ---- operations -----------------------------------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.fx.call_function(target, args, kwargs)
        if self.position in self.region_at:
            self.region[node] = self.region_at[self.position]
        return node

    def operation(self, index: int, op: Op) -> None:
        if op.target == RECEIVE:
            return
        wanted, made = self.assignment.operand_states(op), self.assignment.output_states(op)
        if op.target == SEND:
            self.sent.append(self.read(op.operands[0], wanted[0]))
            return
        if op.target == "autopar.reshard":
            self.define(op.outputs[0], wanted[0], self.read(op.operands[0], wanted[0]))
            return
        if op.target == "autopar.dropout" and not self.mode.dropout:
            self.define(op.outputs[0], made[0], self.read(op.operands[0], wanted[0]))
            return
        # Without running statistics the batch's serve in evaluation too.
        if op.target == "autopar.batch_norm" and not self.mode.statistics and op.args[3] is not None:
            self.evaluate_batch_norm(op, wanted, made)
            return
        operands = [self.read(name, state) for name, state in zip(op.operands, wanted, strict=True)]
        inputs = tuple(self.shape(name, state) for name, state in zip(op.operands, wanted, strict=True))
        outputs = tuple(self.shape(name, state) for name, state in zip(op.outputs, made, strict=True))
        arguments, keywords = local_args(op, inputs, outputs)
        slots = iter(operands)  # arguments hold their references in the order of `op.operands`
        args = tuple(_concrete(argument, slots) for argument in arguments)
        kwargs = {name: _concrete(argument, slots) for name, argument in keywords}
        if op.target == ATTENTION and not self.mode.dropout:
            args, kwargs = _without_dropout(args, kwargs)
        elif not self.mode.dropout and _may_draw(op.target) and (place := _argument_place(op.target, "dropout")) is not None:
            args = (*args[:place], 0.0, *args[place + 1 :])  # recurrent layers
        self.results(op, made, self.invoke(index, op, wanted, args, kwargs))

    def invoke(self, index: int, op: Op, wanted: tuple[State, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """The call of `op` on local operands, or of what stands in for it on the ranks of the axes that split it."""
        if op.target == "autopar.dropout":
            return self.call(dropout.dropout, *args, self.part(index, wanted[0]), self.counter)
        if op.target == ATTENTION and _dropout_p(args, kwargs) > 0:
            return self.call(dropout.attention, self.part(index, wanted[0]), self.counter, *args, **kwargs)
        if op.target == LEAF:
            shapes = [self.shape(name, state) for name, state in zip(op.outputs, self.assignment.output_states(op), strict=True)]
            part = self.part(index, wanted[-1] if wanted else (R,) * len(self.place.mesh))
            function = leaf.body(self.leaf_modules[op.module], self.mode.statistics, shapes, self.device)
            return self.call(function, part, self.draw(index).seed, self.counter, *args)
        special = self.special(op)
        if special is not None:
            return self.call(special, *args, **kwargs)
        if not op.operands and _takes_device(op.target):
            kwargs["device"] = self.device
        if _draws(op.target, args) or self.may_be_random(op):
            part = self.part(index, wanted[0] if wanted else (R,) * len(self.place.mesh))  # recurrent layers draw for their rows alone
            return self.call(dropout.drawing, operator(op.target), self.device, part, self.draw(index).seed, self.counter, *args, **kwargs)
        return self.call(operator(op.target), *args, **kwargs)

    def may_be_random(self, op: Op) -> bool:
        """Whether `op` is the user's and nobody has found it to be a function of its operands: it runs whole, and where it draws random
        numbers, every rank must draw the same."""
        if op.target.startswith(("aten.", "autopar.")) or has_rule(op.target):
            return False
        rule = given_rule(self.graph, op)
        return rule is None or rule.whole

    def draw(self, index: int) -> Draw:
        """How the operation at `index` draws. One that the whole graph has not, a part of one that it has, draws by its position."""
        return self.drawn.get(self.graph.ops[index].name, Draw(index, index))

    def special(self, op: Op) -> Callable[..., Any] | None:
        """The local implementation that the splits of `op` ask for, on the axes of more than one rank."""
        choice, place = self.assignment.choices[op.name], self.place
        axes = [axis for axis, split in enumerate(choice) if split.implementation and place.mesh[axis] > 1]
        if not axes:
            return None
        names = {choice[axis].implementation for axis in axes}
        assert len(names) == 1, f"`{op.name}`: {sorted(names)} cannot run together"
        name = names.pop()
        shapes = tuple(self.graph.values[operand].shape for operand in op.operands)
        context = LocalContext(
            op.target,
            shapes,
            tuple(AxisContext(place.groups[axis], place.mesh[axis], place.coordinate[axis], choice[axis].name) for axis in axes),
            tuple(local_shape(shape, state, place.mesh) for shape, state in zip(shapes, self.assignment.operand_states(op), strict=True)),
        )
        function = LOCAL_OPS[name]

        def special(*args: Any, **kwargs: Any) -> Any:
            return function(args, kwargs, context)

        special.__name__ = name
        return special

    def results(self, op: Op, made: tuple[State, ...], node: fx.Node) -> None:
        """Name what `op` returns: a tensor, or one node per tensor of a list or tuple."""
        if len(op.outputs) == 1 and not _returns_sequence(op):
            self.define(op.outputs[0], made[0], node)
            return
        for position, (name, state) in enumerate(zip(op.outputs, made, strict=True)):
            self.define(name, state, self.call(getitem, node, position))

    def evaluate_batch_norm(self, op: Op, wanted: tuple[State, ...], made: tuple[State, ...]) -> None:
        """`autopar.batch_norm` by its running statistics, which stay as they are. Only the weight and bias are coupled over a split
        batch now: their gradients become terms of a sum."""
        apart = tuple(split.outputs[0].is_shard and split.outputs[0].dim != 1 for split in self.assignment.choices[op.name])
        terms = [tuple(RP if split else placement for split, placement in zip(apart, state, strict=True)) for state in wanted]
        x, weight, bias, mean, variance, *_ = op.args
        slots = iter([self.read(n, w if i in (0, 3, 4) else t) for i, (n, w, t) in enumerate(zip(op.operands, wanted, terms, strict=True))])
        args = [_concrete(argument, slots) for argument in (x, weight, bias, mean, variance)]
        result = self.call(torch.nn.functional.batch_norm, args[0], args[3], args[4], args[1], args[2], False, 0.0, op.args[6])
        self.define(op.outputs[0], made[0], result)
        for name, state, node in zip(op.outputs[1:], made[1:], args[3:], strict=True):
            self.define(name, state, node)

    def part(self, index: int, state: State) -> int:
        """A number for the operation at `index` and the part of a value in `state` that this rank holds. Meshes of different sizes
        share no number: the operation's stands in the upper half, the part's in the lower."""
        number = self.draw(index).number << 32
        offset = 0
        for placement, size, coordinate in zip(state, self.place.mesh, self.place.coordinate, strict=True):
            offset = offset * size + (coordinate if placement.is_shard else 0)
        return number + offset


def _concrete(argument: Arg, slots: Iterator[fx.Node]) -> Any:
    """An argument as PyTorch takes it; references take the next of `slots`."""
    if isinstance(argument, Ref):
        return next(slots)
    if isinstance(argument, Symbol):
        return getattr(torch, argument.name.removeprefix("torch."))
    if isinstance(argument, tuple):
        return [_concrete(item, slots) for item in argument]
    return argument


def _returns_sequence(op: Op) -> bool:
    if op.target.startswith("autopar."):
        return len(op.outputs) > 1 or op.target == LEAF
    returns = operator(op.target)._schema.returns  # type: ignore[attr-defined]
    return len(returns) > 1 or "[]" in str(returns[0].type) or "List" in str(returns[0].type)


def _dropout_p(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    return float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))


def _without_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*args[:4], *((0.0,) if len(args) > 4 else ()), *args[5:]), {
        name: value for name, value in kwargs.items() if name != "dropout_p"
    }
