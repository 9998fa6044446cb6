"""Is a split right? Run the operation whole, run it in parts as the split says, put the parts together, compare: results and gradients.

The gradients are what tells `R` from `R/P`: the backward pass is run with the gradients of the results placed as the split says,
and the gradients of the operands are put together as it says (see `autopar.ir.placement`). Values are random, in float64.
Imports torch; nothing that plans or runs a model imports this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autopar.ir.graph import Arg, Graph, Op, Ref, Symbol
from autopar.ir.placement import RP, P, Placement, R, S, chunk, local_shape
from autopar.ir.rules.local_args import local_args
from autopar.ir.rules.local_context import AxisContext, LocalContext
from autopar.ir.rules.operators import operator
from autopar.ir.rules.samples import differentiable, random_operands
from autopar.ir.rules.split import Split

Implementation = Callable[[Sequence[Any], Mapping[str, Any], LocalContext], Any]
Ranks = Callable[[int, Callable[[int, str], Any]], list[Any]]
"""Runs a function of (rank, name of the process group) on so many ranks at once; gives the results by rank."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """`ok`, and where not, `why` in words; `error` is the largest relative difference seen."""

    ok: bool
    error: float = 0.0
    why: str = ""


class _Refuted(Exception):
    pass


def one_after_the_other(parts: int, function: Callable[[int, str], Any]) -> list[Any]:
    """Simulated ranks that do not talk to each other."""
    return [function(index, "") for index in range(parts)]


def check_split(
    op: Op,
    graph: Graph,
    split: Split,
    parts: int,
    seed: int = 0,
    implementations: Mapping[str, Implementation] | None = None,
    ranks: Ranks = one_after_the_other,
) -> CheckResult:
    """Check `split` of `op` on one axis of `parts` ranks with random values.

    `implementations` are the local implementations by name (the runtime's `LOCAL_OPS`); those that communicate need `ranks` that do.
    """
    shapes = tuple(graph.values[name].shape for name in op.operands)
    dtypes = tuple(graph.values[name].dtype for name in op.operands)
    try:
        error = _compare(op, shapes, random_operands(op, shapes, dtypes, seed), split, parts, seed, implementations or {}, ranks)
    except _Refuted as refuted:
        return CheckResult(False, why=f"{op.target} split {split.name} over {parts}: {refuted}")
    return CheckResult(True, error)


def _compare(
    op: Op,
    shapes: tuple[tuple[int, ...], ...],
    operands: list[Tensor],
    split: Split,
    parts: int,
    seed: int,
    implementations: Mapping[str, Implementation],
    ranks: Ranks,
) -> float:
    generator = torch.Generator().manual_seed(seed + 1)
    smooth = differentiable(op)
    leaves = [_leaf(x, wanted) for x, wanted in zip(operands, smooth, strict=True)]
    wholes = _run(op, leaves, op.args, op.kwargs, None, None)
    gradients = [torch.randn(y.shape, dtype=y.dtype, generator=generator) if y.requires_grad else None for y in wholes]
    wanted = _backward(wholes, gradients, leaves)
    given = [_spread(x, placement, parts, P, generator) for x, placement in zip(operands, split.inputs, strict=True)]
    handed = [
        [None] * parts if g is None else _spread(g, placement, parts, RP, generator)
        for g, placement in zip(gradients, split.outputs, strict=True)
    ]
    implementation = None
    if split.implementation:
        implementation = implementations.get(split.implementation)
        if implementation is None:
            raise _Refuted(f"there is no implementation `{split.implementation}`")

    def rank(index: int, group: str) -> tuple[list[Tensor], list[Tensor | None]]:
        own = [_leaf(pieces[index], wanted) for pieces, wanted in zip(given, smooth, strict=True)]
        outputs = tuple(
            local_shape(tuple(y.shape), (placement,), (parts,), (index,)) for y, placement in zip(wholes, split.outputs, strict=True)
        )
        args, kwargs = local_args(op, tuple(tuple(x.shape) for x in own), outputs)
        context = LocalContext(op.target, shapes, (AxisContext(group, parts, index),))
        results = _run(op, own, args, kwargs, implementation, context)
        for number, (result, shape) in enumerate(zip(results, outputs, strict=True)):
            if tuple(result.shape) != shape:
                raise _Refuted(f"result {number} has shape {list(result.shape)} on rank {index}, not {list(shape)}")
        return [y.detach() for y in results], _backward(results, [pieces[index] for pieces in handed], own)

    try:
        found = ranks(parts, rank)
    except (RuntimeError, IndexError, ValueError) as error:
        raise _Refuted(f"the operator fails on its parts: {error}") from error
    errors = [0.0]
    for number, (y, placement) in enumerate(zip(wholes, split.outputs, strict=True)):
        errors += _same(f"result {number}", y.detach(), [values[number] for values, _ in found], placement, P)
    for number, (g, placement) in enumerate(zip(wanted, split.inputs, strict=True)):
        pieces = [grads[number] for _, grads in found]
        if smooth[number] and operands[number].is_floating_point():
            full = torch.zeros_like(operands[number]) if g is None else g
            filled = [torch.zeros_like(x) if piece is None else piece for x, piece in zip(given[number], pieces, strict=True)]
            errors += _same(f"the gradient of operand {number}", full, filled, placement, RP)
    return max(errors)


def _leaf(x: Tensor, differentiable: bool) -> Tensor:
    return x.clone().requires_grad_() if differentiable and x.is_floating_point() else x.clone()


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of those `inputs` that can have one."""
    used = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad and g is not None]
    wanted = [x for x in inputs if x.requires_grad]
    found: list[Tensor | None] = [None] * len(wanted)
    if used and wanted:
        found = list(torch.autograd.grad([y for y, _ in used], wanted, [g for _, g in used], allow_unused=True))
    given = iter(found)
    return [next(given) if x.requires_grad else None for x in inputs]


def _spread(x: Tensor, placement: Placement, parts: int, summed: Placement, generator: torch.Generator) -> list[Tensor]:
    """What each rank holds of `x`; a placement of the kind `summed` gives random terms."""
    if placement.is_shard:
        return [part(x, placement, parts, index) for index in range(parts)]
    if placement.kind is not summed.kind:
        return [x] * parts
    if x.is_floating_point():
        terms = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for _ in range(parts - 1)]
    else:
        terms = [torch.randint(-3, 4, x.shape, dtype=x.dtype, generator=generator) for _ in range(parts - 1)]
    return [*terms, x - sum(terms, torch.zeros_like(x))]


def part(x: Tensor, placement: Placement, parts: int, index: int) -> Tensor:
    """Part `index` of the whole `x`."""
    dim, blocks = placement.dim, placement.blocks
    if x.shape[dim] % blocks:
        raise _Refuted(f"dim {dim} of {list(x.shape)} has no {blocks} equal blocks")
    start, length = chunk(x.shape[dim] // blocks, parts, index)
    return x.unflatten(dim, (blocks, -1)).narrow(dim + 1, start, length).flatten(dim, dim + 1)


def join(pieces: Sequence[Tensor], placement: Placement) -> Tensor:
    """The whole of which `pieces` are all parts."""
    dim, blocks = placement.dim, placement.blocks
    return torch.cat([piece.unflatten(dim, (blocks, -1)) for piece in pieces], dim + 1).flatten(dim, dim + 1)


def _same(what: str, whole: Tensor, pieces: Sequence[Tensor], placement: Placement, summed: Placement) -> list[float]:
    """Relative differences of the parts put together from the `whole`. Raises `_Refuted` where they are more than rounding."""
    if placement.is_shard:
        candidates = [join(pieces, placement)]
    elif placement.kind is summed.kind:
        candidates = [sum(pieces[1:], pieces[0])]
    else:
        candidates = list(pieces)
    errors = []
    for candidate in candidates:
        if candidate.shape != whole.shape:
            raise _Refuted(f"{what} has shape {list(candidate.shape)} put together by {placement}, not {list(whole.shape)}")
        if candidate.dtype == torch.bool or not candidate.is_floating_point():
            if not torch.equal(candidate, whole):
                raise _Refuted(f"{what}, put together by {placement}, differs")
            continue
        if not whole.numel():
            continue
        finite = torch.isfinite(whole)
        if not torch.equal(finite, torch.isfinite(candidate)):
            raise _Refuted(f"{what}, put together by {placement}, is not finite in the same places")
        scale = max(1.0, float(whole[finite].abs().max())) if finite.any() else 1.0
        difference = float((candidate - whole)[finite].abs().max()) / scale if finite.any() else 0.0
        if not difference <= 1e-9:
            raise _Refuted(f"{what}, put together by {placement}, differs by {difference:.1e}")
        errors.append(difference)
    return errors


# ---- running one operation ------------------------------------------------------------------------------------------------------

_IGNORED = {"device", "layout", "pin_memory", "non_blocking"}
_FLOAT_NAMES = {"torch.float32", "torch.float16", "torch.bfloat16", "torch.float"}


def _run(
    op: Op,
    operands: Sequence[Tensor],
    args: tuple[Arg, ...],
    kwargs: tuple[tuple[str, Arg], ...],
    implementation: Implementation | None,
    context: LocalContext | None,
) -> list[Tensor]:
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


# ---- discovering ----------------------------------------------------------------------------------------------------------------


def discover_splits(op: Op, graph: Graph, seeds: Sequence[int] = (0, 1), parts: Sequence[int] = (2, 3)) -> tuple[Split, ...]:
    """Splits of an operator that has no rule, found by trial: every choice of one dim (or none) of every operand and result, of equal
    size, that passes the check for all `seeds`, numbers of `parts`, and with the split dim made longer. For `custom` operators too.

    What is found is no proof for all values, only for random ones; nothing calls this by itself.
    """
    operands = [graph.values[name] for name in op.operands]
    results = [graph.values[name] for name in op.outputs]
    found: list[Split] = []
    sizes = sorted({size for value in operands for size in value.shape if size > 1})
    for size in sizes:
        choices: list[list[Placement]] = []
        for value in operands:
            dims = [S(dim) for dim, length in enumerate(value.shape) if length == size]
            choices.append([*dims, RP if value.dtype.startswith(("float", "bfloat")) else R])
        for inputs in _product(choices):
            if not any(placement.is_shard for placement in inputs):
                continue
            outputs = [[*(S(dim) for dim, length in enumerate(value.shape) if length == size), P] for value in results]
            for chosen in _product(outputs):
                split = Split(f"found{len(found)}", tuple(inputs), tuple(chosen), size=size)
                if all(_passes(op, graph, split, count, seed) for count in parts for seed in seeds):
                    found.append(split)
    return tuple(found)


def _passes(op: Op, graph: Graph, split: Split, parts: int, seed: int) -> bool:
    """Whether the check passes with the split dim made `parts` times as long."""
    values = dict(graph.values)
    for name, placement in zip(op.operands, split.inputs, strict=True):
        if placement.is_shard:
            shape = graph.values[name].shape
            dim = placement.dim
            values[name] = replace(values[name], shape=(*shape[:dim], shape[dim] * parts, *shape[dim + 1 :]))
    try:
        return check_split(op, replace(graph, values=values), split, parts, seed).ok
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False


def _product(choices: Sequence[Sequence[Placement]]) -> list[list[Placement]]:
    found: list[list[Placement]] = [[]]
    for options in choices:
        found = [[*head, option] for head in found for option in options]
    return found
