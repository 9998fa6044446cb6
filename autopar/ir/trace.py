"""From an `nn.Module` and example inputs to a `Graph`.

    traced = trace(model, (), {"input_ids": ids, "labels": labels})
    print(to_text(traced.graph))

Nothing is computed and nothing is allocated: parameters and inputs may be real or on `meta`. The model is as before afterwards.
The steps, each in its own file: `trace_export` (torch.export on fake tensors), `trace_repeats` (repeated layers are exported once),
`trace_lower` (to the IR), `canonical` (to the forms the rest of autopar knows), `reshard_points`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils import _pytree as pytree

from autopar.errors import TraceError
from autopar.ir import trace_repeats as repeats
from autopar.ir.canonical import canonical
from autopar.ir.graph import Buffer, Constant, Graph, Input, Output, Parameter, Ref, Value
from autopar.ir.reshard_points import add_reshard_points
from autopar.ir.trace_errors import as_trace_error, chain_of
from autopar.ir.trace_expand import expand, refuse_aliasing
from autopar.ir.trace_export import export_program
from autopar.ir.trace_lower import Lowered, lower
from autopar.ir.trace_repeats import Looked, Uncertain, UnseenSignature, find_repeats

_MOST_ATTEMPTS = 8
"""Attempts to trace repeats once before tracing whole; each learns one thing about the model."""


@dataclass(frozen=True, slots=True)
class OutputSlot:
    """One leaf of the model's result: `graph.outputs[index]`, or `literal` where the model returns no tensor there."""

    index: int | None
    literal: Any = None


@dataclass(frozen=True)
class TracedModel:
    """A graph and what is needed to call it like the model.

    `in_spec` is the tree of `(args, kwargs)`; `input_paths` names its leaves in order, and `literals` holds those that are not tensors
    (they are baked into the graph: a call must bring equal ones); the other leaves are `graph.inputs`, in the same order.
    `out_spec` is the tree of the result, `output_slots` its leaves. `constants` holds the data of `graph.constants`.
    """

    graph: Graph
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    output_slots: tuple[OutputSlot, ...]
    constants: dict[str, Tensor]
    input_paths: tuple[str, ...]
    literals: dict[str, Any]


def split_example(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that `example_inputs` stand for.

    A tuple is all positional arguments, a mapping all keywords; a tensor or any other tree is one positional argument.
    """
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    if type(example_inputs) is tuple:
        return example_inputs, {}
    return (example_inputs,), {}


def trace(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *, once_per_repeat: bool = True
) -> TracedModel:
    """Trace `model(*args, **kwargs)`, in training or evaluation mode as `model.training` says, with the shapes of these inputs.

    With `once_per_repeat`, repeated child modules are exported once and copied; the result is the same graph.
    Raises `TraceError` for what cannot be traced, naming the user's line.
    """
    kwargs = dict(kwargs or {})
    state = _state_of(model)
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    input_paths = _input_paths(in_spec)
    literals = {path: leaf for path, leaf in zip(input_paths, leaves, strict=True) if not isinstance(leaf, Tensor)}
    for path, leaf in literals.items():
        if leaf is not None and not isinstance(leaf, bool | int | float | str):
            raise TraceError(
                f"input `{path}` is a {type(leaf).__name__}; autopar takes tensors, numbers, strings and None in lists, tuples and dicts. "
                "Register its type with `torch.utils._pytree.register_pytree_node` if it holds tensors"
            )
    found = _once(model, args, kwargs, state) if once_per_repeat else None
    try:
        lowered, out_spec = found or _whole(model, args, kwargs)
    except TraceError:
        raise
    except Exception as error:
        raise as_trace_error(error, model) from error

    tensor_paths = [path for path in input_paths if path not in literals]
    graph = _assemble(type(model).__name__, lowered, tensor_paths, leaf_paths(out_spec), state, model.training)
    graph = add_reshard_points(canonical(graph)).verify()
    constants = {item.value: lowered.constants[item.value] for item in graph.constants}
    return TracedModel(graph, in_spec, out_spec, _slots(lowered), constants, input_paths, literals)


def _whole(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Lowered, pytree.TreeSpec]:
    program = export_program(model, args, kwargs)
    return lower(program), _out_spec(program)


def _once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], state: _State) -> tuple[Lowered, pytree.TreeSpec] | None:
    """Trace with repeated modules exported once; None where that is not certain to give what the whole trace gives."""
    significant: frozenset[str] = frozenset()
    traced: frozenset[str] = frozenset()
    chained = True
    for _ in range(_MOST_ATTEMPTS):
        groups = find_repeats(model, significant)
        if not groups:
            return None
        try:
            with repeats.once_per_repeat(model, groups, traced, chained=chained) as recording:
                program = export_program(model, args, kwargs, refuse_aliasing)
            return expand(lower(program), recording, state.tensors), _out_spec(program)
        except Exception as error:
            reason = next((item for item in chain_of(error) if isinstance(item, Uncertain)), None)
            if isinstance(reason, Looked) and reason.name not in significant:
                significant |= {reason.name}
            elif isinstance(reason, UnseenSignature) and reason.path not in traced:
                traced |= {reason.path}
            elif chained:
                chained = False
            else:
                return None
    return None


def _out_spec(program: ExportedProgram) -> pytree.TreeSpec:
    spec = program.call_spec.out_spec
    assert spec is not None
    return spec


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


def _input_paths(spec: pytree.TreeSpec) -> tuple[str, ...]:
    """`leaf_paths` of a tree of `(args, kwargs)`, without saying which of the two."""
    args, kwargs = spec.children()
    positional = leaf_paths(args) if args.num_leaves else ()
    return (*positional, *(leaf_paths(kwargs) if kwargs.num_leaves else ()))


@dataclass(frozen=True, slots=True)
class _State:
    """The model's parameters and buffers by first name; `first_name` maps every name to it."""

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    aliases: dict[str, tuple[str, ...]]
    first_name: dict[str, str]
    tensors: dict[str, Tensor]
    persistent: frozenset[str]


def _state_of(model: nn.Module) -> _State:
    named: list[tuple[str, Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    names_of: dict[int, list[str]] = {}
    for fqn, tensor in named:
        if isinstance(tensor, UninitializedTensorMixin):
            raise TraceError(f"`{fqn}` of a lazy module has no shape yet; call the model once before planning it")
        names_of.setdefault(id(tensor), []).append(fqn)
    first_name = {fqn: names_of[id(tensor)][0] for fqn, tensor in named}
    aliases = {names[0]: tuple(names[1:]) for names in names_of.values()}
    persistent = frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    )
    return _State(dict(model.named_parameters()), dict(model.named_buffers()), aliases, first_name, dict(named), persistent)


def _assemble(name: str, lowered: Lowered, input_paths: list[str], output_paths: tuple[str, ...], state: _State, training: bool) -> Graph:
    """A graph with every parameter and buffer of the model, in the model's order, used or not."""
    values = dict(lowered.values)
    used: dict[str, str] = {}
    for fqn, value in [*lowered.parameters.items(), *lowered.buffers.items()]:
        used[state.first_name[fqn]] = value

    def value_of(fqn: str, tensor: Tensor) -> str:
        name = used.get(fqn, fqn)
        values[name] = Value(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)
        return name

    updates = {state.first_name[fqn]: value for fqn, value in lowered.updates.items()}
    outputs = [(item.name, path) for item, path in zip(lowered.outputs, output_paths, strict=True) if isinstance(item, Ref)]
    return Graph(
        name=name,
        parameters=tuple(Parameter(value_of(fqn, tensor), fqn, state.aliases[fqn]) for fqn, tensor in state.parameters.items()),
        buffers=tuple(
            Buffer(value_of(fqn, tensor), fqn, fqn in state.persistent, updates.get(fqn)) for fqn, tensor in state.buffers.items()
        ),
        inputs=tuple(Input(value, path) for value, path in zip(lowered.inputs, input_paths, strict=True)),
        constants=tuple(Constant(value) for value in lowered.constants),
        ops=tuple(lowered.ops),
        outputs=tuple(Output(value, path) for value, path in outputs),
        values=values,
        training=training,
    )


def _slots(lowered: Lowered) -> tuple[OutputSlot, ...]:
    slots: list[OutputSlot] = []
    index = 0
    for item in lowered.outputs:
        if isinstance(item, Ref):
            slots.append(OutputSlot(index))
            index += 1
        else:
            slots.append(OutputSlot(None, item))
    return tuple(slots)
