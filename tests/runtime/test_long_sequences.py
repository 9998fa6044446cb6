"""Attention over a split sequence in whole models, on real processes: rings, gathered keys, two axes, microbatches, recomputation,
pipelines, with norms and dropout along the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import GPT2Config, GPT2LMHeadModel

import autopar
from autopar.ir.assignment import expand
from autopar.ir.plan import Plan
from autopar.ir.tracing.trace import trace
from autopar.runtime.verification.launch import RankPool
from autopar.runtime.verification.verify import verify
from tests.runtime.random_plans import parallel_module
from tests.runtime.simulated import simulate
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


# ---- norms and dropout between tensor-parallel regions (Korthikanti et al. 2022) -------------------------------------------------------


def test_the_search_finds_norms_and_dropout_along_the_sequence() -> None:
    """Weights too large to gather and few tokens: products are split by columns and rows, what lies between by tokens."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=4096, n_head=32, n_layer=2, n_positions=1024, vocab_size=8192, bos_token_id=0)).bfloat16()
        ids = torch.zeros(1, 1024, dtype=torch.int64)
    plan = autopar.plan(model, {"input_ids": ids, "labels": ids}, "h100x8", mesh=(1, 8), microbatches=1, recompute="none")
    (layers,) = [item for item in plan.segments if item.count == 2]
    ways = [(row.target.split(".")[1], row.split["tp"]) for row in layers.ops]
    assert [way for way in ways if way[0] in ("layer_norm", "addmm", "dropout", "scaled_dot_product_attention")] == [
        ("layer_norm", "d1"), ("addmm", "n:3"), ("scaled_dot_product_attention", "h"), ("addmm", "k"), ("dropout", "d1"),
        ("layer_norm", "d1"), ("addmm", "n"), ("addmm", "k"), ("dropout", "d1"),
    ]  # fmt: skip
    kinds = {(row.kind, row.phase) for row in plan.collectives if row.value.startswith(("linear", "addmm", "layer_norm", "reshard"))}
    assert ("all_reduce", "forward") not in kinds


class Block(nn.Module):
    """Returns what dropout left beside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left = F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.25)
        return (x + left).square().mean(), left


def test_dropout_along_the_sequence_and_the_model_around_it(ranks2: RankPool) -> None:
    model, x = Block(), torch.randn(2, 64, 16)
    pins = {"layer_norm_0": "d1@tp", "linear_0": "n@tp", "linear_1": "k@tp", "dropout_0": "d1@tp"}
    plan = autopar.plan(model, (x,), "cpu:2", mesh=(1, 2), pins=pins)
    assert splits_of(plan, "dropout") == splits_of(plan, "layer_norm") == {("replicate", "d1")}
    report = verify(model, (x,), plan, steps=1, optimizer="sgd", ranks=ranks2)
    assert report.ok, report

    traced = trace(model, (x,), {})
    assignment = expand(plan, traced.graph)

    def rank(mesh: DeviceMesh) -> tuple[Tensor, Tensor, Tensor]:
        module = parallel_module(model, traced, assignment, mesh)
        loss, left = module(x)
        loss.backward()
        bias = dict(module.named_parameters())["down.bias"].grad
        assert bias is not None
        return loss.detach(), left.detach(), bias.full_tensor()

    (loss, left, bias), (other_loss, other_left, _) = simulate((1, 2), rank)
    assert torch.equal(loss, other_loss) and torch.equal(left, other_left)
    kept = left != 0
    assert not torch.equal(kept[:, :32], kept[:, 32:])  # parts draw masks of their own
    assert 0.70 < kept.double().mean() < 0.80
    torch.testing.assert_close(loss, (x + left).square().mean())
    expected = ((2 * (x + left) / x.numel()) * kept / 0.75).sum((0, 1))  # through the mask of the forward pass
    torch.testing.assert_close(bias, expected)
