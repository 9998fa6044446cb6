"""The IR: a flat, functional list of operations over named values.

A `Graph` is pure data: no torch, no callables. Operators are named by text (`"aten.linear.default"`, `"autopar.reshard"`), so that
search, reports and tests can read one without importing torch; `autopar.runtime` turns the names into calls.

Every `Value` is defined once: as an input, a parameter, a buffer, a constant, or an output of one `Op`. Operations stand in an
order in which every operand is defined before it is used. All shapes are global and concrete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from autopar.errors import GraphError

if TYPE_CHECKING:
    from autopar.ir.rules.given import GivenRule

DTYPE_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "float32": 4, "int64": 8, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor: its `name` in the graph, global `shape`, `dtype` as torch prints it (`"float32"`), and whether a gradient flows to it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole, global value."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Ref:
    """A value used as an argument; printed `%name`."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A torch constant used as an argument, such as a dtype or memory format; printed `torch.float32`."""

    name: str


Arg = None | bool | int | float | str | Ref | Symbol | tuple["Arg", ...]


def refs(arg: Arg) -> Iterator[str]:
    """Names of the values in `arg`, from left to right, repeats included."""
    if isinstance(arg, Ref):
        yield arg.name
    elif isinstance(arg, tuple):
        for item in arg:
            yield from refs(item)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    `name` is unique in the graph. `target` names the operator. `args` and `kwargs` are its arguments with `Ref`s for tensors.
    `outputs` are the names of the values it defines, one per tensor that the operator returns.
    `module` is the path of the user's module it came from (`"model.layers.3.mlp"`), `source` the user's `file.py:line`.
    """

    name: str
    target: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()
    outputs: tuple[str, ...] = ()
    module: str = ""
    source: str = ""
    _operands: tuple[str, ...] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the values it reads, in argument order, repeats included. Placements of a `Split` follow this order."""
        if self._operands is not None:  # asked for very often
            return self._operands
        names: list[str] = []
        for arg in self.args:
            if type(arg) is Ref:
                names.append(arg.name)
            elif type(arg) is tuple:
                names.extend(refs(arg))
        for _, arg in self.kwargs:
            names.extend(refs(arg))
        found = tuple(names)
        object.__setattr__(self, "_operands", found)
        return found

    def kwarg(self, name: str, default: Arg = None) -> Arg:
        for key, value in self.kwargs:
            if key == name:
                return value
        return default

    def arg(self, position: int, name: str, default: Arg = None) -> Arg:
        """The argument at `position`, or given as keyword `name`, or `default`."""
        return self.args[position] if position < len(self.args) else self.kwarg(name, default)


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor the user passes; `path` is its place in the call: `"input_ids"` for a keyword, `"0"`, `"0.mask"` for positions."""

    value: str
    path: str


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter under its fully-qualified name `fqn`; `aliases` are the other names of a tied weight."""

    value: str
    fqn: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer; `updated` names the value that is written back to it after every forward pass, if any."""

    value: str
    fqn: str
    persistent: bool = True
    updated: str | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor the trace found in the code (not a parameter or buffer). Its data lives in `TracedModel.constants` under `value`."""

    value: str


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor the model returns; `path` is its place in the result (`"loss"`, `"logits"`, `"0"`)."""

    value: str
    path: str


@dataclass(frozen=True)
class Graph:
    """A traced model. `training` says in which mode it was traced; `rules` are sharding rules that came with it, beside the table's."""

    name: str
    values: dict[str, Value]
    inputs: tuple[Input, ...]
    parameters: tuple[Parameter, ...]
    buffers: tuple[Buffer, ...]
    constants: tuple[Constant, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Output, ...]
    training: bool = True
    rules: tuple[GivenRule, ...] = ()

    @cached_property
    def producers(self) -> dict[str, Op]:
        """The operation that defines each value that an operation defines."""
        return {name: op for op in self.ops for name in op.outputs}

    @cached_property
    def consumers(self) -> dict[str, tuple[Op, ...]]:
        """The operations that read each value, in order, each once; values nobody reads map to an empty tuple."""
        found: dict[str, list[Op]] = {name: [] for name in self.values}
        for op in self.ops:
            for name in dict.fromkeys(op.operands):
                found[name].append(op)
        return {name: tuple(ops) for name, ops in found.items()}

    @cached_property
    def op_index(self) -> dict[str, int]:
        """Position of each operation by name."""
        return {op.name: index for index, op in enumerate(self.ops)}

    @cached_property
    def source_kind(self) -> dict[str, str]:
        """For values no operation defines: `"input"`, `"parameter"`, `"buffer"` or `"constant"`."""
        kinds = {item.value: "input" for item in self.inputs}
        kinds |= {item.value: "parameter" for item in self.parameters}
        kinds |= {item.value: "buffer" for item in self.buffers}
        kinds |= {item.value: "constant" for item in self.constants}
        return kinds

    def fingerprint(self) -> str:
        """sha256 of what the graph computes on what: names, shapes, dtypes, operations and mode, not the user's modules and lines."""
        from autopar.ir.text import to_text

        return hashlib.sha256(to_text(self, origins=False).encode()).hexdigest()

    def verify(self) -> Graph:
        """Check the laws of the IR and return the graph itself.

        Raises `GraphError` where a value is used before it is defined or defined twice, where a name has no `Value` or a `Value` no
        definition, where two operations share a name, or where a dtype is unknown.
        """
        defined: set[str] = set()

        def define(name: str, where: str) -> None:
            if name not in self.values:
                raise GraphError(f"{where} defines `{name}`, which has no shape and dtype in the graph")
            if name in defined:
                raise GraphError(f"{where} defines `{name}` a second time; every value is defined once")
            defined.add(name)

        sources: list[Input | Parameter | Buffer | Constant] = [*self.inputs, *self.parameters, *self.buffers, *self.constants]
        for source in sources:
            define(source.value, f"{self.source_kind[source.value]} `{source.value}`")
        seen: set[str] = set()
        for op in self.ops:
            if op.name in seen:
                raise GraphError(f"two operations are named `{op.name}`")
            seen.add(op.name)
            for name in op.operands:
                if name not in defined:
                    raise GraphError(f"operation `{op.name}` ({op.target}) reads `{name}` before it is defined")
            for name in op.outputs:
                define(name, f"operation `{op.name}`")
        for output in self.outputs:
            if output.value not in defined:
                raise GraphError(f"output `{output.path}` returns `{output.value}`, which nothing defines")
        for buffer in self.buffers:
            if buffer.updated is not None and buffer.updated not in defined:
                raise GraphError(f"buffer `{buffer.fqn}` is updated from `{buffer.updated}`, which nothing defines")
        for name, value in self.values.items():
            if name != value.name:
                raise GraphError(f"value `{name}` calls itself `{value.name}`")
            if value.dtype not in DTYPE_BYTES:
                raise GraphError(f"value `{name}` has unknown dtype `{value.dtype}`; known: {', '.join(DTYPE_BYTES)}")
        if extra := self.values.keys() - defined:
            raise GraphError(f"values {sorted(extra)} are never defined")
        return self
