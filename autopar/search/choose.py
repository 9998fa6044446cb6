"""The best plan with a pipeline or without one: proposals are solved exactly, simulated, and the fastest that fits is kept.

Without a pipeline the search is exact; what pipelines cost is estimated first (`autopar.search.stages.propose`) and only the most promising
are solved. The table of candidates says what the best plan of every number of groups takes, or why there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from autopar.errors import InfeasibleError, PinError, PlanError
from autopar.ir.graph import Graph
from autopar.ir.plan import Candidate, Plan
from autopar.ir.units import seconds
from autopar.search.meshes import AXES
from autopar.search.pins import Pins
from autopar.search.stages.pipeline import Pipelined, has_loss, pipeline_text, shape
from autopar.search.stages.place import Settings
from autopar.search.stages.propose import Proposal, Proposals

_SOLVED = 3  # proposals that are solved stage by stage, at most
_WORTH = 0.98  # a pipeline must promise at least so much, in times of the plan without one, to be looked at
_WORTH_IN_ONE_MACHINE = 0.9


def with_pipelines(
    graph: Graph, settings: Settings, pins: Pins, flat: Plan, schedule: str | None = None,
    microbatches: int | None = None,
) -> Plan:  # fmt: skip
    """`flat`, the best plan without a pipeline, or a faster one with stages; where `flat` does not fit, the fastest that does, or that of
    least memory. `schedule`, `microbatches`: search only pipelines that run so.

    The bound is that of plans of its kind: without a pipeline on all meshes and numbers of microbatches; with one, of all plans."""
    world = settings.cluster.world_size
    if world == 1 or not (graph.training and has_loss(graph)):
        return flat
    try:
        proposals = Proposals(graph, settings, pins, schedule, microbatches)
    except PlanError:
        return flat
    plans = [flat] if schedule is None else []
    table = {1: _candidate(flat)} if plans else {}
    if plans and flat.predicted.fits and not _promising(proposals, flat):
        rows = [_no_better(proposals, groups) for groups in proposals.groups()]
        return _bounded(flat, [flat.predicted.lower_bound_s], (table[1], *rows), flat)
    beat_s = _beat_s(proposals, flat) if plans else math.inf
    found: list[Proposal] = []
    for proposal in proposals.all(beat_s):
        if proposal.pipeline is None:
            table.setdefault(proposal.groups, Candidate(groups=proposal.groups, what=f"{proposal.groups} groups", why=proposal.why))
        else:
            found.append(proposal)
    solved = 0
    for proposal in sorted(found, key=lambda item: (item.step_s, item.groups)):
        groups, pipeline = proposal.groups, proposal.pipeline
        assert pipeline is not None and proposal.simulated is not None
        in_time = settings.deadline_s is None or settings.seconds_left() > 0.2  # type: ignore[operator]
        best = min(plans, key=_rank, default=None)
        hopeful = best is None or not best.predicted.fits or proposal.step_s < best.predicted.step_s
        if solved < _SOLVED and in_time and hopeful:
            solved += 1
            try:
                plan = Pipelined(graph, settings, pins, pipeline).plan()
            except (InfeasibleError, PinError) as error:
                table[groups] = Candidate(groups=groups, what=str(pipeline), why=str(error))
                continue
            plans.append(plan)
            table[groups] = _better(table.get(groups), _candidate(plan))
        else:
            said = proposal.simulated
            table[groups] = Candidate(
                groups=groups, what=str(pipeline), cost_s=said.step_s, bubble=said.bubble, communication_s=said.communication_s,
                memory_bytes=round(max(said.memory_bytes)), why="estimated; not solved, since others promise more",
            )  # fmt: skip
    if not plans:
        raise InfeasibleError(f"`{graph.name}`: no pipeline under `{schedule}` fits on `{settings.cluster.name}`; use another schedule")
    best = min(plans, key=_rank)
    bounds = [flat.predicted.lower_bound_s] if schedule is None else []
    if len(best.groups) > 1:
        bounds += [proposals.least_s, *[plan.predicted.lower_bound_s for plan in plans if len(plan.groups) > 1]]
    return _bounded(best, bounds, tuple(table[groups] for groups in sorted(table)), flat)


def _bounded(best: Plan, bounds: Sequence[float], candidates: tuple[Candidate, ...], flat: Plan) -> Plan:
    predicted = best.predicted.model_copy(update={"lower_bound_s": min([*bounds, best.predicted.cost_s])})
    notes = () if best.predicted.fits else best.notes or flat.notes
    return best.model_copy(update={"candidates": candidates, "predicted": predicted, "notes": notes})


def _no_better(proposals: Proposals, groups: int) -> Candidate:
    bound_s = proposals.bound_s(groups)
    if math.isinf(bound_s):
        return Candidate(groups=groups, what=f"{groups} groups", why="the batch cannot be divided into microbatches")
    return Candidate(groups=groups, what=f"{groups} groups", why=f"not searched: cannot take less than {seconds(bound_s)}")


def _beat_s(proposals: Proposals, flat: Plan) -> float:
    """What a pipeline must take less than to be worth a search; anything will do where `flat` does not fit."""
    worth = _WORTH if proposals.settings.cluster.nodes > 1 else _WORTH_IN_ONE_MACHINE
    return worth * flat.predicted.step_s if flat.predicted.fits else math.inf


def _promising(proposals: Proposals, best: Plan) -> bool:
    """Whether a pipeline may be so much faster than `best` that it is worth a search: by the bound, and by what is guessed of all ways, at
    their best."""

    def hope_s(groups: int) -> float:
        return min((guess.hope_s for guess in proposals.guesses.best(groups)), default=math.inf)

    beat_s = _beat_s(proposals, best)
    return proposals.least_s < beat_s and any(hope_s(groups) < beat_s for groups in proposals.groups())


def _rank(plan: Plan) -> tuple[bool, float, int]:
    """Faster is better; of plans as fast, and within rounding, that with fewer groups."""
    size = sum(plan.predicted.memory_bytes.values())
    return not plan.predicted.fits, plan.predicted.step_s if plan.predicted.fits else float(size), len(plan.groups)


def _better(one: Candidate | None, other: Candidate) -> Candidate:
    if one is None or one.cost_s is None or one.why:
        return other
    return other if other.cost_s is not None and not other.why and other.cost_s < one.cost_s else one


def _candidate(plan: Plan) -> Candidate:
    predicted = plan.predicted
    size = sum(predicted.memory_bytes.values())
    over = size - predicted.memory_limit_bytes
    return Candidate(
        groups=len(plan.groups), what=describe_shape(plan), cost_s=predicted.step_s, bubble=predicted.bubble,
        communication_s=predicted.communication_s, memory_bytes=size,
        why="" if predicted.fits else f"does not fit: {over / 2**30:.2f} GiB more than there is",
    )  # fmt: skip


def describe_shape(plan: Plan) -> str:
    """`4 x (dp 2, tp 8), 1f1b, 32 microbatches`."""
    meshes = [(group.mesh[AXES[0]], group.mesh[AXES[1]]) for group in plan.groups]
    if plan.pipeline is None:
        return shape(plan.groups[0].mesh) + (f", {plan.microbatches} microbatches" if plan.microbatches > 1 else "")
    return pipeline_text(meshes, plan.pipeline.schedule, len(plan.pipeline.stages), plan.microbatches)
