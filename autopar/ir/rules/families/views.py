"""Views and copies that move, merge, cut or repeat dims, without arithmetic. All are linear in their operand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from autopar.ir.rules.families.common import broadcast, positive, sizes
from autopar.ir.rules.nest import Call, Group, Nest, Term

FUSED_AT_MOST = 3
"""A last dim cut into at most so many parts is a fusion (query-key-value, gate-up) whose innermost loop others may be asked to split."""


def _linear(call: Call) -> tuple[tuple[int, ...], ...]:
    return ((0,),) if call.operands else ()


def common_loops(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[dict[str, int], Term, Term, frozenset[str]]:
    """Loops of which both shapes are made: sizes, both terms, and the loops that fit neither and stay whole.

    `[4, 6] -> [24]` is `a b -> (a b)`; `[24] -> [4, 6]` the reverse; `[6, 4] -> [2, 12]` is `(a b) c -> a (b c)`.
    Where the sizes do not nest (`[2, 3] -> [3, 2]`) the dims involved are whole.
    """
    loops: dict[str, int] = {}
    whole: set[str] = set()
    left: list[Group] = []
    right: list[Group] = []
    i = j = 0
    while i < len(before) or j < len(after):
        i0, j0 = i, j
        a = b = 1
        # The shortest runs of dims with equal products, both at least one dim long where there are any.
        if i < len(before):
            a, i = before[i], i + 1
        if j < len(after):
            b, j = after[j], j + 1
        while a != b:
            if a < b and i < len(before):
                a, i = a * before[i], i + 1
            elif j < len(after):
                b, j = b * after[j], j + 1
            else:
                a, i = a * before[i], i + 1
        _run(before[i0:i], after[j0:j], j0, loops, left, right, whole)
    return loops, tuple(left), tuple(right), frozenset(whole)


def _run(
    before: tuple[int, ...],
    after: tuple[int, ...],
    position: int,
    loops: dict[str, int],
    left: list[Group],
    right: list[Group],
    whole: set[str],
) -> None:
    def ends(shape: tuple[int, ...]) -> list[int]:
        total, found = 1, []
        for size in shape:
            total *= size
            found.append(total)
        return found

    cuts = sorted({1, *ends(before), *ends(after)})
    names: list[str] = []
    if all(high % low == 0 for low, high in pairwise(cuts)):
        inside, outer = 0, 0
        for low, high in pairwise(cuts):
            # Named after the result dim it is in: `d2`, and `d2.1`, `d2.2` for the loops further inside.
            dim = next((index for index, end in enumerate(ends(after)) if high <= end), 0)
            inside = inside + 1 if dim == outer and names else 0
            outer = dim
            name = f"d{position + dim}" if not inside else f"d{position + dim}.{inside}"
            loops[name] = high // low
            names.append(name)

        def groups(shape: tuple[int, ...]) -> list[Group]:
            found: list[Group] = []
            low = 1
            for high in ends(shape):
                found.append(
                    tuple(
                        name for name, start, end in zip(names, cuts, cuts[1:], strict=False) if start >= low and end <= high and end > low
                    )
                )
                low = high
            return found

        left.extend(groups(before))
        right.extend(groups(after))
        return
    for side, shape, out in (("i", before, left), ("o", after, right)):
        for index, size in enumerate(shape):
            name = f"{side}{position + index}"
            loops[name] = size
            whole.add(name)
            out.append((name,))


def view(call: Call) -> Nest | None:
    """`view`, `reshape`, `flatten`, `unflatten`, `squeeze`, `unsqueeze`: the same elements in the same order."""
    before, after = call.operands[0].shape, call.outputs[0].shape
    if 0 in before:
        return None
    loops, left, right, whole = common_loops(before, after)
    inner = set()
    for term in (left, right):
        if term and len(term[-1]) > 1:
            *outside, last = term[-1]
            blocks = 1
            for name in outside:
                blocks *= loops[name]
            if blocks > FUSED_AT_MOST:
                inner.add(last)
    return Nest(loops, (left,), (right,), whole=whole, linear=_linear(call), uneven=frozenset(loops), inner=frozenset(inner))


def squeeze(call: Call) -> Nest | None:
    """`squeeze`: as `view`, but a part of size 1 of a longer dim must stay."""
    nest = view(call)
    return None if nest is None else replace(nest, implementations=dict.fromkeys(nest.loops, "squeeze_part"))


def expand(call: Call) -> Nest | None:
    """`expand`: dims of size 1, or new leading dims, repeated."""
    shape = call.outputs[0].shape
    return Nest(sizes(shape), (broadcast(call.operands[0].shape, shape),), (broadcast(shape, shape),), linear=_linear(call))


def _moved(call: Call, order: tuple[int, ...]) -> Nest:
    """Result dim `i` is operand dim `order[i]`."""
    shape = call.outputs[0].shape
    operand: list[Group] = [()] * len(order)
    for index, source in enumerate(order):
        operand[source] = (f"d{index}",)
    loops = sizes(shape)
    return Nest(loops, (tuple(operand),), (broadcast(shape, shape),), linear=_linear(call), uneven=frozenset(loops))


def permute(call: Call) -> Nest | None:
    order = call.ints(1, "dims")
    assert order is not None
    return _moved(call, tuple(positive(dim, len(order)) for dim in order))


def transpose(call: Call) -> Nest | None:
    rank = len(call.operands[0].shape)
    order = list(range(rank))
    if rank:
        one, other = positive(call.int(1, "dim0"), rank), positive(call.int(2, "dim1"), rank)
        order[one], order[other] = order[other], order[one]
    return _moved(call, tuple(order))


def t(call: Call) -> Nest | None:
    """`t`, `mT`: the last two dims exchanged."""
    rank = len(call.operands[0].shape)
    return _moved(call, (*range(rank - 2), rank - 1, rank - 2) if rank >= 2 else tuple(range(rank)))


def movedim(call: Call) -> Nest | None:
    rank = len(call.operands[0].shape)
    source, target = call.ints(1, "source"), call.ints(2, "destination")
    assert source is not None and target is not None
    order = [-1] * rank
    for old, new in zip(source, target, strict=True):
        order[positive(new, rank)] = positive(old, rank)
    rest = iter(dim for dim in range(rank) if dim not in order)
    return _moved(call, tuple(dim if dim >= 0 else next(rest) for dim in order))


def repeat(call: Call) -> Nest | None:
    """`repeat`: result dim `(r d)`, r copies of dim d one after the other."""
    return _repeated(call, outside=True, dims=None)


def unfold(call: Call) -> Nest | None:
    """`unfold(x, dim, size, step)`: windows along `dim`, which is whole; each is a new last dim."""
    shape = call.operands[0].shape
    if not shape:
        return None
    dim = positive(call.int(1, "dimension"), len(shape))
    kept: Term = tuple(() if d == dim else (f"d{d}",) for d in range(len(shape)))
    loops = {f"d{d}": size for d, size in enumerate(shape) if d != dim}
    return Nest(loops, (kept,), ((*kept, ()),), linear=((0,),))


def repeat_interleave(call: Call) -> Nest | None:
    """`repeat_interleave` by a number: result dim `(d r)`, every element r times."""
    dim = call.op.arg(2, "dim")
    if not isinstance(dim, int) or not isinstance(call.op.arg(1, "repeats"), int):
        return None
    return _repeated(call, outside=False, dims=positive(dim, len(call.operands[0].shape)))


def _repeated(call: Call, outside: bool, dims: int | None) -> Nest:
    shape, result = call.operands[0].shape, call.outputs[0].shape
    offset = len(result) - len(shape)
    loops: dict[str, int] = {}
    operand: list[Group] = []
    output: list[Group] = []
    for index, size in enumerate(result):
        own, copies = f"d{index}", f"d{index}.copies"
        old = shape[index - offset] if index >= offset else 1
        if index >= offset:
            operand.append((own,) if old > 1 else ())
        if old > 1:
            loops[own] = old
        if size != old:
            loops[copies] = size // old if old else 1
        group = [name for name in ((copies, own) if outside else (own, copies)) if name in loops]
        output.append(tuple(group))
    return Nest(loops, (tuple(operand),), (tuple(output),), linear=_linear(call))
