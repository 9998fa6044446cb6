"""`autopar diff`: silent on equal plans, the same from both sides, decisions before consequences."""

from __future__ import annotations

import io
from typing import Any

from hypothesis import HealthCheck, given, settings

from autopar.ir.plan import Plan
from autopar.report.diff import Change, changes, diff
from autopar.report.terminal import console
from tests.report.plans import plans
from tests.report.sample import sample_plan

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def sides(found: list[Change]) -> list[tuple[str, str, str]]:
    return sorted((item.what, item.before, item.after) for item in found)


def text(a: Plan, b: Plan) -> str:
    file = io.StringIO()
    diff(a, b, console(file))
    return file.getvalue()


def edited(**parts: Any) -> Plan:
    return sample_plan().model_copy(update=parts)


@QUICK
@given(plans(), plans())
def test_symmetric_and_empty_on_equal_plans(a: Plan, b: Plan) -> None:
    assert changes(a, a) == []
    assert changes(a, Plan.parse(a.text())) == []
    forward, backward = changes(a, b), changes(b, a)
    assert bool(forward) == (a != b)
    assert len(forward) == len(backward)
    if not any("details of" in item.what or "#" in item.what or "*" in item.what for item in forward):
        assert sides(backward) == sorted((what, after, before) for what, before, after in sides(forward))


def test_equal_plans() -> None:
    assert text(sample_plan(), sample_plan()) == "The plans are equal.\n"


def test_decisions_come_first_and_consequences_carry_per_cents() -> None:
    plan = sample_plan()
    rows = list(plan.parameters)
    rows[6] = rows[6].model_copy(update={"stored": {"dp": "R", "tp": "S(0)"}, "gather": "never"})
    other = edited(parameters=tuple(rows), predicted=plan.predicted.model_copy(update={"cost_s": 0.88}))
    told = text(plan, other)
    assert told.index("mlp.up_proj.weight") < told.index("step time")
    assert "S(1)@dp S(0)@tp, gathered per use" in told
    assert "x32" in told
    assert "+10.0%" in told or "+10%" in told


def test_a_changed_split_is_told_once_with_its_repeats() -> None:
    plan = sample_plan()
    other = Plan.parse(plan.text().replace('"dp": "batch", "tp": "heads"', '"dp": "batch", "tp": "replicate"'))
    (change,) = changes(plan, other)
    assert change == Change("decisions", "attention in model.layers.0.self_attn", "batch@dp heads@tp", "batch@dp replicate@tp", "x32")


def test_only_prices_differ() -> None:
    told = text(sample_plan(), edited(predicted=sample_plan().predicted.model_copy(update={"compute_s": 0.71})))
    assert "The decisions are the same." in told
    assert "computing" in told


def test_a_difference_too_small_for_the_units_is_told_exactly() -> None:
    told = text(sample_plan(), edited(predicted=sample_plan().predicted.model_copy(update={"cost_s": 0.8000000001})))
    assert "0.8000000001" in told


def test_differences_in_the_last_digit_of_large_numbers_are_told() -> None:
    plan = sample_plan()
    sizes = [2**62 + 1, 2**62 + 2]
    pair = [edited(cluster=plan.cluster.model_copy(update={"memory_bytes": size})) for size in sizes]
    limits = [edited(predicted=plan.predicted.model_copy(update={"memory_limit_bytes": size})) for size in sizes]
    assert str(2**62 + 1) in text(*pair)
    assert str(2**62 + 2) in text(*limits)


def test_other_depth_is_another_model() -> None:
    told = text(sample_plan(4), sample_plan(8))
    assert told.startswith("these are plans for different things")


def test_the_same_decisions_folded_otherwise_are_the_same() -> None:
    plan = sample_plan(2)
    first, layers, last = plan.segments
    renamed = tuple(op.model_copy(update={"name": f"{op.name}_b"}) for op in layers.ops)
    unfolded = (
        first,
        layers.model_copy(update={"count": 1}),
        layers.model_copy(update={"count": 1, "start": layers.start + layers.length, "ops": renamed}),
        last,
    )
    assert not [item for item in changes(plan, plan.model_copy(update={"segments": unfolded})) if item.section == "decisions"]
