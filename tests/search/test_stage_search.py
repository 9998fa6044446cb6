"""The stage search finds what exhaustive enumeration finds, and its bounds hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError
from autopar.ir.schedules import named
from autopar.search.stage_search import Devices, Pipeline, PlacedStage, StageCost, search_stages
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
            for chosen in itertools.product(policies, repeat=groups):
                used: tuple[int, ...] = (0,) * devices.nodes
                places = []
                for size, policy in zip(numbers, chosen, strict=True):
                    group, used = devices.take(used, size, policy)  # type: ignore[arg-type]
                    places.append(group)
                on = [places[kind.group_of(stage, groups)] for stage in range(count)]
                for inner in itertools.combinations(range(1, costs.units), count - 1):
                    cuts = (0, *inner, costs.units)
                    ranges = list(itertools.pairwise(cuts))
                    options = [costs.options(*ranges[stage], on[stage], m, 1) for stage in range(count)]
                    moved = [(0.0, 0.0), *(costs.transfer(cuts[stage], on[stage - 1], on[stage], m) for stage in range(1, count))]
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
