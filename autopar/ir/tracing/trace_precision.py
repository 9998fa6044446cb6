"""A model that computes as a `Precision` says while it is traced, and its graph with parameters in the dtype in which they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import PlanError, TraceError
from autopar.ir.graph import Graph, Symbol
from autopar.ir.precision import FLOATS, Precision, read_precision
from autopar.ir.tracing.canonical import plain_names
from autopar.ir.tracing.rewriter import Rewriter

_CAST = "aten._to_copy.default"
_PRODUCTS = frozenset(
    {
        "aten.linear.default", "aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten.baddbmm.default", "aten.matmul.default",
        "aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.convolution.default",
    }
)  # fmt: skip


def device_type_of(model: nn.Module) -> str:
    """Where the model is traced: on the device of its values, or the CPU where it is on `meta`."""
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.device.type for tensor in tensors if not tensor.is_meta), "cpu")


def precision_of(model: nn.Module, option: Precision | Mapping[str, str] | str | None) -> Precision | None:
    """The precision that `option` asks for, or where it asks for none that of the `torch.autocast` around the call.

    Raises `PlanError` where the option says no precision, and where an autocast is on that is not for it or not for the model's device.
    """
    precision = read_precision(option)
    kind = device_type_of(model)
    surrounding = [other for other in dict.fromkeys((kind, "cuda", "cpu")) if torch.is_autocast_enabled(other)]
    if not surrounding:
        return precision
    here = surrounding[0]
    dtype = str(torch.get_autocast_dtype(here)).removeprefix("torch.")
    if precision is None and here == kind:
        return read_precision({"compute": dtype, "by": "autocast"})
    if precision is None:
        raise PlanError(
            f"`torch.autocast` is on for {here}, and the model is on {kind}, where it would cast other operators: move the model there "
            f'first, or plan outside of it with precision="{dtype}"'
        )
    if (precision.by, precision.compute) != ("autocast", dtype):
        raise PlanError(
            f"the precision is {precision.compute} by {precision.by}, and a `torch.autocast` for {dtype} is on around it: leave one away"
        )
    return precision


@contextmanager
def computing_as(model: nn.Module, precision: Precision | None) -> Iterator[None]:
    """Within, `model` computes as `precision` says, or without it in its own dtypes; `torch.autocast` around it changes nothing.

    Raises `TraceError` with the ways out where tracing it so fails.
    """
    kind = device_type_of(model)
    with torch.autocast(kind, enabled=False):
        if precision is None:
            yield
            return
        dtype = getattr(torch, precision.compute)
        by_autocast = precision.by == "autocast"
        around = torch.autocast(kind, dtype=dtype, cache_enabled=False) if by_autocast else nullcontext()
        try:
            with around, nullcontext() if by_autocast else _cast(model, dtype):
                yield
        except TraceError as error:
            other = "parameters" if by_autocast else "autocast"
            raise TraceError(
                f"{error}\nThat is under precision {precision.compute} by {precision.by}: the model may mix dtypes in a way that this does "
                f"not allow. Try by {other}, or plan without a precision"
            ) from error


@contextmanager
def _cast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Parameters of `dtype`, without values, and floating-point inputs cast to it. Batch norms keep theirs: their statistics are not cast,
    and torch's kernels want both in one dtype."""
    made: dict[int, nn.Parameter] = {}
    undo: list[tuple[nn.Module, str, nn.Parameter]] = []
    forward, own = model.forward, "forward" in model.__dict__

    def cast(item: Any) -> Any:
        return item.to(dtype) if isinstance(item, Tensor) and item.is_floating_point() else item

    @wraps(forward)
    def casting(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(cast, (args, kwargs))
        return forward(*args, **kwargs)

    kept = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters(recurse=False)
    }
    try:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.is_floating_point() or id(parameter) in kept:
                    continue
                if id(parameter) not in made:
                    blank = torch.empty_strided(parameter.shape, parameter.stride(), dtype=dtype, device="meta")
                    made[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
                undo.append((module, name, parameter))
                module._parameters[name] = made[id(parameter)]
        model.__dict__["forward"] = casting
        yield
    finally:
        for module, name, parameter in undo:
            module._parameters[name] = parameter
        if own:
            model.__dict__["forward"] = forward
        else:
            model.__dict__.pop("forward", None)


def _refuse_mixed(graph: Graph) -> None:
    """Tracing lets products of unlike dtypes pass; torch's kernels do not."""
    for op in graph.ops:
        dtypes = dict.fromkeys(graph.values[name].dtype for name in op.operands if graph.values[name].dtype in FLOATS)
        if op.target in _PRODUCTS and len(dtypes) > 1:
            where = f" (in `{op.module}`)" if op.module else ""
            raise TraceError(f"{op.source or 'forward'}{where}: `{op.target}` of {' and '.join(dtypes)}, which torch does not multiply")


def as_read(graph: Graph, precision: Precision | None) -> Graph:
    """`graph` with a parameter that is only read through casts to the precision's dtype in that dtype, and without the casts: they are done
    where the parameter is stored, before it is gathered. Those that are read in another dtype too stay as they are."""
    if precision is None:
        return graph
    _refuse_mixed(graph)
    readers: dict[str, list[str]] = {}
    wanted, target = {}, Symbol(f"torch.{precision.compute}")
    for op in graph.ops:
        for name in op.operands:
            readers.setdefault(name, []).append(op.name)
        if op.target == _CAST and op.kwarg("dtype") == target and len(op.operands) == 1:
            wanted[op.name] = op.outputs[0]
    returned = {item.value for item in graph.outputs}
    cast = {
        item.value
        for item in graph.parameters
        if graph.values[item.value].dtype in FLOATS
        and item.value in readers
        and item.value not in returned
        and all(reader in wanted for reader in readers[item.value])
    }
    if not cast:
        return graph
    rewriter = Rewriter(graph)
    for name in cast:
        rewriter.values[name] = replace(rewriter.values[name], dtype=precision.compute)
    for op in graph.ops:
        if op.name in wanted and op.operands[0] in cast and op.outputs[0] not in returned:
            rewriter.drop(op, op.operands[0])
        else:
            rewriter.ops.append(rewriter.read(op))
    return plain_names(rewriter.done())
