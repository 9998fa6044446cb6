"""Weights that stand in several stages: one gradient, the sum of those of all groups that hold one, the same bits everywhere.

Every group adds up the gradients in the order of the groups, its own among them, so that equal weights under an optimizer that works
element by element stay equal to the last bit, however differently the groups store them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.runtime.gradients import add_gradient
from autopar.runtime.pipelining.pipeline_transfer import Layout
from autopar.runtime.pipelining.pipeline_wire import Arriving, Channel, Flight


class TiedWeight:
    """The weight `name` of global `shape`, which `layouts` says how each group (by index) holds, as a rank of group `mine` sees it.
    `differentiable`: whether the loss has a gradient with respect to it."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        differentiable: bool,
        layouts: Mapping[int, Layout],
        mine: int,
        parameter: nn.Parameter,
        everyone: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self.name, self.mine, self.parameter, self.differentiable = name, mine, parameter, differentiable
        self.groups = sorted(layouts)
        what = f"the gradient of `{name}`"
        self._out = {
            group: Channel(what, shape, dtype, layouts[mine], layouts[group], everyone, device) for group in self.groups if group != mine
        }
        self._into = {
            group: Channel(what, shape, dtype, layouts[group], layouts[mine], everyone, device) for group in self.groups if group != mine
        }
        self._before: Tensor | None = None
        self._aside = False

    def set_aside(self) -> None:
        """Before a step: what has been added up until now must not be added up again."""
        self._before, self.parameter.grad, self._aside = self.parameter.grad, None, True

    def restore(self) -> None:
        """As if there had been no step: after one that raised, or that left its gradients to a later one."""
        if self._aside:
            self._before, self.parameter.grad, self._aside = None, self._before, False

    def start(self) -> tuple[Tensor, list[Flight], dict[int, Arriving]]:
        own = self._local_gradient()
        flights: list[Flight] = []
        arriving = {}
        for other in self.groups:
            # Of each pair of groups the lower sends first and the higher receives first.
            if other > self.mine:
                flights += self._out[other].send(own, "between stages")
                arriving[other] = self._into[other].receive("between stages")
            elif other < self.mine:
                arriving[other] = self._into[other].receive("between stages")
                flights += self._out[other].send(own, "between stages")
        return own, flights, arriving

    @torch.no_grad()
    def finish(self, own: Tensor, flights: Sequence[Flight], arriving: Mapping[int, Arriving]) -> None:
        terms = [own if group == self.mine else arriving[group].wait() for group in self.groups]
        for flight in flights:
            flight.land("sending")
        total = terms[0] + terms[1]
        for term in terms[2:]:
            total += term
        self.parameter.grad, self._before, self._aside = self._before, None, False
        add_gradient(self.parameter, total)

    def _local_gradient(self) -> Tensor:
        gradient, parameter = self.parameter.grad, self.parameter
        assert isinstance(parameter, DTensor)
        if gradient is None:
            return torch.zeros_like(parameter._local_tensor)
        return gradient._local_tensor if isinstance(gradient, DTensor) else gradient


def exchange(weights: Sequence[TiedWeight]) -> None:
    """Add up the gradients of `weights` over their groups. Every rank of these calls it, with the weights in the same order."""
    started = [(weight, weight.start()) for weight in weights]
    for weight, (own, flights, arriving) in started:
        weight.finish(own, flights, arriving)
