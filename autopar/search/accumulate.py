"""More microbatches without a pipeline: less memory for activations, at the price of starting every kernel more often.

Every number of microbatches on every mesh is a way of its own (`autopar.search.ways`). What is known of the whole batch gives each a
bound before its graph is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

from autopar.errors import InfeasibleError, PlanError
from autopar.ir.graph import Graph
from autopar.ir.pipelining.microbatch import microbatched
from autopar.search.account import resident_bytes
from autopar.search.follow import batch_size
from autopar.search.prices.segments import weight_side
from autopar.search.solver.minimise import Price
from autopar.search.stages.place import Place, Settings
from autopar.search.ways import Way

__all__ = ["accumulating"]

_FAR = 1.05  # times the best bound: larger ones are not told apart


def accumulating(
    graph: Graph, settings: Settings, places: Sequence[Place], make: Callable[[int, Graph, Place], Place], beat_s: float, price: float
) -> list[Way]:
    """Ways to compute `graph`, whose problems on some meshes are `places`, in more microbatches than one.

    `make` gives the problem of a number of microbatches, with the graph of one, on the mesh of a place. `beat_s`: what a way with one
    microbatch may take; `price`: of memory, as far as it is known, in seconds per byte."""
    try:
        batch = batch_size(graph)
    except PlanError:
        return []

    @cache
    def body(count: int) -> Graph:
        try:
            return microbatched(graph, count).body
        except PlanError as error:
            raise InfeasibleError(str(error)) from error

    known: list[_Known] = []
    for place in places:
        with suppress(InfeasibleError):  # nothing can run on that mesh, whatever the number
            known.append(_Known(settings, place, price))
    ways: list[Way] = []
    least_s = beat_s
    for count in [count for count in range(2, batch + 1) if batch % count == 0]:
        bounds = [one.bound_s(count, _FAR * least_s) for one in known]
        for place, bound_s in zip([one.place for one in known], bounds, strict=True):
            even = batch // count % place.builts[0].costs.mesh[0] == 0
            ways.append(Way(bound_s, lambda place=place, count=count: make(count, body(count), place), cheap=place.cheap, even=even))  # type: ignore[misc]
        least_s = min([least_s, *bounds])
    return ways


class _Known:
    """What is known of a mesh from `place`, its problem of the whole batch at once.

    Whatever is chosen, computing in parts takes as long and starts so many times as many kernels, and no collective is faster for being
    cut; of activations one part is there, of gradients all. So a bound is that of the problem for the whole batch, with memory that
    weights the loss by `1 / microbatches` and the end of the backward pass by the rest, and all further starts. Where that is dear, memory
    is left to the problem of the microbatch."""

    def __init__(self, settings: Settings, place: Place, price: float) -> None:
        self.place = place
        (built,) = place.builts
        structure, made = built.structure, weight_side(built.structure.graph)
        # What is made of parameters alone, or without a gradient, may be made once.
        each = [at for at, op in enumerate(structure.graph.ops) if any(name not in made for name in op.operands)]
        self.starts_s = built.costs.starts_s([work for work in map(structure.work_of, each) if work.trains])
        self.price = price
        self.room = settings.limit_bytes - resident_bytes(structure)
        minimiser = (settings.look(place, price) if place.cheap else place.ready).minimiser
        self.minimiser = minimiser if place.cheap and price and minimiser.steps == 2 else None
        known = minimiser.fits and not minimiser.dear
        self.free_s = minimiser.minimise(Price(0.0)).bound if known else built.relaxed_bound_s()

    def bound_s(self, microbatches: int, enough_s: float) -> float:
        """What no plan takes less than with so many microbatches; not looked for above `enough_s`."""
        starts_s = (microbatches - 1) * self.starts_s
        if self.minimiser is None or self.free_s + starts_s >= enough_s:
            return self.free_s + starts_s
        weighted = self.minimiser.weighted((1.0 / microbatches, 1.0 - 1.0 / microbatches))
        return max(self.free_s, weighted.minimise(Price(self.price)).bound - self.price * self.room) + starts_s
