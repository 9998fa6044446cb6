"""Stages priced by tables, and the most plainly written simulator, for tests of the stage search."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.ir.pipelining.schedules import named
from autopar.search.stages.stage_search import Group, Pipeline, Simulated, StageCost


@dataclass(frozen=True)
class Unit:
    forward_s: float
    backward_s: float
    parameter_bytes: float = 0.0
    activation_bytes: float = 0.0
    """Per global batch, kept and sent on."""


@dataclass(frozen=True)
class TableCosts:
    """Replicas of stages: a microbatch's samples split over the devices of a group, gradients reduced at the end."""

    rows: tuple[Unit, ...]
    inner_s: float = 0.1
    outer_s: float = 1.0
    """Per byte, inside a node and between nodes."""
    weight_share: float = 0.5
    slow_lean: bool = False
    """Also offer to keep half of the activations, for a third more backward time."""
    live_matters = False

    @property
    def units(self) -> int:
        return len(self.rows)

    def kind(self, unit: int) -> Unit:
        return self.rows[unit]

    def options(self, start: int, stop: int, group: Group, microbatches: int, live: int) -> tuple[StageCost, ...]:
        rows = self.rows[start:stop]
        part = 1 / (microbatches * group.size)
        parameters = sum(row.parameter_bytes for row in rows)
        link = self.inner_s if len(group.devices) == 1 else self.outer_s
        backward = sum(row.backward_s for row in rows) * part
        kept = sum(row.activation_bytes for row in rows) * part
        plain = StageCost(
            forward_s=sum(row.forward_s for row in rows) * part,
            backward_s=backward,
            weight_s=self.weight_share * backward,
            after_s=2 * link * parameters * (group.size - 1) / group.size,
            fixed_bytes=2 * parameters,
            live_bytes=kept,
        )
        if not self.slow_lean:
            return (plain,)
        lean = StageCost(
            plain.forward_s, plain.backward_s * 4 / 3, plain.weight_s, 0.0, plain.after_s, plain.fixed_bytes, kept / 2, 0.0, "lean"
        )
        return plain, lean

    def transfer(self, cut: int, sender: Group, receiver: Group, microbatches: int) -> tuple[float, float]:
        same = len({node for node, _ in sender.devices + receiver.devices}) == 1
        seconds = (self.inner_s if same else self.outer_s) * self.rows[cut - 1].activation_bytes / microbatches
        return seconds / min(sender.size, receiver.size), seconds / receiver.size


def replay(pipeline: Pipeline) -> Simulated:
    """Each group does its actions in order, each as soon as what it reads is there; things travel between groups one by one."""
    stages, m = pipeline.stages, pipeline.microbatches
    schedule = named(pipeline.schedule)
    orders = schedule.orders(pipeline.groups, len(stages) // pipeline.groups, m)
    arrived: dict[tuple[str, int, int], float] = {}
    free: dict[tuple[int, int], float] = {}
    last = [0.0] * len(stages)
    clock = [0.0] * pipeline.groups
    place = [0] * pipeline.groups
    while any(place[group] < len(order) for group, order in enumerate(orders)):
        for group, order in enumerate(orders):
            while place[group] < len(order):
                kind, stage, number = order[place[group]]
                cost = stages[stage].cost
                split = schedule.splits_backward
                ready = 0.0
                if kind == "F":
                    seconds = cost.forward_s
                    if stage:
                        ready = arrived.get(("F", stage, number), math.inf)
                elif kind == "W":
                    seconds = cost.weight_s
                else:
                    seconds = cost.backward_s - (cost.weight_s if split else 0.0)
                    if stage + 1 < len(stages):
                        ready = arrived.get(("B", stage, number), math.inf)
                if ready == math.inf:
                    break
                clock[group] = max(clock[group], ready) + seconds
                place[group] += 1
                last[stage] = clock[group]
                if kind != "W":
                    to, name, moved = (stage + 1, "F", 0) if kind == "F" else (stage - 1, "B", 1)
                    if 0 <= to < len(stages):
                        other = schedule.group_of(to, pipeline.groups)
                        arrived[name, to, number] = clock[group]
                        if other != group:
                            free[group, other] = max(clock[group], free.get((group, other), 0.0)) + stages[max(stage, to)].transfer_s[moved]
                            arrived[name, to, number] = free[group, other]
    behind = [0.0] * pipeline.groups  # what a group does once a step, one stage after the other
    for number in sorted(range(len(stages)), key=lambda number: last[number]):
        group = schedule.group_of(number, pipeline.groups)
        behind[group] = max(behind[group], last[number]) + stages[number].cost.after_s
    return Simulated(max(*clock, *behind), 0.0, 0.0, ())
