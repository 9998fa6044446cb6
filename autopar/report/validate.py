"""Whether a plan holds together: `autopar validate`. By itself, and against the graph of a model. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from autopar.ir import folded_names
from autopar.ir.assignment import Assignment, expand
from autopar.ir.conversion import State
from autopar.ir.graph import Graph
from autopar.ir.plan import Axes, Plan


def contradictions(plan: Plan) -> list[str]:
    """Derived fields of a sound plan that do not follow from its decisions, as far as the file alone can tell."""
    return [*_gather(plan), *_sums(plan)]


def _gather(plan: Plan) -> Iterator[str]:
    for parameter in plan.parameters:
        whole = [
            axis
            for axis, text in parameter.stored.items()
            if plan.mesh[axis] > 1 and text.startswith("S(") and parameter.used[axis] in ("R", "R/P")
        ]
        if whole and parameter.gather == "never":
            yield f'parameter `{parameter.name}` is stored split on `{whole[0]}` and used whole; write "gather": "use" or "step"'
        if parameter.gather != "never" and parameter.stored == parameter.used:
            yield f'parameter `{parameter.name}` is used as it is stored; write "gather": "never" instead of "{parameter.gather}"'


def _sums(plan: Plan) -> Iterator[str]:
    predicted = plan.predicted
    parts = predicted.compute_s + predicted.communication_s
    if not _near(parts, predicted.cost_s):
        yield f"predicted.cost_s is {predicted.cost_s}, but computing and communication add up to {parts}"
    if plan.world_size > plan.cluster.nodes * plan.cluster.devices_per_node:
        devices = plan.cluster.nodes * plan.cluster.devices_per_node
        yield f"the mesh has {plan.world_size} ranks and the cluster {devices} devices; use a smaller mesh or another cluster"
    try:
        numel = sum(_numel(parameter.shape) * folded_names.count(parameter.name) for parameter in plan.parameters)
    except ValueError as error:
        raise AssertionError("the plan was checked when loaded") from error
    if numel != plan.model.parameters:
        yield f"model.parameters is {plan.model.parameters}, but the parameters listed have {numel} elements"


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))


def contradictions_with(plan: Plan, graph: Graph) -> list[str]:
    """Where `plan` says other than what follows from its decisions for `graph`.

    Raises `PlanMismatchError` where it is a plan for another graph, `PlanError` where its decisions cannot run.
    """
    assignment = expand(plan, graph)
    return [*contradictions(plan), *_outputs(plan, graph, assignment), *_tensors(plan, graph), *_used(plan, graph, assignment)]


def _axes(plan: Plan, state: State) -> Axes:
    return {axis: str(placement) for axis, placement in zip(plan.mesh, state, strict=True)}


def _words(axes: Axes) -> str:
    return " ".join(f"{text}@{axis}" for axis, text in axes.items())


def _outputs(plan: Plan, graph: Graph, assignment: Assignment) -> Iterator[str]:
    for segment in plan.segments:
        for op in segment.ops:
            states = assignment.output_states(graph.ops[graph.op_index[op.name]])
            if states and (found := _axes(plan, states[0])) != op.output:
                where = f"operation `{op.name}` in {op.module or 'the model'}"
                yield f"{where}: its splits give {_words(found)}, the plan says {_words(op.output)}"


def _tensors(plan: Plan, graph: Graph) -> Iterator[str]:
    for word, rows, tensors in (("input", plan.inputs, graph.inputs), ("output", plan.outputs, graph.outputs)):
        listed = {row.path: (row.shape, row.dtype) for row in rows}
        wanted = {item.path: (graph.values[item.value].shape, graph.values[item.value].dtype) for item in tensors}
        for path in dict.fromkeys([*listed, *wanted]):
            if path not in listed:
                yield f"{word} `{path}` of the model is not in the plan"
            elif path not in wanted:
                yield f"{word} `{path}` of the plan is not in the model"
            elif listed[path] != wanted[path]:
                yield f"{word} `{path}` is {wanted[path]} in the model and {listed[path]} in the plan"


def _used(plan: Plan, graph: Graph, assignment: Assignment) -> Iterator[str]:
    """`used` must be what one of the operations that read the parameter wants it in."""
    values = {parameter.fqn: parameter.value for parameter in graph.parameters}
    for row in plan.parameters:
        value = values[folded_names.expand(row.name)[0]]
        wanted = [
            _axes(plan, state)
            for op in graph.consumers[value]
            for name, state in zip(op.operands, assignment.operand_states(op), strict=True)
            if name == value
        ]
        if wanted and row.used not in wanted:
            texts = " or ".join(dict.fromkeys(map(_words, wanted)))
            yield f"parameter `{row.name}`: operations read it as {texts}, the plan says {_words(row.used)}"
