"""Models with modules that cannot be traced, or should not be: for `leaf_modules`. Ranks import this file."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Looks at values, counts in Python and in a buffer, returns a dict with whole numbers beside. `x`: `(n, h)`."""

    seen: Tensor

    def __init__(self, width: int, counting: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)
        self.register_buffer("seen", torch.zeros(()))
        self.counting = counting
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        self.calls += 1
        y = self.gate(x)
        y = y * 2 if y.sum().item() > 0 else torch.tanh(y)
        if self.counting and self.training:
            with torch.no_grad():
                self.seen.add_(x.detach().abs().mean())
        return {"out": y * scale, "top": y.argmax(-1)}


class Rows(nn.Module):
    """Works on every row by itself, in Python and numpy, with a branch for each. `x`: `(n, h)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        signs = torch.from_numpy((x.detach().numpy().sum(-1) > 0).astype("int64"))
        return torch.stack([row * self.weight if sign else row.tanh() for row, sign in zip(x, signs.tolist(), strict=True)])


class Straight(torch.autograd.Function):
    """Rounds, with the gradient of twice the identity: a backward that is not that of the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = Straight.apply(3 * x) / 3
        return rounded


class Noisy(nn.Module):
    """Dropout of its own, and noise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.inner(x))
        if float(x.detach().sum()) > -1e9 and self.training:
            x = x + 0.1 * torch.rand_like(x)
        return F.dropout(x, 0.2, self.training)


class Block(nn.Module):
    def __init__(self, width: int, leaf: nn.Module) -> None:
        super().__init__()
        self.up, self.leaf, self.down = nn.Linear(width, 2 * width), leaf, nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        given = self.leaf(x)
        x = x + (given["out"] if isinstance(given, dict) else given)
        return x + self.down(F.gelu(self.up(x)))


class Leafy(nn.Module):
    """The mean square of what is left behind blocks with a leaf each. `x`: `(n, 12)`."""

    def __init__(self, leaf: type[nn.Module], depth: int = 2, **options: Any) -> None:
        super().__init__()
        made = [leaf(12, **options) if leaf is not Rounding else leaf() for _ in range(depth)]
        self.blocks = nn.ModuleList([Block(12, item) for item in made])
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.head(x).pow(2).mean()
        return loss
