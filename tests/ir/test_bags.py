"""Embedding bags: what the trace makes of them is what torch computes, and every part of them has a rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.ir.rules import splits, unruled
from autopar.ir.tracing.trace import trace
from tests.ir.interpreter import run

ROWS, WIDTH, BAGS, LENGTH = 12, 8, 4, 6
IDS = torch.randint(0, ROWS, (BAGS, LENGTH), generator=torch.Generator().manual_seed(0))
UNEVEN = torch.tensor([0, 4, 4, 17])  # the second bag is empty
FACTORS = torch.randn(BAGS, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Bags(nn.Module):
    def __init__(self, mode: str, padding: int | None = None, last: bool = False) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(ROWS, WIDTH, mode=mode, padding_idx=padding, include_last_offset=last, dtype=torch.float64)

    def forward(self, ids: Tensor, offsets: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
        return self.bags(ids, offsets, factors)


def check(model: Bags, **inputs: Tensor) -> set[str]:
    """Values and gradients of the traced bags; the operators in them."""
    traced = trace(model, (), inputs)
    assert unruled(traced.graph) == ()
    expected = model(**inputs)
    (found,), _ = run(traced, model, [inputs[item.path] for item in traced.graph.inputs])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    one, other = (torch.autograd.grad(result.square().sum(), model.bags.weight) for result in (expected, found))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    return {op.target for op in traced.graph.ops}


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_any_length(mode: str, padding: int | None) -> None:
    assert "aten.index_add.default" not in check(Bags(mode, padding), ids=IDS)
    check(Bags(mode, padding), ids=IDS.flatten(), offsets=UNEVEN)
    check(Bags(mode, padding, last=True), ids=IDS.flatten(), offsets=torch.cat([UNEVEN, torch.tensor([BAGS * LENGTH])]))


def test_the_largest_and_weighted_sums() -> None:
    check(Bags("max"), ids=IDS)
    check(Bags("sum"), ids=IDS, factors=FACTORS)
    check(Bags("sum", padding=3), ids=IDS.flatten(), offsets=UNEVEN, factors=FACTORS.flatten())


def test_what_stays_a_bag() -> None:
    """The largest of uneven bags, and gradients that are scaled by how often an id occurs."""
    for model in (Bags("max"), Bags("sum")):
        model.bags.scale_grad_by_freq = model.bags.mode == "sum"
        graph = trace(model, (), {"ids": IDS.flatten(), "offsets": UNEVEN}).graph
        assert unruled(graph) == ("aten.embedding_bag.padding_idx",)


def test_the_table_splits_by_rows_and_by_columns() -> None:
    graph = trace(Bags("sum"), (), {"ids": IDS}).graph
    lookup = next(op for op in graph.ops if op.target == "aten.embedding.default")
    assert {"d0", "h", "v"} <= {split.name for split in splits(graph, lookup)}
