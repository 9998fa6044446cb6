"""Puts copies of a layer's operations in place of the `repeat` markers that `trace_repeats` left in a lowered program."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import Node

from autopar.ir.graph import Arg, Buffer, Graph, Op, Output, Parameter, Ref, Value
from autopar.ir.tracing.trace_lower import bare_path
from autopar.ir.tracing.trace_repeats import ENTER, LEAVE, REPEAT, Call, Recording, Uncertain

MARKERS = frozenset({ENTER, LEAVE, REPEAT})


def refuse_unsafe(program: ExportedProgram) -> None:
    """Raise `Uncertain` where `program`, not yet made functional, shows that markers stand between things that belong together.

    That is: a tensor between two chained repeats, which the tracer has not seen made, is read elsewhere (it then is a constant, and torch
    must not get to compute with it); or something is changed in place that went through a marker, which has hidden who else sees it.
    """
    for name in program.graph_signature.inputs_to_lifted_tensor_constants.values():
        if isinstance(program.constants[name], FakeTensor):
            raise Uncertain("a tensor between two repeats is read elsewhere")
    module = program.graph_module
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), FakeTensor):
            raise Uncertain("a tensor between two repeats is read elsewhere")
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            base = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            while isinstance(base, Node):
                if str(base.target) in MARKERS:
                    raise Uncertain(f"{node} changes what goes through a repeated module in place")
                if any(str(user.target) in MARKERS and order[user] < order[node] for user in base.users):
                    raise Uncertain(f"{node} changes in place what a repeated module has read")
                returns = getattr(getattr(base.target, "_schema", None), "returns", ())
                is_view = base.op == "call_function" and (not returns or any(item.alias_info is not None for item in returns))
                base = base.args[0] if is_view and base.args else None


def expand(graph: Graph, recording: Recording) -> Graph:
    """`graph` without markers.

    Raises `Uncertain` if the operations between `enter` and `leave` depend on more than what went in, or if anything but what came out
    is read elsewhere.
    """
    return _Expansion(graph, recording).run()


@dataclass(slots=True)
class _Body:
    """What one module does: from the values `given` to the values `results`, changing the `updates` of its buffers."""

    path: str
    ops: tuple[Op, ...]
    given: tuple[str, ...]
    results: tuple[str, ...]
    owned: dict[str, str]
    updates: dict[str, str]


class _Expansion:
    def __init__(self, graph: Graph, recording: Recording) -> None:
        self.graph, self.recording = graph, recording
        self.values = dict(graph.values)
        self.ops: list[Op] = []
        self.stands_for: dict[str, str] = {}
        state: list[Parameter | Buffer] = [*graph.parameters, *graph.buffers]
        self.fqn_of = {item.value: item.fqn for item in state}
        self.state_value = {item.fqn: item.value for item in state}
        self.updated = {item.fqn: item.updated for item in graph.buffers if item.updated is not None}
        self.constants = {item.value for item in graph.constants}

    def run(self) -> Graph:
        graph = self.graph
        bodies = {number: self.body(number) for number, call in self.recording.calls.items() if call.template == number}
        updated = dict(self.updated)
        for op in graph.ops:
            if op.target in (ENTER, LEAVE):
                for name, source in zip(op.outputs, self.sources(op), strict=True):
                    self.stands_for[name] = source
                    del self.values[name]
            elif op.target == REPEAT:
                updated |= self.chain(op, bodies)
            else:
                self.ops.append(_read(op, self.stands_for))
        new = self.stands_for
        return replace(
            graph,
            values=self.values,
            ops=tuple(self.ops),
            buffers=tuple(
                replace(item, updated=new.get(updated[item.fqn], updated[item.fqn])) if item.fqn in updated else item
                for item in graph.buffers
            ),
            outputs=tuple(Output(new.get(item.value, item.value), item.path) for item in graph.outputs),
        )

    def sources(self, marker: Op) -> list[str]:
        return [self.stands_for.get(name, name) for name in marker.operands]

    def body(self, number: int) -> _Body:
        """The operations between the markers of call `number`, checked to be closed."""
        path = self.recording.calls[number].path
        places = {op.target: index for index, op in enumerate(self.graph.ops) if op.target in (ENTER, LEAVE) and op.args[1] == number}
        if places.keys() != {ENTER, LEAVE}:
            raise Uncertain(f"{path}: its inputs or its outputs are not used")
        enter, leave = self.graph.ops[places[ENTER]], self.graph.ops[places[LEAVE]]
        ops = self.graph.ops[places[ENTER] + 1 : places[LEAVE]]
        inner = {name for op in ops for name in op.outputs}
        allowed = inner | set(enter.outputs)
        owned: dict[str, str] = {}
        for op in (*ops, leave):
            for name in op.operands:
                if name in self.fqn_of and self.fqn_of[name].startswith(f"{path}."):
                    owned[name] = self.fqn_of[name].removeprefix(path)
                elif name not in allowed and name not in self.constants:
                    raise Uncertain(f"{path} reads `{name}`, which is not among its arguments")
            if op.target in MARKERS and op is not leave:
                raise Uncertain(f"{path} holds another repeated module")
        for op in [*self.graph.ops[: places[ENTER]], *self.graph.ops[places[LEAVE] + 1 :]]:
            if any(name in allowed for name in op.operands):
                raise Uncertain(f"{op.name} reads inside of {path}")
        if any(item.value in allowed for item in self.graph.outputs):
            raise Uncertain(f"the model returns something from inside of {path}")
        updates = {fqn.removeprefix(path): value for fqn, value in self.updated.items() if value in inner}
        if any((value in allowed) != fqn.startswith(f"{path}.") for fqn, value in self.updated.items()):
            raise Uncertain(f"a buffer is updated across the border of {path}")
        if updates and any(self.recording.times_called[call.path] > 1 for call in self.recording.calls.values() if call.template == number):
            raise Uncertain(f"{path} updates its buffers and is called more than once")
        return _Body(path, ops, enter.outputs, leave.operands, owned, updates)

    def chain(self, marker: Op, bodies: dict[int, _Body]) -> dict[str, str]:
        """Append the operations of all calls that `marker` stands for; returns the updates of their buffers."""
        outer = self.sources(marker)
        number = marker.args[1]
        assert isinstance(number, int)
        results: dict[int, tuple[str, ...]] = {}
        updates: dict[str, str] = {}
        for call_number in self.recording.chains[number]:
            call = self.recording.calls[call_number]
            body = bodies[call.template]
            operands = [outer[index] if earlier is None else results[earlier][index] for earlier, index in call.operands]
            names = self.copy(body, call, operands, f"~{call_number}")
            results[call_number] = tuple(names.get(name, name) for name in body.results)
            updates |= {call.path + below: names[value] for below, value in body.updates.items()}
        for name, source in zip(marker.outputs, results[number], strict=True):
            self.stands_for[name] = source
            del self.values[name]
        return updates

    def copy(self, body: _Body, call: Call, operands: list[str], suffix: str) -> dict[str, str]:
        """Append a copy of `body` on `operands` with the state of the module called; returns new names of its values."""
        names = dict(zip(body.given, operands, strict=True))
        for owned, below in body.owned.items():
            names[owned] = self.state_value[call.path + below]
        paths: dict[str, str] = {}
        for op in body.ops:
            if op.module not in paths:
                paths[op.module] = _moved(op.module, body.path, call)
            outputs = []
            for name in op.outputs:
                value = self.values[name]
                names[name] = renamed = name + suffix
                self.values[renamed] = Value(renamed, value.shape, value.dtype, value.requires_grad)
                outputs.append(renamed)
            moved = _read(op, names)
            self.ops.append(Op(op.name + suffix, op.target, moved.args, moved.kwargs, tuple(outputs), paths[op.module], op.source))
        return names


def _moved(module: str, path: str, call: Call) -> str:
    """The module path of a copied operation, with the number of the call of the copied module."""
    if module != path and not bare_path(module).startswith(f"{path}.") and bare_path(module) != path:
        return module
    depth = path.count(".") + 1
    inner = module.split(".")[depth:]
    return ".".join([call.path + (f"@{call.nth}" if call.nth else ""), *inner])


def _read(op: Op, names: dict[str, str]) -> Op:
    if names.keys().isdisjoint(op.operands):
        return op

    def new(arg: Arg) -> Arg:
        if type(arg) is Ref:
            return Ref(names[arg.name]) if arg.name in names else arg
        return tuple([new(item) for item in arg]) if type(arg) is tuple else arg

    kwargs = tuple([(key, new(arg)) for key, arg in op.kwargs]) if op.kwargs else ()
    return Op(op.name, op.target, tuple([new(arg) for arg in op.args]), kwargs, op.outputs, op.module, op.source)
