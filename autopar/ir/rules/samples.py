"""Random operands on which an operation is defined: floats inside its domain, integers inside the ranges it looks up (imports torch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autopar.ir.graph import Op, Ref

Shape = tuple[int, ...]
_POSITIVE = {
    "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "pow", "acos", "asin", "atanh", "logit", "erfinv", "lgamma", "digamma",
    "xlogy", "prod", "cumprod", "float_power", "div", "true_divide", "addcdiv", "fmod", "remainder", "floor_divide",
    "binary_cross_entropy", "poisson_nll_loss", "kl_div",
}  # fmt: skip
"""Operators whose operands are drawn from (0.25, 0.9), where they and their gradients are finite."""


_NO_DERIVATIVE = {"bucketize", "copy", "detach", "detach_copy", "floor_divide", "heaviside", "searchsorted"}
"""Operators on floats for which torch has no derivative."""


_FIRST_WITH_GRADIENT = {
    "soft_margin_loss": 1, "hinge_embedding_loss": 1, "cosine_embedding_loss": 2, "margin_ranking_loss": 3, "nll_loss": 1, "nll_loss_nd": 1,
    "nll_loss2d": 1, "cross_entropy_loss": 2, "binary_cross_entropy": 2, "binary_cross_entropy_with_logits": 2,
}  # fmt: skip
"""How many operands, the first ones, have a gradient, where not all of them have: signs and weights of classes have none."""

_SIGNS = {"hinge_embedding_loss": 1, "margin_ranking_loss": 2, "cosine_embedding_loss": 2}
"""Operands that are 1 or -1."""


def differentiable(op: Op) -> list[bool]:
    """For every operand slot whether the operator has a gradient for it. Running statistics of a batch norm, its last two, have none."""
    name = op.target.split(".")[1]
    count = len(op.operands)
    if name in _NO_DERIVATIVE:
        return [False] * count
    if "batch_norm" in name:
        return [slot < count - 2 for slot in range(count)]
    return [slot < _FIRST_WITH_GRADIENT.get(name, count) for slot in range(count)]


def random_operands(op: Op, shapes: Sequence[Shape], dtypes: Sequence[str], seed: int) -> list[Tensor]:
    """One tensor per operand slot, floats as float64; a value that is read twice is the same both times."""
    generator = torch.Generator().manual_seed(seed)
    name = op.target.split(".")[1]
    known: dict[str, Tensor] = {}
    found = []
    for slot, operand in enumerate(op.operands):
        if operand not in known:
            known[operand] = _random(op, name, slot, shapes, dtypes[slot], generator)
        found.append(known[operand])
    return found


def _random(op: Op, name: str, slot: int, shapes: Sequence[Shape], dtype: str, generator: torch.Generator) -> Tensor:
    shape = shapes[slot]
    if dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.6
    if dtype.startswith(("float", "bfloat")):
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        if _SIGNS.get(name) == slot:
            return (x - 0.5).sign()
        # The fourth and fifth operand of a batch norm are statistics; a variance is positive.
        return x * 0.65 + 0.25 if name in _POSITIVE or "batch_norm" in name else x * 4 - 2
    kind = getattr(torch, dtype)
    if "grouped_mm" in name:  # where each group of rows ends
        return torch.linspace(0, shapes[0][0], shape[0] + 1)[1:].to(kind)
    if name in _INDICES:
        low, high, ignored = _INDICES[name](op, slot, shapes)
        if name.startswith("scatter") and slot == 1:
            return _distinct(op, shapes, generator)
        drawn = torch.randint(low, high, shape, generator=generator, dtype=kind)
        return drawn if ignored is None else torch.where(torch.rand(shape, generator=generator) < 0.2, ignored, drawn)
    return torch.randint(1, 4, shape, generator=generator, dtype=kind)


def _distinct(op: Op, shapes: Sequence[Shape], generator: torch.Generator) -> Tensor:
    """Indices along the dim that name no place twice, so that it does not matter in which order they are written."""
    dim = op.args[1]
    assert isinstance(dim, int)
    size, index = shapes[0][dim], shapes[1]
    wide = list(index)
    wide[dim] = size
    return torch.rand(wide, generator=generator).argsort(dim).narrow(dim, 0, index[dim])


Range = tuple[int, int, int | None]


def _along(op: Op, slot: int, shapes: Sequence[Shape]) -> Range:
    dim = op.args[1]
    assert isinstance(dim, int)
    return 0, shapes[0][dim], None


def _classes(op: Op, slot: int, shapes: Sequence[Shape]) -> Range:
    ignored = op.arg(2 if op.target.startswith("autopar") else 4, "ignore_index", -100)
    assert isinstance(ignored, int)
    return 0, shapes[0][1], ignored


def _indexed(op: Op, slot: int, shapes: Sequence[Shape]) -> Range:
    arg = op.args[1]
    assert isinstance(arg, tuple)
    dims = [dim for dim, item in enumerate(arg) if isinstance(item, Ref)]
    return (0, shapes[0][dims[slot - 1]], None) if 0 < slot <= len(dims) else (1, 4, None)


def _hot(op: Op, slot: int, shapes: Sequence[Shape]) -> Range:
    count = op.args[1]
    assert isinstance(count, int)
    return 0, count, None


_INDICES: dict[str, Callable[[Op, int, Sequence[Shape]], Range]] = {
    "embedding": lambda op, slot, shapes: (0, shapes[0][0], None),
    "cross_entropy": _classes,
    "cross_entropy_loss": _classes,
    "target_weight": lambda op, slot, shapes: (0, 5, -100),
    "nll_loss": _classes,
    "nll_loss_nd": _classes,
    "nll_loss2d": _classes,
    "multilabel_margin_loss": lambda op, slot, shapes: (-1, shapes[0][-1], None),
    "gather": _along,
    "scatter": _along,
    "scatter_add": _along,
    "scatter_reduce": _along,
    "index_select": _along,
    "index_add": _along,
    "index": _indexed,
    "_unsafe_index": _indexed,
    "index_put": _indexed,
    "_unsafe_index_put": _indexed,
    "one_hot": _hot,
    "experts": lambda op, slot, shapes: (0, shapes[-1][0], None),
    "expert_linear": lambda op, slot, shapes: (0, shapes[1][0], None),
    "expert_rows": lambda op, slot, shapes: (0, shapes[0][0], None),
}
"""Lowest and one above the highest integer of an operand, and a value to strew in, by operator."""
