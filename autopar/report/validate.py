"""Whether a plan holds together: `autopar validate`. By itself, and against the graph of a model. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from autopar.ir import folded_names, units
from autopar.ir.plan import Axes, Plan

if TYPE_CHECKING:  # what knows rules and graphs is imported when a model is there
    from autopar.ir.assignment import Assignment
    from autopar.ir.conversion import State
    from autopar.ir.graph import Graph
    from autopar.ir.pipelining.stages import Stage


MOST_PASSES = 100_000
"""Repeats times microbatches: a plan of more is not simulated only to be validated."""


def contradictions(plan: Plan) -> list[str]:
    """Derived fields of a sound plan that do not follow from its decisions, as far as the file alone can tell."""
    return [*_gather(plan), *_sums(plan), *_simulated(plan)]


def _gather(plan: Plan) -> Iterator[str]:
    for parameter in plan.parameters:
        mesh = plan.stage_mesh(parameter.stage)
        where = f"parameter `{parameter.name}`" + (f" in stage {parameter.stage}" if plan.pipeline else "")
        whole = [
            axis
            for axis, text in parameter.stored.items()
            if mesh[axis] > 1 and text.startswith("S(") and parameter.used[axis] in ("R", "R/P")
        ]
        if whole and parameter.gather == "never":
            yield f'{where} is stored split on `{whole[0]}` and used whole; write "gather": "use" or "step"'
        if parameter.gather != "never" and parameter.stored == parameter.used:
            yield f'{where} is used as it is stored; write "gather": "never" instead of "{parameter.gather}"'


def _sums(plan: Plan) -> Iterator[str]:
    predicted = plan.predicted
    parts = predicted.compute_s + predicted.communication_s
    if plan.pipeline is None and plan.microbatches == 1 and not _near(parts, predicted.cost_s):
        yield f"predicted.cost_s is {predicted.cost_s}, but computing and communication add up to {parts}"
    if plan.world_size > plan.cluster.nodes * plan.cluster.devices_per_node:
        devices = plan.cluster.nodes * plan.cluster.devices_per_node
        yield f"the mesh has {plan.world_size} ranks and the cluster {devices} devices; use a smaller mesh or another cluster"
    numel = _numel(plan)
    if numel != plan.model.parameters:
        yield f"model.parameters is {plan.model.parameters}, but the parameters listed have {numel} elements"


def _numel(plan: Plan) -> int:
    """Elements of the parameters listed; a tied weight, which several stages list, counts once."""
    rows: dict[str, int] = {}
    shared: dict[str, list[tuple[int, str, int]]] = {}
    for item in plan.parameters:
        rows[item.name] = prod(item.shape) * folded_names.count(item.name)
        shared.setdefault(folded_names.pattern(item.name), []).append((item.stage, item.name, prod(item.shape)))
    total = sum(rows.values())
    for found in shared.values():
        if plan.pipeline and len({stage for stage, _, _ in found}) > 1:
            # Stages may fold a weight that they share with others into ranges of their own.
            names = {name: length for _, row, length in found for name in folded_names.expand(row)}
            total += sum(names.values()) - sum(rows[row] for row in {row for _, row, _ in found})
    return total


def _simulated(plan: Plan) -> Iterator[str]:
    """What the simulator says against what the file says of it; files of before it was asked say nothing."""
    predicted = plan.predicted
    if predicted.fits and predicted.stage_memory_bytes and max(predicted.stage_memory_bytes) > predicted.memory_limit_bytes:
        peak = units.size(max(predicted.stage_memory_bytes))
        yield f"predicted.fits is true, but a group of ranks needs {peak} of {units.size(predicted.memory_limit_bytes)}"
    if predicted.step_s and plan.microbatches * sum(segment.count for segment in plan.segments) <= MOST_PASSES:
        from autopar.search.simulator.simulate import simulate

        simulation = simulate(plan)
        if _differ(simulation.step_s, predicted.step_s):
            step_s = simulation.step_s
            yield f"predicted.step_s is {predicted.step_s:.6g}, but the simulator makes it {step_s:.6g} from the costs of the segments"
        for group, (said, found) in enumerate(zip(predicted.stage_memory_bytes, simulation.peak_bytes, strict=False)):
            if _differ(said, found):
                place = f"predicted.stage_memory_bytes[{group}]"
                yield f"{place} is {units.size(said)}, but the simulator makes it {units.size(found)} from the costs of the segments"


def _differ(a: float, b: float) -> bool:
    return abs(a - b) > 0.01 * max(a, b)


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))


def contradictions_with(plan: Plan, graph: Graph) -> list[str]:
    """Where `plan` says other than what follows from its decisions for `graph`.

    Raises `PlanMismatchError` where it is a plan for another graph, `PlanError` where its decisions cannot run.
    """
    from autopar.ir.assignment import expand_stages

    expanded = expand_stages(plan, graph)
    found = [*contradictions(plan), *_tensors(plan, graph)]
    for stage, assignment in zip(expanded.stages, expanded.assignments, strict=True):
        found += [*_outputs(plan, stage, assignment), *_used(plan, stage, assignment)]
    return found


def _axes(assignment: Assignment, state: State) -> Axes:
    return {axis: str(placement) for axis, placement in zip(assignment.axes, state, strict=True)}


def _words(axes: Axes) -> str:
    return " ".join(f"{text}@{axis}" for axis, text in axes.items())


def _outputs(plan: Plan, stage: Stage, assignment: Assignment) -> Iterator[str]:
    for segment in plan.segments:
        for op in segment.ops if segment.stage == stage.index else ():
            states = assignment.output_states(stage.graph.ops[stage.graph.op_index[op.name]])
            if states and (found := _axes(assignment, states[0])) != op.output:
                where = f"operation `{op.name}` in {op.module or 'the model'}"
                yield f"{where}: its splits give {_words(found)}, the plan says {_words(op.output)}"


def _tensors(plan: Plan, graph: Graph) -> Iterator[str]:
    for word, rows, tensors in (("input", plan.inputs, graph.inputs), ("output", plan.outputs, graph.outputs)):
        listed = {row.path: (row.shape, row.dtype) for row in rows}
        wanted = {item.path: (graph.values[item.value].shape, graph.values[item.value].dtype) for item in tensors}
        for path in dict.fromkeys([*listed, *wanted]):
            if path not in listed:
                if word == "output" or plan.microbatches == 1:  # else it may be read before the stages only
                    yield f"{word} `{path}` of the model is not in the plan"
            elif path not in wanted:
                if not path.startswith("@"):  # computed before the stages
                    yield f"{word} `{path}` of the plan is not in the model"
            elif listed[path] != wanted[path]:
                yield f"{word} `{path}` is {wanted[path]} in the model and {listed[path]} in the plan"


def _used(plan: Plan, stage: Stage, assignment: Assignment) -> Iterator[str]:
    """`used` must be what one of the operations that read the parameter wants it in."""
    graph = stage.graph
    values = {parameter.fqn: parameter.value for parameter in graph.parameters}
    for row in plan.parameters:
        if row.stage != stage.index:
            continue
        value = values[folded_names.expand(row.name)[0]]
        wanted = [
            _axes(assignment, state)
            for op in graph.consumers[value]
            for name, state in zip(op.operands, assignment.operand_states(op), strict=True)
            if name == value
        ]
        if wanted and row.used not in wanted:
            texts = " or ".join(dict.fromkeys(map(_words, wanted)))
            yield f"parameter `{row.name}`: operations read it as {texts}, the plan says {_words(row.used)}"
