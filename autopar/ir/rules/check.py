"""Is a split right? Run the operation whole, run it in parts as the split says, put the parts together, compare: results and gradients.

The gradients are what tells `R` from `R/P`: the backward pass is run with the gradients of the results placed as the split says,
and the gradients of the operands are put together as it says (see `autopar.ir.placement`). Values are random, in float64.
Imports torch; nothing that plans or runs a model imports this module.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.ir.graph import Arg, Graph, Op, Ref, Symbol
from autopar.ir.placement import RP, P, local_shape
from autopar.ir.rules.local_args import local_args
from autopar.ir.rules.local_context import AxisContext, LocalContext
from autopar.ir.rules.operators import operator
from autopar.ir.rules.pieces import Refuted, State, difference, spread, together
from autopar.ir.rules.samples import differentiable, random_operands
from autopar.ir.rules.split import Split

Mesh = tuple[int, ...]
Implementation = Callable[[Sequence[Any], Mapping[str, Any], LocalContext], Any]
Ranks = Callable[[Mesh, Callable[[Mesh, tuple[str, ...]], Any]], list[Any]]
"""Runs a function of (coordinate, names of the process groups of the axes) on every rank of a mesh; results by rank."""


@dataclass(frozen=True, slots=True)
class Given:
    """Whole operands to check with, one tensor per operand slot, floats as float64; `smooth`: which have a gradient."""

    operands: tuple[Tensor, ...]
    smooth: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """`ok`, and where not, `why` in words; `error` is the largest relative difference seen."""

    ok: bool
    error: float = 0.0
    why: str = ""


def one_after_the_other(mesh: Mesh, function: Callable[[Mesh, tuple[str, ...]], Any]) -> list[Any]:
    """Simulated ranks that do not talk to each other."""
    return [function(coordinate, ("",) * len(mesh)) for coordinate in itertools.product(*map(range, mesh))]


def check_split(
    op: Op,
    graph: Graph,
    split: Split | tuple[Split, ...],
    parts: int | Mesh,
    seed: int = 0,
    implementations: Mapping[str, Implementation] | None = None,
    ranks: Ranks = one_after_the_other,
    given: Given | None = None,
) -> CheckResult:
    """Check `split` of `op` on one axis of `parts` ranks, or one split an axis of a mesh, with random values or with those `given`.

    `implementations` are the local implementations by name (the runtime's `LOCAL_OPS`); those that communicate need `ranks` that do.
    """
    chosen = (split,) if isinstance(split, Split) else split
    mesh = (parts,) if isinstance(parts, int) else parts
    try:
        return CheckResult(True, _Check(op, graph, chosen, mesh, seed, implementations or {}, given).error(ranks))
    except Refuted as refuted:
        names = ", ".join(f"{item.name} over {size}" for item, size in zip(chosen, mesh, strict=True))
        return CheckResult(False, why=f"{op.target} split {names}: {refuted}")


class _Check:
    """One operation, one choice of splits, one draw of values: the whole run, and what each rank is given."""

    def __init__(
        self,
        op: Op,
        graph: Graph,
        chosen: tuple[Split, ...],
        mesh: Mesh,
        seed: int,
        implementations: Mapping[str, Implementation],
        given: Given | None,
    ) -> None:
        self.op, self.mesh = op, mesh
        self.inputs: list[State] = list(zip(*(split.inputs for split in chosen), strict=True))
        self.outputs: list[State] = list(zip(*(split.outputs for split in chosen), strict=True))
        self.names = [split.name for split in chosen]
        self.talking = [axis for axis, split in enumerate(chosen) if split.implementation]
        self.implementation = None
        if self.talking:
            name = chosen[self.talking[0]].implementation
            if name not in implementations:
                raise Refuted(f"there is no implementation `{name}`")
            self.implementation = implementations[name]
        generator = torch.Generator().manual_seed(seed + 1)
        if given is None:
            shapes = tuple(graph.values[name].shape for name in op.operands)
            dtypes = [graph.values[name].dtype for name in op.operands]
            given = Given(tuple(random_operands(op, shapes, dtypes, seed)), tuple(differentiable(op)))
        operands = given.operands
        self.shapes = tuple(tuple(x.shape) for x in operands)
        self.smooth = [wanted and x.is_floating_point() for wanted, x in zip(given.smooth, operands, strict=True)]
        leaves = [x.clone().requires_grad_(smooth) for x, smooth in zip(operands, self.smooth, strict=True)]
        self.wholes = run(op, leaves, op.args, op.kwargs)
        gradients = [torch.randn(y.shape, dtype=y.dtype, generator=generator) if y.requires_grad else None for y in self.wholes]
        self.gradients = _backward(self.wholes, gradients, leaves)
        self.given = [spread(x, state, mesh, P, generator) for x, state in zip(operands, self.inputs, strict=True)]
        self.handed = [
            None if g is None else spread(g, state, mesh, RP, generator) for g, state in zip(gradients, self.outputs, strict=True)
        ]

    def rank(self, coordinate: Mesh, groups: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Results of the rank at `coordinate` and the gradients of its operands."""
        number = 0
        for index, size in zip(coordinate, self.mesh, strict=True):
            number = number * size + index
        own = [pieces[number].clone().requires_grad_(smooth) for pieces, smooth in zip(self.given, self.smooth, strict=True)]
        shapes = tuple(
            local_shape(tuple(y.shape), state, self.mesh, coordinate) for y, state in zip(self.wholes, self.outputs, strict=True)
        )
        args, kwargs = local_args(self.op, tuple(tuple(x.shape) for x in own), shapes)
        firsts = tuple(local_shape(shape, state, self.mesh) for shape, state in zip(self.shapes, self.inputs, strict=True))
        axes = tuple(AxisContext(groups[axis], self.mesh[axis], coordinate[axis], self.names[axis]) for axis in self.talking)
        results = run(self.op, own, args, kwargs, self.implementation, LocalContext(self.op.target, self.shapes, axes, firsts))
        for position, (result, shape) in enumerate(zip(results, shapes, strict=True)):
            if tuple(result.shape) != shape:
                raise Refuted(f"result {position} has shape {list(result.shape)} on rank {number}, not {list(shape)}")
        handed = [None if pieces is None else pieces[number] for pieces in self.handed]
        return [y.detach() for y in results], _backward(results, handed, own)

    def error(self, ranks: Ranks) -> float:
        try:
            found = ranks(self.mesh, self.rank)
        except (RuntimeError, IndexError, ValueError) as error:
            raise Refuted(f"the operator fails on its parts: {error}") from error
        errors = [0.0]
        for position, (whole, state) in enumerate(zip(self.wholes, self.outputs, strict=True)):
            what = f"result {position}, put together by {', '.join(map(str, state))},"
            errors.append(difference(what, whole.detach(), together(what, [values[position] for values, _ in found], state, self.mesh, P)))
        for position, (gradient, state) in enumerate(zip(self.gradients, self.inputs, strict=True)):
            if self.smooth[position]:
                what = f"the gradient of operand {position}, put together by {', '.join(map(str, state))},"
                errors.append(difference(what, gradient, together(what, [grads[position] for _, grads in found], state, self.mesh, RP)))
        return max(errors)


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of `inputs`; zero where there is none."""
    used = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad and g is not None]
    wanted = [x for x in inputs if x.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if used and wanted:
        found = torch.autograd.grad([y for y, _ in used], wanted, [g for _, g in used], allow_unused=True)
    given = iter(found)
    gradients = [next(given) if x.requires_grad else None for x in inputs]
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(inputs, gradients, strict=True)]


_IGNORED = {"device", "layout", "pin_memory", "non_blocking"}
_FLOAT_NAMES = {"torch.float32", "torch.float16", "torch.bfloat16", "torch.float"}


def run(
    op: Op,
    operands: Sequence[Tensor],
    args: tuple[Arg, ...],
    kwargs: tuple[tuple[str, Arg], ...],
    implementation: Implementation | None = None,
    context: LocalContext | None = None,
) -> list[Tensor]:
    """The results of `op` with `args` and `kwargs`, `operands` in the places of their `Ref`s; float dtypes become float64."""
    tensors = iter(operands)

    def concrete(arg: Arg) -> Any:
        if isinstance(arg, Ref):
            return next(tensors)
        if isinstance(arg, Symbol):
            name = "torch.float64" if arg.name in _FLOAT_NAMES else arg.name
            return getattr(torch, name.removeprefix("torch."))
        return [concrete(item) for item in arg] if isinstance(arg, tuple) else arg

    positional = [concrete(arg) for arg in args]
    keywords = {key: concrete(arg) for key, arg in kwargs if key not in _IGNORED}
    if implementation is not None:
        assert context is not None
        results = implementation(positional, keywords, context)
    elif op.target == "autopar.dropout":
        results = positional[0].clone()  # which elements are dropped is the runtime's to test
    else:
        if op.target == "aten.scaled_dot_product_attention.default" and len(positional) > 4:
            positional[4] = 0.0
        results = operator(op.target)(*positional, **keywords)
    return list(results) if isinstance(results, (tuple, list)) else [results]
