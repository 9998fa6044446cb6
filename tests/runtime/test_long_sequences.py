"""Attention over a split sequence in whole models, on real processes: rings, gathered keys, two axes, microbatches, recomputation,
pipelines, with norms and dropout along the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autopar
from autopar.ir.plan import Plan
from autopar.runtime.launch import RankPool
from autopar.runtime.verify import verify
from tests.zoo import ZOO

pytestmark = pytest.mark.processes
ATTENTION = "scaled_dot_product_attention_*"


def splits_of(plan: Plan, target: str = "scaled_dot_product_attention") -> set[tuple[str, ...]]:
    return {tuple(row.split.values()) for segment in plan.segments for row in segment.ops if target in row.target}


def check(name: str, pin: str, ranks: RankPool, mesh: Any, sizes: dict[str, Any] | None = None, **options: Any) -> Plan:
    """Plan with attention pinned, and compare with one device."""
    model = ZOO[name].build(layers=2, **(sizes or {}))
    example = ZOO[name].inputs(model, batch=4, sequence=16)
    plan = autopar.plan(model, example, f"cpu:{ranks.world_size}", mesh=mesh, pins={ATTENTION: pin}, **options)
    report = verify(model, example, plan, steps=1, optimizer="sgd", ranks=ranks)
    assert report.ok and report.max_relative_error < 1e-10, report
    return plan


def test_a_ring_of_four(ranks4: RankPool) -> None:
    plan = check("llama", "ring@tp", ranks4, (1, 4))
    assert splits_of(plan) == {("replicate", "ring")}


def test_gathered_keys_with_microbatches_and_recomputation(ranks2: RankPool) -> None:
    plan = check("llama", "l@tp", ranks2, (1, 2), microbatches=2, recompute="all")
    assert splits_of(plan) == {("replicate", "l")} and plan.microbatches == 2 and any(item.recompute for item in plan.segments)


def test_a_ring_without_a_causal_mask(ranks2: RankPool) -> None:
    check("bert", "ring@tp", ranks2, (1, 2), {"attention_probs_dropout_prob": 0.0})


@pytest.mark.parametrize("pin", ["ring@dp, ring@tp", "h@dp, ring@tp", "l@dp, l@tp"])
def test_two_axes(ranks4: RankPool, pin: str) -> None:
    plan = check("llama", pin, ranks4, (2, 2), recompute="all" if "h" in pin else "none")
    assert splits_of(plan) == {tuple(item.split("@")[0] for item in pin.split(", "))}


def test_a_ring_in_every_stage_of_a_pipeline(ranks4: RankPool) -> None:
    plan = check("llama", "ring@tp", ranks4, {"pp": 2, "dp": 1, "tp": 2}, microbatches=2)
    assert plan.pipeline is not None and len(plan.pipeline.stages) == 2
