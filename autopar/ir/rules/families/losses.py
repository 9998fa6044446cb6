"""Losses, a number for each row or each element: `autopar.ir.tracing.canonical_losses` takes sums and means apart from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autopar.ir.placement import P, R, S
from autopar.ir.rules.families.common import broadcast, names, sizes
from autopar.ir.rules.nest import Call, Nest, Term
from autopar.ir.rules.split import Split

Shape = tuple[int, ...]
Rows = Callable[[Sequence[Shape]], Shape]

NONE, SUM = 0, 2
"""Values of the argument `reduction` (`at::Reduction`); 1 is the mean."""


def _elements(shapes: Sequence[Shape]) -> Shape:
    """All operands are broadcast to the result."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(max(column) if 0 not in column else 0 for column in zip(*padded, strict=True))


def _rows(shapes: Sequence[Shape]) -> Shape:
    """The last dim of the operands is one row's."""
    return _elements([shape[:-1] for shape in shapes])


def _targets(shapes: Sequence[Shape]) -> Shape:
    """The last operand has a number for each row."""
    return shapes[-1]


LOSSES: dict[str, tuple[int, Rows]] = {
    "aten.mse_loss.default": (2, _elements),
    "aten.l1_loss.default": (2, _elements),
    "aten.smooth_l1_loss.default": (2, _elements),
    "aten.huber_loss.default": (2, _elements),
    "aten.soft_margin_loss.default": (2, _elements),
    "aten.kl_div.default": (2, _elements),
    "aten.binary_cross_entropy.default": (3, _elements),
    "aten.binary_cross_entropy_with_logits.default": (4, _elements),
    "aten.poisson_nll_loss.default": (5, _elements),
    "aten.hinge_embedding_loss.default": (3, _elements),
    "aten.margin_ranking_loss.default": (4, _elements),
    "aten.cosine_embedding_loss.default": (4, _targets),
    "aten.triplet_margin_loss.default": (7, _rows),
    "aten.multilabel_margin_loss.default": (2, _rows),
}
"""Losses that are means (or sums) over elements or rows which all count: position of the argument `reduction`, and the shape without
reduction by the shapes of the operands."""


def elementwise(call: Call) -> Nest | None:
    """`mse_loss(x, y, NONE)` and its kin, operands broadcast to the result; of losses of rows, dims that the result lacks are whole."""
    position, rows = LOSSES[call.op.target]
    shapes = [value.shape for value in call.operands]
    if call.op.arg(position, "reduction", 1) != NONE or rows(shapes) != call.outputs[0].shape:
        return None
    result = call.outputs[0].shape
    whole = 0 if rows is _elements else 1  # dims at the end of operands that are longer than the result
    operands = tuple(_lead(shape, result, whole if len(shape) > len(result) or rows is _rows else 0) for shape in shapes)
    loops = sizes(result)
    return Nest(loops, operands, (names(len(result)),), uneven=frozenset(loops))


def _lead(shape: Shape, result: Shape, whole: int) -> Term:
    return (*broadcast(shape[: len(shape) - whole], result), *((),) * whole)


def distance(call: Call) -> Nest | None:
    """`cosine_similarity(x, y, dim, eps)`, `pairwise_distance(x, y, p, eps, keepdim)`: rows along `dim` (the last of a distance) are whole,
    all other dims are broadcast to the result."""
    full = _elements([value.shape for value in call.operands])
    similarity = "cosine_similarity" in call.op.target
    dim = (call.int(2, "dim", 1) if similarity else -1) % max(len(full), 1)
    kept = len(call.outputs[0].shape) == len(full)
    if not full or tuple(size for index, size in enumerate(full) if index != dim) != tuple(
        size for index, size in enumerate(call.outputs[0].shape) if index != dim or not kept
    ):
        return None

    def rows(term: Term, shape: Shape) -> Term:
        return tuple(() if index + len(full) - len(shape) == dim else group for index, group in enumerate(term))

    loops = {name: size for name, size in sizes(full).items() if name != f"d{dim}"}
    operands = tuple(rows(broadcast(value.shape, full), value.shape) for value in call.operands)
    result = rows(names(len(full)), full)
    return Nest(loops, operands, (result if kept else result[:dim] + result[dim + 1 :],), uneven=frozenset(loops))


def cross_entropy(call: Call) -> Nest | None:
    """`autopar.cross_entropy(logits[m v], target[m]) -> loss_sum, weight_sum`. Split `m`: both are sums over rows. Split `v`: the
    normaliser of the softmax is reduced over the axis, the logits stay where they are."""
    rows, classes = call.operands[0].shape
    vocabulary = Split("v", inputs=(S(1), R), outputs=(R, R), size=classes, uneven=True, implementation="vocab_cross_entropy")
    return Nest({"m": rows}, ((("m",), ()), (("m",),)), ((), ()), extra=(vocabulary,) if classes > 1 else ())


def nll_loss(call: Call) -> Nest | None:
    """`cross_entropy_loss(x[n v ..], target[n ..], weight[v])`, `nll_loss` without reduction: row by row. Targets that are probabilities
    have the shape of x. Split `v`: a rank that has a row's class has its loss, the others terms of zero; the normaliser of the softmax is
    reduced over the axis."""
    x, target = (value.shape for value in call.operands[:2])
    if call.op.arg(3, "reduction", 1) != NONE or len(x) < 2 or call.outputs[0].shape != (x[0], *x[2:]):
        return None
    loops = sizes(call.outputs[0].shape)
    rows = names(len(loops))
    full: Term = (rows[0], (), *rows[1:])
    weight: tuple[Term, ...] = (((),),) * (len(call.operands) - 2)
    implementation = "split_cross_entropy" if "cross_entropy" in call.op.target else "split_nll"
    inputs = (S(1), S(1) if target == x else R, *(S(0) for _ in weight))
    vocabulary = Split("v", inputs=inputs, outputs=(P,), size=x[1], uneven=True, implementation=implementation)
    extra = (vocabulary,) if x[1] > 1 else ()
    return Nest(loops, (full, full if target == x else rows, *weight), (rows,), extra=extra)
