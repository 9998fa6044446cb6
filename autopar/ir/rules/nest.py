"""Operators as loop nests, and the one step from a nest to its splits.

An operator is a nest of loops over named dims: `mm` is `m k, k n -> m n`. Every tensor dim is a `Group` of loops, outermost first
(usually one; `(b s)` where a view has merged two; none where a dim of size 1 is broadcast). Splitting loop `l` over the ranks of an
axis gives every tensor its placement:

- a tensor that has `l` is split along that dim, `S(d)`, or `S(d, blocks)` where loops stand outside `l` in the same dim;
- an operand that lacks `l` is read whole by every rank for its own part of the work: `R/P`;
- a result that lacks `l` is a sum over the loop: `P(sum)`. An operand *added* to such a result (a bias) must be a term too: `P(sum)`.

An operator that is linear in some operands also maps terms of a sum to terms of a sum (split `partial`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autopar.ir.graph import Op, Value
from autopar.ir.placement import RP, P, Placement, R, S
from autopar.ir.rules.split import PARTIAL, REPLICATE, REPLICATE_PARTIAL_GRADIENT, Split

Group = tuple[str, ...]
Term = tuple[Group, ...]
Blocks = tuple[tuple[str, int], ...]

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"})


@dataclass(frozen=True, slots=True)
class Nest:
    """An operator on given shapes.

    `loops` maps each loop to its size; `operands` and `outputs` are terms, one group per tensor dim. Loops in `whole` cannot be
    split (every rank needs all of them). `added` are the operands that are added to the result. `linear` lists sets of operands in
    which the operator is jointly linear. Loops in `uneven` may be split into parts of unequal size. `implementations` names, for a
    loop, the local implementation its split needs. `extra` are splits that are no loop of the nest. `inner` are loops that a view
    cuts out of the innermost end of a merged last dim: other operators are not asked to split along them. `joint` are pairs of loops
    that one axis can split together, because an implementation exchanges what then lies on another rank: split `n+e`.
    """

    loops: Mapping[str, int]
    operands: tuple[Term, ...]
    outputs: tuple[Term, ...]
    whole: frozenset[str] = frozenset()
    added: frozenset[int] = frozenset()
    linear: tuple[tuple[int, ...], ...] = ()
    uneven: frozenset[str] = frozenset()
    implementations: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[Split, ...] = ()
    inner: frozenset[str] = frozenset()
    joint: tuple[tuple[str, str], ...] = ()

    def place(self, term: Term, loop: str) -> tuple[int, int] | None:
        """Dim of `term` that holds `loop` and the number of blocks outside it; None where the term lacks it."""
        for dim, group in enumerate(term):
            blocks = 1
            for name in group:
                if name == loop:
                    return dim, blocks
                blocks *= self.loops[name]
        return None

    def alone(self, loop: str) -> bool:
        """Whether `loop` shares a dim with no other loop in any term."""
        return all(len(group) == 1 for term in (*self.operands, *self.outputs) for group in term if loop in group)


@dataclass(frozen=True, slots=True)
class Call:
    """An operation together with the values it reads (`operands`, in `op.operands` order) and defines (`outputs`)."""

    op: Op
    operands: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def slot(self, position: int, name: str = "") -> int | None:
        """Index among the operands of the tensor argument at `position` (or keyword `name`); None where it is absent or no tensor."""
        from autopar.ir.graph import Ref, refs

        before = 0
        for index, arg in enumerate(self.op.args):
            if index == position:
                return before if isinstance(arg, Ref) else None
            before += sum(1 for _ in refs(arg))
        for key, arg in self.op.kwargs:
            if key == name:
                return before if isinstance(arg, Ref) else None
            before += sum(1 for _ in refs(arg))
        return None

    def ints(self, position: int, name: str) -> tuple[int, ...] | None:
        """The argument as a tuple of ints; None where absent."""
        arg = self.op.arg(position, name)
        if arg is None:
            return None
        items = arg if isinstance(arg, tuple) else (arg,)
        assert all(isinstance(item, int) for item in items), f"{self.op.name}: {name} is {arg!r}"
        return tuple(int(item) for item in items)  # type: ignore[arg-type]

    def int(self, position: int, name: str, default: int = 0) -> int:
        arg = self.op.arg(position, name, default)
        assert isinstance(arg, int), f"{self.op.name}: {name} is {arg!r}"
        return arg


def lacking(value: Value) -> Placement:
    """Placement of an operand that every rank reads whole for its own part of the work. Integers have no gradient to be partial."""
    return RP if value.dtype in FLOATS else R


def _split(nest: Nest, call: Call, loop: str, blocks: int) -> Split:
    summed = any(nest.place(term, loop) is None for term in nest.outputs)

    def placement(term: Term) -> Placement | None:
        found = nest.place(term, loop)
        return None if found is None else S(found[0], found[1] * blocks)

    inputs = tuple(
        placement(term) or (P if summed and index in nest.added else lacking(call.operands[index]))
        for index, term in enumerate(nest.operands)
    )
    return Split(
        name=loop if blocks == 1 else f"{loop}:{blocks}",
        inputs=inputs,
        outputs=tuple(placement(term) or P for term in nest.outputs),
        size=nest.loops[loop] // blocks,
        uneven=blocks == 1 and loop in nest.uneven and nest.alone(loop),
        implementation=nest.implementations.get(loop, ""),
    )


def _joint(nest: Nest, call: Call, pair: tuple[str, str], blocks: int) -> Split:
    """Both loops of `pair` on one axis, the first in `blocks`: a tensor is split along the one that it has."""
    first, second = pair

    def placement(term: Term) -> Placement | None:
        if found := nest.place(term, first):
            return S(found[0], found[1] * blocks)
        found = nest.place(term, second)
        return None if found is None else S(*found)

    return Split(
        name="+".join(pair) if blocks == 1 else f"{'+'.join(pair)}:{blocks}",
        inputs=tuple(placement(term) or lacking(call.operands[index]) for index, term in enumerate(nest.operands)),
        outputs=tuple(placement(term) or P for term in nest.outputs),
        size=min(nest.loops[first] // blocks, nest.loops[second]),
        uneven=blocks == 1 and {first, second} <= nest.uneven,
        implementation=nest.implementations[second],
    )


def _partials(nest: Nest, call: Call) -> Iterable[Split]:
    if any(value.dtype == "bool" for value in call.outputs):
        return
    for count, together in enumerate(nest.linear):
        if together and all(call.operands[index].dtype != "bool" for index in together):
            inputs = tuple(P if index in together else lacking(value) for index, value in enumerate(call.operands))
            yield Split(PARTIAL if count == 0 else f"{PARTIAL}{count}", inputs, tuple(P for _ in call.outputs), work="whole")


def replicate(call: Call) -> Split:
    return Split(REPLICATE, tuple(R for _ in call.operands), tuple(R for _ in call.outputs), work="whole")


def replicate_partial_gradient(call: Call) -> Split:
    """Every rank does all of the work forward; its gradients are terms of a sum. Right for every differentiable operator, because
    the backward pass is linear in the gradient."""
    return Split(REPLICATE_PARTIAL_GRADIENT, tuple(map(lacking, call.operands)), tuple(map(lacking, call.outputs)), work="whole")


def nest_splits(nest: Nest, call: Call, blocks: Blocks = ()) -> tuple[Split, ...]:
    """All splits of `call`, `replicate` first. `blocks` are (loop, blocks) pairs by which neighbours would have the loop split."""
    found = [replicate(call)]
    for loop, size in nest.loops.items():
        if loop not in nest.whole and size > 1:
            found.append(_split(nest, call, loop, 1))
            found.extend(_split(nest, call, loop, k) for name, k in blocks if name == loop and size // k > 1)
    for pair in nest.joint:
        if min(nest.loops[loop] for loop in pair) > 1:
            found.append(_joint(nest, call, pair, 1))
            found.extend(_joint(nest, call, pair, k) for name, k in blocks if name == pair[0] and nest.loops[name] // k > 1)
    found.extend(nest.extra)
    found.extend(_partials(nest, call))
    return tuple(found)
