"""What a plan says, gathered for reading: groups of parameters, the operations that matter, collectives by kind.

Plain data for the plain text (`plan_text`) and for the terminal (`autopar.report`), so that both say the same. No torch.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from autopar.ir import folded_names, units
from autopar.ir.folded_names import Names, first, pattern
from autopar.ir.plan import Axes, CollectivePlan, OpPlan, ParameterPlan, Plan, SegmentPlan
from autopar.ir.plan_roles import Roles, is_heavy, operator_words

WITHOUT_WORK = ("autopar.reshard", "autopar.receive", "autopar.send")
KIND_WORDS = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "shift": "shift",
}
PHASES = ("forward", "backward", "gradient")


def placements(axes: Axes, mesh: dict[str, int]) -> str:
    """`S(1)@dp S(0)@tp`; axes of one rank and `R` are left out, `R` alone stands for the whole on every rank."""
    return " ".join(f"{text}@{axis}" for axis, text in axes.items() if mesh[axis] > 1 and text != "R") or "R"


def real_axes(plan: Plan, stage: int | None = None) -> list[str]:
    """The axes with more than one rank in `stage`, or in any."""
    meshes = [group.mesh for group in plan.groups] if stage is None else [plan.stage_mesh(stage)]
    return list(dict.fromkeys(axis for mesh in meshes for axis, size in mesh.items() if size > 1))


def gap_words(plan: Plan) -> str:
    """What is proven about the plan."""
    if plan.name != "searched":
        return f"none: `{plan.name}` is a given plan"
    if not plan.predicted.fits:
        return "no plan was found that fits; this is the one that needs least memory of those found"
    if plan.gap < 1e-9:
        return "optimal under the cost model"
    return f"at most {units.percent(plan.gap)} above the optimum (which is at least {units.seconds(plan.lower_bound_s)})"


def memory_words(plan: Plan) -> str:
    """`61.2 GiB of 72 GiB: fits, 10.8 GiB to spare`."""
    total, limit = sum(plan.memory_bytes.values()), plan.predicted.memory_limit_bytes
    verdict = (
        f"fits, {units.size(limit - total)} to spare" if plan.predicted.fits else f"does not fit: {units.size(total - limit)} are missing"
    )
    where = "on the ranks with most" if len(plan.groups) > 1 else "per rank"
    return f"{units.size(total)} of {units.size(limit)} {where}: {verdict}"


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that differ in numbers of their names only and lie alike; `shapes` has one entry unless theirs differ.

    `owner` is the repeated module they belong to, `model.layers.{0-31}`, and `name` what follows; `owner` is empty outside repeats.
    `moved_bytes`: what all of them, and their gradients, move in a step on one rank. `tied`: the stages that all read one of them, if
    more than one does.
    """

    owner: str
    name: str
    count: int
    shapes: tuple[tuple[int, ...], ...]
    stored: str
    used: str
    gather: str
    trainable: bool
    moved_bytes: int
    tied: tuple[int, ...] = ()


def parameter_groups(plan: Plan) -> list[ParameterGroup]:
    """The parameters, folded further than the file folds them: numbers in names that lie alike are joined or written `*`."""
    found: dict[tuple[str, ...], list[ParameterPlan]] = {}
    readers: dict[str, list[int]] = {}
    for item in plan.parameters:
        readers.setdefault(item.name, []).append(item.stage)
        mesh = plan.stage_mesh(item.stage)
        stored, used = placements(item.stored, mesh), placements(item.used, mesh)
        found.setdefault((pattern(item.name), stored, used, item.gather, str(item.trainable)), []).append(item)
    moved = _moved_bytes(plan)
    groups = []
    for (shared, stored, used, gather, _), items in found.items():
        names = list(dict.fromkeys(item.name for item in items))
        shapes = tuple(dict.fromkeys(item.shape for item in items))
        count = sum(map(folded_names.count, names))
        owner, name = split_owner(names[0] if len(names) == 1 else join(names, shared))
        by_group: Counter[int] = Counter()
        for item in items:
            by_group[stage_group(plan, item.stage)] += moved[item.stage, item.name]
        tied = tuple(readers[names[0]]) if len(names) == 1 and len(readers[names[0]]) > 1 else ()
        groups.append(ParameterGroup(owner, name, count, shapes, stored, used, gather, items[0].trainable, max(by_group.values()), tied))
    # Below one owner what belongs to it, where its first stands: stages and folds may list others between.
    places: dict[str, int] = {}
    for place, group in enumerate(groups):
        places.setdefault(group.owner or f"{place}", place)
    return sorted(groups, key=lambda group: places[group.owner] if group.owner else groups.index(group))


def stage_group(plan: Plan, stage: int) -> int:
    """The number of the group that runs `stage`."""
    return plan.pipeline.stages[stage].group if plan.pipeline else 0


def _moved_bytes(plan: Plan) -> Counter[tuple[int, str]]:
    """Bytes a step on one rank by stage and name of the parameter that they are of."""
    rows: dict[int, list[str]] = {}
    for item in plan.parameters:
        rows.setdefault(item.stage, []).append(item.name)
    names = {stage: Names(found) for stage, found in rows.items()}
    moved: Counter[tuple[int, str]] = Counter()
    for run in plan.collectives:
        known = names.get(run.stage)
        if known and (name := known.find(run.value) or known.find(first(run.value))) is not None:
            moved[run.stage, name] += run.bytes * run.count
    return moved


def split_owner(name: str) -> tuple[str, str]:
    """A folded name as its repeated module and the rest: `model.layers.{0-31}` and `mlp.up_proj.weight`."""
    match = re.match(r"(.*(?:\{[^{}]*\}|\*))\.(.+)", name)
    return (match[1], match[2]) if match else ("", name)


MAX_JOINED = 100_000
"""Names that stand for more are not written out to be joined."""


def join(names: list[str], shared: str) -> str:
    """One name for several of one pattern: `h.{0-11}.w` where only one number varies, else stars."""
    if sum(map(folded_names.count, names)) <= MAX_JOINED:
        single = list(dict.fromkeys(name for item in names for name in folded_names.expand(item)))
        if folded_names.alike(single) and (joined := folded_names.fold(single)).count("{") == 1:
            return joined
    return shared.replace("#", "*")


@dataclass(frozen=True, slots=True)
class OpRow:
    """Operations of one segment that are told in one line: `names` of their modules below the repeat, and what they do per axis.

    `collectives` are those that move what is computed; what parameters move is told with the parameters. They run in each of `repeats`
    and for each of `microbatches`, unless their own count is less. A row without `operators` stands for operations that do as those of a
    repeat, which `names` tells.
    """

    names: tuple[str, ...]
    operators: tuple[str, ...]
    axes: dict[str, str]
    collectives: tuple[CollectivePlan, ...]
    repeats: int = 1
    microbatches: int = 1

    def share(self, item: CollectivePlan) -> str:
        """` in 1 of 32`, where `item` of `collectives` does not run in every repeat; the first and the last often have such."""
        found = max(1, item.count // self.microbatches)
        return f" in {found} of {self.repeats}" if found < self.repeats else ""


def segment_rows(plan: Plan) -> list[tuple[SegmentPlan, list[OpRow]]]:
    """The segments with the rows to tell of each: operations that multiply or look up, and those that communicate. All others follow these.

    A fold may cut a layer anywhere, so that parts of a first or last layer stand outside of the repeats: where these do as the repeats
    do, one row says so.
    """
    roles = Roles.of(plan)
    serving = collectives_by_op(plan)
    repeated: dict[tuple[str, str], tuple[SegmentPlan, list[OpRow]]] = {}
    told = [(segment, [(op, _row(plan, segment, op, roles, serving)) for op in segment.ops]) for segment in plan.segments]
    for segment, pairs in told:
        if segment.count > 1:
            for op, row in pairs:
                repeated.setdefault((pattern(op.module), op.target), (segment, []))[1].append(row)
    result = []
    for segment, pairs in told:
        rows: list[OpRow] = []
        for op, row in pairs:
            like = repeated.get((pattern(op.module), op.target)) if segment.count == 1 else None
            if not is_heavy(op) and not row.collectives:
                continue
            if like is not None and any((row.axes, _kinds(row)) == (other.axes, _kinds(other)) for other in like[1]):
                row = OpRow((f"as in {like[0].name}",), (), {}, ())
            _append(rows, row)
        result.append((segment, rows))
    return result


def joined_segment_rows(plan: Plan) -> list[tuple[list[SegmentPlan], list[OpRow]]]:
    """`segment_rows`, with the segments of several stages joined where the same is to tell of them."""
    result: dict[tuple[object, ...], tuple[list[SegmentPlan], list[OpRow]]] = {}
    for segment, rows in segment_rows(plan):
        told = tuple(
            (row.names, row.operators, tuple(row.axes.items()), tuple((_moves(item), row.share(item)) for item in row.collectives))
            for row in rows
        )
        key = (pattern(segment.name), segment.length, told) if segment.count > 1 else (segment.stage, segment.start)
        result.setdefault(key, ([], rows))[0].append(segment)
    return list(result.values())


def _moves(item: CollectivePlan) -> tuple[str, str, str, int]:
    return item.kind, item.axis, item.phase, item.bytes


Serving = dict[tuple[int, str], list[CollectivePlan]]
"""By stage and name of an operation, the collectives that serve it."""


def _row(plan: Plan, segment: SegmentPlan, op: OpPlan, roles: Roles, serving: Serving) -> OpRow:
    axes = {axis: _axis_words(op, axis, roles, segment.stage) for axis in real_axes(plan, segment.stage)}
    served = tuple(serving.get((segment.stage, op.name), ()))
    return OpRow((_below(op.module, segment),), (operator_words(op.target),), axes, served, segment.count, plan.microbatches)


def _kinds(row: OpRow) -> set[tuple[str, str, str]]:
    return {(item.kind, item.axis, item.phase) for item in row.collectives}


def _append(rows: list[OpRow], row: OpRow) -> None:
    """`row`, joined to the one before where they differ in the module's name only."""
    last = rows[-1] if rows else None
    if last and (last.axes, last.collectives, last.operators) == (row.axes, row.collectives, row.operators):
        rows[-1] = replace(last, names=tuple(dict.fromkeys(last.names + row.names)))
    else:
        rows.append(row)


def _axis_words(op: OpPlan, axis: str, roles: Roles, stage: int) -> str:
    role = "" if op.target in WITHOUT_WORK else roles.role(op, axis, stage) or op.split[axis]
    return f"{role} {op.output[axis]}".strip() if role != "whole" else "whole"


def _below(module: str, segment: SegmentPlan) -> str:
    """`module` without the path of the repeat, whichever repeat of it: a fold may cut in the middle of a layer."""
    if segment.count == 1:
        return module or "(model)"
    depth = segment.name.count(".") + 1
    parts = module.split(".")
    if pattern(".".join(parts[:depth])) != pattern(segment.name):
        return module or "(model)"
    return ".".join(parts[depth:]) or "(layer)"


def collectives_by_op(plan: Plan) -> Serving:
    """The collectives that serve each listed operation, but for those that move parameters and their gradients."""
    parameters = Names(item.name for item in plan.parameters)
    by_op: dict[int, dict[str, list[CollectivePlan]]] = {}
    for item in plan.collectives:
        if item.phase != "gradient" and parameters.find(first(item.value)) is None:
            by_op.setdefault(item.stage, {}).setdefault(item.op, []).append(item)
    names = {stage: Names(served) for stage, served in by_op.items()}
    found: Serving = {}
    for segment in plan.segments:
        for op in segment.ops if segment.stage in names else ():
            for name in names[segment.stage].find_all(op.name):
                found.setdefault((segment.stage, op.name), []).extend(by_op[segment.stage][name])
    return found


@dataclass(frozen=True, slots=True)
class Traffic:
    """All collectives of one kind on one axis in one phase, a step: `bytes` on one rank, `items` from the most exposed down.

    `groups`: those of whose ranks it is said; more than one where their numbers are the same (`items` are the first's).
    """

    kind: str
    axis: str
    phase: str
    count: int
    bytes: int
    time_s: float
    exposed_s: float
    items: tuple[CollectivePlan, ...]
    groups: tuple[int, ...] = (0,)


def traffic(plan: Plan) -> list[Traffic]:
    """Collectives by axis, phase and kind, in that order, and by group of ranks where these differ."""
    found: dict[tuple[str, str, str], dict[int, list[CollectivePlan]]] = {}
    for item in plan.collectives:
        group = stage_group(plan, item.stage)
        found.setdefault((item.axis, item.phase, item.kind), {}).setdefault(group, []).append(item)
    axes = list(dict.fromkeys(axis for group in plan.groups for axis in group.mesh))
    keys = sorted(found, key=lambda key: (axes.index(key[0]), PHASES.index(key[1]), key[2]))
    return [row for key in keys for row in _traffic(*key, found[key])]


def _traffic(axis: str, phase: str, kind: str, by_group: dict[int, list[CollectivePlan]]) -> list[Traffic]:
    """One row for the groups of equal numbers: the middle of a pipeline is told once."""
    rows: dict[tuple[object, ...], Traffic] = {}
    for group, items in sorted(by_group.items()):
        items = sorted(items, key=lambda item: (-item.exposed_s * item.count, -item.bytes * item.count, item.value, item.op))
        row = Traffic(
            kind=KIND_WORDS[kind],
            axis=axis,
            phase=phase,
            count=sum(item.count for item in items),
            bytes=sum(item.bytes * item.count for item in items),
            time_s=sum(item.time_s * item.count for item in items),
            exposed_s=sum(item.exposed_s * item.count for item in items),
            items=tuple(items),
            groups=(group,),
        )
        same = row.count, row.bytes, units.seconds(row.time_s), units.seconds(row.exposed_s)
        rows[same] = replace(rows[same], groups=(*rows[same].groups, group)) if same in rows else row
    return list(rows.values())


def bytes_moved(plan: Plan) -> int:
    """Bytes of all collectives of a step, on one rank: of the group whose ranks move most."""
    moved: Counter[int] = Counter()
    for item in plan.collectives:
        moved[stage_group(plan, item.stage)] += item.bytes * item.count
    return max(moved.values(), default=0)
