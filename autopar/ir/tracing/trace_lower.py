"""From an exported program to the operations and values of a `Graph`, one to one; `canonical` tidies up afterwards."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from autopar.errors import TraceError
from autopar.ir.graph import DTYPE_BYTES, Arg, Op, Ref, Symbol, Value
from autopar.ir.tracing.leaf_modules import LEAF, TRACED
from autopar.ir.tracing.trace_errors import ways_out

DROPPED_KWARGS = frozenset({"device", "layout", "pin_memory", "non_blocking", "generator"})
"""Where and how a tensor lies is the runtime's business; the graph says only what it is."""


@dataclass(slots=True)
class Lowered:
    """What an exported program says, in the IR's words. `outputs` holds per flat output a value name or a `Literal`."""

    values: dict[str, Value] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    parameters: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    updates: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Ref | Any] = field(default_factory=list)


def lower(program: ExportedProgram) -> Lowered:
    """`parameters` and `buffers` of the result map fully-qualified names to value names; `inputs` are the tensor inputs in flat order.

    Raises `TraceError` where the program holds sizes or control flow that depend on data.
    """
    return _Lowering(program).run()


class _Lowering:
    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.result = Lowered()
        self.env: dict[Node, Any] = {}
        self.constant_names: dict[tuple[Any, ...], str] = {}

    def run(self) -> Lowered:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs if hasattr(spec.arg, "name")}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.placeholder(node, specs[node.name])
            elif node.op == "get_attr":
                found = getattr(self.program.graph_module, str(node.target))
                if isinstance(found, Tensor):
                    self.constant(node, found)
                # a sub-graph is looked at when the operator that takes it is refused
            elif node.op == "call_function":
                self.call(node)
            elif node.op == "output":
                self.output(node)
        return self.result

    def placeholder(self, node: Node, spec: Any) -> None:
        if not isinstance(node.meta.get("val"), Tensor):
            self.env[node] = node.meta.get("val")
            return
        if spec.kind is InputKind.CONSTANT_TENSOR:
            self.constant(node, self.program.constants[spec.target])
            return
        if spec.kind is InputKind.PARAMETER:
            name = self.define(spec.target, node.meta["val"], node)
            self.result.parameters[spec.target] = name
        elif spec.kind is InputKind.BUFFER:
            name = self.define(spec.target, node.meta["val"], node)
            self.result.buffers[spec.target] = name
        elif spec.kind is InputKind.USER_INPUT:
            name = self.define(node.name, node.meta["val"], node)
            self.result.inputs.append(name)
        else:
            raise TraceError(
                f"the model takes an input of kind {spec.kind.name}, which autopar does not handle: `{spec.target or node.name}`"
            )
        self.env[node] = name

    def constant(self, node: Node, tensor: Tensor) -> None:
        """Equal constants are one: a literal in the code of a layer is found once per layer."""
        key: tuple[Any, ...]
        if tensor.device.type == "meta" or type(tensor) is not Tensor or tensor.numel() > 1 << 20:
            key = (id(tensor),)
        else:
            key = (tensor.dtype, tuple(tensor.shape), tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if key not in self.constant_names:
            name = self.define(f"constant_{len(self.result.constants)}", tensor, node)
            self.result.constants[name] = tensor
            self.constant_names[key] = name
        self.env[node] = self.constant_names[key]

    def call(self, node: Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            self.env[node] = self.env[source][index]  # type: ignore[index]
            return
        target = str(node.target)
        if target == "aten._assert_tensor_metadata.default":
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise TraceError(
                _mutating(node)
                or f"{_where(node)}: `{getattr(node.target, '__name__', target)}` is control flow or arithmetic that depends on data; "
                f"autopar needs fixed operations and shapes\n{ways_out(_path(node))}"
            )
        self.env[node] = outputs = self.outputs_of(node)
        args = node.args
        if target == TRACED:
            target, args = LEAF, (*args[:2], *args[3:])
        self.result.ops.append(
            Op(
                name=node.name,
                target=target,
                args=tuple(self.arg(item, node) for item in args),
                kwargs=tuple((key, self.arg(item, node)) for key, item in node.kwargs.items() if key not in DROPPED_KWARGS),
                outputs=tuple(_flatten(outputs)),
                module=module_path(node.meta.get("nn_module_stack")),
                source=source_line(node.meta.get("stack_trace") or ""),
            )
        )

    def outputs_of(self, node: Node) -> Any:
        """Names in the structure that the operator returns: one name, or a tuple for `getitem` to index."""

        def name(value: Any, path: str) -> Any:
            if isinstance(value, Tensor):
                return self.define(path, value, node)
            if isinstance(value, tuple | list):
                return tuple(name(item, f"{path}.{index}") for index, item in enumerate(value))
            if value is None:
                return None
            raise TraceError(
                f"{_where(node)}: `{node.target}` gives a Python number that depends on data ({value})\n"
                + ways_out(_path(node), "keep it a tensor (no `.item()`, `int(x)`, `float(x)`, `.tolist()` in forward)")
            )

        return name(node.meta.get("val"), node.name)

    def define(self, name: str, tensor: Tensor, node: Node) -> str:
        while name in self.result.values:
            name += "_"
        shape = tuple(tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if not all(type(size) is int for size in shape):
            raise TraceError(
                f"{_where(node)}: the shape of `{node.target}` depends on the values of a tensor: {list(shape)}; autopar needs fixed ones\n"
                + ways_out(_path(node), "use a mask of fixed shape instead of `nonzero`, boolean indexing or `unique`")
            )
        if dtype not in DTYPE_BYTES:
            raise TraceError(f"{_where(node)}: `{name}` has dtype {dtype}, which autopar does not know; known: {', '.join(DTYPE_BYTES)}")
        requires_grad = node.op == "placeholder" and bool(tensor.requires_grad)
        self.result.values[name] = Value(name, shape, dtype, requires_grad)
        return name

    def arg(self, item: Any, node: Node) -> Arg:
        if isinstance(item, Node):
            value = self.env[item]
            if isinstance(value, tuple):
                return tuple(Ref(name) for name in value)
            return Ref(value) if isinstance(value, str) and isinstance(item.meta.get("val"), Tensor) else value
        if item is None or isinstance(item, bool | int | float | str):
            return item
        if isinstance(item, list | tuple):
            return tuple(self.arg(inner, node) for inner in item)
        if isinstance(item, torch.dtype | torch.memory_format):
            return Symbol(str(item))
        if isinstance(item, torch.device | torch.layout):
            return None
        if isinstance(item, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise TraceError(
                f"{_where(node)}: `{node.target}` has an argument that depends on data ({item}); autopar needs fixed arguments\n"
                f"{ways_out(_path(node))}"
            )
        raise TraceError(f"{_where(node)}: `{node.target}` has an argument of type {type(item).__name__}, which autopar cannot write down")

    def output(self, node: Node) -> None:
        for value, spec in zip(node.args[0], self.program.graph_signature.output_specs, strict=True):  # type: ignore[arg-type]
            name = self.env[value] if isinstance(value, Node) else value
            if spec.kind is OutputKind.USER_OUTPUT:
                self.result.outputs.append(Ref(name) if isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor) else name)
            elif spec.kind is OutputKind.BUFFER_MUTATION:
                self.result.updates[str(spec.target)] = name
            else:
                raise TraceError(
                    f"forward changes `{spec.target}` in place ({spec.kind.name.lower().replace('_', ' ')}); "
                    "autopar keeps buffers up to date, but not inputs or parameters: return the new value instead"
                )


def _flatten(names: Any) -> list[str]:
    if isinstance(names, str):
        return [names]
    return [name for item in names or () for name in _flatten(item)]


def module_path(stack: dict[str, tuple[str, Any]] | None) -> str:
    """Path of the innermost user's module in `nn_module_stack`, with the numbers of calls but first ones: `layer@1.norm`."""
    return _path_of(tuple((key, value[0]) for key, value in stack.items())) if stack else ""


@lru_cache(maxsize=4096)
def _path_of(stack: tuple[tuple[str, str], ...]) -> str:
    path, bare = "", ""
    for key, fqn in stack:
        fqn = bare_path(fqn)
        if not fqn:
            continue
        below = fqn.removeprefix(f"{bare}.") if fqn.startswith(f"{bare}.") else fqn
        number = key.partition("@")[2]
        path = (f"{path}." if below != fqn else "") + below + (f"@{number}" if number else "")
        bare = fqn
    return path


@lru_cache(maxsize=4096)
def bare_path(path: str) -> str:
    """A module path without the numbers of calls: the module's own name."""
    return re.sub(r"@\d+", "", path)


@lru_cache(maxsize=4096)
def source_line(stack_trace: str) -> str:
    """`file.py:line` of the innermost frame of `stack_trace` that is not torch's own; empty if there is none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack_trace)
    for path, line in reversed(frames):
        if "/torch/" not in path and not path.startswith("<"):
            return f"{path.rsplit('/', 1)[-1]}:{line}"
    return ""


def _path(node: Node) -> str:
    """The user's module that `node` comes from."""
    return bare_path(module_path(node.meta.get("nn_module_stack")))


def _mutating(node: Node) -> str:
    """What is wrong with an operator that changes its arguments; empty where `node` is none."""
    name = getattr(node.target, "__name__", "")
    if not name.startswith("auto_functionalized") or not node.args:
        return ""
    return (
        f"{_where(node)}: `{node.args[0]}` changes its arguments in place; a program of splits cannot follow that. Let the operator return "
        f'the new values instead (`mutates_args=()`), or leave its module as it is: leaf_modules=["{_path(node)}"]'
    )


def _where(node: Node) -> str:
    source = source_line(node.meta.get("stack_trace") or "")
    module = _path(node)
    return f"{source or 'forward'} (in `{module}`)" if module else source or "forward"
