"""The sum over microbatches is the whole batch: outputs, loss and gradients; and what cannot be divided is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.errors import PlanError
from autopar.ir.microbatch import microbatched
from autopar.ir.text import parse, to_text
from autopar.ir.trace import TracedModel, split_example, trace
from tests.ir.interpreter import run
from tests.ir.parts import joined, microbatch, prologue_of
from tests.zoo import ZOO

COUPLED = {"convnet", "resnet", "unet-batch"}
"""Batch norm in training mode."""


def traced_in_float64(name: str, batch: int = 8) -> tuple[nn.Module, TracedModel, dict[str, Tensor]]:
    """The zoo's model without dropout, its trace, and inputs by path."""
    model = ZOO[name].build().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return traced_with(model, ZOO[name].inputs(model, batch=batch))


def traced_with(model: nn.Module, example: Any) -> tuple[nn.Module, TracedModel, dict[str, Tensor]]:
    args, kwargs = split_example(example)
    traced = trace(model, args, kwargs)
    given = dict(zip(traced.input_paths, torch.utils._pytree.tree_leaves((args, kwargs)), strict=True))
    return model, traced, {item.path: given[item.path] for item in traced.graph.inputs}


def draws_random_numbers(traced: TracedModel) -> bool:
    return any("dropout" in op.target or (op.target.startswith("aten.scaled") and op.arg(4, "dropout_p", 0.0)) for op in traced.graph.ops)


def agree(model: nn.Module, traced: TracedModel, inputs: dict[str, Tensor], count: int) -> None:
    """Outputs and gradients of `count` microbatches are those of the batch, to rounding in the narrowest type that the model uses."""
    narrow = any(value.dtype == "float32" for value in traced.graph.values.values())  # some models cast norms and logits
    rounding = 1e-6 if narrow else 1e-12
    whole, _ = run(traced, model, [inputs[item.path] for item in traced.graph.inputs])
    parts = microbatched(traced.graph, count)
    parts.body.verify()
    assert parse(to_text(parts.body)).fingerprint() == parts.body.fingerprint()
    known = prologue_of(parts, traced, model, inputs)
    results = []
    for index in range(count):
        given = microbatch(parts, known, index)
        graph = TracedModel(**{**_fields(traced), "graph": parts.body})
        results.append(run(graph, model, [given[item.path] for item in parts.body.inputs])[0])
    together = joined(parts, results)
    for output, expected, found in zip(traced.graph.outputs, whole, together, strict=True):
        torch.testing.assert_close(found, expected, rtol=10 * rounding, atol=rounding, msg=output.path)
    loss = next((i for i, tensor in enumerate(whole) if tensor.dim() == 0 and tensor.requires_grad), None)
    if loss is None:
        return
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(whole[loss], weights, allow_unused=True)
    pieces = torch.autograd.grad(together[loss], weights, allow_unused=True)
    scale = max(float(gradient.norm()) for gradient in wanted if gradient is not None)
    for expected_, found_ in zip(wanted, pieces, strict=True):
        assert (expected_ is None) == (found_ is None)
        if expected_ is not None:
            assert float((expected_ - found_).norm()) <= rounding * scale


def _fields(traced: TracedModel) -> dict[str, Any]:
    return {name: getattr(traced, name) for name in traced.__dataclass_fields__}


@pytest.mark.parametrize("count", (2, 4))
@pytest.mark.parametrize("name", [name for name in ZOO if name not in COUPLED])
def test_microbatches_are_the_batch(name: str, count: int) -> None:
    model, traced, inputs = traced_in_float64(name)
    if draws_random_numbers(traced):
        model.eval()
        model, traced, inputs = traced_with(model, ZOO[name].inputs(model, batch=8))
    agree(model, traced, inputs, count)


@pytest.mark.parametrize("name", sorted(COUPLED & ZOO.keys()))
def test_batch_norm_couples_the_batch(name: str) -> None:
    _, traced, _ = traced_in_float64(name)
    with pytest.raises(PlanError, match=r"batch_norm.*statistics from all rows.*microbatches=1"):
        microbatched(traced.graph, 2)


def test_one_microbatch_is_the_graph_itself() -> None:
    _, traced, _ = traced_in_float64("gpt2")
    parts = microbatched(traced.graph, 1)
    assert parts.body is traced.graph and parts.prologue is None


class Scored(nn.Module):
    """A linear layer before `loss(scores, target)`."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.loss = loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.layer(x), target)


def test_a_microbatch_without_any_target_that_counts() -> None:
    target = torch.tensor([-100, -100, 1, 2, 3, -100, 0, 5])
    model = Scored(F.cross_entropy).double()
    agree(*traced_with(model, (torch.randn(8, 6).double(), target)), count=4)


def test_smoothed_labels() -> None:
    model = Scored(lambda scores, target: F.cross_entropy(scores, target, label_smoothing=0.1)).double()
    agree(*traced_with(model, (torch.randn(8, 6).double(), torch.tensor([-100, 1, 1, 2, 3, -100, 0, 5]))), count=4)


def test_contrastive_losses_are_refused_by_name_and_line() -> None:
    def contrastive(scores: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scores @ scores.T, target)

    _, traced, _ = traced_with(Scored(contrastive), (torch.randn(8, 6), torch.arange(8)))
    with pytest.raises(PlanError, match=r"test_microbatch\.py:\d+.*use microbatches=1"):
        microbatched(traced.graph, 2)


@pytest.mark.parametrize(("count", "message"), ((3, "batch has 8 rows.*divisor of 8"), (0, "at least one")))
def test_counts_that_do_not_divide(count: int, message: str) -> None:
    _, traced, _ = traced_with(Scored(F.cross_entropy), (torch.randn(8, 6), torch.arange(8) % 6))
    with pytest.raises(PlanError, match=message):
        microbatched(traced.graph, count)
