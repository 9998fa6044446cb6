"""What is left of a shrunk problem as a mixed-integer program, for HiGHS: worth it where few pairs of strategies are left.

Variables are `x[i, s]` (node `i` chooses `s`, binary) and `y[e, a, b]` (the ends of edge `e` choose `a` and `b`), as in Alpa's
intra-operator program (Zheng et al. 2022, section 4.2), here with a row of memory for every time step.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from threading import Thread
from time import perf_counter

import numpy as np
from ortools.math_opt.python import mathopt

from autopar.search.problem import Floats, Problem, Solution

__all__ = ["improve_core"]

_MOST_MEMORY_TERMS = 4_000_000
_COST_RANGE = 1e6
_MEMORY_RANGE = 1e5
_ROUNDING = 1e-9  # of the bound: what sums in floating point may be off


def improve_core(problem: Problem, known: Solution, time_limit_s: float | None) -> Solution:
    """`known`, a solution of `problem` (whose edges hold no memory), with a cheaper choice or a higher bound where HiGHS finds one.

    Ctrl-C abandons HiGHS and is raised again.
    """
    start = perf_counter()
    program = _Program(problem, known)
    if program.memory_terms > _MOST_MEMORY_TERMS:
        return known
    program.build()
    left = None if time_limit_s is None else time_limit_s - (perf_counter() - start)
    if left is not None and left <= 0:
        return known
    result = program.solve(left)
    best = known
    if result.solutions and result.solutions[0].primal_solution:
        choice = program.choice(result)
        cost, memory = problem.evaluate(choice)
        feasible = cost < np.inf and memory <= problem.memory_limit_bytes
        if feasible and (not known.feasible or cost < known.cost_s):
            best = replace(known, choice=choice, cost_s=cost, memory_bytes=memory, feasible=True)
    bound = max(best.lower_bound_s, program.bound(result))
    return replace(best, lower_bound_s=min(bound, best.cost_s) if best.feasible else bound)


class _Program:
    """The program of one problem."""

    def __init__(self, problem: Problem, known: Solution) -> None:
        self.problem, self.known = problem, known
        self.model = mathopt.Model(name="core")
        self.x: list[list[mathopt.Variable]] = []
        always = (-np.inf, np.inf)
        rows = [(node, table, *(problem.live[node] if problem.live else always)) for node, table in enumerate(problem.nodes)]
        self.rows = [(*row[:2], row[2], row[3]) for row in [*rows, *problem.also] if row[2] < row[3] and self._bytes(row[1]).any()]
        ends = sorted({end for *_, lo, hi in self.rows for end in (lo, hi) if np.isfinite(end)})
        self.starts = np.array(ends[:-1] if len(ends) > 1 else [0.0])
        spans = [np.searchsorted(self.starts, row[2:]) for row in self.rows]
        self.spans = [(int(lo), int(hi)) for lo, hi in spans]
        self.memory_terms = sum((hi - lo) * len(self._bytes(row[1])) for row, (lo, hi) in zip(self.rows, self.spans, strict=True))
        self.whole = all((t.cost_s[np.isfinite(t.cost_s)] % 1 == 0).all() for t in problem.tables)
        costs = max((float(t.cost_s[np.isfinite(t.cost_s)].max(initial=0.0)) for t in problem.tables), default=0.0)
        self.cost_unit = max(costs / _COST_RANGE, 1e-300)
        # HiGHS keeps rows to within 1e-6 of the unit: below a byte
        self.memory_unit = float(np.clip(problem.memory_limit_bytes / _MEMORY_RANGE, 1e-300, 1e5))

    def _bytes(self, table: int) -> Floats:
        return self.problem.tables[table].memory_bytes

    def build(self) -> None:
        problem, model = self.problem, self.model
        model.objective.is_maximize = False
        for table in problem.nodes:
            cost = problem.tables[table].cost_s
            self.x.append([model.add_binary_variable() for _ in cost])
            self._pay(self.x[-1], cost)
            self._one(self.x[-1])
        for i, j, table in problem.edges:
            self._edge(self.x[i], self.x[j], problem.tables[table].cost_s)
        if problem.memory_limit_bytes < np.inf:
            self._memory()

    def _one(self, variables: list[mathopt.Variable]) -> None:
        """sum over s of x[i, s] = 1"""
        row = self.model.add_linear_constraint(lb=1.0, ub=1.0)
        for variable in variables:
            row.set_coefficient(variable, 1.0)

    def _pay(self, variables: list[mathopt.Variable], cost: Floats) -> None:
        """Adds sum cost[s] x[i, s] to the objective; what is impossible is 0."""
        for variable, price in zip(variables, cost.tolist(), strict=True):
            if price == np.inf:
                variable.upper_bound = 0.0
            elif price:
                self.model.objective.set_linear_coefficient(variable, price / self.cost_unit)

    def _edge(self, left: list[mathopt.Variable], right: list[mathopt.Variable], cost: Floats) -> None:
        """sum over b of y[e, a, b] = x[i, a] and sum over a of y[e, a, b] = x[j, b]"""
        pairs = [[self.model.add_variable(lb=0.0, ub=1.0) for _ in right] for _ in left]
        for variables, row_cost in zip(pairs, cost, strict=True):
            self._pay(variables, row_cost)
        columns = [list(column) for column in zip(*pairs, strict=True)]
        for one, variables in [*zip(left, pairs, strict=True), *zip(right, columns, strict=True)]:
            row = self.model.add_linear_constraint(lb=0.0, ub=0.0)
            row.set_coefficient(one, -1.0)
            for variable in variables:
                row.set_coefficient(variable, 1.0)

    def _memory(self) -> None:
        """For every step t: sum over i, s of bytes[i, s, t] x[i, s] <= limit; nodes with several holdings count each."""
        limit = self.problem.memory_limit_bytes / self.memory_unit
        steps = [self.model.add_linear_constraint(ub=limit) for _ in self.starts]
        held: dict[tuple[int, int], Floats] = {}
        for (node, table, *_), (lo, hi) in zip(self.rows, self.spans, strict=True):
            for step in range(lo, hi):
                known = held.get((node, step))
                held[node, step] = self._bytes(table) if known is None else known + self._bytes(table)
        for (node, step), size in held.items():
            for variable, amount in zip(self.x[node], (size / self.memory_unit).tolist(), strict=True):
                if amount:
                    steps[step].set_coefficient(variable, amount)

    def solve(self, seconds: float | None) -> mathopt.SolveResult:
        """HiGHS's result; it runs beside the main thread so that Ctrl-C is heard."""
        parameters = mathopt.SolveParameters(relative_gap_tolerance=1e-10, absolute_gap_tolerance=1e-9, random_seed=1)
        if seconds is not None:
            parameters.time_limit = timedelta(seconds=seconds)
        model_parameters = mathopt.ModelSolveParameters()
        if self.known.feasible:
            hint = {x: float(s == chosen) for xs, chosen in zip(self.x, self.known.choice, strict=True) for s, x in enumerate(xs)}
            model_parameters.solution_hints.append(mathopt.SolutionHint(variable_values=hint))
        found: list[mathopt.SolveResult | BaseException] = []

        def work() -> None:
            try:
                found.append(mathopt.solve(self.model, mathopt.SolverType.HIGHS, params=parameters, model_params=model_parameters))
            except BaseException as error:
                found.append(error)

        thread = Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
        (result,) = found
        if isinstance(result, BaseException):
            raise result
        return result

    def bound(self, result: mathopt.SolveResult) -> float:
        """No choice within the limit costs less."""
        if result.termination.reason == mathopt.TerminationReason.INFEASIBLE:
            return -np.inf  # left to who can name the place
        bound = float(result.termination.objective_bounds.dual_bound) * self.cost_unit
        bound -= _ROUNDING * abs(bound)
        return float(np.ceil(bound)) if self.whole and np.isfinite(bound) else bound

    def choice(self, result: mathopt.SolveResult) -> tuple[int, ...]:
        values = result.variable_values()
        return tuple([int(np.argmax([values[x] for x in xs])) for xs in self.x])
