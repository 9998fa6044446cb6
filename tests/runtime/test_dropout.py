"""Dropout: masks differ between parts and steps, agree between copies, keep the expectation; attention's too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import autopar
from autopar.ir.assignment import Assignment, Storage
from autopar.ir.graph import Graph
from autopar.ir.placement import R
from autopar.ir.plan import Plan
from autopar.ir.rules import splits
from autopar.ir.tracing.trace import trace
from autopar.runtime.operators.dropout import attention, dropout, without_dropout
from autopar.runtime.verification.launch import RankPool
from tests.runtime.random_plans import AXES, Mesh, parallel_module
from tests.runtime.simulated import simulate
from tests.zoo import talkative


class Drop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x * self.scale, 0.25)


def _split(graph: Graph, mesh: Mesh, names: dict[str, tuple[str, str]]) -> Assignment:
    """Operations whose target contains a key of `names` are split so, all others replicated."""
    choices = {}
    for op in graph.ops:
        wanted = next((value for key, value in names.items() if key in op.target), ("replicate", "replicate"))
        choices[op.name] = tuple(next(split for split in splits(graph, op) if split.name == name) for name in wanted)
    storage = {parameter.fqn: Storage((R, R), "never") for parameter in graph.parameters}
    return Assignment(AXES, mesh, choices, storage)


def test_masks() -> None:
    model, x = Drop(), torch.ones(8, 64)
    traced = trace(model, (x,))
    (drop,) = (op for op in traced.graph.ops if op.target == "autopar.dropout")
    rows = next(split.name for split in splits(traced.graph, drop) if split.inputs[0].is_shard and split.inputs[0].dim == 0)
    assignment = _split(traced.graph, (2, 2), {"dropout": (rows, "replicate")})

    def rank(mesh: DeviceMesh) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        module = parallel_module(model, traced, assignment, mesh)
        first, second = module(x), module(x)
        second.sum().backward()
        gradient = next(module.parameters()).grad
        assert gradient is not None
        with without_dropout(module):
            assert torch.equal(module(x), x)
        module.eval()
        return first.detach(), second.detach(), gradient.full_tensor(), module(x)  # type: ignore[attr-defined]

    found = simulate((2, 2), rank)
    first, second, gradient, evaluated = found[0]
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True)), "ranks see different masks"
    assert not torch.equal(first, second), "two steps have one mask"
    assert not torch.equal(first[:4], first[4:]), "two parts have one mask"
    assert torch.equal(evaluated, x)
    kept = first[first != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / 0.75))
    assert 0.6 < kept.numel() / first.numel() < 0.9
    assert torch.allclose(gradient, second.sum(0)), "the backward pass has another mask"


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_seeded_and_leaves_the_generator_alone(causal: bool) -> None:
    q, k, v = (torch.randn(2, 2, 6, 8) for _ in range(3))
    counter = torch.tensor([7, 1])
    before = torch.get_rng_state()
    one = attention(3, counter, q, k, v, None, 0.5, causal)
    assert torch.equal(one, attention(3, counter, q, k, v, None, 0.5, causal))
    assert not torch.equal(one, attention(4, counter, q, k, v, None, 0.5, causal))
    assert not torch.equal(one, attention(3, counter + 1, q, k, v, None, 0.5, causal))
    assert torch.equal(before, torch.get_rng_state())


def test_attention_compiles() -> None:
    q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    call = torch.compile(attention, backend="aot_eager", fullgraph=True)
    kept = call(0, torch.tensor([7, 1]), q, k[:, :2], v[:, :2], None, 0.0, True, enable_gqa=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(kept, expected)
    dropped = call(0, torch.tensor([7, 1]), q, k, v, None, 0.5, False)
    dropped.sum().backward()
    assert q.grad is not None and not torch.equal(dropped, call(0, torch.tensor([7, 2]), q, k, v, None, 0.5, False))


def test_everything_dropped() -> None:
    assert not dropout(torch.ones(4), 1.0, 0, torch.tensor([0, 0])).any()


def test_without_dropout_reaches_functions_and_attention() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5)
    x = torch.randn(4, 2, 16)
    with without_dropout(layer):
        assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer(x), layer(x))


class Draws(nn.Module):
    """Random numbers other than dropout's, some from a split value, and a recurrent layer with dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.recurrent = nn.LSTM(8, 8, 2, dropout=0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x * self.scale
        kept = y * torch.empty(8, 1).bernoulli_(0.5)
        return torch.rand(8), torch.randn_like(y), kept, nn.functional.rrelu(y, training=True), self.recurrent(y)[0]


def test_random_numbers_agree_between_ranks_and_differ_between_steps() -> None:
    model, x = Draws(), torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    traced = trace(model, (x,))

    def rank(mesh: DeviceMesh) -> list[tuple[Tensor, ...]]:
        torch.rand(11)  # ranks have used the default generator as they like: what they draw must not depend on it
        module = parallel_module(model, traced, _split(traced.graph, (1, 1), {}), mesh)
        before = torch.get_rng_state()
        steps = [module(x), module(x)]
        assert torch.equal(before, torch.get_rng_state()), "the user's own generator has moved"
        with without_dropout(module), without_dropout(model):
            torch.testing.assert_close(module(x)[-1], model(x)[-1])
        return steps

    first, second = simulate((1, 1), rank)[0], simulate((1, 1), rank)[0]  # one after the other: threads share the default generator
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), "ranks draw different numbers"
    assert not any(torch.equal(a, b) for a, b in zip(*first, strict=True)), "two steps draw the same numbers"


class DropWeight(nn.Module):
    """Dropout of what no row of the batch has a part in, as of a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.drop, self.layer = nn.Parameter(torch.ones(16, 8)), nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        table = self.drop(self.table)
        return (self.layer(x + table.unsqueeze(0)) + table.T.mean()).pow(2).mean()


def dropped(plan: Plan) -> tuple[list[float], list[float]]:
    """On a rank: losses of the same batch, in training and in evaluation."""
    torch.manual_seed(0)
    model, x = DropWeight(), torch.ones(8, 16, 8)
    module: Any = autopar.parallelize(model, x, plan=plan)
    training = [float(module.step(x)) for _ in range(3)]
    module.eval()
    return training, [float(module(x)) for _ in range(2)]


@pytest.mark.processes
@pytest.mark.parametrize("mesh", [{"dp": 2, "tp": 1}, {"pp": 2, "dp": 1, "tp": 1}])
def test_one_mask_for_all_microbatches(mesh: dict[str, int], ranks2: RankPool) -> None:
    torch.manual_seed(0)
    model, x = DropWeight(), torch.ones(8, 16, 8)
    plan = autopar.plan(model, x, talkative(2), mesh=mesh, microbatches=2)
    report = autopar.verify(model, x, plan, steps=2, ranks=ranks2)
    assert report.ok, report
    first, second = ranks2.run(dropped, plan)
    assert first == second
    training, evaluation = first
    assert len(set(training)) == 3
    assert evaluation == pytest.approx([float(model.eval()(x).detach())] * 2, rel=1e-6)
