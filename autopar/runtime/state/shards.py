"""Which elements of a whole tensor a rank holds: cut them out, say where they lie, and name the placement as DTensor does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import Placement as TorchPlacement

# Private in PyTorch, which means to unify it with `Shard`; then it is `Shard` with whatever says how many blocks.
from torch.distributed.tensor.placement_types import _StridedShard

from autopar.ir.conversion import State
from autopar.ir.placement import R, S
from autopar.runtime.collectives import part


def coordinate_of(mesh: DeviceMesh) -> tuple[int, ...]:
    """This rank's index on each axis of `mesh`."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # our meshes span the whole job
    return tuple(coordinate)


def local_part(whole: Tensor, state: State, sizes: Sequence[int], coordinate: Sequence[int]) -> Tensor:
    """The part of `whole` (global shape) held at `coordinate` of a mesh with these axis `sizes`: a view where it can be, else a copy."""
    for placement, parts, index in zip(state, sizes, coordinate, strict=True):
        if placement.is_shard and parts > 1:
            whole = part(whole, placement.dim, placement.blocks, parts, index)
    return whole


def runs(size: int, dim: int, state: State, sizes: Sequence[int], coordinate: Sequence[int]) -> list[tuple[int, int, int]]:
    """`(global start, local start, length)` of each unbroken run of indices of dim `dim` (of `size`) held at `coordinate`."""
    indices = torch.arange(size).view(*(1 for _ in range(dim)), size)
    held = local_part(indices, _only(state, dim), sizes, coordinate).flatten()
    if not len(held):
        return []
    starts = [0, *(torch.nonzero(held.diff() != 1).flatten() + 1).tolist(), len(held)]
    return [(int(held[start]), start, stop - start) for start, stop in pairwise(starts)]


def _only(state: State, dim: int) -> State:
    return tuple(placement if placement.is_shard and placement.dim == dim else R for placement in state)


def chunks(
    shape: Sequence[int], state: State, sizes: Sequence[int], coordinate: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """`(global offset, local offset, lengths)` of each box of elements that the rank at `coordinate` holds; none if it holds nothing."""
    along = [runs(size, dim, state, sizes, coordinate) for dim, size in enumerate(shape)]
    for box in product(*along):
        yield tuple(run[0] for run in box), tuple(run[1] for run in box), tuple(run[2] for run in box)


def torch_placements(state: State) -> tuple[TorchPlacement, ...]:
    """DTensor's names for a state of `S` and `R`."""
    return tuple(
        Replicate() if not item.is_shard else Shard(item.dim) if item.blocks == 1 else _StridedShard(item.dim, split_factor=item.blocks)
        for item in state
    )


def state_of(tensor: DTensor) -> State | None:
    """The state of a DTensor, or None where it has placements that are not ours (sums, ragged shards)."""
    state = []
    for placement in tensor.placements:
        if isinstance(placement, _StridedShard):
            state.append(S(placement.dim, int(placement.split_factor)))
        elif isinstance(placement, Shard):
            state.append(S(placement.dim))
        elif isinstance(placement, Replicate):
            state.append(R)
        else:
            return None
    return tuple(state)


def distribute(whole: Tensor, mesh: DeviceMesh, state: State) -> DTensor:
    """The DTensor on `mesh` in `state` of a tensor that every rank holds whole. Moves nothing between ranks; copies the part."""
    held = local_part(whole, state, mesh.shape, coordinate_of(mesh)).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        held, mesh, torch_placements(state), run_check=False, shape=whole.shape, stride=contiguous_strides(whole.shape)
    )


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of `shape`."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
