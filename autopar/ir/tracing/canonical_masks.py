"""Masks of attention that are causal for all they are made of, written as `is_causal`.

A mask of `l` rows and `s` keys has `l s` elements, 16 GB at 128k tokens, and says that row `i` sees the keys up to `i`. What makes it is
followed symbolically here: positions are sums `a i + b j + c` of indices, comparisons of positions are conditions `a i + b j + c >= 0`,
and a mask is one value where all conditions of a set hold and another elsewhere. Only a mask whose conditions, on its shape, come to
`i - j >= 0` and nothing else is taken for causal; one that hides nothing is left out. Whatever is made otherwise stays as it is.

Where a mask is gone, heads of keys and values that were repeated for it are no longer: `enable_gqa` reads each once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from autopar.ir.graph import Arg, Graph, Op, Ref, Value
from autopar.ir.tracing.rewriter import Rewriter

ATTENTION = "aten.scaled_dot_product_attention.default"
Scalar = bool | int | float
Condition = tuple[tuple[int, ...], int]
"""`(coefficients, constant)`: the sum over dims of coefficient times index, plus the constant, is at least 0. Dims of size 1 have 0."""

_LEAST = {"float16": -65504.0, "bfloat16": -3.3e38, "float32": -3.4e38, "float64": -1.7e308}
"""So much or less, added to a score, hides a key as -inf does wherever another is seen."""


@dataclass(frozen=True, slots=True)
class Positions:
    """An integer at every index: coefficients times indices plus the constant."""

    coefficients: tuple[int, ...]
    constant: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """`kept` where all `conditions` hold, `other` elsewhere."""

    conditions: frozenset[Condition]
    kept: Scalar
    other: Scalar

    def swapped(self) -> Chosen | None:
        """The same, said by what does not hold: possible for one condition."""
        if len(self.conditions) != 1:
            return None
        ((coefficients, constant),) = self.conditions
        return Chosen(frozenset({(tuple(-item for item in coefficients), -constant - 1)}), self.other, self.kept)

    def mapped(self, function: Callable[[Scalar], Scalar]) -> Chosen:
        return Chosen(self.conditions, function(self.kept), function(self.other))


Known = Positions | Chosen


def causal_masks(graph: Graph) -> Graph:
    """Attention without the masks that say only what `is_causal` says, or nothing."""
    if not any(op.target == ATTENTION and isinstance(op.arg(3, "attn_mask"), Ref) for op in graph.ops):
        return graph
    look = _Look(graph)
    rewriter = Rewriter(graph)
    for op in graph.ops:
        op = rewriter.read(op)
        mask = op.arg(3, "attn_mask") if op.target == ATTENTION else None
        if isinstance(mask, Ref) and op.arg(5, "is_causal", False) is False and (says := look.hides(mask.name)) is not None:
            op = _repeated_heads(graph, _without_mask(op, says))
        rewriter.ops.append(op)
    return rewriter.done()


def _without_mask(op: Op, causal: bool) -> Op:
    known = dict(op.kwargs)
    dropout = op.arg(4, "dropout_p", 0.0)
    rest = tuple((key, known[key]) for key in ("scale", "enable_gqa") if key in known)
    return replace(op, args=(*op.args[:3], None, dropout, causal), kwargs=rest)


def _repeated_heads(graph: Graph, op: Op) -> Op:
    """Reads keys and values where they were before each head was repeated for the queries that share it."""
    if op.kwarg("enable_gqa", False) is True:
        return op
    found = [_before_repeat(graph, arg) for arg in op.args[1:3]]
    if any(item is None for item in found) or found[0] is None or found[1] is None:
        return op
    if graph.values[found[0].name].shape[:3] != graph.values[found[1].name].shape[:3]:
        return op
    kwargs = (*(item for item in op.kwargs if item[0] != "enable_gqa"), ("enable_gqa", True))
    return replace(op, args=(op.args[0], *found, *op.args[3:]), kwargs=kwargs)


def _before_repeat(graph: Graph, arg: Arg) -> Ref | None:
    """`x (b, h, s, e)` of `x.unsqueeze(2).expand(b, h, g, s, e).view(b, h g, s, e)`."""
    ops = []
    for target in ("aten.view.default", "aten.expand.default", "aten.unsqueeze.default"):
        op = graph.producers.get(arg.name) if isinstance(arg, Ref) else None
        if op is None or op.target != target:
            return None
        ops.append(op)
        arg = op.args[0]
    if not isinstance(arg, Ref):
        return None
    shape = graph.values[arg.name].shape
    view, expand, unsqueeze = (graph.values[op.outputs[0]].shape for op in ops)
    if len(shape) != 4 or len(view) != 4 or unsqueeze != (*shape[:2], 1, *shape[2:]) or ops[2].args[1] not in (2, -3):
        return None
    repeated = (*shape[:2], expand[2], *shape[2:])
    return arg if expand == repeated and view == (shape[0], shape[1] * expand[2], *shape[2:]) else None


class _Look:
    """What is known of the values of a graph; each is looked at once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.found: dict[str, Known | None] = {}

    def hides(self, mask: str) -> bool | None:
        """True where `mask` is causal, False where it hides nothing, None where it is anything else."""
        value, known = self.graph.values[mask], self.known(mask)
        if not isinstance(known, Chosen) or len(value.shape) < 2:
            return None
        seen: Scalar = True if value.dtype == "bool" else 0.0

        def sees(x: Scalar) -> bool | None:
            if x == seen:
                return True
            hidden = x is False if value.dtype == "bool" else x <= _LEAST.get(value.dtype, -math.inf)
            return False if hidden else None

        for form in (known, known.swapped()):
            if form is None or sees(form.kept) is not True:
                continue
            if not form.conditions:
                return False
            diagonal = (*(0,) * (len(value.shape) - 2), 1, -1)
            if sees(form.other) is False and form.conditions == {(diagonal, 0)}:
                return True
        return None

    def known(self, name: str) -> Known | None:
        waiting = [name]
        while waiting:  # not by recursion: a chain of operations may be long
            last = waiting[-1]
            op = self.graph.producers.get(last)
            rule = _RULES.get(op.target) if op is not None else None
            if last in self.found or op is None or rule is None or len(op.outputs) != 1:
                self.found.setdefault(last, None)
                waiting.pop()
                continue
            missing = [operand for operand in op.operands if operand not in self.found]
            if missing:
                waiting.extend(missing)
                continue
            self.found[last] = _simple(rule(self, op), self.graph.values[last].shape)
            waiting.pop()
        return self.found[name]

    def operand(self, arg: Arg) -> Known | Scalar | None:
        """What is known of an argument; numbers are themselves."""
        if isinstance(arg, Ref):
            return self.found[arg.name]
        return arg if isinstance(arg, (bool, int, float)) else None

    def value(self, arg: Arg) -> Value:
        assert isinstance(arg, Ref)
        return self.graph.values[arg.name]

    def rank(self, op: Op) -> int:
        return len(self.graph.values[op.outputs[0]].shape)


def _simple(known: Known | None, shape: tuple[int, ...]) -> Known | None:
    """Without conditions that always hold on `shape`, or where another does; a constant where one never does."""
    if not isinstance(known, Chosen):
        return known
    left: dict[tuple[int, ...], int] = {}
    for coefficients, constant in known.conditions:
        ends = [item * (size - 1) for item, size in zip(coefficients, shape, strict=True)]
        if constant + sum(end for end in ends if end > 0) < 0:
            return Chosen(frozenset(), known.other, known.other)
        if constant + sum(end for end in ends if end < 0) < 0:
            kept = tuple(item if size > 1 else 0 for item, size in zip(coefficients, shape, strict=True))
            left[kept] = min(constant, left.get(kept, constant))
    return replace(known, conditions=frozenset(left.items()))


# ---- rules: what an operator makes of what is known ---------------------------------------------------------------------------------

Rule = Callable[[_Look, Op], Known | None]


def _aligned(known: Known, rank: int) -> Known:
    """Of a value broadcast to `rank` dims."""
    if isinstance(known, Positions):
        return replace(known, coefficients=(0,) * (rank - len(known.coefficients)) + known.coefficients)
    return replace(known, conditions=frozenset(((0,) * (rank - len(c)) + c, k) for c, k in known.conditions))


def _over_dims(known: Known | None, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Known | None:
    if isinstance(known, Positions):
        return replace(known, coefficients=change(known.coefficients))
    return None if known is None else replace(known, conditions=frozenset((change(c), k) for c, k in known.conditions))


def _same(look: _Look, op: Op) -> Known | None:
    known = look.operand(op.args[0])
    return known if isinstance(known, (Positions, Chosen)) else None


def _arange(look: _Look, op: Op) -> Known | None:
    numbers = op.args if op.target.endswith("default") is False else (0, *op.args)
    if look.value(Ref(op.outputs[0])).dtype not in ("int64", "int32") or not all(type(item) is int for item in numbers):
        return None
    start, step = numbers[0], numbers[2] if len(numbers) > 2 else 1
    assert isinstance(start, int) and isinstance(step, int)
    return Positions((step,), start)


def _filled(position: int | None, number: Scalar = 0) -> Rule:
    """A constant: the argument at `position`, or `number`."""

    def rule(look: _Look, op: Op) -> Known | None:
        given = op.arg(position, "fill_value") if position is not None else number
        if not isinstance(given, (bool, int, float)):
            return None
        given = _as(given, look.value(Ref(op.outputs[0])).dtype)
        return Chosen(frozenset(), given, given)

    return rule


def _as(x: Scalar, dtype: str) -> Scalar:
    return bool(x) if dtype == "bool" else int(x) if dtype.startswith(("int", "uint")) and math.isfinite(x) else float(x)


def _cast(look: _Look, op: Op) -> Known | None:
    known, dtype = look.operand(op.args[0]), look.value(Ref(op.outputs[0])).dtype
    if isinstance(known, Positions):
        return known if dtype == "int64" else None
    return known.mapped(lambda x: _as(x, dtype)) if isinstance(known, Chosen) else None


def _unsqueeze(look: _Look, op: Op) -> Known | None:
    dim = op.args[1]
    assert isinstance(dim, int)
    at = dim + look.rank(op) if dim < 0 else dim
    return _over_dims(_same(look, op), lambda c: (*c[:at], 0, *c[at:]))


def _view(look: _Look, op: Op) -> Known | None:
    """Of dims of size 1 only."""
    before, after = look.value(op.args[0]).shape, look.value(Ref(op.outputs[0])).shape
    kept = [dim for dim, size in enumerate(before) if size > 1]
    if [before[dim] for dim in kept] != [size for size in after if size > 1]:
        return None

    def change(c: tuple[int, ...]) -> tuple[int, ...]:
        given = iter([c[dim] for dim in kept])
        return tuple(next(given) if size > 1 else 0 for size in after)

    return _over_dims(_same(look, op), change)


def _expand(look: _Look, op: Op) -> Known | None:
    known, before, rank = _same(look, op), look.value(op.args[0]).shape, look.rank(op)
    known = _over_dims(known, lambda c: tuple(item if size > 1 else 0 for item, size in zip(c, before, strict=True)))
    return None if known is None else _aligned(known, rank)


def _transpose(look: _Look, op: Op) -> Known | None:
    rank = look.rank(op)
    order = list(range(rank))
    one, other = (int(dim) % rank for dim in (op.args[1:3] if len(op.args) > 2 else (0, 1)))  # type: ignore[arg-type]
    order[one], order[other] = order[other], order[one]
    return _over_dims(_same(look, op), lambda c: tuple(c[dim] for dim in order))


def _linear(sign: int) -> Rule:
    """Sums and differences of positions and whole numbers; of a mask and a number."""

    def rule(look: _Look, op: Op) -> Known | None:
        x, y = look.operand(op.args[0]), look.operand(op.args[1])
        if op.arg(2, "alpha", 1) != 1 or x is None or y is None:
            return None
        if isinstance(x, Chosen) and isinstance(y, (bool, int, float)):
            number = y
            return x.mapped(lambda item: item + sign * number)
        if isinstance(x, Chosen) or isinstance(y, (Chosen, bool, float)) or isinstance(x, (bool, float)):
            return None
        rank = look.rank(op)
        one, other = (Positions((0,) * rank, item) if isinstance(item, int) else _aligned(item, rank) for item in (x, y))
        assert isinstance(one, Positions) and isinstance(other, Positions)
        coefficients = tuple(a + sign * b for a, b in zip(one.coefficients, other.coefficients, strict=True))
        return Positions(coefficients, one.constant + sign * other.constant)

    return rule


def _compare(sign: int, strict: bool) -> Rule:
    """`x >= y` (`sign` 1), `x <= y` (-1), and `strict`ly so."""

    def rule(look: _Look, op: Op) -> Known | None:
        difference = _linear(-1)(look, op)
        if not isinstance(difference, Positions):
            return None
        coefficients = tuple(sign * item for item in difference.coefficients)
        return Chosen(frozenset({(coefficients, sign * difference.constant - strict)}), True, False)

    return rule


def _joined(found: bool) -> Rule:
    """`and` (`found` true): true where both are. `or` (false): false where both are."""

    def rule(look: _Look, op: Op) -> Known | None:
        if look.value(Ref(op.outputs[0])).dtype != "bool":
            return None
        conditions: frozenset[Condition] = frozenset()
        for arg in op.args[:2]:
            known = look.operand(arg)
            if not isinstance(known, Chosen):
                return None
            known = _aligned(known, look.rank(op))
            assert isinstance(known, Chosen)
            if not known.conditions and known.kept is not found:
                return Chosen(frozenset(), not found, not found)
            form = next((item for item in (known, known.swapped()) if item is not None and item.kept is found), None)
            if form is None or (form.conditions and form.other is found):
                return None
            conditions |= form.conditions
        return Chosen(conditions, found, not found)

    return rule


def _not(look: _Look, op: Op) -> Known | None:
    known = look.operand(op.args[0])
    return known.mapped(lambda x: not x) if isinstance(known, Chosen) and look.value(op.args[0]).dtype == "bool" else None


def _triangle(sign: int) -> Rule:
    """`tril` (`sign` 1) keeps `j <= i + diagonal`, `triu` (-1) `j >= i + diagonal`; zero elsewhere."""

    def rule(look: _Look, op: Op) -> Known | None:
        known, diagonal, rank = look.operand(op.args[0]), op.arg(1, "diagonal", 0), look.rank(op)
        if not isinstance(known, Chosen) or not isinstance(diagonal, int) or rank < 2:
            return None
        condition = (*(0,) * (rank - 2), sign, -sign), sign * diagonal
        zero = _as(0, look.value(Ref(op.outputs[0])).dtype)
        for form in (known, known.swapped()):
            if form is not None and (not form.conditions or form.other == zero):
                return Chosen(form.conditions | {condition}, form.kept, zero)
        return None

    return rule


def _where(look: _Look, op: Op) -> Known | None:
    condition, (one, other) = look.operand(op.args[0]), (look.operand(arg) for arg in op.args[1:3])
    return _chosen(look, op, condition, one, other)


def _masked_fill(look: _Look, op: Op) -> Known | None:
    return _chosen(look, op, look.operand(op.args[1]), look.operand(op.args[2]), look.operand(op.args[0]))


def _chosen(
    look: _Look, op: Op, condition: Known | Scalar | None, one: Known | Scalar | None, other: Known | Scalar | None
) -> Known | None:
    if not isinstance(condition, Chosen):
        return None
    numbers: list[Scalar] = []
    for item in (one, other):
        if isinstance(item, Chosen) and not item.conditions:
            item = item.kept
        if not isinstance(item, (bool, int, float)):
            return None
        numbers.append(_as(item, look.value(Ref(op.outputs[0])).dtype))
    aligned = _aligned(condition, look.rank(op))
    assert isinstance(aligned, Chosen)
    return aligned.mapped(lambda x: numbers[0] if x else numbers[1])


def _times(look: _Look, op: Op) -> Known | None:
    x, y = look.operand(op.args[0]), look.operand(op.args[1])
    if not isinstance(x, Chosen) or not isinstance(y, (bool, int, float)):
        return None
    return x.mapped(lambda item: item * y)


def _from(look: _Look, op: Op) -> Known | None:
    """`rsub(x, number)`."""
    x, y = look.operand(op.args[0]), look.operand(op.args[1])
    if not isinstance(x, Chosen) or not isinstance(y, (bool, int, float)) or op.arg(2, "alpha", 1) != 1:
        return None
    return x.mapped(lambda item: y - item)


def _rules() -> dict[str, Rule]:
    table: dict[str, Rule] = {
        "arange.default arange.start arange.start_step": _arange,
        "full.default": _filled(1),
        "new_full.default": _filled(2),
        "full_like.default": _filled(1),
        "scalar_tensor.default": _filled(0),
        "ones.default new_ones.default ones_like.default": _filled(None, 1),
        "zeros.default new_zeros.default zeros_like.default": _filled(None, 0),
        "clone.default alias.default detach.default lift_fresh_copy.default contiguous.default": _same,
        "_to_copy.default to.dtype": _cast,
        "unsqueeze.default": _unsqueeze,
        "view.default": _view,
        "expand.default": _expand,
        "transpose.int t.default": _transpose,
        "add.Tensor add.Scalar": _linear(1),
        "sub.Tensor sub.Scalar": _linear(-1),
        "rsub.Scalar": _from,
        "mul.Tensor mul.Scalar": _times,
        "ge.Tensor ge.Scalar": _compare(1, strict=False),
        "gt.Tensor gt.Scalar": _compare(1, strict=True),
        "le.Tensor le.Scalar": _compare(-1, strict=False),
        "lt.Tensor lt.Scalar": _compare(-1, strict=True),
        "__and__.Tensor bitwise_and.Tensor logical_and.default": _joined(True),
        "__or__.Tensor bitwise_or.Tensor logical_or.default": _joined(False),
        "logical_not.default bitwise_not.default": _not,
        "tril.default": _triangle(1),
        "triu.default": _triangle(-1),
        "where.self where.ScalarSelf where.ScalarOther where.Scalar": _where,
        "masked_fill.Scalar": _masked_fill,
    }
    return {f"aten.{name}": rule for names, rule in table.items() for name in names.split()}


_RULES = _rules()
_RULES["autopar.reshard"] = _same
