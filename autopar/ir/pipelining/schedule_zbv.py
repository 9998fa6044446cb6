"""The orders of ZB-V: two halves of the model laid as a V over the groups, weight gradients where there would be a bubble.

Group g has stage g on the way down (half 0) and stage 2p - 1 - g on the way up (half 1), p groups in all. So the loss is computed on the
last group's two neighbouring stages, gradients start early, and every group holds at most 2p halves alive: what 1F1B's first group
holds. With forward, input gradient and weight gradient taking the same time the steady state has no bubble at all; what is left is the
last group's wait for its first input, p - 1 passes of half a group's model.

Qi et al. 2023, Zero bubble pipeline parallelism, arXiv:2401.10241, section 6; Qi et al. 2024, arXiv:2405.15362, figure 5 (V-ZB).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Literal

Pass = tuple[Literal["F", "I", "W"], int, int]
"""Kind, half, microbatch."""


def v_orders(groups: int, microbatches: int) -> list[list[Pass]]:
    """The passes of each group. The paper's pattern needs 2p - 1 microbatches to unfold; fewer are laid by a greedy search."""
    if microbatches < 2 * groups - 1:
        return _greedy(groups, microbatches)
    return [list(_pattern(group, groups, microbatches)) for group in range(groups)]


def _pattern(group: int, groups: int, microbatches: int) -> Iterator[Pass]:
    """The paper's order: fill the V, repeat one pass of each kind and half, drain."""
    back = groups - group
    fill = ["F0"] * (2 * back - 1) + ["F1", "F0"] * group + ["F1", "I1", "W"] * back
    steady = ["F0", "I0", "W", "F1", "I1", "W"] * (microbatches - groups)
    drain = ["I1", "I0"] * group + ["I0", "W"] * back
    following = dict.fromkeys(("F0", "F1", "I0", "I1"), 0)
    owed: deque[Pass] = deque()
    for step in fill + steady + drain:
        if step == "W":
            yield owed.popleft()
        elif (microbatch := following[step]) < microbatches:
            following[step] += 1
            half = int(step[1])
            yield ("F" if step[0] == "F" else "I"), half, microbatch
            if step[0] == "I":
                owed.append(("W", half, microbatch))
    yield from owed


def _greedy(groups: int, microbatches: int) -> list[list[Pass]]:
    """List scheduling in steps of one pass: each group does the best pass that is ready.

    Best is an input gradient, which other groups wait for, before a forward pass before a weight gradient; then the oldest microbatch.
    A forward pass of half 0 leaves room for one of half 1, without which no gradient would ever come back: so some group can always go on.
    """
    last = 2 * groups - 1
    forward: set[tuple[int, int]] = set()  # (stage, microbatch) that is done
    inputs: set[tuple[int, int]] = set()
    following = [{("F", 0): 0, ("F", 1): 0, ("I", 0): 0, ("I", 1): 0} for _ in range(groups)]
    owed: list[deque[Pass]] = [deque() for _ in range(groups)]
    held = [0] * groups
    orders: list[list[Pass]] = [[] for _ in range(groups)]

    def best(group: int) -> Pass | None:
        gradients: list[Pass] = []
        forwards: list[Pass] = []
        for half, stage in ((1, last - group), (0, group)):
            microbatch = following[group]["I", half]
            if (stage, microbatch) in forward and (stage == last or (stage + 1, microbatch) in inputs):
                gradients.append(("I", half, microbatch))
            microbatch = following[group]["F", half]
            arrived = microbatch < microbatches if stage == 0 else (stage - 1, microbatch) in forward
            if arrived and held[group] < 2 * groups - (half == 0):
                forwards.append(("F", half, microbatch))
        if ready := gradients or forwards:
            return min(ready, key=lambda item: item[2])
        return owed[group][0] if owed[group] else None

    while any(len(order) < 6 * microbatches for order in orders):
        step = [(group, item) for group in range(groups) if (item := best(group))]
        assert step, "no group can go on"
        for group, item in step:
            kind, half, microbatch = item
            stage = last - group if half else group
            orders[group].append(item)
            if kind == "W":
                owed[group].popleft()
                held[group] -= 1
                continue
            following[group][kind, half] += 1
            if kind == "F":
                forward.add((stage, microbatch))
                held[group] += 1
            else:
                inputs.add((stage, microbatch))
                owed[group].append(("W", half, microbatch))
    return orders
