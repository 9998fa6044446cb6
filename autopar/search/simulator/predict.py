"""What the simulator says of a described plan, written into its prediction: step time, bubble, memory at the peak."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from autopar.ir.graph import Graph
from autopar.ir.plan import Plan, Predicted
from autopar.search.describe import Part, describe, rows_of
from autopar.search.simulator.simulate import Simulation, simulate
from autopar.search.stages.place import Found, Settings


def predicted_plan(
    graph: Graph, settings: Settings, groups: Sequence[Found], stages: Sequence[Part], bound_s: float, **fields: Any
) -> Plan:
    """The plan for the traced `graph` that says what was found for its `groups` and `stages`; `fields` are the others of `Plan`.

    Its cost is the simulated step, but for one microbatch on one stage: there it is the sum over operations, which `bound_s` bounds.
    Whether it fits is judged by the simulated peak."""
    longest = max(groups, key=lambda found: found.cost_s)
    predicted = Predicted(
        cost_s=longest.cost_s, lower_bound_s=min(bound_s, longest.cost_s),
        compute_s=sum(part.account.compute_s for part in longest.parts),
        communication_s=sum(part.account.exposed_s for part in longest.parts),
        memory_bytes={}, memory_limit_bytes=settings.limit_bytes, fits=True, optimizer=settings.optimizer, effort=settings.effort,
        resident_bytes=tuple(sum(part.account.resident_bytes for part in found.parts) for found in groups),
    )  # fmt: skip
    plan = describe(graph, settings.cluster, rows_of(graph, stages), predicted, precision=settings.precision, **fields)
    return _with(plan, simulate(plan), bound_s)


def _whole(kinds: dict[str, float]) -> dict[str, int]:
    """In whole bytes. A weight that two stages of a group share is held once; what was counted twice comes off its kind."""
    found = {kind: math.ceil(size) for kind, size in kinds.items()}
    for kind in ("parameters", "optimizer"):
        off = min(found[kind], max(0, -found["buffers"]))
        found[kind] -= off
        found["buffers"] += off
    return found


def _with(plan: Plan, simulation: Simulation, bound_s: float) -> Plan:
    predicted = plan.predicted
    peaks = [_whole(memory.at_peak()) for memory in simulation.memory]
    worst = max(peaks, key=lambda kinds: sum(kinds.values()))
    fields = {
        "step_s": simulation.step_s,
        "bubble": simulation.bubble,
        "stage_memory_bytes": tuple(sum(kinds.values()) for kinds in peaks),
        "memory_bytes": worst,
        "fits": sum(worst.values()) <= predicted.memory_limit_bytes,
    }
    if plan.pipeline is not None or plan.microbatches > 1:
        longest = max(simulation.groups, key=lambda group: group.compute_s + group.optimizer_s + group.communication_s)
        fields |= {
            "cost_s": simulation.step_s,
            "lower_bound_s": min(bound_s, simulation.step_s),
            "compute_s": longest.compute_s + longest.optimizer_s,
            "communication_s": longest.communication_s,
        }
    return plan.model_copy(update={"predicted": predicted.model_copy(update=fields)})
