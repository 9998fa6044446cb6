"""Conversions on live tensors: `autopar.ir.conversion`'s steps with their forward and backward actions.

A `LocalStep` is one step made concrete for one rank: sizes, parts, this rank's index and the name of the axis' group. Only plain
numbers and names, so that a traced program can carry it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.ir.conversion import Action, State, steps
from autopar.ir.placement import Placement, R, local_shape
from autopar.runtime import collectives


@dataclass(frozen=True, slots=True)
class Place:
    """Where this rank stands: mesh `axes` sizes, its `coordinate`, and the name of its process group on each axis."""

    mesh: tuple[int, ...]
    coordinate: tuple[int, ...]
    groups: tuple[str, ...]

    def local_shape(self, shape: tuple[int, ...], state: State) -> tuple[int, ...]:
        """Shape of this rank's part of a value of global `shape`."""
        return local_shape(shape, state, self.mesh, self.coordinate)


@dataclass(frozen=True, slots=True)
class Part:
    """How an axis cuts a dim: `dim`, `blocks`, and the `size` of the whole that the axis' ranks share (unused where nothing is cut)."""

    dim: int = 0
    blocks: int = 1
    size: int = 0


@dataclass(frozen=True, slots=True)
class LocalStep:
    """One step on one rank: the value goes from `source` to `target` by `forward`, its gradient back by `backward`."""

    forward: Action
    backward: Action
    source: Part
    target: Part
    parts: int
    index: int
    group: str

    def run(self, x: Tensor) -> Tensor:
        """The forward action on a value that carries no gradient."""
        return act(self.forward, x, self.source, self.target, self.parts, self.index, self.group)

    def run_backward(self, gradient: Tensor) -> Tensor:
        """The backward action on a gradient."""
        return act(self.backward, gradient, self.target, self.source, self.parts, self.index, self.group)

    def arguments(self) -> tuple[Any, ...]:
        """Plain arguments of `convert` behind the tensor."""
        source, target = self.source, self.target
        return (
            self.forward, self.backward, source.dim, source.blocks, source.size, target.dim, target.blocks, target.size,
            self.parts, self.index, self.group,
        )  # fmt: skip


def local_steps(source: State, target: State, shape: tuple[int, ...], place: Place) -> tuple[LocalStep, ...]:
    """The steps from `source` to `target` of a value of global `shape`, for the rank at `place`. Axes of size 1 take none."""
    found = []
    state = list(source)
    for step in steps(source, target):
        around = tuple(R if axis == step.axis else placement for axis, placement in enumerate(state))
        whole = place.local_shape(shape, around)
        state[step.axis] = step.target
        if place.mesh[step.axis] > 1:
            found.append(
                LocalStep(
                    step.forward, step.backward, _part(step.source, whole), _part(step.target, whole),
                    place.mesh[step.axis], place.coordinate[step.axis], place.groups[step.axis],
                )
            )  # fmt: skip
    return tuple(found)


def _part(placement: Placement, whole: tuple[int, ...]) -> Part:
    return Part(placement.dim, placement.blocks, whole[placement.dim]) if placement.is_shard else Part()


def act(action: Action, x: Tensor, source: Part, target: Part, parts: int, index: int, group: str) -> Tensor:
    """Run one action that takes `x` from `source` to `target`. May return `x` itself or a view of it."""
    match action:
        case "nothing":
            return x
        case "keep_first":
            return x if index == 0 else torch.zeros_like(x)
        case "slice":
            # A copy where the part is strided: a view would keep the whole alive and slow every reader.
            return collectives.part(x, target.dim, target.blocks, parts, index).contiguous()
        case "pad":
            return collectives.pad_part(x, source.dim, source.blocks, source.size, parts, index)
        case "all_reduce":
            return collectives.all_reduce(x, group)
        case "all_gather":
            return collectives.all_gather(x, source.dim, source.blocks, source.size, group)
        case "reduce_scatter":
            return collectives.reduce_scatter(x, target.dim, target.blocks, group)
        case "all_to_all":
            if source.dim == target.dim:
                whole = collectives.all_gather(x, source.dim, source.blocks, source.size, group)
                return collectives.part(whole, target.dim, target.blocks, parts, index).contiguous()
            return collectives.all_to_all(x, source.dim, source.blocks, target.dim, target.blocks, source.size, group)


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Action, backward: Action, dim: int, blocks: int, size: int,
        to_dim: int, to_blocks: int, to_size: int, parts: int, index: int, group: str,
    ) -> Tensor:  # fmt: skip
        ctx.step = (backward, dim, blocks, size, to_dim, to_blocks, to_size, parts, index, group)
        y = act(forward, x, Part(dim, blocks, size), Part(to_dim, to_blocks, to_size), parts, index, group)
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        backward, dim, blocks, size, to_dim, to_blocks, to_size, parts, index, group = ctx.step
        gradient = act(backward, gradients[0], Part(to_dim, to_blocks, to_size), Part(dim, blocks, size), parts, index, group)
        return (gradient, *(None,) * 11)


def convert(x: Tensor, *arguments: Any) -> Tensor:
    """One `LocalStep` (its `arguments()`) on `x`, with its gradient."""
    result: Tensor = _Convert.apply(x, *arguments)  # type: ignore[no-untyped-call]
    return result


class _ReadAs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, reduced: torch.dtype | None, steps: tuple[LocalStep, ...]) -> Tensor:
        ctx.stored, ctx.reduced, ctx.steps = x.dtype, reduced, steps
        y = x.to(dtype)
        for step in steps:
            y = step.run(y)
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0] if ctx.reduced is None else gradients[0].to(ctx.reduced)
        for step in reversed(ctx.steps):
            gradient = step.run_backward(gradient)
        return gradient.to(ctx.stored), None, None, None


def read_as(x: Tensor, dtype: torch.dtype, reduced: torch.dtype | None, steps: tuple[LocalStep, ...]) -> Tensor:
    """All `steps` of a parameter on its stored part `x`, in `dtype`; its gradient goes back in `reduced` and ends in the dtype of `x`."""
    result: Tensor = _ReadAs.apply(x, dtype, reduced, steps)  # type: ignore[no-untyped-call]
    return result


def convert_value(x: Tensor, *arguments: Any) -> Tensor:
    """One `LocalStep` (its `arguments()`) on `x`, without gradient."""
    forward, _, dim, blocks, size, to_dim, to_blocks, to_size, parts, index, group = arguments
    return act(forward, x, Part(dim, blocks, size), Part(to_dim, to_blocks, to_size), parts, index, group)


def convert_all(x: Tensor, source: State, target: State, shape: tuple[int, ...], place: Place) -> Tensor:
    """`x`, this rank's part in `source` of a value of global `shape`, in `target`; with its gradient where it has one."""
    for step in local_steps(source, target, shape, place):
        x = convert(x, *step.arguments())
    return x
