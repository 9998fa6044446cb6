"""A user's operators on two ranks: split as was found by trial or registered, with the numbers of one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autopar
from autopar.ir.plan import Plan
from autopar.runtime.verification.launch import RankPool
from tests.custom_ops import Custom

pytestmark = pytest.mark.processes


def splits_of(plan: Plan, name: str) -> set[str]:
    return {split for segment in plan.segments for op in segment.ops if op.target.split(".")[1] == name for split in op.split.values()}


@pytest.mark.parametrize(
    ("options", "gated", "projected"),
    [
        ({"baseline": "ddp"}, "i", "i"),
        ({"baseline": "tp"}, "k", "k"),
        ({"baseline": "fsdp"}, "i", "i"),
    ],
    ids=["ddp", "tp", "fsdp"],
)
def test_operators_run_as_found_by_trial(options: dict[str, Any], gated: str, projected: str, ranks2: RankPool) -> None:
    torch.manual_seed(0)
    model, example = Custom(), (torch.randn(6, 4, 16),)
    plan = autopar.plan(model, example, "cpu:2", **options)
    assert gated in splits_of(plan, "gated") and projected in splits_of(plan, "project_heads")
    assert plan.replicated == ("autopar_tests.clipped.default",)
    assert "autopar_tests::gated: splits found by trial: i j k, k -> i j k (checked" in str(plan)
    assert "autopar_tests::clipped: runs replicated: no dim can be split" in str(plan)
    again = Plan.parse(plan.text())
    assert again == plan
    report = autopar.verify(model, example, again, ranks=ranks2)
    assert report.ok, report
