"""Rules that travel with a graph and its plan: registered by the user, or found by trial, each a line of notation or a list of splits.

Whoever has the graph, or the plan file, has them; neither the user's registration nor torch nor the cache of findings is asked again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from autopar.errors import RuleError
from autopar.ir.graph import Arg, Op, Ref, Symbol, Value
from autopar.ir.placement import Placement, parse
from autopar.ir.rules import notation
from autopar.ir.rules.nest import Call, Nest, Term
from autopar.ir.rules.split import Split

FOUND, REGISTERED = "found", "registered"
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GivenRule:
    """A rule for the operator `target`.

    `form`: the calls that it is for, `mylib.scale.default(float32[_, 768], 0.5)` with `_` for sizes that may be any; empty: all calls.
    `notation`: index notation, with `uneven` loops and `linear` terms as in `table.rule`; or else `splits`, each a line
    `S(0) R/P -> S(0)`. With neither, the operator runs replicated, and `why` says why.
    `origin`: `"found"` by trial, or `"registered"`. `checks`: numerical checks that it passed.
    """

    target: str
    form: str = ""
    notation: str = ""
    uneven: str = ""
    linear: tuple[tuple[int, ...], ...] = ()
    splits: tuple[str, ...] = ()
    origin: str = FOUND
    checks: int = 0
    why: str = ""

    @property
    def whole(self) -> bool:
        """Whether it has no splits, so that the operator runs replicated."""
        return not self.notation and not self.splits

    def fits(self, op: Op, values: Mapping[str, Value]) -> bool:
        """Whether it is for `op`."""
        return op.target == self.target and (not self.form or self.form == form(op, values, self.free_dims(op, values)))

    def free_dims(self, op: Op, values: Mapping[str, Value]) -> tuple[frozenset[int], ...]:
        """Of every operand, the dims that some split takes apart: their sizes may be any."""
        if self.notation:
            pattern = notation.read(self.notation)
            kept = notation.present_terms(pattern, op)
            return () if kept is None else tuple(_free(pattern.operands[index], pattern.whole) for index in kept)
        lines = [read_split(line) for line in self.splits]
        return tuple(
            frozenset(inputs[slot].dim for inputs, _ in lines if slot < len(inputs) and inputs[slot].is_shard)
            for slot in range(len(op.operands))
        )

    def nest(self, call: Call) -> Nest | None:
        """The nest of `call`, which it is for; None where the notation does not fit its shapes, or where it has no splits."""
        if self.whole:
            return None
        if self.notation:
            return notation.bind(notation.read(self.notation), call, frozenset(self.uneven.split()), self.linear)
        extra = tuple(_split(index, line, call) for index, line in enumerate(self.splits))
        operands = tuple(((),) * len(value.shape) for value in call.operands)
        return Nest({}, operands, tuple(((),) * len(value.shape) for value in call.outputs), extra=extra)

    @property
    def subject(self) -> str:
        """Whose rule it is, in words: `mylib::scale`, or a class of leaf modules."""
        leaf = _LEAF_FORM.match(self.form)
        return f"leaf module {leaf[1]}" if leaf else operator_name(self.target)

    def words(self) -> str:
        """What is split and how sure that is, in words."""
        if self.whole:
            return f"runs replicated: {self.why}" if self.why else "runs replicated"
        what = self.notation or "; ".join(self.splits)
        how = "found by trial" if self.origin == FOUND else "registered"
        return f"splits {how}: {what} ({f'checked {self.checks} times' if self.checks else self.why or 'not checked'})"


_LEAF_FORM = re.compile(r"autopar\.leaf\('([^']*)'")


def operator_name(target: str) -> str:
    """`mylib::scale` for `mylib.scale.default`; other overloads keep their name."""
    space, _, rest = target.partition(".")
    return f"{space}::{rest.removesuffix('.default')}"


def _free(term: Term, whole: frozenset[str]) -> frozenset[int]:
    return frozenset(dim for dim, group in enumerate(term) if any(loop not in whole for loop in group))


def form(op: Op, values: Mapping[str, Value], free: Sequence[frozenset[int]] = ()) -> str:
    """`op` as `target(arguments)`, tensors as dtype and shape with `_` for the dims in `free` (one set for each operand)."""
    slot = -1

    def text(arg: Arg) -> str:
        nonlocal slot
        if isinstance(arg, Ref):
            slot += 1
            value, open_dims = values[arg.name], free[slot] if slot < len(free) else frozenset()
            return f"{value.dtype}[{', '.join('_' if dim in open_dims else str(size) for dim, size in enumerate(value.shape))}]"
        if isinstance(arg, tuple):
            return f"[{', '.join([text(item) for item in arg])}]"
        return arg.name if isinstance(arg, Symbol) else repr(arg)

    arguments = [text(arg) for arg in op.args] + [f"{key}={text(arg)}" for key, arg in op.kwargs]
    return f"{op.target}({', '.join(arguments)})"


# ---- splits as lines ---------------------------------------------------------------------------------------------------------------

_PLACEMENT = re.compile(r"S\([^)]*\)|R/P|R|P\(sum\)|P|(?P<other>[^\s,]+)")


@cache
def read_split(line: str) -> tuple[tuple[Placement, ...], tuple[Placement, ...]]:
    """Placements of operands and results that `S(0) R/P -> S(0)` says. Raises `RuleError` where it says none."""
    left, arrow, right = line.partition("->")
    if not arrow:
        raise RuleError(f"split `{line}` has no `->`; write the placements of operands and results, as in `S(0) R/P -> S(0)`")
    try:
        inputs, outputs = (tuple(parse(match[0]) for match in _PLACEMENT.finditer(side)) for side in (left, right))
    except ValueError as error:
        raise RuleError(f"split `{line}`: {error}") from None
    return inputs, outputs


def write_split(split: Split) -> str:
    return f"{' '.join(map(str, split.inputs))} -> {' '.join(map(str, split.outputs))}"


def _split(index: int, line: str, call: Call) -> Split:
    inputs, outputs = read_split(line)
    if (len(inputs), len(outputs)) != (len(call.operands), len(call.outputs)):
        raise RuleError(
            f"split `{line}` of {operator_name(call.op.target)} has {len(inputs)} operands and {len(outputs)} results; the operator has "
            f"{len(call.operands)} and {len(call.outputs)}"
        )
    size = 0
    for placement, value in zip((*inputs, *outputs), (*call.operands, *call.outputs), strict=True):
        if placement.is_shard:
            if placement.dim >= len(value.shape) or value.shape[placement.dim] % placement.blocks:
                raise RuleError(f"split `{line}` of {operator_name(call.op.target)}: {placement} cannot split {list(value.shape)}")
            size = size or value.shape[placement.dim] // placement.blocks
    work = "split" if any(item.is_shard for item in (*inputs, *outputs)) else "whole"
    return Split(f"split{index}", inputs, outputs, size=size, work=work)
