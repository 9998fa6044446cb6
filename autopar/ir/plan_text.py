"""A plan as plain text: what `print(plan)` shows. The terminal's version with colours is `autopar.report.show`."""

from __future__ import annotations

import textwrap
from collections import Counter

from autopar.ir import units
from autopar.ir.plan import Plan, SegmentPlan
from autopar.ir.plan_digest import (
    KIND_WORDS,
    OpRow,
    ParameterGroup,
    gap_words,
    memory_words,
    parameter_groups,
    real_axes,
    segment_rows,
    traffic,
)
from autopar.ir.plan_roles import GATHER_WORDS, Roles

WIDTH = 120
LEGEND = (
    "S(d): split along dim d; R: whole on every rank; R/P: whole, its gradient summed over the axis; P(sum): terms of a sum\n"
    "beside operations: collectives of one repeat that move what is computed; what parameters move in a step stands with them"
)


def summary(plan: Plan) -> str:
    """The plan in a page or two: what it is for, what it costs, how each axis is used, parameters, layers, collectives."""
    roles = Roles.of(plan)
    parts = [_header(plan, roles), _inputs(plan), _parameters(plan), _segments(plan), _collectives(plan), _remarks(plan), LEGEND]
    return "\n\n".join(part for part in parts if part)


def model_words(plan: Plan) -> str:
    mode = "training" if plan.model.training else "evaluation"
    return f"{plan.model.name}, {mode}: {units.number(plan.model.parameters)} parameters, {units.times(plan.model.operations, 'operation')}"


def cluster_words(plan: Plan) -> str:
    cluster = plan.cluster
    nodes = f"{units.times(cluster.nodes, 'node')} of {cluster.devices_per_node} " if cluster.nodes > 1 else f"{cluster.devices_per_node} "
    return f"{cluster.name}: {nodes}x {cluster.device}, {units.size(cluster.memory_bytes)} each"


def mesh_words(plan: Plan) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) + f" = {units.times(plan.world_size, 'rank')}"


def time_words(plan: Plan) -> str:
    predicted = plan.predicted
    parts = f"{units.seconds(predicted.compute_s)} computing + {units.seconds(predicted.communication_s)} exposed communication"
    return f"{units.seconds(predicted.cost_s)} a step = {parts}"


def _header(plan: Plan, roles: Roles) -> str:
    rows = [
        ("plan", f"{plan.name} (effort {plan.predicted.effort}, optimizer {plan.predicted.optimizer})"),
        ("model", model_words(plan)),
        ("cluster", cluster_words(plan)),
        ("mesh", mesh_words(plan)),
        *((f"  {axis}", roles.axis(axis)) for axis in real_axes(plan)),
        ("time", time_words(plan)),
        ("proof", gap_words(plan)),
        ("memory", memory_words(plan)),
        ("", ", ".join(f"{kind} {units.size(count)}" for kind, count in plan.memory_bytes.items())),
    ]
    left = max(len(name) for name, _ in rows) + 2
    return "\n".join(_entry(name.ljust(left), text) for name, text in rows)


def _entry(head: str, text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False, break_on_hyphens=False
    )


def _table(header: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> str:
    """Columns two blanks apart; the columns in `right` are flush right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: list[str]) -> str:
        cells = [cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join("  " + line(row) for row in [header, *rows])


def _inputs(plan: Plan) -> str:
    rows = []
    for word, tensors in (("input", plan.inputs), ("output", plan.outputs)):
        for tensor in tensors:
            rows.append([word, tensor.path, units.shape(tensor.shape), tensor.dtype, *(tensor.placement[axis] for axis in real_axes(plan))])
    return "inputs and outputs\n" + _table(["", "", "global shape", "dtype", *real_axes(plan)], rows) if rows else ""


def _parameters(plan: Plan) -> str:
    if not plan.parameters:
        return ""
    rows = []
    owner = ""
    for group in parameter_groups(plan):
        if group.owner and group.owner != owner:
            rows.append([group.owner, "", "", "", "", "", ""])
        owner = group.owner
        count = f"x{group.count}" if group.count > 1 else ""
        rows.append(
            [parameter_name(group), count, shape_words(group), group.stored, group.used, GATHER_WORDS[group.gather], moved_words(group)]
        )
    return "parameters\n" + _table(["", "", "shape", "stored", "used", "gathered", "moved"], rows, right=(1, 6))


def parameter_name(group: ParameterGroup) -> str:
    """The name below the repeated module it belongs to, set in under that."""
    return ("  " if group.owner else "") + group.name + ("" if group.trainable else " (frozen)")


def moved_words(group: ParameterGroup) -> str:
    return units.size(group.moved_bytes) if group.moved_bytes else ""


def shape_words(group: ParameterGroup) -> str:
    return units.shape(group.shapes[0]) if len(group.shapes) == 1 else f"{len(group.shapes)} shapes"


def segment_title(segment: SegmentPlan) -> str:
    times = f" (x{segment.count})" if segment.count > 1 else ""
    return f"{segment.name}{times}: {units.times(segment.length, 'operation')}"


def _segments(plan: Plan) -> str:
    axes = real_axes(plan)
    parts = []
    for segment, rows in segment_rows(plan):
        if rows:
            cells = [_op_cells(row, axes) for row in rows]
            parts.append(f"{segment_title(segment)}\n{_table(['', '', *axes, 'collectives'], cells)}")
    return "\n\n".join(parts)


def _op_cells(row: OpRow, axes: list[str]) -> list[str]:
    if not row.operators:
        return [names_words(row.names), "", *[""] * len(axes), ""]
    return [names_words(row.names), " ".join(row.operators), *(row.axes[axis] for axis in axes), ", ".join(collective_words(row))]


def names_words(names: tuple[str, ...]) -> str:
    """`self_attn.q_proj, k_proj, v_proj, mlp.up_proj`: a part that a name shares with the one before is not written again."""
    words = []
    owner = None
    for name in names:
        head, _, tail = name.rpartition(".")
        words.append(tail if head == owner else name)
        owner = head
    return ", ".join(words)


def collective_words(row: OpRow) -> list[str]:
    """`all-gather@tp 128 MiB`, `backward reduce-scatter@tp 128 MiB`, `2 all-to-all@tp 8.00 MiB both ways`."""
    counted = Counter((item.phase, KIND_WORDS[item.kind], item.axis, item.bytes) for item in row.collectives)
    words = []
    for (phase, kind, axis, size), count in counted.items():
        text = f"{kind}@{axis} {units.size(size)}"
        if counted.get(("forward", kind, axis, size)) == counted.get(("backward", kind, axis, size)):
            if phase == "backward":
                continue
            text += " both ways"
        elif phase == "backward":
            text = f"backward {text}"
        words.append(f"{count} {text}" if count > 1 else text)
    return words


def _collectives(plan: Plan) -> str:
    rows = [
        [row.axis, row.phase, row.kind, f"{row.count:,}", units.size(row.bytes), units.seconds(row.time_s), units.seconds(row.exposed_s)]
        for row in traffic(plan)
    ]
    if not rows:
        return "collectives: none"
    return "collectives a step, on one rank\n" + _table(
        ["axis", "phase", "", "count", "bytes", "time", "exposed"], rows, right=(3, 4, 5, 6)
    )


def _remarks(plan: Plan) -> str:
    lines = [_entry("pinned:      ", f"{pattern} to {text}") for pattern, text in plan.pins.items()]
    if plan.replicated:
        lines.append(_entry("replicated:  ", "no sharding rule, so every rank runs all of " + ", ".join(plan.replicated)))
    lines += [_entry("note:        ", note) for note in plan.notes]
    return "\n".join(lines)
