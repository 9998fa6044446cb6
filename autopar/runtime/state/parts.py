"""Modules that hold a part of the model on each group of ranks, and what must be known of them where the whole model is meant: norms of
gradients, checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class PartOfModel:
    """What there is to know of such a module on this rank: a process group of `everyone`, whether this rank is the `first` of its group,
    the parameters that are `counted_elsewhere` because an earlier group holds them too, and this rank's `device`."""

    everyone: dist.ProcessGroup
    first: bool
    counted_elsewhere: tuple[nn.Parameter, ...]
    device: torch.device


_parts: weakref.WeakKeyDictionary[nn.Module, PartOfModel] = weakref.WeakKeyDictionary()


def enrol(module: nn.Module, part: PartOfModel) -> None:
    """Remember that `module` is a part of the model."""
    _parts[module] = part


def enrolled() -> Iterator[tuple[nn.Module, PartOfModel]]:
    """All such modules that are alive, the youngest first."""
    yield from reversed(list(_parts.items()))


def part_in(module: nn.Module) -> PartOfModel | None:
    """What is remembered of `module`, or of a module inside of it; None where it holds the whole model."""
    return next((_parts[inner] for inner in module.modules() if inner in _parts), None)


def part_of(tensors: Sequence[Tensor]) -> PartOfModel | None:
    """What is remembered of the module that these parameters or gradients belong to.

    Of no tensors, that is of the youngest such module: a rank whose stages have no gradients takes part all the same, for the others wait.
    """
    wanted = {id(tensor) for tensor in tensors}
    for module, part in enrolled():
        if not wanted or any(id(tensor) in wanted for parameter in module.parameters() for tensor in (parameter, parameter.grad)):
            return part
    return None
