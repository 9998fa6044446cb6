"""The stages of one group of ranks, solved together: they share the memory of a device, and nothing else.

Without a pipeline there is one stage, the whole graph. With several, their problems side by side are one problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

from autopar.ir.assignment import Assignment
from autopar.ir.cluster import Cluster
from autopar.search.account import Account, account, least_workspace_bytes, memory_bytes, resident_bytes
from autopar.search.build import Built
from autopar.search.describe import Part
from autopar.search.problem import Problem, Segment, Solution
from autopar.search.solve import Progress, solve, solve_with

Effort = Literal["fast", "exact"]
_ROUNDS = 4  # of giving back memory for the workspace of the plan found


@dataclass(frozen=True, slots=True)
class Found:
    """The best choice for some stages on their ranks, what it adds up to, and a bound that no choice within the limit can beat.

    `cost_s`, `bound_s`: of all stages one after the other, for one step."""

    builts: tuple[Built, ...]
    choices: tuple[tuple[int, ...], ...]
    assignments: tuple[Assignment, ...]
    accounts: tuple[Account, ...]
    bound_s: float
    fits: bool

    @property
    def cost_s(self) -> float:
        return sum(one.cost_s for one in self.accounts)

    @property
    def memory_bytes(self) -> int:
        return sum(memory_bytes(self.accounts).values())

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(
            Part(built.structure, built.costs, assignment, one)
            for built, assignment, one in zip(self.builts, self.assignments, self.accounts, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """What a search is asked for, whatever the mesh. `limit_bytes` per device."""

    cluster: Cluster
    limit_bytes: int
    optimizer: str
    effort: Effort
    deadline_s: float | None = None
    progress: Callable[[Progress], None] | None = None

    def seconds_left(self) -> float | None:
        return None if self.deadline_s is None else max(0.1, self.deadline_s - perf_counter())

    def solve(self, builts: Sequence[Built]) -> Found:
        """Solve the stages `builts` of one group. The solver's limit leaves room for the least workspace that any plan needs; where the
        plan found needs more, room for that is left and it is solved again. The bound is that of the first round, which every plan within
        the limit obeys."""
        problem = beside([built.problem for built in builts])
        resident = sum(resident_bytes(built.structure, built.costs.microbatches) for built in builts)
        reserve = max(least_workspace_bytes(built.structure, built.costs, built.op_choices()) for built in builts) + resident
        best: Found | None = None
        bound = 0.0
        for attempt in range(_ROUNDS):
            limited = replace(problem, memory_limit_bytes=max(0.0, self.limit_bytes - reserve))
            solution = solve(limited, effort=self.effort, time_limit_s=self.seconds_left(), progress=self.progress)
            bound = solution.lower_bound_s if attempt == 0 else bound
            found = self.found(builts, solution, bound)
            if best is None or rank(found) < rank(best):
                best = found
            if found.fits or not solution.feasible:
                break
            needed = max(one.workspace_bytes for one in found.accounts) + resident
            reserve = max(reserve, needed) + (0.01 * self.limit_bytes if attempt else 0.0)
        assert best is not None
        if not best.fits:
            # The least of what adds up may come with a huge workspace: also look where the whole limit is worth as much as the whole step.
            other = self.found(builts, solve_with(problem, {}, bound / self.limit_bytes), bound)
            best = other if other.fits or other.memory_bytes < best.memory_bytes else best
        return best

    def found(self, builts: Sequence[Built], solution: Solution, bound_s: float) -> Found:
        """What a solution means and adds up to."""
        choices, assignments, accounts = [], [], []
        first = 0
        for built in builts:
            choice = solution.choice[first : first + len(built.problem.nodes)]
            first += len(choice)
            assignment = built.assignment(choice)
            one = account(built.structure, built.costs, assignment)
            cost_s = built.problem.evaluate(choice)[0]
            assert abs(one.cost_s - cost_s) <= 1e-9 * max(cost_s, 1e-12), (one.cost_s, cost_s)
            choices.append(choice)
            assignments.append(assignment)
            accounts.append(one)
        fits = sum(memory_bytes(accounts).values()) <= self.limit_bytes
        bound_s = min(bound_s, sum(one.cost_s for one in accounts))
        return Found(tuple(builts), tuple(choices), tuple(assignments), tuple(accounts), bound_s, fits)


def rank(found: Found) -> tuple[bool, float]:
    """Smaller is better: what fits before what does not, then time, or memory where nothing fits."""
    return not found.fits, found.cost_s if found.fits else float(found.memory_bytes)


def beside(problems: Sequence[Problem]) -> Problem:
    """One problem that holds `problems` without an edge between them; nodes and tables are numbered on."""
    if len(problems) == 1:
        return problems[0]
    nodes: list[int] = []
    edges: list[tuple[int, int, int]] = []
    segments: list[Segment] = []
    tables = [table for problem in problems for table in problem.tables]
    first_table = 0
    for problem in problems:
        first = len(nodes)
        nodes += [table + first_table for table in problem.nodes]
        edges += [(i + first, j + first, table + first_table) for i, j, table in problem.edges]
        segments += [replace(segment, start=segment.start + first) for segment in problem.segments]
        first_table += len(problem.tables)
    return Problem(tuple(nodes), tuple(edges), tuple(tables), tuple(segments), min(problem.memory_limit_bytes for problem in problems))
