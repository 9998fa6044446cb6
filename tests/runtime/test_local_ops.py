"""Local implementations beside the operators they stand for: dtypes, nested axes, and under `torch.compile`.

That their splits are right for any shape, forward and backward, is checked with the rules (`tests/ir/test_rules*.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from autopar.ir.placement import chunk
from autopar.ir.rules.local_context import AxisContext, LocalContext
from autopar.ir.rules.operators import batch_norm, cross_entropy
from autopar.runtime.operators.local_ops import LOCAL_OPS
from tests.runtime.simulated import simulate


def contexts(target: str, *shapes: tuple[int, ...]) -> Callable[[Any], LocalContext]:
    """The context of the calling rank when both axes of its mesh run the implementation."""

    def of(mesh: Any) -> LocalContext:
        coordinate = mesh.get_coordinate()
        axes = tuple(AxisContext(mesh.get_group(axis).group_name, mesh.size(axis), coordinate[axis]) for axis in range(2))
        return LocalContext(target, shapes, axes)

    return of


def columns(x: Tensor, context: LocalContext) -> Tensor:
    start, length = context.part(x.shape[1])
    return x.narrow(1, start, length).clone().requires_grad_()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [16, 13, 257])
def test_cross_entropy_over_two_axes_at_once(classes: int, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(6, classes, dtype=torch.float64) * 30, torch.randint(classes, (6,))
    target[2] = -100
    whole = logits.clone().requires_grad_()
    loss, weight = cross_entropy(whole, target, -100, smoothing)
    loss.backward()
    assert whole.grad is not None
    of = contexts("autopar.cross_entropy", (6, classes), (6,))

    def rank(mesh: Any) -> None:
        context = of(mesh)
        own = columns(logits, context)
        own_loss, own_weight = LOCAL_OPS["vocab_cross_entropy"]((own, target, -100, smoothing), {}, context)
        torch.testing.assert_close(own_loss, loss.detach(), rtol=1e-12, atol=0)
        assert own_weight == weight
        own_loss.backward()
        torch.testing.assert_close(own.grad, columns(whole.grad, context).detach(), rtol=1e-10, atol=1e-14)

    simulate((2, 2), rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cross_entropy_in_narrow_dtypes_sums_in_wide_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, target = (torch.randn(8, 64) * 5).to(dtype), torch.randint(64, (8,))
    exact = F.cross_entropy(logits.double(), target, reduction="sum")
    of = contexts("autopar.cross_entropy", (8, 64), (8,))

    def rank(mesh: Any) -> None:
        context = of(mesh)
        loss, weight = LOCAL_OPS["vocab_cross_entropy"]((columns(logits, context), target, -100, 0.0), {}, context)
        assert loss.dtype == weight.dtype == dtype
        assert abs(loss.double() - exact) / exact <= torch.finfo(dtype).eps

    simulate((1, 4), rank)


def test_all_rows_ignored_is_a_loss_of_zero() -> None:
    of = contexts("autopar.cross_entropy", (4, 8), (4,))

    def rank(mesh: Any) -> None:
        context = of(mesh)
        own = columns(torch.randn(4, 8), context)
        loss, weight = LOCAL_OPS["vocab_cross_entropy"]((own, torch.full((4,), -100), -100, 0.0), {}, context)
        loss.backward()
        assert loss == 0 and weight == 0 and own.grad is not None and not own.grad.any()

    simulate((1, 2), rank)


def test_more_ranks_than_classes() -> None:
    logits, target = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    exact = F.cross_entropy(logits, target, reduction="sum")
    of = contexts("autopar.cross_entropy", (4, 3), (4,))

    def rank(mesh: Any) -> None:
        context = of(mesh)
        own = columns(logits, context)
        loss, _ = LOCAL_OPS["vocab_cross_entropy"]((own, target, -100, 0.0), {}, context)
        loss.backward()
        torch.testing.assert_close(loss, exact)

    simulate((1, 4), rank)


def test_embedding_over_two_axes_at_once() -> None:
    torch.manual_seed(0)
    weight, ids = torch.randn(13, 4, dtype=torch.float64), torch.randint(13, (5, 3))
    of = contexts("aten.embedding.default", (13, 4), (5, 3))

    def rank(mesh: Any) -> Tensor:
        context = of(mesh)
        start, length = context.part(13)
        result: Tensor = LOCAL_OPS["vocab_embedding"]((weight.narrow(0, start, length), ids), {}, context)
        return result

    torch.testing.assert_close(sum(simulate((2, 2), rank)), F.embedding(ids, weight), rtol=0, atol=0)


def test_batch_norm_keeps_the_digits_of_a_large_mean() -> None:
    """Statistics from sums of squares would have none left: the mean is 1e8 standard deviations."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, dtype=torch.float64) + 1e8
    stats = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    wanted = batch_norm(x, None, None, *stats, 0.1, 1e-5)
    of = contexts("autopar.batch_norm", (8, 3, 5), (3,), (3,))

    def rank(mesh: Any) -> None:
        context = of(mesh)
        start, length = context.part(8)
        found = LOCAL_OPS["sync_batch_norm"]((x.narrow(0, start, length), None, None, *stats, 0.1, 1e-5), {}, context)
        torch.testing.assert_close(found[0], wanted[0].narrow(0, start, length), rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1:], wanted[1:], rtol=1e-7, atol=0)

    simulate((2, 2), rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_norm_in_narrow_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(8, 3, 5).to(dtype), torch.randn(3)
    stats = torch.zeros(3), torch.ones(3)
    wanted = batch_norm(x.float(), weight, weight, *stats, 0.1, 1e-5)
    of = contexts("autopar.batch_norm", (8, 3, 5), (3,), (3,), (3,), (3,))

    def rank(mesh: Any) -> None:
        context = of(mesh)
        start, length = context.part(8)
        own, scale = x.narrow(0, start, length).clone().requires_grad_(), weight.clone().requires_grad_()
        y, mean, _ = LOCAL_OPS["sync_batch_norm"]((own, scale, weight, *stats, 0.1, 1e-5), {}, context)
        y.sum().backward()
        assert y.dtype == own.grad.dtype == dtype and mean.dtype == torch.float32  # type: ignore[union-attr]
        torch.testing.assert_close(y.float(), wanted[0].narrow(0, start, length), rtol=0, atol=8 * torch.finfo(dtype).eps)

    simulate((1, 2), rank)


@pytest.mark.parametrize("size, parts", [(50257, (2, 2)), (13, (2, 3)), (12, (3, 2))])
def test_nested_parts_tile_the_whole(size: int, parts: tuple[int, int]) -> None:
    position = 0
    for i in range(parts[0]):
        for j in range(parts[1]):
            start, length = LocalContext("", (), (AxisContext("", parts[0], i), AxisContext("", parts[1], j))).part(size)
            assert start == position and length == chunk(chunk(size, parts[0], i)[1], parts[1], j)[1]
            position += length
    assert position == size


@pytest.fixture
def alone() -> Iterator[str]:
    """The name of a process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name  # type: ignore[union-attr]
    dist.destroy_process_group()


def test_they_compile_without_a_break(alone: str) -> None:
    torch.manual_seed(0)
    axis = (AxisContext(alone, 1, 0),)

    def forward(x: Tensor, weight: Tensor, ids: Tensor, image: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
        embedded = LOCAL_OPS["vocab_embedding"]((weight, ids), {}, LocalContext("", ((9, 4), (6,)), axis))
        loss, count = LOCAL_OPS["vocab_cross_entropy"]((x @ embedded.T, ids, -100, 0.1), {}, LocalContext("", ((6, 6), (6,)), axis))
        norm, _, _ = LOCAL_OPS["sync_batch_norm"](
            (image, scale, None, mean, mean, 0.1, 1e-5), {}, LocalContext("", ((4, 3, 5), (3,), (3,), (3,)), axis)
        )
        average = LOCAL_OPS["mean_of_part"]((norm * norm, [0, 2]), {}, LocalContext("", ((4, 3, 5),), axis))
        return loss / count + average.sum()

    floats = [torch.randn(*shape) for shape in ((6, 4), (9, 4), (4, 3, 5), (3,))]

    def step(function: Callable[..., Tensor]) -> list[Tensor]:
        x, weight, image, scale = (value.clone().requires_grad_() for value in floats)
        loss = function(x, weight, torch.arange(6), image, scale, torch.zeros(3))
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in (x, weight, image, scale) if leaf.grad is not None)]

    eager = step(forward)
    compiled = step(torch.compile(forward, backend="aot_eager", fullgraph=True))
    assert len(eager) == 5
    torch.testing.assert_close(compiled, eager)


def test_index_outside_the_vocabulary_is_refused():
    context = LocalContext("aten.embedding.default", ((8, 2), (3,)), (AxisContext("", 2, 0),))
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        LOCAL_OPS["vocab_embedding"]((torch.randn(4, 2), torch.tensor([0, 7, 8])), {}, context)
