"""Plans without a pipeline: all ranks as one mesh, every mesh searched, the best one kept.

for every mesh: structure + prices -> problem -> solution;  the best one -> assignment -> account
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autopar.errors import InfeasibleError, PinError
from autopar.ir.assignment import conflict
from autopar.ir.cluster import Cluster
from autopar.ir.graph import Graph
from autopar.search.account import account
from autopar.search.accumulate import accumulating
from autopar.search.build import Built, Restriction, build
from autopar.search.describe import Part
from autopar.search.follow import batch_splits
from autopar.search.meshes import AXES, Mesh, candidates
from autopar.search.pins import Pins, apply_pins, check_options, pins_for
from autopar.search.prices.costs import Costs
from autopar.search.remedies import remedies
from autopar.search.stages.place import Found, Place, Settings, alone, peak
from autopar.search.structure import Structure
from autopar.search.ways import Way, best_first


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched: the graph of one microbatch as one stage on all ranks."""

    structure: Structure
    settings: Settings
    microbatches: int = 1
    accumulates: bool = False
    """Whether the batch may be computed in more microbatches, if that pays."""

    def costs(self, mesh: Mesh, cluster: Cluster | None = None) -> Costs:
        settings, graph = self.settings, self.structure.graph
        return Costs(
            cluster or settings.cluster, mesh, AXES, settings.optimizer, graph.training, microbatches=self.microbatches,
            precision=settings.precision,
        )  # fmt: skip


def search_of(settings: Settings, found: Found) -> Search:
    """What a choice was found in."""
    (part,) = found.parts
    return Search(part.structure, settings, part.costs.microbatches)


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
    settings, graph = search.settings, search.structure.graph
    usable = [mesh for mesh in meshes if pins.fits(mesh)] or list(meshes)
    places: list[Place] = []
    for mesh in usable:
        try:
            places.append(alone(_built(search, mesh, restriction, pins)))
        except PinError:
            if not pins.given or (mesh == usable[-1] and not places):
                raise

    parts: dict[int, Search] = {}

    def make(count: int, body: Graph, place: Place) -> Place:
        dp, tp = place.builts[0].costs.mesh
        if count not in parts:
            parts[count] = Search(Structure(body), settings, count)
        return alone(_built(parts[count], (dp, tp), restriction, pins_for(pins, graph, body)))

    def more(beat_s: float, price: float) -> list[Way]:
        return accumulating(graph, settings, places, make, beat_s, price)

    ways = [Way(place.builts[0].relaxed_bound_s(), lambda place=place: place) for place in places]  # type: ignore[misc]
    first = best_first(settings, ways, more if search.accumulates else None)
    best, bound_s = first.found, first.bound_s
    if best is None or not best.fits:
        least = first.least or places[0]
        others = [settings.solve_as_is(one) for one in (least, least.recomputing(least.may()))]
        best = min([*others, *([best] if best is not None else [])], key=settings.rank)
        bound_s = min(bound_s, best.bound_s)
    return best, min(bound_s, best.cost_s)


def _built(search: Search, mesh: Mesh, restriction: Restriction, pins: Pins) -> Built:
    """The problem on a mesh, with the pins on top of the restriction. Raises `PinError` where they leave nothing to choose."""
    built = build(search.structure, search.costs(mesh), apply_pins(pins, search.structure.graph, restriction))
    check_options(built, pins)
    return built


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
