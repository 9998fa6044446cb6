"""Proof that an order of actions can run, and what it keeps alive.

The proof runs the orders: a group does its next action once what that reads is there. Sends are buffered, receives wait, computing takes
no time. Since no action takes away what another reads, every way to run the orders ends at the same point; so one run that ends with
all actions done proves that none can hang, however long computing and transfers take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from autopar.errors import PlanError
from autopar.ir.pipelining.schedules import Action, Orders


def check(orders: Orders, stage_groups: Sequence[int], microbatches: int) -> None:
    """Prove that `orders` does all there is to do for `microbatches` and cannot deadlock.

    `stage_groups`: the group of each stage. Raises `PlanError` naming the first fault: an action that is missing, done twice, in the
    wrong group or before what it needs; or groups that wait for each other, and for what.
    """
    if len(orders) != max(stage_groups) + 1:
        raise PlanError(f"orders for {len(orders)} groups, but the stages are on {max(stage_groups) + 1}")
    _check_complete(orders, stage_groups, microbatches)
    _check_order(orders)
    done: set[Action] = set()
    position = [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for group, order in enumerate(orders):
            while position[group] < len(order) and not _missing(order[position[group]], len(stage_groups), done):
                action = order[position[group]]
                done.add(action)
                position[group] += 1
                moved = True
    stuck = [group for group, order in enumerate(orders) if position[group] < len(order)]
    if stuck:
        raise PlanError(_explain_deadlock(orders, stage_groups, position, done))


def _check_complete(orders: Orders, stage_groups: Sequence[int], microbatches: int) -> None:
    stages = len(stage_groups)
    count: Counter[tuple[str, int, int]] = Counter()
    for group, order in enumerate(orders):
        for action in order:
            if action.kind not in ("F", "B", "I", "W"):
                raise PlanError(f"group {group}: {action} is of no known kind; there are F, B, I and W")
            if not (0 <= action.stage < stages and 0 <= action.microbatch < microbatches):
                raise PlanError(f"group {group}: {action} is not one of {stages} stages and {microbatches} microbatches, counted from 0")
            if stage_groups[action.stage] != group:
                raise PlanError(f"group {group}: {action} belongs to group {stage_groups[action.stage]}, which has stage {action.stage}")
            count[action] += 1
    for stage in range(stages):
        for microbatch in range(microbatches):
            forward, whole, inputs, weights = (count[kind, stage, microbatch] for kind in "FBIW")
            group = stage_groups[stage]
            for kind, times in (("F", forward), ("B", whole), ("I", inputs), ("W", weights)):
                if times > 1:
                    raise PlanError(f"group {group}: {Action(kind, stage, microbatch)} is done {times} times")  # type: ignore[arg-type]
            if whole and (inputs or weights):
                other = Action("I" if inputs else "W", stage, microbatch)
                raise PlanError(f"group {group}: {Action('B', stage, microbatch)} is the whole backward pass, so {other} is done twice")
            if not forward:
                raise PlanError(f"group {group}: {Action('F', stage, microbatch)} is missing")
            if not whole and not (inputs and weights):
                missing = Action("W" if inputs else "I" if weights else "B", stage, microbatch)
                raise PlanError(f"group {group}: {missing} is missing")


def _check_order(orders: Orders) -> None:
    """A group that would wait for itself is told so, rather than as a deadlock."""
    for group, order in enumerate(orders):
        place = {action: index for index, action in enumerate(order)}
        for action, index in place.items():
            for kind in {"F": "", "B": "F", "I": "F", "W": "I"}[action.kind]:
                before = Action(kind, action.stage, action.microbatch)  # type: ignore[arg-type]
                if place[before] > index:
                    raise PlanError(f"group {group}: {action} comes before {before}, which it needs")


def needs(action: Action, stages: int) -> tuple[Action, ...]:
    """What must be done before `action`, each as (kind, stage, microbatch); `I` stands for `B` as well."""
    kind, stage, microbatch = action
    if kind == "F":
        return (Action("F", stage - 1, microbatch),) if stage else ()
    if kind == "W":
        return (Action("I", stage, microbatch),)
    own = Action("F", stage, microbatch)
    return (own, Action("I", stage + 1, microbatch)) if stage + 1 < stages else (own,)


def _missing(action: Action, stages: int, done: set[Action]) -> Action | None:
    for need in needs(action, stages):
        if need not in done and not (need.kind == "I" and Action("B", need.stage, need.microbatch) in done):
            return need
    return None


def _explain_deadlock(orders: Orders, stage_groups: Sequence[int], position: list[int], done: set[Action]) -> str:
    """Follow who waits for whom until a group comes twice."""
    group = next(index for index, order in enumerate(orders) if position[index] < len(order))
    steps: list[str] = []
    seen: dict[int, int] = {}
    while group not in seen:
        seen[group] = len(steps)
        action = orders[group][position[group]]
        need = _missing(action, len(stage_groups), done)
        assert need is not None, "a group that waits for nothing would have gone on"
        other = stage_groups[need.stage]
        name = need if need in orders[other] else Action("B", need.stage, need.microbatch)
        steps.append(f"group {group} waits at {action} for {name} of group {other}")
        group = other
    return "the schedule deadlocks: " + ", ".join(steps[seen[group] :])


def live(orders: Orders) -> tuple[int, ...]:
    """By group, the largest number of its (stage, microbatch) pairs between forward and backward pass at once.

    Activations are counted until `B` or `W`: `W` still reads them.
    """
    peaks = []
    for order in orders:
        now = peak = 0
        for action in order:
            now += (action.kind == "F") - (action.kind in "BW")
            peak = max(peak, now)
        peaks.append(peak)
    return tuple(peaks)


def live_by_stage(orders: Orders) -> tuple[int, ...]:
    """By stage, the largest number of microbatches between forward and backward pass at once; counted as `live` does."""
    now: Counter[int] = Counter()
    peak: Counter[int] = Counter()
    for order in orders:
        for action in order:
            now[action.stage] += (action.kind == "F") - (action.kind in "BW")
            peak[action.stage] = max(peak[action.stage], now[action.stage])
    return tuple(peak[stage] for stage in range(len(peak)))
