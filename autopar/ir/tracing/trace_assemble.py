"""A `Graph` of a lowered program: with every parameter and buffer of the model, used or not, under its first name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from autopar.errors import TraceError
from autopar.ir.graph import Buffer, Constant, Graph, Input, Output, Parameter, Ref, Value
from autopar.ir.tracing.trace_lower import lower


@dataclass(frozen=True, slots=True)
class OutputSlot:
    """One leaf of the model's result: `graph.outputs[index]`, or `literal` where the model returns no tensor there."""

    index: int | None
    literal: Any = None


@dataclass(frozen=True, slots=True)
class Assembled:
    """A graph as traced, the tree of the model's result with its leaves, and the data of the graph's constants."""

    graph: Graph
    out_spec: pytree.TreeSpec
    slots: tuple[OutputSlot, ...]
    constants: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class State:
    """The model's parameters and buffers by first name; `first_name` maps every name to it, `aliases` the first to the others."""

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    aliases: dict[str, tuple[str, ...]]
    first_name: dict[str, str]
    persistent: frozenset[str]


def state_of(model: nn.Module) -> State:
    """Raises `TraceError` for a parameter without a shape."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    buffers = list(model.named_buffers(remove_duplicate=False))
    names_of: dict[int, list[str]] = {}
    for fqn, tensor in [*parameters, *buffers]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise TraceError(f"`{fqn}` of a lazy module has no shape yet; call the model once before planning it")
        names_of.setdefault(id(tensor), []).append(fqn)
    first_name = {fqn: names[0] for names in names_of.values() for fqn in names}
    persistent = frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    )
    return State(
        parameters={fqn: tensor for fqn, tensor in parameters if first_name[fqn] == fqn},
        buffers={fqn: tensor for fqn, tensor in buffers if first_name[fqn] == fqn},
        aliases={names[0]: tuple(names[1:]) for names in names_of.values()},
        first_name=first_name,
        persistent=persistent,
    )


def assemble(name: str, program: ExportedProgram, state: State, input_paths: list[str], training: bool) -> Assembled:
    """The graph of `program`; `input_paths` names its tensor inputs. Raises `TraceError` as `lower` does."""
    lowered = lower(program)
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    values = dict(lowered.values)
    used = {state.first_name[fqn]: value for fqn, value in [*lowered.parameters.items(), *lowered.buffers.items()]}

    def value_of(fqn: str, tensor: Tensor) -> str:
        value = used.get(fqn, fqn)
        while fqn not in used and value in values:
            value += "_"
        values[value] = Value(value, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)
        return value

    updates = {state.first_name[fqn]: value for fqn, value in lowered.updates.items()}
    outputs = zip(lowered.outputs, leaf_paths(out_spec), strict=True)
    graph = Graph(
        name=name,
        parameters=tuple([Parameter(value_of(fqn, tensor), fqn, state.aliases[fqn]) for fqn, tensor in state.parameters.items()]),
        buffers=tuple(
            [Buffer(value_of(fqn, tensor), fqn, fqn in state.persistent, updates.get(fqn)) for fqn, tensor in state.buffers.items()]
        ),
        inputs=tuple([Input(value, path) for value, path in zip(lowered.inputs, input_paths, strict=True)]),
        constants=tuple([Constant(value) for value in lowered.constants]),
        ops=tuple(lowered.ops),
        outputs=tuple([Output(item.name, path) for item, path in outputs if isinstance(item, Ref)]),
        values=values,
        training=training,
    )
    return Assembled(graph, out_spec, _slots(lowered.outputs), lowered.constants)


def _slots(outputs: list[Any]) -> tuple[OutputSlot, ...]:
    slots: list[OutputSlot] = []
    index = 0
    for item in outputs:
        if isinstance(item, Ref):
            slots.append(OutputSlot(index))
            index += 1
        else:
            slots.append(OutputSlot(None, item))
    return tuple(slots)


def leaf_paths(spec: pytree.TreeSpec) -> tuple[str, ...]:
    """A name for every leaf of a tree, such as `"loss"`, `"0"`, `"states.2"`; a tree that is one leaf is called `"0"`."""

    def walk(spec: pytree.TreeSpec, prefix: str) -> Iterator[str]:
        if spec.is_leaf():
            yield prefix or "0"
            return
        keys: Any = getattr(spec.context, "_fields", spec.context)  # the type of a namedtuple, the keys of a dict or ModelOutput
        children = spec.children()
        if not (isinstance(keys, list | tuple) and len(keys) == len(children)):
            keys = range(len(children))
        for key, child in zip(keys, children, strict=True):
            yield from walk(child, f"{prefix}.{key}" if prefix else str(key))

    return tuple(walk(spec, ""))
