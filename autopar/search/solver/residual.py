"""What the dual leaves open, as an integer program: strategies that cannot be part of a better choice are out, CP-SAT does the rest.

After the last sweep every strategy has a reduced cost: what a choice with it costs at least above the bound. Those above the best
choice are fixed out, as in branch and bound. The program has a literal per strategy and per possible pair, and a row per time step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.problem import Ints

__all__ = ["Residual", "residual"]

_MOST_PAIRS = 60_000  # possible pairs
_MOST_HOLDINGS = 1_000_000  # entries of memory rows
_WHOLE = 2.0**48  # what all costs together may come to in the program's units


@dataclass(frozen=True, slots=True)
class Residual:
    """A program over the strategies `kept (S,)`; `literals` by place in `(S,)`. One unit of its objective is `unit` of cost."""

    arrays: Arrays
    kept: NDArray[np.bool_]
    model: cp_model.CpModel
    literals: dict[int, cp_model.IntVar]
    unit: float

    def solve(self, solver: cp_model.CpSolver) -> tuple[Ints | None, float]:
        """The program's best choice, if it has found one, and a cost that none within the limit over kept strategies is below."""
        status = solver.solve(self.model)
        if status == cp_model.INFEASIBLE:
            return None, np.inf
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None, -np.inf
        first = self.arrays.first
        choice = [self._chosen(solver, int(first[v]), int(first[v + 1])) for v in range(len(self.arrays.sizes))]
        bound = round(solver.best_objective_bound) * self.unit  # whole, but for CP-SAT's own scaling
        return np.array(choice, np.int64), bound if self.unit == 1 else bound - 1e-15 * abs(bound)

    def _chosen(self, solver: cp_model.CpSolver, begin: int, end: int) -> int:
        return next(p - begin for p in range(begin, end) if p in self.literals and solver.boolean_value(self.literals[p]))


def residual(arrays: Arrays, kept: NDArray[np.bool_], choice: Ints) -> Residual | None:
    """The program over the strategies `kept`, with `choice` `(n,)` as a hint; None where it would be too large."""
    counts = np.add.reduceat(kept.astype(np.int64), arrays.first[:-1])
    source = np.repeat(np.arange(len(counts)), np.diff(arrays.start))
    once = np.flatnonzero(source < arrays.other)
    held = np.repeat(counts, np.diff(arrays.hold_start)) * (arrays.hold_hi - arrays.hold_lo)
    if (counts[source[once]] * counts[arrays.other[once]]).sum() > _MOST_PAIRS or held.sum() > _MOST_HOLDINGS:
        return None
    model = cp_model.CpModel()
    literals = {int(p): model.new_bool_var("") for p in np.flatnonzero(kept)}
    places = [[p for p in range(arrays.first[v], arrays.first[v + 1]) if kept[p]] for v in range(len(counts))]
    for v, own in enumerate(places):
        model.add_exactly_one(literals[p] for p in own)
        for p in own:
            model.add_hint(literals[p], p - arrays.first[v] == choice[v])
    terms: list[tuple[float, cp_model.IntVar]] = [(float(arrays.cost[p]), literals[p]) for p in literals]
    for a in once.tolist():
        terms += _edge(arrays, model, literals, places[source[a]], places[arrays.other[a]], int(source[a]), a)
    unit = _unit(terms)
    _memory(arrays, model, literals, places)
    model.minimize(sum(int(np.floor(cost / unit)) * literal for cost, literal in terms if cost != 0))
    return Residual(arrays, kept, model, literals, unit)


def _edge(
    arrays: Arrays, model: cp_model.CpModel, literals: dict[int, cp_model.IntVar], own: list[int], others: list[int], v: int, a: int
) -> list[tuple[float, cp_model.IntVar]]:
    """The costs of one edge: a literal per possible pair, and for each strategy exactly one of its pairs when it is chosen."""
    u = int(arrays.other[a])
    width = int(arrays.sizes[u])
    costs = {(p, q): float(arrays.table[arrays.rows[a] + (p - arrays.first[v]) * width + q - arrays.first[u]]) for p in own for q in others}
    possible = {pair: cost for pair, cost in costs.items() if cost < np.inf}
    if len(own) == 1 or len(others) == 1:
        free = {pair: literals[pair[0] if len(others) == 1 else pair[1]] for pair in costs}
        for pair in costs.keys() - possible.keys():
            model.add(free[pair] == 0)
        return [(cost, free[pair]) for pair, cost in possible.items()]
    pairs = {pair: model.new_bool_var("") for pair in possible}
    for p in own:
        model.add(sum(pairs[p, q] for q in others if (p, q) in pairs) == literals[p])
    for q in others:
        model.add(sum(pairs[p, q] for p in own if (p, q) in pairs) == literals[q])
    return [(cost, pairs[pair]) for pair, cost in possible.items()]


def _memory(arrays: Arrays, model: cp_model.CpModel, literals: dict[int, cp_model.IntVar], places: list[list[int]]) -> None:
    """One row per step; bytes that are no whole numbers count as the next lower, so that every choice within the limit stays in."""
    rows: list[dict[int, float]] = [{} for _ in arrays.room]
    for v, own in enumerate(places):
        for k in range(arrays.hold_start[v], arrays.hold_start[v + 1]):
            for p in own:
                amount = float(arrays.held[arrays.hold_first[k] + p - arrays.first[v]])
                if amount > 0:
                    for t in range(arrays.hold_lo[k], arrays.hold_hi[k]):
                        rows[t][p] = rows[t].get(p, 0.0) + amount
    seen = set()
    for row, room in zip(rows, arrays.room.tolist(), strict=True):
        key = (tuple(row.items()), room)
        if row and key not in seen:
            seen.add(key)
            model.add(sum(int(amount) * literals[p] for p, amount in row.items()) <= int(np.ceil(room)))


def _unit(terms: list[tuple[float, cp_model.IntVar]]) -> float:
    """1 where all costs are whole, else so small that rounding down loses nothing that matters."""
    costs = np.abs(np.array([cost for cost, _ in terms]))
    total = float(costs.sum())
    if (costs == np.floor(costs)).all() and total < _WHOLE:
        return 1.0
    return total / _WHOLE
