"""The searched plan beside the well-known ones: `autopar plan --compare`."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from autopar.errors import PlanError
from autopar.ir import units
from autopar.ir.plan import Plan
from autopar.ir.plan_digest import bytes_moved
from autopar.ir.plan_stages import sizes_words
from autopar.report.terminal import heading, table


def compare(plans: Mapping[str, Plan | PlanError], console: Console) -> None:
    """Print one row a plan: mesh, step time against the searched plan's, memory against the limit, bytes moved, whether it fits."""
    first = next((plan for plan in plans.values() if isinstance(plan, Plan)), None)
    if first is not None:
        console.print(heading("plans compared", f"{first.model.name} on {first.cluster.name}"))
    searched = plans.get("searched")
    reference = searched.cost_s if isinstance(searched, Plan) and searched.predicted.fits else 0.0
    columns = ("plan", "mesh", "step", "ratio", "computing", "communication", "memory", "bytes moved")
    made = table(*columns, "verdict", right=columns[2:], fold=("verdict",))
    for name, plan in plans.items():
        style = "bold" if name == "searched" else ""
        if isinstance(plan, Plan):
            made.add_row(name, *_cells(plan, reference), _verdict(plan), style=style)
        else:
            made.add_row(name, *[""] * (len(columns) - 1), Text(f"cannot: {' '.join(str(plan).split())}", style="yellow"), style=style)
    console.print(made)


def _cells(plan: Plan, reference: float) -> list[str]:
    predicted = plan.predicted
    uneven = plan.pipeline is not None and len(plan.mesh) == 1
    return [
        " + ".join(map(sizes_words, [group.mesh for group in plan.groups] if uneven else [plan.mesh])),
        units.seconds(plan.cost_s),
        f"x{plan.cost_s / reference:.2f}" if reference else "",
        units.seconds(predicted.compute_s),
        units.seconds(predicted.communication_s),
        units.size(sum(plan.memory_bytes.values())),
        units.size(bytes_moved(plan)),
    ]


def _verdict(plan: Plan) -> Text:
    spare = plan.predicted.memory_limit_bytes - sum(plan.memory_bytes.values())
    if plan.predicted.fits:
        return Text(f"fits, {units.size(spare)} to spare", style="green")
    return Text(f"does not fit: {units.size(-spare)} missing", style="red")
