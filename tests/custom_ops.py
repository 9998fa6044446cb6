"""Operators such as users bring, made by `torch.library.custom_op`, and a model with some of them. Ranks import this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

calls = 0


@torch.library.custom_op("autopar_tests::gated", mutates_args=())
def gated(x: Tensor, weight: Tensor, beta: float) -> Tensor:
    """`x * sigmoid(beta x) * weight`; `x`: `(..., h)`, `weight`: `(h,)`."""
    return x * torch.sigmoid(beta * x) * weight


@gated.register_fake
def _(x: Tensor, weight: Tensor, beta: float) -> Tensor:
    return torch.empty_like(x)


def _gated_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    gate = torch.sigmoid(ctx.beta * x)
    of_weight = (gradient * x * gate).sum(tuple(range(x.dim() - 1)))
    return gradient * weight * (gate + x * ctx.beta * gate * (1 - gate)), of_weight, None


def _gated_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.beta = inputs[2]


gated.register_autograd(_gated_backward, setup_context=_gated_context)


@torch.library.custom_op("autopar_tests::project_heads", mutates_args=())
def project_heads(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Softmax within each head, then a product; `x`: `(b, s, h)`, `weight`: `(n, h)`, `bias`: `(n,)`."""
    return _project(x, weight, bias, heads)


def _project(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    batch, length, width = x.shape
    within = x.reshape(batch, length, heads, width // heads).softmax(-1)
    return torch.addmm(bias, within.reshape(-1, width), weight.t()).reshape(batch, length, -1)


@project_heads.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


def _project_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        given = [item.detach().requires_grad_() for item in ctx.saved_tensors]
        found = torch.autograd.grad(_project(*given, ctx.heads), given, gradient)
    return (*found, None)


def _project_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.heads = inputs[3]


project_heads.register_autograd(_project_backward, setup_context=_project_context)


def simple(name: str, body: Any) -> Any:
    """An operator of one tensor that gives one like it, differentiable where `body` is."""
    operator = torch.library.custom_op(f"autopar_tests::{name}", body, mutates_args=())

    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = body(x)
            return torch.autograd.grad(y, x, gradient)[0] if y.requires_grad else torch.zeros_like(x)

    operator.register_fake(torch.empty_like)
    operator.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return operator


def _noisy(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def _counting(x: Tensor) -> Tensor:
    global calls
    calls += 1
    return x * calls


def _peeking(x: Tensor) -> Tensor:
    return x * 2 if bool(x.abs().max() > 1e9) else x * 1


def _clipped(x: Tensor) -> Tensor:
    """Within norm 40, which moderate values do not reach."""
    return x * torch.clamp(40 / x.norm(), max=1.0)


def _blocks_of_128(x: Tensor) -> Tensor:
    """Every 128 elements of the last dim divided by their largest, the last ones together."""
    return torch.cat([part / part.abs().amax(-1, keepdim=True) for part in x.split(128, -1)], -1)


def _doubled(x: Tensor) -> Tensor:
    return x + x


def _changing(x: Tensor) -> Tensor:
    x.data.add_(1)
    return x * 2


def _constant(x: Tensor) -> Tensor:
    return torch.where(x > 1e6, x, 0.0)


noisy, counting, peeking, clipped = (
    simple("noisy", _noisy),
    simple("counting", _counting),
    simple("peeking", _peeking),
    simple("clipped", _clipped),
)
blocks_of_128, doubled, changing, constant = (
    simple("blocks_of_128", _blocks_of_128),
    simple("doubled", _doubled),
    simple("changing", _changing),
    simple("constant", _constant),
)


class Custom(nn.Module):
    """A loss of `x`: `(batch, seq, 16)` through operators for which autopar has no rule, one of them random in nothing but name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 24)
        self.weight = nn.Parameter(torch.randn(24))
        self.matrix = nn.Parameter(torch.randn(8, 24) / 5)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = gated(self.inner(x), self.weight, 1.5)
        y = project_heads(y, self.matrix, self.bias, 2)
        loss: Tensor = clipped(y).pow(2).mean()
        return loss
