"""`shrink`: the exact reductions of problems with time steps, one after the other until nothing changes, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from autopar.search.solver.contract import settle
from autopar.search.solver.dominated import drop_dominated, fold_leaves
from autopar.search.solver.parts import settle_parts
from autopar.search.solver.problem import Ints, Problem
from autopar.search.solver.series import bridge_series
from autopar.search.solver.shrinking import Shrinking
from autopar.search.solver.tighten import tighten

_ROUNDS = 8

__all__ = ["Shrunk", "shrink"]


@dataclass(frozen=True, slots=True, eq=False)
class Shrunk:
    """A smaller `problem` with the same least cost, and the way back.

    Its last node has one strategy and holds all that no choice changes: the cost of what is fixed, and memory over time. Time steps are
    renumbered. Each choice within its limit stands for one of the first problem within the limit and with the same cost.
    """

    problem: Problem
    state: Shrinking
    left: Ints

    def original(self, choice: Ints) -> tuple[int, ...]:
        """The choice of the first problem for which `choice`, `(nodes,)` of the smaller one, stands."""
        return self.state.original(choice[:-1], self.left)


def shrink(problem: Problem, patient: bool = True, most_s: float = np.inf) -> Shrunk:
    """The problem made smaller without losing its optimum. `patient`: eliminations may take more than a moment.

    After `most_s` seconds no further reduction is begun; what is impossible is dropped in any case.
    Raises `InfeasibleError` when a node is left without a possible strategy.
    """
    start = perf_counter()
    state = Shrinking(problem)
    settle(state)
    for _ in range(_ROUNDS):
        changed = False
        for reduction in (tighten, drop_dominated, fold_leaves, bridge_series):
            if perf_counter() - start > most_s:
                return Shrunk(*_result(state, problem.memory_limit_bytes))
            changed = reduction(state) or changed
        if not changed:
            break
        settle(state)
    settle(state)
    if perf_counter() - start <= most_s:
        settle_parts(state, patient)
    return Shrunk(*_result(state, problem.memory_limit_bytes))


def _result(state: Shrinking, limit_bytes: float) -> tuple[Problem, Shrinking, Ints]:
    problem, left = state.problem(limit_bytes)
    return problem, state, left
