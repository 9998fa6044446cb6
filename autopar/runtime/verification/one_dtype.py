"""A model and its graph with all floating-point numbers in one dtype, to compare a plan with one device beyond rounding.

Casting the parameters is not enough: many models compute norms, rotary angles and losses in float32 whatever their parameters are, and
rounding there hides, or looks like, an error of the plan.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopar.ir import experts
from autopar.ir.graph import Arg, Graph, Op, Symbol
from autopar.ir.rules.given import GivenRule
from autopar.ir.tracing.trace import TracedModel

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOAT = re.compile(r"\b(float16|bfloat16|float32|float64)\b")
_CASTS = frozenset({"float", "half", "bfloat16", "double"})


class _Casting(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _CASTS and args and isinstance(args[0], Tensor):
            return args[0].to(self.dtype)
        # `finfo` and the like never come here; dtypes that do are what a result is to have.
        if any(item in FLOATS for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, torch.dtype)):
            args, kwargs = pytree.tree_map(
                lambda item: self.dtype if isinstance(item, torch.dtype) and item in FLOATS else item, (args, kwargs)
            )
        return func(*args, **kwargs)


class EveryDtype(TorchFunctionMode):
    """Within, functions whose kernels know few dtypes compute in all: grouped products, one after the other."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _GROUPED and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            return grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)


_GROUPED = {torch.nn.functional.grouped_mm, torch._grouped_mm, torch.ops.aten._grouped_mm.default}


def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None) -> Tensor:
    """`torch.nn.functional.grouped_mm` in any dtype: group `g` ends at `offs[g]` along the rows of `a (m, k)` with `b (g, k, n)`; along
    the columns of `b (k, n)` with `a (g, m, k)`; along the dim that is summed over where both have two dims. Rows behind the last end
    are zero. Where both have three dims it is `bmm`."""
    assert bias is None, "grouped_mm takes no bias yet"
    if offs is None:
        return torch.bmm(a, b)
    ends = offs.tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if a.dim() == 2 and b.dim() == 2:
        return torch.stack([a[:, part] @ b[part] for part in parts])
    if a.dim() == 2:
        return torch.cat([*(a[part] @ b[group] for group, part in enumerate(parts)), a.new_zeros((a.shape[0] - ends[-1], b.shape[2]))])
    return torch.cat(
        [*(a[group] @ b[:, part] for group, part in enumerate(parts)), a.new_zeros((a.shape[1], b.shape[1] - ends[-1]))], dim=1
    )


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Within, PyTorch's functions make and cast to `dtype` wherever they are asked for a floating-point dtype, or for none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with EveryDtype(), _Casting(dtype):
            yield
    finally:
        torch.set_default_dtype(before)


def in_dtype(traced: TracedModel, dtype: torch.dtype) -> TracedModel:
    """`traced` with every floating-point value, cast and constant in `dtype`; operations, names and order as they were."""
    name = str(dtype)
    floats = {str(item) for item in FLOATS}

    def argument(arg: Arg) -> Arg:
        if isinstance(arg, Symbol) and arg.name in floats:
            return Symbol(name)
        return tuple(map(argument, arg)) if isinstance(arg, tuple) else arg

    def operation(op: Op) -> Op:
        op = replace(op, args=tuple(map(argument, op.args)), kwargs=tuple((key, argument(arg)) for key, arg in op.kwargs))
        return experts.with_body(op, whole(experts.body_of(op))) if op.target == experts.EXPERTS else op

    def whole(graph: Graph) -> Graph:
        values = {
            key: replace(value, dtype=name.removeprefix("torch.")) if f"torch.{value.dtype}" in floats else value
            for key, value in graph.values.items()
        }
        rules = tuple(rule_in_dtype(rule, dtype) for rule in graph.rules)
        return replace(graph, ops=tuple(map(operation, graph.ops)), values=values, rules=rules)

    constants = {key: tensor.to(dtype) if tensor.dtype in FLOATS else tensor for key, tensor in traced.constants.items()}
    return replace(traced, graph=whole(traced.graph), constants=constants)


def rule_in_dtype(rule: GivenRule, dtype: torch.dtype) -> GivenRule:
    """`rule` for the same calls in `dtype`."""
    return replace(rule, form=_FLOAT.sub(str(dtype).removeprefix("torch."), rule.form))
