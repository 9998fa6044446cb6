"""Pipeline schedules: in which order each group of ranks computes which stage for which microbatch.

A schedule is an order of actions for each group, nothing else: transfers follow from it, and groups wait for what they read. So one
list says what the simulator times, what the checker proves (`autopar.ir.pipelining.schedule_check`) and what the runtime runs.

To add one, write a generator and a line in `SCHEDULES`:

    def mine(groups: int, stages_per_group: int, microbatches: int) -> Orders: ...

    Schedule("mine", mine, "one sentence on what it is good for", "paper")

Every test of schedules then runs on it too. An action prints as `2F7` (stage 2, forward, microbatch 7) and parses back; the text is
what `torch.distributed.pipelining` reads. Kinds: `F` forward, `B` backward; a schedule that splits the backward pass has, instead
of `B`, `I` (gradients of the stage's inputs, which the stage before waits for) and later `W` (gradients of its weights, for which
nobody waits).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from typing import Literal, NamedTuple

from autopar.errors import PlanError
from autopar.ir.pipelining.schedule_zbv import v_orders

Kind = Literal["F", "B", "I", "W"]
MOST_ACTIONS = 20_000_000
"""More than any pipeline that is run has; a plan file with more is damaged, and would fill the memory of whoever opens it."""

_TEXT = re.compile(r"(\d{1,9})([FBIW])(\d{1,9})")


class Action(NamedTuple):
    """`kind` of computing, by `stage` for `microbatch`; prints as `2F7`."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that `text` names. Raises `PlanError` where it names none."""
        if not (found := _TEXT.fullmatch(text.strip())):
            raise PlanError(f"{text!r} is no action; write stage, kind (F, B, I or W) and microbatch, as in 2F7")
        return cls(found[2], int(found[1]), int(found[3]))  # type: ignore[arg-type]


Order = tuple[Action, ...]
Orders = tuple[Order, ...]
"""For each group, its actions in order."""


def write(orders: Orders) -> str:
    """One line for each group, actions separated by commas."""
    return "".join(",".join(map(str, order)) + "\n" for order in orders)


def read(text: str) -> Orders:
    """What `write` wrote. Raises `PlanError` naming line and text."""
    orders = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            orders.append(tuple(Action.parse(item) for item in line.split(",") if item.strip()))
        except PlanError as error:
            raise PlanError(f"line {number}: {error}") from None
    return tuple(orders)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A row of `SCHEDULES`.

    `generate(groups, stages_per_group, microbatches)` gives the orders; it may count on what `orders` checks. `placement`: `loop` puts
    stage s on group s % groups; `v` folds the stages back, so that the first and the last are on group 0. `stages_per_group`: how many
    it needs, or None for any number. `splits_backward`: whether it uses `I` and `W`. `bubble(groups, stages_per_group, microbatches)`:
    idle time over computing time of each group when all stages take the same time, `F`, `I` and `W` the same, transfers are
    free and microbatches are at least as many as `bubble_from` times the groups; None where no formula is known.
    """

    name: str
    generate: Callable[[int, int, int], Orders]
    what: str
    source: str
    placement: Literal["loop", "v"] = "loop"
    stages_per_group: int | None = 1
    splits_backward: bool = False
    bubble: Callable[[int, int, int], float] | None = None
    bubble_from: int = 1

    def group_of(self, stage: int, groups: int) -> int:
        """The group that runs `stage`."""
        around, place = divmod(stage, groups)
        return groups - 1 - place if self.placement == "v" and around % 2 else place

    def orders(self, groups: int, stages_per_group: int, microbatches: int) -> Orders:
        """The actions of each group. Raises `PlanError` where the schedule cannot have these numbers."""
        _check_counts(self, groups, stages_per_group, microbatches)
        return _orders(self, groups, stages_per_group, microbatches)


@lru_cache(maxsize=64)
def _orders(schedule: Schedule, groups: int, stages_per_group: int, microbatches: int) -> Orders:
    return schedule.generate(groups, stages_per_group, microbatches)


def _check_counts(schedule: Schedule, groups: int, stages_per_group: int, microbatches: int) -> None:
    for name, value in (("groups", groups), ("stages per group", stages_per_group), ("microbatches", microbatches)):
        if value < 1:
            raise PlanError(f"schedule {schedule.name}: {value} {name}; there must be at least 1")
    wanted = schedule.stages_per_group
    if wanted is not None and stages_per_group != wanted:
        others = ", ".join(other.name for other in SCHEDULES.values() if other.stages_per_group in (None, stages_per_group))
        raise PlanError(
            f"schedule {schedule.name} has {wanted} stage{'s' * (wanted > 1)} on each group of ranks, not {stages_per_group}: "
            f"give {wanted * groups} stages for {groups} groups, or a schedule that takes {stages_per_group} ({others})"
        )
    if (3 if schedule.splits_backward else 2) * groups * stages_per_group * microbatches > MOST_ACTIONS:
        raise PlanError(
            f"schedule {schedule.name}: {groups * stages_per_group} stages x {microbatches} microbatches is more than "
            f"{MOST_ACTIONS:,} actions; use fewer microbatches"
        )


def named(name: str) -> Schedule:
    """The schedule called `name`. Raises `PlanError` listing those there are."""
    if name not in SCHEDULES:
        raise PlanError(f"no schedule is called {name!r}; there are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def group_of(schedule: str, stage: int, groups: int) -> int:
    """The group that runs `stage` under the schedule called so."""
    return named(schedule).group_of(stage, groups)


def gpipe(groups: int, stages_per_group: int, microbatches: int) -> Orders:
    """All forward passes, then all backward passes.

    Both in the order of the microbatches, so that gradients are added in the same order as under the other schedules.
    """
    return tuple(_order(group, groups, _rounds(groups, 1, microbatches), "B", ahead=microbatches) for group in range(groups))


def one_forward_one_backward(groups: int, stages_per_group: int, microbatches: int) -> Orders:
    """As many forward passes as it takes until the first gradient comes back, then a forward and a backward pass in turn."""
    rounds = _rounds(groups, 1, microbatches)
    return tuple(_order(group, groups, rounds, "B", ahead=groups - 1 - group) for group in range(groups))


def interleaved(groups: int, stages_per_group: int, microbatches: int) -> Orders:
    """1F1B over several stages on each group: a round of microbatches goes through the group's first stage, then through its next.

    Two more forward passes ahead for each group on the way to the last, one to fill the pipeline and one to hide the transfers.
    """
    rounds = _rounds(groups, stages_per_group, microbatches)
    first = (stages_per_group - 1) * rounds.longest
    return tuple(_order(group, groups, rounds, "B", first + 2 * (groups - 1 - group)) for group in range(groups))


def interleaved_zero_bubble(groups: int, stages_per_group: int, microbatches: int) -> Orders:
    """Interleaved 1F1B whose weight gradients lag behind: group g owes g of them, to be computed while the last gradients travel.

    With one stage on each group it is the paper's ZB-H1, whose groups all have as many live microbatches as the first has under 1F1B.
    """
    rounds = _rounds(groups, stages_per_group, microbatches)
    first = (stages_per_group - 1) * rounds.longest
    orders = (_order(group, groups, rounds, "I", first + groups - 1 - group) for group in range(groups))
    return tuple(tuple(_weights_behind(order, group)) for group, order in enumerate(orders))


def zero_bubble_v(groups: int, stages_per_group: int, microbatches: int) -> Orders:
    """Two stages on each group, laid as a V: the first and the last stage are both on group 0. See `autopar.ir.pipelining.schedule_zbv`."""
    return tuple(
        tuple(Action(kind, 2 * groups - 1 - group if half else group, microbatch) for kind, half, microbatch in order)
        for group, order in enumerate(v_orders(groups, microbatches))
    )


class _Rounds(NamedTuple):
    """The passes of a group as (chunk, microbatch), chunk c being its c-th stage."""

    forward: list[tuple[int, int]]
    backward: list[tuple[int, int]]
    longest: int


def _rounds(groups: int, chunks: int, microbatches: int) -> _Rounds:
    """Microbatches in rounds: a round passes one chunk after the other.

    The paper's rounds are of `groups` microbatches and so want a multiple of that. Rounds that are as even as can be, and no shorter
    unless there are fewer microbatches in all, keep the formula of the bubble for every number of microbatches.
    """
    count = max(1, microbatches // groups)
    bounds = [microbatches * i // count for i in range(count + 1)]
    rounds = [range(start, stop) for start, stop in pairwise(bounds)]
    forward = [(chunk, microbatch) for part in rounds for chunk in range(chunks) for microbatch in part]
    backward = [(chunk, microbatch) for part in rounds for chunk in reversed(range(chunks)) for microbatch in part]
    return _Rounds(forward, backward, max(map(len, rounds)))


def _order(group: int, groups: int, rounds: _Rounds, backward: Kind, ahead: int) -> Order:
    """`ahead` forward passes, then a forward and a backward pass in turn, then the backward passes that are left."""
    forwards = [Action("F", chunk * groups + group, microbatch) for chunk, microbatch in rounds.forward]
    rest = iter(forwards[ahead:])
    order = forwards[:ahead]
    for chunk, microbatch in rounds.backward:
        order.extend(islice(rest, 1))
        order.append(Action(backward, chunk * groups + group, microbatch))
    return tuple(order)


def _weights_behind(order: Order, lag: int) -> Iterator[Action]:
    owed: deque[Action] = deque()
    for action in order:
        yield action
        if action.kind == "I":
            owed.append(Action("W", action.stage, action.microbatch))
            if len(owed) > lag:
                yield owed.popleft()
    yield from owed


SCHEDULES: dict[str, Schedule] = {
    row.name: row
    for row in (
        Schedule(
            "gpipe",
            gpipe,
            "all forward passes, then all backward passes; every microbatch is alive at once",
            "Huang et al. 2019, GPipe, arXiv:1811.06965",
            bubble=lambda p, v, m: (p - 1) / m,
        ),
        Schedule(
            "1f1b",
            one_forward_one_backward,
            "backward passes as early as can be; GPipe's bubble with at most as many live microbatches as stages",
            "Fan et al. 2021, DAPPLE, arXiv:2007.01045; PipeDream-flush in Narayanan et al. 2021, arXiv:2006.09503",
            bubble=lambda p, v, m: (p - 1) / m,
        ),
        Schedule(
            "interleaved-1f1b",
            interleaved,
            "several stages on each group, for a smaller bubble and more transfers",
            "Narayanan et al. 2021, Efficient large-scale language model training on GPU clusters, arXiv:2104.04473",
            stages_per_group=None,
            bubble=lambda p, v, m: (p - 1) / (v * m),
        ),
        Schedule(
            "interleaved-zb",
            interleaved_zero_bubble,
            "interleaved, and weight gradients fill what would be bubble",
            "Qi et al. 2023, Zero bubble pipeline parallelism, arXiv:2401.10241 (ZB-H1)",
            stages_per_group=None,
            splits_backward=True,
            bubble=lambda p, v, m: (p - 1) / (3 * v * m),
        ),
        Schedule(
            "zbv",
            zero_bubble_v,
            "two stages on each group in a V, weight gradients fill what would be bubble; memory is even over the groups",
            "Qi et al. 2023, arXiv:2401.10241 (ZB-V); Qi et al. 2024, Pipeline parallelism with controllable memory, arXiv:2405.15362",
            placement="v",
            stages_per_group=2,
            splits_backward=True,
            bubble=lambda p, v, m: (p - 1) / (6 * m),
            bubble_from=2,
        ),
    )
}
"""Every schedule by its name; see the module's docstring for how to add one."""
