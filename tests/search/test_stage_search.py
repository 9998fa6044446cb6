"""The stage search finds what exhaustive enumeration finds, and its bounds hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError
from autopar.ir.pipelining.schedules import named
from autopar.search.stages.stage_bounds import facts_of
from autopar.search.stages.stage_search import Devices, Pipeline, PlacedStage, StageCost, search_stages
from autopar.search.stages.stage_workload import simulated
from tests.search.stage_models import TableCosts, Unit, replay

seconds = st.sampled_from([0.0, 0.5, 1.0, 1.7, 3.0]) | st.floats(0.0, 4.0)
units = st.lists(
    st.builds(Unit, seconds, seconds, st.sampled_from([0.0, 1.0, 2.5]), st.sampled_from([0.0, 0.3, 1.0, 4.0])), min_size=1, max_size=6
)
machines = st.sampled_from([Devices(1, 1), Devices(1, 2), Devices(2, 1), Devices(1, 3), Devices(2, 2), Devices(1, 4), Devices(4, 1)])


def every_pipeline(
    costs: TableCosts, devices: Devices, schedule: str, each: int, m: int, sizes: Sequence[int], policies: tuple[str, ...], limit: float
) -> Iterator[Pipeline]:
    """All of them that fit, by brute force."""
    kind = named(schedule)
    for groups in range(1, devices.count + 1):
        count = groups * each
        try:
            orders = kind.orders(groups, each, m)
        except PlanError:
            continue
        if count > costs.units:
            continue
        for numbers in itertools.product(sizes, repeat=groups):
            if sum(numbers) != devices.count:
                continue
            seen = set()
            for chosen in itertools.product(policies, repeat=groups):
                used: tuple[int, ...] = (0,) * devices.nodes
                places = []
                for size, policy in zip(numbers, chosen, strict=True):
                    group, used = devices.take(used, size, policy)  # type: ignore[arg-type]
                    places.append(group)
                if tuple(places) in seen:
                    continue
                seen.add(tuple(places))
                on = [places[kind.group_of(stage, groups)] for stage in range(count)]
                for inner in itertools.combinations(range(1, costs.units), count - 1):
                    cuts = (0, *inner, costs.units)
                    ranges = list(itertools.pairwise(cuts))
                    options = [costs.options(*ranges[stage], on[stage], m, 1) for stage in range(count)]
                    moved = [(0.0, 0.0)]
                    for stage in range(1, count):
                        away = kind.group_of(stage, groups) != kind.group_of(stage - 1, groups)
                        moved.append(costs.transfer(cuts[stage], on[stage - 1], on[stage], m) if away else (0.0, 0.0))
                    for taken in itertools.product(*options):
                        if most_bytes(kind, orders, groups, taken) <= limit:
                            yield Pipeline(
                                schedule, m, groups,
                                tuple(PlacedStage(*ranges[k], on[k], taken[k], moved[k]) for k in range(count)),
                            )  # fmt: skip


def most_bytes(kind: object, orders: Sequence[Sequence[tuple[str, int, int]]], groups: int, costs: Sequence[StageCost]) -> float:
    most = 0.0
    for order in orders:
        splits = any(name == "W" for name, _, _ in order)
        held = {stage: 0 for _, stage, _ in order}
        fixed = sum(costs[stage].fixed_bytes for stage in held) + max(costs[stage].workspace_bytes for stage in held)
        for name, stage, _ in order:
            held[stage] += 1 if name == "F" else -1 if name == ("W" if splits else "B") else 0
            most = max(most, fixed + sum(count * costs[stage].live_bytes for stage, count in held.items()))
    return most


@settings(max_examples=100, deadline=None)
@given(
    rows=units,
    devices=machines,
    schedule=st.sampled_from(["1f1b", "gpipe", "interleaved-zb"]),
    sizes=st.sampled_from(["equal", "all"]),
    policies=st.sampled_from([("append",), ("append", "fresh", "scatter")]),
    lean=st.booleans(),
    tight=st.sampled_from([math.inf, 1.0, 0.7, 0.5, 0.2]),
)
def test_equals_enumeration(rows, devices, schedule, sizes, policies, lean, tight) -> None:  # type: ignore[no-untyped-def]
    costs = TableCosts(tuple(rows), slow_lean=lean)
    all_bytes = sum(2 * row.parameter_bytes + row.activation_bytes for row in rows)
    limit = tight * all_bytes if math.isfinite(tight) else math.inf
    best: dict[int, float] = {}
    for m in (1, 2, 4):
        for pipeline in every_pipeline(costs, devices, schedule, 1, m, range(1, devices.count + 1), policies, limit):
            if sizes == "equal" and len({stage.group.size for stage in pipeline.stages}) > 1:
                continue
            best[pipeline.groups] = min(best.get(pipeline.groups, math.inf), replay(pipeline).step_s)
    found = search_stages(
        costs, devices, limit_bytes=limit, microbatches=(1, 2, 4), schedules=(schedule,), sizes=sizes, policies=policies, simulate=replay,
        stages_per_group=(1,), every_row=True,
    )  # fmt: skip
    assert {row.groups for row in found.rows if row.best} == set(best)
    for row in found.rows:
        if row.best is None:
            assert row.why
        else:
            assert row.step_s == pytest.approx(best[row.groups], rel=1e-9, abs=1e-12)
            assert row.lower_bound_s == pytest.approx(row.step_s, rel=1e-9, abs=1e-12)
    assert (found.best is None) == (not best)


@settings(max_examples=60, deadline=None)
@given(
    rows=units,
    devices=st.sampled_from([Devices(1, 1), Devices(1, 2), Devices(2, 1), Devices(1, 3)]),
    schedule=st.sampled_from(["interleaved-1f1b", "interleaved-zb", "zbv"]),
    tight=st.sampled_from([math.inf, 0.7, 0.4]),
)
def test_equals_enumeration_with_two_stages_on_a_group(rows, devices, schedule, tight) -> None:  # type: ignore[no-untyped-def]
    costs = TableCosts(tuple(rows))
    limit = tight * sum(2 * row.parameter_bytes + row.activation_bytes for row in rows) if math.isfinite(tight) else math.inf
    best: dict[int, float] = {}
    for m in (1, 3):
        for pipeline in every_pipeline(costs, devices, schedule, 2, m, range(1, devices.count + 1), ("append",), limit):
            best[pipeline.groups] = min(best.get(pipeline.groups, math.inf), replay(pipeline).step_s)
    found = search_stages(
        costs, devices, limit_bytes=limit, microbatches=(1, 3), schedules=(schedule,), sizes="all", simulate=replay, stages_per_group=(2,),
        every_row=True,
    )  # fmt: skip
    assert {row.groups: pytest.approx(row.step_s, rel=1e-9, abs=1e-12) for row in found.rows if row.best} == best


@settings(max_examples=60, deadline=None)
@given(
    rows=units,
    devices=machines,
    schedule=st.sampled_from(["gpipe", "1f1b", "interleaved-1f1b", "interleaved-zb", "zbv"]),
    m=st.integers(1, 5),
)
def test_the_simulator_never_beats_the_bounds(rows, devices, schedule, m) -> None:  # type: ignore[no-untyped-def]
    """Every candidate that is simulated is compared with its bounds by the search itself."""
    found = search_stages(
        TableCosts(tuple(rows)), devices, limit_bytes=math.inf, microbatches=(m,), schedules=(schedule,), sizes="all", simulate=simulated,
        every_row=True,
    )  # fmt: skip
    for row in found.rows:
        assert row.best is None or row.lower_bound_s == pytest.approx(row.step_s, rel=1e-9, abs=1e-12)


def test_many_layers_on_many_devices() -> None:
    """96 equal layers on 1,024 devices: even stages, proven to a per cent."""
    costs = TableCosts((Unit(1.0, 2.0, 1.0, 0.01),) * 96, inner_s=1e-4, outer_s=1e-3)
    found = search_stages(
        costs, Devices(128, 8), limit_bytes=30.0, microbatches=(8, 32), groups=(1, 8, 32), simulate=simulated, tolerance=0.01
    )  # fmt: skip
    assert found.best and found.best.best
    assert {stage.stop - stage.start for stage in found.best.best.stages} == {96 // found.best.groups}
    assert found.best.step_s <= 1.01 * found.lower_bound_s / (1 - 0.01)
    assert found.rows[0].why == "a device would hold 192 B at least, and may hold 30 B"


def test_says_why_there_is_none() -> None:
    costs = TableCosts((Unit(1.0, 2.0, 1.0, 1.0),) * 3)
    found = search_stages(costs, Devices(1, 4), limit_bytes=math.inf, microbatches=(2,), groups=(1, 3, 4), simulate=replay)
    assert [row.why for row in found.rows] == [
        "",
        "4 devices do not make 3 groups of such sizes",
        "4 stages, and the model can be cut in 3",
    ]
    none = search_stages(costs, Devices(1, 4), limit_bytes=0.5, microbatches=(2,), simulate=replay)
    assert none.best is None and not none.exact
    assert math.isinf(none.lower_bound_s)


def test_policies_take_devices_as_they_say() -> None:
    devices = Devices(3, 4)
    assert devices.take((4, 2, 0), 4, "append")[0].devices == ((1, 2), (2, 2))
    assert devices.take((4, 2, 0), 4, "fresh")[0].devices == ((2, 4),)
    assert devices.take((4, 2, 0), 5, "fresh")[0].devices == ((1, 1), (2, 4))
    assert devices.take((4, 2, 0), 3, "scatter")[0].devices == ((1, 2), (2, 1))
    assert devices.take((0, 0, 0), 6, "scatter")[0].shape == (2, 2, 2)
    assert devices.take((4, 0, 0), 8, "append") == (devices.take((4, 0, 0), 8, "scatter")[0], (4, 4, 4))
    assert len(list(devices.choices((0, 0, 0), 12, ("append", "fresh", "scatter")))) == 1


def test_facts_of_1f1b() -> None:
    """The first of three stages has three forward passes ahead, the last one."""
    facts = facts_of("1f1b", 3, 1, 5)
    assert [(row.ahead, row.lead, row.live, row.backwards) for row in facts] == [(3, 3, 3, 2), (2, 2, 2, 3), (1, 1, 1, 4)]
    assert [row.live for row in facts_of("gpipe", 3, 1, 5)] == [5, 5, 5]


def test_the_best_lies_in_what_is_left_open() -> None:
    """A stage with many parameters has a device of its own: nothing else has to be reduced for it."""
    rows = (*(Unit(4.0, 8.0, 0.1, 0.5),) * 3, Unit(0.5, 1.0, 50.0, 0.1))
    found = search_stages(
        TableCosts(rows), Devices(4, 1), limit_bytes=math.inf, microbatches=(1, 2, 4, 8), sizes="all", simulate=simulated
    )  # fmt: skip
    assert found.best and found.best.best and found.exact
    assert [(stage.stop - stage.start, stage.group.size) for stage in found.best.best.stages] == [(3, 3), (1, 1)]
