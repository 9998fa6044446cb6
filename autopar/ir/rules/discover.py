"""Splits of an operator that nobody wrote a rule for, found by trial and written down as a line of index notation (imports torch).

    discover(op, graph).notation          # "i j [a], [a] -> i j [a]"

A loop is looked for among the dims of one size: one dim (or none) of each operand. Made longer, it shows which results grow with it; in
parts, with random values of several kinds and on several numbers of ranks, whether results *and gradients* are those of the whole. What
passes is tried again as the splits that a plan would use: on two axes, on unequal parts, and near the model's own sizes.

Random values refute what is wrong in general; they are no proof for special values. So what is in doubt has no splits: operators that
are random, keep a memory, change their arguments, look at values, or did not give anything but constants.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import thread_time

from autopar.ir.graph import Graph, Op, refs
from autopar.ir.placement import P, Placement, S
from autopar.ir.rules import notation
from autopar.ir.rules.given import GivenRule, form
from autopar.ir.rules.neighbours import LEAF
from autopar.ir.rules.nest import FLOATS, Call, Nest, lacking, nest_splits
from autopar.ir.rules.split import PARTIAL, REPLICATE, Split
from autopar.ir.rules.trial import DRAWS, Refused, Shape, Trial, longer

BUDGET_S = 4.0
"""CPU seconds for one operator: a busy machine finds no less. Typical ones take some tenths."""

_PARTS = (2, 3)
_MOST_CHOICES = 600
"""Choices of dims that are tried for one size; more would be guesswork."""

_MOST_ADDED = 3


@dataclass(frozen=True, slots=True)
class Loop:
    """Of every operand and result the dim that the loop runs over, or None; `added` are operands that are added to a summed result."""

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    added: frozenset[int] = frozenset()


def discover(op: Op, graph: Graph, budget_s: float = BUDGET_S) -> GivenRule:
    """The rule of `op` for arguments as it has them; one without splits, which says why, where none is certain enough."""
    search: _Search | None = None
    try:
        trial = Trial(op, graph, thread_time() + budget_s)
        trial.settle()
        search = _Search(trial)
        return search.rule()
    except Refused as refused:
        return GivenRule(op.target, form(op, graph.values), why=str(refused))


def checked(rule: GivenRule, op: Op, graph: Graph, budget_s: float = BUDGET_S) -> tuple[int, str, str]:
    """How many checks the splits of `rule` passed for `op`; why one is refuted (else empty); why none could be made (else empty)."""
    try:
        trial = Trial(op, graph, thread_time() + budget_s, _sizes_of_state(op, graph))
        trial.find()
        if op.target == LEAF:
            try:
                trial.is_a_function(may_look=True)
            except Refused as refused:
                return 0, str(refused), ""
    except Refused as refused:
        return 0, "", str(refused)
    call = Call(op, tuple(trial.operands), tuple(trial.results))
    nest = rule.nest(call)
    try:
        for split in _decided(nest, call) if nest is not None else ():
            for parts, kind in itertools.product(_PARTS, range(DRAWS)):
                if (why := _refuted(trial, split, parts, kind)) and _refuted_with_all_alike(trial, split, parts, kind):
                    return trial.checks, f"split {' '.join(map(str, split.inputs))} -> {' '.join(map(str, split.outputs))}: {why}", ""
    except Refused:
        pass
    return trial.checks, "", "" if trial.checks or nest is None else "no split could be tried"


def _sizes_of_state(op: Op, graph: Graph) -> frozenset[int]:
    """Sizes in the parameters and buffers of a leaf module, which are what they are."""
    names = refs(op.args[3]) if op.target == LEAF else ()
    return frozenset(size for name in names for size in graph.values[name].shape)


def _decided(nest: Nest, call: Call) -> Iterator[Split]:
    return (split for split in nest_splits(nest, call) if split.name != REPLICATE)


def _cut(split: Split) -> tuple[int | None, ...]:
    return tuple(placement.dim if placement.is_shard else None for placement in split.inputs)


def _refuted(trial: Trial, split: Split, parts: int, kind: int) -> str:
    """Why `split` is wrong on stand-ins that `parts` ranks share evenly; empty where it is not."""
    result = trial.check(split, parts, longer(trial.shapes(trial.sizes), _cut(split), parts), kind)
    return "" if result.ok else result.why


def _refuted_with_all_alike(trial: Trial, split: Split, parts: int, kind: int) -> bool:
    """The same where every dim of the size that is split grows with it: some operators want sizes to be equal."""
    split_sizes = {value.shape[dim] for value, dim in zip(trial.operands, _cut(split), strict=True) if dim is not None}
    sizes = {size: now * parts if size in split_sizes else now for size, now in trial.sizes.items()}
    return not trial.check(split, parts, trial.shapes(sizes), kind).ok


class _Search:
    def __init__(self, trial: Trial) -> None:
        self.trial, self.op = trial, trial.op
        self.base = [tuple(item.shape) for item in trial.whole(trial.draw(trial.shapes(trial.sizes), 0))]

    def rule(self) -> GivenRule:
        trial, op = self.trial, self.op
        loops = self.distinct([loop for size in trial.sizes for loop in self.loops(size)])
        linear = self.linear()
        text, names = self.write(loops)
        call = Call(op, tuple(trial.operands), tuple(trial.results))
        found = GivenRule(op.target, notation=text, linear=linear)
        nest = found.nest(call)
        if nest is None or not (loops or linear):
            why = "no dim can be split" if nest is not None else "its splits cannot be written down"
            return GivenRule(op.target, form(op, trial.graph.values), why=why)
        kept = [loop for loop, name in zip(loops, names, strict=True) if self.holds(nest, call, name)]
        text, names = self.write(kept)
        nest = GivenRule(op.target, notation=text, linear=linear).nest(call)
        assert nest is not None
        if not self.together(nest, call, names):
            return GivenRule(op.target, form(op, trial.graph.values), why="its splits do not hold on two axes")
        if not kept and not linear:
            return GivenRule(op.target, form(op, trial.graph.values), why="no dim can be split near its own sizes")
        uneven = " ".join(name for loop, name in zip(kept, names, strict=True) if nest.alone(name) and self.uneven(loop))
        found = GivenRule(op.target, notation=text, uneven=uneven, linear=linear, checks=trial.checks)
        return replace(found, form=form(op, trial.graph.values, found.free_dims(op, trial.graph.values)))

    # ---- loops ----------------------------------------------------------------------------------------------------------------------

    def loops(self, size: int) -> list[Loop]:
        """All loops over dims of the real `size`."""
        trial = self.trial
        options = [[None, *(dim for dim, length in enumerate(value.shape) if length == size)] for value in trial.operands]
        found: list[Loop] = []
        for given in itertools.islice(itertools.product(*options), _MOST_CHOICES):
            if all(dim is None for dim in given):
                continue
            trial.in_time()
            for outputs in self.grown(given):
                for added in self.possibly_added(given, outputs):
                    loop = Loop(given, outputs, added)
                    if self.passes(loop):
                        found.append(loop)
                        break
        return found

    def grown(self, given: tuple[int | None, ...]) -> Iterator[tuple[int | None, ...]]:
        """Dims of the results that grow as the dims `given` of the operands do, and only as they do."""
        trial = self.trial
        try:
            grown = trial.whole(trial.draw(longer(trial.shapes(trial.sizes), given, 2), 0))
        except Refused:
            raise
        except Exception:  # the operator does not take such shapes
            return
        choices: list[list[int | None]] = []
        for before, item in zip(self.base, grown, strict=True):
            if len(before) != item.dim():
                return
            dims: list[int | None] = [dim for dim, (old, new) in enumerate(zip(before, item.shape, strict=True)) if new != old]
            if any(dim is not None and item.shape[dim] != 2 * before[dim] for dim in dims) or len(dims) > 1:
                return
            choices.append(dims or [None])
        yield from itertools.product(*choices)

    def possibly_added(self, given: tuple[int | None, ...], outputs: tuple[int | None, ...]) -> Iterator[frozenset[int]]:
        """Which operands that lack the loop may be added to a result that lacks it, fewest first."""
        slots = [slot for slot, dim in enumerate(given) if dim is None and self.trial.operands[slot].dtype in FLOATS]
        summed = any(dim is None for dim in outputs)
        for count in range(min(len(slots), _MOST_ADDED) + 1 if summed else 1):
            yield from map(frozenset, itertools.combinations(slots, count))

    def split(self, loop: Loop) -> Split:
        inputs: list[Placement] = []
        for slot, (dim, value) in enumerate(zip(loop.inputs, self.trial.operands, strict=True)):
            inputs.append(S(dim) if dim is not None else P if slot in loop.added else lacking(value))
        return Split("found", tuple(inputs), tuple(P if dim is None else S(dim) for dim in loop.outputs))

    def passes(self, loop: Loop) -> bool:
        trial, split = self.trial, self.split(loop)
        if any(dim is None and value.dtype == "bool" for dim, value in zip(loop.outputs, trial.results, strict=True)):
            return False
        return not any(_refuted(trial, split, parts, kind) for kind in range(DRAWS) for parts in _PARTS)

    def distinct(self, loops: Sequence[Loop]) -> list[Loop]:
        """Loops of which no two run over one dim: the one that most tensors have stands."""
        taken: set[tuple[str, int, int]] = set()
        found: list[Loop] = []
        for loop in sorted(loops, key=lambda item: (-_reach(item), _first(item))):
            dims = {("in", slot, dim) for slot, dim in enumerate(loop.inputs) if dim is not None}
            dims |= {("out", slot, dim) for slot, dim in enumerate(loop.outputs) if dim is not None}
            if not dims & taken:
                taken |= dims
                found.append(loop)
        return sorted(found, key=_first)

    def linear(self) -> tuple[tuple[int, ...], ...]:
        """Sets of operands in which the operator is jointly linear: single ones, or else the smallest sets that are."""
        trial = self.trial
        floats = [slot for slot, value in enumerate(trial.operands) if value.dtype in FLOATS]
        if any(value.dtype not in FLOATS for value in trial.results) or len(floats) > 4:
            return ()
        for count in range(1, len(floats) + 1):
            found = []
            for together in itertools.combinations(floats, count):
                inputs = tuple(P if slot in together else lacking(value) for slot, value in enumerate(trial.operands))
                split = Split(PARTIAL, inputs, tuple(P for _ in trial.results), work="whole")
                if not any(_refuted(trial, split, parts, kind) for kind in range(DRAWS) for parts in _PARTS):
                    found.append(together)
            if found:
                return tuple(found)
        return ()

    # ---- the line -------------------------------------------------------------------------------------------------------------------

    def write(self, loops: Sequence[Loop]) -> tuple[str, list[str]]:
        """The line of notation with `loops`, and their names."""
        trial = self.trial
        names = list(string.ascii_lowercase[8:26])[: len(loops)]
        others = iter(f"{letter}{number or ''}" for number in range(9) for letter in string.ascii_lowercase[:8])

        count = len(trial.operands)

        def term(slot: int, shape: Shape) -> str:
            words = []
            for dim, size in enumerate(shape):
                running = [(loop, name) for loop, name in zip(loops, names, strict=True) if (*loop.inputs, *loop.outputs)[slot] == dim]
                if not running:
                    words.append("1" if size == 1 else f"[{next(others)}]")
                    continue
                loop, name = running[0]
                words.append(name if size == self.length(loop) else f"({name} [{next(others)}])")
            added = slot < count and any(slot in loop.added for loop in loops)
            return ("+" if added else "") + " ".join(words)

        terms = [term(slot, value.shape) for slot, value in enumerate((*trial.operands, *trial.results))]
        present = iter(terms[:count])
        arguments = (*self.op.args, *(arg for _, arg in self.op.kwargs))
        left = [next(present) if there else "" for there in notation.tensor_arguments(arguments)]
        return f"{', '.join(left)} -> {', '.join(terms[count:])}", names

    def length(self, loop: Loop) -> int:
        return next(value.shape[dim] for dim, value in zip(loop.inputs, self.trial.operands, strict=True) if dim is not None)

    # ---- trying what was written ----------------------------------------------------------------------------------------------------

    def holds(self, nest: Nest, call: Call, name: str) -> bool:
        """Whether the split of loop `name` passes near the real sizes, and on two axes."""
        trial = self.trial
        split = next((item for item in nest_splits(nest, call) if item.name == name), None)
        if split is None:
            return False
        if not trial.check((split, split), (2, 2), longer(trial.shapes(trial.sizes), _cut(split), 4), 0).ok:
            return False
        sizes = trial.near_real()
        if sizes is None:
            return True
        shapes = trial.shapes(sizes)
        length = next(shape[dim] for shape, dim in zip(shapes, _cut(split), strict=True) if dim is not None)
        return all(trial.check(split, parts, shapes, kind).ok for parts, kind in ((2, 0), (4, 1)) if length % parts == 0)

    def together(self, nest: Nest, call: Call, names: Sequence[str]) -> bool:
        """Whether every two loops pass on two axes, one each."""
        trial = self.trial
        named = {item.name: item for item in nest_splits(nest, call)}
        for one, other in itertools.combinations([named[name] for name in names], 2):
            shapes = longer(longer(trial.shapes(trial.sizes), _cut(one), 2), _cut(other), 2)
            if not trial.check((one, other), (2, 2), shapes, 0).ok:
                return False
        return True

    def uneven(self, loop: Loop) -> bool:
        trial, split = self.trial, self.split(loop)
        shapes = [(parts, longer(trial.shapes(trial.sizes), loop.inputs, parts, 1)) for parts in _PARTS]
        return all(trial.check(split, parts, sizes, kind).ok for parts, sizes in shapes for kind in (0, 1))


def _reach(loop: Loop) -> int:
    return sum(dim is not None for dim in (*loop.inputs, *loop.outputs))


def _first(loop: Loop) -> tuple[int, int]:
    return next((slot, dim) for slot, dim in enumerate(loop.inputs) if dim is not None)
