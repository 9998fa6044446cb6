"""`step` for a model that stays on one device, so that one training loop serves any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import RuntimeSetupError
from autopar.runtime.loss import NO_GRADIENTS, NO_LOSS


class Step:
    """`model.step(...)`: forward and backward pass of one batch; returns the model's loss, detached. See `ParallelModule.step`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            raise RuntimeSetupError(NO_GRADIENTS)
        for leaf in pytree.tree_leaves(self.model(*args, **kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.dim() and leaf.is_floating_point():
                leaf.backward()  # type: ignore[no-untyped-call]
                return leaf.detach()
        raise RuntimeSetupError(NO_LOSS)


def with_step(model: nn.Module) -> nn.Module:
    """`model` itself, which gets a `step` unless it has one of its own. Its class, parameters and state dict stay as they are."""
    if not hasattr(model, "step"):
        model.step = Step(model)  # type: ignore[assignment]
    return model
