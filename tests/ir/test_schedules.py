"""Schedules: what they order, what torch reads of them, that the checker accepts all of them and nothing that is broken."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError
from autopar.ir.pipelining.schedule_check import check, live, live_by_stage
from autopar.ir.pipelining.schedules import SCHEDULES, Action, Orders, Schedule, group_of, named, read, write


@st.composite
def cases(draw: st.DrawFn) -> tuple[Schedule, int, int, int]:
    schedule = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    per_group = schedule.stages_per_group or draw(st.integers(1, 4))
    return schedule, draw(st.integers(1, 8)), per_group, draw(st.integers(1, 20))


def stage_groups(schedule: Schedule, groups: int, per_group: int) -> list[int]:
    return [schedule.group_of(stage, groups) for stage in range(groups * per_group)]


def idle(orders: Orders, stages: int, forward: int = 1, inputs: int = 1, weights: int = 1) -> list[Fraction]:
    """Idle over computing time of each group: orders run with equal stages and free transfers."""
    ended: dict[tuple[str, int, int], int] = {}
    clock, busy, position = [0] * len(orders), [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for group, order in enumerate(orders):
            for kind, stage, microbatch in order[position[group] :]:
                if kind == "F":
                    needs, takes = [("F", stage - 1, microbatch)] if stage else [], forward
                elif kind == "W":
                    needs, takes = [("I", stage, microbatch)], weights
                else:
                    needs = [("F", stage, microbatch)] + ([("I", stage + 1, microbatch)] if stage + 1 < stages else [])
                    takes = inputs + (weights if kind == "B" else 0)
                if not all(need in ended for need in needs):
                    break
                clock[group] = max([clock[group], *(ended[need] for need in needs)]) + takes
                busy[group] += takes
                ended["I" if kind == "B" else kind, stage, microbatch] = clock[group]
                position[group] += 1
                moved = True
    return [Fraction(max(clock) - time, time) for time in busy]


@settings(deadline=None)
@given(cases())
def test_every_schedule_passes_the_check(case: tuple[Schedule, int, int, int]) -> None:
    schedule, groups, per_group, microbatches = case
    orders = schedule.orders(groups, per_group, microbatches)
    check(orders, stage_groups(schedule, groups, per_group), microbatches)
    assert schedule.splits_backward == any(action.kind in "IW" for order in orders for action in order)


@settings(deadline=None)
@given(cases())
def test_orders_print_and_parse_back(case: tuple[Schedule, int, int, int]) -> None:
    schedule, groups, per_group, microbatches = case
    orders = schedule.orders(groups, per_group, microbatches)
    assert read(write(orders)) == orders


def test_torch_reads_the_same_actions() -> None:
    from torch.distributed.pipelining.schedules import _Action

    for schedule in SCHEDULES.values():
        for order in schedule.orders(4, schedule.stages_per_group or 2, 12):
            for action in order:
                theirs = _Action.from_str(str(action))
                assert (theirs.computation_type.value, theirs.stage_index, theirs.microbatch_index) == action
                assert str(theirs) == str(action)


def test_torch_can_place_the_transfers_of_every_schedule() -> None:
    from torch.distributed.pipelining.schedules import _Action, _add_send_recv

    for schedule in SCHEDULES.values():
        for groups in (1, 2, 3, 4):
            for microbatches in (1, 3, 8):
                per_group = schedule.stages_per_group or 3
                orders = schedule.orders(groups, per_group, microbatches)
                theirs = {group: [_Action.from_str(str(action)) for action in order] for group, order in enumerate(orders)}
                _add_send_recv(theirs, lambda stage: schedule.group_of(stage, groups), groups * per_group)  # noqa: B023


@settings(deadline=None)
@given(cases())
def test_bubble_formula(case: tuple[Schedule, int, int, int]) -> None:
    schedule, groups, per_group, microbatches = case
    if schedule.bubble is None or microbatches < schedule.bubble_from * groups:
        return
    orders = schedule.orders(groups, per_group, microbatches)
    expected = schedule.bubble(groups, per_group, microbatches)
    assert [float(share) for share in idle(orders, groups * per_group)] == pytest.approx([expected] * groups)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 4), st.integers(0, 4))
def test_gpipe_and_1f1b_have_the_same_bubble_whatever_the_backward_pass_takes(p: int, m: int, forward: int, backward: int) -> None:
    for name in ("gpipe", "1f1b"):
        shares = idle(SCHEDULES[name].orders(p, 1, m), p, forward, backward, backward)
        assert shares == [Fraction(p - 1, m)] * p


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 24))
def test_zero_bubble_schedules_idle_less_than_1f1b(groups: int, microbatches: int) -> None:
    plain = max(idle(SCHEDULES["1f1b"].orders(groups, 1, microbatches), groups))
    for schedule in SCHEDULES.values():
        if schedule.splits_backward:
            per_group = schedule.stages_per_group or 1
            assert max(idle(schedule.orders(groups, per_group, microbatches), groups * per_group)) < plain


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 24))
def test_live_microbatches(groups: int, microbatches: int) -> None:
    def found(name: str, per_group: int = 1) -> tuple[int, ...]:
        return live(SCHEDULES[name].orders(groups, per_group, microbatches))

    assert found("gpipe") == (microbatches,) * groups
    assert found("1f1b") == tuple(min(microbatches, groups - group) for group in range(groups))
    assert found("interleaved-zb") == (min(microbatches, groups),) * groups
    assert found("zbv", 2) == (2 * min(microbatches, groups),) * groups
    if microbatches % groups == 0:
        whole = 2 * microbatches
        assert found("interleaved-1f1b", 2) == tuple(min(whole, groups + 2 * (groups - 1 - group) + 1) for group in range(groups))


def test_live_by_stage_counts_each_stage() -> None:
    orders = SCHEDULES["zbv"].orders(2, 2, 8)
    by_stage = live_by_stage(orders)
    assert len(by_stage) == 4
    assert all(by_stage[stage] + by_stage[3 - stage] >= live(orders)[stage] for stage in (0, 1))
    assert live_by_stage(SCHEDULES["1f1b"].orders(3, 1, 5)) == (3, 2, 1)


def test_placement_of_stages() -> None:
    assert [group_of("interleaved-1f1b", stage, 3) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [group_of("zbv", stage, 3) for stage in range(6)] == [0, 1, 2, 2, 1, 0]


def test_actions_say_what_they_are() -> None:
    assert str(Action("F", 2, 7)) == "2F7"
    assert Action.parse(" 2F7 ") == Action("F", 2, 7)
    for text in ("", "F7", "2X7", "2F", "2F7x", "-1F0", "2SEND_F7"):
        with pytest.raises(PlanError, match="2F7"):
            Action.parse(text)
    with pytest.raises(PlanError, match="line 2: '1Q0'"):
        read("0F0,0B0\n1Q0\n")


def test_numbers_that_a_schedule_cannot_have() -> None:
    with pytest.raises(PlanError, match="no schedule is called 'fast'; there are gpipe, 1f1b"):
        named("fast")
    with pytest.raises(PlanError, match="give 8 stages for 4 groups"):
        SCHEDULES["zbv"].orders(4, 1, 8)
    with pytest.raises(PlanError, match=r"1 stage on each group of ranks, not 2.*\(interleaved-1f1b, interleaved-zb, zbv\)"):
        SCHEDULES["1f1b"].orders(4, 2, 8)
    with pytest.raises(PlanError, match="0 microbatches"):
        SCHEDULES["1f1b"].orders(4, 1, 0)
    with pytest.raises(PlanError, match="fewer microbatches"):
        SCHEDULES["1f1b"].orders(4, 1, 10**12)


# Mutations: what is broken is found out.


def broken(orders: Orders, group: int, change: list[Action]) -> Orders:
    return (*orders[:group], tuple(change), *orders[group + 1 :])


@settings(deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_dropped_doubled_and_moved_actions_are_found(case: tuple[Schedule, int, int, int], dice: random.Random) -> None:
    schedule, groups, per_group, microbatches = case
    orders, owners = schedule.orders(groups, per_group, microbatches), stage_groups(schedule, groups, per_group)
    group = dice.randrange(groups)
    place = dice.randrange(len(orders[group]))
    order, action = list(orders[group]), orders[group][place]

    with pytest.raises(PlanError, match=rf"{action} is missing|[BIW]{action.microbatch} is missing"):
        check(broken(orders, group, order[:place] + order[place + 1 :]), owners, microbatches)
    with pytest.raises(PlanError, match=f"{action} is done 2 times"):
        check(broken(orders, group, [*order, action]), owners, microbatches)
    if groups > 1:
        other = (group + 1) % groups
        moved = broken(broken(orders, group, order[:place] + order[place + 1 :]), other, [*orders[other], action])
        with pytest.raises(PlanError, match=f"group {other}: {action} belongs to group {group}"):
            check(moved, owners, microbatches)


@settings(deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_a_backward_pass_before_its_forward_pass_is_found(case: tuple[Schedule, int, int, int], dice: random.Random) -> None:
    schedule, groups, per_group, microbatches = case
    orders, owners = schedule.orders(groups, per_group, microbatches), stage_groups(schedule, groups, per_group)
    group = dice.randrange(groups)
    order = list(orders[group])
    back = dice.choice([index for index, action in enumerate(order) if action.kind != "F"])
    first = next(i for i, a in enumerate(order) if a[1:] == order[back][1:])
    order[first], order[back] = order[back], order[first]
    with pytest.raises(PlanError, match="which it needs"):
        check(broken(orders, group, order), owners, microbatches)


@settings(deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_swapped_neighbours_are_accepted_only_if_they_run(case: tuple[Schedule, int, int, int], dice: random.Random) -> None:
    """Against an independent judge: the timing loop above ends with every action done, or does not."""
    schedule, groups, per_group, microbatches = case
    orders, owners = schedule.orders(groups, per_group, microbatches), stage_groups(schedule, groups, per_group)
    group = dice.randrange(groups)
    order = list(orders[group])
    one, two = dice.randrange(len(order)), dice.randrange(len(order))
    order[one], order[two] = order[two], order[one]
    changed = broken(orders, group, order)
    if runs(changed, groups * per_group):
        check(changed, owners, microbatches)
    else:
        with pytest.raises(PlanError, match=r"which it needs|deadlocks: group \d+ waits at"):
            check(changed, owners, microbatches)


def runs(orders: Orders, stages: int) -> bool:
    """Whether the actions have an order at all: a topological sort of all that must follow what."""
    from graphlib import CycleError, TopologicalSorter

    after: dict[Action, list[Action]] = {}
    names = {("I" if a.kind == "B" else a.kind, a.stage, a.microbatch): a for order in orders for a in order}
    for order in orders:
        for index, action in enumerate(order):
            kind, stage, microbatch = action
            wanted = {"F": [("F", stage - 1)], "W": [("I", stage)]}.get(kind, [("F", stage), ("I", stage + 1)])
            after[action] = [names[k, s, microbatch] for k, s in wanted if 0 <= s < stages] + list(order[max(0, index - 1) : index])
    try:
        tuple(TopologicalSorter(after).static_order())
    except CycleError:
        return False
    return True


def test_a_deadlock_names_the_circle() -> None:
    orders = read("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n")
    with pytest.raises(PlanError) as caught:
        check(orders, [0, 1], 2)
    assert str(caught.value) == ("the schedule deadlocks: group 0 waits at 0B0 for 1B0 of group 1, group 1 waits at 1F1 for 0F1 of group 0")


def test_other_faults_are_named() -> None:
    with pytest.raises(PlanError, match="orders for 1 groups, but the stages are on 2"):
        check(read("0F0,0B0\n"), [0, 1], 1)
    with pytest.raises(PlanError, match="1F0 is not one of 1 stages"):
        check(read("1F0\n"), [0], 1)
    with pytest.raises(PlanError, match="0B0 is the whole backward pass, so 0W0 is done twice"):
        check(read("0F0,0B0,0W0\n"), [0], 1)


def test_a_large_pipeline_is_laid_and_checked_fast_enough_to_be_tried() -> None:
    orders = SCHEDULES["interleaved-1f1b"].orders(64, 2, 256)
    check(orders, [stage % 64 for stage in range(128)], 256)
    assert sum(map(len, orders)) == 2 * 128 * 256
