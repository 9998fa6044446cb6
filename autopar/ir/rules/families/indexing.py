"""Operators that look up positions."""

from __future__ import annotations

from autopar.ir.graph import Ref
from autopar.ir.placement import P, R, S
from autopar.ir.rules.families.common import broadcast, names, positive
from autopar.ir.rules.nest import Call, Group, Nest, Term
from autopar.ir.rules.split import Split


def embedding(call: Call) -> Nest | None:
    """`embedding(weight[v h], ids[..], padding_idx, scale_grad_by_freq, sparse) -> [.. h]`. Split `v`: every rank looks up the rows it
    holds; rows of others are zero. Gradients scaled by how often an id occurs couple all ids; sparse ones have no rule."""
    weight, ids = (value.shape for value in call.operands)
    if call.op.arg(4, "sparse", False):
        return None
    if call.op.arg(3, "scale_grad_by_freq", False):
        return Nest({"h": weight[1]}, (((), ("h",)), ((),) * len(ids)), ((*((),) * len(ids), ("h",)),))
    loops = {f"d{dim}": size for dim, size in enumerate(ids)} | {"h": weight[1]}
    vocabulary = Split("v", inputs=(S(0), R), outputs=(P,), size=weight[0], uneven=True, implementation="vocab_embedding")
    extra = (vocabulary,) if weight[0] > 1 else ()
    return Nest(loops, (((), ("h",)), names(len(ids))), ((*names(len(ids)), ("h",)),), extra=extra)


def batch_norm(call: Call) -> Nest | None:
    """`autopar.batch_norm(x, weight, bias, mean, var) -> y, mean, var` in training: channels are independent; the batch and space are
    coupled by their statistics, which are reduced over the axis, forward and backward. Gradients of weight and bias come out complete."""
    x = call.operands[0].shape
    others: tuple[Term, ...] = tuple((("c",),) for _ in call.operands[1:])
    full: Term = ((), ("c",), *((),) * (len(x) - 2))
    extra = tuple(
        Split(
            "b" if dim == 0 else f"d{dim}",
            inputs=(S(dim), *(R for _ in others)),
            outputs=(S(dim), R, R),
            size=size,
            implementation="sync_batch_norm",
        )
        for dim, size in enumerate(x)
        if dim != 1 and size > 1
    )
    return Nest({"c": x[1]}, (full, *others), (full, (("c",),), (("c",),)), extra=extra)


def gather(call: Call) -> Nest | None:
    """`gather(x, dim, index)`: the index's dims may be split. Split `v`, dim `dim` of x: what a rank does not hold is a term of zero."""
    x, index = (value.shape for value in call.operands)
    if len(x) != len(index) or not x:
        return None
    dim = positive(call.int(1, "dim"), len(x))
    # Another dim is a loop only where the index spans all of it; a shorter one reads a leading part.
    whole = frozenset(f"d{d}" for d in range(len(x)) if d != dim and x[d] != index[d])
    loops = {f"d{d}": size for d, size in enumerate(index)}
    source = tuple(() if d == dim or x[d] != index[d] else (f"d{d}",) for d in range(len(x)))
    picked = Split("v", inputs=(S(dim), R), outputs=(P,), size=x[dim], uneven=True, implementation="split_gather")
    extra = (picked,) if x[dim] > 1 and call.operands[0].dtype != "bool" else ()
    return Nest(loops, (source, names(len(index))), (names(len(index)),), whole=whole, linear=((0,),), extra=extra)


def scatter(call: Call) -> Nest | None:
    """`scatter(x, dim, index, source)`, `scatter_add`: dim `dim` is needed whole, and others that index or source do not span. Where
    what lands in one place is added up, what is scattered may be split along `dim`: loop `n`, a sum over which is the result."""
    shapes = [value.shape for value in call.operands]
    rank = len(shapes[0])
    if any(len(shape) != rank for shape in shapes) or not rank:
        return None
    dim = positive(call.int(1, "dim"), rank)
    same = [d for d in range(rank) if d != dim and len({shape[d] for shape in shapes}) == 1]
    term: Term = tuple((f"d{d}",) if d in same else () for d in range(rank))
    floating = tuple(index for index in range(len(shapes)) if index != 1)
    added = call.op.arg(4, "reduce", "sum") == "sum"  # of `scatter_reduce`; the others have no such argument
    linear = (floating,) if len(shapes) == 3 and added else ()
    loops = {f"d{d}": shapes[0][d] for d in same}
    sums = linear and call.op.target.split(".")[1] in ("scatter_add", "scatter_reduce") and call.op.arg(5, "include_self", True)
    if not sums or shapes[1][dim] != shapes[2][dim]:  # a source that is longer than the index is not read to its end
        return Nest(loops, tuple(term for _ in shapes), (term,), linear=linear)
    moved: Term = (*term[:dim], ("n",), *term[dim + 1 :])
    return Nest(loops | {"n": shapes[1][dim]}, (term, moved, moved), (term,), added=frozenset({0}), linear=linear, uneven=frozenset({"n"}))


def index_add(call: Call) -> Nest | None:
    """`index_add(x, dim, index, source, alpha)`: dim `dim` of x is whole; the rows of the source that are added there may be split: loop
    `n`."""
    x, index, source = (value.shape for value in call.operands)
    if not x or len(index) != 1 or len(source) != len(x):
        return None
    dim = positive(call.int(1, "dim"), len(x))
    full = tuple(() if d == dim else group for d, group in enumerate(names(len(x))))
    rows: Term = (*full[:dim], ("n",), *full[dim + 1 :])
    loops = {f"d{d}": size for d, size in enumerate(x) if d != dim} | {"n": index[0]}
    return Nest(loops, (full, (("n",),), rows), (full,), added=frozenset({0}), linear=((0, 2),), uneven=frozenset({"n"}))


def index_select(call: Call) -> Nest | None:
    """`index_select(x, dim, index)`: dim `dim` of x is needed whole; the index may be split."""
    x, index = (value.shape for value in call.operands)
    if len(index) != 1 or not x:
        return None
    dim = positive(call.int(1, "dim"), len(x))
    result = names(len(x))
    loops = {f"d{d}": size for d, size in enumerate(call.outputs[0].shape)}
    return Nest(loops, (tuple(() if d == dim else group for d, group in enumerate(result)), (result[dim],)), (result,), linear=((0,),))


def index(call: Call) -> Nest | None:
    """`index(x, [i, None, j])`: indexed dims of x are needed whole; the indices' own dims and the other dims of x are loops.

    Boolean indices have results whose size depends on data and no rule.
    """
    arg = call.op.args[1]
    if not isinstance(arg, tuple):
        return None
    picked = [position for position, item in enumerate(arg) if isinstance(item, Ref)]
    indices = call.operands[1:]
    if not picked or len(indices) != len(picked) or any(value.dtype in ("bool", "uint8") for value in indices):
        return None
    x, result = call.operands[0].shape, call.outputs[0].shape
    rank = max(len(value.shape) for value in indices)
    # Indices side by side leave their dims in place; otherwise these come first.
    start = picked[0] if picked == list(range(picked[0], picked[-1] + 1)) else 0
    span = result[start : start + rank]
    loops = {f"d{d}": size for d, size in enumerate(result)}
    free = iter([(f"d{d}",) for d in range(len(result)) if not start <= d < start + rank])
    source: list[Group] = [() if d in picked else next(free) for d in range(len(x))]
    shifted = tuple(
        tuple((f"d{start + int(group[0][1:])}",) if group else () for group in broadcast(value.shape, span)) for value in indices
    )
    return Nest(loops, (tuple(source), *shifted), (names(len(result)),), linear=((0,),))


def index_put(call: Call) -> Nest | None:
    """`index_put(x, indices, values)`: dims of x behind and before the indexed ones are loops where the values span them."""
    arg = call.op.args[1]
    if not isinstance(arg, tuple):
        return None
    picked = [position for position, item in enumerate(arg) if isinstance(item, Ref)]
    indices = call.operands[1 : 1 + len(picked)]
    if not picked or len(call.operands) != len(picked) + 2 or any(value.dtype in ("bool", "uint8") for value in indices):
        return None
    x, values = call.operands[0].shape, call.operands[-1].shape
    rank = max(len(value.shape) for value in indices)
    start = picked[0] if picked == list(range(picked[0], picked[-1] + 1)) else 0
    rest = [d for d in range(len(x)) if d not in picked]
    spread: list[Group] = [(f"d{d}",) for d in rest]
    spread[start:start] = [()] * rank
    offset = len(spread) - len(values)
    if offset < 0:
        return None
    loops = {f"d{d}": x[d] for d in rest}
    own = tuple(group if group and size == loops[group[0]] else () for group, size in zip(spread[offset:], values, strict=True))
    full: Term = tuple((f"d{d}",) if d in rest else () for d in range(len(x)))
    return Nest(loops, (full, *(((),) * len(value.shape) for value in indices), own), (full,), linear=())


def one_hot(call: Call) -> Nest | None:
    """`one_hot(ids, classes)`: a new last dim, which is whole."""
    shape = call.operands[0].shape
    if call.op.arg(1, "num_classes", -1) == -1:
        return None
    return Nest({f"d{d}": size for d, size in enumerate(shape)}, (names(len(shape)),), ((*names(len(shape)), ()),))
