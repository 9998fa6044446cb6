"""`verify` finds nothing where there is nothing, and finds every kind of thing that is put there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autopar
from autopar.errors import PlanError, PlanMismatchError, RanksFailedError, TraceError, VerifyError
from autopar.ir.plan import Plan
from autopar.runtime.module import ParallelModule
from autopar.runtime.pipelining.pipeline import PipelineModule
from autopar.runtime.verification import verify_runs
from autopar.runtime.verification.launch import RankPool
from autopar.runtime.verification.verify import verify
from autopar.runtime.verification.verify_report import Facts, Key, judge
from autopar.runtime.verification.verify_runs import Job, on_a_rank
from tests.runtime import pipelined
from tests.runtime.random_plans import empty_plan
from tests.zoo import ZOO

pytestmark = pytest.mark.processes
Found = tuple[Facts | None, dict[Key, float]]


def plan_for(name: str, model: nn.Module, baseline: str | None = None, ranks: int = 2, **sizes: Any) -> tuple[Any, Plan]:
    example = ZOO[name].inputs(model, **sizes)
    return example, autopar.plan(model, example, f"cpu:{ranks}", baseline=baseline)


@pytest.mark.parametrize(("name", "baseline"), [("gpt2", "tp"), ("convnet", "ddp"), ("encoder", "fsdp")])
def test_agrees(ranks2: RankPool, name: str, baseline: str) -> None:
    model = ZOO[name].build(layers=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    example, plan = plan_for(name, model, baseline)
    report = verify(model, example, plan, steps=2, optimizer="adamw", ranks=ranks2)
    assert report.ok and report.max_relative_error < 1e-10, report
    assert {row.kind for row in report.rows} >= {"loss", "output", "gradient", "parameter", "between ranks"}
    assert any(row.kind == "buffer" for row in report.rows) == any(True for _ in model.buffers())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "ok: no tensor is off by more than 1e-10" in str(report)


def test_meta_model_without_loss_in_evaluation_mode(ranks2: RankPool) -> None:
    model = ZOO["mlp"].build(device="meta", layers=1).eval()
    example, plan = plan_for("mlp", model, "ddp", device="meta")
    report = verify(model, example, plan, steps=1, optimizer="sgd", ranks=ranks2)
    assert report.ok and any("random weights" in note for note in report.notes)
    assert any(row.kind == "gradient" for row in report.rows) and all(tensor.is_meta for tensor in model.parameters())


# ---- it must be able to fail ----------------------------------------------------------------------------------------------------


def unreduced(job: Job) -> Found:
    """Gradients are not added up over the ranks."""
    original = dist.all_reduce
    dist.all_reduce = lambda *_, **__: Done()  # type: ignore[assignment]
    try:
        return on_a_rank(job)
    finally:
        dist.all_reduce = original


class Done:
    def wait(self) -> None: ...


def tampered(job: Job, tamper: Callable[[ParallelModule], None]) -> Found:
    class Tampered(ParallelModule):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            tamper(self)

    verify_runs.ParallelModule = Tampered  # type: ignore[misc]
    try:
        return on_a_rank(job)
    finally:
        verify_runs.ParallelModule = ParallelModule  # type: ignore[misc]


def _one_rank(module: ParallelModule) -> None:
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(iter(module.down.parameters())).to_local().mul_(1 + 1e-8)  # type: ignore[union-attr,operator]


def _all_ranks(module: ParallelModule) -> None:
    with torch.no_grad():
        next(iter(module.down.parameters())).to_local().mul_(1 + 1e-8)  # type: ignore[union-attr,operator]


def _forgotten(module: ParallelModule) -> None:
    module.down.weight.requires_grad_(False)  # type: ignore[union-attr,operator]


def one_rank(job: Job) -> Found:
    return tampered(job, _one_rank)


def all_ranks(job: Job) -> Found:
    return tampered(job, _all_ranks)


def forgotten(job: Job) -> Found:
    return tampered(job, _forgotten)


class Sabotaged:
    """A pool whose ranks run another function than they are asked to."""

    def __init__(self, pool: RankPool, function: Callable[[Job], Found]) -> None:
        self.pool, self.function = pool, function

    def run(self, function: object, *args: Any, **kwargs: Any) -> list[Found]:
        assert function is on_a_rank
        return self.pool.run(self.function, *args, **kwargs)


@pytest.fixture(scope="module")
def mlp() -> Iterator[tuple[nn.Module, Any, Plan]]:
    model = ZOO["mlp"].build(layers=1)
    yield model, *plan_for("mlp", model, "ddp")


@pytest.mark.parametrize(
    ("function", "kind", "name"),
    [
        (unreduced, "gradient", "down.weight, step 1"),
        (one_rank, "between ranks", "parameter down.weight on rank 1"),
        (all_ranks, "output", "0, step 1"),
        (forgotten, "gradient", "down.weight, step 1"),
    ],
)
def test_finds_what_is_wrong(ranks2: RankPool, mlp: tuple[nn.Module, Any, Plan], function: Any, kind: str, name: str) -> None:
    report = verify(*mlp, steps=1, optimizer="sgd", ranks=Sabotaged(ranks2, function))  # type: ignore[arg-type]
    wrong = {(row.kind, row.name) for row in report.rows if not row.ok}
    assert not report.ok and (kind, name) in wrong, report
    assert report.max_relative_error == report.worst.relative_error > 1e-10
    assert "NOT OK" in str(report) and report.worst.name in str(report)


class Broken:
    def run(self, *_: object, **__: object) -> None:
        raise RanksFailedError("1 of 2 ranks failed: rank 0: ValueError: broken", {0: ("ValueError: broken", "")})


def test_errors(mlp: tuple[nn.Module, Any, Plan]) -> None:
    model, example, plan = mlp
    with pytest.raises(PlanMismatchError, match="the plan is for `MLP`"):
        verify(ZOO["mlp"].build(layers=2), example, plan)
    with pytest.raises(VerifyError, match="rank 0: ValueError: broken"):
        verify(model, example, plan, steps=1, optimizer="sgd", ranks=Broken())  # type: ignore[arg-type]
    with pytest.raises(VerifyError, match=r"not in torch\.float16"):
        verify(model, example, plan, dtype=torch.float16)


PLAN = empty_plan((1, 1)).model_copy(update={"name": "p"})


def report_on(expected: dict[Key, Tensor], found: dict[Key, Tensor]) -> Any:
    return judge(expected, [(found, {})], 1e-10, plan=PLAN, holders={}, steps=1, optimizers=("sgd",), dtype="float64")


def test_judgement() -> None:
    big, tiny = ("sgd", "gradient", "big, step 1"), ("sgd", "gradient", "tiny, step 1")
    count, bad = ("sgd", "buffer", "count"), ("sgd", "output", "0, step 1")
    expected = {big: torch.ones(4), tiny: torch.full((1,), 1e-17), count: torch.tensor(3), bad: torch.tensor([1.0, torch.nan, torch.inf])}
    expected = {key: value.double() if value.is_floating_point() else value for key, value in expected.items()}
    assert report_on(expected, expected).max_relative_error == 0.0
    noisy = report_on(expected, expected | {tiny: torch.full((1,), 3e-17, dtype=torch.float64)})
    assert noisy.ok and noisy.max_relative_error == pytest.approx(1e-13)  # relative to 1e-4 of the whole gradient's norm
    for change in (
        {count: torch.tensor(4)},
        {bad: torch.tensor([1.0, 2.0, torch.inf]).double()},
        {bad: torch.tensor([1.0, torch.nan, -torch.inf]).double()},
        {big: torch.ones(1, 4).double()},
        {("sgd", "gradient", "new, step 1"): torch.ones(1)},
    ):
        report = report_on(expected, {**expected, **change})
        assert not report.ok and report.max_relative_error == float("inf") and report.worst.name == next(iter(change))[2]
    missing = report_on(expected, {key: value for key, value in expected.items() if key != tiny})
    assert not missing.ok and missing.worst.name == "tiny, step 1"


class Cancelling(nn.Module):
    """The gradient of `layer.bias` is a sum of terms that cancel, and all of them are larger than the gradient of `layer.weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 16)
        self.register_buffer("weights", torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(1e-5 * x)
        return ((hidden - hidden.mean(0)) * self.weights.sin()).sum()


def off(job: Job) -> Found:
    """A gradient that should be zero is small instead."""
    facts, distances = on_a_rank(job)
    if facts is not None:
        facts["sgd", "gradient", "layer.bias, step 2"] += 1e-9
    return facts, distances


def test_what_is_only_rounding_is_judged_as_rounding(ranks2: RankPool) -> None:
    model, example = Cancelling(), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    plan = autopar.plan(model, example, "cpu:2", baseline="ddp")
    report = verify(model, example, plan, ranks=ranks2)
    assert report.ok and any("rounding is much of `layer.bias`" in note for note in report.notes), report
    wrong = verify(model, example, plan, ranks=Sabotaged(ranks2, off))  # type: ignore[arg-type]
    assert not wrong.ok and wrong.worst.name.startswith("layer.bias"), wrong


def test_rounding_excuses_nothing_that_is_large() -> None:
    """What the last digit moves is forgiven up to the tolerance times the whole gradient."""
    big, tiny = ("sgd", "gradient", "big, step 1"), ("sgd", "gradient", "tiny, step 1")
    expected = {big: torch.ones(4).double(), tiny: torch.full((1,), 1e-13).double()}
    moved = {big: torch.full((4,), 3.0).double(), tiny: torch.full((1,), 2e-13).double()}

    def report(change: Tensor) -> Any:
        found = expected | {tiny: change.double()}
        return judge(expected, [(found, {})], 1e-10, plan=PLAN, holders={}, steps=1, optimizers=("sgd",), dtype="float64", moved=moved)

    assert report(torch.full((1,), 5e-12)).ok and not report(torch.full((1,), 2e-11)).ok  # 100 times 1e-13
    moved[tiny] = torch.ones(1).double()
    assert report(torch.full((1,), 1e-10)).ok and not report(torch.full((1,), 3e-10)).ok  # 1e-10 times a norm of 2


class Stubborn(nn.Module):
    """Keeps a tensor that `copy.deepcopy` refuses, and recomputes in float32 whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old form of weight norm is what is tried here
            self.inner = torch.nn.utils.weight_norm(nn.Linear(8, 8))
        self.gradient_checkpointing = True

    def step(self, x: Tensor) -> Tensor:
        return self.inner(x.float().square().to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return (checkpoint(self.step, x, use_reentrant=False) if self.gradient_checkpointing else self.step(x)).sum()


def test_what_is_hard_to_copy_and_to_cast(ranks2: RankPool) -> None:
    model, x = Stubborn(), torch.randn(4, 8)
    report = verify(model, x, autopar.plan(model, x, "cpu:2", baseline="ddp"), steps=1, optimizer="sgd", ranks=ranks2)
    assert report.ok, report
    assert model.gradient_checkpointing


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("there is but one of me")


def test_what_cannot_be_copied_is_named(ranks2: RankPool) -> None:
    model, x = Uncopied(8, 8), torch.randn(4, 8)
    with pytest.raises(VerifyError, match=r"Uncopied cannot be copied.*there is but one of me"):
        verify(model, x, autopar.plan(model, x, "cpu:2"), ranks=ranks2)


def test_wrong_arguments_are_named() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    plan = autopar.plan(model, x, "cpu:2")
    wrong: Any = "plan.json"
    with pytest.raises(VerifyError, match="lion"):
        verify(model, x, plan, optimizer="lion")  # type: ignore[arg-type]
    with pytest.raises(VerifyError, match="at least one step"):
        verify(model, x, plan, steps=0)
    with pytest.raises(PlanError, match=r"is a str.*Plan\.load"):
        autopar.verify(model, x, wrong)
    with pytest.raises(PlanError, match=r"is a str.*Plan\.load"):
        autopar.parallelize(model, x, plan=wrong)
    with pytest.raises(TraceError, match=r"is a str.*nn\.Module"):
        autopar.plan(wrong, x, "cpu:2")


# ---- microbatches and stages ----------------------------------------------------------------------------------------------------


def test_agrees_in_microbatches(ranks2: RankPool) -> None:
    model, inputs = pipelined.example("tiny")
    plan = pipelined.planned("tiny", {"dp": 2, "tp": 1}, 4, recompute=1)
    report = verify(model, inputs, plan, steps=2, optimizer="sgd", ranks=ranks2)
    assert report.ok and "dp=2, tp=1, 4 microbatches" in str(report), report
    assert {row.kind for row in report.rows} == {"loss", "output", "gradient", "parameter", "between ranks"}


def test_agrees_in_stages(ranks2: RankPool) -> None:
    model, inputs = pipelined.example("tiny")
    plan = pipelined.planned("tiny", {"pp": 2, "dp": 1, "tp": 1}, 2, "1f1b", recompute=1)
    report = verify(model, inputs, plan, steps=2, ranks=ranks2)
    assert report.ok and "on 2 ranks (pp=2, dp=1, tp=1, 1f1b, 2 microbatches)" in str(report), report
    stages = {row.name: row.stages for row in report.rows if row.kind == "parameter"}
    assert stages.keys() == dict(model.named_parameters()).keys()
    assert stages["embed.weight"] == (0, 1) and stages["blocks.1.4.weight"] == (1,)
    assert any(row.kind == "between ranks" and row.name == "gradient embed.weight, step 1 on rank 1" for row in report.rows)


def other_copy(job: Job) -> Found:
    class Tampered(PipelineModule):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if dist.get_rank() == 1:
                with torch.no_grad():
                    self.embed.weight.to_local().mul_(1 + 1e-8)  # type: ignore[union-attr,operator]

    verify_runs.PipelineModule = Tampered  # type: ignore[misc]
    try:
        return on_a_rank(job)
    finally:
        verify_runs.PipelineModule = PipelineModule  # type: ignore[misc]


def test_finds_tied_weights_that_differ(ranks2: RankPool) -> None:
    model, inputs = pipelined.example("tiny")
    plan = pipelined.planned("tiny", {"pp": 2, "dp": 1, "tp": 1}, 2)
    report = verify(model, inputs, plan, steps=1, optimizer="sgd", ranks=Sabotaged(ranks2, other_copy))  # type: ignore[arg-type]
    assert not report.ok
    wrong = {(row.kind, row.where) for row in report.rows if not row.ok}
    assert ("between ranks", "parameter embed.weight on rank 1 (stages 0, 1, sgd)") in wrong, report


def test_a_loss_is_needed_for_microbatches(ranks2: RankPool) -> None:
    model = ZOO["mlp"].build(layers=1)
    example = ZOO["mlp"].inputs(model)
    plan = autopar.plan(model, example, "cpu:2", microbatches=2)
    with pytest.raises(VerifyError, match="return the loss from"):
        verify(model, example, plan, ranks=ranks2)
