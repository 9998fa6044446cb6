"""The stages of one group of ranks, solved together: they share the memory of a device, and nothing else.

Without a pipeline there is one stage, the whole graph. With several, their problems side by side are one problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import Literal

import numpy as np

from autopar.ir.cluster import Cluster
from autopar.ir.pipelining.schedules import Order, named
from autopar.ir.plan import SegmentCost
from autopar.ir.precision import Precision
from autopar.search.account import account, least_workspace_bytes, resident_bytes
from autopar.search.build import AT_LOSS, Built
from autopar.search.describe import Part
from autopar.search.prices.segments import Row
from autopar.search.prices.work import RECEIVE
from autopar.search.recompute import Relaxed, recomputed, relaxed
from autopar.search.simulator import timeline
from autopar.search.simulator.workload import Flow, Piece, Stage, Workload, sizes_of
from autopar.search.solver.memory import GOOD_GAP
from autopar.search.solver.minimise import Minimum, Price
from autopar.search.solver.problem import Interval, Problem, Segment, Solution
from autopar.search.solver.solve import Progress, Ready, solve, solve_with
from autopar.search.solver.steps import Steps, in_steps

Effort = Literal["fast", "exact"]
Recompute = Literal["auto", "none", "all"]
LEAST_LEFT_S = 0.1  # what a search is given at least, when time is up before it begins
_CHEAP_ENTRIES = 1e6  # of tables
_ROUNDS = 4  # of giving back memory for the workspace of the plan found


@dataclass(frozen=True)
class Place:
    """The stages `numbers` of a pipeline, in order, on one group of ranks, and the `order` of what the group does. Without a pipeline: one
    stage, its microbatches in turn."""

    builts: tuple[Built, ...]
    numbers: tuple[int, ...]
    order: Order

    @cached_property
    def problem(self) -> Problem:
        return beside([built.problem for built in self.builts])

    @cached_property
    def _steps(self) -> Steps:
        steps = in_steps(self.problem)
        assert steps is not None, "two steps: the loss, and the end of the backward pass"
        return steps

    @property
    def starts(self) -> tuple[int, ...]:
        """Of the steps of the problem."""
        return self._steps.starts

    @cached_property
    def ready(self) -> Ready:
        """The problem made ready for any limit."""
        return Ready(self._steps)

    @cached_property
    def switched(self) -> Ready:
        """The problem in which every repeat that could be recomputed is or is not, as is best, made ready for any limit."""
        steps = in_steps(beside([built.switched(row) for built, row in zip(self.builts, self.may(), strict=True)]))
        assert steps is not None, "two steps: the loss, and the end of the backward pass"
        return Ready(steps)

    @property
    def cheap(self) -> bool:
        """Whether it was made ready, and bounds cost next to nothing."""
        made = [vars(self)[name] for name in ("switched", "ready") if name in vars(self)]
        return any(ready.minimiser.fits and ready.minimiser.entries < _CHEAP_ENTRIES for ready in made[:1])

    def most(self) -> tuple[tuple[int, ...], ...]:
        """By stage and segment, how many repeats could be recomputed: those of repeats, or the whole stage where nothing repeats."""
        found = []
        for built in self.builts:
            counts = [segment.count for segment in built.structure.op_segments]
            repeats = max(counts, default=0) > 1
            trains = built.structure.graph.training
            found.append(tuple(count if trains and (count > 1 or not repeats) else 0 for count in counts))
        return tuple(found)

    def may(self) -> tuple[tuple[int, ...], ...]:
        """`most`, where that can help: of a stage that is recomputed as a whole all is in memory at once, as if it had been kept, so that
        there must be other microbatches."""
        alone = len(self.builts) == 1 and self.builts[0].costs.live == 1
        rows = zip(self.builts, self.most(), strict=True)
        whole = [max((segment.count for segment in built.structure.op_segments), default=0) <= 1 for built, _ in rows]
        return tuple(tuple(0 for _ in row) if alone and all_ else row for row, all_ in zip(self.most(), whole, strict=True))

    @cached_property
    def _with_counts(self) -> dict[tuple[tuple[int, ...], ...], Place]:
        return {}

    def recomputing(self, counts: tuple[tuple[int, ...], ...]) -> Place:
        """The same with so many repeats recomputed, made once."""
        if counts not in self._with_counts:
            builts = tuple(built.recomputing(row) for built, row in zip(self.builts, counts, strict=True))
            self._with_counts[counts] = replace(self, builts=builts)
        return self._with_counts[counts]


def alone(built: Built) -> Place:
    """A whole graph on all ranks."""
    return Place((built,), (0,), named("1f1b").orders(1, 1, built.costs.microbatches)[0])


@dataclass(frozen=True)
class Found:
    """The best choice for the stages of a `place`, what it adds up to, and a bound that no choice within the limit can beat.

    `cost_s`, `bound_s`: of all stages one after the other, for one step. `fits`: by the peak of memory."""

    place: Place
    choices: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...]
    bound_s: float
    limit_bytes: int
    price_s_per_byte: float = 0.0
    """Of memory, at which the bound was found."""

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.limit_bytes

    @property
    def cost_s(self) -> float:
        return sum(part.account.cost_s for part in self.parts)

    @cached_property
    def memory(self) -> dict[str, int]:
        """By kind at the peak, as the simulator will say."""
        return peak(self.parts, self.place.numbers, self.place.order)

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


def peak(parts: Sequence[Part], numbers: Sequence[int], order: Order) -> dict[str, int]:
    """Memory by kind, where it is largest, of a group that runs the stages `numbers` in this order. See
    `autopar.search.simulator.timeline`."""
    stages = [Stage("", -1, ())] * (max(numbers) + 1)
    for number, part in zip(numbers, parts, strict=True):
        rows = zip(part.rows, part.row_costs, strict=True)
        pieces = tuple(piece for row, cost in rows for piece in _pieces(row, cost))
        stages[number] = Stage("", 0, pieces, receives_bytes=received_bytes(part))
    resident = float(sum(part.account.resident_bytes for part in parts))
    workload = Workload(tuple(stages), (order,), 0.0, (resident,))
    levels = [tuple(math.ceil(size) for size in level) for _, _, level in timeline.walk(workload, 0)]
    return dict(zip(timeline.KINDS, max(levels, key=sum), strict=True))


def received_bytes(part: Part) -> int:
    """Of one microbatch, what a rank of the stage receives from the stage before."""
    graph, found = part.structure.graph, 0
    for op in graph.ops:
        if op.target == RECEIVE:
            found += sum(map(part.costs.of, map(graph.values.__getitem__, op.outputs), part.assignment.output_states(op)))
    return found


def _pieces(row: Row, cost: SegmentCost) -> tuple[Piece, ...]:
    """What counts for memory of the repeats of a row."""
    gather, regather, reduce = ((Flow(1.0),) if flows else () for flows in (cost.gather_s, cost.regather_s, cost.reduce_s))
    kept = Piece("", 0.0, 0.0, gather=gather, regather=regather, reduce=reduce, **sizes_of(cost))
    return (replace(kept, recompute=True),) * row.recompute + (kept,) * (row.count - row.recompute)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a search is asked for, whatever the mesh. `limit_bytes` per device."""

    cluster: Cluster
    limit_bytes: int
    optimizer: str
    effort: Effort
    deadline_s: float | None = None
    progress: Callable[[Progress], None] | None = None
    recompute: Recompute = "auto"
    precision: Precision | None = None

    def seconds_left(self) -> float | None:
        return None if self.deadline_s is None else max(LEAST_LEFT_S, self.deadline_s - perf_counter())

    def solve(self, place: Place) -> Found:
        """Solve the stages of one group, recomputing no repeat, all, or (`"auto"`) as many as pays."""
        if self.recompute == "all" and any(map(any, place.most())):
            return self.solve_as_is(place.recomputing(place.most()))
        if not self._chooses(place):
            return self.solve_as_is(place)
        return self.within(place, self.promised(place))

    def promised(self, place: Place, price: float = 0.0, enough_s: float = math.inf) -> Relaxed:
        """What no plan of a place within the limit takes less than; looked for up to `enough_s`. `price`: a guess of that of memory."""
        if not self._chooses(place):
            all_ = place.recomputing(place.most()) if self.recompute == "all" else place
            return Relaxed(all_.ready.minimiser.minimise(Price(0.0)).bound, place.may())
        limits = [self.limit_bytes - size for size in self.beside(place)]
        if price == 0:
            minimiser = place.ready.minimiser
            free = minimiser.minimise(Price(0.0))
            if math.isinf(free.bound):
                self.solve_as_is(place)  # says why
            if free.bound >= enough_s or (free.exact and bool((minimiser.usage(free.choice)[1] <= limits).all())):
                return Relaxed(free.bound, tuple(tuple(0.0 for _ in row) for row in place.may()))
        target = relaxed(place, limits, price, enough_s)
        if target is None:
            free = place.ready.minimiser.minimise(Price(0.0))
            target = Relaxed(free.bound, self._guessed(place, free, limits), guessed=True)
        return target

    def look(self, place: Place, price: float) -> Ready:
        """What `promised` looks at first."""
        return place.switched if price and self._chooses(place) else place.ready

    def within(self, place: Place, target: Relaxed) -> Found:
        """The best found of a place, with about as many repeats recomputed as `target`, what is `promised`, says."""
        if not self._chooses(place):
            return self.solve(place)
        kept: Found | None = None
        if sum(map(sum, target.counts)) < 1 and not self.hopeless(place):
            found = self.solve_as_is(place)
            if found.fits and found.cost_s <= (1 + GOOD_GAP) * target.bound_s:
                return replace(found, bound_s=min(target.bound_s, found.cost_s))
            kept = found
        return recomputed(self, place, target, kept)

    def _chooses(self, place: Place) -> bool:
        """Whether how much to recompute is searched for."""
        return self.recompute == "auto" and any(map(any, place.may()))

    def hopeless(self, place: Place) -> bool:
        """Whether it is plain that nothing fits as it is."""
        minimiser = place.ready.minimiser
        least = minimiser.minimise(Price(math.inf))
        return least.exact and minimiser.evaluate(least.choice)[1] > self.limit_bytes - self.beside(place)[0]

    def _guessed(self, place: Place, free: Minimum, limits: list[float]) -> tuple[tuple[float, ...], ...]:
        """How many repeats to recompute, by what recomputing all of them saves."""
        held = place.ready.minimiser.usage(free.choice)[1][0]
        choice = np.array(place.ready.reduced.original(free.choice), np.int64)
        all_ = place.recomputing(place.may()).problem.evaluate(tuple(choice.tolist()))[1]
        share = min(1.0, max(0.0, held - limits[0]) / max(held - all_, 1.0))
        return tuple(tuple(share * count for count in row) for row in place.may())

    def beside(self, place: Place) -> tuple[float, ...]:
        """By step of the problem, what is held whatever is chosen: what is resident, and at the loss at least the workspace that any plan
        needs."""
        least = max(least_workspace_bytes(built.structure, built.costs, built.op_choices()) for built in place.builts)
        resident = sum(resident_bytes(built.structure, built.costs.microbatches) for built in place.builts)
        return tuple(resident + (least if start == AT_LOSS else 0.0) for start in place.starts)

    def solve_as_is(self, place: Place) -> Found:
        """The problem knows what is there at the loss and at the end of the backward pass; on top of it comes, at the loss, at least the
        workspace that any plan needs. Where the peak of the plan found is elsewhere, and above the limit, room for that is left and it is
        solved again. The bound is that of the first round, which every plan within the limit obeys."""
        problem, ready = replace(place.problem, memory_limit_bytes=float(self.limit_bytes)), place.ready
        beside = list(self.beside(place))
        best: Found | None = None
        bound = price = 0.0
        least_tried = False
        for attempt in range(_ROUNDS):
            left_s = self.seconds_left()
            solution = solve(
                problem, ready=ready, beside_bytes=tuple(beside), effort=self.effort, time_limit_s=left_s, progress=self.progress
            )  # fmt: skip
            if attempt == 0:
                bound, price = solution.lower_bound_s, solution.multiplier_s_per_byte
            found = replace(self.found(place, solution, bound), price_s_per_byte=price)
            if best is None or self.rank(found) < self.rank(best):
                best = found
            least_tried = not solution.feasible
            if found.fits or least_tried:
                break
            more = max(0.0, found.memory_bytes - solution.memory_bytes) + (0.01 * self.limit_bytes if attempt else 0.0)
            beside = [size + more for size in beside]
        assert best is not None
        if not best.fits:
            # The least of what adds up may come with a huge workspace: also look where the whole limit is worth as much as the whole step.
            others = [solve_with(problem, {}, bound / self.limit_bytes, ready)]
            if not least_tried:
                # What is said to be the least when nothing fits must be found again when just that much is given.
                others.append(solve_with(problem, {}, math.inf, ready))
            best = min(best, *(self.found(place, other, bound) for other in others), key=self.rank)
        return best

    @staticmethod
    def rank(found: Found) -> tuple[bool, float]:
        """Smaller is better: what fits before what does not, then time, or memory where nothing fits."""
        return not found.fits, found.cost_s if found.fits else float(found.memory_bytes)

    def found(self, place: Place, solution: Solution, bound_s: float) -> Found:
        """What a solution means and adds up to."""
        choices, parts = [], []
        first = 0
        for built in place.builts:
            choice = solution.choice[first : first + len(built.problem.nodes)]
            first += len(choice)
            assignment = built.assignment(choice)
            one = account(built.structure, built.costs, assignment, built.recompute)
            cost_s = built.problem.evaluate(choice)[0]
            assert abs(one.cost_s - cost_s) <= 1e-9 * max(cost_s, 1e-12), (one.cost_s, cost_s)
            choices.append(choice)
            parts.append(Part(built.structure, built.costs, assignment, one, built.recompute))
        bound_s = min(bound_s, sum(part.account.cost_s for part in parts))
        return Found(place, tuple(choices), tuple(parts), bound_s, self.limit_bytes)


def beside(problems: Sequence[Problem]) -> Problem:
    """One problem that holds `problems` without an edge between them; nodes and tables are numbered on."""
    if len(problems) == 1:
        return problems[0]
    nodes: list[int] = []
    edges: list[tuple[int, int, int]] = []
    segments: list[Segment] = []
    live: list[Interval] = []
    edges_live: list[Interval] = []
    also: list[tuple[int, int, int, int]] = []
    regions: list[int] = []
    tables = [table for problem in problems for table in problem.tables]
    first_table = 0
    for problem in problems:
        first = len(nodes)
        nodes += [table + first_table for table in problem.nodes]
        edges += [(i + first, j + first, table + first_table) for i, j, table in problem.edges]
        segments += [replace(segment, start=segment.start + first) for segment in problem.segments]
        live += problem.live or ()
        edges_live += problem.edges_live or ()
        also += [(node + first, table + first_table, lo, hi) for node, table, lo, hi in problem.also]
        first_region = max(regions, default=-1) + 1
        regions += [region + first_region if region >= 0 else -1 for region in problem.regions or (-1,) * len(problem.nodes)]
        first_table += len(problem.tables)
    limit_bytes = min(problem.memory_limit_bytes for problem in problems)
    return Problem(
        tuple(nodes), tuple(edges), tuple(tables), tuple(segments), limit_bytes, tuple(live), tuple(edges_live), tuple(also),
        tuple(regions) if max(regions, default=-1) >= 0 else None,
    )  # fmt: skip
