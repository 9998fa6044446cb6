"""Plans without a pipeline: all ranks as one mesh, every mesh searched, the best one kept.

for every mesh: structure + prices -> problem -> solution;  the best one -> assignment -> account
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autopar.errors import InfeasibleError, PinError
from autopar.ir.assignment import conflict
from autopar.ir.cluster import Cluster
from autopar.search.account import account, resident_bytes
from autopar.search.build import Built, Restriction, build
from autopar.search.describe import Part
from autopar.search.follow import batch_splits
from autopar.search.meshes import AXES, Mesh, candidates
from autopar.search.pins import Pins, check_options
from autopar.search.prices.costs import Costs
from autopar.search.recompute import Relaxed, accumulated_bound_s, recomputed
from autopar.search.remedies import remedies
from autopar.search.solver.minimise import Price
from autopar.search.stages.place import Found, Place, Settings, alone, peak
from autopar.search.structure import Structure

_WORTH = 0.01  # of a step: of further meshes, those that promise no more are not searched for how much to recompute


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched: the graph of one microbatch as one stage on all ranks."""

    structure: Structure
    settings: Settings
    microbatches: int = 1
    looked_at: list[tuple[Place, float]] = field(default_factory=list, compare=False)
    """Every mesh that was looked at, and the price of memory there, as far as it is known."""

    def costs(self, mesh: Mesh, cluster: Cluster | None = None) -> Costs:
        settings, graph = self.settings, self.structure.graph
        return Costs(
            cluster or settings.cluster, mesh, AXES, settings.optimizer, graph.training, microbatches=self.microbatches,
            precision=settings.precision,
        )  # fmt: skip


def accumulated_s(settings: Settings, looked_at: Sequence[tuple[Place, float]], microbatches: int, enough_s: float) -> tuple[float, Mesh]:
    """What no plan with so many microbatches takes less than, and on which mesh of those that were `looked_at`; not looked for above
    `enough_s`."""
    found_s, found = math.inf, looked_at[0][0].builts[0].costs.mesh
    for place, price in looked_at:
        (built,) = place.builts
        room = settings.limit_bytes - resident_bytes(built.structure)
        bound_s = accumulated_bound_s(place, microbatches, room, price, min(enough_s, found_s))
        if bound_s < found_s:
            found_s, found = bound_s, built.costs.mesh
    return found_s, (found[0], found[1])


def best_of(search: Search, meshes: tuple[Mesh, ...], restriction: Restriction, pins: Pins, what: str) -> tuple[Found, float]:
    """The best choice on any of `meshes` under `restriction` (called `what`), and what none within the limit can beat.

    Raises `InfeasibleError` where it cannot run at all."""
    try:
        return _best(search, meshes, restriction, pins)
    except InfeasibleError:
        if restriction.gather:
            raise
    # A weight that two operations can only use in different splits must move for one of them.
    try:
        return _best(search, meshes, replace(restriction, gather=True), pins)
    except InfeasibleError as error:
        sizes = ", ".join(f"{dp} x {tp}" for dp, tp in meshes)
        raise InfeasibleError(f"`{search.structure.graph.name}` cannot run on mesh {sizes} under {what}: {error}") from error


def _best(search: Search, meshes: tuple[Mesh, ...], restriction: Restriction, pins: Pins) -> tuple[Found, float]:
    """Meshes whose relaxed bound cannot win are not solved."""
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
    settings = search.settings
    best: Found | None = None
    bound_s = float("inf")
    price = 0.0  # of memory: what it was on one mesh is a good guess for the next
    waiting: list[tuple[Found | None, Relaxed, Place]] = []  # where recomputing may help
    places = [alone(one) for _, one in built]
    for (relaxed_s, _), place in zip(built, places, strict=True):
        found: Found | None
        if best is not None and best.fits and relaxed_s >= best.cost_s:
            bound_s = min(bound_s, relaxed_s)
            continue
        if settings.recompute != "auto" or not any(any(row) for row in place.may()):
            solved = settings.solve(place)
            found, bound_s = solved, min(bound_s, solved.bound_s)
        else:
            beat_s = best.cost_s if best is not None and best.fits else math.inf
            # What is no better than another mesh may be does not change the bound of all.
            found, target = settings.kept(place, price, min(beat_s, bound_s) if settings.effort == "fast" else beat_s)
            if target is not None:
                bound_s = min(bound_s, target.bound_s)
                price = price or target.price_s_per_byte
                if target.counts and (target.bound_s < beat_s or best is None):
                    waiting.append((found, target, place))
            elif found is not None:
                bound_s = min(bound_s, found.bound_s)
        if found is None:
            continue
        price = price or found.price_s_per_byte
        if best is None or settings.rank(found) < settings.rank(best):
            best = found
    waiting.sort(key=lambda one: (one[1].guessed, one[1].bound_s))
    for at, (kept, target, place) in enumerate(waiting):
        hope_s = target.bound_s * (1 + _WORTH if settings.effort == "fast" and at else 1)
        if target.guessed and at and settings.effort == "fast":
            # As much dearer than with any memory as the mesh before.
            free_s = waiting[0][2].ready.minimiser.minimise(Price(0.0)).bound
            hope_s = hope_s / free_s * max(free_s, waiting[0][1].bound_s)
        if target.bound_s == math.inf or (best is not None and best.fits and hope_s >= best.cost_s):
            continue
        found = recomputed(settings, place, target, kept)
        best = found if best is None or settings.rank(found) < settings.rank(best) else best
    if best is None or not best.fits:
        tried = [place for _, _, place in waiting[:1]]
        least = [settings.solve_as_is(one) for place in tried for one in (place, place.recomputing(place.may()))]
        best = min([*least, *([best] if best is not None else [])], key=settings.rank)
        bound_s = min(bound_s, best.bound_s)
    search.looked_at.extend((place, price) for place in places)
    return best, min(bound_s, best.cost_s)


def relaxed_bound_s(built: Built) -> float:
    """A bound without solving: every node takes its cheapest strategy and no edge costs anything."""
    least = [float(table.cost_s.min()) if table.cost_s.size and table.cost_s.ndim == 1 else 0.0 for table in built.problem.tables]
    return sum(least[table] for table in built.problem.nodes)


def named_for_what_it_does(search: Search, best: Found) -> Found:
    """A mesh of one axis is searched under the name `dp`; where its plan does not split the batch it is called `tp`.

    Only where both lie on the same links; choices are in the same order on both."""
    (built,), (part,) = best.place.builts, best.parts
    assignment = part.assignment
    size, inner = built.costs.mesh
    if inner != 1 or size == 1 or (1, size) in candidates(search.settings.cluster, None):
        return best
    batch = batch_splits(search.structure.graph)
    ops = search.structure.graph.ops
    carrying = sum(assignment.choices[op.name][0].name in names for op, names in zip(ops, batch, strict=True))
    sharding = sum(assignment.choices[op.name][0].work == "split" for op in ops)
    if 2 * carrying >= sharding:
        return best
    built = build(search.structure, search.costs((1, size)))
    built = built.recomputing(part.recompute) if part.recompute else built
    assignment = built.assignment(best.choices[0])
    one = account(search.structure, built.costs, assignment, part.recompute)
    return replace(best, place=alone(built), parts=(Part(search.structure, built.costs, assignment, one, part.recompute),))


def shortfall(search: Search, best: Found) -> tuple[str, ...]:
    """What is missing and what would help, as notes. Every number is that of a plan in hand: `best` under another optimizer or on more
    machines with its `dp` axis longer; a search on those may need less."""
    settings = search.settings

    def on_cluster(cluster: Cluster) -> int | None:
        (dp, tp), times = best.place.builts[0].costs.mesh, cluster.world_size // settings.cluster.world_size
        graph, mesh = search.structure.graph, (dp * times, tp)
        assignment = replace(best.parts[0].assignment, mesh=mesh)
        # One check for equal operations with equal choices; the assignment keeps choices alive, so an id means one.
        kinds = {(search.structure.class_of[at], id(assignment.choices[op.name])): op for at, op in enumerate(graph.ops)}
        if any(conflict(graph, op, assignment.choices[op.name], AXES, mesh) for op in kinds.values()):
            return None
        costs = search.costs(mesh, cluster)
        recompute = best.parts[0].recompute
        part = Part(search.structure, costs, assignment, account(search.structure, costs, assignment, recompute), recompute)
        return sum(peak((part,), best.place.numbers, best.place.order).values())

    missing = best.memory_bytes - settings.limit_bytes
    found = remedies(search.structure, settings.cluster, settings.limit_bytes, settings.optimizer, best.memory, on_cluster)
    return (
        f"does not fit: this plan needs the least memory of those found, and {missing / 2**30:.2f} GiB ({missing} bytes) per rank more "
        "than there is. What would fit:",
        *(f"{number}. {text}" for number, text in enumerate(found, 1)),
    )
