"""`effort="exact"`: close the gap by branch and bound, with HiGHS through OR-Tools' MathOpt.

First most strategies go: one whose min-marginal at the best price is over the cost of the best known choice is in no better one.
What is left is a small mixed-integer program. Its variables are `x[i, s]` (node `i` chooses `s`, binary) and `y[e, a, b]` (the ends of
edge `e` choose `a` and `b`), as in Alpa's intra-operator program (Zheng et al. 2022, section 4.2) with the memory row added.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from ortools.math_opt.python import mathopt

from autopar.errors import InfeasibleError
from autopar.search.solver.incumbent import Incumbent
from autopar.search.solver.marginals import min_marginals
from autopar.search.solver.minimise import Minimiser
from autopar.search.solver.problem import Floats, Problem, Table
from autopar.search.solver.reduce import reduce

Ints = NDArray[np.int64]

_CLOSED = 1e-9
_WRONG_BY_ROUNDING = 50
_COST_RANGE = 1e6
_MEMORY_RANGE = 1e5
_LARGEST_COST = 1e15  # HiGHS refuses what is nearly infinite to it


def close_gap(minimiser: Minimiser, incumbent: Incumbent, time_limit_s: float | None) -> None:
    """Improve the incumbent and its bound until they meet or the time is over."""
    deadline = np.inf if time_limit_s is None else perf_counter() + time_limit_s
    if incumbent.gap <= _CLOSED:
        return
    incumbent.report("fixing by marginals")
    kept = _fixed(minimiser, incumbent)
    try:
        small, kept = _smaller(minimiser.problem, kept)
    except InfeasibleError:  # nothing better than the incumbent is left
        incumbent.raise_bound(float(incumbent.cost_s), incumbent.price)
        incumbent.report("closed by marginals")
        return
    program = _Program(small, incumbent)
    hint = _within(kept, incumbent.choice) if incumbent.choice is not None else None
    for _ in range(_WRONG_BY_ROUNDING):
        incumbent.report("branch and bound")
        remaining = deadline - perf_counter()
        if remaining <= 0:
            return
        result = program.solve(remaining, hint)
        bound = min(program.bound(result), float(incumbent.cost_s))
        if bound > -np.inf:
            # what was fixed away costs at least as much as the incumbent did; the rest at least what HiGHS proved
            incumbent.raise_bound(bound - _CLOSED * abs(bound) / 10, incumbent.price)
        if not result.solutions or not result.solutions[0].primal_solution:
            break
        choice = program.choice(result)
        incumbent.offer(np.array([k[s] for k, s in zip(kept, choice.tolist(), strict=True)], np.int64))
        if (program.usage(choice) <= incumbent.limits).all():
            break
        program.forbid(choice)  # over the limit by less than HiGHS's tolerance
    incumbent.report("branch and bound")


def _fixed(minimiser: Minimiser, incumbent: Incumbent) -> list[Ints]:
    """Strategies that may be in a choice cheaper than the incumbent."""
    everything = [np.arange(n) for n in minimiser.sizes.tolist()]
    if not np.isfinite(incumbent.cost_s) or incumbent.choice is None:
        return everything
    marginals = min_marginals(minimiser, incumbent.price)
    if marginals is None:
        return everything
    price_of_limit = incumbent.price * minimiser.weigh(incumbent.limits) if incumbent.price > 0 else 0.0
    most = (incumbent.cost_s + price_of_limit) * (1 + 1e-12)
    kept = []
    for node, marginal in enumerate(marginals):
        stays = marginal <= most
        stays[incumbent.choice[node]] = True
        kept.append(np.flatnonzero(stays))
    return kept


def _smaller(problem: Problem, kept: list[Ints]) -> tuple[Problem, list[Ints]]:
    """The problem with only the strategies in `kept`, reduced once more, and which of the old strategies its own are."""
    tables: list[Table] = []
    numbers: dict[tuple[int, bytes, bytes], int] = {}

    def number(t: int, rows: Ints, columns: Ints | None) -> int:
        key = (t, rows.tobytes(), b"" if columns is None else columns.tobytes())
        if key not in numbers:
            numbers[key] = len(tables)
            tables.append(problem.tables[t].at(rows if columns is None else np.ix_(rows, columns)))
        return numbers[key]

    nodes = tuple([number(t, kept[v], None) for v, t in enumerate(problem.nodes)])
    edges = tuple([(i, j, number(t, kept[i], kept[j])) for i, j, t in problem.edges])
    reduced = reduce(Problem(nodes, edges, tuple(tables), (), problem.memory_limit_bytes))
    return reduced.problem, [old[new] for old, new in zip(kept, reduced.kept, strict=True)]


def _within(kept: list[Ints], choice: Ints) -> Ints | None:
    """`choice` in the numbers of `kept`, or None where it is no longer there."""
    found = [np.flatnonzero(k == s) for k, s in zip(kept, choice.tolist(), strict=True)]
    return np.array([int(f[0]) for f in found], np.int64) if all(len(f) for f in found) else None


@dataclass(frozen=True, slots=True)
class _Edge:
    i: int
    j: int
    table: Table


class _Program:
    """The mixed-integer program. Nodes with one strategy are constants and do not appear. Memory has a row for every step."""

    def __init__(self, problem: Problem, incumbent: Incumbent) -> None:
        self.sizes = [len(problem.tables[t].cost_s) for t in problem.nodes]
        self.nodes = [problem.tables[t] for t in problem.nodes]
        self.steps = 1 + max([len(table.later_bytes) for table in problem.tables], default=0)
        self.edges: list[_Edge] = []
        for i, j, t in problem.edges:
            self._add_edge(_Edge(i, j, problem.tables[t]))
        fixed = [table for table, n in zip(self.nodes, self.sizes, strict=True) if n == 1]
        self.base_cost = sum(float(table.cost_s[0]) for table in fixed)
        self.base_memory = [sum(float(table.step_bytes[step][0]) for table in fixed) for step in range(self.steps)]
        self.free = [v for v, n in enumerate(self.sizes) if n > 1]
        # tolerances of HiGHS are absolute; these scales put what matters well above them
        spread = [float(np.ptp(self.nodes[v].cost_s[np.isfinite(self.nodes[v].cost_s)])) for v in self.free]
        pairs = [edge.table.cost_s[np.isfinite(edge.table.cost_s)] for edge in self.edges]
        of_pairs = max([float(np.abs(cost).max(initial=0.0)) for cost in pairs], default=0.0)
        self.cost_unit = max(max([abs(self.base_cost) * 1e-9, *spread, 1e-300]) / _COST_RANGE, of_pairs / _LARGEST_COST)
        held = [float(array.max()) for v in self.free for array in self.nodes[v].step_bytes]
        self.memory_unit = max([1.0, *held]) / _MEMORY_RANGE
        self.model = mathopt.Model(name="autopar")
        self.x = {v: self._choice_variables(v) for v in self.free}
        self.y = [self._pair_variables(edge) for edge in self.edges]
        for v in self.free:
            self._one_strategy(v)
        for edge, y in zip(self.edges, self.y, strict=True):
            self._pairs_agree_with_choices(edge, y)
        for step, limit in enumerate(incumbent.limits.tolist()):
            if np.isfinite(limit):
                self._memory_within(step, limit)
        self._least_cost()

    def _add_edge(self, edge: _Edge) -> None:
        """Keep the edge if it joins two nodes with a choice; its rows that depend on one of them only become part of that node."""
        i, j, table = edge.i, edge.j, edge.table
        weighs = any(held.any() for held in table.step_bytes)
        if self.sizes[j] == 1 or (np.array_equal(table.cost_s, table.cost_s[:, :1].repeat(self.sizes[j], 1)) and not weighs):
            self.nodes[i] = self.nodes[i] + table.at((slice(None), 0))
        elif self.sizes[i] == 1 or (np.array_equal(table.cost_s, table.cost_s[:1].repeat(self.sizes[i], 0)) and not weighs):
            self.nodes[j] = self.nodes[j] + table.at(0)
        else:
            self.edges.append(edge)

    def usage(self, choice: Ints) -> Floats:
        """Memory of a choice at every step, `(steps,)`."""
        found = np.array(self.base_memory)
        for step in range(self.steps):
            found[step] += sum(float(self.nodes[v].step_bytes[step][choice[v]]) for v in self.free)
            found[step] += sum(float(edge.table.step_bytes[step][choice[edge.i], choice[edge.j]]) for edge in self.edges)
        return found

    def _choice_variables(self, v: int) -> list[mathopt.Variable]:
        """x[v, s] in {0, 1}; 0 where cost[v, s] is infinite."""
        return [self.model.add_integer_variable(lb=0.0, ub=float(c < np.inf), name=f"x{v}_{s}") for s, c in enumerate(self.nodes[v].cost_s)]

    def _pair_variables(self, edge: _Edge) -> list[list[mathopt.Variable]]:
        """0 <= y[e, a, b] <= 1; 0 where cost[e, a, b] is infinite."""
        return [[self.model.add_variable(lb=0.0, ub=float(c < np.inf)) for c in row] for row in edge.table.cost_s]

    def _one_strategy(self, v: int) -> None:
        """sum over s of x[v, s] = 1"""
        row = self.model.add_linear_constraint(lb=1.0, ub=1.0)
        for x in self.x[v]:
            row.set_coefficient(x, 1.0)

    def _pairs_agree_with_choices(self, edge: _Edge, y: list[list[mathopt.Variable]]) -> None:
        """sum over b of y[e, a, b] = x[i, a] for all a, and sum over a of y[e, a, b] = x[j, b] for all b"""
        for x, pairs in [*zip(self.x[edge.i], y, strict=True), *zip(self.x[edge.j], zip(*y, strict=True), strict=True)]:
            row = self.model.add_linear_constraint(lb=0.0, ub=0.0)
            row.set_coefficient(x, -1.0)
            for pair in pairs:
                row.set_coefficient(pair, 1.0)

    def _terms(self, step: int | None) -> list[tuple[mathopt.Variable, float]]:
        """Every variable with its memory at a step, or its cost, finite ones only."""

        def values(table: Table) -> Floats:
            return table.cost_s if step is None else table.step_bytes[step]

        terms = [(x, float(c)) for v in self.free for x, c in zip(self.x[v], values(self.nodes[v]), strict=True)]
        for edge, y in zip(self.edges, self.y, strict=True):
            rows = zip(y, values(edge.table), strict=True)
            terms += [(pair, float(c)) for pairs, row in rows for pair, c in zip(pairs, row, strict=True) if c]
        return [(variable, c) for variable, c in terms if np.isfinite(c)]

    def _memory_within(self, step: int, limit_bytes: float) -> None:
        """sum memory[v, s] x[v, s] + sum memory[e, a, b] y[e, a, b] <= limit - what the nodes without a choice need"""
        row = self.model.add_linear_constraint(ub=(limit_bytes - self.base_memory[step]) / self.memory_unit)
        for variable, memory in self._terms(step):
            row.set_coefficient(variable, memory / self.memory_unit)

    def _least_cost(self) -> None:
        """minimise sum cost[v, s] x[v, s] + sum cost[e, a, b] y[e, a, b]"""
        self.model.objective.is_maximize = False
        for variable, cost in self._terms(None):
            self.model.objective.set_linear_coefficient(variable, cost / self.cost_unit)

    def forbid(self, choice: Ints) -> None:
        """sum over v of x[v, choice[v]] <= number of nodes - 1"""
        row = self.model.add_linear_constraint(ub=float(len(self.free) - 1))
        for v in self.free:
            row.set_coefficient(self.x[v][int(choice[v])], 1.0)

    def solve(self, seconds: float, hint: Ints | None) -> mathopt.SolveResult:
        parameters = mathopt.SolveParameters(relative_gap_tolerance=1e-12, absolute_gap_tolerance=1e-9, random_seed=1)
        if np.isfinite(seconds):
            parameters.time_limit = timedelta(seconds=float(seconds))
        model_parameters = mathopt.ModelSolveParameters()
        if hint is not None:
            values = {x: float(s == hint[v]) for v in self.free for s, x in enumerate(self.x[v])}
            model_parameters.solution_hints.append(mathopt.SolutionHint(variable_values=values))
        return mathopt.solve(self.model, mathopt.SolverType.HIGHS, params=parameters, model_params=model_parameters)

    def bound(self, result: mathopt.SolveResult) -> float:
        """No choice of the program costs less; `inf` when it has none."""
        if result.termination.reason == mathopt.TerminationReason.INFEASIBLE:
            return np.inf
        return float(result.termination.objective_bounds.dual_bound) * self.cost_unit + self.base_cost

    def choice(self, result: mathopt.SolveResult) -> Ints:
        values = result.variable_values()
        choice = np.zeros(len(self.sizes), np.int64)
        for v in self.free:
            choice[v] = int(np.argmax([values[x] for x in self.x[v]]))
        return choice
