"""A plan on a terminal: `autopar show`. What `print(plan)` says, with colours, in the width there is; `full` tells everything."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autopar.ir import plan_text, units
from autopar.ir.plan import Plan, SegmentPlan
from autopar.ir.plan_digest import (
    OpRow,
    gap_words,
    joined_segment_rows,
    memory_words,
    parameter_groups,
    placements,
    real_axes,
    segment_rows,
    traffic,
)
from autopar.ir.plan_roles import GATHER_WORDS, Roles
from autopar.ir.plan_stages import alike_stages, crossing_words, crossings, is_chosen, stage_rows
from autopar.report.terminal import heading, hold, placed, table

MEMORY_COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red")

COLLECTIVES_BESIDE = 110
"""From this width on the collectives stand beside the operations they serve, below it under them."""

USED_AND_MOVED = 105
"""From this width on the parameters' table has the columns `used` and `moved`."""

VALUES_SENT = 120
"""From this width on the stages' table names the values that are sent."""


def show(plan: Plan, console: Console, full: bool = False) -> None:
    """Print `plan`. `full` lists every operation, every parameter and every collective that the file has."""
    roles = Roles.of(plan)
    console.print(_header(plan, roles, console.width))
    told = [([segment], rows) for segment, rows in segment_rows(plan)] if full else joined_segment_rows(plan)
    for title, body in [
        (heading("stages", "times of one microbatch"), _stages(plan, full, console.width)),
        (heading(plan_text.CANDIDATES_TITLE), _candidates(plan)),
        (heading("inputs and outputs"), _inputs(plan)),
        (heading("parameters"), _parameters(plan, full, console.width)),
        *((_segment_heading(plan, segments), _segment(plan, segments[0], rows, full, console.width)) for segments, rows in told),
        (heading("collectives", "a step, on one rank"), _collectives(plan, full)),
    ]:
        if body is not None:
            console.print()
            console.print(title)
            console.print(Padding(body, (0, 0, 0, 1)))
    if remarks := _remarks(plan):
        console.print()
        console.print(remarks)
    console.print()
    console.print(Text(plan_text.LEGEND, style="dim"))


def _header(plan: Plan, roles: Roles, width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    effort = f"effort {plan.predicted.effort}, optimizer {plan.predicted.optimizer}"
    grid.add_row("plan", Text.assemble((plan.name, "bold"), f"  ({effort})"))
    grid.add_row("model", plan_text.model_words(plan))
    grid.add_row("cluster", plan_text.cluster_words(plan))
    grid.add_row("mesh", Text(plan_text.mesh_words(plan), style="bold"))
    for name, words in [*plan_text.axis_rows(plan, roles), *plan_text.pipeline_rows(plan)]:
        grid.add_row(name, words)
    if plan.precision is not None:
        grid.add_row("precision", plan_text.precision_words(plan.precision))
    if dropping := plan_text.dropping_words(plan):
        grid.add_row("experts", dropping)
    step, rest = plan_text.time_words(plan).split(" a step", 1)
    grid.add_row("time", Text.assemble((step, "bold"), f" a step{rest}"))
    grid.add_row("proof", Text(gap_words(plan), style="green" if plan.predicted.fits and plan.gap < 0.01 else "yellow"))
    grid.add_row("memory", Text(memory_words(plan), style="default" if plan.predicted.fits else "bold red"))
    grid.add_row("", _memory_bar(plan, max(20, min(60, width - 20))))
    grid.add_row("", _memory_legend(plan))
    return grid


def _memory_bar(plan: Plan, width: int) -> Text:
    """One bar as long as the limit (or as the need, where that is more), a colour for each kind."""
    total, limit = sum(plan.memory_bytes.values()), plan.predicted.memory_limit_bytes
    whole = max(total, limit, 1)
    bar = Text()
    drawn = before = 0
    for colour, count in zip(MEMORY_COLOURS * 9, plan.memory_bytes.values(), strict=False):
        before += count
        cells = round(width * before / whole) - drawn
        bar.append("█" * cells, style=colour)
        drawn += cells
    bar.append("░" * (width - drawn), style="dim")
    return bar


def _memory_legend(plan: Plan) -> Text:
    legend = Text()
    for colour, (kind, count) in zip(MEMORY_COLOURS * 9, plan.memory_bytes.items(), strict=False):
        legend.append("" if not legend else "  ")
        legend.append("■\u00a0", style=colour).append(f"{kind} {units.size(count)}".replace(" ", "\u00a0"))
    return legend


def _stages(plan: Plan, full: bool, width: int) -> RenderableType | None:
    """One line a stage, or for several alike; below, values that a stage hands on. `full`: each stage, and all that cross a cut."""
    rows = [plan_text.stage_cells(run, names=width >= VALUES_SENT) for run in alike_stages(stage_rows(plan), full)]
    if not rows:
        return None
    columns = [number for number in range(len(plan_text.STAGE_COLUMNS)) if any(row[number] for row in rows)]
    names = [plan_text.STAGE_COLUMNS[number] for number in columns]
    made = table(*names, right=("forward", "backward", "recomputed", "memory"), fold=("layers", "mesh", "memory", "sends"))
    for row in rows:
        made.add_row(*(row[number] for number in columns))
    told = [Text(crossing_words(item)) for item in crossings(plan) if full or len(item.stages) > 2]
    return Group(made, *(Text("handed on  " if not full else "crosses  ", style="dim").append_text(words) for words in told))


def _candidates(plan: Plan) -> RenderableType | None:
    if not plan.candidates:
        return None
    made = table(*plan_text.CANDIDATE_COLUMNS, right=("groups", "step", "bubble", "communication", "memory"), fold=("plan", ""))
    for item, cells in zip(plan.candidates, plan_text.candidate_cells(plan), strict=True):
        style = "bold" if is_chosen(plan, item) else "yellow" if item.cost_s is None else ""
        made.add_row(*cells, style=style)
    return made


def _inputs(plan: Plan) -> RenderableType | None:
    axes = real_axes(plan)
    made = table("", "path", "global shape", "dtype", *axes, fold=("path",))
    for word, path, item in plan_text.tensor_rows(plan):
        cells = (placed(item.placement.get(axis, "")) for axis in axes)
        made.add_row(word, path, units.shape(item.shape), item.dtype, *cells)
    return made if made.row_count else None


def _parameters(plan: Plan, full: bool, width: int) -> RenderableType | None:
    if not plan.parameters:
        return None
    wide = width >= USED_AND_MOVED
    cells: list[RenderableType]
    columns = ["name", "", "shape", "stored", *(["used"] if wide else []), "gathered", *(["moved"] if wide and not full else [])]
    made = table(*columns, right=("", "moved"), fold=("name", "stored", "used"))
    if full:
        for item in plan.parameters:
            mesh = plan.stage_mesh(item.stage)
            stored, used = placements(item.stored, mesh), placements(item.used, mesh)
            name = item.name + ("" if item.trainable else " (frozen)")
            cells = [units.shape(item.shape), placed(stored), *([placed(used)] if wide else []), GATHER_WORDS[item.gather]]
            made.add_row(name, f"stage {item.stage}" if plan.pipeline else "", *cells)
        return hold(made, width)
    owner = ""
    for group in parameter_groups(plan):
        if group.owner and group.owner != owner:
            made.add_row(Text(group.owner, style="dim"))
        owner = group.owner
        count = f"x{group.count}" if group.count > 1 else ""
        cells = [plan_text.shape_words(group), placed(group.stored)]
        cells += [placed(group.used)] if wide else []
        cells.append(GATHER_WORDS[group.gather])
        cells += [plan_text.moved_words(group)] if wide else []
        made.add_row(plan_text.parameter_name(group), count, *cells)
    return hold(made, width)


def _segment_heading(plan: Plan, segments: list[SegmentPlan]) -> Text:
    title, _, remark = plan_text.segment_title(plan, segments).rpartition(": ")
    return heading(title, remark)


def _segment(plan: Plan, segment: SegmentPlan, rows: list[OpRow], full: bool, width: int) -> RenderableType | None:
    axes = real_axes(plan, segment.stage)
    if full:
        made = table("operation", "operator", "module", *axes, fold=("operation", "module", "operator"))
        for op in segment.ops:
            cells = [placed(f"{op.split[axis]} {op.output[axis]}") for axis in axes]
            made.add_row(op.name, op.target, op.module, *cells)
        return made
    if not rows:
        return None
    beside = width >= COLLECTIVES_BESIDE
    made = table("module", "operator", *axes, *(["collectives"] if beside else []), fold=("module", "operator", "collectives", *axes))
    for row in rows:
        if not row.operators:
            made.add_row(Text(plan_text.names_words(row.names), style="dim"))
            continue
        cells = [placed(row.axes[axis]) for axis in axes]
        collectives = [Text(words, style="yellow") for words in plan_text.collective_words(row)]
        made.add_row(plan_text.names_words(row.names), " ".join(row.operators), *cells, *([Text(", ").join(collectives)] if beside else []))
        for words in [] if beside else collectives:
            made.add_row(Text("  ").append(words))
    return hold(made, width)


def _collectives(plan: Plan, full: bool) -> RenderableType:
    rows = traffic(plan)
    if not rows:
        return Text("none")
    made = table("axis", "phase", "collective", "count", "bytes", "time", "exposed", right=("count", "bytes", "time", "exposed"))
    if plan.pipeline:
        made.add_column("of", overflow="fold")
    if full:
        made.add_column("serves", overflow="fold")
    for row in rows:
        cells = [f"{row.count:,}", units.size(row.bytes), units.seconds(row.time_s), units.seconds(row.exposed_s)]
        whose = [plan_text.groups_words(plan, row)] if plan.pipeline else []
        made.add_row(row.axis, row.phase, row.kind, *cells, *whose, style="bold" if full else "")
        for item in row.items if full else ():
            amounts = (item.bytes * item.count, item.time_s * item.count, item.exposed_s * item.count)
            cells = [f"{item.count:,}", units.size(amounts[0]), units.seconds(amounts[1]), units.seconds(amounts[2])]
            made.add_row("", "", "", *cells, *[""] * len(whose), item.op if item.op == item.value else f"{item.value} for {item.op}")
    return made


def _remarks(plan: Plan) -> RenderableType | None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for pattern, text in plan.pins.items():
        grid.add_row(Text("pinned", style="cyan"), f"{pattern} to {text}")
    if plan.replicated:
        grid.add_row(Text("replicated", style="yellow"), "no sharding rule, so every rank runs all of " + ", ".join(plan.replicated))
    for rule in plan.given_rules:
        grid.add_row(Text("rule", style="yellow" if rule.whole else "cyan"), f"{rule.subject}: {rule.words()}")
    for note in plan.notes:
        grid.add_row(Text("note", style="yellow"), note)
    return Group(grid) if grid.row_count else None
