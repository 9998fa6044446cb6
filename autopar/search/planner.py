"""`plan_graph`: from a graph and a cluster to a `Plan`.

    for every mesh: structure + prices -> problem -> solution;  the best one -> assignment -> account -> Plan

What is claimed is what `account` adds up from the expanded decisions, not what the solver says; the two must agree.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

from autopar.errors import InfeasibleError, PinError, PlanError
from autopar.ir.assignment import Assignment, conflict
from autopar.ir.cluster import Cluster
from autopar.ir.graph import Graph
from autopar.ir.plan import Plan, Predicted
from autopar.search.account import Account, account, least_workspace_bytes
from autopar.search.alternatives import price_alternatives
from autopar.search.baselines import baseline as baseline_of
from autopar.search.build import FREE, Built, Restriction, build
from autopar.search.costs import Costs
from autopar.search.describe import describe
from autopar.search.follow import batch_splits
from autopar.search.meshes import AXES, Mesh, candidates
from autopar.search.pins import Pins, apply_pins, check_options, read_pins
from autopar.search.problem import Solution
from autopar.search.remedies import remedies
from autopar.search.solve import Progress, solve, solve_with
from autopar.search.structure import Structure

Effort = Literal["fast", "exact"]
_ROUNDS = 4  # of giving back memory for the workspace of the plan found


@dataclass(frozen=True, slots=True)
class Found:
    """The best choice on one mesh, what it adds up to, and a bound that no choice on this mesh within the limit can beat."""

    built: Built
    choice: tuple[int, ...]
    assignment: Assignment
    account: Account
    bound_s: float
    fits: bool

    @property
    def memory_bytes(self) -> int:
        return sum(self.account.memory_bytes().values())


@dataclass(frozen=True, slots=True)
class Search:
    """What a search is asked for. `limit_bytes` per device."""

    structure: Structure
    cluster: Cluster
    limit_bytes: int
    optimizer: str
    effort: Effort
    deadline_s: float | None
    progress: Callable[[Progress], None] | None

    def costs(self, mesh: Mesh) -> Costs:
        return Costs(self.cluster, mesh, AXES, self.optimizer, self.structure.graph.training)

    def seconds_left(self) -> float | None:
        return None if self.deadline_s is None else max(0.1, self.deadline_s - perf_counter())

    def solve(self, built: Built, reserve_bytes: float) -> Solution:
        problem = replace(built.problem, memory_limit_bytes=max(0.0, self.limit_bytes - reserve_bytes))
        return solve(problem, effort=self.effort, time_limit_s=self.seconds_left(), progress=self.progress)

    def on(self, built: Built) -> Found:
        """Solve one mesh. The solver's limit leaves room for the least workspace that any plan needs; where the plan found needs more,
        room for that is left and it is solved again. The bound is that of the first round, which every plan within the limit obeys."""
        reserve = least_workspace_bytes(self.structure, built.costs, built.op_choices())
        best: Found | None = None
        bound = 0.0
        for attempt in range(_ROUNDS):
            solution = self.solve(built, reserve)
            bound = solution.lower_bound_s if attempt == 0 else bound
            found = self.found(built, solution, bound)
            if best is None or (found.fits, -found.account.cost_s if found.fits else -found.memory_bytes) > (
                best.fits, -best.account.cost_s if best.fits else -best.memory_bytes,
            ):  # fmt: skip
                best = found
            if found.fits or not solution.feasible:
                break
            reserve = max(reserve, found.account.workspace_bytes) + (0.01 * self.limit_bytes if attempt else 0.0)
        assert best is not None
        if not best.fits:
            # The least of what adds up may come with a huge workspace: also look where the whole limit is worth as much as the whole step.
            price = bound / self.limit_bytes
            other = self.found(built, solve_with(built.problem, {}, price), bound)
            best = other if other.fits or other.memory_bytes < best.memory_bytes else best
        return best

    def found(self, built: Built, solution: Solution, bound_s: float) -> Found:
        assignment = built.assignment(solution.choice)
        total = account(self.structure, built.costs, assignment)
        cost_s = built.problem.evaluate(solution.choice)[0]
        assert abs(total.cost_s - cost_s) <= 1e-9 * max(cost_s, 1e-12), (total.cost_s, cost_s)
        fits = sum(total.memory_bytes().values()) <= self.limit_bytes
        return Found(built, solution.choice, assignment, total, min(bound_s, total.cost_s), fits)


def plan_graph(
    graph: Graph,
    cluster: Cluster,
    *,
    mesh: Mapping[str, int] | tuple[int, ...] | None = None,
    baseline: str | None = None,
    pins: Mapping[str, str] | None = None,
    effort: Effort = "fast",
    optimizer: str = "adamw",
    memory_limit_bytes: int | None = None,
    time_limit_s: float | None = None,
    alternatives: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Plan:
    """Search the best plan for `graph` on `cluster`; the options are those of `autopar.plan`.

    Where nothing fits, the plan of least memory is returned with `predicted.fits` false, and its notes say what is missing and what would
    fit. Raises `PinError`, `InfeasibleError` (no way to run it at all under these pins), `PlanError` for options that do not go together.
    """
    with _collector_paused():
        return _plan(
            graph, cluster, mesh, baseline, pins, effort, optimizer, memory_limit_bytes, time_limit_s, alternatives, progress
        )  # fmt: skip


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Planning makes many small objects and no cycles; the collector would walk the whole graph of a deep model again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _plan(
    graph: Graph, cluster: Cluster, mesh: Mapping[str, int] | tuple[int, ...] | None, baseline: str | None, pins: Mapping[str, str] | None,
    effort: Effort, optimizer: str, memory_limit_bytes: int | None, time_limit_s: float | None, alternatives: bool,
    progress: Callable[[Progress], None] | None,
) -> Plan:  # fmt: skip
    if effort not in ("fast", "exact"):
        raise PlanError(f"effort `{effort}` is not known; it is `fast` or `exact`")
    if memory_limit_bytes is not None and (not isinstance(memory_limit_bytes, int) or memory_limit_bytes < 1):
        raise PlanError(f"memory_limit_bytes is {memory_limit_bytes!r}; it must be a whole number of at least 1")
    read = read_pins(pins, graph)
    structure = Structure(graph)
    deadline_s = None if time_limit_s is None else perf_counter() + time_limit_s
    limit = memory_limit_bytes or cluster.device.memory_bytes
    search = Search(structure, cluster, limit, optimizer, effort, deadline_s, progress)
    restriction, meshes = FREE, candidates(cluster, mesh, named=bool(pins))
    if baseline is not None:
        own, restriction = baseline_of(baseline, graph, cluster.world_size)
        if mesh is not None and meshes != (own,):
            raise PlanError(f"baseline `{baseline}` lies on mesh {own[0]} x {own[1]}; leave `mesh` out")
        meshes = (own,)
    pinned = apply_pins(read, graph, restriction)
    try:
        best, bound_s = _best(search, meshes, pinned, read)
    except InfeasibleError:
        if pinned.gather:
            raise
        # A weight that two operations can only use in different splits must move for one of them.
        try:
            best, bound_s = _best(search, meshes, replace(pinned, gather=True), read)
        except InfeasibleError as error:
            sizes = ", ".join(f"{dp} x {tp}" for dp, tp in meshes)
            what = f"pins {dict(read.given)}" if read.given else f"baseline `{baseline}`" if baseline else "its rules"
            raise InfeasibleError(f"`{graph.name}` cannot run on mesh {sizes} under {what}: {error}") from error
    if mesh is None and baseline is None and not read.given:
        best = _named_for_what_it_does(search, best)
    return _describe(search, best, bound_s, baseline, read, alternatives)


def _best(search: Search, meshes: tuple[Mesh, ...], restriction: Restriction, pins: Pins) -> tuple[Found, float]:
    """The best choice on any mesh and the least bound of all meshes. Meshes whose relaxed bound cannot win are not solved."""
    usable = [mesh for mesh in meshes if pins.fits(mesh)] or list(meshes)
    built: list[tuple[float, Built]] = []
    for mesh in usable:
        one = build(search.structure, search.costs(mesh), restriction)
        try:
            check_options(one, pins)
        except PinError:
            if not pins.given or (mesh == usable[-1] and not built):
                raise
            continue
        built.append((relaxed_bound_s(one), one))
    built.sort(key=lambda pair: pair[0])
    best: Found | None = None
    bound_s = float("inf")
    for relaxed_s, one in built:
        if best is not None and best.fits and relaxed_s >= best.account.cost_s:
            bound_s = min(bound_s, relaxed_s)
            continue
        found = search.on(one)
        bound_s = min(bound_s, max(found.bound_s, relaxed_s) if found.fits else found.bound_s)
        if best is None or _rank(found) < _rank(best):
            best = found
    assert best is not None
    return best, min(bound_s, best.account.cost_s)


def _rank(found: Found) -> tuple[bool, float]:
    return not found.fits, found.account.cost_s if found.fits else float(found.memory_bytes)


def _named_for_what_it_does(search: Search, best: Found) -> Found:
    """A mesh of one axis is searched under the name `dp`; where its plan does not split the batch it is called `tp`.

    Only where both lie on the same links; choices are in the same order on both."""
    size, inner = best.built.costs.mesh
    if inner != 1 or size == 1 or (1, size) in candidates(search.cluster, None):
        return best
    batch = batch_splits(search.structure.graph)
    ops = search.structure.graph.ops
    carrying = sum(best.assignment.choices[op.name][0].name in names for op, names in zip(ops, batch, strict=True))
    sharding = sum(best.assignment.choices[op.name][0].work == "split" for op in ops)
    if 2 * carrying >= sharding:
        return best
    built = build(search.structure, search.costs((1, size)))
    assignment = built.assignment(best.choice)
    return replace(best, built=built, assignment=assignment, account=account(search.structure, built.costs, assignment))


def relaxed_bound_s(built: Built) -> float:
    """A bound without solving: every node takes its cheapest strategy and no edge costs anything."""
    least = [float(table.cost_s.min()) if table.cost_s.size and table.cost_s.ndim == 1 else 0.0 for table in built.problem.tables]
    return sum(least[table] for table in built.problem.nodes)


def _describe(search: Search, best: Found, bound_s: float, baseline: str | None, pins: Pins, alternatives: bool) -> Plan:
    total = best.account
    memory = total.memory_bytes()
    notes = () if best.fits else _shortfall(search, best)
    predicted = Predicted(
        cost_s=total.cost_s, lower_bound_s=min(bound_s, total.cost_s), compute_s=total.compute_s, communication_s=total.exposed_s,
        memory_bytes=memory, memory_limit_bytes=search.limit_bytes, fits=sum(memory.values()) <= search.limit_bytes,
        optimizer=search.optimizer, effort=search.effort,
    )  # fmt: skip
    plan = describe(
        search.structure, search.cluster, best.assignment, total, predicted, name=baseline or "searched", pins=pins.given, notes=notes
    )
    if alternatives:
        plan = price_alternatives(plan, best.built, search.limit_bytes - total.workspace_bytes)
    return plan


def _shortfall(search: Search, best: Found) -> tuple[str, ...]:
    """What is missing and what would help, as notes. Every number is that of a plan in hand: `best` under another optimizer or on more
    machines with its `dp` axis longer; a search on those may need less."""

    def on_cluster(cluster: Cluster) -> int | None:
        (dp, tp), times = best.built.costs.mesh, cluster.world_size // search.cluster.world_size
        graph, mesh = search.structure.graph, (dp * times, tp)
        assignment = replace(best.assignment, mesh=mesh)
        # One check for equal operations with equal choices; the assignment keeps choices alive, so an id means one.
        kinds = {(search.structure.class_of[at], id(assignment.choices[op.name])): op for at, op in enumerate(graph.ops)}
        if any(conflict(graph, op, assignment.choices[op.name], AXES, mesh) for op in kinds.values()):
            return None
        costs = Costs(cluster, mesh, AXES, search.optimizer, graph.training)
        return sum(account(search.structure, costs, assignment).memory_bytes().values())

    missing = best.memory_bytes - search.limit_bytes
    found = remedies(search.structure, search.cluster, search.limit_bytes, search.optimizer, best.account, on_cluster)
    return (
        f"does not fit: this plan needs the least memory of those found, and {missing / 2**30:.2f} GiB ({missing} bytes) per rank more "
        "than there is. What would fit:",
        *(f"{number}. {text}" for number, text in enumerate(found, 1)),
    )
