"""Operators that cut, join, shift or select along some dims, which stay whole, and leave the other dims alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from autopar.ir.graph import Ref
from autopar.ir.rules.families.common import Family, dims, names, positive
from autopar.ir.rules.nest import Call, Group, Nest, Term


def aligned(call: Call, kept: Iterable[int], linear: tuple[tuple[int, ...], ...] = ()) -> Nest:
    """Every operand and result has the same dims; those in `kept` are whole (and may differ in size), the rest are loops."""
    kept = frozenset(kept)
    shape = call.operands[0].shape
    term: Term = tuple(() if dim in kept else (f"d{dim}",) for dim in range(len(shape)))
    loops = {f"d{dim}": size for dim, size in enumerate(shape) if dim not in kept}
    for value in (*call.operands, *call.outputs):
        assert len(value.shape) == len(shape), f"{call.op.target}: {value.name} has other dims"
        for dim, size in enumerate(value.shape):
            assert dim in kept or size == shape[dim], f"{call.op.target}: {value.name} has another size in dim {dim}"
    return Nest(loops, tuple(term for _ in call.operands), tuple(term for _ in call.outputs), linear=linear)


def along(position: int, name: str = "dim", default: int | None = 0, linear: bool = False) -> Family:
    """Needs the dim or dims given by the argument at `position` whole (all of them where the argument is absent and has no default)."""

    def family(call: Call) -> Nest | None:
        rank = len(call.operands[0].shape)
        given = call.ints(position, name)
        if given is None and default is not None:
            given = (default,)
        return aligned(call, dims(given, rank), ((0,),) if linear else ())

    return family


def last(count: int, linear: bool = False) -> Family:
    """Needs the last `count` dims whole."""

    def family(call: Call) -> Nest | None:
        rank = len(call.operands[0].shape)
        return aligned(call, range(max(rank - count, 0), rank), ((0,),) if linear else ())

    return family


def differing(linear: bool = True) -> Family:
    """Needs those dims whole whose size the operator changes."""

    def family(call: Call) -> Nest | None:
        before, after = call.operands[0].shape, call.outputs[0].shape
        return aligned(call, (dim for dim in range(len(before)) if before[dim] != after[dim]), ((0,),) if linear else ())

    return family


def spatial(linear: bool) -> Family:
    """Needs the dims of space whole, as many as the operator's name says (`max_pool2d`): windows reach over the parts' borders, and
    sizes of results are arguments, even where the size stays the same."""

    def family(call: Call) -> Nest | None:
        match = re.search(r"([123])d", call.op.target)
        assert match, call.op.target
        rank = len(call.operands[0].shape)
        return aligned(call, range(rank - int(match[1]), rank), ((0,),) if linear else ())

    return family


def pad(call: Call) -> Nest | None:
    """`pad(x, (left, right, ...), mode, value)`, from the last dim backwards; linear where zeros (or copies of x) are added."""
    rank = len(call.operands[0].shape)
    amounts = call.ints(1, "pad") or ()
    kept = {rank - 1 - index // 2 for index, amount in enumerate(amounts) if amount}
    mode = call.op.arg(2, "mode", "constant")
    value = call.op.arg(3, "value") if isinstance(mode, str) else mode
    zero = not value or mode in ("reflect", "replicate", "circular")
    return aligned(call, kept, ((0,),) if zero else ())


def slice_(call: Call) -> Nest | None:
    """`slice(x, dim, start, end, step)`: the dim is whole unless all of it is taken, or one element of every `step`."""
    dim = positive(call.int(1, "dim"), len(call.operands[0].shape))
    before, after = call.operands[0].shape, call.outputs[0].shape
    nest = aligned(call, () if before == after else (dim,), ((0,),))
    nest = replace(nest, uneven=frozenset(nest.loops))
    start, end, step = call.op.arg(2, "start"), call.op.arg(3, "end"), call.int(4, "step", 1)
    start = start if isinstance(start, int) else 0
    to_the_end = end is None or (isinstance(end, int) and end >= before[dim])
    if before == after or step == 1 or not 0 <= start < step or before[dim] % step or not to_the_end:
        return nest
    own = f"d{dim}"
    return replace(
        nest,
        loops={**nest.loops, own: after[dim], "step": step},
        operands=(_with(nest.operands[0], dim, (own, "step")),),
        outputs=(_with(nest.outputs[0], dim, (own,)),),
        whole=frozenset({"step"}),
    )


def equal_parts(call: Call) -> Nest | None:
    """`split`, `chunk`, `split_with_sizes`: where all parts are equal, the operand's dim is `(parts d)`, and splitting `d` splits every
    part: the columns of a fused query-key-value weight stay with their heads."""
    shape = call.operands[0].shape
    dim = positive(call.int(2, "dim"), len(shape))
    parts = [value.shape[dim] for value in call.outputs]
    nest = aligned(call, (dim,), ((0,),))
    if len(set(parts)) > 1:
        return nest
    own = f"d{dim}"
    return Nest(
        {**nest.loops, "parts": len(parts), own: parts[0]},
        (_with(nest.operands[0], dim, ("parts", own)),),
        tuple(_with(term, dim, (own,)) for term in nest.outputs),
        whole=frozenset({"parts"}),
        linear=((0,),),
    )


def _with(term: Term, dim: int, group: Group) -> Term:
    return (*term[:dim], group, *term[dim + 1 :])


def select(call: Call) -> Nest | None:
    """`select(x, dim, index)`: one index of a dim, which goes."""
    return unbind(call)


def unbind(call: Call) -> Nest | None:
    """`unbind(x, dim)`: every index of a dim, one result each."""
    shape = call.operands[0].shape
    dim = positive(call.int(1, "dim"), len(shape))
    result = names(len(shape) - 1)
    loops = {f"d{index}": size for index, size in enumerate((*shape[:dim], *shape[dim + 1 :]))}
    return Nest(loops, ((*result[:dim], (), *result[dim:]),), tuple(result for _ in call.outputs), linear=((0,),), uneven=frozenset(loops))


def cat(call: Call) -> Nest | None:
    """`cat(tensors, dim)`: the dim is whole, unless all parts are equal: then the result's dim is `(parts d)`."""
    rank = len(call.outputs[0].shape)
    dim = positive(call.int(1, "dim"), rank)
    if any(len(value.shape) != rank for value in call.operands):
        return None
    everything = (tuple(range(len(call.operands))),)
    nest = aligned(call, (dim,), everything)
    parts = {value.shape[dim] for value in call.operands}
    if len(parts) > 1 or dim == rank - 1:
        return nest
    own = f"d{dim}"
    return Nest(
        {**nest.loops, "parts": len(call.operands), own: parts.pop()},
        tuple(_with(term, dim, (own,)) for term in nest.operands),
        (_with(nest.outputs[0], dim, ("parts", own)),),
        whole=frozenset({"parts"}),
        linear=everything,
    )


def stack(call: Call) -> Nest | None:
    """`stack(tensors, dim)`: a new dim, which is whole."""
    rank = len(call.outputs[0].shape)
    dim = positive(call.int(1, "dim"), rank)
    result = names(rank)
    loops = {f"d{index}": size for index, size in enumerate(call.outputs[0].shape) if index != dim}
    operand = (*result[:dim], *result[dim + 1 :])
    return Nest(loops, tuple(operand for _ in call.operands), (_with(result, dim, ()),), linear=(tuple(range(len(call.operands))),))


def slice_scatter(call: Call) -> Nest | None:
    """`slice_scatter(x, source, dim, ...)`: linear in both together."""
    return aligned(call, (positive(call.int(2, "dim"), len(call.operands[0].shape)),), ((0, 1),))


def select_scatter(call: Call) -> Nest | None:
    """`select_scatter(x, source, dim, index)`."""
    shape = call.operands[0].shape
    dim = positive(call.int(2, "dim"), len(shape))
    full = _with(names(len(shape)), dim, ())
    loops = {f"d{index}": size for index, size in enumerate(shape) if index != dim}
    return Nest(loops, (full, (*full[:dim], *full[dim + 1 :])), (full,), linear=((0, 1),))


def creation(call: Call) -> Nest | None:
    """`full`, `zeros`, `new_ones`, ...: every rank can make its own part; an operand only gives dtype and device."""
    shape = call.outputs[0].shape
    assert all(not isinstance(arg, Ref) for arg in call.op.args[1:])
    whole = frozenset({"other"})
    loops = {f"d{index}": size for index, size in enumerate(shape)}
    return Nest(loops, tuple(tuple(() for _ in value.shape) for value in call.operands), (names(len(shape)),), whole=whole)


def wire(call: Call) -> Nest | None:
    """`receive() -> y`, `send(x)`: a value between two stages of a pipeline travels whole or in parts along any dim, and so does its
    gradient on the way back; terms of sums do not."""
    (value,) = (*call.operands, *call.outputs)
    loops = {f"d{dim}": size for dim, size in enumerate(value.shape)}
    term = names(len(value.shape))
    return Nest(loops, tuple(term for _ in call.operands), tuple(term for _ in call.outputs), uneven=frozenset(loops))
