"""Models in stages, on real processes, against one device in float64: every model, every shape of mesh and every schedule at least once."""

from __future__ import annotations

import pytest

from autopar.ir.pipelining.schedules import SCHEDULES
from autopar.runtime.verification.launch import RankPool
from tests.pipelines import Case

pytestmark = pytest.mark.processes

TWO = (
    Case("gpt2", (2, 1, 1), "gpipe"),
    Case("llama", (2, 1, 1), "1f1b", uneven=0.25),
    Case("t5", (2, 1, 1), "interleaved-1f1b"),
    Case("bart", (2, 1, 1), "interleaved-zb"),
    Case("vit", (2, 1, 1), "zbv"),
    Case("resnet", (2, 1, 1), "1f1b", microbatches=1),
    Case("unet", (2, 1, 1), "1f1b", uneven=0.75),
    Case("unet-groups", (2, 1, 1), "interleaved-zb"),
    Case("unet-batch", (2, 1, 1), "gpipe", microbatches=1),
    Case("gpt2", (2, 1, 1), "zbv", recompute="all"),
    Case("llama", (1, 2, 1), None),
    Case("t5", (1, 1, 2), None, microbatches=2),
    Case("gpt2", (1, 2, 1), None, microbatches=2, recompute="all"),
    Case("vit", (1, 2, 1), None, microbatches=1, recompute="all"),
)
FOUR = (
    Case("gpt2", (2, 2, 1), "zbv"),
    Case("llama", (2, 1, 2), "interleaved-zb"),
    Case("t5", (4, 1, 1), "1f1b"),
    Case("bart", (2, 2, 1), "interleaved-1f1b"),
    Case("vit", (4, 1, 1), "gpipe", microbatches=8),
    Case("unet", (4, 1, 1), "1f1b", uneven=0.5),
    Case("resnet-tuned", (4, 1, 1), "zbv"),
    Case("unet-groups", (2, 2, 1), "gpipe"),
    Case("llama", (2, 2, 1), "1f1b", recompute="all"),
    Case("gpt2", ({"dp": 2, "tp": 1}, {"dp": 1, "tp": 2})),
    Case("t5", ({"dp": 1, "tp": 1}, {"dp": 3, "tp": 1}), microbatches=2, batch=12),
    Case("gpt2", (1, 2, 2), None),
)
EIGHT = (Case("gpt2", (2, 2, 2), "1f1b"),)


def check(case: Case, pool: RankPool) -> None:
    report = case.verify(pool, optimizer="adamw")
    assert report.ok and report.max_relative_error < 1e-10, report


@pytest.mark.parametrize("case", TWO, ids=str)
def test_two_ranks(ranks2: RankPool, case: Case) -> None:
    check(case, ranks2)


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_four_ranks(ranks4: RankPool, case: Case) -> None:
    check(case, ranks4)


@pytest.mark.parametrize("case", EIGHT, ids=str)
def test_eight_ranks(case: Case) -> None:
    with RankPool(8, threads=1, collective_timeout_s=180) as pool:
        check(case, pool)


def test_no_schedule_is_left_out() -> None:
    assert set(SCHEDULES) <= {case.schedule for case in (*TWO, *FOUR, *EIGHT)}
