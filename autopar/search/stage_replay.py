"""A whole pipeline played through where transfers disturb nobody: the least time that any simulator can say of it.

Every group does its actions in order, each as soon as what it reads is there. Between two stages microbatches travel one after the other.
With links that several transfers share, or traffic that slows computing down, a step can only take longer: `autopar.search.simulate`
decides, this says in a fraction of its time whether it is worth asking.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.ir.schedules import named
from autopar.search.stage_costs import StageCost


def replay_s(
    schedule: str, groups: int, microbatches: int, costs: Sequence[StageCost], transfers_s: Sequence[tuple[float, float]]
) -> float:
    """Seconds of a step. `costs`: by stage; `transfers_s`: by stage, from the stage before and back to it."""
    kind = named(schedule)
    count = len(costs)
    orders = kind.orders(groups, count // groups, microbatches)
    group_of = [kind.group_of(stage, groups) for stage in range(count)]
    seconds = {
        "F": [cost.forward_s for cost in costs],
        "B": [cost.backward_s for cost in costs],
        "I": [cost.backward_s - cost.weight_s for cost in costs],
        "W": [cost.weight_s for cost in costs],
    }
    moved = [(0.0, 0.0) if stage and group_of[stage] == group_of[stage - 1] else transfers_s[stage] for stage in range(count)]
    outputs = [[-1.0] * microbatches for _ in range(count + 1)]  # when the input of stage + 1 is there
    outputs[0] = [0.0] * microbatches
    gradients = [[-1.0] * microbatches for _ in range(count + 1)]  # when the gradient of the stage's output is there
    gradients[count] = [0.0] * microbatches
    forward_free, backward_free = [0.0] * (count + 1), [0.0] * (count + 1)
    clock = [0.0] * groups
    place = [0] * groups
    waiting = set(range(groups))
    while waiting:
        for group in sorted(waiting):
            order, at, now = orders[group], place[group], clock[group]
            while at < len(order):
                name, stage, number = order[at]
                if name == "F":
                    ready = outputs[stage][number]
                elif name == "W":
                    ready = 0.0
                else:
                    ready = gradients[stage + 1][number]
                if ready < 0.0:
                    break
                now = max(now, ready) + seconds[name][stage]
                at += 1
                if name == "F" and stage + 1 < count:
                    arrives = max(now, forward_free[stage + 1]) + moved[stage + 1][0]
                    forward_free[stage + 1] = outputs[stage + 1][number] = arrives
                elif name in "BI" and stage:
                    arrives = max(now, backward_free[stage]) + moved[stage][1]
                    backward_free[stage] = gradients[stage][number] = arrives
            place[group], clock[group] = at, now
            if at == len(order):
                waiting.discard(group)
    return max(clock[group_of[stage]] + cost.after_s for stage, cost in enumerate(costs))
