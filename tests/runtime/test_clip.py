"""`clip_grad_norm_` against PyTorch's on one device, with gradients in every placement and on two meshes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import autopar
from autopar.ir.placement import R, S
from autopar.ir.plan import Plan
from autopar.runtime.process_mesh import mesh_for
from autopar.runtime.state.checkpoint import whole_tensor
from autopar.runtime.state.clip import clip_grad_norm_
from autopar.runtime.state.shards import distribute
from autopar.runtime.verification.launch import RankPool
from tests.runtime.pipelined import example, planned
from tests.runtime.random_plans import float64

LAYOUTS = [
    ((R, R), (6, 5)),
    ((S(0), R), (6, 5)),
    ((R, S(1)), (3, 8)),
    ((S(0), S(0)), (7, 2)),
    ((S(0, 3), S(1)), (6, 4)),
    ((S(0), S(0)), (1,)),
]


def gradients(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=dtype, generator=generator) for _, shape in LAYOUTS] + [torch.ones(2, dtype=dtype)]


def reference(max_norm: float, norm_type: float) -> tuple[float, list[torch.Tensor]]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients()]
    for parameter, gradient in zip(parameters, gradients(), strict=True):
        parameter.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
    return norm.item(), [parameter.grad for parameter in parameters if parameter.grad is not None]


def clipped(max_norm: float, norm_type: float) -> tuple[float, bool, list[torch.Tensor]]:
    meshes = [mesh_for({"dp": 2, "tp": 2}), mesh_for({"dp": 1, "tp": 4})]
    parameters: list[nn.Parameter] = []
    *sharded, plain = gradients()
    for index, ((state, _), gradient) in enumerate(zip(LAYOUTS, sharded, strict=True)):
        grad = distribute(gradient, meshes[index % 2], state)
        parameters.append(nn.Parameter(torch.zeros_like(grad)))
        parameters[-1].grad = grad
    parameters.append(nn.Parameter(torch.zeros_like(plain)))
    parameters[-1].grad = plain
    norm = clip_grad_norm_(iter(parameters), max_norm, norm_type)
    after = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    return norm.item(), isinstance(norm, DTensor), after


def of_a_sum_and_of_nothing() -> tuple[float, float, str]:
    mesh = mesh_for({"dp": 2, "tp": 2})
    parameter = nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Replicate(), Replicate()]))
    parameter.grad = DTensor.from_local(torch.full((4,), dist.get_rank() + 1.0), mesh, [Partial(), Partial()])
    total = clip_grad_norm_(parameter, 1e9).item()  # (1 + 2 + 3 + 4) * sqrt(4)
    empty = clip_grad_norm_(nn.Linear(2, 2), 1.0).item()
    parameter = nn.Parameter(distribute(torch.zeros(16), mesh, (S(0), S(0, 2))))
    parameter.grad = DTensor.from_local(
        torch.full((4,), torch.nan if dist.get_rank() == 3 else 1.0), mesh, [Shard(0), _StridedShard(0, split_factor=2)]
    )
    try:
        clip_grad_norm_(parameter, 1.0, error_if_nonfinite=True)
    except RuntimeError as error:
        return total, empty, str(error)
    return total, empty, ""


@pytest.mark.processes
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_equals_one_device(ranks4: RankPool, max_norm: float, norm_type: float) -> None:
    norm, expected = reference(max_norm, norm_type)
    for found, is_dtensor, after in ranks4.run(clipped, max_norm, norm_type):
        assert not is_dtensor
        assert found == pytest.approx(norm, rel=1e-12)
        for one, other in zip(after, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.processes
def test_sums_nothing_and_nan(ranks4: RankPool) -> None:
    for total, empty, message in ranks4.run(of_a_sum_and_of_nothing):
        assert total == pytest.approx(20.0) and empty == 0.0
        assert "not finite" in message  # on the ranks without the nan too


# ---- under a pipeline -----------------------------------------------------------------------------------------------------------


def clipped_step(plan: Plan, how: str, norm_type: float) -> tuple[float, dict[str, torch.Tensor]]:
    model, inputs = example("gpt2")
    with float64():
        module = autopar.parallelize(model, inputs, plan=plan)
    module.step(**inputs)
    if how == "autopar":
        norm = clip_grad_norm_(module, 0.1, norm_type)
    else:  # taken from where the user's own import may have it since before autopar
        norm = torch.nn.utils.clip_grad.clip_grad_norm_(module.parameters(), 0.1, norm_type, foreach=how == "foreach")
    assert not isinstance(norm, DTensor)
    return norm.item(), {name: whole_tensor(p.grad) for name, p in module.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def pipelines() -> list[Plan]:
    return [planned("gpt2", {"pp": 2, "dp": 1, "tp": 1}, 2), planned("gpt2", {"pp": 2, "dp": 1, "tp": 2}, 2)]


@pytest.mark.processes
@pytest.mark.parametrize(("how", "norm_type"), [("autopar", 2.0), ("foreach", 2.0), ("each", 2.0), ("autopar", float("inf"))])
def test_stages_are_clipped_by_the_norm_of_the_whole_model(
    ranks2: RankPool, ranks4: RankPool, pipelines: list[Plan], how: str, norm_type: float
) -> None:
    model, inputs = example("gpt2")
    model(**inputs).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type).item()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for ranks, plan in zip((ranks2, ranks4), pipelines, strict=True):
        seen = set()
        for found, gradients in ranks.run(clipped_step, plan, how, norm_type):
            assert found == pytest.approx(norm, rel=1e-12)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-15)
            seen |= gradients.keys()
        assert seen == expected.keys()
