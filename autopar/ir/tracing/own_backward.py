"""Does the backward of a `torch.autograd.Function` give what autograd makes of its forward? Tried with numbers, on small tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Private: leaves the modes of a trace for a while. Without it such functions would have to be refused altogether.
from torch.utils._python_dispatch import _disable_current_modes

_LONGEST = 3
"""Dims are cut to this length. A function that needs longer ones fails here, and counts as one with another backward."""

_SCALES = (0.1, 1.0, 30.0)
"""Sizes of values and of incoming gradients: what clips either is to be found."""


class _Context:
    """Stands for `ctx` where only the forward runs."""

    needs_input_grad = (True,) * 64

    def save_for_backward(self, *tensors: Any) -> None: ...
    def mark_dirty(self, *tensors: Any) -> None: ...
    def mark_non_differentiable(self, *tensors: Any) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def backward_is_that_of_forward(function: Any, apply: Any, args: tuple[Any, ...]) -> bool:
    """Whether `function` (called by `apply`) has the gradients of its forward's operations, for arguments like `args`."""
    try:
        with _disable_current_modes(), torch.enable_grad():
            return all(_agrees(function, apply, args, value, gradient) for value in _SCALES for gradient in _SCALES)
    except Exception:  # the function may do anything with tensors of other sizes; then nothing is known
        return False


def _agrees(function: Any, apply: Any, args: tuple[Any, ...], value_scale: float, gradient_scale: float) -> bool:
    generator = torch.Generator().manual_seed(0)

    def small(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        shape = [min(size, _LONGEST) for size in item.shape]
        if not item.is_floating_point():
            return torch.zeros(shape, dtype=item.dtype)
        return (torch.randn(shape, dtype=torch.float64, generator=generator) * value_scale).requires_grad_()

    given = pytree.tree_map(small, args)
    leaves = [item for item in pytree.tree_leaves(given) if isinstance(item, Tensor) and item.requires_grad]

    def gradients(results: Any) -> list[Tensor | None]:
        drawn = torch.Generator().manual_seed(1)
        outputs = [item for item in pytree.tree_leaves(results) if isinstance(item, Tensor) and item.requires_grad]
        incoming = [torch.randn(item.shape, dtype=item.dtype, generator=drawn) * gradient_scale for item in outputs]
        return list(torch.autograd.grad(outputs, leaves, incoming, allow_unused=True)) if outputs else []

    separate = function.setup_context is not torch.autograd.Function.setup_context
    plain = function.forward(*given) if separate else function.forward(_Context(), *given)
    ours, theirs = gradients(plain), gradients(apply(*given))
    if len(ours) != len(theirs):
        return False

    def same(one: Tensor | None, other: Tensor | None, leaf: Tensor) -> bool:
        zero = torch.zeros_like(leaf)
        return torch.allclose(zero if one is None else one, zero if other is None else other, rtol=1e-6, atol=1e-12)

    return all(same(one, other, leaf) for one, other, leaf in zip(ours, theirs, leaves, strict=True))
