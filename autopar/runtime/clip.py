"""Clipping by the norm of the whole gradient, wherever its parts are.

PyTorch's own `clip_grad_norm_` refuses gradients on several meshes and goes through DTensor one tensor at a time; here each rank
adds up its own parts and one small all-reduce for each set of axes that shard something finishes the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

_Where = tuple[DeviceMesh, tuple[int, ...]] | None
"""A mesh and the axes of it over which a gradient's parts must be added up; None for a plain tensor."""


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale all gradients in place so that their joint norm is at most `max_norm`; returns the norm before that, as a plain tensor.

    As `torch.nn.utils.clip_grad_norm_` on one device: replicated gradients count once, sharded ones are summed over their axes.
    `parameters` may be the module. A collective call: every rank must make it. Returns a scalar that is the same on every rank.
    Raises `RuntimeError` where the norm is not finite and `error_if_nonfinite`.
    """
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    elif isinstance(parameters, Tensor):
        parameters = [parameters]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    norm = total_norm(gradients, norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is not finite ({norm.item()}), so it cannot be clipped; "
            "pass error_if_nonfinite=False to scale by it anyway"
        )
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # both constants are those of torch.nn.utils.clip_grad_norm_
    _scale([_local(gradient) for gradient in gradients], scale, foreach)
    return norm


def total_norm(gradients: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all `gradients` as if they were one vector: a plain scalar, the same on every rank, in float32 or wider.

    `norm_type` may be `inf`. Parts are added in float64 on CPU and float32 elsewhere.
    """
    assert norm_type > 0
    groups: dict[_Where, list[Tensor]] = {}
    for gradient in gradients:
        gradient = _reduced(gradient)
        groups.setdefault(_where(gradient), []).append(_local(gradient))
    wide = torch.promote_types(torch.float32, max((part.dtype for parts in groups.values() for part in parts), key=lambda d: d.itemsize))
    device = next(iter(groups.values()))[0].device
    total = torch.zeros((), dtype=wide, device=device)
    for where, parts in groups.items():
        partial = _powers(parts, norm_type, wide).to(device)
        if where is not None:
            mesh, axes = where
            for axis in axes:
                dist.all_reduce(partial, dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM, group=mesh.get_group(axis))
        total = torch.maximum(total, partial) if math.isinf(norm_type) else total + partial
    return total if math.isinf(norm_type) else total ** (1.0 / norm_type)


def _powers(parts: list[Tensor], norm_type: float, dtype: torch.dtype) -> Tensor:
    """Sum of the `norm_type`-th powers of all elements of `parts` (their largest for `inf`)."""
    norms = [torch.linalg.vector_norm(part, norm_type, dtype=dtype) for part in parts if part.numel()]
    if not norms:
        return torch.zeros((), dtype=dtype, device=parts[0].device)
    stacked = torch.stack([norm.to(norms[0].device) for norm in norms])
    return stacked.max() if math.isinf(norm_type) else (stacked**norm_type).sum()


def _reduced(gradient: Tensor) -> Tensor:
    """A gradient left as a sum over ranks has no norm of its own yet."""
    if isinstance(gradient, DTensor) and any(isinstance(item, Partial) for item in gradient.placements):
        return gradient.redistribute(placements=[Replicate() if isinstance(item, Partial) else item for item in gradient.placements])
    return gradient


def _where(gradient: Tensor) -> _Where:
    if not isinstance(gradient, DTensor):
        return None
    mesh = gradient.device_mesh
    axes = tuple(axis for axis, item in enumerate(gradient.placements) if not isinstance(item, Replicate) and mesh.size(axis) > 1)
    return (mesh, axes) if axes else None


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _scale(parts: list[Tensor], scale: Tensor, foreach: bool | None) -> None:
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for part in parts:
        by_kind.setdefault((part.device, part.dtype), []).append(part)
    for (device, _), members in by_kind.items():
        factor = scale.to(device)
        if foreach is False:
            for part in members:
                part.mul_(factor.to(part.dtype))
        else:
            torch._foreach_mul_(members, factor.to(members[0].dtype))
