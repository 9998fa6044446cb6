"""Arguments of an operation on one rank: those that speak of shapes, said in local shapes.

The numerical checker of the rules and the runtime both ask here, so that what is checked is what runs.
"""

from __future__ import annotations

from collections.abc import Callable

from autopar.ir.graph import Arg, Op

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]
Rewrite = Callable[[Op, Shapes, Shapes], "dict[int | str, Arg]"]


def local_args(op: Op, input_shapes: Shapes, output_shapes: Shapes) -> tuple[tuple[Arg, ...], tuple[tuple[str, Arg], ...]]:
    """Positional and keyword arguments of `op` for operands and results of the given local shapes, `Ref`s left in place.

    `input_shapes` has one entry per entry of `op.operands`, `output_shapes` one per entry of `op.outputs`.
    """
    rewrite = LOCAL_ARGS.get(op.target)
    if rewrite is None:
        return op.args, op.kwargs
    args, kwargs = list(op.args), dict(op.kwargs)
    for place, arg in rewrite(op, input_shapes, output_shapes).items():
        if isinstance(place, str):
            kwargs[place] = arg
        elif place < len(args):
            args[place] = arg
    return tuple(args), tuple(kwargs.items())


def _result_shape(position: int) -> Rewrite:
    """The argument at `position` is the shape of the result."""
    return lambda op, inputs, outputs: {position: outputs[0]}


def _unflatten(op: Op, inputs: Shapes, outputs: Shapes) -> dict[int | str, Arg]:
    dim = op.args[1]
    assert isinstance(dim, int)
    dim = dim + len(inputs[0]) if dim < 0 else dim
    return {2: outputs[0][dim : dim + len(outputs[0]) - len(inputs[0]) + 1]}


def _dim(op: Op, inputs: Shapes, position: int) -> int:
    dim = op.arg(position, "dim", 0)
    assert isinstance(dim, int)
    return dim + len(inputs[0]) if dim < 0 else dim


def _part_size(op: Op, inputs: Shapes, outputs: Shapes) -> dict[int | str, Arg]:
    """`split(x, size, dim)`: the first part is never the smaller one."""
    return {1: outputs[0][_dim(op, inputs, 2)]}


def _part_sizes(op: Op, inputs: Shapes, outputs: Shapes) -> dict[int | str, Arg]:
    dim = _dim(op, inputs, 2)
    return {1: tuple(shape[dim] for shape in outputs)}


def _repeats(op: Op, inputs: Shapes, outputs: Shapes) -> dict[int | str, Arg]:
    padded = (1,) * (len(outputs[0]) - len(inputs[0])) + inputs[0]
    return {1: tuple(after // before if before else 1 for before, after in zip(padded, outputs[0], strict=True))}


def _repeat_interleave(op: Op, inputs: Shapes, outputs: Shapes) -> dict[int | str, Arg]:
    dim = _dim(op, inputs, 2)
    return (
        {1: outputs[0][dim] // inputs[0][dim], "output_size": None}
        if "output_size" in dict(op.kwargs)
        else {1: outputs[0][dim] // inputs[0][dim]}
    )


def _slice(op: Op, inputs: Shapes, outputs: Shapes) -> dict[int | str, Arg]:
    """`slice` of all of a dim: to the end, whatever the end is called."""
    dim = _dim(op, inputs, 1)
    if inputs[0][dim] == outputs[0][dim] and op.arg(4, "step", 1) == 1:
        return {2: 0, 3: outputs[0][dim]}
    return {}


def _narrow(op: Op, inputs: Shapes, outputs: Shapes) -> dict[int | str, Arg]:
    return {3: outputs[0][_dim(op, inputs, 1)]}


def _native_group_norm(op: Op, inputs: Shapes, outputs: Shapes) -> dict[int | str, Arg]:
    """`native_group_norm(x, weight, bias, n, c, hw, groups, eps)`."""
    channels, groups = op.args[4], op.args[6]
    assert isinstance(channels, int) and isinstance(groups, int)
    local = inputs[0][1]
    return {3: inputs[0][0], 4: local, 6: groups * local // channels}


def _groups(position: int, transposed_at: int | None = None) -> Rewrite:
    """Groups of a convolution: local input channels over the input channels that one group's weight has."""

    def rewrite(op: Op, inputs: Shapes, outputs: Shapes) -> dict[int | str, Arg]:
        groups = op.arg(position, "groups", 1)
        if groups == 1:
            return {}
        transposed = transposed_at == -1 or (transposed_at is not None and bool(op.args[transposed_at]))
        local = outputs[0][1] // inputs[1][1] if transposed else inputs[0][1] // inputs[1][1]
        return {position: local} if position < len(op.args) else {"groups": local}

    return rewrite


LOCAL_ARGS: dict[str, Rewrite] = {}
"""What to rewrite, by operator: functions of operation, operand shapes and result shapes to new arguments by position or keyword."""


def _register(rewrite: Rewrite, targets: str) -> None:
    for name in targets.split():
        LOCAL_ARGS[f"aten.{name}"] = rewrite


_register(
    _result_shape(1),
    "view.default _unsafe_view.default reshape.default view_copy.default _reshape_alias.default expand.default expand_copy.default "
    "broadcast_to.default new_full.default new_zeros.default new_ones.default new_empty.default",
)
_register(_result_shape(0), "full.default zeros.default ones.default empty.memory_format")
_register(_unflatten, "unflatten.int")
_register(_part_size, "split.Tensor split_copy.Tensor")
_register(_part_sizes, "split.sizes split_with_sizes.default split_with_sizes_copy.default")
_register(_repeats, "repeat.default tile.default")
_register(_repeat_interleave, "repeat_interleave.self_int")
_register(_slice, "slice.Tensor slice_copy.Tensor")
_register(_narrow, "narrow.default narrow_copy.default")
_register(_native_group_norm, "native_group_norm.default")
_register(_groups(6), "conv1d.default conv2d.default conv3d.default conv1d.padding conv2d.padding conv3d.padding")
_register(_groups(8, transposed_at=6), "convolution.default _convolution.default")
_register(_groups(6, transposed_at=-1), "conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input")
