"""What is possible at all, as a program for CP-SAT: one strategy per node, no impossible pair; memory and costs are left out.

For graphs where moves do not come down to no impossible pair. What they have come to is the hint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.problem import Ints

__all__ = ["Pairs", "pairs"]

_MOST_LITERALS = 4_000_000  # in clauses


@dataclass(frozen=True, slots=True)
class Pairs:
    """The program; `literals` by place in `(S,)`."""

    arrays: Arrays
    model: cp_model.CpModel
    literals: list[cp_model.IntVar]

    def solve(self, solver: cp_model.CpSolver) -> tuple[Ints | None, float]:
        """A possible choice, if one was found, and a bound: `inf` where there is none."""
        status = solver.solve(self.model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None, np.inf if status == cp_model.INFEASIBLE else -np.inf
        chosen = np.array([solver.boolean_value(literal) for literal in self.literals])
        return np.flatnonzero(chosen) - self.arrays.first[:-1], -np.inf


def pairs(arrays: Arrays, hint: Ints) -> Pairs | None:
    """The program, with the choice `hint` `(n,)`; None where it would be too large."""
    barred = np.isinf(arrays.table)
    source = np.repeat(np.arange(len(arrays.sizes)), np.diff(arrays.start))
    once = np.flatnonzero(source < arrays.other)
    model = cp_model.CpModel()
    literals = [model.new_bool_var("") for _ in arrays.cost]
    for v, size in enumerate(arrays.sizes.tolist()):
        own = literals[arrays.first[v] : arrays.first[v] + size]
        model.add_exactly_one(own)
        for strategy, literal in enumerate(own):
            model.add_hint(literal, strategy == hint[v])
    for place in np.flatnonzero(np.isinf(arrays.cost)).tolist():
        model.add(literals[place] == 0)
    count = 0
    for a in once.tolist():
        v, u = int(source[a]), int(arrays.other[a])
        height, width = int(arrays.sizes[v]), int(arrays.sizes[u])
        table = barred[arrays.rows[a] : arrays.rows[a] + height * width].reshape(height, width)
        count += int(np.minimum(2 * table.sum(1), width + 1 - table.sum(1)).sum())
        if count > _MOST_LITERALS:
            return None
        for strategy in np.flatnonzero(table.any(1)).tolist():
            _row(model, literals[arrays.first[v] + strategy], literals[arrays.first[u] : arrays.first[u] + width], table[strategy].tolist())
    return Pairs(arrays, model, literals)


def _row(model: cp_model.CpModel, here: cp_model.IntVar, there: list[cp_model.IntVar], barred: list[bool]) -> None:
    """A clause for each partner that is barred, or one with all that are not, whichever is shorter."""
    allowed = [literal for literal, bar in zip(there, barred, strict=True) if not bar]
    if len(allowed) < 2 * (len(there) - len(allowed)):
        model.add_bool_or([here.negated(), *allowed])
        return
    for literal, bar in zip(there, barred, strict=True):
        if bar:
            model.add_bool_or([here.negated(), literal.negated()])
