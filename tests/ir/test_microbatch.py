"""The sum over microbatches is the whole batch: outputs, loss and gradients; and what cannot be divided is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.errors import PlanError
from autopar.ir.pipelining.microbatch import microbatched
from autopar.ir.text import parse, to_text
from autopar.ir.tracing.trace import TracedModel, split_example, trace
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


class Own(nn.Module):
    """Some parameters and buffers for `function(module, *inputs)`."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        self.places = nn.Parameter(torch.randn(5, 6))
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.randn(6))
        self.register_buffer("steps", torch.zeros(()))
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def rows(*shape: int) -> Tensor:
    return torch.randn(8, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


X, Y, MASK = rows(5, 6), rows(5, 6) * 2, rows(5) > -0.3
PLACES = torch.tensor([0, -1, 4, 2, -5, 1, 3, 0])


def heads(m: Own, x: Tensor, mask: Tensor) -> Tensor:
    each = m.layer(x).view(8, 5, 2, 3).transpose(1, 2).reshape(16, 5, 3).sum(-1)
    return each.masked_fill(mask.repeat_interleave(2, 0), -9.0).softmax(-1).square().mean()


RIGHT: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "mean of what a mask keeps": (lambda m, x, y, mask: ((m.layer(x) - y).square().mean(-1) * mask).sum() / mask.sum(), (X, Y, MASK)),
    "a penalty on weights": (lambda m, x, y: F.mse_loss(m.layer(x) + m.places, y) + 0.1 * m.layer.weight.square().sum(), (X, Y)),
    "only a penalty": (lambda m, x, y: m.layer.weight.square().sum(), (X, Y)),
    "the batch in the second dim of a mask": (lambda m, x, mask: (m.layer(x) * mask.T.unsqueeze(-1)).abs().mean(), (X, rows(5).T + 0)),
    "a mask without a batch": (lambda m, x, mask: (m.layer(x) * mask).abs().mean(), (X, rows()[:5, None])),
    "a mask for a batch of one": (lambda m, x, mask: (m.layer(x) * mask).abs().mean(), (X, rows(5, 1)[:1])),
    "inputs scaled by the whole batch": (lambda m, x: m.layer(x / x.abs().max() - x.mean(0)).abs().mean(), (X,)),
    "rows sorted by an input": (lambda m, x, y: m.layer(x[y[:, 0, 0].argsort()]).square().mean(), (X, Y)),
    "weights used twice": (lambda m, x: ((m.layer(x) @ m.places.T).softmax(-1) @ m.places).square().mean(), (X,)),
    "one element of every row": (lambda m, x, at: m.layer(x)[torch.arange(8), at].square().mean(), (X, PLACES)),
    "batches one after the other": (lambda m, x, y: m.layer(torch.cat([x, y])).square().mean(), (X, Y)),
    "dims of size one dropped": (lambda m, x: m.layer(x).sum(-1, keepdim=True).squeeze().square().mean(), (X,)),
    "heads in the batch dim": (heads, (X, MASK)),
    "outputs of all kinds": (
        lambda m, x, y: {
            "loss": (loss := (m.layer(x) - y).abs().mean()),
            "seen": loss.detach(),
            "scores": m.layer(x),
            "positive": (y > 0).sum(),
            "places": m.places * 2,
            "weight": m.places,
            "scale": m.scale,
            "input": x,
        },
        (X, Y),
    ),
    "a dtype taken from rows": (lambda m, x: (m.layer(x) * m.places.float().type_as(x)).abs().mean(), (X,)),
    "no loss": (lambda m, x: m.layer(x), (X,)),
}  # fmt: skip


@pytest.mark.parametrize("what", RIGHT)
@pytest.mark.parametrize("count", (2, 8))
def test_what_is_right(what: str, count: int) -> None:
    function, inputs = RIGHT[what]
    agree(*traced_with(Own(function).double(), inputs), count=count)


REFUSED: dict[str, Any] = {
    "mean": lambda m, x: (m.layer(x) - m.layer(x).mean(0)).square().mean(),
    "select": lambda m, x: m.layer(x)[0].square().mean(),
    "log": lambda m, x: m.layer(x).square().mean().log(),
    "norm": lambda m, x: m.layer(x).norm(),
    "linalg_inv": lambda m, x: torch.linalg.inv(m.layer(x)[:, :, :5]).square().mean(),
}
AT_FAULT = {"mean": "sub"}
"""The operation named, where it is another than the one that joins rows: a mean over rows is a sum of terms, which cannot be subtracted."""


@pytest.mark.parametrize("what", REFUSED)
def test_rows_that_depend_on_each_other_are_refused(what: str) -> None:
    _, traced, _ = traced_with(Own(REFUSED[what]).double(), (X,))
    with pytest.raises(PlanError, match=rf"aten\.\w*{AT_FAULT.get(what, what)}.*test_microbatch\.py:\d+.*microbatches=1"):
        microbatched(traced.graph, 4)
    assert microbatched(traced.graph, 1).body is traced.graph


def test_an_updated_buffer_is_refused_by_name() -> None:
    def counting(m: Own, x: Tensor) -> Tensor:
        m.steps += 1
        return m.layer(x).square().mean()

    _, traced, _ = traced_with(Own(counting).double(), (X,))
    with pytest.raises(PlanError, match=r"updates buffer `steps`.*4 times.*microbatches=1"):
        microbatched(traced.graph, 4)


def test_nothing_of_the_whole_batch_is_computed_again_in_every_microbatch() -> None:
    function, inputs = RIGHT["mean of what a mask keeps"]
    _, traced, _ = traced_with(Own(function).double(), inputs)
    parts = microbatched(traced.graph, 4)
    assert parts.prologue is not None
    handed = {item.path: parts.prologue.values[item.value].shape for item in parts.prologue.outputs}
    assert list(handed.values()) == [()], "the number of elements that count"
    batch = {parts.body.values[name].shape[:1] for op in parts.body.ops for name in op.outputs}
    assert (8,) not in batch


def test_dropout_of_what_all_rows_share_is_drawn_once() -> None:
    def shared(m: Own, x: Tensor) -> Tensor:
        return (m.layer(x) + m.drop(m.places)).square().mean()

    model, traced, inputs = traced_with(Own(shared).double(), (X,))
    parts = microbatched(traced.graph, 4)
    assert [op.target for op in parts.body.ops if "dropout" in op.target] == []
    known = prologue_of(parts, traced, model, inputs)
    (mask,) = (known[path] for path in parts.inputs if path.startswith("@"))
    assert set(mask.unique().tolist()) <= {0.0, 2.0} and mask.shape == (5, 6)


def test_weights_may_be_applied_to_what_all_rows_share() -> None:
    """A table of positions, after dropout, goes through a layer: as little work in every microbatch as in the whole batch."""

    def positions(m: Own, x: Tensor) -> Tensor:
        return (m.layer(x) + m.layer(m.drop(m.scale * torch.ones(5, 6)))).square().mean()

    _, traced, _ = traced_with(Own(positions).double(), (X,))
    parts = microbatched(traced.graph, 4)
    assert [op.target for op in parts.body.ops].count("aten.linear.default") == 2
    assert parts.prologue is not None and any("dropout" in op.target for op in parts.prologue.ops)


def test_noise_is_drawn_once_where_rows_share_it_and_row_by_row_where_not() -> None:
    def shared(m: Own, x: Tensor) -> Tensor:
        noise = torch.rand_like(x)
        return (m.layer(x) * noise).sum() / noise.sum()

    model, traced, inputs = traced_with(Own(shared).double(), (X,))
    parts = microbatched(traced.graph, 4)
    known = prologue_of(parts, traced, model, inputs)
    whole, *rest = sorted((known[path] for path in parts.inputs if path.startswith("@")), key=Tensor.dim)
    assert not whole.dim() and len(rest) == 1 and torch.equal(rest[0].sum(), whole), "one draw for both readers"

    _, traced, _ = traced_with(Own(lambda m, x: (m.layer(x) * torch.rand_like(m.layer(x))).mean()).double(), (X,))
    assert microbatched(traced.graph, 4).prologue is None
