"""One stage of a pipeline, and what crosses its cuts: `autopar explain PLAN "stage 1"`."""

from __future__ import annotations

import re

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table

from autopar.errors import PlanError
from autopar.ir import units
from autopar.ir.plan import Plan
from autopar.ir.plan_roles import Roles
from autopar.ir.plan_stages import crossing_words, crossings, numbers_words, sizes_words, stage_rows
from autopar.report.terminal import heading

_STAGE = re.compile(r"\s*(?:stage|pipeline\.stages)[\s.\[]*(\d{1,6})\]?\s*", re.IGNORECASE)


def stage_number(plan: Plan, name: str) -> int | None:
    """The stage that `name`, such as `stage 1`, means; `None` where it means something else.

    Raises `PlanError` where the plan has no such stage.
    """
    match = _STAGE.fullmatch(name)
    if not match or (plan.pipeline is None and any(name.strip() in item.name for item in plan.parameters)):
        return None
    if plan.pipeline is None:
        raise PlanError("the plan has no pipeline, and so no stages")
    if int(match[1]) >= plan.stage_count:
        raise PlanError(f"`{name.strip()}`: the plan has the stages 0 to {plan.stage_count - 1}")
    return int(match[1])


def explain_stage(plan: Plan, stage: int, console: Console) -> None:
    """Print where `stage` begins and ends, on which ranks it runs, what it costs, and what it receives and sends, and why."""
    assert plan.pipeline is not None
    rows, row = stage_rows(plan), stage_rows(plan)[stage]
    this = plan.pipeline.stages[stage]
    console.print(heading(f"stage {stage}", row.name))
    roles = Roles.of(plan)
    others = [other.number for other in rows if other.group == row.group and other.number != stage]
    shared = f", which also run {numbers_words('stage', others)} (the schedule places it so)" if others else ""
    facts: list[tuple[str, RenderableType]] = [
        ("operations", f"{this.start} to {this.stop - 1} of those of a microbatch"),
        ("ranks", row.ranks + shared),
        ("mesh", sizes_words(plan.stage_mesh(stage))),
        *((f"  {axis}", roles.axis(axis, [stage])) for axis, size in plan.stage_mesh(stage).items() if size > 1),
        ("time", f"{units.seconds(row.forward_s)} forward, {units.seconds(row.backward_s)} backward, for each microbatch"),
        ("", _share(plan, stage)),
    ]
    if row.recomputed:
        facts.append(("recomputed", f"{row.recomputed} of {row.repeats} repeats compute their forward pass again in the backward pass"))
    if row.memory_bytes is not None:
        limit = plan.predicted.memory_limit_bytes
        facts.append(("memory", f"{units.size(row.memory_bytes)} at most on a rank, of {units.size(limit)}"))
    crossing = crossings(plan)
    if stage:
        facts.append(("receives", _moved(rows[stage - 1].sends_bytes, this.receives_s)))
        facts += [("", crossing_words(item)) for item in crossing if stage in item.stages[1:]]
    if stage + 1 < plan.stage_count:
        after = plan.pipeline.stages[stage + 1]
        back = f"; gradients come back in {units.seconds(after.returns_s)}" if after.returns_s else ""
        facts.append(("sends", _moved(row.sends_bytes, after.receives_s) + back))
        facts += [("", crossing_words(item)) for item in crossing if stage in item.stages[:-1]]
    tied = {item.name for item in plan.parameters if item.stage != stage} & {item.name for item in plan.parameters if item.stage == stage}
    facts += [("tied", f"{name}: other stages read it too; gradients are summed over them, and values kept equal") for name in sorted(tied)]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in facts:
        grid.add_row(name, text)
    console.print(Padding(grid, (0, 0, 0, 2)))


def _moved(count: int, time_s: float) -> str:
    return f"{units.size(count)} for each microbatch, {units.seconds(time_s)} on the link of a rank"


def _share(plan: Plan, stage: int) -> str:
    """How its ranks stand beside the others: the slowest group sets the pace of a pipeline."""
    assert plan.pipeline is not None
    busy = [0.0] * len(plan.groups)
    for row in stage_rows(plan):
        busy[row.group] += row.forward_s + row.backward_s
    mine, slowest = busy[plan.pipeline.stages[stage].group], max(busy)
    if slowest <= 0 or mine >= slowest * (1 - 1e-9):
        return "no ranks work longer" if slowest > 0 else "no times are given"
    return f"its ranks work {units.percent(1 - mine / slowest)} less than the busiest"
