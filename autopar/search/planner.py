"""`plan_graph`: from a graph and a cluster to a `Plan`.

What is claimed is what `account` adds up from the expanded decisions, not what the solver says; the two must agree.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter

from autopar.errors import PlanError
from autopar.ir.cluster import Cluster, resolve
from autopar.ir.experts import with_capacity
from autopar.ir.graph import Graph
from autopar.ir.pipelining.microbatch import microbatched
from autopar.ir.plan import Plan
from autopar.ir.precision import Precision
from autopar.search.alternatives import price_alternatives
from autopar.search.baselines import baseline as baseline_of
from autopar.search.build import FREE
from autopar.search.choose import with_pipelines
from autopar.search.flat import Search, best_of, named_for_what_it_does, search_of, shortfall
from autopar.search.meshes import Mesh, candidates, read_mesh
from autopar.search.pins import Pins, pins_for, read_pins
from autopar.search.simulator.predict import predicted_plan
from autopar.search.solver.solve import Progress
from autopar.search.stages.pipeline import has_loss, plan_stages
from autopar.search.stages.place import Effort, Found, Recompute, Settings
from autopar.search.structure import Structure

MeshOption = Mapping[str, int] | Sequence[int] | Sequence[Mapping[str, int]]


def plan_graph(
    graph: Graph,
    cluster: Cluster,
    *,
    mesh: MeshOption | None = None,
    schedule: str | None = None,
    microbatches: int | None = None,
    cuts: Sequence[int] | None = None,
    stages: int | None = None,
    recompute: Recompute = "auto",
    baseline: str | None = None,
    pins: Mapping[str, str] | None = None,
    effort: Effort = "fast",
    optimizer: str = "adamw",
    expert_imbalance: float | None = None,
    expert_capacity: float | None = None,
    memory_limit_bytes: int | None = None,
    time_limit_s: float | None = None,
    alternatives: bool = False,
    precision: Precision | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Plan:
    """Search the best plan for `graph` on `cluster`; the options are those of `autopar.plan`. `precision`: as which `graph` was traced.

    Where nothing fits, the plan of least memory is returned with `predicted.fits` false, and its notes say what is missing and what would
    fit. Raises `PinError`, `InfeasibleError` (no way to run it at all under these pins), `PlanError` for options that do not go together.
    """
    if effort not in ("fast", "exact"):
        raise PlanError(f"effort `{effort}` is not known; it is `fast` or `exact`")
    if recompute not in ("auto", "none", "all"):
        raise PlanError(f"recompute `{recompute}` is not known; it is `auto`, `none` or `all`")
    for name, value in (("memory_limit_bytes", memory_limit_bytes), ("microbatches", microbatches), ("stages", stages)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise PlanError(f"{name} is {value!r}; it must be a whole number of at least 1")
    if expert_imbalance is not None:
        cluster = resolve(replace(cluster, expert_imbalance=expert_imbalance))
    if expert_capacity is not None:
        if not isinstance(expert_capacity, int | float) or isinstance(expert_capacity, bool) or not 0 < expert_capacity < math.inf:
            raise PlanError(f"expert_capacity is {expert_capacity!r}; it must be a finite number above 0, such as 1.25")
        graph = with_capacity(graph, expert_capacity)
    wanted = read_mesh(mesh, cluster)
    deadline_s = None if time_limit_s is None else perf_counter() + time_limit_s
    settings = Settings(
        cluster, memory_limit_bytes or cluster.device.memory_bytes, optimizer, effort, deadline_s, progress, recompute, precision
    )
    with _collector_paused():
        read = read_pins(pins, graph)
        forced = wanted.groups is not None or cuts is not None or stages is not None
        if (forced or schedule is not None) and (baseline is not None or alternatives):
            raise PlanError(
                "baselines and alternatives are of plans without a pipeline; leave out `baseline` and `alternatives`, or stages"
            )
        if forced:
            if wanted.groups is None:
                raise PlanError("`cuts` and `stages` are of a pipeline: say how many groups of ranks it has, as in mesh={'pp': 2, 'dp': 2}")
            return plan_stages(
                graph,
                settings,
                pins=read,
                groups=wanted.groups or (),
                schedule=schedule,
                microbatches=microbatches,
                cuts=cuts,
                stages=stages,
            )
        if schedule is not None and wanted.flat is not None:
            raise PlanError(f"schedule `{schedule}` is of a pipeline, and mesh {mesh} has none; give it `pp`, or leave out one of the two")
        accumulates = (
            cluster.world_size > 1
            and wanted.flat is None
            and microbatches is None
            and schedule is None
            and graph.training
            and has_loss(graph)
        )
        flat = _plan_flat(graph, settings, read, wanted.flat, microbatches or 1, baseline, alternatives, accumulates)
        if wanted.flat is not None or baseline is not None or alternatives:
            return flat
        return with_pipelines(graph, settings, read, flat, schedule, microbatches)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Planning makes many small objects and no cycles; the collector would walk the whole graph of a deep model again and again."""
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()  # so that `gc.collect` between parts of a long search looks only at what the search made
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _plan_flat(
    graph: Graph, settings: Settings, pins: Pins, forced: Mesh | None, microbatches: int, baseline: str | None, alternatives: bool,
    accumulates: bool,
) -> Plan:  # fmt: skip
    """Without a pipeline."""
    body = microbatched(graph, microbatches).body
    pins = pins_for(pins, graph, body)
    search = Search(Structure(body), settings, microbatches, accumulates and baseline is None and not alternatives)
    restriction, meshes = FREE, candidates(settings.cluster, forced, named=bool(pins.given))
    if baseline is not None:
        own, restriction = baseline_of(baseline, body, settings.cluster.world_size)
        if forced is not None and meshes != (own,):
            raise PlanError(f"baseline `{baseline}` lies on mesh {own[0]} x {own[1]}; leave `mesh` out")
        meshes = (own,)
    what = f"pins {dict(pins.given)}" if pins.given else f"baseline `{baseline}`" if baseline else "its rules"
    best, bound_s = best_of(search, meshes, restriction, pins, what)
    search = search_of(settings, best)
    if forced is None and baseline is None and not pins.given:
        best = named_for_what_it_does(search, best)
    return _describe(graph, search, best, bound_s, baseline, pins, alternatives)


def _describe(graph: Graph, search: Search, best: Found, bound_s: float, baseline: str | None, pins: Pins, alternatives: bool) -> Plan:
    (part,), settings = best.parts, search.settings
    mesh = dict(zip(part.assignment.axes, part.assignment.mesh, strict=True))
    notes = () if best.fits else shortfall(search, best)
    plan = predicted_plan(
        graph, settings, (best,), best.parts, bound_s, name=baseline or "searched", mesh=mesh, microbatches=search.microbatches,
        pins=pins.given, notes=notes,
    )  # fmt: skip
    if alternatives:
        above = part.account.workspace_bytes + part.account.resident_bytes
        plan = price_alternatives(plan, best.place.builts[0], settings.limit_bytes - above)
    return plan
