"""What all distributed modules have in common: they stay what and where they were made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from autopar.errors import RuntimeSetupError


class DistributedModule(nn.Module):
    """A module whose programs are made for one dtype, one device and one job."""

    _dropout: bool = True
    """Whether dropout is on in training mode; see `autopar.runtime.dropout.without_dropout`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to`, `.half`, `.cuda` and the like do to every tensor. The program is made for one dtype and one device."""
        for tensor in (*self.parameters(), *self.buffers()):
            probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            made = fn(probe)
            if (made.dtype, made.device) != (probe.dtype, probe.device):
                raise RuntimeSetupError(
                    f"a distributed module cannot move from {probe.dtype} on {probe.device} to {made.dtype} on {made.device}: its program "
                    "and plan are made for the former; convert the model first, then plan and parallelize it"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses `pickle` and `copy.deepcopy`: a process group has no copy."""
        raise RuntimeSetupError(
            "a distributed module can be neither pickled nor copied; save and load `state_dict()`, or parallelize a second model"
        )
