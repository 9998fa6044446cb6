"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph import Op, Ref
from autopar.ir.rules.families.common import broadcast, sizes
from autopar.ir.rules.nest import FLOATS, Call, Nest


def _nest(call: Call, linear: tuple[tuple[int, ...], ...] = ()) -> Nest | None:
    shape = call.outputs[0].shape
    if any(value.shape != shape for value in call.outputs):
        return None
    loops = sizes(shape)
    return Nest(
        loops=loops,
        operands=tuple(broadcast(value.shape, shape) for value in call.operands),
        outputs=tuple(broadcast(value.shape, shape) for value in call.outputs),
        linear=linear,
        uneven=frozenset(loops),
    )


def _all_tensors(op: Op, count: int) -> bool:
    return all(isinstance(arg, Ref) for arg in op.args[:count])


def nonlinear(call: Call) -> Nest | None:
    """`relu`, `pow`, comparisons, ...: no terms of sums."""
    return _nest(call)


def additive(call: Call) -> Nest | None:
    """`add`, `sub`: linear in both operands together, but not where one is a number."""
    return _nest(call, ((0, 1),) if _all_tensors(call.op, 2) and len(call.operands) == 2 else ())


def multiplicative(call: Call) -> Nest | None:
    """`mul`: linear in each operand."""
    return _nest(call, tuple((index,) for index in range(len(call.operands))))


def first_linear(call: Call) -> Nest | None:
    """`neg`, `div`, `clone`, ...: linear in the first operand."""
    return _nest(call, ((0,),) if call.operands and isinstance(call.op.args[0], Ref) else ())


def cast(call: Call) -> Nest | None:
    """Dtype conversion: linear where the result is a float and nothing is cut off."""
    nest = _nest(Call(call.op, call.operands[:1], call.outputs), ((0,),) if call.outputs[0].dtype in FLOATS else ())
    if nest is None or len(call.operands) == 1:
        return nest
    # Of `type_as`'s second operand, of any shape, only the dtype counts.
    return replace(nest, operands=(*nest.operands, *(((),) * len(value.shape) for value in call.operands[1:])))


def where(call: Call) -> Nest | None:
    """`where(condition, x, y)`: linear in x and y together."""
    return _nest(call, ((1, 2),) if len(call.operands) == 3 else ())


def masked_fill(call: Call) -> Nest | None:
    """`masked_fill(x, mask, value)`: linear in x where the value is zero. The result has the shape of x and mask together."""
    return _nest(call, ((0,),) if call.op.args[2] in (0, 0.0, False) else ())


def dropout(call: Call) -> Nest | None:
    """`autopar.dropout`: every shard draws its own mask."""
    return _nest(call)


def copied(call: Call) -> Nest | None:
    """`copy(x, source)`: the values of `source`, broadcast to the shape of `x`; x gets no gradient."""
    return _nest(call, ((1,),) if len(call.operands) == 2 else ())
