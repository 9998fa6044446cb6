"""A plan as plain text: what `print(plan)` shows. The terminal's version with colours is `autopar.report.show`."""

from __future__ import annotations

import textwrap
from collections import Counter

from autopar.ir import units
from autopar.ir.experts import EXPERTS
from autopar.ir.folded_names import pattern
from autopar.ir.plan import InputPlan, OutputPlan, Plan, SegmentPlan
from autopar.ir.plan_digest import (
    KIND_WORDS,
    OpRow,
    ParameterGroup,
    Traffic,
    gap_words,
    join,
    joined_segment_rows,
    memory_words,
    parameter_groups,
    real_axes,
    traffic,
)
from autopar.ir.plan_roles import GATHER_WORDS, Roles
from autopar.ir.plan_stages import (
    StageRow,
    accumulation_words,
    alike_stages,
    candidate_words,
    crossing_words,
    crossings,
    numbers_words,
    recompute_words,
    schedule_words,
    sizes_words,
    stage_rows,
)
from autopar.ir.precision import Precision

WIDTH = 120
LEGEND = (
    "S(d): split along dim d; R: whole on every rank; R/P: whole, its gradient summed over the axis; P(sum): terms of a sum\n"
    "beside operations: collectives of one repeat that move what is computed; what parameters move in a step stands with them"
)


def summary(plan: Plan) -> str:
    """The plan in a page or two: what it is for, what it costs, how each axis is used, parameters, layers, collectives."""
    roles = Roles.of(plan)
    parts = [_header(plan, roles), _stages(plan), _candidates(plan), _inputs(plan), _parameters(plan), _segments(plan)]
    parts += [_collectives(plan), _remarks(plan), LEGEND]
    return "\n\n".join(part for part in parts if part)


def model_words(plan: Plan) -> str:
    mode = "training" if plan.model.training else "evaluation"
    return f"{plan.model.name}, {mode}: {units.number(plan.model.parameters)} parameters, {units.times(plan.model.operations, 'operation')}"


def cluster_words(plan: Plan) -> str:
    cluster = plan.cluster
    nodes = f"{units.times(cluster.nodes, 'node')} of {cluster.devices_per_node} " if cluster.nodes > 1 else f"{cluster.devices_per_node} "
    return f"{cluster.name}: {nodes}x {cluster.device}, {units.size(cluster.memory_bytes)} each"


def mesh_words(plan: Plan) -> str:
    sizes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    if plan.pipeline and len(plan.mesh) == 1:  # the meshes of its groups differ
        sizes = " + ".join(sizes_words(group.mesh) for group in plan.groups)
    return f"{sizes} = {units.times(plan.world_size, 'rank')}"


def time_words(plan: Plan) -> str:
    predicted = plan.predicted
    parts = [f"{units.seconds(predicted.compute_s)} computing", f"{units.seconds(predicted.communication_s)} exposed communication"]
    if plan.pipeline is None and plan.microbatches == 1:
        words = f"{units.seconds(predicted.cost_s)} a step = {' + '.join(parts)}"
        return words + (f"; {units.seconds(predicted.step_s)} simulated" if predicted.step_s else "")
    if plan.pipeline:
        parts.append(f"bubble {units.percent(predicted.bubble)} of computing")
    return f"{units.seconds(predicted.cost_s)} a step, simulated: {', '.join(parts)}"


def axis_rows(plan: Plan, roles: Roles) -> list[tuple[str, str]]:
    """What each axis is used for; told by stage where stages use it differently."""
    rows = []
    for axis in real_axes(plan):
        found = roles.by_stage(axis)
        for stages, words in found:
            rows.append((f"  {axis}", words if len(found) == 1 else f"{numbers_words('stage', stages)}: {words}"))
    return rows


def pipeline_rows(plan: Plan) -> list[tuple[str, str]]:
    """How the batch goes through: schedule, stages, microbatches, what is computed twice."""
    rows = []
    if plan.pipeline:
        rows.append(("pipeline", schedule_words(plan)))
    elif words := accumulation_words(plan):
        rows.append(("batch", words))
    if recomputed := recompute_words(plan):
        rows.append(("recomputed", recomputed))
    return rows


def dropping_words(plan: Plan) -> str:
    """Whether experts may drop rows under the plan; empty where they cannot."""
    dropping = any(
        name.startswith("n+e/") for segment in plan.segments for op in segment.ops if op.target == EXPERTS for name in op.split.values()
    )
    return f"may drop rows: each takes at most {plan.expert_capacity:g} times the mean from every rank" if dropping else ""


def precision_words(precision: Precision) -> str:
    """`bfloat16, by autocast; parameters stored in float32, gradients reduced in float32`."""
    return (
        f"{precision.compute}, by {precision.by}; what is read so is stored in {precision.stored}, and its gradients reduced in "
        f"{precision.reduce}"
    )


def _header(plan: Plan, roles: Roles) -> str:
    rows = [
        ("plan", f"{plan.name} (effort {plan.predicted.effort}, optimizer {plan.predicted.optimizer})"),
        ("model", model_words(plan)),
        ("cluster", cluster_words(plan)),
        ("mesh", mesh_words(plan)),
        *axis_rows(plan, roles),
        *pipeline_rows(plan),
        *([("precision", precision_words(plan.precision))] if plan.precision else []),
        *([("experts", dropping)] if (dropping := dropping_words(plan)) else []),
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


STAGE_COLUMNS = ("stage", "layers", "ranks", "mesh", "forward", "backward", "recomputed", "memory", "sends")


def stage_cells(run: list[StageRow], names: bool = True) -> tuple[str, ...]:
    """The cells of `STAGE_COLUMNS` for a run of stages that are told together; `names`: with those of the values sent."""
    row, last = run[0], run[-1]
    each = " each" if len(run) > 1 else ""
    sends = ""
    if row.sends_bytes or row.sends:
        sent = ", ".join(row.sends[:2]) + (f" and {len(row.sends) - 2} more" if len(row.sends) > 2 else "")
        sends = f"{units.size(row.sends_bytes)} in {units.seconds(row.transfer_s)}" + (f": {sent}" if sent and names and not each else each)
    memory = sorted(item.memory_bytes for item in run if item.memory_bytes is not None)
    sizes = list(dict.fromkeys(map(units.size, memory)))
    recomputed = f"{row.recomputed} of {row.repeats}{each}" if row.recomputed else ""
    ranks = sorted(int(number) for item in (row, last) for number in item.ranks.split("-"))
    return (
        f"{row.number}-{last.number}" if each else str(row.number),
        f"{row.name.split(' .. ')[0]} .. {last.name.split(' .. ')[-1]}" if each else row.name,
        f"{ranks[0]}-{ranks[-1]}" if each else row.ranks,
        row.mesh, units.seconds(row.forward_s), units.seconds(row.backward_s), recomputed,
        f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else "".join(sizes), sends,
    )  # fmt: skip


def _stages(plan: Plan) -> str:
    rows = [list(stage_cells(run)) for run in alike_stages(stage_rows(plan))]
    if not rows:
        return ""
    columns = [column for column in range(len(STAGE_COLUMNS)) if any(row[column] for row in rows)]
    picked = [[row[column] for column in columns] for row in rows]
    right = tuple(place for place, column in enumerate(columns) if STAGE_COLUMNS[column] in ("forward", "backward", "recomputed", "memory"))
    text = "stages, times of one microbatch\n" + _table([STAGE_COLUMNS[column] for column in columns], picked, right)
    relayed = [crossing_words(item) for item in crossings(plan) if len(item.stages) > 2]
    return "\n".join([text, *(_entry("  handed on: ", words) for words in relayed)])


CANDIDATE_COLUMNS = ("groups", "plan", "step", "bubble", "communication", "memory", "")


def candidate_cells(plan: Plan) -> list[tuple[str, ...]]:
    """The cells of `CANDIDATE_COLUMNS`, a row a candidate."""
    return [
        (
            str(item.groups), item.what,
            "" if item.cost_s is None else units.seconds(item.cost_s),
            "" if item.bubble is None else units.percent(item.bubble),
            "" if item.communication_s is None else units.seconds(item.communication_s),
            "" if item.memory_bytes is None else units.size(item.memory_bytes),
            candidate_words(plan, item),
        )
        for item in plan.candidates
    ]  # fmt: skip


def _candidates(plan: Plan) -> str:
    rows = [list(cells) for cells in candidate_cells(plan)]
    return f"{CANDIDATES_TITLE}\n{_table(list(CANDIDATE_COLUMNS), rows, right=(0, 2, 3, 4, 5))}" if rows else ""


CANDIDATES_TITLE = "best plan for each depth of pipeline (groups of ranks that share the stages)"


def tensor_rows(plan: Plan) -> list[tuple[str, str, InputPlan | OutputPlan]]:
    """Inputs and outputs, each with its word and its path; what several stages read alike is told once, else with the stages."""
    rows: dict[tuple[object, ...], tuple[str, InputPlan | OutputPlan, list[int]]] = {}
    told: Counter[tuple[str, str]] = Counter()
    for word, tensors in (("input", plan.inputs), ("output", plan.outputs)):
        for item in tensors:
            key = word, item.path, item.shape, item.dtype, *item.placement.items()
            if key not in rows:
                rows[key] = (word, item, [])
                told[word, item.path] += 1
            rows[key][2].append(item.stage)
    return [
        (word, item.path + (f" ({numbers_words('stage', sorted(stages))})" if told[word, item.path] > 1 else ""), item)
        for word, item, stages in rows.values()
    ]


def _inputs(plan: Plan) -> str:
    axes = real_axes(plan)
    rows = [
        [word, path, units.shape(item.shape), item.dtype, *(item.placement.get(axis, "") for axis in axes)]
        for word, path, item in tensor_rows(plan)
    ]
    return "inputs and outputs\n" + _table(["", "", "global shape", "dtype", *axes], rows) if rows else ""


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
    tied = f" (tied: {numbers_words('stage', list(group.tied))})" if group.tied else ""
    return ("  " if group.owner else "") + group.name + ("" if group.trainable else " (frozen)") + tied


def moved_words(group: ParameterGroup) -> str:
    return units.size(group.moved_bytes) if group.moved_bytes else ""


def shape_words(group: ParameterGroup) -> str:
    return units.shape(group.shapes[0]) if len(group.shapes) == 1 else f"{len(group.shapes)} shapes"


def segment_title(plan: Plan, segments: list[SegmentPlan]) -> str:
    """`stages 0-1 model.layers.{0-31} (x16 each, 4 recomputed), stage 2 ...: 17 operations`."""
    alike: dict[tuple[int, int], list[SegmentPlan]] = {}
    for segment in segments:
        alike.setdefault((segment.count, segment.recompute), []).append(segment)
    words = []
    for (count, recomputed), found in alike.items():
        each = " each" if len(found) > 1 else ""
        notes = [f"x{count}{each}"] * (count > 1) + [f"{recomputed} recomputed" if count > 1 else "recomputed"] * (recomputed > 0)
        name = join(list(dict.fromkeys(segment.name for segment in found)), pattern(found[0].name))
        where = f"{numbers_words('stage', sorted({segment.stage for segment in found}))} " if plan.pipeline else ""
        words.append(where + name + (f" ({', '.join(notes)})" if notes else ""))
    return f"{', '.join(words)}: {units.times(segments[0].length, 'operation')}"


def _segments(plan: Plan) -> str:
    parts = []
    for segments, rows in joined_segment_rows(plan):
        axes = real_axes(plan, segments[0].stage)
        if rows:
            cells = [_op_cells(row, axes) for row in rows]
            parts.append(f"{_entry('', segment_title(plan, segments))}\n{_table(['', '', *axes, 'collectives'], cells)}")
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
    """`all-gather@tp 128 MiB`, `backward reduce-scatter@tp 128 MiB in 1 of 32`, `2 all-to-all@tp 8.00 MiB both ways`."""
    counted = Counter((item.phase, KIND_WORDS[item.kind], item.axis, item.bytes, row.share(item)) for item in row.collectives)
    words = []
    for (phase, kind, axis, size, share), count in counted.items():
        text = f"{kind}@{axis} {units.size(size)}"
        if counted.get(("forward", kind, axis, size, share)) == counted.get(("backward", kind, axis, size, share)):
            if phase == "backward":
                continue
            text += " both ways"
        elif phase == "backward":
            text = f"backward {text}"
        words.append((f"{count} {text}" if count > 1 else text) + share)
    return words


def _collectives(plan: Plan) -> str:
    rows = [
        [row.axis, row.phase, row.kind, f"{row.count:,}", units.size(row.bytes), units.seconds(row.time_s), units.seconds(row.exposed_s)]
        + [groups_words(plan, row)] * bool(plan.pipeline)
        for row in traffic(plan)
    ]
    if not rows:
        return "collectives: none"
    header = ["axis", "phase", "", "count", "bytes", "time", "exposed"] + ["of"] * bool(plan.pipeline)
    return "collectives a step, on one rank\n" + _table(header, rows, right=(3, 4, 5, 6))


def groups_words(plan: Plan, row: Traffic) -> str:
    """Whose ranks run these collectives: `stages 0-2`."""
    if plan.pipeline is None or len(row.groups) == len(plan.groups):
        return "all stages" if plan.pipeline else ""
    return numbers_words("stage", [number for number, stage in enumerate(plan.pipeline.stages) if stage.group in row.groups])


def _remarks(plan: Plan) -> str:
    lines = [_entry("pinned:      ", f"{pattern} to {text}") for pattern, text in plan.pins.items()]
    if plan.replicated:
        lines.append(_entry("replicated:  ", "no sharding rule, so every rank runs all of " + ", ".join(plan.replicated)))
    lines += [_entry("rule:        ", f"{rule.subject}: {rule.words()}") for rule in plan.given_rules]
    lines += [_entry("note:        ", note) for note in plan.notes]
    return "\n".join(lines)
