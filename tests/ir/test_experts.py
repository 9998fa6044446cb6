"""Routed experts: what is recognised as such, and what is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.ir import experts
from autopar.ir.graph import Graph, Op
from autopar.ir.rules import splits
from autopar.ir.rules.operators import operator
from autopar.ir.text import parse, to_text
from autopar.ir.tracing.trace import trace
from autopar.runtime.verification.one_dtype import EveryDtype

TOKENS, WIDTH, INNER, EXPERTS, SLOTS = 12, 8, 8, 4, 2


class Routed(nn.Module):
    """Routed experts as libraries write them; `how` says which of the many ways to write each step."""

    def __init__(self, *how: str) -> None:
        super().__init__()
        self.how = how
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH))
        self.bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))

    def forward(self, x: Tensor) -> Any:
        how = self.how
        weights, ids = self.router(x).softmax(-1).topk(SLOTS)
        flat, flat_weights = ids.reshape(-1), weights.reshape(-1)
        if "argsort" in how:
            order = flat.argsort()
            expert = flat[order]
        else:
            expert, order = torch.sort(flat, stable=True)
        token = torch.div(order, SLOTS, rounding_mode="floor") if "div" in how else order // SLOTS
        counts = F.one_hot(flat, EXPERTS).sum(0) if "one-hot" in how else torch.histc(expert.float(), EXPERTS, 0, EXPERTS - 1)
        if "other counts" in how:
            counts = torch.histc((ids.reshape(-1) + 1).float(), EXPERTS, 0, EXPERTS - 1)
        ends = counts.cumsum(0).to(torch.int32)
        rows = x[token] if "select" not in how else x.index_select(0, token)
        if "weights before" in how:
            rows = rows * flat_weights[order].unsqueeze(-1)
        rows = F.grouped_mm(rows, self.up.transpose(1, 2), offs=ends) + self.bias[expert]
        if "over rows" in how:
            rows = rows - rows.mean(0)
        gate, value = (rows[:, ::2], rows[:, 1::2]) if "interleaved" in how else rows.chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * value, self.down, offs=ends)
        if not {"weights before", "weights after"} & set(how):
            rows = rows * flat_weights[order][:, None]
        if "added by index" in how:
            return torch.zeros_like(x).index_add(0, token, rows)
        if "not undone" in how:
            back = rows[order]
        elif "put back" in how:
            back = torch.zeros_like(rows).index_put((order,), rows)
        elif "argsort" in how:
            back = rows[order.argsort()]
        else:
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(order.shape[0])
            back = rows[inverse]
        back = back.view(-1, SLOTS, WIDTH)
        if "weights after" in how:
            back = back * weights.unsqueeze(-1)
        return (back.sum(1), rows) if "rows returned" in how else back.sum(1)


def in_float64(module: nn.Module, x: Tensor) -> Tensor:
    with EveryDtype():
        found: Tensor = module(x)
    return found


def in_bfloat16(module: nn.Module, x: Tensor) -> Graph:
    """The graph of `module` in the one dtype in which PyTorch traces grouped products."""
    return trace(copy.deepcopy(module).bfloat16(), (x.bfloat16(),)).graph


def traced(module: nn.Module, x: Tensor) -> list[Op]:
    return [op for op in in_bfloat16(module, x).ops if op.target == experts.EXPERTS]


RECOGNISED = [
    (),
    ("argsort", "div", "select"),
    ("weights before",),
    ("weights after", "put back"),
    ("added by index", "one-hot"),
    ("interleaved",),
]


@pytest.mark.parametrize("how", RECOGNISED, ids=" and ".join)
def test_experts_are_recognised_however_they_are_written(how: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    module, x = Routed(*how), torch.randn(TOKENS, WIDTH)
    graph = in_bfloat16(module, x)
    (op,) = [op for op in graph.ops if op.target == experts.EXPERTS]
    assert not any("sort" in op.target or "index" in op.target for op in graph.ops), to_text(graph)
    assert parse(to_text(graph)) == graph
    assert {"n", "e", "n+e", "f"} <= {split.name for split in splits(graph, op)}
    module, x = module.double(), x.double()
    weights, ids = module.router(x).softmax(-1).topk(SLOTS)
    tensors = [dict(module.named_parameters())[name] for name in experts.tensors_of(op)]
    found, wanted = operator(op.target)(x, ids, weights, tensors, op.args[4]), in_float64(module, x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    leaves = [module.up, module.bias, module.down, module.router.weight]
    gradients, same = (torch.autograd.grad(result.square().sum(), leaves) for result in (found, wanted))
    torch.testing.assert_close(gradients, same, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("how", ["not undone", "over rows", "other counts", "rows returned"])
def test_what_couples_tokens_is_left_as_it_is(how: str) -> None:
    assert not traced(Routed(how), torch.randn(TOKENS, WIDTH))


def test_an_id_of_no_expert_adds_nothing() -> None:
    torch.manual_seed(0)
    module, x = Routed(), torch.randn(TOKENS, WIDTH)
    (op,) = traced(module, x)
    weights, ids = module.router(x).softmax(-1).topk(SLOTS)
    tensors = [dict(module.named_parameters())[name] for name in experts.tensors_of(op)]
    run = operator(op.target)
    whole = run(x, ids, weights, tensors, op.args[4])
    halves = [run(x, ids.masked_fill(ids % 2 == rest, -1), weights, tensors, op.args[4]) for rest in (0, 1)]
    torch.testing.assert_close(halves[0] + halves[1], whole)
