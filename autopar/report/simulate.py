"""What a plan does over one step, as the simulator has it: `autopar simulate`. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autopar.errors import PlanError
from autopar.ir import plan_text, units
from autopar.ir.pipelining.schedules import SCHEDULES
from autopar.ir.plan import Plan
from autopar.ir.plan_stages import numbers_words, ranks_words
from autopar.report.terminal import heading, table
from autopar.report.timeline import Lane, Row, Span, Timeline
from autopar.search.simulator.simulate import Event, GroupTime, Simulation
from autopar.search.simulator.simulate import simulate as run_simulator
from autopar.search.simulator.timeline import KINDS

_KINDS = {"forward": "F", "backward": "B", "input": "I", "weight": "W", "recompute": "recompute", "optimizer": "optimizer"}
_BARS = "▁▂▃▄▅▆▇█"
MOST_PASSES = 2_000_000
"""Repeats times microbatches: 100 layers and 20,000 microbatches, some minutes."""
NARROWEST, WIDEST = 16, 60
"""Columns for memory over time."""
FEW_GROUPS = 16
"""So many are listed; of more, these and the busiest and the fullest, unless all are asked for."""


def simulate(plan: Plan, console: Console, full: bool = False) -> Timeline:
    """Simulate a step of `plan`, print what it takes, and return it for drawing. `full`: list every group of ranks.

    Raises `PlanError` where the plan's schedule cannot run, or where it holds no times.
    """
    simulation = simulated(plan)
    if simulation.step_s <= 0:
        raise PlanError("the plan holds no times of its segments, so that there is nothing to simulate; make it anew with `autopar plan`")
    timeline = timeline_of(plan, simulation)
    console.print(heading("one step", timeline.title))
    console.print(Padding(_facts(plan, simulation), (0, 0, 0, 1)))
    console.print()
    listed = range(len(plan.groups)) if full else _listed(simulation)
    some = "" if len(listed) == len(plan.groups) else f"; {len(listed)} of {len(plan.groups)}, --full lists all"
    console.print(heading("groups of ranks", f"what a rank of each does in a step{some}"))
    console.print(Padding(_times(plan, simulation, listed), (0, 0, 0, 1)))
    console.print()
    low, high = _extent(timeline)
    console.print(heading("memory of a rank", f"at its peak; over the step as a line from {units.size(low)} to {units.size(high)}"))
    console.print(Padding(_memory(plan, simulation, timeline, listed, console.width), (0, 0, 0, 1)))
    return timeline


def _listed(simulation: Simulation) -> list[int]:
    """The groups to list: all, or some from the first to the last, with the busiest and the one that holds most."""
    count = len(simulation.groups)
    if count <= FEW_GROUPS:
        return list(range(count))
    busiest = max(range(count), key=lambda group: simulation.groups[group].compute_s)
    fullest = max(range(count), key=lambda group: simulation.memory[group].peak_bytes)
    spread = {round(place * (count - 1) / (FEW_GROUPS - 3)) for place in range(FEW_GROUPS - 2)}
    return sorted(spread | {busiest, fullest})


def simulated(plan: Plan) -> Simulation:
    """What the simulator says of `plan`. Raises `PlanError` where its schedule cannot run, or has more to do than can be looked at."""
    passes = plan.microbatches * sum(segment.count for segment in plan.segments)
    if passes > MOST_PASSES:
        raise PlanError(f"{passes:,} passes through layers in a step are too many to simulate ({MOST_PASSES:,}): use fewer microbatches")
    return run_simulator(plan)


def timeline_of(plan: Plan, simulation: Simulation) -> Timeline:
    """`simulation` of `plan`, as it is drawn."""
    streams: list[dict[str, list[Event]]] = [{"compute": []} for _ in plan.groups]
    for event in simulation.events:
        streams[event.group].setdefault(event.stream, []).append(event)
    rows = []
    for number, group in enumerate(plan.groups):
        lanes = [
            Lane(stream, stream == "compute", tuple(map(_span, events)))
            for stream, events in sorted(streams[number].items(), key=lambda item: _order(item[0], group.mesh))
        ]
        memory = simulation.memory[number]
        levels = (dict(zip(KINDS, map(round, level), strict=True)) for level in memory.levels)
        rows.append(
            Row(
                group=number,
                ranks=ranks_words(group),
                size=len(simulation.ranks[number]),
                stages=_stages(plan, number),
                lanes=tuple(lanes),
                memory=tuple(zip(memory.times_s, levels, strict=True)),
            )
        )
    remark = f"{units.seconds(simulation.step_s)} a step; {units.seconds(simulation.communication_s)} exposed communication"
    if plan.pipeline:
        remark += f"; bubble {units.percent(simulation.bubble)} of computing"
    return Timeline(_title(plan), remark, simulation.step_s, plan.predicted.memory_limit_bytes, tuple(rows))


def _title(plan: Plan) -> str:
    rows = [words for name, words in plan_text.pipeline_rows(plan) if name != "recomputed"]
    return ": ".join([f"{plan.model.name} on {plan.cluster.name}", *rows])


def _order(stream: str, mesh: dict[str, int]) -> tuple[int, int, str]:
    """Computing first, then the axes of the mesh, then transfers."""
    axes = list(mesh)
    return (0, 0, "") if stream == "compute" else (1, axes.index(stream), "") if stream in axes else (2, len(stream), stream)


def _span(event: Event) -> Span:
    kind = _KINDS.get(event.kind, "communication")
    what = f"send {event.label}" if event.kind == "transfer" else event.label
    stage, microbatch = (None if number < 0 else number for number in (event.stage, event.microbatch))
    return Span(event.start_s, event.end_s, kind, what, stage, microbatch)


def _stages(plan: Plan, group: int) -> tuple[int, ...]:
    return tuple(number for number, stage in enumerate(plan.pipeline.stages) if stage.group == group) if plan.pipeline else ()


def _facts(plan: Plan, simulation: Simulation) -> RenderableType:
    said = plan.predicted.step_s
    differs = said and abs(simulation.step_s / said - 1) > 1e-3
    rows = [
        ("mesh", plan_text.mesh_words(plan)),
        *((name, words) for name, words in plan_text.pipeline_rows(plan) if name == "recomputed"),
        ("step", units.seconds(simulation.step_s) + (f" (the file says {units.seconds(said)}: it was edited)" if differs else "")),
    ]
    if plan.pipeline:
        rows.append(("bubble", _bubble(plan, simulation)))
    worst = max(range(len(plan.groups)), key=lambda group: simulation.groups[group].communication_s)
    of = f", on group {worst}" if len(plan.groups) > 1 else ""
    rows.append(("exposed", f"{units.seconds(simulation.communication_s)} of communication{of}: computing waits for it, or loses to it"))
    peak, limit = max(simulation.peak_bytes), plan.predicted.memory_limit_bytes
    verdict = f"fits, {units.size(limit - peak)} to spare" if peak <= limit else f"does not fit: {units.size(peak - limit)} are missing"
    rows.append(("memory", f"{units.size(peak)} of {units.size(limit)} at most: {verdict}"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, words in rows:
        grid.add_row(name, Text(words, style="bold red" if name == "memory" and peak > limit else ""))
    return grid


def _bubble(plan: Plan, simulation: Simulation) -> str:
    """The bubble, and what its formula says where there is one."""
    assert plan.pipeline is not None
    groups = len(plan.groups)
    each, schedule = plan.stage_count // groups, SCHEDULES[plan.pipeline.schedule]
    words = f"{units.percent(simulation.bubble)}: idle for want of work, over computing"
    if schedule.bubble is None or plan.microbatches < schedule.bubble_from * groups:
        return words
    formula = schedule.bubble(groups, each, plan.microbatches)
    return f"{words}; {units.percent(formula)} if all stages took as long and transfers nothing"


def _times(plan: Plan, simulation: Simulation, listed: Sequence[int]) -> RenderableType:
    pipeline = plan.pipeline is not None
    columns = ["group", "ranks", *["stages"] * pipeline, "computing", "optimizer", "exposed", "idle", "busy", *["bubble"] * pipeline]
    made = table(*columns, right=("computing", "optimizer", "exposed", "idle", "busy", "bubble"))
    for number in listed:
        stages = [numbers_words("", list(_stages(plan, number))).strip("s ")] if pipeline else []
        cells = _time_cells(simulation.groups[number], simulation.step_s)
        made.add_row(str(number), ranks_words(plan.groups[number]), *stages, *(cells if pipeline else cells[:-1]))
    return made


def _time_cells(times: GroupTime, step_s: float) -> list[str]:
    parts = (value if value > 1e-12 else 0.0 for value in (times.compute_s, times.optimizer_s, times.communication_s, times.idle_s))
    busy = (times.compute_s + times.optimizer_s) / step_s
    return [*map(units.seconds, parts), units.percent(busy), units.percent(times.bubble)]


def _memory(plan: Plan, simulation: Simulation, timeline: Timeline, listed: Sequence[int], width: int) -> RenderableType:
    """Peak by kind, when it is, and a line of the height over time: beside each other, or below where there is no room."""
    kinds = [kind for place, kind in enumerate(KINDS) if any(memory.peak[place] > 0 for memory in simulation.memory)]
    room = width - 36 - 13 * len(kinds)
    beside = room >= NARROWEST
    named = table("group", *kinds, right=tuple(kinds))
    ends = ("peak", "of limit", "at")
    made = table("group", *(kinds if beside else []), *ends, "over the step", right=(*kinds, *ends))
    columns = max(NARROWEST, min(WIDEST, room if beside else width - 42))
    limit, extent = plan.predicted.memory_limit_bytes, _extent(timeline)
    for number in listed:
        memory, row = simulation.memory[number], timeline.rows[number]
        held, share = memory.at_peak(), memory.peak_bytes / limit if limit else 0.0
        sizes = [units.size(held[kind]) for kind in kinds]
        line = Text(_line(row.level(columns, timeline.step_s), *extent), style="red" if memory.peak_bytes > limit else "cyan")
        cells = [units.size(memory.peak_bytes), units.percent(share) if limit else "", units.seconds(memory.peak_s)]
        made.add_row(str(row.group), *(sizes if beside else []), *cells, line)
        named.add_row(str(row.group), *sizes)
    return made if beside else Group(made, Text(), named)


def _extent(timeline: Timeline) -> tuple[int, int]:
    """The least and the most that any rank holds."""
    totals = [sum(kinds.values()) for row in timeline.rows for _, kinds in row.memory]
    return min(totals, default=0), max(totals, default=0)


def _line(levels: list[int], low: int, high: int) -> str:
    """Levels as bars, from the lowest at `low` to the highest at `high`."""
    top = len(_BARS) - 1
    return "".join(_BARS[min(top, (level - low) * len(_BARS) // (high - low)) if high > low else 0] for level in levels)
