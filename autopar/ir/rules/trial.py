"""One operator on small stand-ins for its operands: which sizes it takes, whether it is a function of its operands at all, and random
values to try it with (imports torch).

Sizes that are equal in the model stay equal, sizes of 1 stay 1; the arguments are the model's own. Values are float64; whole numbers are
small enough to be positions in any operand, in parts of it too, so that an operator which looks things up reads nothing out of bounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from time import thread_time
from typing import Any

import torch
from torch import Tensor

from autopar.ir.graph import Arg, Graph, Op, Value
from autopar.ir.rules.check import CheckResult, Given, check_split, run
from autopar.ir.rules.nest import FLOATS
from autopar.ir.rules.operators import operator
from autopar.ir.rules.split import Split

Shape = tuple[int, ...]
Sizes = Mapping[int, int]

DRAWS = 4
"""Kinds of random values; see `Trial.draw`."""

_SMALL = (4, 6, 10, 14, 22, 26, 34, 38)
"""Stand-ins for different sizes: none a multiple of another, so that what is tied only by chance comes apart."""

_MOST_SIZES, _MOST_OPERANDS = len(_SMALL), 8
_LARGEST_KEPT = 256
"""Sizes up to this may stand for themselves where the operator takes no smaller ones."""

_NEAR_REAL_NUMEL = 1 << 15
"""Elements of the largest operand when an operator is tried near the model's own sizes."""

_READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__complex__")
"""How Python code looks at the values of a tensor."""


class Refused(Exception):
    """Why an operator has no splits that could be found; the message is for the plan's reader."""


class Trial:
    """`op` of `graph`, to be tried until `deadline_s` of this thread's CPU time; sizes in `fixed` stay as they are.

    Raises `Refused` where it is not to be tried at all.
    """

    def __init__(self, op: Op, graph: Graph, deadline_s: float, fixed: frozenset[int] = frozenset()) -> None:
        self.op, self.graph, self.deadline_s, self.fixed = op, graph, deadline_s, fixed
        self.operands: list[Value] = [graph.values[name] for name in op.operands]
        self.results: list[Value] = [graph.values[name] for name in op.outputs]
        self.smooth: tuple[bool, ...] = ()
        self.sizes: dict[int, int] = {}
        self.checks = 0
        self.refuse()

    # ---- what is not tried ------------------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        if self.op.target.startswith("aten._"):
            raise Refused("it is private to PyTorch and may end the process on sizes that it does not expect")
        function: Any = operator(self.op.target)
        schema = getattr(function, "_schema", None)
        if schema is not None and any(item.alias_info is not None and item.alias_info.is_write for item in schema.arguments):
            raise Refused("it changes its arguments")
        if torch.Tag.nondeterministic_seeded in getattr(function, "tags", ()):
            raise Refused("it draws random numbers")
        values = [*self.operands, *self.results]
        if not self.operands or not self.results:
            raise Refused("it takes or gives no tensor")
        if any(value.dtype.startswith(("complex", "float8")) for value in values):
            raise Refused("it computes with numbers that the check does not know (complex or float8)")
        if (len(self.operands) > _MOST_OPERANDS and not self.fixed) or len(set(self.op.operands)) < len(self.op.operands):
            raise Refused(f"it takes one tensor twice, or more than {_MOST_OPERANDS}")
        if any(0 in value.shape for value in values):
            raise Refused("it takes empty tensors")

    def in_time(self) -> None:
        if thread_time() > self.deadline_s:
            raise Refused("trying it took too long")

    # ---- values -----------------------------------------------------------------------------------------------------------------

    def shapes(self, sizes: Sizes) -> list[Shape]:
        """Shapes of the operands with stand-in `sizes`."""
        return [tuple(sizes.get(size, size) for size in value.shape) for value in self.operands]

    def draw(self, shapes: Sequence[Shape], kind: int, seed: int = 0) -> list[Tensor]:
        """Random operands. Floats, by `kind`: 0 moderate, 1 large, 2 between 0 and 1, 3 small and around 1."""
        generator = torch.Generator().manual_seed(97 * seed + kind)
        limit = max(2, min((size for size in self.sizes.values()), default=2))
        found = []
        for value, shape in zip(self.operands, shapes, strict=True):
            if value.dtype == "bool":
                found.append(torch.rand(shape, generator=generator) < 0.5)
            elif value.dtype in FLOATS:
                uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
                moderate = 4 * uniform - 2
                found.append((moderate, 30 * moderate, 0.25 + 0.65 * uniform, 1 + 0.05 * moderate)[kind])
            else:
                found.append(torch.randint(0, limit, shape, generator=generator, dtype=getattr(torch, value.dtype)))
        return found

    def whole(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The results of the operator; random generators are left as they were."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found = run(self.op, operands, self.op.args, self.op.kwargs)
        if len(found) != len(self.results) or any(not isinstance(item, Tensor) for item in found):
            raise Refused("it returns other things than tensors")
        return found

    def check(self, split: Split | tuple[Split, ...], parts: int | tuple[int, ...], shapes: Sequence[Shape], kind: int) -> CheckResult:
        """The numerical check of `split` on operands of `shapes`; what the operator raises counts as refuted."""
        self.in_time()
        given = Given(tuple(self.draw(shapes, kind, 1)), self.smooth)
        try:
            with torch.random.fork_rng(devices=[]):
                result = check_split(self.op, self.graph, split, parts, kind, given=given)
        except Exception as error:  # an operator may raise anything
            return CheckResult(False, why=f"{type(error).__name__}: {error}")
        self.checks += result.ok
        return result

    # ---- what it is -------------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """What `find` does. Raises `Refused` also where the operator is no function of its operands."""
        self.find()
        self.is_a_function()

    def find(self) -> None:
        """Find stand-in sizes and which operands have a gradient. Raises `Refused` where there are none."""
        self.sizes = dict(self._find_sizes())
        self.smooth = self._find_smooth()

    def _find_sizes(self) -> Sizes:
        real = list(dict.fromkeys(size for value in self.operands for size in value.shape if size > 1))
        if not real:
            raise Refused("its operands are single numbers")
        if len(real) - len(self.fixed & set(real)) > _MOST_SIZES:
            raise Refused(f"its operands have more than {_MOST_SIZES} different sizes")
        small = dict(zip((size for size in real if size not in self.fixed), _SMALL, strict=False))
        small |= {size: size for size in real if size in self.fixed}
        literals = sorted({item for item in _ints((*self.op.args, *(arg for _, arg in self.op.kwargs))) if 1 < item <= _LARGEST_KEPT})
        choices = []
        for size in real:
            tied = [small[other] * (size // other) for other in real if other < size and size % other == 0 and size // other <= 8]
            multiples = [2 * item for item in literals if size % (2 * item) == 0] + [item for item in literals if size % item == 0]
            kept = [size] if size <= _LARGEST_KEPT else []
            choices.append([size] if size in self.fixed else list(dict.fromkeys([small[size], *tied, *multiples, *kept])))
        picked = itertools.islice(itertools.product(*map(range, map(len, choices))), 4096)
        why = ""
        for picks in sorted(picked, key=lambda picks: (sum(map(bool, picks)), picks))[:256]:
            self.in_time()
            sizes = {size: options[pick] for size, options, pick in zip(real, choices, picks, strict=True)}
            self.sizes = sizes
            try:
                found = self.whole(self.draw(self.shapes(sizes), 0))
            except Refused:
                raise
            except Exception as error:  # as above
                why = why or f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                continue
            if [item.dim() for item in found] == [len(value.shape) for value in self.results]:
                return sizes
        raise Refused(f"it runs on no small stand-in of its operands here{f' ({why[:120]})' if why else ''}")

    def is_a_function(self, may_look: bool = False) -> None:
        """Raises `Refused` where results depend on more than the operands, or an operand is changed, or (unless it `may_look`) its values
        are looked at."""
        shapes = self.shapes(self.sizes)
        varied = [False] * len(self.results)
        for kind in range(DRAWS):
            operands = self.draw(shapes, kind)
            before = [item.clone() for item in operands]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(kind)
                with _watched() as looked:
                    first = [item.clone() for item in self.whole(operands)]
                self.whole(self.draw(shapes, kind, 2))  # what it keeps of one call must not change the next
                torch.manual_seed(kind + 100)
                second = self.whole(operands)
            if any(not _same(one, other) for one, other in zip(before, operands, strict=True)):
                raise Refused("it changes its arguments")
            if any(not _same(one, other) for one, other in zip(first, second, strict=True)):
                raise Refused("it gives other results for the same operands (random, or with a memory)")
            if looked and not may_look:
                raise Refused(f"it looks at the values of tensors (`{looked[0]}`)")
            for position, item in enumerate(first):
                varied[position] |= _varies(item)
        # Whole numbers beside a result of floating point may be a status, which is 0 as long as all is well.
        telling = [position for position, value in enumerate(self.results) if value.dtype in FLOATS] or range(len(self.results))
        if dull := [position for position in telling if not varied[position]]:
            raise Refused(f"its result {dull[0]} was the same everywhere, or not finite, for all values tried")

    def _find_smooth(self) -> tuple[bool, ...]:
        """The operands that get a gradient: all of floating point, or those that need one in the model."""
        floats = tuple(value.dtype in FLOATS for value in self.operands)
        needed = tuple(value.requires_grad and is_float for value, is_float in zip(self.operands, floats, strict=True))
        for smooth in dict.fromkeys((floats, needed)):
            operands = [item.requires_grad_(wanted) for item, wanted in zip(self.draw(self.shapes(self.sizes), 0), smooth, strict=True)]
            try:
                with torch.random.fork_rng(devices=[]), torch.enable_grad():
                    found = [item for item in run(self.op, operands, self.op.args, self.op.kwargs) if item.requires_grad]
                    if found and any(smooth):
                        wanted_for = [item for item in operands if item.requires_grad]
                        torch.autograd.grad(found, wanted_for, [torch.ones_like(item) for item in found], allow_unused=True)
                return smooth
            except Exception as error:  # as above
                why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise Refused(f"its gradient cannot be computed ({why[:120]})")

    def near_real(self) -> dict[int, int] | None:
        """Sizes as near to the model's own as a trial can afford, halved until the largest operand is small; None where it does not run."""
        sizes = {size: size for size in self.sizes}

        def numel() -> int:
            return max(prod(shape) for shape in self.shapes(sizes))

        while numel() > _NEAR_REAL_NUMEL:
            even = [size for size, now in sizes.items() if now % 2 == 0 and now > 2 * self.sizes[size]]
            if not even:
                return None
            largest = max(even, key=lambda size: sizes[size])
            sizes[largest] //= 2
        try:
            self.whole(self.draw(self.shapes(sizes), 0))
        except Exception:  # as above
            return None
        return sizes


def longer(shapes: Sequence[Shape], cut: Sequence[int | None], factor: int, more: int = 0) -> list[Shape]:
    """`shapes` with the dim in `cut` of each, where there is one, `factor` times as long and `more`."""
    return [
        tuple(size * factor + more if dim == at else size for at, size in enumerate(shape)) for shape, dim in zip(shapes, cut, strict=True)
    ]


def _ints(args: Sequence[Arg]) -> Iterator[int]:
    for arg in args:
        if isinstance(arg, tuple):
            yield from _ints(arg)
        elif type(arg) is int:
            yield arg


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)))


def _varies(item: Tensor) -> bool:
    """Whether a result says something: finite in at least half of its places, and not one number everywhere."""
    if item.numel() == 1:
        return bool(torch.isfinite(item).all()) and bool((item != 0).any())
    finite = torch.isfinite(item)
    kept = item[finite]
    return 2 * int(finite.sum()) >= item.numel() and bool((kept != kept.flatten()[0]).any())


@contextmanager
def _watched() -> Iterator[list[str]]:
    """Collects how Python code within looks at values of tensors."""
    looked: list[str] = []
    kind: Any = Tensor
    inherited = {name: name not in kind.__dict__ for name in _READS}
    originals = {name: getattr(kind, name) for name in _READS}

    def watching(name: str) -> Any:
        original = originals[name]

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            looked.append(name.strip("_"))
            return original(self, *args, **kwargs)

        return method

    for name in _READS:
        setattr(kind, name, watching(name))
    try:
        yield looked
    finally:
        for name in _READS:
            if inherited[name]:
                delattr(kind, name)
            else:
                setattr(kind, name, originals[name])
