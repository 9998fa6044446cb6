"""Clipping by the norm of the whole gradient, wherever its parts are.

PyTorch's own `clip_grad_norm_` refuses gradients on several meshes and goes through DTensor one tensor at a time; here each rank
adds up its own parts and one small all-reduce for each set of axes that shard something finishes the sum.

Under a pipeline a rank has the gradients of its own stages only. One more all-reduce adds up the groups of ranks, each parameter counted
by the first group that holds it (`PartOfModel`, which such a module registers). PyTorch's own function would clip every rank by the norm
of its stages, and train another model without a word; `install` has it ask here for the norm of gradients that are of a pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import wraps

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.utils import clip_grad

from autopar.runtime.state import parts_checkpoint
from autopar.runtime.state.parts import PartOfModel, enrol, part_of

__all__ = ["PartOfModel", "clip_grad_norm_", "install", "register", "total_norm"]

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
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = _norm(gradients, norm_type, part_of(parameters))
    _refuse_nonfinite(norm, norm_type, error_if_nonfinite)
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # both constants are those of torch.nn.utils.clip_grad_norm_
    _scale([_local(gradient) for gradient in gradients], scale, foreach)
    return norm


def register(module: nn.Module, part: PartOfModel) -> None:
    """Have norms of gradients of `module`, and its checkpoints, taken over all groups of ranks, by PyTorch's own functions too."""
    enrol(module, part)
    install()
    parts_checkpoint.install()


def total_norm(gradients: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all `gradients` as if they were one vector: a plain scalar, the same on every rank, in float32 or wider.

    `norm_type` may be `inf`. Parts are added in float64 on CPU and float32 elsewhere. Of a module that has a part of the model on each
    group of ranks, the gradients of all groups count, and every rank must call.
    """
    gradients = list(gradients)
    return _norm(gradients, norm_type, part_of(gradients))


def _norm(gradients: Sequence[Tensor], norm_type: float, part: PartOfModel | None) -> Tensor:
    assert norm_type > 0
    if part is not None:
        elsewhere = {id(parameter.grad) for parameter in part.counted_elsewhere}
        gradients = [gradient for gradient in gradients if id(gradient) not in elsewhere]
    groups: dict[_Where, list[Tensor]] = {}
    for gradient in gradients:
        gradient = _reduced(gradient)
        groups.setdefault(_where(gradient), []).append(_local(gradient))
    members = [member for parts in groups.values() for member in parts]
    wide = torch.promote_types(torch.float32, max((member.dtype for member in members), key=lambda d: d.itemsize, default=torch.float32))
    device = part.device if part is not None else members[0].device if members else torch.device("cpu")
    total = torch.zeros((), dtype=wide, device=device)
    for where, parts in groups.items():
        partial = _powers(parts, norm_type, wide).to(device)
        if where is not None:
            mesh, axes = where
            for axis in axes:
                dist.all_reduce(partial, dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM, group=mesh.get_group(axis))
        total = torch.maximum(total, partial) if math.isinf(norm_type) else total + partial
    if part is not None:
        total = _over_groups(total, norm_type, part)
    return total if math.isinf(norm_type) else total ** (1.0 / norm_type)


def _over_groups(powers: Tensor, norm_type: float, part: PartOfModel) -> Tensor:
    """The sum of the groups' `powers` (their largest for `inf`), in the widest dtype that any of them has."""
    both = torch.tensor([0.0, float(powers.dtype == torch.float64)], dtype=torch.float64, device=powers.device)
    if part.first:  # all ranks of a group know the group's
        both[0] = powers
    dist.all_reduce(both, dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM, group=part.everyone)
    return both[0] if bool(both[1]) else both[0].float()


def install() -> None:
    """Have PyTorch's own norm of gradients, which its `clip_grad_norm_` and `get_total_norm` are, ask here for those of a pipeline."""
    # Private in PyTorch; should it move, `tests/runtime/test_clip.py` fails, and the new home of the norm is to be patched.
    original = clip_grad._get_total_norm
    if getattr(original, "_autopar", False):
        return

    @wraps(original)
    def get_total_norm(
        tensors: Tensor | Iterable[Tensor], norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if (part := part_of(found)) is None:
            return original(found, norm_type, error_if_nonfinite, foreach)
        with torch.no_grad():
            norm = _norm(found, float(norm_type), part)
        _refuse_nonfinite(norm, norm_type, error_if_nonfinite)
        return norm

    get_total_norm._autopar = True  # type: ignore[attr-defined]
    clip_grad._get_total_norm = get_total_norm
    torch.nn.utils.get_total_norm = get_total_norm


def _refuse_nonfinite(norm: Tensor, norm_type: float, wanted: bool) -> None:
    if wanted and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is not finite ({norm.item()}), so it cannot be clipped; "
            "pass error_if_nonfinite=False to scale by it anyway"
        )


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
