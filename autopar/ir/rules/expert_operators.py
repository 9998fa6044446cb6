"""`autopar.experts` on one device: rows sorted by expert, one product an expert, and every token's rows added up (imports torch).

All steps are deterministic, and so are their gradients: rows travel to places of their own and are added in the order of the places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.ir import experts
from autopar.ir.graph import Arg, Graph, Ref, Symbol

_IGNORED = ("device", "layout", "pin_memory")
Find = Callable[[str], Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class Sorted:
    """Rows in the order of their experts. `expert` `(r,)` counts from the first expert that is here; `sizes`: rows of each of these;
    `ends` `(e,)` int32: where the rows of each end."""

    expert: Tensor
    sizes: tuple[int, ...]
    ends: Tensor


class _Spread(torch.autograd.Function):
    """`x (n, ...)` -> `x[token] (r, ...)`; the gradient goes to `places` of its own, `slots` a token, and is added up from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.shape = x.shape[0], slots
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return _added(gradients[0], place, *ctx.shape), None, None, None


class _Collect(torch.autograd.Function):
    """`rows (r, ...)` -> `(n, ...)`: the sum over `slots` places a token; the transpose of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor, count: int, slots: int) -> Tensor:
        ctx.save_for_backward(token)
        return _added(rows, place, count, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (token,) = ctx.saved_tensors
        return gradients[0].index_select(0, token), None, None, None, None


def _added(rows: Tensor, place: Tensor, count: int, slots: int) -> Tensor:
    all_places = rows.new_zeros((count * slots, *rows.shape[1:]))
    all_places.index_copy_(0, place, rows)
    return all_places.view(count, slots, *rows.shape[1:]).sum(1)


def spread(x: Tensor, token: Tensor, place: Tensor, slots: int) -> Tensor:
    """Row `token[r]` of `x` `(n, ...)` for every `r`. `place[r]`, all different, is `slots * token[r]` and less than `slots` more."""
    rows: Tensor = _Spread.apply(x, token, place, slots)  # type: ignore[no-untyped-call]
    return rows


def collect(rows: Tensor, token: Tensor, place: Tensor, count: int, slots: int) -> Tensor:
    """For each of `count` tokens the sum of its `rows`; `token` and `place` as for `spread`."""
    summed: Tensor = _Collect.apply(rows, token, place, count, slots)  # type: ignore[no-untyped-call]
    return summed


class _EachExpert(torch.autograd.Function):
    """`rows (r, i)`, `matrix (e, i, o)` -> `(r, o)`: one product an expert, in any dtype."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(rows, matrix)
        ctx.sizes = sizes
        out = rows.new_empty((rows.shape[0], matrix.shape[2]))
        for expert, (own, result) in enumerate(zip(rows.split_with_sizes(sizes), out.split_with_sizes(sizes), strict=True)):
            torch.mm(own, matrix[expert], out=result)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrix = ctx.saved_tensors
        (gradient,) = gradients
        to_rows = to_matrix = None
        if ctx.needs_input_grad[0]:
            to_rows = gradient.new_empty(rows.shape)
            for expert, (given, result) in enumerate(
                zip(gradient.split_with_sizes(ctx.sizes), to_rows.split_with_sizes(ctx.sizes), strict=True)
            ):
                torch.mm(given, matrix[expert].t(), out=result)
        if ctx.needs_input_grad[1]:
            to_matrix = torch.empty_like(matrix)  # laid out as the matrix is, which may be a transposed view
            for expert, (own, given) in enumerate(zip(rows.split_with_sizes(ctx.sizes), gradient.split_with_sizes(ctx.sizes), strict=True)):
                to_matrix[expert] = own.t() @ given
        return to_rows, to_matrix, None


def expert_linear(rows: Tensor, matrix: Tensor, layout: Sorted, transposed: bool) -> Tensor:
    """`rows (r, i)` each times the matrix of its expert: `matrix (e, i, o)`, or `(e, o, i)` where `transposed`."""
    matrix = matrix.transpose(1, 2) if transposed else matrix
    if _has_kernel(rows, matrix):
        return torch.nn.functional.grouped_mm(rows, matrix, offs=layout.ends)
    product: Tensor = _EachExpert.apply(rows, matrix, layout.sizes)  # type: ignore[no-untyped-call]
    return product


def _has_kernel(rows: Tensor, matrix: Tensor) -> bool:
    """Whether one kernel does all experts: PyTorch's for bfloat16 on GPUs from compute capability 8.0, with rows of whole 16 bytes."""
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16 or matrix.dtype != rows.dtype or not rows.shape[0]:
        return False
    return torch.cuda.get_device_capability(rows.device) >= (8, 0) and all(size % 8 == 0 for size in matrix.shape[1:])


def experts_of(
    x: Tensor, ids: Tensor, weights: Tensor | None, tensors: Sequence[Tensor], body: str, find: Find, first: int = 0, alone: bool = False
) -> Tensor:
    """`autopar.experts` with those experts only that `tensors` hold: their ids begin at `first`. All other ids add nothing. `alone`: there
    is but one expert, so that nothing need be sorted."""
    count, slots = tensors[0].shape[0], ids.shape[1]
    if alone and slots == 1:
        return _alone(x, ids, weights, tensors, body, find)
    local = ids.reshape(-1) - first
    key = torch.where((local >= 0) & (local < count), local, count)
    expert, order = torch.sort(key, stable=True)
    numbers = torch.bincount(key, minlength=count + 1)[:count]
    sizes = tuple(numbers.tolist())  # the host must know how many rows there are
    rows = sum(sizes)
    expert, order = expert[:rows], order[:rows]
    layout = Sorted(expert, sizes, numbers.cumsum(0).to(torch.int32))
    token = torch.div(order, slots, rounding_mode="floor")
    graph = experts.read(body)
    values = {experts.X: spread(x, token, order, slots)}
    if weights is not None:
        values[experts.WEIGHT] = spread(weights.reshape(-1), order, order, 1)
    result = run_body(graph, values, layout, tensors, find)
    return collect(result, token, order, ids.shape[0], slots)


def _alone(x: Tensor, ids: Tensor, weights: Tensor | None, tensors: Sequence[Tensor], body: str, find: Find) -> Tensor:
    """One expert for every token: a dense layer."""
    count = x.shape[0]
    layout = Sorted(ids.new_zeros(count), (count,), ids.new_full((1,), count, dtype=torch.int32))
    values = {experts.X: x} if weights is None else {experts.X: x, experts.WEIGHT: weights.reshape(-1)}
    return run_body(experts.read(body), values, layout, tensors, find).masked_fill(ids != 0, 0.0)


def run_body(graph: Graph, values: dict[str, Tensor], layout: Sorted, tensors: Sequence[Tensor], find: Find) -> Tensor:
    """The rows that the body `graph` gives for the rows in `values`."""
    names: dict[str, Any] = {item.path: item.value for item in graph.inputs}
    known: dict[str, Any] = {names[path]: value for path, value in values.items()}
    known |= {names[experts.tensor(index)]: value for index, value in enumerate(tensors)}

    def concrete(arg: Arg) -> Any:
        if isinstance(arg, Ref):
            return known[arg.name]
        if isinstance(arg, Symbol):
            return getattr(torch, arg.name.removeprefix("torch."))
        return [concrete(item) for item in arg] if isinstance(arg, tuple) else arg

    for op in graph.ops:
        if op.target == experts.LINEAR:
            rows, matrix, _, transposed = op.args
            results: Any = expert_linear(concrete(rows), concrete(matrix), layout, bool(transposed))
        elif op.target == experts.ROWS:
            results = concrete(op.args[0])[layout.expert]
        else:
            kwargs = {key: concrete(arg) for key, arg in op.kwargs if key not in _IGNORED}
            results = find(op.target)(*(concrete(arg) for arg in op.args), **kwargs)
        known |= zip(op.outputs, results if isinstance(results, (tuple, list)) else (results,), strict=True)
    out: Tensor = known[graph.outputs[0].value]
    return out
