"""The seven models under the searched plan and every baseline, on real processes, against one device in float64."""

from __future__ import annotations

import pytest

import autopar
from autopar.runtime.verification.launch import RankPool
from autopar.search.baselines import BASELINES
from tests.zoo import ZOO, talkative

pytestmark = pytest.mark.processes
SEVEN = ("gpt2", "llama", "qwen3", "bert", "t5", "vit", "resnet")


def check(name: str, baseline: str | None, ranks: int, pool: RankPool) -> None:
    model = ZOO[name].build().double().train()
    example = ZOO[name].inputs(model)
    plan = autopar.plan(model, example, talkative(ranks), baseline=baseline)
    assert any(set(op.split.values()) != {"replicate"} for segment in plan.segments for op in segment.ops), "a plan that splits nothing"
    report = autopar.verify(model, example, plan, ranks=pool)
    assert report.ok and report.max_relative_error < 1e-10, report


@pytest.mark.parametrize("baseline", [None, *BASELINES])
@pytest.mark.parametrize("name", SEVEN)
def test_four_ranks(ranks4: RankPool, name: str, baseline: str | None) -> None:
    check(name, baseline, 4, ranks4)


@pytest.mark.parametrize("baseline", [None, "zero1", "tp-sp"])
@pytest.mark.parametrize("name", SEVEN)
def test_two_ranks(ranks2: RankPool, name: str, baseline: str | None) -> None:
    check(name, baseline, 2, ranks2)
