"""Why a parameter or operation is placed as it is: `autopar explain`. Works from the file alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autopar.errors import PlanError
from autopar.ir import folded_names, units
from autopar.ir.folded_names import Names, first, pattern
from autopar.ir.placement import local_shape, parse
from autopar.ir.plan import Alternative, Axes, CollectivePlan, OpPlan, ParameterPlan, Plan, SegmentPlan
from autopar.ir.plan_digest import KIND_WORDS, PHASES, WITHOUT_WORK, collectives_by_op, placements, real_axes, stage_group
from autopar.ir.plan_roles import Roles, is_heavy
from autopar.ir.plan_stages import RECEIVE, SEND, crossing_words, crossings, numbers_words, ranged, ranks_words
from autopar.report.explain_stage import explain_stage, stage_number
from autopar.report.terminal import heading, placed, table

MAX_SHOWN = 12
"""More matches of a glob than this are listed by name only."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a name stands for in a plan."""

    parameters: tuple[ParameterPlan, ...]
    ops: tuple[tuple[SegmentPlan, OpPlan], ...]


def find(plan: Plan, name: str) -> Found:
    """Parameters and operations that `name` means: a parameter, an operation, a module, or a glob over these.

    Raises `PlanError` with the nearest names where there is none.
    """
    is_glob = any(character in name for character in "*?[")

    def matches(candidate: str) -> bool:
        if candidate == name or ("{" in candidate and folded_names.stands_for(candidate, name)):
            return True
        return is_glob and (fnmatchcase(candidate, name) or fnmatchcase(first(candidate), name))

    parameters = tuple(item for item in plan.parameters if matches(item.name))
    every = [(segment, op) for segment in plan.segments for op in segment.ops]
    ops = tuple(row for row in every if matches(row[1].name))
    if not parameters and not ops:
        ops = tuple((segment, op) for segment, op in every if matches(op.module) or _same_repeat(op.module, segment, name))
    if not parameters and not ops:
        known = dict.fromkeys(
            [first(item.name) for item in plan.parameters] + [op.module for _, op in every] + [op.name for _, op in every]
        )
        known.pop("", None)
        near = [word for word in known if _letters(name) in _letters(word)] or _close(first(name), list(known))
        hint = f"; did you mean {' or '.join(f'`{word}`' for word in near[:4])}?" if near else "; `autopar show --full` lists all names"
        raise PlanError(f"`{name}` is no parameter, operation or module of this plan{hint}")
    return Found(parameters, ops)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", first(name).lower()) or name


def _close(name: str, known: list[str]) -> list[str]:
    """The known names nearest to `name`, which may be one component of theirs."""
    parts = {part for word in known for part in word.split(".")}
    nearest = get_close_matches(name.rsplit(".", 1)[-1], parts, 1, 0.7)
    return get_close_matches(name, known, 4, 0.7) or [word for word in known if nearest and nearest[0] in word.split(".")]


def _same_repeat(module: str, segment: SegmentPlan, name: str) -> bool:
    """Whether `name` is the module of a later repeat of an operation that the plan lists for the first repeat."""
    return (
        segment.count > 1 and module != name and pattern(module) == pattern(name) and folded_names.stands_for(ranged(module, segment), name)
    )


def explain(plan: Plan, name: str, console: Console, instead: str | None = None) -> None:
    """Print where what `name` means lies, what it costs to lie there, and what each alternative would cost.

    `instead` names a storage, such as `"S(0)@tp"`, that is asked about in particular. Raises `PlanError` where the name means
    nothing, or where `instead` cannot be read or is not for a parameter. `stage 1` means a stage of a pipeline.
    """
    if (stage := stage_number(plan, name)) is not None:
        if instead is not None:
            raise PlanError(f"`{name}` is a stage; --instead asks about the storage of a parameter, so name a parameter")
        explain_stage(plan, stage, console)
        return
    found = find(plan, name)
    roles = Roles.of(plan)
    if instead is not None and not found.parameters:
        raise PlanError(f"`{name}` is an operation; --instead asks about the storage of a parameter, so name a parameter")
    for number, parameter in enumerate(found.parameters[:MAX_SHOWN]):
        if number:
            console.print()
        _parameter(plan, parameter, roles, console, instead)
    for number, (segment, op) in enumerate(found.ops[: max(0, MAX_SHOWN - len(found.parameters))], len(found.parameters)):
        if number:
            console.print()
        _op(plan, segment, op, roles, console)
    rest = [item.name for item in found.parameters[MAX_SHOWN:]] + [op.name for _, op in found.ops][
        max(0, MAX_SHOWN - len(found.parameters)) :
    ]
    if rest:
        console.print()
        console.print(Text(f"{len(rest)} more match: {', '.join(rest)}", style="dim"))


def _facts(rows: list[tuple[str, RenderableType]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(name, text)
    return Padding(grid, (0, 0, 0, 2))


def _parameter(plan: Plan, parameter: ParameterPlan, roles: Roles, console: Console, instead: str | None) -> None:
    count = folded_names.count(parameter.name)
    remark = f"{units.shape(parameter.shape)} {parameter.dtype}" + (f", {count} of them" if count > 1 else "")
    alternatives = _alternatives(plan, parameter, instead)
    console.print(heading(parameter.name, remark + ("" if parameter.trainable else ", frozen") + _stage_words(plan, parameter.stage)))
    mesh = plan.stage_mesh(parameter.stage)
    local = local_shape(parameter.shape, tuple(parse(text) for text in parameter.stored.values()), tuple(mesh.values()))
    rows: list[tuple[str, RenderableType]] = [
        ("stored", placed(f"{placements(parameter.stored, mesh)}   {units.shape(local)} on each rank")),
        ("used", placed(placements(parameter.used, mesh))),
    ]
    rows += [(axis, axis_words(parameter, axis)) for axis in real_axes(plan, parameter.stage)]
    if others := [item.stage for item in plan.parameters if item.name == parameter.name and item.stage != parameter.stage]:
        rows.append(("tied", f"also read by {numbers_words('stage', others)}: gradients are summed over them, and values kept equal"))
    if parameter.trainable and plan.model.training:
        rows.append(("also", "its gradient and optimizer state lie as it is stored"))
    rows += [("pinned", f"by `{glob}` to {text}") for glob, text in plan.pins.items() if _pinned(parameter.name, glob)]
    rows += [("read by", _op_words(plan, segment, op, roles)) for segment, op in _readers(plan, parameter)]
    console.print(_facts(rows))
    console.print(Padding(alternatives, (1, 0, 0, 2)))
    names = Names([parameter.name])
    _collectives(
        [
            item
            for item in plan.collectives
            if item.stage == parameter.stage and any(names.find(text) or text == parameter.name for text in (item.op, item.value))
        ],
        console,
    )


def _stage_words(plan: Plan, stage: int) -> str:
    return f", stage {stage} on ranks {ranks_words(plan.groups[stage_group(plan, stage)])}" if plan.pipeline else ""


def _pinned(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(first(name), glob)


def _readers(plan: Plan, parameter: ParameterPlan) -> list[tuple[SegmentPlan, OpPlan]]:
    """Operations in the parameter's own module that multiply, look up or normalise: the file does not say more."""
    owner = first(parameter.name.rpartition(".")[0])
    inside = [
        (segment, op)
        for segment in plan.segments
        for op in segment.ops
        if op.module == owner and segment.stage == parameter.stage and op.target not in WITHOUT_WORK
    ]
    return inside[:3] if len(inside) <= 3 else []


def axis_words(parameter: ParameterPlan, axis: str) -> str:
    """What happens to `parameter` over one axis in a step, in words."""
    stored, used = parse(parameter.stored[axis]), parse(parameter.used[axis])
    backward = parameter.trainable
    if stored == used:
        return (
            "split, and used as it is split: nothing moves"
            if stored.is_shard
            else "whole on every rank, which all compute the same with it"
        )
    if stored.is_shard and used.is_replicated:
        when = {
            "use": "gathered for each use, in the forward and again in the backward pass",
            "step": "gathered once a step",
            "never": "gathered",
        }
        gradient = ", its gradient reduce-scattered" if used.is_replicated and str(used) == "R/P" else ", its gradient cut locally"
        zero = {"use": " (ZeRO-3)", "step": " (ZeRO-1/2)"}.get(parameter.gather, "") if str(used) == "R/P" else ""
        return f"each rank keeps a part; {when[parameter.gather]}{gradient if backward else ''}{zero}"
    if stored.is_shard:
        return "stored split in another way than used: exchanged for each use" + (" and its gradient back" if backward else "")
    if used.is_shard:
        return "whole on every rank, which uses its part" + ("; the parts of the gradient are gathered" if backward else "")
    if str(used) == "R/P":
        return "whole on every rank" + ("; the gradient is all-reduced (data parallel)" if backward else "")
    return "whole on every rank; used as a term of a sum"


def _alternatives(plan: Plan, parameter: ParameterPlan, instead: str | None) -> RenderableType:
    mesh = plan.stage_mesh(parameter.stage)
    wanted = [] if instead is None else _asked(mesh, parameter, instead)
    if parameter.stored in wanted:
        return Text("That is how it is stored.")
    if not parameter.alternatives and plan.pipeline:
        return Text(
            "The file holds no alternatives for it: they are priced for plans without a pipeline.", style="yellow" if instead else "dim"
        )
    if not parameter.alternatives:
        return Text(
            "The file holds no alternatives for it; `autopar plan ... --alternatives` prices them.", style="yellow" if instead else "dim"
        )
    rows = list(parameter.alternatives)
    if instead is not None:
        rows = [item for item in rows if item.stored in wanted]
        if not rows:
            known = ", ".join(f"`{placements(item.stored, mesh)}`" for item in parameter.alternatives)
            return Text(f"`{instead}` was not priced; the file has {known}.", style="yellow")
    made = table("stored", "step", "", "memory", "", right=("step", "memory"), fold=("",))
    total = sum(plan.memory_bytes.values())
    chosen = Text.assemble(("chosen", "bold green"))
    made.add_row(placed(placements(parameter.stored, mesh)), units.seconds(plan.cost_s), chosen, units.size(total))
    for item in sorted(rows, key=lambda item: (item.cost_s is None, item.cost_s or 0.0)):
        made.add_row(placed(placements(item.stored, mesh)), *_price(plan, item))
    return made


def _price(plan: Plan, item: Alternative) -> tuple[str, str, str, str]:
    if item.cost_s is None:
        return "", "cannot", "", item.why
    change = item.cost_s / plan.cost_s - 1 if plan.cost_s > 0 else 0.0
    words = "the same" if abs(change) < 1e-9 else f"{'+' if change > 0 else '-'}{units.percent(abs(change))}"
    memory = "" if item.memory_bytes is None else units.size(item.memory_bytes)
    why = item.why or ("does not fit" if (item.memory_bytes or 0) > plan.predicted.memory_limit_bytes else "")
    return units.seconds(item.cost_s), words, memory, why


_STORAGE = re.compile(r"(S\(\s*\d{1,3}\s*(?:,\s*\d{1,6}\s*)?\)|R)(?:@(\w+))?")


def _asked(mesh: dict[str, int], parameter: ParameterPlan, instead: str) -> list[Axes]:
    """The storages that `instead` can mean: `S(0)@tp R@dp` names axes, a bare placement may be on any one axis."""
    if not instead.strip() or _STORAGE.sub("", instead).strip(" ,"):
        raise PlanError(f'--instead: `{instead}` is not a storage; write "S(0)@tp", "S(1)@dp S(0)@tp" or "R@dp"')
    named: dict[str, str] = {}
    bare: list[str] = []
    for text, axis in _STORAGE.findall(instead):
        if axis and axis not in mesh:
            raise PlanError(f"--instead: `{axis}` is not an axis of the mesh; it has {', '.join(mesh)}")
        placement = parse(text)
        if placement.is_shard and placement.dim >= len(parameter.shape):
            raise PlanError(
                f"--instead: `{placement}` splits dim {placement.dim} of {parameter.name}, which has {len(parameter.shape)} dims"
            )
        if axis:
            named[axis] = str(placement)
        else:
            bare.append(str(placement))
    base = {axis: named.get(axis, text) for axis, text in parameter.stored.items()}
    if not bare:
        return [base]
    if len(bare) > 1:
        raise PlanError('--instead: name the axis of each placement, such as "S(0)@tp R@dp"')
    return [{**base, axis: bare[0]} for axis in mesh if axis not in named]


def _op(plan: Plan, segment: SegmentPlan, op: OpPlan, roles: Roles, console: Console) -> None:
    remark = op.target + (f", in each of {segment.count} {segment.name}" if segment.count > 1 else "")
    console.print(heading(op.name, remark + _stage_words(plan, segment.stage)))
    mesh = plan.stage_mesh(segment.stage)
    rows: list[tuple[str, RenderableType]] = [("module", op.module or "the model itself")]
    rows += [(axis, _split_words(op, axis, roles, segment.stage)) for axis in real_axes(plan, segment.stage)]
    if op.module:
        own = [item for item in plan.parameters if item.stage == segment.stage and first(item.name).rpartition(".")[0] == op.module]
        rows += [
            ("reads", placed(f"{item.name} stored {placements(item.stored, mesh)} used {placements(item.used, mesh)}")) for item in own
        ]
    if segment.recompute:
        rows.append(("recomputed", f"in the backward pass, in the first {segment.recompute} of the {segment.count} repeats"))
    value = op.name.removeprefix("send_").removeprefix("receive_")
    rows += [("crosses", crossing_words(item)) for item in crossings(plan) if item.value == value]
    rules = [rule for rule in plan.given_rules if rule.target == op.target]
    rows += [("rule", Text(rule.words(), style="yellow" if rule.whole else "")) for rule in rules]
    if op.target in plan.replicated and not rules:
        rows.append(("rule", Text("none for this operator, so that every rank runs all of it", style="yellow")))
    console.print(_facts(rows))
    _collectives(collectives_by_op(plan).get((segment.stage, op.name), []), console)


def _split_words(op: OpPlan, axis: str, roles: Roles, stage: int) -> Text:
    split = op.split[axis]
    if op.target in WITHOUT_WORK:
        words = {RECEIVE: "receives ", SEND: "sends "}.get(op.target, "passes on ")
        return Text(words).append_text(placed(op.output.get(axis, "R") if op.target != SEND else split))
    if split.split("/")[0] == "replicate":
        words = "every rank does all of the work"
    elif split == "partial":
        words = "linear: works on terms of a sum and gives terms of a sum"
    else:
        role = roles.role(op, axis, stage) if is_heavy(op) else ""
        words = f"split `{split}`" + (f" ({role})" if role else "")
    return Text(f"{words}, result ").append_text(placed(op.output[axis]))


def _op_words(plan: Plan, segment: SegmentPlan, op: OpPlan, roles: Roles) -> RenderableType:
    axes = real_axes(plan, segment.stage)
    parts = [f"{axis} {roles.role(op, axis, segment.stage) or op.split[axis]} {op.output[axis]}" for axis in axes]
    return placed(f"{op.name}: {', '.join(parts)}")


def _collectives(items: list[CollectivePlan], console: Console) -> None:
    if not items:
        console.print(Padding(Text("No collective serves it.", style="dim"), (1, 0, 0, 2)))
        return
    made = table(
        "collective", "axis", "phase", "each", "times", "time a step", "exposed", right=("each", "times", "time a step", "exposed")
    )
    for item in sorted(items, key=lambda item: (PHASES.index(item.phase), item.axis, item.kind)):
        amounts = (units.seconds(item.time_s * item.count), units.seconds(item.exposed_s * item.count))
        made.add_row(KIND_WORDS[item.kind], item.axis, item.phase, units.size(item.bytes), f"{item.count:,}", *amounts)
    console.print(Padding(made, (1, 0, 0, 2)))
