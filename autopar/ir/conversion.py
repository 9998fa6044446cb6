"""From one state of a value to another: which single-axis steps, and what each does forward and backward.

A *state* is one placement per mesh axis. Search prices these steps and the runtime runs them, so both read the same table.
On two axes a conversion goes one axis after the other. A dim that both axes shard is nested, axis 0 coarsest, so axis 0 can only
move along a dim that axis 1 does not shard at that moment; where the target would forbid it, axis 1 is gathered first and sliced after.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from autopar.ir.placement import Kind, Placement, R

State = tuple[Placement, ...]
Action = Literal["nothing", "slice", "pad", "keep_first", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
COLLECTIVES: tuple[Action, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


@dataclass(frozen=True, slots=True)
class Step:
    """One axis goes from `source` to `target`; `forward` acts on the value, `backward` on its gradient.

    `slice`: keep this rank's part; `pad`: this rank's part among zeros; `keep_first`: as it is on rank 0 of the axis, zeros elsewhere.
    """

    axis: int
    source: Placement
    target: Placement
    forward: Action
    backward: Action


_S, _R, _RP, _P = Kind.SHARD, Kind.REPLICATE, Kind.REPLICATE_PARTIAL_GRADIENT, Kind.PARTIAL

ACTIONS: dict[tuple[Kind, Kind], tuple[Action, Action]] = {
    (_S, _R): ("all_gather", "slice"),
    (_S, _RP): ("all_gather", "reduce_scatter"),
    (_S, _P): ("pad", "slice"),
    (_R, _S): ("slice", "all_gather"),
    (_R, _RP): ("nothing", "all_reduce"),
    (_R, _P): ("keep_first", "nothing"),
    (_RP, _S): ("slice", "pad"),
    (_RP, _R): ("nothing", "keep_first"),
    (_RP, _P): ("keep_first", "keep_first"),
    (_P, _S): ("reduce_scatter", "all_gather"),
    (_P, _R): ("all_reduce", "nothing"),
    (_P, _RP): ("all_reduce", "all_reduce"),
    (_S, _S): ("all_to_all", "all_to_all"),
}
"""Forward and backward action by kinds of source and target (they differ in kind, or are shards that differ)."""


def actions(source: Placement, target: Placement) -> tuple[Action, Action]:
    """What one axis does, forward and backward, to turn `source` into `target`."""
    return ("nothing", "nothing") if source == target else ACTIONS[source.kind, target.kind]


# What shrinks the local part goes first, what grows it last: the other axis then moves fewer bytes.
_ORDER: dict[Action, int] = {
    "slice": 0, "reduce_scatter": 1, "all_to_all": 2, "nothing": 2, "keep_first": 2, "all_reduce": 3, "pad": 4, "all_gather": 5,
}  # fmt: skip


@lru_cache(maxsize=65536)
def steps(source: State, target: State) -> tuple[Step, ...]:
    """The single-axis steps from `source` to `target`, in the order in which they run forward; backward runs them from the last to
    the first. Both states have one placement per axis, at most two axes."""
    assert len(source) == len(target) <= 2
    if source == target:
        return ()
    pending = [axis for axis in range(len(source)) if source[axis] != target[axis]]
    if len(pending) == 2:
        first, second = (_ORDER[actions(source[axis], target[axis])[0]] for axis in pending)
        # Two reduce-scatters: the inner axis has the faster links, it shrinks the value before the outer axis moves it.
        outer_first = first < second or (first == second and actions(source[0], target[0])[0] != "reduce_scatter")
        orders = ((0, 1), (1, 0)) if outer_first else ((1, 0), (0, 1))
        return min((_walk(source, target, order) for order in orders), key=len)
    return _walk(source, target, tuple(pending))


def _walk(source: State, target: State, order: tuple[int, ...]) -> tuple[Step, ...]:
    state = list(source)
    found: list[Step] = []

    def go(axis: int, to: Placement) -> None:
        if state[axis] != to:
            found.append(Step(axis, state[axis], to, *actions(state[axis], to)))
            state[axis] = to

    for axis in order:
        moved = {placement.dim for placement in (state[0], target[0]) if placement.is_shard}
        if axis == 0 and len(state) == 2 and state[1].is_shard and state[1].dim in moved:
            go(1, R)
        go(axis, target[axis])
    if len(state) == 2:
        go(1, target[1])
    return tuple(found)
