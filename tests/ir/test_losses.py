"""Every usual loss: what the trace makes of it is what torch computes, and a batch may be split into microbatches in front of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.ir.pipelining.microbatch import microbatched
from autopar.ir.rules import unruled
from autopar.ir.tracing.trace import trace
from tests.ir.interpreter import run

Loss = Callable[..., Tensor]

ROWS, CLASSES, SPACE = 8, 5, (4, 3)
WEIGHTS = torch.rand(CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


class Model(nn.Module):
    """A layer in front of `loss(x, target, reduction=..., weight=...)`; `x`: `(rows, classes, *space)`."""

    def __init__(self, loss: Loss, reduction: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)
        self.register_buffer("weight", WEIGHTS.clone())
        self.loss, self.reduction = loss, reduction

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.layer(x).movedim(-1, 1), target, self.weight, self.reduction)


def classes(*space: int) -> Tensor:
    found = torch.randint(0, CLASSES, (ROWS, *space), generator=torch.Generator().manual_seed(2))
    found.view(-1)[:5] = 2  # in some losses ignored, unevenly over the rows
    return found


def probabilities(*space: int) -> Tensor:
    return torch.rand(ROWS, CLASSES, *space, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.9 + 0.05


SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
LISTS = torch.tensor([[0, 2, -1, 0, 1]] * 3 + [[1, -1, 0, 0, 0]] * 5)

LOSSES: dict[str, tuple[Tensor, Loss]] = {
    "classes": (classes(), lambda x, t, w, r: F.cross_entropy(x, t, reduction=r)),
    "smoothed": (classes(), lambda x, t, w, r: F.cross_entropy(x, t, reduction=r, ignore_index=2, label_smoothing=0.1)),
    "weighted": (classes(), lambda x, t, w, r: F.cross_entropy(x, t, w, reduction=r, ignore_index=2)),
    "weighted, smoothed": (classes(), lambda x, t, w, r: F.cross_entropy(x, t, w, reduction=r, ignore_index=2, label_smoothing=0.1)),
    "space": (classes(*SPACE), lambda x, t, w, r: F.cross_entropy(x, t, reduction=r, ignore_index=2)),
    "space, smoothed": (classes(*SPACE), lambda x, t, w, r: F.cross_entropy(x, t, reduction=r, ignore_index=2, label_smoothing=0.1)),
    "space, computed last": (classes(*SPACE), lambda x, t, w, r: F.cross_entropy(x * 2, t, reduction=r, ignore_index=2)),
    "space, weighted": (classes(*SPACE), lambda x, t, w, r: F.cross_entropy(x, t, w, reduction=r, ignore_index=2)),
    "probabilities": (probabilities(), lambda x, t, w, r: F.cross_entropy(x, t, reduction=r)),
    "probabilities, weighted": (probabilities(*SPACE), lambda x, t, w, r: F.cross_entropy(x, t, w, reduction=r, label_smoothing=0.1)),
    "nll": (classes(), lambda x, t, w, r: F.nll_loss(x.log_softmax(1), t, reduction=r, ignore_index=2)),
    "nll, weighted": (classes(*SPACE), lambda x, t, w, r: F.nll_loss(x.log_softmax(1), t, w, reduction=r, ignore_index=2)),
    "bce": (probabilities(), lambda x, t, w, r: F.binary_cross_entropy(x.sigmoid(), t, reduction=r)),
    "bce, weighted": (probabilities(), lambda x, t, w, r: F.binary_cross_entropy(x.sigmoid(), t, w, reduction=r)),
    "bce of logits": (probabilities(*SPACE), lambda x, t, w, r: F.binary_cross_entropy_with_logits(x, t, reduction=r)),
    "bce of logits, weighted": (
        probabilities(),
        lambda x, t, w, r: F.binary_cross_entropy_with_logits(x, t, weight=w, pos_weight=w, reduction=r),
    ),
    "focal": (
        probabilities(),
        lambda x, t, w, r: reduced(r, x.sigmoid() ** 2 * F.binary_cross_entropy_with_logits(x, t, reduction="none")),
    ),
    "kl": (probabilities(), lambda x, t, w, r: F.kl_div(x.log_softmax(1), t, reduction="batchmean" if r == "mean" else r)),
    "kl, log target": (probabilities(), lambda x, t, w, r: F.kl_div(x.log_softmax(1), t.log(), reduction=r, log_target=True)),
    "mse": (probabilities(), lambda x, t, w, r: F.mse_loss(x, t, reduction=r)),
    "mse, broadcast": (probabilities(), lambda x, t, w, r: F.mse_loss(x, t[:, :1].expand(-1, CLASSES), reduction=r)),
    "l1": (probabilities(*SPACE), lambda x, t, w, r: F.l1_loss(x, t, reduction=r)),
    "smooth l1": (probabilities(), lambda x, t, w, r: F.smooth_l1_loss(x, t, reduction=r, beta=0.5)),
    "huber": (probabilities(), lambda x, t, w, r: F.huber_loss(x, t, reduction=r, delta=0.5)),
    "poisson": (probabilities(), lambda x, t, w, r: F.poisson_nll_loss(x, t, reduction=r)),
    "soft margin": (SIGNS, lambda x, t, w, r: F.soft_margin_loss(x[:, 0], t, reduction=r)),
    "hinge": (SIGNS, lambda x, t, w, r: F.hinge_embedding_loss(x, t[:, None], reduction=r)),
    "ranking": (SIGNS, lambda x, t, w, r: F.margin_ranking_loss(x[:, 0], x[:, 1], t, 0.2, reduction=r)),
    "cosine": (SIGNS, lambda x, t, w, r: F.cosine_embedding_loss(x, x.flip(1), t, 0.1, reduction=r)),
    "cosine similarity": (probabilities(), lambda x, t, w, r: reduced(r, 1 - F.cosine_similarity(x, t))),
    "distance": (probabilities(), lambda x, t, w, r: reduced(r, F.pairwise_distance(x, t))),
    "triplet": (probabilities(), lambda x, t, w, r: F.triplet_margin_loss(x, t, t.flip(1), reduction=r)),
    "classes of lists": (LISTS, lambda x, t, w, r: F.multilabel_margin_loss(x, t, reduction=r)),
    "margin": (classes(), lambda x, t, w, r: F.multi_margin_loss(x, t, reduction=r)),
    "soft margins of lists": (probabilities(), lambda x, t, w, r: F.multilabel_soft_margin_loss(x, t, w, reduction=r)),
}


def reduced(reduction: str, x: Tensor) -> Tensor:
    return {"mean": torch.mean, "sum": torch.sum, "none": torch.clone}[reduction](x)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_microbatches_is_the_loss(name: str, reduction: str) -> None:
    target, loss = LOSSES[name]
    torch.manual_seed(0)
    model = Model(loss, reduction).double()
    example = (
        torch.randn(ROWS, *target.shape[2:] if target.dim() > 1 and target.shape[1] == CLASSES else target.shape[1:], 6).double(),
        target,
    )
    traced = trace(model, example)
    assert unruled(traced.graph) == ()

    expected = model(*example)
    (whole,), _ = run(traced, model, list(example))
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-14)

    parts = microbatched(traced.graph, 4)
    known = dict(zip((item.path for item in traced.graph.inputs), example, strict=True))
    if parts.prologue is not None:
        given = [known[item.path] for item in parts.prologue.inputs]
        found, _ = run(replace(traced, graph=parts.prologue), model, given)
        known |= dict(zip((item.path for item in parts.prologue.outputs), found, strict=True))
    results = []
    for index in range(4):
        given = [known[item.path] for item in parts.body.inputs]
        placements = [parts.inputs[item.path] for item in parts.body.inputs]
        cut = [x.chunk(4, place.dim)[index] if place.is_shard else x for x, place in zip(given, placements, strict=True)]
        results.append(run(replace(traced, graph=parts.body), model, cut)[0][0])
    together = torch.cat(results) if parts.outputs[0].is_shard else torch.stack(results).sum(0)
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-14)

    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(model.parameters()), gradient)
    pieces = torch.autograd.grad(together, list(model.parameters()), gradient)
    torch.testing.assert_close(pieces, wanted, rtol=1e-11, atol=1e-13)


def test_vocabulary_of_moved_logits_can_be_split() -> None:
    """Logits of a language model turned to `(batch, vocabulary, tokens)` are turned back: no gathering of logits."""
    model = Model(LOSSES["space"][1], "mean").double()
    graph = trace(model, (torch.randn(ROWS, *SPACE, 6).double(), classes(*SPACE))).graph
    assert "autopar.cross_entropy" in [op.target for op in graph.ops]
