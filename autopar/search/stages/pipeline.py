"""Plans with a pipeline: stages on groups of ranks, each solved exactly on its own mesh, put together as one `Plan`.

    Graph -> microbatched -> cut -> for every group of ranks: the problems of its stages, side by side -> solution;  all -> Plan

`pipelined` solves one `Pipeline`: where to cut, on which groups, under which schedule, with how many microbatches. What is decided is
the decisions of every stage; what a step takes is for the simulator to say.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from autopar.errors import PlanError
from autopar.ir.graph import Graph
from autopar.ir.pipelining.microbatch import microbatched
from autopar.ir.pipelining.schedule_check import live_by_stage
from autopar.ir.pipelining.schedules import Orders, named
from autopar.ir.pipelining.stages import Stage, candidates, cut, is_loss
from autopar.ir.pipelining.stages import places as wherever
from autopar.ir.plan import GroupPlan, PipelinePlan, Plan, StagePlan
from autopar.ir.rules import splits
from autopar.search.build import FREE, Built, build
from autopar.search.describe import Part
from autopar.search.meshes import AXES, Mesh
from autopar.search.pins import Pins, apply_pins, check_options, pins_for
from autopar.search.prices.collectives import between
from autopar.search.prices.costs import Costs
from autopar.search.simulator.predict import predicted_plan
from autopar.search.solver.problem import Floats, Solution
from autopar.search.stages.alike import form
from autopar.search.stages.place import Found, Place, Settings
from autopar.search.structure import Structure

DEFAULT_SCHEDULE = "1f1b"
_STAGES_PER_GROUP = 2  # of schedules that take any number
_MOST_RUNS = 4  # of equal meshes, that are named
_NORM = 8  # of the loads of stages: nearly their maximum, and among equal maxima the evenest


@dataclass(frozen=True)
class Pipeline:
    """`starts`: positions in the body where stages begin, 0 first. `meshes`: of the groups, in rank order."""

    schedule: str
    microbatches: int
    starts: tuple[int, ...]
    meshes: tuple[Mesh, ...]

    @cached_property
    def first_ranks(self) -> tuple[int, ...]:
        return tuple(sum(dp * tp for dp, tp in self.meshes[:group]) for group in range(len(self.meshes)))

    def __str__(self) -> str:
        return pipeline_text(self.meshes, self.schedule, len(self.starts), self.microbatches)

    def group_of(self, stage: int) -> int:
        return named(self.schedule).group_of(stage, len(self.meshes))

    @cached_property
    def orders(self) -> Orders:
        groups = len(self.meshes)
        return named(self.schedule).orders(groups, len(self.starts) // groups, self.microbatches)

    @cached_property
    def live(self) -> tuple[int, ...]:
        """By stage, of how many microbatches it keeps activations at most."""
        return live_by_stage(self.orders)


def shape(mesh: Mapping[str, int]) -> str:
    """`dp 16, tp 2`."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "1 rank"


def pipeline_text(meshes: Sequence[Mesh], schedule: str, stages: int, microbatches: int) -> str:
    """`30 x (dp 16, tp 2) + 2 x (dp 32), 1f1b, 256 microbatches`."""
    runs = [(mesh, len(list(same))) for mesh, same in groupby(meshes)]
    text = " + ".join(f"{count} x ({shape(dict(zip(AXES, mesh, strict=True)))})" for mesh, count in runs[:_MOST_RUNS])
    if (left := sum(count for _, count in runs[_MOST_RUNS:])) > 0:
        text += f" + {left} more"
    text += f", {schedule}" + (f" with {stages // len(meshes)} stages a group" if stages > len(meshes) else "")
    return text + (f", {microbatches} microbatches" if microbatches > 1 else "")


def plan_stages(
    graph: Graph, settings: Settings, *, pins: Pins, groups: tuple[Mesh, ...], schedule: str | None, microbatches: int | None,
    cuts: Sequence[int] | None, stages: int | None,
) -> Plan:  # fmt: skip
    """The plan of a pipeline that is forced: its `groups`, and what else is given. What is not: `1f1b` (or the schedule that takes so many
    stages), as many microbatches as the batch divides into up to 4 a group, and cuts that balance the stages.

    Raises `PlanError` where these do not go together, where the model returns no loss or where it cannot be cut so often."""
    if not (graph.training and has_loss(graph)):
        raise PlanError(
            f"`{graph.name}` has no loss for a pipeline's backward pass to start from: let its forward return one, in training mode "
            "(models of transformers do when they get `labels`), or plan without stages"
        )
    count = stages if stages is not None else len(cuts) + 1 if cuts is not None else None
    if schedule is None:
        schedule = DEFAULT_SCHEDULE if count is None or count == len(groups) else "interleaved-1f1b"
    per_group = named(schedule).stages_per_group or (count // len(groups) if count else _STAGES_PER_GROUP)
    count = len(groups) * per_group if count is None else count
    if count % len(groups) or count < len(groups):
        raise PlanError(f"{count} stages cannot be shared evenly by {len(groups)} groups of ranks; give a multiple of {len(groups)}")
    if microbatches is None:
        microbatches = _default_microbatches(graph, len(groups))
    named(schedule).orders(len(groups), count // len(groups), microbatches)  # which refuses what it cannot have
    body = microbatched(graph, microbatches).body
    where = _starts(body, cuts) if cuts is not None else balanced(body, settings, groups, schedule, count)
    if len(where) != count:
        raise PlanError(f"cuts {list(cuts or ())} make {len(where)} stages, and {count} are wanted")
    return Pipelined(graph, settings, pins, Pipeline(schedule, microbatches, where, groups)).plan()


def has_loss(graph: Graph) -> bool:
    return any(is_loss(graph.values[item.value]) for item in graph.outputs)


def _default_microbatches(graph: Graph, groups: int) -> int:
    """The largest number up to 4 a group that this graph can be divided into; bubbles are a fourth then."""
    for count in range(4 * groups, 1, -1):
        try:
            microbatched(graph, count)
        except PlanError:
            continue
        return count
    return 1


def _starts(body: Graph, cuts: Sequence[int]) -> tuple[int, ...]:
    """`cuts` with or without the 0 in front."""
    if not all(isinstance(position, int) and not isinstance(position, bool) for position in cuts):
        raise PlanError(f"cuts {list(cuts)}: give positions of operations in the graph of one microbatch, such as (120, 240)")
    return tuple(cuts) if cuts and cuts[0] == 0 else (0, *cuts)


def balanced(body: Graph, settings: Settings, meshes: Sequence[Mesh], schedule: str, count: int) -> tuple[int, ...]:
    """Starts of `count` stages at cut candidates of `body`, so that computing is as even over the ranks as it can be; where the
    candidates are too few, between any two operations that read parameters.

    Raises `PlanError` where there are not so many places to cut."""
    good = candidates(body)
    places = np.array([0, *(good if len(good) >= count - 1 else wherever(body)), len(body.ops)])
    if len(places) - 1 < count:
        raise PlanError(
            f"`{body.name}` can be cut in at most {len(places) - 1} stages that read parameters, not in {count}; use fewer stages, or "
            "say where with `cuts`"
        )
    total = np.concatenate([[0.0], np.cumsum(op_seconds(body, settings))])[places]
    sizes = [dp * tp for dp, tp in meshes]
    share = [1.0 / sizes[named(schedule).group_of(stage, len(meshes))] for stage in range(count)]
    whole = total[-1] * sum(share) / count
    load = np.maximum(total[None, :] - total[:, None], 0.0) / max(whole, 1e-30)
    load[np.tri(len(places), dtype=bool)] = np.inf  # a stage has at least one operation
    best = np.full(len(places), np.inf)
    best[0] = 0.0
    backs = []
    for stage in range(count):
        through = best[:, None] + (load * share[stage]) ** _NORM
        backs.append(through.argmin(0))
        best = through.min(0)
    at, starts = len(places) - 1, []
    for back in reversed(backs):
        at = int(back[at])
        starts.append(int(places[at]))
    return tuple(reversed(starts))


def op_seconds(body: Graph, settings: Settings) -> Floats:
    """Computing time of every operation of `body`, forward and backward, on one rank. Shape `(operations,)`."""
    structure = Structure(body)
    costs = Costs(settings.cluster, (1, 1), AXES, settings.optimizer, body.training)
    found = np.zeros(len(structure.classes))
    for number, row in enumerate(structure.classes):
        choice = (splits(body, row.op)[0],) * 2
        found[number] = sum(costs.op_times(row.work, row.operands, row.outputs, choice))
    return found[np.array(structure.class_of, np.int64)]


class Pipelined:
    """One pipeline, solved: `stages` and, by group, what was found."""

    def __init__(self, graph: Graph, settings: Settings, pins: Pins, pipeline: Pipeline) -> None:
        self.graph, self.settings, self.pins, self.pipeline = graph, settings, pins, pipeline
        self.body = microbatched(graph, pipeline.microbatches).body
        self.stages: tuple[Stage, ...] = cut(self.body, pipeline.starts)
        groups = range(len(pipeline.meshes))
        self.of_group = [[stage for stage in range(len(self.stages)) if pipeline.group_of(stage) == group] for group in groups]
        self._known: dict[Hashable, Found] = {}
        self._priced: dict[Hashable, Costs] = {}
        self._built_like: dict[Hashable, Built] = {}
        self.found: list[Found] = [self._solve(group) for group in groups]

    def _solve(self, group: int) -> Found:
        """The stages of a group; those that are like an earlier group's, whose best plan fits whatever it takes, are decided like them."""
        stages, order = self.of_group[group], self.pipeline.orders[group]
        key = tuple((self._forms[stage], self._costs(stage).prices) for stage in stages)
        like = None if self.pins.given else self._known.get(key)
        if like is not None:
            builts = zip(like.place.builts, stages, strict=True)
            mine = tuple(built.like(Structure(self.stages[at].graph), self._costs(at)) for built, at in builts)
            choice = tuple(number for row in like.choices for number in row)
            solution = Solution(choice, like.cost_s, 0.0, like.bound_s, True)
            found = self.settings.found(Place(mine, tuple(stages), order), solution, like.bound_s)
            if found.fits:
                return found
        found = self.settings.solve(Place(tuple(self._built(stage) for stage in stages), tuple(stages), order))
        if found.fits and not found.price_s_per_byte and not any(any(part.recompute) for part in found.parts):
            self._known[key] = found
        return found

    def _costs(self, stage: int) -> Costs:
        pipeline, settings = self.pipeline, self.settings
        group = pipeline.group_of(stage)
        fresh = Costs(
            settings.cluster, pipeline.meshes[group], AXES, settings.optimizer, self.graph.training, microbatches=pipeline.microbatches,
            live=pipeline.live[stage], first_rank=pipeline.first_ranks[group], precision=settings.precision,
        )  # fmt: skip
        return self._priced.setdefault(fresh.prices, fresh).living(pipeline.live[stage])

    @cached_property
    def _forms(self) -> tuple[Hashable, ...]:
        numbers: dict[Hashable, int] = {}
        return tuple(numbers.setdefault(form(stage.graph), len(numbers)) for stage in self.stages)

    def _built(self, stage: int) -> Built:
        graph, costs = self.stages[stage].graph, self._costs(stage)
        key = self._forms[stage], costs.prices
        if not self.pins.given and (like := self._built_like.get(key)) is not None:
            return like.like(Structure(graph), costs)
        pins = pins_for(self.pins, self.graph, graph)
        built = self._built_like[key] = build(Structure(graph), costs, apply_pins(pins, graph, FREE))
        check_options(built, pins)
        return built

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Of all stages, in order."""
        by_stage = {
            stage: part
            for stages, found in zip(self.of_group, self.found, strict=True)
            for stage, part in zip(stages, found.parts, strict=True)
        }
        return tuple(by_stage[stage] for stage in range(len(self.stages)))

    # ---- as a plan --------------------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        pipeline = self.pipeline
        bound_s = max(sum(built.relaxed_bound_s() for built in found.place.builts) for found in self.found)
        meshes = [dict(zip(AXES, mesh, strict=True)) for mesh in pipeline.meshes]
        shared = meshes[0] if all(mesh == meshes[0] for mesh in meshes) else {}
        return predicted_plan(
            self.graph, self.settings, self.found, self.parts, bound_s, name="searched",
            mesh={"pp": len(meshes)} | shared, microbatches=pipeline.microbatches, pins=self.pins.given,
            pipeline=PipelinePlan(
                schedule=pipeline.schedule,
                groups=tuple(GroupPlan(first_rank=first, mesh=mesh) for first, mesh in zip(pipeline.first_ranks, meshes, strict=True)),
                stages=tuple(self._stage_row(stage) for stage in range(len(self.stages))),
            ),
        )  # fmt: skip

    def _stage_row(self, index: int) -> StagePlan:
        stage = self.stages[index]
        return StagePlan(
            name=_name(self.body, stage), start=stage.start, stop=stage.stop, group=self.pipeline.group_of(index),
            sends_bytes=sum(self.body.values[name].size_bytes for name in stage.sends),
            receives_bytes=self._received_bytes(index),
            receives_s=self._wire_s(index, index - 1, stage.receives, backward=False),
            returns_s=self._wire_s(index - 1, index, self.stages[index - 1].sends, backward=True) if index else 0.0,
        )  # fmt: skip

    def _received_bytes(self, index: int) -> int:
        """What a rank of stage `index` receives of one microbatch."""
        graph, part = self.parts[index].structure.graph, self.parts[index]
        ops = [graph.ops[graph.op_index[f"receive_{name}"]] for name in self.stages[index].receives]
        return sum(part.costs.of(graph.values[op.outputs[0]], part.assignment.output_states(op)[0]) for op in ops)

    def _wire_s(self, index: int, other: int, names: tuple[str, ...], backward: bool) -> float:
        """Time on the link for a rank of stage `index` to receive its parts of the values `names`, or of their gradients, from `other`."""
        if not names:
            return 0.0
        here, there = self.pipeline.group_of(index), self.pipeline.group_of(other)
        if here == there:
            return 0.0
        firsts, meshes, part = self.pipeline.first_ranks, self.pipeline.meshes, self.parts[index]
        spans = [(firsts[group], meshes[group][0] * meshes[group][1]) for group in (here, there)]
        link = between(self.settings.cluster, *spans)
        graph, assignment = part.structure.graph, part.assignment
        total_s = 0.0
        for name in names:
            value = graph.values[name]
            if backward and not value.requires_grad:
                continue
            op = graph.ops[graph.op_index[f"send_{name}" if backward else f"receive_{name}"]]
            (state,) = assignment.operand_states(op) if backward else assignment.output_states(op)
            total_s += part.costs.of(value, state) / link.bytes_per_s + link.latency_s + part.costs.axes[0].start_s
        return total_s


def _name(body: Graph, stage: Stage) -> str:
    """The modules it begins and ends with, down to their first number."""
    heads = [head for op in body.ops[stage.start : stage.stop] if (head := _head(op.module))]
    names = list(dict.fromkeys(heads)) or [body.name]
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"


def _head(module: str) -> str:
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return module
