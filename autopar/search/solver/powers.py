"""Powers of a repeat: one factor for a whole chain, exactly, at the cost of one repeat and some min-plus products.

Of one repeat all inner nodes are eliminated, which leaves `T[entering, leaving, invariants]`: the least cost of the repeat, given
what the repeat before chose for the nodes that this one reads, what it chose for the nodes that the next one reads, and what the
nodes that every repeat reads chose. `count` repeats cost the min-plus power `T ** count`, by repeated squaring: O(log count), and
exactly the optimum of the unfolded problem. A choice of all invariants is called a world; only those worlds are raised to a power
that bounds leave in the running.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.chain import Chain
from autopar.search.solver.eliminate import Eliminated, Factor, Memo, Order, eliminate, factor, find_order
from autopar.search.solver.problem import Floats

Ints = NDArray[np.int64]

_POTENTIAL_STEPS = 8
_NO_VARIABLE = -1


@dataclass(frozen=True)
class Shape:
    """How one repeat of a chain is eliminated: variables, their sizes, and the order.

    Variables are numbered: positions `0..length`, then entering nodes, then invariants.
    """

    sizes: dict[int, int]
    keep: tuple[int, ...]
    order: Order
    states: int
    """Combinations of choices of the leaving nodes."""
    worlds: int
    """Combinations of choices of the invariants."""


def shape_of(chain: Chain, sizes: Ints) -> Shape:
    length = chain.rows.shape[1]
    variables = {p: int(sizes[node]) for p, node in enumerate(chain.rows[0].tolist())}
    entering = {length + k: int(sizes[node]) for k, node in enumerate(chain.entering)}
    invariants = {length + len(entering) + k: int(sizes[node]) for k, node in enumerate(chain.invariants)}
    variables |= entering | invariants
    keep = (*entering, *chain.leaving, *invariants)
    scopes = [scope for scope, _, _ in _scopes(chain)]
    return Shape(variables, keep, find_order(variables, scopes, keep), prod(entering.values()), prod(invariants.values()))


def _scopes(chain: Chain) -> list[tuple[tuple[int, int], int, bool]]:
    """Variables and table of each edge of a repeat, and whether it goes to a node behind all repeats."""
    length = chain.rows.shape[1]
    entering = {p: length + k for k, p in enumerate(chain.leaving)}
    invariant = {node: length + len(entering) + k for k, node in enumerate(chain.invariants)}
    return [
        *[((i, j), t, False) for i, j, t in chain.inner],
        *[((entering[i], j), t, False) for i, j, t in chain.carried],
        *[((invariant[i], j), t, False) for i, j, t in chain.before],
        *[((i, invariant[j]), t, True) for i, j, t in chain.behind],
    ]


class Body:
    """One repeat under given costs. `modes[m][t]` is the cost of table `t` where the repeat is computed in mode `m` (once; again, where
    that may be chosen), `unary[p]` the number of the table of position `p`."""

    def __init__(self, chain: Chain, shape: Shape, modes: Sequence[list[Floats]], unary: list[int], limit_entries: int, memo: Memo) -> None:
        self.shape = shape
        least = [np.minimum(*both) for both in zip(*modes, strict=True)] if len(modes) > 1 else modes[0]
        self.eliminated: list[Eliminated] = []
        steps = []
        for tables in modes:
            factors = [factor((p,), tables[t]) for p, t in enumerate(unary)]
            # An edge to a node behind the repeats is paid as that one is computed: here as if it were at its best.
            factors += [factor(scope, (least if behind else tables)[t]) for scope, t, behind in _scopes(chain)]
            self.eliminated.append(eliminate(shape.sizes, factors, shape.order, limit_entries, memo))
            table = self.eliminated[-1].table(shape.keep, shape.sizes).reshape(shape.states, shape.states, shape.worlds)
            # (worlds, entering, leaving): powers run over the last two, invariants are a batch
            steps.append(np.ascontiguousarray(np.moveaxis(table, 2, 0)))
        self.step = steps[0] if len(steps) == 1 else np.minimum(*steps)
        self._again = None if len(steps) == 1 else steps[1] < steps[0]
        self._powers: dict[int, Power] = {}

    def mode(self, world: int, states: Ints) -> Ints:
        """The cheaper mode of every repeat on the way along `states`, shape `(repeats,)`."""
        if self._again is None:
            return np.zeros(len(states) - 1, np.int64)
        modes: Ints = self._again[world, states[:-1], states[1:]].astype(np.int64)
        return modes

    def power(self, count: int) -> Power:
        if count not in self._powers:
            self._powers[count] = Power(self, count)
        return self._powers[count]

    @cached_property
    def potential(self) -> tuple[Floats, Floats]:
        """`h` of shape `(worlds, states)` and `mean` of shape `(worlds,)`, such that `T[a, b] >= mean + h[a] - h[b]`.

        Any finite `h` will do; some steps of value iteration bring `mean` close to the least mean cost of a cycle.
        """
        h = np.zeros(self.step.shape[:2])
        for _ in range(_POTENTIAL_STEPS):
            h = (self.step + h[:, None, :]).min(2)
            finite = h < np.inf
            h = np.where(finite, h, np.where(finite, h, 0.0).max(1, keepdims=True))
            h = h - h.min(1, keepdims=True)
        mean = (self.step + h[:, None, :] - h[:, :, None]).min((1, 2))
        return h, mean


class Power:
    """`T ** count`, lazily: a lower bound for each world (choice of the invariants) until `solve` makes it exact.

    Few worlds can be the best, so few powers are ever computed. `table` has shape `(worlds, entering, leaving)`.
    """

    def __init__(self, body: Body, count: int) -> None:
        assert count >= 1
        self.step, self.count = body.step, count
        self.solved: dict[int, tuple[_Squares, int]] = {}
        h, mean = body.potential
        # the first and last step as they are, those between by the potential
        first = (self.step + h[:, None, :]).min(2)
        last = (self.step - h[:, :, None]).min(1)
        if count == 1:
            self.table = self.step.copy()
        else:
            self.table = _lowered((count - 2) * np.where(mean < np.inf, mean, 0.0)[:, None, None] + first[:, :, None] + last[:, None, :])

    def solve(self, world: int) -> bool:
        """Make `world` exact, and with it half as many of the most promising others as were solved before. False if it already was."""
        if world in self.solved:
            return False
        worlds = [world]
        if len(self.solved) > 1:
            bound = self.table.min((1, 2))
            bound[list(self.solved)] = np.inf
            bound[world] = -np.inf
            worlds = np.argsort(bound, kind="stable")[: 1 + len(self.solved) // 2].tolist()
            worlds = [w for w in worlds if w not in self.solved]
        squares = _Squares(self.step[worlds], self.count)
        self.table[worlds] = squares.table
        for index, w in enumerate(worlds):
            self.solved[w] = (squares, index)
        self._compare(world)
        return True

    def _compare(self, world: int) -> None:
        """Raise the bounds of worlds whose every step costs at least so much more than in `world`."""
        unsolved = np.ones(len(self.step), np.bool_)
        unsolved[list(self.solved)] = False
        with np.errstate(invalid="ignore"):
            more = np.fmin.reduce(self.step[unsolved] - self.step[world], (1, 2))  # NaN: impossible in both, no bound from there
        more = np.where(np.isfinite(more), more, np.where(more > 0, 0.0, -np.inf))
        with np.errstate(invalid="ignore"):
            bound = self.table[world] + _lowered(self.count * more)[:, None, None]
            self.table[unsolved] = np.fmax(self.table[unsolved], bound)

    def known(self) -> Floats:
        """The exact powers of the solved worlds, `inf` elsewhere."""
        table = np.full_like(self.table, np.inf)
        table[list(self.solved)] = self.table[list(self.solved)]
        return table

    def states(self, world: int, entering: int, leaving: int) -> Ints:
        """The state before, between and after the repeats on a cheapest way from `entering` to `leaving`, shape `(count + 1,)`."""
        squares, index = self.solved[world]
        return squares.states(index, entering, leaving)


def _lowered(bound: Floats) -> Floats:
    """A bound that rounding has not lifted over what it bounds."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(bound), bound - 1e-13 * np.abs(bound), bound)


class _Squares:
    """Powers of `step`, `(worlds, states, states)`, by repeated squaring, and the ways they stand for."""

    def __init__(self, step: Floats, count: int) -> None:
        self.levels = [level for level in range(count.bit_length()) if count >> level & 1]
        self.squares = [step]
        for _ in range(self.levels[-1]):
            self.squares.append(min_plus(self.squares[-1], self.squares[-1]))
        self.prefixes = [self.squares[self.levels[0]]]
        for level in self.levels[1:]:
            self.prefixes.append(min_plus(self.prefixes[-1], self.squares[level]))

    @property
    def table(self) -> Floats:
        return self.prefixes[-1]

    def states(self, index: int, entering: int, leaving: int) -> Ints:
        joints = [leaving]
        for position in range(len(self.levels) - 1, 0, -1):
            prefix, square = self.prefixes[position - 1][index], self.squares[self.levels[position]][index]
            joints.append(int((prefix[entering] + square[:, joints[-1]]).argmin()))
        joints.append(entering)
        joints.reverse()
        parts = [np.array([entering])]
        for level, start, stop in zip(self.levels, joints[:-1], joints[1:], strict=True):
            path = np.array([start, stop])
            for below in range(level - 1, -1, -1):
                table = self.squares[below][index]
                middle = (table[path[:-1]] + table[:, path[1:]].T).argmin(1)
                wider = np.empty(2 * len(path) - 1, np.int64)
                wider[::2], wider[1::2] = path, middle
                path = wider
            parts.append(path[1:])
        return np.concatenate(parts)


def min_plus(left: Floats, right: Floats) -> Floats:
    """`out[w, a, b] = min over c of left[w, a, c] + right[w, c, b]`."""
    out = np.full_like(left, np.inf)
    work = np.empty_like(left)
    for middle in range(left.shape[2]):
        np.add(left[:, :, middle, None], right[:, middle, None, :], out=work)
        np.minimum(out, work, out=out)
    return out


class ChainCost:
    """A chain at one price, as one factor over its entering nodes, the leaving nodes of its last repeat, and its invariants."""

    def __init__(self, chain: Chain, body: Body) -> None:
        self.chain, self.body = chain, body
        self.power = body.power(chain.count)
        shape = body.shape
        self._sizes = [shape.sizes[v] for v in shape.keep]
        width = len(chain.entering)
        self._nodes = (*chain.entering, *chain.rows[-1, list(chain.leaving)].tolist(), *chain.invariants)
        self._ends = (slice(0, width), slice(width, 2 * width), slice(2 * width, None))

    def factor(self, known: bool = False) -> Factor:
        """A lower bound that is exact where it was solved; or, where only `known`, `inf` for the rest."""
        table = self.power.known() if known else self.power.table
        return factor(self._nodes, np.moveaxis(table, 0, 2).reshape(self._sizes))

    def _indices(self, chosen: dict[int, Ints]) -> tuple[int, int, int]:
        """Numbers of the entering state, the leaving state and the world."""
        found = []
        for end in self._ends:
            number = 0
            for node, size in zip(self._nodes[end], self._sizes[end], strict=True):
                number = number * size + int(chosen[node][0])
            found.append(number)
        return found[0], found[1], found[2]

    def solve(self, chosen: dict[int, Ints]) -> bool:
        """Make the cost exact where it was chosen. Returns whether it was not before."""
        return self.power.solve(self._indices(chosen)[2])

    def recover(self, chosen: dict[int, Ints], choice: Ints) -> Ints:
        """Write the choices of all repeats into `choice`, given those of the factor's nodes. Returns the mode of each repeat."""
        chain, sizes = self.chain, self.body.shape.sizes
        length, width = chain.rows.shape[1], len(chain.entering)
        entering, leaving, world = self._indices(chosen)
        states = self.power.states(world, entering, leaving)
        state_sizes = [sizes[p] for p in chain.leaving]
        choices = np.array(np.unravel_index(states, state_sizes)) if state_sizes else np.zeros((0, len(states)), np.int64)
        known: dict[int, Ints] = {}
        for k, position in enumerate(chain.leaving):
            known[length + k], known[position] = choices[k, :-1], choices[k, 1:]
        for k, node in enumerate(chain.invariants):
            known[length + width + k] = np.full(chain.count, int(chosen[node][0]))
        if not known:
            known = {_NO_VARIABLE: np.zeros(chain.count, np.int64)}
        modes = self.body.mode(world, states)
        for mode, eliminated in enumerate(self.body.eliminated):
            rows = np.flatnonzero(modes == mode)
            if not len(rows):
                continue
            for position, values in eliminated.recover({v: values[rows] for v, values in known.items()}).items():
                if 0 <= position < length:
                    choice[chain.rows[rows, position]] = values
        return modes
