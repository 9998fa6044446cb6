"""Reductions and normalisations."""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.placement import Placement, R, S
from autopar.ir.rules.families.common import Family, dims, names, positive, sizes
from autopar.ir.rules.nest import Call, Nest, Term
from autopar.ir.rules.split import Split


def _reduced(call: Call, over: frozenset[int], splittable: bool, linear: bool, implementation: str = "") -> Nest | None:
    shape = call.operands[0].shape
    rank = len(shape)
    operand = names(rank)
    result: Term
    if all(len(value.shape) == rank for value in call.outputs):
        result = tuple(() if dim in over else group for dim, group in enumerate(operand))
    else:
        result = tuple(group for dim, group in enumerate(operand) if dim not in over)
    if any(len(value.shape) != len(result) for value in call.outputs):
        return None
    loops = sizes(shape)
    reduced = frozenset(f"d{dim}" for dim in over)
    return Nest(
        loops,
        (operand,),
        tuple(result for _ in call.outputs),
        whole=frozenset() if splittable else reduced,
        linear=((0,),) if linear else (),
        uneven=frozenset(loops),
        implementations=dict.fromkeys(reduced, implementation) if implementation else {},
    )


def _over(call: Call, position: int, name: str, default: int | None = None) -> frozenset[int]:
    arg = call.op.arg(position, name, default)
    if isinstance(arg, int) and not isinstance(arg, bool):
        return dims((arg,), len(call.operands[0].shape))
    return dims(None if isinstance(arg, bool) else call.ints(position, name), len(call.operands[0].shape))


def total(call: Call) -> Nest | None:
    """`sum`: a split of a reduced dim leaves terms of the sum."""
    return _reduced(call, _over(call, 1, "dim"), True, linear=call.operands[0].dtype != "bool")


def mean(call: Call) -> Nest | None:
    """`mean`: the sum of the part over the global count is a term of the mean."""
    return _reduced(call, _over(call, 1, "dim"), True, linear=True, implementation="mean_of_part")


def coupled(position: int = 1, name: str = "dim", default: int | None = None) -> Family:
    """`amax`, `var`, `any`, `argmax`, `norm`, ...: the reduced dims are needed whole."""

    def family(call: Call) -> Nest | None:
        return _reduced(call, _over(call, position, name, default), False, linear=False)

    return family


def everything(call: Call) -> Nest | None:
    """`max(x)`, `any(x)`: over all dims, which are needed whole."""
    return _reduced(call, frozenset(range(len(call.operands[0].shape))), False, linear=False)


def weight_norm(call: Call) -> Nest | None:
    """`_weight_norm(v, g, dim)`: `v` over its norm along all dims but `dim`, times `g`, whose other dims are 1. Which dims are left says
    `dim`; -1 is none."""
    shape = call.operands[0].shape
    dim = call.int(2, "dim")
    term: Term = tuple((f"d{d}",) if d == dim else () for d in range(len(shape)))
    if len(call.operands[1].shape) != len(shape):
        return None
    return Nest({f"d{dim}": shape[dim]} if dim >= 0 else {}, (term, term), (term,))


def layer_norm(call: Call) -> Nest | None:
    """`layer_norm(x, normalized_shape, weight, bias)`, `rms_norm`, native forms: the normalised dims are needed whole."""
    shape = call.operands[0].shape
    normalized = call.ints(1, "normalized_shape") or ()
    lead = len(shape) - len(normalized)
    loops = {f"d{dim}": shape[dim] for dim in range(lead)}
    first = tuple((f"d{dim}",) if dim < lead else () for dim in range(len(shape)))

    def output(rank: int, own: tuple[int, ...]) -> Term:
        return tuple((f"d{dim}",) if dim < lead and own[dim] == shape[dim] else () for dim in range(rank))

    others: tuple[Term, ...] = tuple(((),) * len(value.shape) for value in call.operands[1:])
    if any(len(value.shape) < lead for value in call.outputs):
        return None
    return Nest(loops, (first, *others), tuple(output(len(value.shape), value.shape) for value in call.outputs))


def group_norm(call: Call) -> Nest | None:
    """`group_norm(x[n c ..], groups, weight[c], bias[c])`: samples are independent."""
    x = call.operands[0].shape
    return Nest({"b": x[0]}, ((("b",), *((),) * (len(x) - 1)), *(((),) for _ in call.operands[1:])), ((("b",), *((),) * (len(x) - 1)),))


def native_group_norm(call: Call) -> Nest | None:
    """`native_group_norm(x, weight, bias, n, c, hw, groups, eps) -> y, mean[n g], rstd[n g]`: samples and groups are independent."""
    x = call.operands[0].shape
    groups = call.int(6, "group")
    loops = {"b": x[0], "g": groups, "c": x[1] // groups}
    channel = tuple(name for name in ("g", "c") if loops[name] > 1)
    full: Term = (("b",), channel, *((),) * (len(x) - 2))
    statistics: Term = (("b",), ("g",) if groups > 1 else ())
    return Nest(
        {name: size for name, size in loops.items() if name == "b" or size > 1},
        (full, *((channel,) for _ in call.operands[1:])),
        (full, statistics, statistics),
        whole=frozenset({"c"}),
    )


def batch_norm_inference(call: Call) -> Nest | None:
    """Batch normalisation with given statistics: every element for itself. Results besides the first are empty, or the statistics."""
    x = call.operands[0].shape
    loops = {"b": x[0], "c": x[1]} | {f"d{dim}": x[dim] for dim in range(2, len(x))}
    full: Term = (("b",), ("c",), *((f"d{dim}",) for dim in range(2, len(x))))
    channel: Term = (("c",),)
    rest = call.outputs[1:]
    empty = all(value.shape == (0,) for value in rest)
    if not empty and any(value.shape != x[1:2] for value in rest):
        return None
    return Nest(
        loops,
        (full, *(channel for _ in call.operands[1:])),
        # An empty result is a term of an empty sum, whatever is split; a statistic is known to whoever holds all of its channel.
        (full, *(((),) if empty else channel for _ in rest)),
        whole=frozenset() if empty else frozenset(loops) - {"c"},
    )


def batch_norm_eval(call: Call) -> Nest | None:
    """`batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn)` where `training` is False."""
    if call.op.arg(5, "training", False) is not False:
        return None
    return batch_norm_inference(call)


def softmax(call: Call) -> Nest | None:
    """`softmax(x, dim)` and its logarithm. Split `dim`: maximum and sum of each row are reduced over the axis, and the gradient's sum.
    That is for classes; with four dims and more, `x` are the scores of attention, and a search over splits of their keys takes long."""
    shape = call.operands[0].shape
    rank = len(shape)
    dim = positive(call.int(1, "dim"), rank)
    term: Term = tuple(() if index == dim else (f"d{index}",) for index in range(rank))
    loops = {f"d{index}": size for index, size in enumerate(shape) if index != dim}
    talks = 0 < rank < 4 and "safe" not in call.op.target  # that one makes zeros of rows without a finite number
    return Nest(loops, (term,), (term,), uneven=frozenset(loops), extra=_split(call, dim, S(dim), "split_softmax") if talks else ())


def reduced_over_ranks(implementation: str) -> Family:
    """`logsumexp(x, dim)`, `amax`, `max`, `argmax`: over one dim that is split, a few numbers of each row are reduced over the axis."""

    def family(call: Call) -> Nest | None:
        over = _over(call, 1, "dim")
        nest = _reduced(call, over, False, linear=False)
        if nest is None or len(over) != 1:
            return nest
        return replace(nest, extra=_split(call, min(over), R, implementation))

    return family


def _split(call: Call, dim: int, output: Placement, implementation: str) -> tuple[Split, ...]:
    """The split of the reduced `dim` of the first operand by an implementation that talks."""
    size = call.operands[0].shape[dim]
    outputs = tuple(output for _ in call.outputs)
    split = Split(f"d{dim}", inputs=(S(dim),), outputs=outputs, size=size, uneven=True, implementation=implementation)
    return (split,) if size > 1 else ()
