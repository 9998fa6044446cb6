"""Leaf modules on two ranks: the user's module as it is, with the numbers of one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.errors import PlanError, RuleError
from autopar.ir.plan import Plan
from autopar.ir.rules import register
from autopar.runtime.verification.launch import RankPool
from autopar.runtime.verification.verify_report import VerifyReport
from tests.leafy import Leafy, Noisy, Rounding, Router, Rows

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    known = dict(register.ALL)
    yield
    register.ALL.clear()
    register.ALL.update(known)


def checked(model: nn.Module, ranks: RankPool, *, rows: int = 8, **options: Any) -> tuple[Plan, VerifyReport]:
    torch.manual_seed(0)
    example = (torch.randn(rows, 12),)
    plan = autopar.plan(model, example, "cpu:2", leaf_modules=["blocks.*.leaf"], **options)
    assert plan.leaf_modules == tuple(f"blocks.{index}.leaf" for index in range(len(model.blocks)))  # type: ignore[arg-type]
    report = autopar.verify(model, example, Plan.parse(plan.text()), ranks=ranks)
    assert report.ok, report
    return plan, report


def splits_of(plan: Plan) -> set[str]:
    return {split for segment in plan.segments for op in segment.ops if op.target == "autopar.leaf" for split in op.split.values()}


@pytest.mark.parametrize(
    "options",
    [
        {"baseline": "ddp"},
        {"baseline": "fsdp"},
        {"mesh": {"pp": 2, "dp": 1}},
        {"mesh": (2, 1), "recompute": "all"},
    ],
    ids=["ddp", "fsdp", "pipeline", "recompute"],
)
def test_a_leaf_that_looks_at_values_and_counts_runs_whole(options: dict[str, Any], ranks2: RankPool) -> None:
    plan, _ = checked(Leafy(Router), ranks2, **options)
    assert splits_of(plan) <= {"replicate", "replicate/P"}
    assert plan.replicated == ("autopar.leaf",)


def test_random_numbers_and_batch_norm_in_a_leaf_are_those_of_one_device(ranks2: RankPool) -> None:
    checked(Leafy(Noisy), ranks2, baseline="ddp")


def test_a_leaf_keeps_its_own_backward(ranks2: RankPool) -> None:
    plan, _ = checked(Leafy(Rounding), ranks2, baseline="ddp")
    assert "replicate" in splits_of(plan)


@pytest.mark.parametrize(
    "options",
    [{"baseline": "ddp"}, {"mesh": (2, 1), "microbatches": 2}, {"mesh": {"pp": 2, "dp": 1}, "microbatches": 2}],
    ids=["ddp", "microbatches", "pipeline"],
)
def test_rows_that_are_declared_independent_are_split(options: dict[str, Any], ranks2: RankPool) -> None:
    autopar.register_rule(Rows, "n [h] -> n [h]")
    plan, _ = checked(Leafy(Rows), ranks2, **options)
    if options.get("baseline") == "ddp":
        assert "n" in splits_of(plan) and plan.replicated == ()
    assert "leaf module Rows: splits registered: [p0_0], n [h] -> n [h] (checked" in str(plan)


@pytest.mark.parametrize(
    ("leaf", "rule", "words"),
    [
        (Router, "n [h] -> n [h], n", r"leaf module Router changes its buffers"),
        (Noisy, "n [h] -> n [h]", r"leaf module Noisy"),
        (Rows, "n h -> n h", r"leaf module Rows, .* is wrong"),
    ],
)
def test_a_leaf_that_is_not_as_declared_is_refused(leaf: type[nn.Module], rule: str, words: str) -> None:
    autopar.register_rule(leaf, rule)
    with pytest.raises(RuleError, match=words):
        autopar.plan(Leafy(leaf), (torch.randn(8, 12),), "cpu:2", leaf_modules=[leaf])


def test_microbatches_need_to_know_that_rows_are_independent() -> None:
    with pytest.raises(PlanError, match=r"blocks\.0\.leaf: .*needs the whole batch"):
        autopar.plan(Leafy(Rows), (torch.randn(8, 12),), "cpu:2", leaf_modules=[Rows], mesh=(2, 1), microbatches=2)
