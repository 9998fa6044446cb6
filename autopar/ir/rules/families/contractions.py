"""Matrix products, convolutions and attention whose loops depend on ranks or on arguments."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from autopar.ir.placement import R, S
from autopar.ir.rules.families.common import broadcast
from autopar.ir.rules.nest import Call, Group, Nest, Term, lacking
from autopar.ir.rules.split import Split


def matmul(call: Call) -> Nest | None:
    """`matmul(x, y)` for any ranks: `... m k, ... k n -> ... m n`; a vector lacks `m` or `n`."""
    x, y = (value.shape for value in call.operands)
    shape = call.outputs[0].shape
    lead = max(len(x) - 2, len(y) - 2, 0)
    batch = shape[:lead]
    loops = {f"d{index}": size for index, size in enumerate(batch)} | {"k": x[-1]}
    left: Term = (*broadcast(x[:-2], batch), *((("m",),) if len(x) > 1 else ()), ("k",))
    right: Term = (*broadcast(y[:-2], batch), ("k",), ("n",)) if len(y) > 1 else (("k",),)
    result: list[Group] = [(f"d{index}",) for index in range(lead)]
    if len(x) > 1:
        loops["m"] = x[-2]
        result.append(("m",))
    if len(y) > 1:
        loops["n"] = y[-1]
        result.append(("n",))
    return Nest(loops, (left, right), (tuple(result),), linear=((0,),), uneven=frozenset({"k", "n"}))


def outer(call: Call) -> Nest | None:
    """`outer`, `ger`: `m, n -> m n`."""
    return Nest(
        {"m": call.operands[0].shape[0], "n": call.operands[1].shape[0]}, ((("m",),), (("n",),)), ((("m",), ("n",)),), linear=((0,),)
    )


def einsum(call: Call) -> Nest | None:
    """`einsum(equation, operands)` without repeated letters in one operand."""
    equation = call.op.args[0]
    if not isinstance(equation, str):
        return None
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(call.operands):
        return None
    lead = len(call.outputs[0].shape) - len(right.replace("...", "")) if "..." in right else 0

    def term(text: str, shape: tuple[int, ...]) -> Term:
        before, dots, after = text.partition("...")
        count = len(shape) - len(before) - len(after) if dots else 0
        return (*((c,) for c in before), *((f"d{lead - count + i}",) for i in range(count)), *((c,) for c in after))

    operands = tuple(term(text, value.shape) for text, value in zip(terms, call.operands, strict=True))
    output = term(right, call.outputs[0].shape)
    loops: dict[str, int] = {}
    for item, value in zip((*operands, output), (*call.operands, *call.outputs), strict=True):
        if len(set(item)) != len(item) or len(item) != len(value.shape):
            return None
        for group, size in zip(item, value.shape, strict=True):
            loops[group[0]] = max(loops.get(group[0], 1), size)
    shrunk = tuple(
        tuple(group if size == loops[group[0]] else () for group, size in zip(item, value.shape, strict=True))
        for item, value in zip(operands, call.operands, strict=True)
    )
    return Nest(loops, shrunk, (output,), linear=((0,),))


def convolution(call: Call) -> Nest | None:
    """`conv2d(x, weight, bias, stride, padding, dilation, groups)` and its kin: `b (g c) [..], (g o) c [..], +(g o) -> b (g o) [..]`.

    Space is whole: a split would need the rim of the neighbour's part. With one group (`g` of size 1) `c` is summed.
    """
    return _convolved(call, 6, transposed=False)


def general_convolution(call: Call) -> Nest | None:
    """`convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)`."""
    return _convolved(call, 8, transposed=bool(call.op.arg(6, "transposed", False)))


def transposed_convolution(call: Call) -> Nest | None:
    """`conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)`: the weight is `(g c) o`."""
    return _convolved(call, 6, transposed=True)


def _convolved(call: Call, position: int, transposed: bool) -> Nest | None:
    x, weight = call.operands[0].shape, call.operands[1].shape
    if len(x) != len(weight):
        return None  # without a batch dim
    groups = call.int(position, "groups", 1)
    result = call.outputs[0].shape
    loops = {"b": x[0], "g": groups, "c": x[1] // groups, "o": result[1] // groups}

    def merged(name: str) -> Group:
        return tuple(loop for loop in ("g", name) if loops[loop] > 1)

    space: Term = ((),) * (len(x) - 2)
    inside: Group = ("o",) if transposed else ("c",)
    weights: Term = (merged("c" if transposed else "o"), inside, *space)
    operands: list[Term] = [(("b",), merged("c"), *space), weights]
    if len(call.operands) > 2:
        operands.append((merged("o"),))
    return Nest(
        {name: size for name, size in loops.items() if size > 1 or name in ("b", *inside)},
        tuple(operands),
        ((("b",), merged("o"), *space),),
        added=frozenset(range(2, len(operands))),
        linear=((0, *range(2, len(operands))),),
    )


def attention(call: Call) -> Nest | None:
    """`scaled_dot_product_attention(q[.. h l e], k[.. h s e], v[.. h s f], mask[.. l s], dropout_p, is_causal)`.

    Batch dims and heads are loops; with grouped queries the query heads are `(h q)` for `h` key-value heads. The sequence is split in two
    ways: `l`, queries, with keys and values whole, and `ring`, keys and values too (`_over_the_sequence`).
    """
    if len(call.operands) < 3:
        return None
    q, k, v = (value.shape for value in call.operands[:3])
    result = call.outputs[0].shape
    rank = len(result)
    if any(len(shape) != rank for shape in (q, k, v)) or rank < 3:
        return None
    loops: dict[str, int] = {}
    lead: list[list[Group]] = [[], [], []]
    for dim in range(rank - 2):
        name = "h" if dim == rank - 3 and rank > 3 else f"d{dim}"
        sizes = (q[dim], k[dim], v[dim])
        if all(size in (1, result[dim]) for size in sizes):
            loops[name] = result[dim]
            groups: list[Group] = [(name,) if size == result[dim] else () for size in sizes]
        elif dim == rank - 3 and call.op.kwarg("enable_gqa", False) is True and k[dim] == v[dim] and q[dim] % k[dim] == 0:
            loops[name], loops["q"] = k[dim], q[dim] // k[dim]
            groups = [(name, "q"), (name,), (name,)]
        else:
            return None
        for term, group in zip(lead, groups, strict=True):
            term.append(group)
    causal = bool(call.op.arg(5, "is_causal", False))
    loops["l"] = q[-2]
    operands: list[Term] = [(*lead[0], ("l",), ()), (*lead[1], (), ()), (*lead[2], (), ())]
    output: Term = (*((name, "q") if name == "h" and "q" in loops else (name,) for name in loops if name not in "ql"), ("l",), ())
    if len(call.operands) > 3:
        mask = call.operands[3].shape
        start = rank - len(mask)
        own = tuple(output[start + dim] if size == result[start + dim] else () for dim, size in enumerate(mask[:-1]))
        operands.append((*own, ()))
    nest = Nest(loops, tuple(operands), (output,))
    return replace(nest, whole=frozenset({"l"}) if causal else frozenset(), extra=_over_the_sequence(call, causal))


def _over_the_sequence(call: Call, causal: bool) -> tuple[Split, ...]:
    """`l` where queries know their position (causal), and `ring`.

    Causal work is shared evenly in halves of blocks, so that twice the ranks must divide the sequence. A causal mask over other numbers of
    keys than of queries, one beside a mask, dropout, and masks of numbers (which may have gradients) have no such splits.
    """
    queries, keys = call.operands[0].shape[-2], call.operands[1].shape[-2]
    place = len(call.outputs[0].shape) - 2
    masked = len(call.operands) > 3
    found: list[Split] = []
    q, k, v = (value.shape[:-2] for value in call.operands[:3])
    # Blocks are computed by kernels to which heads may be shared by queries, and nothing else is broadcast.
    if call.op.arg(4, "dropout_p", 0.0) or k != v or q[:-1] != k[:-1] or q[-1] % k[-1]:
        return ()
    if causal:
        if masked or queries != keys or queries % 4:
            return ()
        inputs = (S(place), *(lacking(value) for value in call.operands[1:3]))
        found.append(Split("l", inputs, (S(place),), queries // 2, implementation="causal_queries"))
    size = queries // 2 if causal else gcd(queries, keys)
    inputs = (S(place),) * 3
    if masked:
        mask = call.operands[3]
        if mask.dtype != "bool":
            return tuple(found)
        inputs += (S(len(mask.shape) - 2) if len(mask.shape) > 1 and mask.shape[-2] == queries else R,)
    if size > 1:
        found.append(Split("ring", inputs, (S(place),), size, implementation="causal_ring_attention" if causal else "ring_attention"))
    return tuple(found)
