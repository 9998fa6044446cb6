"""Models for the command line's tests, as a user would have them in a file of his own."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """Two linear layers and a loss."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(8, 4 * width)
        self.down = nn.Linear(4 * width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: `(batch, 8)`; the result is a scalar."""
        return self.down(torch.relu(self.up(x))).square().mean()


def net(batch: int = 8) -> tuple[nn.Module, torch.Tensor]:
    return Net(), torch.zeros(batch, 8)


def wider() -> tuple[nn.Module, torch.Tensor]:
    return Net(16), torch.zeros(8, 8)
