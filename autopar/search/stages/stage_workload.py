"""From a candidate of the stage search to the simulator's input, and back to what the search wants to know."""

from __future__ import annotations

from autopar.ir.pipelining.schedules import named
from autopar.search.simulator.simulate import run
from autopar.search.simulator.workload import Flow, Links, Piece, Stage, Workload
from autopar.search.stages.stage_costs import Group
from autopar.search.stages.stage_search import Pipeline, Simulated


def workload_of(pipeline: Pipeline, felt_share: float = 0.0) -> Workload:
    """A stage is one piece; what crosses between machines shares their links with all else that does."""
    schedule = named(pipeline.schedule)
    groups = [schedule.group_of(stage, pipeline.groups) for stage in range(len(pipeline.stages))]
    found = []
    for number, stage in enumerate(pipeline.stages):
        cost, forward, back = stage.cost, None, None
        if number and groups[number] != groups[number - 1]:
            sender = pipeline.stages[number - 1].group
            forward = Flow(stage.transfer_s[0], _links(sender, stage.group))
            back = Flow(stage.transfer_s[1], _links(stage.group, sender))
        ring = _links(stage.group, stage.group)
        reduce_s = cost.after_s - cost.optimizer_s
        piece = Piece(
            f"units {stage.start}-{stage.stop - 1}",
            cost.forward_s,
            cost.backward_s,
            cost.weight_s,
            step_gather=(Flow(cost.before_s, ring, "gather"),) if cost.before_s else (),
            reduce=(Flow(reduce_s, ring, "reduce"),) if reduce_s > 0 else (),
            optimizer_s=cost.optimizer_s,
            activation_bytes=cost.live_bytes,
            parameter_bytes=cost.fixed_bytes,
            workspace_bytes=cost.workspace_bytes,
            backward_workspace_bytes=cost.workspace_bytes,
            input_workspace_bytes=cost.workspace_bytes,
        )
        found.append(Stage(f"stage {number}", groups[number], (piece,), forward, back))
    orders = schedule.orders(pipeline.groups, len(groups) // pipeline.groups, pipeline.microbatches)
    return Workload(tuple(found), orders, felt_share)


def _links(sender: Group, receiver: Group) -> Links:
    """The ends of links between machines that are in use; inside a machine devices are not in each other's way."""
    if len({node for node, _ in sender.devices + receiver.devices}) == 1:
        return ()
    return (*((f"node {node} out", 1.0) for node, _ in sender.devices), *((f"node {node} in", 1.0) for node, _ in receiver.devices))


def simulated(pipeline: Pipeline, felt_share: float = 0.0) -> Simulated:
    """What the simulator says of a candidate."""
    said = run(workload_of(pipeline, felt_share))
    return Simulated(said.step_s, said.bubble, said.communication_s, said.peak_bytes)
