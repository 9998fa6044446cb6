"""`Row`: one model of the zoo: how it is built, what it is trained on and what it is asked in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
ONLY_FOR_A_LOSS = frozenset({"labels", "target", "mask_labels", "return_loss"})


@dataclass(frozen=True, slots=True)
class Row:
    """`name`: as the table calls it. `task`: what the loss asks for, in words. `build(**changes) -> model`, in training mode, with weights
    drawn from seed 0; `changes` are options of the model's configuration. `example(model, batch) -> inputs` by name, with what a loss
    needs. `note`: what a reader of the table should know of the row.

    `batch`: its rows; four ranks can split two of them in two at most, and must split the model too. `microbatches`: of a pipeline; 1 where
    the rows of a batch depend on each other. `leaf_modules`: what cannot be traced, see `autopar.plan`.
    """

    name: str
    task: str
    build: Callable[..., nn.Module]
    example: Callable[[nn.Module, int], Inputs]
    note: str = ""
    batch: int = 2
    microbatches: int = 2
    leaf_modules: tuple[str, ...] = ()

    def inputs(self, model: nn.Module, batch: int = 4) -> Inputs:
        """Inputs with which `model` gives a loss; floats in its dtype."""
        dtype = next(model.parameters()).dtype
        found = self.example(model, batch)
        return {name: item.to(dtype) if isinstance(item, Tensor) and item.is_floating_point() else item for name, item in found.items()}

    def questions(self, model: nn.Module, batch: int = 4) -> Inputs:
        """Inputs with which `model` gives its answers, without a loss."""
        return {name: item for name, item in self.inputs(model, batch).items() if name not in ONLY_FOR_A_LOSS}


def hf(model_class: str, config_class: str, **settings: Any) -> Callable[..., nn.Module]:
    """The builder of a transformers model from its configuration: nothing is downloaded."""

    def build(**changes: Any) -> nn.Module:
        import transformers

        config = getattr(transformers, config_class)(**(settings | changes))
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, model_class)(config)
        return model.train()

    return build


def plain(model_class: type[nn.Module], **settings: Any) -> Callable[..., nn.Module]:
    """The builder of a module of our own."""

    def build(**changes: Any) -> nn.Module:
        torch.manual_seed(0)
        return model_class(**(settings | changes)).train()

    return build
